"""A container engine that is played: takes the commands and flags that Docker takes, records every call, and acts out a
server. Run as `docker`; its folder is FAKE_DOCKER. With `_process` as its first word it is a `vllm` without a
container.

`scenario.json`: `image`: false (it has to be pulled), `pull_error`; `run_error`; `lines`: [[seconds, line], …] that the
container prints before it listens; `exit`: the code it ends with instead of listening; `hang`: neither; `deaf`: it
ignores SIGTERM; `answer`: the next token that each prompt is answered with, by its first token; `dies`: exit code
`dies_after` seconds after it was asked for its version, which is once it is known to answer; `chunk_seconds`: between
pieces of a stream; `bench`: how `vllm bench serve` in it goes: `exit` and `line`, `fails` (every n-th request),
`sleep_seconds`. Like vLLM it ends on flags that it does not know and on a model that is not mounted.
"""

import http.client
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(os.environ["FAKE_DOCKER"])
RUN_FLAGS = {  # name → takes a value
    "--detach": False, "--name": True, "--label": True, "--network": True, "--shm-size": True, "--privileged": False,
    "--gpus": True, "--mount": True, "--env": True, "--entrypoint": True,
}  # fmt: skip


def fail(message: str, code: int = 1) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def scenario() -> dict:
    path = FOLDER / "scenario.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, text: str) -> None:
    """Whole or not at all: others look for it."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def place(name: str, what: str = "container") -> Path:
    """The folder of a container, by id or name; the engine's words differ where there is none."""
    for folder in (FOLDER / "containers").glob("*"):
        if folder.name.startswith(name) or (folder / "name").read_text() == name:
            return folder
    before = "Error" if what == "object" else "Error response from daemon"
    fail(f"{before}: No such {what}: {name}")
    raise AssertionError


