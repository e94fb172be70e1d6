"""What a run writes about itself holds no secret, and nothing it is given is executed or leads out of its folder."""

import ast
from pathlib import Path

import pytest

import gemma4_tpu
from gemma4_tpu.errors import UserError
from gemma4_tpu.train import load_train

ROOT = Path(gemma4_tpu.__file__).parent
SECRETS = {
    "HF_TOKEN": "hf_plantedPLANTEDplantedPLANTED12345",
    "WANDB_API_KEY": "planted0wandb1key2planted3wandb4key5plan",
    "MY_SERVICE_PASSWORD": "correct-horse-planted-battery",
    "AWS_SECRET_ACCESS_KEY": "plantedAWSsecret/plantedAWSsecret/plante",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


@pytest.mark.slow
def test_a_full_run_with_planted_secrets_holds_none_of_them(train, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    done = train(
        "experiment=smoke", "model.path=random:0", "data.max_rows=60", "data.heldout=[]", "trainer.max_updates=2",
        "tracker=tensorboard", f"run_dir={tmp_path / 'run'}", cwd=tmp_path,
    )  # fmt: skip
    refused = train(
        f"model.path=https://me:{SECRETS['MY_SERVICE_PASSWORD']}@host/x", f"run_dir={tmp_path / 'run'}", cwd=tmp_path,
        exit_code=2,
    )  # fmt: skip
    assert "error: " in refused.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 15
    for name, value in SECRETS.items():
        holding = [path for path in written if value.encode() in path.read_bytes()]
        assert not holding, (name, holding)
        assert value not in done.stdout + done.stderr


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


def test_no_file_of_the_package_unpickles_evaluates_or_trusts_remote_code():
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else None
                assert name not in FORBIDDEN_CALLS, where
                for keyword in node.keywords:
                    trusted = keyword.arg in ("trust_remote_code", "allow_pickle", "shell")
                    assert not (trusted and getattr(keyword.value, "value", None) is True), where
                if isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                    assert getattr(node.func.value, "id", "") != "yaml", f"{where}: yaml.safe_load"
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & FORBIDDEN_MODULES, where
