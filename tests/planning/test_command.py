"""`python -m gemma4_tpu.plan`: refusals at once, plan.json and pictures, misfits with what to change."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from gemma4_tpu import plan
from gemma4_tpu.config.keys import field_docs, field_types
from gemma4_tpu.config.load import load
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.plan import PLAN
from gemma4_tpu.planning import attempt, misfit, search
from gemma4_tpu.planning.attempt import result_of
from gemma4_tpu.planning.auto_remat import HEADROOM, POLICIES, first_that_fits
from gemma4_tpu.planning.calibration import BAND
from gemma4_tpu.planning.compilation import ASSIGNED, FINISHED
from gemma4_tpu.planning.estimate import PlanResult, estimate
from gemma4_tpu.planning.kernels import Mask
from gemma4_tpu.planning.misfit import misfit_line
from gemma4_tpu.planning.planned import Planned
from gemma4_tpu.planning.program import OutOfMemory
from gemma4_tpu.planning.roofline import roofline
from gemma4_tpu.planning.schedule import Op, Transfer, plain
from gemma4_tpu.planning.search import pareto
from gemma4_tpu.reporting.memory_bars import plot_hbm
from gemma4_tpu.reporting.plan_rows import plan_rows
from gemma4_tpu.reporting.plans import print_plan
from tests.models.skeletons import write_skeleton
from tests.tpu_compiler import needs_tpu_compiler

pytestmark = needs_tpu_compiler


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hardware=v5p9"], ["hardware=v5p9", "v5p8"]),
        (["hardware=local"], ["hardware=local", "v6e4"]),
        (["hardware=h200"], ["hardware=h200", "TPU slices"]),
        (["mesh.tp=3"], ["mesh.tp=3", "mesh.fsdp=1 mesh.tp=4"]),
        (["hardware=v6e8", "mesh.fsdp=2", "trainer.global_batch_sequences=3"], ["global_batch_sequences=3", "=4"]),
        (["trainer.remat=most"], ["trainer.remat=most", "decoder"]),
        (["plan.search_flags=[fast]"], ["plan.search_flags=['fast']", "tuned"]),
        (["hardware.flags=fast"], ["hardware.flags=fast", "tuned"]),
        (["plan.utilization_low=0.9"], ["plan.utilization_low=0.9", "plan.utilization_high=0.45"]),
        (["model=gemma4_31b", "lora=none"], ["lora.enabled=false"]),
        (["hardware.compiler_options.xla_tpu_x=1"], ["hardware.compiler_options={xla_tpu_x: …}"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_compiled(words, told, capsys, tmp_path):
    assert plan.main([*words, f"run_dir={tmp_path / 'plan'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    for part in told:
        assert part in said
    assert not (tmp_path / "plan").exists()


def test_the_issues_own_words_plan_the_papers_rows():
    loaded = load(["hardware=v5p8", "model=gemma4_31b", "lora.rank=64"], PLAN)
    assert loaded.checked.mesh == MeshSizes(1, 1, 4)
    assert loaded.root.trainer.global_batch_sequences == 1
    assert not loaded.checked.data_here
    fill = Planned.of(loaded.root, loaded.checked).fill
    assert fill.examples == 9959
    assert fill.mean_tokens == pytest.approx(922, rel=0.01)
    assert 0.94 < fill.fill <= 1
    assert fill.updates * fill.real_tokens_per_update == pytest.approx(9959 * fill.mean_tokens, rel=0.001)


def test_weights_and_data_need_not_be_there():
    loaded = load(["experiment=v5p8", "model.path=/nowhere/gemma", "data.train.0.path=/nowhere/rows.jsonl"], PLAN)
    assert loaded.checked.architecture.num_layers == 60
    assert any("/nowhere/gemma" in warning for warning in loaded.checked.warnings)


@pytest.mark.parametrize("words", [[], ["objective=grpo"], ["objective=grpo", "rollouts.benchmark=verilog_smoke"]])
def test_nothing_is_said_of_what_was_not_given(words):
    warnings = load(["hardware=v5p8", "model=gemma4_31b", *words], PLAN).checked.warnings
    assert not any("no effect" in warning or "absent" in warning for warning in warnings), warnings


def test_rows_that_are_here_are_measured():
    words = ["hardware=v6e1", "model=tiny", "model.path=embedded:tiny", "data=verilog_smoke", "data.max_rows=200"]
    loaded = load(words, PLAN)
    fill = Planned.of(loaded.root, loaded.checked).fill
    assert fill.source.startswith("measured")
    assert fill.examples <= 200


ANSWER = {
    "hbm_limit_bytes": 1000,
    "versions": {},
    "compiled": {
        "argument_bytes": 400,
        "peak_bytes": 715,
        "held": {"base": 300, "lora": 40, "optimizer": 50, "batch": 3},
        "counts": {
            "flops": 8e12, "matmul_flops": 6e12, "kernel_flops": 1.5e12, "other_flops": 0.5e12, "bytes_accessed": 9e9,
            "hbm_traffic_bytes": 6e9, "collectives": {"all-gather": {"count": 3, "bytes": 4e9}}, "not_counted": [],
            "attention": [{"window": None, "block_q": 512, "block_kv": 512, "flops": 1.5e12}],
            "hbm_read_again_bytes": 0.0, "link_bytes": {"+x": 2e9, "+y": 2e9},
        },
        "schedule": [],
        "cost_analysis": {},
    },
    "lowering_seconds": 1.0,
    "compile_seconds": 2.0,
}  # fmt: skip
SCHEDULE = plain(
    (
        Op(name="gather", part="collectives_exposed", starts="gather",
           transfer=Transfer(sent_bytes=4e9, links=2, lanes=("+x", "+y"))),
        Op(name="loop", trips=10, body=(
            Op(name="product", part="base_products", label="btd,df->btf", place="models/gemma4.py:105 (_project)",
               cycles=35_000_000),
            Op(name="norm", cycles=1_750_000),
        )),
        Op(name="done", waits_for="gather"),
    )
)  # fmt: skip
SCHEDULED = {**ANSWER, "compiled": {**ANSWER["compiled"], "schedule": SCHEDULE, "cost_analysis": {"flops": 1.0}}}


@pytest.fixture
def planned():
    loaded = load(["hardware=v5p8", "model=gemma4_31b", "lora.rank=64"], PLAN)
    return Planned.of(loaded.root, loaded.checked)


def result(planned, **changes) -> PlanResult:
    return replace(estimate(planned, ANSWER), **changes)


def test_estimates_follow_from_the_compilers_figures(planned):
    told = result(planned)
    seconds = told.roofline_seconds
    visited = told.attention_blocks_visited["global"]
    assert 0.3 < visited < 0.8  # examples of 922 tokens on average, in rows of 4096 and blocks of 512
    assert told.flops_per_chip == 8e12 - (1 - visited) * 1.5e12
    assert seconds["compute"] == told.flops_per_chip / 459e12
    assert seconds["hbm"] == 6e9 / 2765e9
    # 2 GB over each of two links; six of them, in both directions, are 1,200 GB/s.
    assert seconds["interconnect"] == pytest.approx(2e9 / 100e9)
    assert told.step_seconds is None
    assert told.bound_by == "interconnect"
    assert told.seconds_per_update["mid"] == pytest.approx(seconds["update"] / 0.325)
    assert told.usd_estimate["on_demand"]["mid"] == pytest.approx(told.hours["mid"] * 16.80)
    tokens = told.updates * told.real_tokens_per_update
    assert told.usd_per_million_real_tokens == pytest.approx(told.usd_estimate["on_demand"]["mid"] / tokens * 1e6)
    assert sum(told.hbm_parts_bytes_per_chip.values()) == told.hbm_bytes_per_chip == 715
    assert told.bytes_accessed_per_chip == 9e9
    assert told.flops_over_analytic == told.flops_per_chip / told.analytic_flops_per_chip


def test_a_schedule_replaces_the_assumed_utilization(planned):
    told, walked = result_of(planned, SCHEDULED)
    # Ten rounds of 20 ms and 1 ms at 1.75 GHz; 4 GB over two links of 90 GB/s are there long before.
    assert told.step_seconds == walked.seconds == pytest.approx(0.21)
    assert told.step_seconds_low == pytest.approx(0.21 * BAND.low)
    assert told.step_seconds_high == pytest.approx(0.21 * BAND.high)
    exposed = {part: seconds for part, seconds in told.step_parts.items() if part != "collectives_hidden"}
    assert sum(exposed.values()) == pytest.approx(told.step_seconds)
    assert told.step_parts["base_products"] == pytest.approx(0.2)
    assert told.step_parts["collectives_hidden"] == pytest.approx(4e9 / 180e9, rel=1e-3)
    first = told.top_operations[0]
    assert (first["source"], first["times"]) == ("models/gemma4.py:105 (_project)", 10)
    assert first["share"] == pytest.approx(20 / 21)
    # Seconds, hours and dollars are the band's.
    assert told.seconds_per_update["low"] == pytest.approx(told.step_seconds_high)
    assert told.seconds_per_update["high"] == pytest.approx(told.step_seconds_low)
    assert told.utilization["schedule_compute"] == pytest.approx(told.roofline_seconds["compute"] / 0.21)
    left_out = replace(planned, config=replace(planned.config, plan=replace(planned.config.plan, schedule=False)))
    assert result_of(left_out, SCHEDULED)[0].seconds_per_update["mid"] == pytest.approx(
        told.roofline_seconds["update"] / 0.325
    )


def test_buckets_shorter_than_the_longest_take_their_share_of_its_time():
    loaded = load(["hardware=v5p8", "model=gemma4_31b", "data.packing=buckets"], PLAN)
    told = result(planned := Planned.of(loaded.root, loaded.checked))
    assert 0.1 < planned.fill.length_share < 0.9
    whole = told.roofline_seconds["update"] / 0.325
    assert told.seconds_per_update["mid"] == pytest.approx(whole * planned.fill.length_share)


def test_one_chip_sends_nothing():
    one_chip = load(["hardware=v6e1", "model=gemma4_e2b"], PLAN).checked.slice
    assert roofline(one_chip, 1.0, 1.0, {}, {})["interconnect"] == 0.0
    assert roofline(one_chip, 1.0, 1.0, {})["interconnect"] == 0.0  # records of old counts


@pytest.mark.parametrize("window", [None, 1024])
def test_attention_is_planned_in_the_blocks_that_hold_a_common_example(planned, window):
    mask, length = Mask(window, 512, 512), 4096
    rng = np.random.default_rng(3)
    rows = [np.diff(np.sort(rng.choice(length, 6, replace=False))) for _ in range(5)]
    fill = replace(planned.fill, rows=rows)
    visited = total = 0
    for row in rows:  # by the definition: each pair of tokens
        example = np.repeat(np.arange(len(row) + 1), [*row, length - row.sum()])
        q, k = np.arange(length)[:, None], np.arange(length)[None, :]
        seen = (k <= q) & (True if window is None else q - k < window)
        total += seen.reshape(8, 512, 8, 512).any((1, 3)).sum()
        # of blocks that the mask leaves, those whose ranges of examples meet
        meets = (example[:, None] == example[None, :]).reshape(8, 512, 8, 512).any((1, 3))
        visited += (seen.reshape(8, 512, 8, 512).any((1, 3)) & meets).sum()
    assert fill.share_visited(mask, length) == visited / total
    assert replace(fill, rows=[]).share_visited(mask, length) == 1.0


def test_every_key_of_plan_json_is_documented():
    told = {  # by their names
        "flops_per_real_token_and_chip", "hbm_traffic_bytes_per_real_token_and_chip", "chips", "model", "microbatches",
        "bytes_accessed_per_real_token_and_chip", "lowering_seconds", "step_seconds_low",
    }  # fmt: skip
    undocumented = set(field_types(PlanResult)) - set(field_docs(PlanResult)) - told
    assert not undocumented


def test_the_cheapest_changes_are_tried_first(planned, monkeypatch):
    config = replace(planned.config, trainer=replace(planned.config.trainer, remat="none", global_batch_sequences=8))
    large = replace(planned, config=config)
    tried = []

    def compiled(candidate):
        tried.append(candidate.config)
        saves = candidate.config.trainer.microbatches >= 4
        return result(candidate, fits=saves, hbm_bytes_per_chip=900 if saves else 3000)

    monkeypatch.setattr(misfit, "plan_one", compiled)
    start = result(large, fits=False, hbm_bytes_per_chip=4000, hbm_limit_bytes_per_chip=1000)
    found = misfit.nearest_fits(large, start, attempts=5)
    assert [one["overrides"] for one in found[:2]] == [
        ["trainer.remat=decoder"],
        ["trainer.remat=decoder", "trainer.microbatches=4"],  # three times too much, so eight rows in fours
    ]
    assert [one["fits"] for one in found] == [False, True, True]
    assert len(misfit.nearest_fits(large, start, attempts=1)) == 1
    assert misfit.nearest_fits(large, start, attempts=0) == []


def test_the_largest_of_the_weights_trained_in_full_is_left_out_at_last(planned):
    lora = replace(planned.config.lora, modules_to_train=["norms", "embeddings"])
    large = replace(planned, config=replace(planned.config, lora=lora))
    start = result(large, fits=False, hbm_bytes_per_chip=4000, hbm_limit_bytes_per_chip=1000)
    found = [change.overrides[-1] for change in misfit.changes(large, [], lambda: start)]
    at = found.index("lora.modules_to_train=[norms]")
    assert any("lora.quantize=nf4" in word for word in found[:at])


def test_auto_takes_the_first_policy_with_room():
    needs = dict.fromkeys(POLICIES, 90) | {POLICIES[0]: 200, POLICIES[1]: 98}
    chosen = first_that_fits(lambda policy: (policy, needs[policy]), lambda result: (result[1], 100))
    assert chosen[0] == POLICIES[2]  # 98 of 100 leave less than HEADROOM
    assert HEADROOM > 0.02
    assert first_that_fits(lambda policy: (policy, None), lambda result: (result[1], 100))[0] == POLICIES[-1]


def test_the_front_holds_what_nothing_beats(planned):
    def point(usd, used, fits=True):
        return result(planned, usd_per_million_real_tokens=usd, hbm_bytes_per_chip=used, fits=fits)

    cheap, roomy, beaten, misfit_ = point(1.0, 900), point(2.0, 100), point(3.0, 500), point(0.1, 5000, fits=False)
    assert pareto([beaten, roomy, misfit_, cheap]) == [cheap, roomy]


def test_a_plan_is_shown_and_drawn(planned, tmp_path, capsys):
    told = result(planned)
    print_plan(told, tmp_path)
    said = capsys.readouterr().out
    for part in ("Fits", "base weights", "all-gather 3", "bound by interconnect", "assumed", "estimated", "On demand"):
        assert part in said
    plot_hbm([told, replace(told, fits=False, hbm_bytes_per_chip=2000)], tmp_path / "hbm.png")
    assert (tmp_path / "hbm.png").read_bytes()[:4] == b"\x89PNG"


def test_a_plan_with_room_names_a_mesh_with_fewer_chips_to_a_copy_of_the_weights(planned):
    def room(used, **sizes):
        mesh = {"dp": 1, "fsdp": 2, "tp": 2, **sizes}
        used, limit = (gib * 2**30 for gib in (used, 1000))
        told = result(planned, mesh=mesh, hbm_bytes_per_chip=used, hbm_limit_bytes_per_chip=limit, lora_rank=4)
        return dict(plan_rows(told)).get("Room")

    assert room(501) is None
    assert "mesh.dp=2 mesh.fsdp=1 mesh.tp=2, 2 rows to a microbatch, at most 1000.00 GiB per chip" in room(500)
    assert "mesh.dp=4 mesh.fsdp=1 mesh.tp=1, 4 rows to a microbatch, at most 1000.00 GiB per chip" in room(250)
    assert room(100, fsdp=1, tp=1) is None


SMALL = ["hardware=v6e1", "model=tiny", "lora.rank=4", "data.sequence_length=256", "trainer.remat=none"]


@pytest.mark.slow
def test_a_plan_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert plan.main([*SMALL, f"run_dir={tmp_path}"]) == 0
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["lora_rank"] == int(told["trained"].rpartition("=")[2])
    assert told["fits"] is True
    assert set(told) == {"kind", "version", *field_types(PlanResult)}
    for key in (
        "hbm_bytes_per_chip", "hbm_limit_bytes_per_chip", "flops_per_chip", "hbm_traffic_bytes_per_chip",
        "real_tokens_per_update", "roofline_seconds", "bound_by", "compile_seconds", "usd_estimate", "step_seconds",
        "step_parts", "top_operations",
    ):  # fmt: skip
        assert told[key], key
    assert any("models/" in one["source"] for one in told["top_operations"])
    assert (tmp_path / "timeline.png").is_file()

    again = tmp_path / "again"  # the program is kept
    assert plan.main([*SMALL, f"run_dir={again}"]) == 0
    second = json.loads((again / "plan.json").read_text())
    assert second.pop("compiled_before") and not told.pop("compiled_before")
    measured = ("lowering_seconds", "compile_seconds")
    assert {k: v for k, v in second.items() if k not in measured} == {
        k: v for k, v in told.items() if k not in measured
    }
    assert (tmp_path / "hbm.png").is_file() and (tmp_path / "config.yaml").is_file()
    assert "yes: " in capsys.readouterr().out


REFUSAL = (  # what the compiler says; the real one is asked in test_tpu.py
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (602.31G) exceeds"
    " available HBM (31.25G)."
)


class Stub:
    """A compilation that answers at once: too large with less remat than `decoder`."""

    def __init__(self, planned):
        self.planned = planned

    def wait(self, seconds, stage=ASSIGNED):
        if self.planned.config.trainer.remat == "decoder":
            return SCHEDULED if stage == FINISHED else ANSWER
        told = {"message": REFUSAL, "needed_bytes": OutOfMemory(REFUSAL).needed_bytes}
        return {"hbm_limit_bytes": int(31.25 * 2**30), "versions": {}, "out_of_memory": told, "held": {"base": 1}}

    def close(self):
        pass


def test_a_run_that_does_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attempt, "start", lambda planned, stage: Stub(planned))
    assert plan.main([*SMALL, "plan.max_attempts=1", f"run_dir={tmp_path}"]) == 1
    said = capsys.readouterr()
    line = next(line for line in said.err.splitlines() if line.startswith("does not fit: "))
    assert "602.3 GiB" in line and "31.25 GiB of HBM per v6e chip" in line
    assert "trainer.remat=decoder: fits" in said.out
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["fits"] is False
    assert told["hbm_bytes_per_chip"] > told["hbm_limit_bytes_per_chip"] == 31.25 * 2**30
    assert [one["overrides"] for one in told["alternatives"]] == [["trainer.remat=decoder"]]
    assert told["alternatives"][0]["usd_per_million_real_tokens"] > 0
    assert (tmp_path / "hbm.png").is_file()


def test_auto_is_resolved_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "start", lambda planned, stage: Stub(planned))
    assert plan.main([*SMALL, "trainer.remat=auto", f"run_dir={tmp_path}"]) == 0
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["fits"] and told["remat"] == "decoder"
    assert told["step_seconds"] > 0
    assert (tmp_path / "timeline.png").read_bytes()[:4] == b"\x89PNG"


def test_the_schedule_can_be_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attempt, "start", lambda planned, stage: Stub(planned))
    words = ["trainer.remat=decoder", "plan.schedule=false", f"run_dir={tmp_path}"]
    assert plan.main([*SMALL, *words]) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["step_seconds"] is None
    assert not (tmp_path / "timeline.png").exists()
    assert "assumed" in capsys.readouterr().out


def test_what_training_would_refuse_in_the_checkpoint_is_logged(tmp_path, monkeypatch):
    base = write_skeleton(tmp_path / "base", "tiny", without=["model.layers.3.mlp.up_proj.weight"])
    monkeypatch.setattr(attempt, "start", lambda planned, stage: Stub(planned))
    words = ["trainer.remat=decoder", "plan.schedule=false", f"model.path={base}", f"run_dir={tmp_path / 'plan'}"]
    assert plan.main([*SMALL, *words]) == 0
    log = " ".join((tmp_path / "plan/log.txt").read_text().split())
    assert "training would be refused: " in log and "1 missing: model.layers.3.mlp.up_proj.weight" in log

    words = [*words[:2], f"model.path={tmp_path / 'none'}", f"run_dir={tmp_path / 'other'}"]
    assert plan.main([*SMALL, *words]) == 0
    log = " ".join((tmp_path / "other/log.txt").read_text().split())
    assert log.count("no such folder") == 1 and "planned with the numbers of" in log  # said once


def test_what_is_known_first_stays_when_the_compiler_fails_later(tmp_path, monkeypatch):
    class Failing(Stub):
        def wait(self, seconds, stage=ASSIGNED):
            if stage == FINISHED:
                raise RuntimeError("the compiling process ended with signal 9")
            return super().wait(seconds, stage)

    monkeypatch.setattr(attempt, "start", lambda planned, stage: Failing(planned))
    with pytest.raises(RuntimeError, match="signal 9"):
        plan.main([*SMALL, "trainer.remat=decoder", f"run_dir={tmp_path}"])
    assert json.loads((tmp_path / "plan.json").read_text())["fits"]


def test_a_search_shows_the_front_and_why_others_are_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "start", lambda planned, stage: Stub(planned))
    monkeypatch.setattr(attempt, "start", lambda planned, stage: Stub(planned))
    words = ["hardware=v5p16", "model=gemma4_31b", "search=true", "plan.search_rows=[1,2]", "plan.max_candidates=14"]
    assert plan.main([*words, f"run_dir={tmp_path}"]) == 0
    told = json.loads((tmp_path / "search.json").read_text())
    assert told["front"] and all(one["remat"] == "decoder" for one in told["front"])
    # The best three by their rooflines were compiled to the end with either set of flags, and they alone are ranked.
    scheduled = [one["plan"] for one in told["results"] if one["plan"]["step_seconds"] is not None]
    assert sorted(one["flags"] for one in scheduled) == ["none"] * 3 + ["tuned"] * 3
    assert all(one["step_seconds"] is not None for one in told["front"])
    reasons = " ".join(one["reason"] for one in told["skipped"])
    assert "not possible for model=gemma4_31b on 8 devices" in reasons  # tp=8 does not divide four KV heads
    assert "global_batch_sequences=2 did not fit" in reasons  # what needs more is not tried
    assert reasons.count("plan.max_candidates=14") == told["left_out"] > 1
    shown = capsys.readouterr().out
    assert "→" in shown and f"{told['left_out']} more were left out by plan.max_candidates=14 (search.json" in shown
    assert shown.count("skipped ") == len(told["skipped"]) - told["left_out"] > 1


def test_a_compiling_process_ends_with_its_plan(tmp_path):
    """However that ends: its stdin is closed then."""
    folder = tmp_path / "dump"
    folder.mkdir()
    code = (
        "import pathlib, sys; from gemma4_tpu.planning import child; child._end_with_parent(pathlib.Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE)
    assert folder.exists()
    process.stdin.close()
    assert process.wait(60) == 1
    assert not folder.exists()


def test_a_kernel_that_asks_for_too_much_on_chip_memory_is_told_as_such(planned):
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.50M of 16.00M vmem."
    told = result(planned, fits=False, hbm_bytes_per_chip=None, message=message)
    assert "on-chip memory" in misfit_line(told) and "HBM" not in misfit_line(told)


def test_rows_that_training_drops_cost_nothing():
    whole, short = (
        Planned.of(loaded.root, loaded.checked).fill
        for length in (4096, 1024)
        for loaded in [load(["hardware=v6e1", "model=gemma4_e2b", f"data.sequence_length={length}"], PLAN)]
    )
    assert whole.examples == 9959 and "dropped" not in whole.source
    # lognormal: ln 1024 is 0.46 sigma above the median of these lengths
    assert short.examples == pytest.approx(0.677 * 9959, rel=0.005)
    assert f"{9959 - short.examples:,} longer ones dropped" in short.source
    assert short.mean_tokens == pytest.approx(665, rel=0.02)  # of those that fit, by numerical integration
    words = ["hardware=v6e1", "model=gemma4_e2b", "data.sequence_length=64", "plan.rows=10", "plan.p99_tokens=1000"]
    loaded = load(words, PLAN)
    with pytest.raises(UserError, match=r"plan\.mean_tokens=922: no row fits into data\.sequence_length=64"):
        Planned.of(loaded.root, loaded.checked)


def test_a_plan_of_rows_that_were_not_read_says_so(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    own = ["hardware=v6e1", "model=gemma4_e2b", "data=chat_jsonl", f"data.train={rows}"]

    def warned(*words):
        return [one for one in load([*own, *words], PLAN).checked.warnings if "minutes and dollars" in one]

    assert "no tokenizer is here" in warned()[0] and "9,959 rows of 922 tokens" in warned()[0]
    assert "no such file" in warned(f"data.train={tmp_path}/rws.jsonl")[0]
    assert "read from afar" in warned("data.train=gs://bucket/rows.jsonl")[0]
    assert warned("plan.rows=40") == warned("trainer.max_updates=100") == []
    assert warned("data=codev_r1", "data.train.0.path=hf:rows")[0].startswith("data.max_rows=null: CodeV-R1 has about")
    assert warned("data=codev_r1", "data.max_rows=10000", "data.train.0.path=hf:rows") == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["calibration=absent"], "plan.calibration=absent: no such folder"),
        (["calibration=."], "of 0 run(s) none has measured_over_predicted"),
        (["calibration=.", "plan.schedule=false"], "give plan.schedule=true, or leave it out"),
    ],
)
def test_runs_that_calibrate_nothing_are_refused_before_minutes_of_compilation(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        load(["hardware=v6e1", "model=gemma4_e2b", *words], PLAN)
    assert told in str(refused.value)
