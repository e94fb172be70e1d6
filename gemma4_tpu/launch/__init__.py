"""Runs on rented accelerators: `launch tpu_vm` (Cloud TPU VMs), `launch gke` (GKE through xpk). Imports no JAX.

They take the arguments of `train`, and run it there. Files for editing (`skypilot.yaml`, `Dockerfile`) are in `launch/`
of the checkout.
"""
