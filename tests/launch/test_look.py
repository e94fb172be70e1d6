"""A launch looks at the checkpoint first: a slice costs money, headers do not."""

import pytest

from gemma4_tpu.launch import tpu_vm
from tests.launch.conftest import PLACE
from tests.models.skeletons import write_skeleton

WORDS = [
    "hardware=v5p8", "model=tiny", "data=verilog_smoke", "trainer.global_batch_sequences=64", "launch.watch=false",
    "git=https://example.org/gemma4-tpu.git@main", *PLACE,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_no_slice_is_asked_for_where_training_would_refuse_the_checkpoint(played, bucket, tmp_path, capsys, whole):
    from gemma4_tpu.storage import filesystem

    without = [] if whole else ["model.layers.3.mlp.up_proj.weight"]
    folder = write_skeleton(tmp_path / "base", "tiny", without=without)
    fs, root = filesystem(bucket)
    fs.put(str(folder), f"{root}/base", recursive=True)
    played.play({"states": ["ACTIVE"]})
    assert tpu_vm.main([*WORDS, f"model.path={bucket}/base"]) == (0 if whole else 2)
    assert bool(played.asked("create")) == whole
    if not whole:
        told = capsys.readouterr().err
        assert "training would refuse the checkpoint:" in told
        assert "1 missing: model.layers.3.mlp.up_proj.weight" in told
