"""What the record of experiments/grpo_smoke says; the test suite runs on-policy objectives in short form elsewhere."""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "experiments/grpo_smoke"


def test_the_record_says_what_its_page_says():
    record, page = json.loads((FOLDER / "record.json").read_text()), (FOLDER / "README.md").read_text()
    for name, score in record["pass_at_1"].items():
        assert f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in page, name
    for pair, gap in record["differences"].items():
        assert f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]".replace("-", "−") in page, pair
    for name, passes in record["token_passes"].items():
        assert f"{passes / 1e6:.2f} M" in page, name
    assert json.loads((FOLDER / "certificate.json").read_text())["holds"]