def main() -> None:
    words = sys.argv[1:]
    if words[0] == "_container":
        return container(place(words[1]))
    if words[0] == "_process":
        return process(words[1:])
    if words[0] == "_vllm":
        return bench(words[1:])
    with (FOLDER / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    if scenario().get("daemon") is False:
        fail("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?")
    match words:
        case ["version"]:
            print("Server: played")
        case ["image", "inspect", "--format", "{{json .RepoDigests}}", image]:
            if scenario().get("image") is False and not (FOLDER / "pulled").exists():
                fail(f"Error: No such image: {image}")
            print(json.dumps([f"{image.partition(':')[0]}@sha256:{'0' * 64}"]))
        case ["pull", image]:
            if error := scenario().get("pull_error"):
                fail(error)
            (FOLDER / "pulled").touch()
        case ["run", *rest]:
            run(rest)
        case ["logs", "--follow", name]:
            follow(place(name))
        case ["inspect", "--format", "{{json .State}}", name]:
            print(json.dumps(state(place(name, "object"))))
        case ["exec", "--env", name, container_name, *rest] if name in os.environ:
            inside(place(container_name), rest)
        case ["exec", container_name, *rest]:
            inside(place(container_name), rest)
        case ["stop", "-t", seconds, name]:
            end(place(name), float(seconds))
        case ["rm", "--force", "--volumes", name]:
            folder = place(name)
            end(folder, 0)
            subprocess.run(["rm", "-r", str(folder)], check=True)
        case _:
            fail(f"unknown command: {words}")


def run(words: list[str]) -> None:
    options: dict[str, list[str]] = {}
    while words and words[0].startswith("-"):
        flag = words.pop(0)
        if flag not in RUN_FLAGS:
            fail(f"unknown flag: {flag}", 125)
        options.setdefault(flag, []).append(words.pop(0) if RUN_FLAGS[flag] else "")
    image, *command = words
    if any(name.read_text() == options["--name"][0] for name in (FOLDER / "containers").glob("*/name")):
        fail(f'Error response from daemon: Conflict. The container name "/{options["--name"][0]}" is already in use by'
             ' container "abc".', 125)  # fmt: skip
    mounts = {}
    for mount in options.get("--mount", []):
        fields = dict(field.partition("=")[::2] for field in mount.split(","))
        if not os.path.isdir(fields["source"]):
            fail(f"bind source path does not exist: {fields['source']}", 125)
        mounts[fields["target"]] = fields["source"]
    own = os.urandom(32).hex()
    folder = FOLDER / "containers" / own
    folder.mkdir(parents=True)
    write(folder / "name", options["--name"][0])
    environment = {}
    for name, equals, value in (word.partition("=") for word in options.get("--env", [])):
        environment[name] = value if equals else os.environ[name]
    about = {"image": image, "command": command, "mounts": mounts, "environment": environment}
    write(folder / "about.json", json.dumps(about))
    write(FOLDER / "last.json", json.dumps(about))
    (folder / "log").touch()
    print(own)
    sys.stdout.flush()
    if error := scenario().get("run_error"):
        fail(error, 125)
    null = subprocess.DEVNULL
    command = [sys.executable, "-S", "-E", __file__, "_container", own]
    process = subprocess.Popen(command, start_new_session=True, stdin=null, stdout=null, stderr=null)
    write(folder / "pid", str(process.pid))


def inside(folder: Path, words: list[str]) -> None:
    """Runs a command with the container's own `vllm` and its own /tmp."""
    program = folder / "bin" / "vllm"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {__file__} _vllm "$@"\n')
    program.chmod(0o755)
    os.environ["PATH"] = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["FAKE_MOUNTS"] = json.dumps(json.loads((folder / "about.json").read_text())["mounts"])
    words = [word.replace("/tmp/", f"{folder}/tmp-", 1) if word.startswith("/tmp/") else word for word in words]
    sys.exit(subprocess.run(words, check=False, start_new_session=True).returncode)


def alive(folder: Path) -> bool:
    if (folder / "code").exists() or not (folder / "pid").exists():
        return False
    pid = (folder / "pid").read_text()
    try:
        return Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def state(folder: Path) -> dict:
    code = folder / "code"
    return {"Running": alive(folder), "ExitCode": int(code.read_text()) if code.exists() else 137, "OOMKilled": False}


def end(folder: Path, seconds: float) -> None:
    """SIGTERM, and SIGKILL after so many seconds."""
    until = time.monotonic() + seconds
    with suppress(ProcessLookupError):  # it has ended by itself
        if seconds and alive(folder):
            os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
        while alive(folder):
            if time.monotonic() >= until:
                os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
                write(folder / "code", "137")
            time.sleep(0.01)


def follow(folder: Path) -> None:
    with (folder / "log").open("rb") as log:
        while True:
            going = alive(folder)
            if data := log.read():
                sys.stdout.buffer.write(data)
                sys.stdout.flush()
            elif not going:
                return
            time.sleep(0.02)


def container(folder: Path) -> None:
    def say(line: str) -> None:
        with (folder / "log").open("a") as log:
            log.write(line + "\n")

    def leave(code: int) -> None:
        write(folder / "code", str(code))
        os._exit(code)

    server(json.loads((folder / "about.json").read_text()), say, leave)


def process(words: list[str]) -> None:
    """A vLLM without a container, with a process of its own that does not end by itself."""
    child = subprocess.Popen(["sleep", "600"])
    about = {"command": words, "mounts": {words[1]: words[1]}, "environment": dict(os.environ), "child": child.pid}
    write(FOLDER / "last.json", json.dumps(about))
    server(about, lambda line: print(line, flush=True), os._exit)


def server(about: dict, say: Callable[[str], None], leave: Callable[[int], None]) -> None:
    play = scenario()
    deaf = play.get("deaf", False)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else lambda *_: (say("Shutting down"), leave(0)))
    serve, model, *words = about["command"]
    flags = dict(zip(words, [*words[1:], ""], strict=True))
    known = set(Path(os.environ["FAKE_FLAGS"]).read_text().split())
    if unknown := [word for word in words if word.startswith("--") and word[2:] not in known]:
        say(f"vllm: error: unrecognized arguments: {' '.join(unknown)}")
        leave(2)
    if serve != "serve" or not os.path.isfile(about["mounts"].get(model, "/nowhere") + "/config.json"):
        say(f"huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name': '{model}'")
        leave(1)
    for seconds, line in play.get("lines", []):
        time.sleep(seconds)
        say(line)
    if (code := play.get("exit")) is not None:
        leave(code)
    if play.get("hang"):
        time.sleep(600)
    name, answers = flags["--served-model-name"], play.get("answer", {})

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            bodies = {"/v1/models": {"data": [{"id": name}]}, "/version": {"version": "0.32.0+played"}}
            self.reply(200, bodies.get(self.path, {}))
            if self.path == "/version" and (code := play.get("dies")) is not None:
                die = lambda: (say("RuntimeError: engine died"), leave(code))  # noqa: E731
                threading.Timer(play["dies_after"], die).start()

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "seed" in asked:
                return self.reply(400, {"error": "per-request seed is not supported on TPU"})
            if asked.get("stream"):
                return self.stream(asked["max_tokens"])
            token = answers.get(str(asked["prompt"][0]), 0)
            self.reply(200, {"choices": [{"text": "x", "logprobs": {"tokens": [f"token_id:{token}"]}}]})

        def stream(self, tokens):
            self.send_response(200)
            self.end_headers()
            for number in range(tokens):
                time.sleep(play.get("chunk_seconds", 0.01))
                choice = {"text": " x", "finish_reason": "length" if number + 1 == tokens else None}
                self.event({"choices": [choice]})
            self.event({"choices": [], "usage": {"completion_tokens": tokens}})
            self.event("[DONE]")

        def event(self, data):
            self.wfile.write(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode())

        def reply(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    try:
        server = ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler)
    except OSError as error:
        say(f"OSError: [Errno 98] Address already in use ({error})")
        leave(1)
    say("INFO:     Application startup complete.")
    server.serve_forever()


