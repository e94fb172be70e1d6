"""A checkout's entry points to `gemma4_tpu/launch`: `python -m launch.tpu_vm`, `python -m launch.gke`. Alongside, files
to edit: `skypilot.yaml` (SkyPilot), `Dockerfile` (the image for GKE), `install.sh` (used by all), `demo.sh`.
"""
