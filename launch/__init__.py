"""Runs on rented accelerators: `python -m launch.tpu_vm` (Cloud TPU VMs), `python -m launch.gke` (GKE through xpk),
`skypilot.yaml` (SkyPilot). They take what `python -m gemma4_tpu.train` takes, and run that there. No JAX here.
"""
