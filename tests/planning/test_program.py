"""Reading what the compiler writes down while it is still writing."""

import pytest

from gemma4_tpu.planning.program import dumped

TEXT = """HloModule jit_train

ENTRY %main (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %kernel = f32[2]{0} custom-call(%p), frontend_attributes={mesh={
}}, metadata={op_name="attend"}
  ROOT %out = f32[2]{0} negate(%kernel)
}
"""
ASSIGNED = "BufferAssignment:\nallocation 0: size 512, parameter 0, shape |f32[2]| at ShapeIndex {}:\n"
USED = "Memory Space: default (color=0)\n  Total bytes: 1024\n"


def write(folder, text=TEXT, assigned=ASSIGNED, used=USED):
    name = "module_0001.jit_train.after_optimizations"
    (folder / f"{name}_after_buffer_assignment.txt").write_text(text)
    (folder / f"{name}-buffer-assignment.txt").write_text(assigned)
    (folder / f"{name}-memory-usage-report.txt").write_text(used)


def test_a_whole_dump_is_read(tmp_path):
    write(tmp_path)
    program = dumped(tmp_path)
    assert (program.text, program.argument_bytes, program.peak_bytes) == (TEXT, 512, 1024)


@pytest.mark.parametrize("part", [TEXT[: TEXT.index("}}, ") + 3], TEXT[: TEXT.index("ENTRY")], ""])
def test_a_program_that_is_still_being_written_is_not_read(tmp_path, part):
    write(tmp_path, text=part)
    assert dumped(tmp_path) is None


@pytest.mark.parametrize("files", [{"assigned": ""}, {"used": "Memory Space: default"}])
def test_nor_one_whose_memory_is_still_being_written(tmp_path, files):
    write(tmp_path, **files)
    assert dumped(tmp_path) is None
