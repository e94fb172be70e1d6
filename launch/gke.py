"""`python -m launch.gke …`, in a checkout what `gemma4-tpu launch gke …` is everywhere."""

import sys

from gemma4_tpu.launch.gke import main

if __name__ == "__main__":
    sys.exit(main())
