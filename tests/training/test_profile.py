"""`trainer.profile`: a trace that XProf reads, of the updates that were named, and a run that does not notice."""

import jax
import pytest

from gemma4_tpu.errors import UserError
from gemma4_tpu.training.profile import Profile, check_profile
from tests.training.conftest import HARD
from tests.training.test_resume import rows


def updates_in(trace) -> set[int]:
    """Numbers of the updates that are marked in the only trace of a folder."""
    (file,) = trace.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "update"]
    return {dict(event.stats)["step_num"] for event in events}


@pytest.mark.slow
def test_a_trace_holds_its_updates_and_changes_nothing(shallow, tmp_path):
    plain, traced = tmp_path / "plain", tmp_path / "traced"
    shallow(*HARD, f"run_dir={plain}", cwd=tmp_path)
    shallow(*HARD, f"run_dir={traced}", "trainer.profile=[3,5]", cwd=tmp_path)  # over an evaluation and a checkpoint
    assert updates_in(traced / "profile") == {3, 4, 5}
    assert rows(traced) == rows(plain)


def test_a_resumed_run_records_what_is_left_of_the_range(tmp_path):
    profile = Profile([3, 5], tmp_path)
    assert not profile.starts(2) and profile.starts(4)  # it went on from the checkpoint at update 3
    profile.start()
    assert not profile.starts(5) and not profile.ends(4) and profile.ends(5)
    with profile.closing():
        jax.block_until_ready(jax.numpy.ones(3) + 1)
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
    assert not profile.starts(5)  # once


def test_only_process_0_records():
    assert not any(Profile([1, 3], None).starts(update) for update in range(5))


def test_updates_that_the_run_does_not_have_are_refused():
    check_profile([3, 4], total_updates=4)
    check_profile(None, total_updates=4)
    with pytest.raises(UserError, match=r"trainer\.profile=\[3, 5\]: the run has 4 updates"):
        check_profile([3, 5], total_updates=4)
