"""`python -m gemma4_tpu.train`, but `model=tiny` has two layers, one of either kind: less to compile.

For tests of what happens around the step: saves, signals, processes. Weights are `model.path=random:0`.
"""

from dataclasses import replace

from gemma4_tpu.architectures import ARCHITECTURES, GLOBAL, SLIDING

ARCHITECTURES["tiny"] = replace(ARCHITECTURES["tiny"], num_layers=2, layer_types=(SLIDING, GLOBAL))

if __name__ == "__main__":
    from gemma4_tpu.errors import leave
    from gemma4_tpu.train import main

    leave(main())
