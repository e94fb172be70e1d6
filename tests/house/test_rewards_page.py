"""docs/rewards.md: the reward that it shows takes what a run gives it, from a row of the page's kind."""

import json
import re

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data.build import build_data
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.rollouts.policy_tasks import of_rows
from gemma4_tpu.rollouts.rewarding import Answer, Rewarded, open_reward
from tests.house.scripts import ROOT

PAGE = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")


def test_the_reward_of_the_page_knows_a_right_answer(tmp_path, monkeypatch):
    tokenizer = load_tokenizer("embedded:tiny")
    (code,) = re.findall(r"^```python\n# my_reward.py\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "my_reward.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"prompt": f"Is {n} even?", "completion": "yes" if n % 2 == 0 else "no"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(format="auto", train=[DataSource(path=str(tmp_path / "rows.jsonl"))], heldout_fraction=0.25)
    task = of_rows(build_data(data, tokenizer).train, tokenizer)[0]
    assert task.reference in ("yes", "no")  # free of control tokens, or no answer would equal it
    with open_reward(RolloutsConfig(reward="my_reward:exact")) as reward:
        given = reward([Answer(task, task.reference, True), Answer(task, "yes and no", True), Answer(task, "n", False)])
    assert given == [Rewarded(1.0, "right"), Rewarded(0.0, "wrong"), Rewarded(0.0, "truncated")]
    keys = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    assert keys == set(Answer(task, "", True).to_row())
