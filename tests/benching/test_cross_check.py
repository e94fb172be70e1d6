"""`vllm bench serve` in a played container, beside our own client: same cells, ratios, causes, failures."""

import json
import os
import signal
import statistics
import threading
import time

import pytest
import yaml

from gemma4_tpu.bench import main
from gemma4_tpu.benching.cross_check import compare, verdict
from gemma4_tpu.config.serving import ServeRoot
from gemma4_tpu.serving.checks import examine_serve
from gemma4_tpu.serving.command import container_name, run_words
from gemma4_tpu.serving.engine import ContainerEngine
from tests.benching.conftest import cell
from tests.processes import ends
from tests.training.test_security import PLANTED, leaks

FEW = ["bench=vllm", "bench.requests=6", "bench.warmup_requests=0"]
CELLS = [*FEW, "bench.lengths=[[16,6]]", "bench.rates=[20,inf]"]


@pytest.fixture
def record(docker, merged, port, tmp_path):
    """A server in a played container that answers, and the record that `serve` keeps of it."""
    root = ServeRoot(run=str(merged("gemma4_e2b")))
    serving = root.serving
    serving.image, serving.slice, serving.port = "vllm/vllm-tpu:v0.32.0", "v6e-1", port
    checked, problems = examine_serve(root)
    assert not problems
    docker.play(chunk_seconds=0.03)  # a busy machine adds little to that
    engine = ContainerEngine("docker")
    serving.compile_cache = None
    container = engine.run(run_words(serving, checked), container_name(serving))
    folder = tmp_path / "record"
    folder.mkdir()
    told = {"serving": {"slice": "v6e-1", "host": "127.0.0.1", "port": port}, "run": root.run}
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    while "startup complete" not in (docker.folder / "containers" / container / "log").read_text():
        time.sleep(0.02)
    yield folder
    if docker.containers:
        engine.remove(container)


def comparison(folder):
    return json.loads((folder / "cross_check" / "comparison.json").read_text())


