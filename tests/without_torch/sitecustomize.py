"""First on PYTHONPATH, it hides PyTorch from a process, as on TPUs, where only serving on a CPU needs it.

transformers imports it wherever it is installed, which takes longer than all else that a training imports.
"""

import sys

sys.modules["torch"] = None  # importing it fails, and importlib finds nothing
