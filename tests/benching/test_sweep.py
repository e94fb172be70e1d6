"""Many cells: states, going on, what is left behind, and what costing makes of it."""

import base64
import html.parser
import json
import math
import re

import pytest
import yaml

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.bench import BENCH
from gemma4_tpu.config.load import load
from gemma4_tpu.costing.ceiling import ModelDemand
from gemma4_tpu.costing.read import read
from gemma4_tpu.errors import UserError
from tests.benching.conftest import cell

FEW = ["bench.requests=4", "bench.warmup_requests=1"]
LOADS = ("paper", "matrix")
RATES = [*FEW, "bench.lengths=[[16,4],[64,4],[300,4]]", "bench.rates=[2,inf]"]
"""Two requests a second: a busy machine that lets one wait for half a second overloads nothing."""


class Page(html.parser.HTMLParser):
    """Tags and what they would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]


@pytest.fixture
def swept(played, bench):
    server = played(max_model_len=128, refuse_over=40)
    return server, *bench(server, *RATES, "slice=v6e-8", "architecture=gemma4_31b")


def test_a_login_in_the_endpoint_is_shown_nowhere(played, bench, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server, secret = played(), "planted" + "Login0123"
    server.endpoint = server.endpoint.replace("://", f"://me:{secret}@")
    code, folder, *said = bench(server, *FEW, "bench.lengths=[[16,4]]", "bench.rates=[inf]")
    assert code == 0 and list((folder / "cells").iterdir())
    assert not any(secret in text for text in said)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_states_and_what_is_left(swept, bench):
    server, code, folder, out, _ = swept
    assert code == 0
    states = {path.stem: json.loads(path.read_text())["state"] for path in (folder / "cells").iterdir()}
    assert states == {
        "in16_out4_rate2": "ok", "in16_out4_rateinf": "ok",
        "in64_out4_rate2": "infeasible", "in64_out4_rateinf": "infeasible",  # the server says so
        "in300_out4_rate2": "infeasible", "in300_out4_rateinf": "infeasible",  # it was never asked
    }  # fmt: skip
    assert "maximum context length is 64" in cell(folder, "in64_out4_rateinf")["reason"]
    assert cell(folder, "in300_out4_rateinf")["reason"] == "304 tokens; the longest sequence has 128"
    assert "2 of 6 cells measured (4 infeasible); 8 requests completed, 0 failed" in out
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished" and result["ok"] == 2 and result["peak_cell"].startswith("in16")
    assert max(t for a in server.answers for t in a["asked"]["prompt"]) > 100_000  # the whole vocabulary

    report, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert "†" in report and out.splitlines()[0] in report
    found = Page(page)
    assert found.fetched == [] and found.tags.count("img") == 2 and found.tags.count("tr") == 7
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert [base64.b64decode(p) for p in pictures] == [
        (folder / "plots" / f"{name}.png").read_bytes() for name in ("throughput", "ttft")
    ]

    before = len(server.answers)
    assert bench(server, *RATES, "slice=v6e-8", "architecture=gemma4_31b")[0] == 0
    assert len(server.answers) == before  # nothing was asked a second time

    points = read([str(folder)]).points
    assert [point.name for point in points] == ["16 in, 4 out, 2.0 requests/s", "16 in, 4 out, inf requests/s"]
    assert points[0].slice == "v6e-8" and points[0].serving.model == ModelDemand.of(ARCHITECTURES["gemma4_31b"])


def test_the_papers_sweep_and_a_grid_like_the_blogs():
    paper, matrix = (load(["endpoint=http://127.0.0.1:1", f"bench={name}"], BENCH).root.bench for name in LOADS)
    assert (paper.requests, paper.temperature, paper.arrivals) == (30, 0, "poisson")
    assert sorted(paper.rates) == [1, 2, 4, 8, 16, 32, 64, math.inf]
    assert [tokens for tokens, _ in paper.lengths] == [512, 1024, 4096, 8192, 15360]
    assert (len(matrix.users), len(matrix.lengths)) == (12, 12)


def test_failed_cells_run_again_with_other_prompts(played, bench):
    bad, good = played(fail_every=4), played()
    words = [*FEW, "bench.lengths=[[16,4]]", "bench.users=[1,2]", "bench.rates=[]"]
    code, folder, out, _ = bench(bad, *words)
    assert code == 1 and "0 of 2 cells measured (2 failed)" in out
    code, _, out, _ = bench(good, *words)
    assert code == 0 and "2 of 2 cells measured; 12 requests completed, 0 failed" in out
    found = cell(folder, "in16_out4_users2")
    assert (found["attempt"], found["max_concurrency"], found["request_rate"]) == (1, 2, "inf")
    assert found["max_concurrent_requests"] == 2 and found["completed"] == 8
    before, after = ({tuple(a["asked"]["prompt"]) for a in server.answers} for server in (bad, good))
    assert not before & after
    assert sorted(path.name for path in (folder / "plots").iterdir()) == ["throughput_matrix.png", "ttft_matrix.png"]
    assert "2 users" in read([str(folder)]).points[1].name


def test_a_server_that_goes_away(played, bench):
    words = [*FEW, "bench.lengths=[[16,4],[17,4],[18,4]]", "bench.rates=[100]"]
    code, folder, _, err = bench(played(die_at=6), *words)  # after warm-up and cell of the first lengths
    assert code == 2 and "lists no models" in err and f"run_dir={folder} resumes" in err
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    assert [path.name for path in sorted((folder / "cells").iterdir())] == [
        "in16_out4_rate100.json", "in17_out4_rate100.json"
    ]  # fmt: skip
    assert [point.name for point in read([str(folder)]).points] == ["16 in, 4 out, 100.0 requests/s"]
    server = played()
    code, _, _, err = bench(server, *words, "bench.seed=3")
    assert code == 2 and "bench.seed: 3 (the run has 0)" in err
    assert bench(server, *words)[0] == 0 and len(server.answers) == 2 * 5


def test_a_record_of_serve_says_where(played, bench, tmp_path):
    server, record = played(), tmp_path / "record"
    record.mkdir()
    host, port = server.endpoint.removeprefix("http://").split(":")
    serving = {"slice": "v6e-4", "host": host, "port": int(port)}
    (record / "config.yaml").write_text(yaml.safe_dump({"serving": serving, "run": str(tmp_path / "gone")}))
    code, folder, _, _ = bench(None, f"served={record}", *FEW, "bench.lengths=[[16,4]]", "bench.rates=[inf]")
    assert code == 0
    assert [point.slice for point in read([str(folder)]).points] == ["v6e-4"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "endpoint is not set; give endpoint="),
        (["endpoint=127.0.0.1:8000"], "endpoint=127.0.0.1:8000: not a server address"),
        (["endpoint='http://[::1'"], "endpoint=http://[::1: not a server address"),
        (["endpoint=http://host:port"], "endpoint=http://host:port: not a server address"),
        (["endpoint='http://host?key=1'"], "endpoint=http://host?key=1: not a server address"),
        (["bench.users=[1]"], "bench.rates=[1.0, 2.0"),
        (["bench.rates=[]"], "bench.rates=[], bench.users=[]: give one of them"),
        (["bench.rates=[0]"], "bench.rates: 0.0 must be more than 0"),
        (["bench=matrix", "bench.users=[0]"], "bench.users: 0 must be at least 1"),
        (["bench=matrix", "bench.arrivals=fixed"], "bench.arrivals=fixed: only with bench.rates"),
        (["bench.arrivals=steady"], "bench.arrivals=steady: not a choice"),
        (["bench.lengths=[[16]]"], "bench.lengths: [16] is not a pair"),
        (["bench.rates=[1,1]"], "bench.rates: 1.0 is listed twice"),
        (["bench.requests=0"], "bench.requests=0: must be at least 1"),
        (["slice=v6e8"], "slice=v6e8: no such slice; did you mean slice=v6e-8?"),
        (["architecture=gemma4"], "architecture=gemma4: no such architecture"),
        (["served=nowhere"], "served=nowhere: not the record of a server"),
    ],
)
def test_refusals(words, told):
    with pytest.raises(UserError, match=re.escape(told)):
        load(words, BENCH)
