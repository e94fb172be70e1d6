"""A Google Cloud CLI that is played: takes the commands and flags that the real one takes, records every call, and acts
out a scenario. Run as `gcloud`; its folder is FAKE_GCLOUD.

`scenario.json`: `creations`: for each creation either {"error": "…"} or {"states": ["ACTIVE", …]}, told one by one as
the resource is described, the last one again and again. Besides Google's states, "OVER:<code>" is a slice that reports
its outcome and deletes itself, "LOST" one that vanishes. `deletable`: false refuses deletions.
"""

import json
import os
import sys
from pathlib import Path

FOLDER = Path(os.environ["FAKE_GCLOUD"])
FLAGS = {  # as `gcloud <command> --help` of version 528 lists them; values are joined by =
    "compute tpus queued-resources create": {
        "--node-id", "--project", "--zone", "--accelerator-type", "--runtime-version", "--spot",
        "--valid-until-duration", "--labels", "--metadata-from-file", "--scopes", "--quiet", "--network", "--reserved",
    },
    "compute tpus queued-resources describe": {"--project", "--zone", "--format"},
    "compute tpus queued-resources delete": {"--project", "--zone", "--force", "--quiet", "--async"},
    "compute tpus queued-resources list": {"--project", "--zone", "--format"},
    "compute tpus tpu-vm ssh": {"--project", "--zone", "--worker", "--command"},
    "compute tpus accelerator-types list": {"--project", "--zone"},
    "storage cp": {"--quiet", "--recursive", "-r"},
    "storage cat": set(),
    "storage ls": set(),
    "storage rm": {"--recursive", "-r"},
    "storage buckets create": {"--location", "--project", "--uniform-bucket-level-access"},
    "secrets versions access": {"--secret", "--project"},
    "secrets create": {"--data-file", "--project"},
    "services enable": {"--project"},
    "auth login": set(),
    "projects create": set(),
    "projects describe": {"--format"},
    "projects add-iam-policy-binding": {"--member", "--role", "--condition"},
    "billing projects link": {"--billing-account"},
    "builds submit": {"--tag", "--project", "--config", "--substitutions"},
    "config set": set(),
}  # fmt: skip


def main() -> None:
    arguments = sys.argv[1:]
    with (FOLDER / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    command = next((c for c in FLAGS if arguments[: len(c.split())] == c.split()), None)
    if command is None:
        fail(f"Invalid choice: {' '.join(arguments[:3])!r}")
    rest = arguments[len(command.split()) :]
    flags = dict(word.partition("=")[::2] for word in rest if word.startswith("-"))
    words = [word for word in rest if not word.startswith("-")]
    for flag in flags:
        if flag not in FLAGS[command]:
            fail(f"unrecognized arguments: {flag}")
    action = {
        "create": create, "describe": describe, "delete": delete, "list": listed, "cp": copy, "cat": cat,
        "access": lambda flags, words: print(f"value-of-{flags['--secret']}", end=""),
    }.get(command.split()[-1])  # fmt: skip
    if action is not None and not command.startswith(
        ("projects", "secrets create", "storage buckets", "compute tpus acc")
    ):
        action(flags, words)


def fail(message: str) -> None:
    print("WARNING: Your active project does not match the quota project in your local Application Default Credentials"
          f" file.\nERROR: (gcloud) {message}", file=sys.stderr)  # fmt: skip
    sys.exit(1)


def load() -> dict:
    path = FOLDER / "state.json"
    if path.exists():
        return json.loads(path.read_text())
    return {"resources": {}, "created": 0}


def save(state: dict) -> None:
    """Whole or not at all: Ctrl-C may end this."""
    part = FOLDER / f"state.{os.getpid()}"
    part.write_text(json.dumps(state))
    part.replace(FOLDER / "state.json")


def scenario() -> dict:
    path = FOLDER / "scenario.json"
    return json.loads(path.read_text()) if path.exists() else {}


def create(flags: dict, words: list[str]) -> None:
    state = load()
    plays = scenario().get("creations", [])
    play = plays[min(state["created"], len(plays) - 1)] if plays else {"states": ["WAITING_FOR_RESOURCES"]}
    state["created"] += 1
    if "error" not in play:
        if words[0] in state["resources"]:
            fail(f"ALREADY_EXISTS: {words[0]}")
        script = flags["--metadata-from-file"].partition("=")[2]
        (FOLDER / "startup.sh").write_text(Path(script).read_text())
        label, _, value = flags["--labels"].partition("=")
        node = {"acceleratorType": flags["--accelerator-type"], "labels": {label: value}}
        state["resources"][words[0]] = {"states": play["states"], "failure": play.get("failure"), "node": node,
                                        "zone": flags["--zone"], "spot": "--spot" in flags}  # fmt: skip
    save(state)
    if "error" in play:
        fail(play["error"])


def shown(name: str, resource: dict, state: str) -> dict:
    shown = {
        "name": f"projects/p/locations/{resource['zone']}/queuedResources/{name}",
        "state": {"state": state},
        "tpu": {"nodeSpec": [{"nodeId": name, "node": resource["node"]}]},
    }
    if resource["spot"]:
        shown["spot"] = {}
    if state == "FAILED":
        shown["state"]["failedData"] = {"error": {"code": 8, "message": resource["failure"]}}
    return shown


def describe(flags: dict, words: list[str]) -> None:
    state = load()
    resource = state["resources"].get(words[0])
    if resource is None:
        fail(f"NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{words[0]}' was not found")
    told = resource["states"][0]
    resource["states"] = resource["states"][1:] or resource["states"]
    if told.startswith(("OVER", "LOST")):
        del state["resources"][words[0]]
        save(state)
        if told.startswith("OVER"):
            code = int(told.partition(":")[2])
            launch_dir = next(
                line for line in (FOLDER / "startup.sh").read_text().splitlines() if "LAUNCH_DIR=" in line
            )
            place = here(launch_dir.partition("=")[2].strip("'") + "/outcome.json")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps({"code": code, "host": 0, "reason": "played"}))
            place.with_name("host-0.log").write_text("installing")
        fail(f"NOT_FOUND: Resource {words[0]} was not found")
    save(state)
    print(json.dumps(shown(words[0], resource, told)))


def listed(flags: dict, words: list[str]) -> None:
    resources = load()["resources"].items()
    print(json.dumps([shown(n, r, r["states"][0]) for n, r in resources if r["zone"] == flags["--zone"]]))


def delete(flags: dict, words: list[str]) -> None:
    if scenario().get("deletable") is False:
        fail("PERMISSION_DENIED: tpu.queuedResources.delete")
    state = load()
    if words[0] not in state["resources"]:
        fail(f"NOT_FOUND: {words[0]} was not found")
    del state["resources"][words[0]]
    save(state)


def here(address: str) -> Path:
    return FOLDER / address.replace("gs://", "gs/")


def copy(flags: dict, words: list[str]) -> None:
    *sources, target = words
    for source in sources:
        if not target.startswith("gs://"):
            Path(target, Path(source).name).write_bytes(here(source).read_bytes())
        else:
            place = here(target + Path(source).name if target.endswith("/") else target)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(Path(source).read_bytes() if Path(source).is_file() else b"a folder")


def cat(flags: dict, words: list[str]) -> None:
    if not here(words[0]).is_file():
        fail(f"The following URLs matched no objects or files:\n{words[0]}")
    print(here(words[0]).read_text(), end="")


if __name__ == "__main__":
    main()
