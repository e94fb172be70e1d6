"""`python -m launch.tpu_vm …`: in a checkout, equivalent to `gemma4-tpu launch tpu_vm …`."""

import sys

from gemma4_tpu.launch.tpu_vm import main

if __name__ == "__main__":
    sys.exit(main())
