"""Runs on rented accelerators: `launch tpu_vm` (Cloud TPU VMs), `launch gke` (GKE through xpk). No JAX here.

They take what `train` takes, and run that there. What one edits (`skypilot.yaml`, `Dockerfile`) is in `launch/` of the
checkout.
"""
