"""What a run writes about itself holds no secret, and nothing it is given is executed or leads out of its folder."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gemma4_tpu
from gemma4_tpu.errors import REFUSED, STORAGE_GONE, UserError
from gemma4_tpu.redact import is_secret_name, redact
from gemma4_tpu.train import load_train, main

ROOT = Path(gemma4_tpu.__file__).parent
SECRETS = {
    "HF_TOKEN": "hf_plantedPLANTEDplantedPLANTED12345",
    "WANDB_API_KEY": "planted0wandb1key2planted3wandb4key5plan",
    "MY_SERVICE_PASSWORD": "correct-horse-planted-battery",
    "AWS_SECRET_ACCESS_KEY": "plantedAWSsecret/plantedAWSsecret/plante",
}
PLANTED = [*SECRETS.values(), *(f"planted{kind}0123456789" for kind in ("Login", "Query", "Bearer"))]
"""Those of the environment, and those that are only in URLs and headers on the command line.

Assembled, since a run folder holds the diff of a checkout, this file included."""


def leaks(folder: Path, *printed: str) -> list[tuple[str, str]]:
    """(secret, where it is found)."""
    texts = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    texts |= {f"printed {number}": text.encode() for number, text in enumerate(printed)}
    named = [(secret, str(path)) for path in folder.rglob("*") for secret in PLANTED if secret in str(path)]
    return named + [(secret, where) for where, text in texts.items() for secret in PLANTED if secret.encode() in text]


@pytest.mark.slow
def test_secrets_wherever_a_user_can_put_them_are_in_no_file_and_no_output(shallow, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1", "completion": "2"}\n' * 40)
    words = [
        "model.path=random:0", "lora.rank=2", "data=chat_jsonl", f"data.train.0.path={rows}", "data.sequence_length=64",
        "data.heldout_fraction=0.1", "trainer.max_updates=2", "trainer.remat=none", "optimizer.warmup_updates=0",
        "tracker=wandb", f"tracker.project={SECRETS['WANDB_API_KEY']}", f"tracker.group={SECRETS['HF_TOKEN']}",
        f"tracker.tags=['https://me:{PLANTED[-3]}@host/x','https://host/rows?token={PLANTED[-2]}',"
        f"'Authorization: Bearer {PLANTED[-1]}']",
        f"tracker.entity={SECRETS['MY_SERVICE_PASSWORD']}", f"run_dir={run}",
    ]  # fmt: skip
    done = shallow(*words, cwd=tmp_path)
    assert len(list(run.rglob("*"))) > 15 and list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert leaks(tmp_path, done.stdout, done.stderr) == []
    assert "project: '***'" in (run / "config.yaml").read_text()

    again = shallow(*words, "trainer.max_updates=3", cwd=tmp_path)  # what is blanked is no difference
    assert "resumed from the checkpoint at update 2" in again.stderr
    assert leaks(tmp_path, again.stdout, again.stderr) == []


@pytest.mark.parametrize("key", ["name", "model.path", "run_dir", "data.train.0.path", "tracker.nonsense", "hardware"])
def test_a_refusal_shows_no_secret(key, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    for value in (SECRETS["HF_TOKEN"], f"https://me:{PLANTED[-3]}@host/x", f"hf://a/b?token={PLANTED[-2]}"):
        assert main([f"{key}='{value}'"]) in (REFUSED, STORAGE_GONE)
    said = "".join(capsys.readouterr())
    assert not [secret for secret in PLANTED if secret in said]


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--info", "config"]])
def test_a_printed_configuration_shows_no_secret(flags, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.setenv("MY_SERVICE_PASSWORD", SECRETS["MY_SERVICE_PASSWORD"])
    words = [f"tracker.project={SECRETS['HF_TOKEN']}", f"tracker.group={SECRETS['MY_SERVICE_PASSWORD']}"]
    with pytest.raises(SystemExit):
        load_train([*flags, *words, "tracker.entity=somebody"])
    said = capsys.readouterr().out
    assert "entity: somebody" in said and "project: '***'" in said.replace("project: ***", "project: '***'")
    assert not [secret for secret in PLANTED if secret in said]


@pytest.mark.parametrize(
    ("secret", "names"),
    [
        (
            True,
            "HF_TOKEN GITHUB_PAT DB_PASS DB_PWD PGPASSWORD MYSQL_PWD SSHPASS HFTOKEN API_TOKENS MY_SECRETS API_KEYS",
        ),
        (True, "accessToken clientSecret apiKey GOOGLE_APPLICATION_CREDENTIALS AZURE_STORAGE_CONNECTION_STRING"),
        (False, "PATH PWD OLDPWD HOME USER COMPASS KEYBOARD TOKENIZERS_PARALLELISM MAX_TOKENS BYPASS_CACHE"),
    ],
)
def test_names_of_secrets(secret, names):
    assert {name: is_secret_name(name) for name in names.split()} == dict.fromkeys(names.split(), secret)


@pytest.mark.parametrize(
    "text",
    ["glpat-PLANTEDplanted0123456789", "xoxb-123456789012-PLANTEDplanted", "ASIAPLANTEDPLANTED01", "npm_" + "pL4n" * 9,
     "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.PLANTED-planted", "https://hooks.slack.com/services/T000/B000/PLANTEDplanted",
     "AccountName=a;AccountKey=PLANTED/planted+PLANTED/planted==;",
     "-----BEGIN RSA PRIVATE KEY-----\nPLANTED\nplanted\n-----END RSA PRIVATE KEY-----"],
)  # fmt: skip
def test_well_known_forms_of_secrets_are_blanked(text):
    said = redact(f"before {text} after")
    assert "***" in said and "planted" not in said.lower() and "pL4n" not in said
    assert said.startswith("before ") and said.endswith(" after")


@pytest.mark.parametrize("name", ["HF_TOKEN", "OUR_WANDB_KEY", "DB_PASSWORD", "DB_PASS", "PGPASSWORD", "PLAIN"])
def test_a_secret_is_not_taken_from_the_environment_into_the_configuration(name, monkeypatch):
    monkeypatch.setenv(name, SECRETS["HF_TOKEN"])
    for key in ("tracker.project", "tracker.group"):
        with pytest.raises(UserError, match=r"oc\.env:\w+} would put a secret into the configuration") as refused:
            load_train([f"{key}=${{oc.env:{name},none}}"])
        assert SECRETS["HF_TOKEN"] not in str(refused.value)
    monkeypatch.setenv("USER", "somebody")
    assert load_train(["tracker.group=${oc.env:USER}"]).root.tracker.group == "somebody"


@pytest.mark.slow
def test_a_sweep_keeps_no_secret_either(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    command = [
        sys.executable, "-m", "gemma4_tpu.train", "-m", f"tracker.project={SECRETS['WANDB_API_KEY']}",
        f"tracker.group={SECRETS['HF_TOKEN']},b", "model.path=nowhere",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1, done.stderr  # every job is refused: there is no such model
    assert list(tmp_path.rglob("sweep.json")) and list(tmp_path.rglob("multirun.yaml"))
    assert leaks(tmp_path, done.stdout, done.stderr) == []


AROUND = {
    "children.py", "serving/log.py",  # what children print, line by line through `redact`
    "tracking/files.py", "tracking/metrics.py", "tracking/trackers.py",  # through `redact`, or `jsonable`, which does
    "completion.py",  # a shell's own files
    "data/codev.py", "evals/store.py", "evals/verilog/",  # what models said, and what judges run
    "evals/harness_job.py",  # lm_eval's configuration, in a temporary folder
    "planning/child.py", "planning/compilation.py", "evals/reward.py",  # temporary, of a process of ours
    "sweeping/slurm.py",  # a batch script, which has to run; for its owner's eyes
    "sweeping/job_process.py", "sweeping/plan_check.py",  # commands of ours, which blank what they print
    "data/overseer.py",  # a message that `hard_limit.py` has blanked
    "training/watchdog.py",  # stacks: names of functions and numbers of lines
    "rollouts/served_teacher.py", "data/picture_cache.py", "planning/kept_programs.py",  # numbers
    "tracking/run.py", "tracking/bucket.py",  # zeros that hold room on the disk; files that went through here before
    "tracking/trackio_tracker.py", "data/hard_limit.py",  # /dev/null, and memory that is shared with the overseer
    "data/tokenizer.py", "export/place.py", "launch/parcel.py",  # files of a checkpoint or a checkout, as they are
}  # fmt: skip
"""Modules that write by themselves, and why they may."""


def writes(tree):
    """Calls that write a file without the place where secrets are blanked, as source text."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called, said = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        method = called.rpartition(".")[2]
        mode = said.get("mode") or next((word for word in node.args[:2] if _is_mode(word)), None)
        streams = [ast.unparse(said[name]) for name in ("stdout", "stderr") if name in said]
        is_child = method in ("Popen", "run", "call", "check_call")
        if (
            (method in ("write_text", "write_bytes") and called != "write_text")
            or called in ("yaml.dump", "json.dump", "OmegaConf.save")
            or (method in ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile") and mode and _is_mode(mode))
            or (is_child and any(not re.fullmatch(r"(subprocess\.)?[A-Z]+|None", stream) for stream in streams))
        ):
            yield ast.unparse(node)


def _is_mode(word):
    return (
        isinstance(word, ast.Constant)
        and re.fullmatch(r"r?[wax]?[bt]?\+?[bt]?(:gz)?", str(word.value))
        and (re.search(r"[wax+]", word.value) is not None)
    )


def test_nothing_is_written_around_the_place_where_secrets_are_blanked():
    """Text files of run folders are written by `tracking/files.py`, output of children by `children.py`; what writes by
    itself is known, and why.
    """
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        if lines := list(writes(ast.parse(path.read_text(encoding="utf-8")))):
            found[path.relative_to(ROOT).as_posix()] = lines
    assert {name: lines for name, lines in found.items() if not name.startswith(tuple(AROUND))} == {}
    assert [known for known in AROUND if not any(name.startswith(known) for name in found)] == []


@pytest.mark.parametrize(
    "line",
    ["path.write_text(x)", "open(path, 'w')", "open(path, mode='ab')", "path.open('x+b')", "os.fdopen(f, 'w+b')",
     "subprocess.Popen(words, stdout=file)", "subprocess.run(words, stderr=open(path, 'a'))", "json.dump(x, file)"],
)  # fmt: skip
def test_the_lint_finds(line):
    assert list(writes(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    ["write_text(path, x)", "open(path)", "open(path, 'rb')", "path.open()", "RunFolder.open('outputs', name)",
     "subprocess.Popen(words, stdout=subprocess.PIPE, stderr=STDOUT)", "subprocess.run(words)"],
)  # fmt: skip
def test_the_lint_lets_pass(line):
    assert not list(writes(ast.parse(line)))


@pytest.mark.parametrize("name", ["../up", "a/b", "/etc", "..", "a\\b", "x\ny", ""])
def test_a_name_does_not_lead_out_of_its_folder(name):
    with pytest.raises(UserError):
        load_train([f"name='{name}'"])


def test_values_of_the_configuration_are_never_evaluated(tmp_path):
    planted = tmp_path / "executed"
    for value in (f"!!python/object/apply:os.system ['touch {planted}']", f"__import__('os').system('touch {planted}')",
                  f"${{eval:open('{planted}','w')}}", "${oc.env:HOME}"):  # fmt: skip
        with pytest.raises(UserError):
            load_train([f"name={value}"])
    assert not planted.exists()
