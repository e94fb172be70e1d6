"""`python -m launch.gke …`: in a checkout, equivalent to `gemma4-tpu launch gke …`."""

import sys

from gemma4_tpu.launch.gke import main

if __name__ == "__main__":
    sys.exit(main())
