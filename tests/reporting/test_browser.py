"""Pages in a real headless Chromium, wide and narrow, light and dark: what a reader sees, and what is asked of whom."""

import io
import re

import pytest

from gemma4_tpu.bench import main as bench
from gemma4_tpu.report import main
from tests.benching.conftest import Played
from tests.browser import CHROMIUM, Browser
from tests.reporting.conftest import evaluate, merge, plan, serve, train

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: how reports look in a browser is not tested (sudo apt-get install chromium)"
)
WIDE, NARROW = 1280, 390


@pytest.fixture(scope="module")
def browser():
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run with everything, two runs side by side, and a benchmark's own page."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("reports")
        patch.chdir(folder)
        run, second = train(folder / "outputs/train/smoke"), train(folder / "outputs/train/second")
        merge(run)
        evaluate(run / "evaluations/1", "run", [2, 2, 1, 0])
        evaluate(run / "evaluations/1/base", "base", [0, 0, 0, 0])
        plan(run / "plans/1")
        serve(run / "servings/1", run)
        server = Played(folder, {"first_seconds": 0.005, "chunk_seconds": 0.001})
        words = ["bench.requests=4", "bench.warmup_requests=1", "bench.lengths=[[16,4],[64,8]]"]
        try:
            assert (
                bench([f"endpoint={server.endpoint}", f"run_dir={run}/benchmarks/1", *words, "bench.rates=[100,inf]"])
                == 0
            )
        finally:
            server.stop()
        assert main([f"run={run}", "prices={local: 0.36}"]) == 0
        assert main([f"run=[{run},{second}]", "out=several.md"]) == 0
    return {
        "run": run / "report.html", "several": folder / "several.html", "bench": run / "benchmarks/1/report.html",
    }  # fmt: skip


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", ["run", "several", "bench"])
def test_a_page_at_any_width_and_in_both_schemes(name, width, dark, pages, browser):
    seen = browser.look(pages[name], width, dark=dark)
    assert seen.said == []
    assert seen.requested == [pages[name].as_uri()]  # the page itself, and nothing else
    assert seen.facts["width"] == seen.facts["scroll_width"] == width
    assert seen.facts["overflowing"] == []  # wider tables and plots scroll inside their own box
    images, tables = seen.facts["images"], seen.facts["tables"]
    assert len(images) >= 2 and [alt for alt, loaded, shown in images if not loaded or shown < 300] == []
    assert tables and min(tables) > 100
    assert (_light(seen.facts["background"]) < 60) == dark
    assert abs(_light(seen.facts["background"]) - _light(seen.facts["ink"])) > 150
    assert _colours(seen.screenshot) > 200  # plots are drawn, not blank


def test_the_run_page_shows_every_section(pages, browser):
    """What is drawn from the records of each stage has its picture."""
    alts = [alt for alt, *_ in browser.look(pages["run"], WIDE).facts["images"]]
    assert alts == ["hbm", "loss", "learning rate", "throughput", "throughput", "ttft"]


def test_a_console_error_and_a_request_would_be_seen(tmp_path, browser):
    """The browser's own test: what must not happen is noticed when it does."""
    page = tmp_path / "page.html"
    head = "<meta name='viewport' content='width=device-width'><script>console.error('so')</script>"
    page.write_text(f"{head}<body><div style='width: 900px'>wide</div><img src='gone.png'>")
    seen = browser.look(page, NARROW)
    assert any("so" in said for said in seen.said)
    assert seen.requested == [page.as_uri(), (tmp_path / "gone.png").as_uri()]
    assert seen.facts["overflowing"] and seen.facts["images"][0][1] is False


def _light(colour: str) -> float:
    """Mean of red, green and blue of `rgb(…)`, 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def _colours(png: bytes) -> int:
    import numpy as np
    from matplotlib.image import imread

    pixels = (imread(io.BytesIO(png))[::4, ::4, :3] * 255).astype(np.uint32)
    return len(np.unique(pixels @ np.array([1 << 16, 1 << 8, 1], np.uint32)))