BENCH_FLAGS = {  # those of `vllm bench serve` that are taken here, and whether they have a value
    **dict.fromkeys(("ignore-eos", "disable-tqdm", "save-result", "save-detailed"), False),
    **dict.fromkeys(("backend", "base-url", "model", "served-model-name", "dataset-name", "random-input-len",
                     "random-output-len", "num-prompts", "num-warmups", "seed", "temperature", "percentile-metrics",
                     "metric-percentiles", "result-dir", "result-filename", "max-concurrency", "request-rate",
                     "burstiness"), True),
}  # fmt: skip


def bench(words: list[str]) -> None:
    """`vllm bench serve`: requests as asked for, and figures as it writes them; exit code 0 whatever fails."""
    play, flags = scenario().get("bench", {}), {}
    if words[:2] != ["bench", "serve"]:
        fail(f"vllm: error: invalid choice: {words}", 2)
    for word in (rest := iter(words[2:])):
        if word.removeprefix("--") not in BENCH_FLAGS:
            fail(f"vllm: error: unrecognized arguments: {word}", 2)
        flags[word.removeprefix("--")] = next(rest) if BENCH_FLAGS[word.removeprefix("--")] else True
    if not os.path.isfile(json.loads(os.environ["FAKE_MOUNTS"]).get(flags["model"], "/nowhere") + "/config.json"):
        fail(f"OSError: {flags['model']} is not a local folder")
    print("Namespace(" + ", ".join(f"{name.replace('-', '_')}={flags[name]!r}" for name in flags) + ")", flush=True)
    time.sleep(play.get("sleep_seconds", 0))
    if "exit" in play:
        fail(play["line"], play["exit"])
    count, rate = int(flags["num-prompts"]), float(flags.get("request-rate", "inf"))
    users = threading.Semaphore(int(flags.get("max-concurrency", count)))
    outputs, started = [None] * count, time.perf_counter()
    threads = [threading.Thread(target=one, args=(flags, number, users, outputs, play)) for number in range(count)]
    for number, thread in enumerate(threads):
        time.sleep(max(0.0, started + number / rate - time.perf_counter()))
        thread.start()
    for thread in threads:
        thread.join()
    Path(flags["result-dir"], flags["result-filename"]).write_text(json.dumps(figures(flags, outputs, started)))


def one(flags: dict, number: int, users: threading.Semaphore, outputs: list, play: dict) -> None:
    """One request: seconds from sending to each chunk, or why it failed."""
    with users:
        sent = time.perf_counter()
        if play.get("fails") and number % play["fails"] == play["fails"] - 1:
            outputs[number] = "Traceback (most recent call last):\nConnectionResetError: [Errno 104] reset by peer"
            return
        body = {"model": flags["served-model-name"], "prompt": "x", "stream": True,
                "max_tokens": int(flags["random-output-len"])}  # fmt: skip
        server = urllib.parse.urlsplit(flags["base-url"])
        connection = http.client.HTTPConnection(server.hostname, server.port)
        connection.request("POST", "/v1/completions", json.dumps(body))
        chunks = (line for line in connection.getresponse() if line.startswith(b'data: {"choices": [{'))
        outputs[number] = [time.perf_counter() - sent for _ in chunks]


def figures(flags: dict, outputs: list, started: float) -> dict:
    seconds, wanted = time.perf_counter() - started, int(flags["random-output-len"])
    done = [times for times in outputs if isinstance(times, list)]
    values = {
        "ttft": [times[0] for times in done], "e2el": [times[-1] for times in done],
        "tpot": [(times[-1] - times[0]) / (wanted - 1) for times in done],
        "itl": [b - a for times in done for a, b in itertools.pairwise(times)],
    }  # fmt: skip
    tokens_in, tokens_out = len(done) * int(flags["random-input-len"]), len(done) * wanted
    return {
        "backend": flags["backend"], "num_prompts": len(outputs), "completed": len(done),
        "failed": len(outputs) - len(done), "duration": seconds, "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out, "request_throughput": len(done) / seconds,
        "output_throughput": tokens_out / seconds, "total_token_throughput": (tokens_in + tokens_out) / seconds,
        "errors": [times if isinstance(times, str) else "" for times in outputs],
        "generated_texts": ["x"] * len(outputs),
        **{f"median_{name}_ms": 1000 * statistics.median(found or [0]) for name, found in values.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
