"""One command, and what it leaves in a cloud that is played: slices, places in the queue, records, messages."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile

import pytest

from gemma4_tpu.hardware import SLICES
from gemma4_tpu.launch import parcel, tpu_vm
from gemma4_tpu.launch.record import saved
from tests.launch.conftest import GIT, PLACE, ROOT, RUN
from tests.processes import wait_for

QUOTA = (
    "RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-east5-a."
)
STOCKOUT = 'There is no more capacity in the zone "us-east5-a"; you can try in another zone where Cloud TPU Nodes are'


@pytest.fixture(autouse=True)
def messages(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def test_a_run_from_the_command_to_no_costs(launch, played, messages):
    played.play({"states": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "OVER:0"]})
    code, _, _ = launch("spot=true", "queue_for=6h")
    assert code == 0
    assert played.resources == []
    (create,) = played.asked("create")
    (job,) = saved().values()
    assert create[:5] == ["compute", "tpus", "queued-resources", "create", job.id]
    flags = dict(word.partition("=")[::2] for word in create[5:])
    assert flags["--accelerator-type"] == "v5p-8"
    assert flags["--runtime-version"] == "v2-alpha-tpuv5"
    assert flags["--zone"] == "us-east5-a"
    assert flags["--valid-until-duration"] == "6h"
    assert "--spot" in flags
    assert flags["--labels"] == f"gemma4-tpu={job.id}"
    assert re.fullmatch(r"gs://my-bucket/v5p8/\d{8}-\d{6}", job.run_dir)
    log = messages.text
    assert "$5.20 per hour spot, us-east5" in log and "at most $124.80" in log and "estimated" in log
    assert log.index("waiting costs nothing") < log.index("from now on it costs") < log.index("played")
    uploaded = sorted(call[3].rpartition("/")[2] for call in played.asked("storage", "cp"))
    assert uploaded == ["source.bundle", "source.tar.gz"]


def test_a_dry_run_needs_no_tool_and_leaves_nothing(launch, played, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    code, shown, _ = launch("dry_run=true")
    assert code == 0
    assert "queued-resources create gemma4-tpu-v5p8-" in shown and "#!/usr/bin/env bash" in shown
    assert "$16.80 per hour" in shown
    assert not (tmp_path / "outputs").exists()
    assert played.calls == []


def test_a_preempted_slice_is_replaced_and_the_run_goes_on(launch, played, messages):
    played.play(
        {"states": ["ACTIVE", "SUSPENDING"]}, {"error": STOCKOUT}, {"states": ["ACTIVE", "SUSPENDED"]},
        {"states": ["FAILED"], "failure": STOCKOUT}, {"states": ["OVER:0"]},
    )  # fmt: skip
    code, _, _ = launch(GIT, "spot=true")
    assert code == 0
    creations = played.asked("create")
    assert len(creations) == 5
    assert all(creation == creations[0] for creation in creations)  # the same run folder, on every slice
    assert "requesting slice 5" in messages.text
    assert played.resources == []


def test_preemptions_end_somewhere(launch, played, messages):
    played.play({"states": ["SUSPENDED"]})
    code, _, _ = launch(GIT, "launch.recreations=2")
    assert code == 42
    assert len(played.asked("create")) == 3
    assert "resumes from the last checkpoint" in messages.text
    assert played.resources == []


@pytest.mark.parametrize(
    ("creation", "kind", "remedy"),
    [
        ({"error": QUOTA}, "quota", "has its own quota"),
        ({"error": STOCKOUT}, "capacity", "another zone"),
        ({"states": ["WAITING_FOR_RESOURCES", "FAILED"], "failure": STOCKOUT}, "capacity", "nothing remains"),
        ({"states": ["FAILED"], "failure": "Quota 'TPUV6EPreemptible' exhausted. Limit 0 in region us-east5"}, "quota",
         "count"),
        ({"states": ["FAILED"], "failure": "Insufficient reserved capacity. Contact"}, "capacity", "spot="),
        ({"error": "PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or it is disabled."}, "api",
         "gcloud services enable tpu.googleapis.com"),
        ({"error": "You do not currently have an active account selected. Please run: gcloud auth login"}, "login",
         "gcloud auth login"),
        ({"error": "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied"}, "permission", "roles/tpu.admin"),
        ({"error": "NOT_FOUND: Accelerator type 'v5p-8' not found in zone"}, "missing", "accelerator-types list"),
    ],
)  # fmt: skip
def test_a_refusal_of_google_is_one_message_that_says_what_would_work(launch, played, creation, kind, remedy):
    played.play(creation)
    code, _, error = launch(GIT)
    assert code == 2
    assert error.startswith("error: ") and f": {kind}: " in error and remedy in error
    assert "Traceback" not in error and "Application Default" not in error
    assert played.resources == []


def test_the_exit_code_is_that_of_the_training(launch, played, messages):
    played.play({"states": ["ACTIVE", "OVER:42"]})
    code, _, _ = launch(GIT, "run_dir=gs://my-bucket/runs/mine")
    assert code == 42
    assert "run_dir=gs://my-bucket/runs/mine resumes" in messages.text


def test_a_slice_that_could_not_delete_itself_is_deleted(launch, played, messages):
    played.play({"states": ["ACTIVE"]})
    _, shown, _ = launch(GIT, "watch=false")
    (job,) = saved().values()
    assert job.id in played.resources and f"delete {job.id}" in shown and "$16.80 per hour" in shown
    played.put(f"{job.launch_dir}/outcome.json", json.dumps({"code": 0, "host": 0, "reason": "finished"}))
    assert tpu_vm.main(["watch", job.id]) == 0
    assert played.resources == []


def test_what_can_not_be_deleted_is_said(launch, played):
    played.play({"states": ["SUSPENDED"]}, deletable=False)
    code, _, error = launch(GIT)
    (job,) = saved().values()
    assert code == 2
    assert f"{job.id} MAY STILL COST MONEY" in error and f"python -m launch.tpu_vm delete {job.id}" in error


def test_somebody_deletes_the_slice(launch, played, messages):
    played.play({"states": ["ACTIVE", "LOST"]})
    code, _, _ = launch(GIT)
    assert code == 1
    assert "somebody deleted it" in messages.text


@pytest.mark.slow
def test_ctrl_c_says_what_still_runs_and_how_to_delete_it(played, tmp_path):
    played.play({"states": ["ACTIVE"]})
    nowhere = "model.path=http://127.0.0.1:9/base"  # which is known at once; a bucket is given half a minute
    command = [sys.executable, "-m", "launch.tpu_vm", *RUN, nowhere, GIT]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    wait_for(lambda: played.asked("describe") or process.poll() is not None, seconds=180)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=180)
    (name,) = played.resources  # nothing is deleted behind the user's back
    assert process.returncode == 130
    assert f"{name} is still in the queue or up" in error and "$16.80 per hour" in error
    assert f"python -m launch.tpu_vm delete {name} project=my-project zone=us-east5-a" in error
    assert f"python -m launch.tpu_vm watch {name}" in error
    assert "Traceback" not in error


def test_lists_and_deletes_only_what_is_ours(launch, played, capsys):
    played.play({"states": ["ACTIVE"]})
    launch(GIT, "watch=false")
    (job,) = saved().values()
    strangers = ("somebody-elses", "gemma4-tpu-copied-name")
    for name in strangers:
        played.exists(name)

    assert tpu_vm.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert job.id in shown and "$16.80 per hour (estimated)" in shown and job.run_dir in shown
    assert not any(name in shown for name in strangers)
    for name in strangers:
        assert tpu_vm.main(["delete", name, *PLACE[1:]]) == 2
    assert tpu_vm.main(["delete", job.id, "dry_run=true"]) == 0
    assert job.id in played.resources
    assert tpu_vm.main(["delete", job.id]) == 0
    assert set(played.resources) == set(strangers)
    assert "its run folder stays" in capsys.readouterr().out
    assert tpu_vm.main(["delete", job.id]) == 0
    assert "costs nothing" in capsys.readouterr().out
    assert tpu_vm.main(["list"]) == 0
    assert "nothing launched here" in capsys.readouterr().out


def test_verbs_say_what_is_missing(played, capsys):
    for words, told in {
        ("list",): "give project=",
        ("delete",): "give ids",
        ("watch", "gemma4-tpu-x"): "not launched from this folder",
        ("delete", "gemma4-tpu-x", "--force"): "--force",
        ("list", "zon=x"): "zon",
    }.items():
        assert tpu_vm.main(list(words)) == 2
        assert told in capsys.readouterr().err


def test_without_gcloud_the_install_command_is_named(launch, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    code, _, error = launch(GIT)
    assert code == 2
    assert "cloud.google.com/sdk/docs/install" in error and "gcloud auth login" in error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["lora.rnk=8"], "did you mean lora.rank?"),
        (["mesh.tp=3", "mesh.fsdp=null"], "legal meshes"),
        (["hardware=h200"], "not a TPU slice"),
        (["data=chat_jsonl", "data.train.0.path=rows.jsonl"], "gcloud storage cp"),
        (["model.path=/models/gemma"], "on this machine"),
        (["run_dir=outputs/train/x"], "a slice's disk is deleted with it"),
        (["bucket=bk"], "give gs://<bucket>"),
        (["bucket=gs://b"], "give gs://<bucket>"),
        (["run_dir=gs://my-bucket"], "give gs://<bucket>/<folder>"),
        (["zone=us-east5"], "give zone=<zone>, like us-east5-a"),
        (["queue_for=long"], "as 6h"),
        (["secrets={WANDB_API_KEY: 'a value!'}"], "never the secrets themselves"),
        (["after=[plan]"], "give merge, evaluate or serve"),
        (["after=[serve]"], "serves the merged model; put a merge before it"),
        (["after=[merge,'serve serving=v6e8']"], "is for a v6e-8, but the launch for a v5p-8"),
        (["after=[merge,'serve serving.slice=v5p-8 serving.tensor_parallel_size=3']"], "can be 1, 2, 4"),
        (["after=['evaluate eval.n=5']"], "put a merge before it"),
        (["after=['merge checkpoint=bset']"], "give best, latest or the number of an update"),
        (["after=[merge,'evaluate eval.n=five']"], "eval.n=five"),
        (["after=[merge,'evaluate eval.problems_path=/ve']"], "on this machine"),
        (["after=[merge,evaluate]", "hardware=v5p16"], "runs on one host, and this slice has 2"),
        (["git=main"], "give <URL>@"),
        (["max_hours=0"], "null for no limit"),
        (["preview=true"], "needs no slice"),
        (["--multirun", "lora.rank=4,8"], "one launch is one run"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_asked_for(launch, played, words, told):
    code, _, error = launch(*words)
    assert code == 2
    assert told in error
    assert played.calls == []


def test_all_problems_come_in_one_message(launch):
    _, _, error = launch("zone=x", "lora.dropuot=0.1", "after=[x]")
    assert "4 problems" in error or "3 problems" in error


def test_a_secret_is_never_rendered(launch, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    code, _, error = launch("tracker.tags=[0123456789abcdef0123456789abcdef01234567]", "dry_run=true")
    assert code == 2
    assert "Secret Manager" in error and "0123456789abcdef" not in error


def test_slices_of_every_kind_can_be_launched(launch):
    for name, slice_ in SLICES.items():
        if slice_.runtime_version and name in ("v5p-8", "v5p-16", "v6e-8", "v5e-16"):
            hardware = name.replace("-", "")
            code, shown, _ = launch(
                f"hardware={hardware}", "mesh=auto", "model=tiny", "model.path=embedded:tiny", "data=verilog_smoke",
                "trainer.global_batch_sequences=64", "dry_run=true",
            )  # fmt: skip
            assert code == 0
            flags = f"--accelerator-type={slice_.accelerator_type} --runtime-version={slice_.runtime_version}"
            assert flags in shown
            assert f"HOSTS={slice_.hosts}\n" in shown
            assert "per hour on demand, us-east5" in shown


def test_what_is_no_tpu_vm_is_refused(launch):
    code, _, error = launch("hardware=tpu7x_8", "mesh=auto", "dry_run=true", "trainer.global_batch_sequences=8")
    assert code == 2 and "tpu7x is not available as a TPU VM; use python -m launch.gke" in error
    code, _, error = launch("hardware.flex_start=true", "dry_run=true")
    assert code == 2 and "the launchers request capacity on demand, or spot with spot=true" in error


def test_help_lists_the_keys():
    command = [sys.executable, "-X", "importtime", "-m", "launch.tpu_vm", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    for text in ("launch.queue_for=null", "launch.max_hours=24", "lora.rank=", "python -m launch.tpu_vm delete <id>"):
        assert text in done.stdout.replace("24.0", "24")
    assert not re.search(r"\| +(jax|torch|transformers|tunix)$", done.stderr, re.MULTILINE)


def test_the_sources_are_the_checkout_as_it_stands(tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / ".gitignore").write_text("conf/local/*\nsecret.txt\n")
    (checkout / "gone.txt").write_text("gone")
    git = ["git", "-C", str(checkout), "-c", "user.name=n", "-c", "user.email=e@x"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    (checkout / "gone.txt").unlink()
    (checkout / "launch" / "install.sh").write_text("changed")
    (checkout / "conf" / "local").mkdir(parents=True)
    (checkout / "conf" / "local" / "default.yaml").write_text("local")
    (checkout / "secret.txt").write_text("ignored")

    archive, bundle = parcel.pack(tmp_path, checkout)
    there = tmp_path / "there"  # as startup.sh unpacks them
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", str(bundle), str(there)], check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(there, filter="data")
    subprocess.run(["git", "-C", str(there), "reset", "--quiet", "--mixed", "HEAD"], check=True)
    status = subprocess.run(
        ["git", "-C", str(there), "status", "--porcelain"], capture_output=True, text=True, check=True
    )
    assert sorted(status.stdout.split("\n")) == sorted([" D gone.txt", " M launch/install.sh", ""])
    assert (there / "conf/local/default.yaml").read_text() == "local"
    assert not (there / "secret.txt").exists()


def test_real_gcloud_takes_the_commands(launch, tmp_path):
    """The CLI's own parser, offline and without an account."""
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != str(tmp_path / "bin")]
    real = next((f"{folder}/gcloud" for folder in folders if os.access(f"{folder}/gcloud", os.X_OK)), None)
    if real is None:
        pytest.skip("the Google Cloud CLI is not installed; its parser is asked only where it is")
    _, shown, _ = launch("dry_run=true", "spot=true", "queue_for=6h", "launch.create_flags=['--network=n']")
    commands = [line for line in shown.splitlines() if line.startswith("gcloud ")]
    commands += [
        "gcloud compute tpus queued-resources describe x --project=p --zone=us-east5-a --format=json",
        "gcloud compute tpus queued-resources list --project=p --zone=us-east5-a --format=json",
        "gcloud compute tpus queued-resources delete x --project=p --zone=us-east5-a --force --quiet --async",
        "gcloud secrets versions access latest --secret=s --project=p",
        "gcloud storage cp a gs://b/c --recursive --quiet",
    ]
    listed = tmp_path / "commands.json"
    listed.write_text(json.dumps([{"command_string": command} for command in commands]))
    done = subprocess.run(
        [real, "meta", "lint-gcloud-commands", f"--commands-file={listed}"],
        capture_output=True, text=True, timeout=60, env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "sdk")},
    )  # fmt: skip
    verdicts = {verdict["command_string"]: verdict["error_message"] for verdict in json.loads(done.stdout)}
    assert len(verdicts) == 8
    assert set(verdicts.values()) == {None}, verdicts


def test_the_dry_run_can_be_pasted(launch):
    _, shown, _ = launch("dry_run=true", 'tracker.tags=[a b,"it\'s"]')
    (create,) = [line for line in shown.splitlines() if "queued-resources create" in line]
    assert shlex.split(create)[0] == "gcloud"
