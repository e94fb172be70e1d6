"""`python -m launch.tpu_vm …`, in a checkout what `gemma4-tpu launch tpu_vm …` is everywhere."""

import sys

from gemma4_tpu.launch.tpu_vm import main

if __name__ == "__main__":
    sys.exit(main())