def test_both_clients_see_the_same_server(record, bench, docker, port, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret-of-the-client")
    code, folder, out, _ = bench(None, f"served={record}", *CELLS, "bench.arrivals=fixed")
    assert code == 0
    told = comparison(folder)["cells"]
    assert list(told) == ["in16_out6_rate20", "in16_out6_rateinf"]
    figures = told["in16_out6_rate20"]["figures"]
    assert figures["median_tpot_ms"]["ratio"] == pytest.approx(1, abs=0.25)  # chunks come every 30 ms for both
    place, rounds = folder / "cross_check", [f"in16_out6_rate20{again}" for again in ("", "_round2", "_round3")]
    theirs = [json.loads((place / f"{name}.json").read_text()) for name in rounds]
    ours = [cell(folder, rounds[0]), *(cell(place, name) for name in rounds[1:])]
    for key, figure in figures.items():
        own = {"ours": [one[key] for one in ours], "vllm": [one[key] for one in theirs]}
        assert figure["rounds"] == own
        assert (figure["ours"], figure["vllm"]) == tuple(map(statistics.median, own.values()))
        assert figure["ratio"] == figure["ours"] / figure["vllm"]
    assert all(one["completed"] == 6 and "generated_texts" not in one for one in theirs)
    assert [path.stem for path in sorted((folder / "cells").iterdir())] == list(told)  # further rounds are apart
    written = [(place / f"{name}.json").stat().st_mtime_ns for name in rounds]
    between = [(place / "cells" / f"{name}.json").stat().st_mtime_ns for name in rounds[1:]]
    assert written[0] < between[0] < written[1] < between[1] < written[2]  # in turn
    report, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert "## Cross-check by `vllm bench serve`" in report and out.split("\n\n")[1].splitlines()[2] in report
    assert page.count("<table>") == 2
    commands = [call for call in docker.calls if call[0] == "exec" and "vllm" in call]
    assert len(commands) == 6
    assert commands[0][:4] == ["exec", "--env", "OPENAI_API_KEY", f"gemma4-serve-{port}"]
    flags = commands[0][commands[0].index("serve") + 1 :]
    assert flags[flags.index("--request-rate") + 1] == "20.0" and flags[flags.index("--burstiness") + 1] == "1000000.0"
    assert ["--request-rate" in command for command in commands] == [True] * 3 + [False] * 3
    assert "s3cret" not in json.dumps(docker.calls)
    assert not list(docker.containers[0].glob("tmp-*"))  # nothing stays in the container

    count = len(docker.calls)
    assert bench(None, f"served={record}", *CELLS, "bench.arrivals=fixed")[0] == 0
    assert not any("vllm" in call for call in docker.calls[count:])  # what is there is not run again


def test_users_and_failures_that_run_again(record, bench, docker):
    words = [f"served={record}", *FEW, "bench.lengths=[[16,4]]", "bench.rates=[]", "bench.users=[2]"]
    docker.play(bench={"exit": 1, "line": "ValueError: the tokenizer is broken"})
    code, folder, out, _ = bench(None, *words)
    assert code == 1 and "vLLM's client failed: exit code 1: ValueError: the tokenizer is broken" in out
    assert json.loads((folder / "result.json").read_text())["cross_check"]["failed"] == ["in16_out4_users2"]
    docker.play(bench={"fails": 3})
    code, _, out, _ = bench(None, *words)
    assert code == 1 and "vLLM's client failed: 4 of 12 requests: ConnectionResetError" in out
    docker.play()
    assert bench(None, *words)[0] == 0
    asked = [call for call in docker.calls if call[0] == "exec" and "vllm" in call]
    assert [call[call.index("--max-concurrency") + 1] for call in asked] == ["2"] * 5  # two that failed, three rounds
    assert [call[call.index("--num-prompts") + 1] for call in asked] == ["12"] * 5
    assert len({call[call.index("--seed") + 1] for call in asked}) == 5  # other prompts each time


def test_a_login_in_the_servers_url_stays_there(record, bench, port):
    """vLLM's client begins its output with all that it was given."""
    url = f"http://me:{PLANTED[-3]}@127.0.0.1:{port}"
    words = [f"served={record}", f"endpoint={url}", *FEW, "bench.lengths=[[16,4]]", "bench.rates=[inf]"]
    code, folder, out, err = bench(None, *words)
    assert code == 0 and leaks(folder, out, err) == []
    said = (folder / "cross_check/in16_out4_rateinf.log").read_text()
    assert said.startswith("Namespace(") and f"base_url='http://***@127.0.0.1:{port}'" in said


def test_one_that_is_interrupted_leaves_no_client_behind(record, bench, docker):
    docker.play(bench={"sleep_seconds": 60})
    pids = []

    def interrupt():
        until = time.monotonic() + 120
        while not pids and time.monotonic() < until:
            for path in docker.folder.glob("containers/*/tmp-gemma4-bench/pid"):
                pids.extend(map(int, path.read_text().split()))
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    code, folder, _, err = bench(None, f"served={record}", *CELLS)
    watcher.join()
    assert code == 130 and f"run_dir={folder}" in err
    assert ends(pids[0])
    assert not list(docker.containers[0].glob("tmp-*"))


def test_without_a_container(bench, docker, tmp_path):
    folder = tmp_path / "record"
    folder.mkdir()
    told = {"serving": {"slice": "v6e-1", "host": "127.0.0.1", "port": 8765, "engine": "docker"}, "run": "m"}
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    code, _, _, err = bench(None, f"served={folder}", *CELLS)
    assert code == 2 and "No such object: gemma4-serve-8765" in err and "no server on that port runs" in err
    told["serving"]["slice"] = "local"
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    assert main([f"served={folder}", *CELLS]) == 2
    assert main(["endpoint=http://127.0.0.1:1", *CELLS]) == 2


def test_the_commands_can_be_seen_before(docker, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"serving": {"slice": "v6e-8", "host": "0.0.0.0", "port": 8765}, "run": "outputs/train/a"})
    )
    assert main([f"served={tmp_path}", "bench=vllm", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert out.count("docker exec gemma4-serve-8765 sh -c") == 3
    assert "# 1,024 in, 128 out, 8 requests/s: 100 requests" in out and "# 3 rounds of each cell" in out
    assert "--served-model-name a " in out and "--base-url http://127.0.0.1:8765 " in out
    assert docker.calls == []


def test_a_server_without_a_container_has_its_client_beside_it(docker, tmp_path, capsys):
    serving = {"slice": "local", "runner": "process", "executable": "/v/bin/vllm", "host": "127.0.0.1", "port": 8765}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"serving": serving, "run": str(tmp_path / "a")}))
    assert main([f"served={tmp_path}", "bench=vllm", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert out.count("/v/bin/vllm bench serve") == 3 and f"--model {tmp_path / 'a'} " in out
    assert main([f"served={tmp_path}", "bench=vllm", f"run_dir={tmp_path / 'bench'}"]) == 2
    assert "/v/bin/vllm: the command is gone" in capsys.readouterr().err


FIGURES = {
    "state": "ok", "completed": 200, "request_throughput": 10.0, "output_throughput": 1000.0,
    "total_token_throughput": 9000.0, "median_ttft_ms": 100.0, "median_tpot_ms": 20.0, "median_itl_ms": 20.0,
    "median_e2el_ms": 2000.0, "total_input_tokens": 200_000, "total_output_tokens": 25_600,
    "prefix_cache_hit_tokens": 0.0, "prefix_cache_query_tokens": 200_000.0, "median_sending_lag_ms": 0.5,
    "chunks_per_token": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ({"output_throughput": 1099.0, "median_ttft_ms": 124.0}, {}, "agrees"),
        ({"median_ttft_ms": 14.0}, {"median_ttft_ms": 9.5}, "agrees"),  # a client's own milliseconds
        ({"median_tpot_ms": None}, {}, "agrees"),  # answers of one token
        ({"output_throughput": 1101.0}, {}, "disagrees (output_throughput 1.10): none that is known of"),
        ({"completed": 30, "median_ttft_ms": 126.0}, {"completed": 30}, "chance: 30 requests a round"),
        ({"median_ttft_ms": 130.0}, {"prefix_cache_hit_tokens": 80_000.0}, "0% and 40% of prompt tokens from the"),
        ({"median_ttft_ms": 130.0, "median_sending_lag_ms": 80.0}, {}, "this client sent 80 ms late"),
        ({"median_itl_ms": 60.0, "chunks_per_token": 0.33}, {}, "0.33 chunks per token"),
        (
            {"median_e2el_ms": 2600.0, "total_output_tokens": 33_000}, {},
            "answers of 99,000 tokens here, 76,800 there",
        ),
    ],
)  # fmt: skip
def test_disagreement_is_told_with_its_likely_cause(ours, theirs, told):
    assert told in verdict(compare([FIGURES | ours] * 3, [FIGURES | theirs] * 3))


def test_one_round_of_a_busy_machine_is_outvoted():
    slow = FIGURES | {"output_throughput": 500.0, "median_ttft_ms": 900.0}
    assert compare([FIGURES, slow, FIGURES], [FIGURES] * 3)["agrees"]
    assert not compare([FIGURES, slow, slow], [FIGURES] * 3)["agrees"]
    failed = {"state": "failed", "reason": "1 of 30 requests: reset"}
    assert verdict(compare([FIGURES, failed], [FIGURES] * 2)) == "this client failed: 1 of 30 requests: reset"


def test_a_search_is_no_list_of_cells(capsys):
    words = ["served=nowhere", "bench=slo", "bench.slo=ttft_p99<1s", "bench.cross_check=true"]
    assert main(words) == 2
    assert "bench.cross_check=true: a search has no cells to repeat" in capsys.readouterr().err
