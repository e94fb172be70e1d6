#!/usr/bin/env bash
# The whole path on this machine's CPU: train → merge → evaluate → serve → benchmark → evaluate the server → report.
# `make demo` sets up and runs it; arguments are for train, as in `make demo ARGS="trainer.max_updates=100"`.
# All results are in one run folder: outputs/demo/<date>_<time>, or $DEMO_RUN. The report's dollars are for a machine of
# $DEMO_USD_PER_HOUR (an assumption: 0.10).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
run=${DEMO_RUN:-outputs/demo/$(date +%Y-%m-%d_%H-%M-%S)}
export JAX_PLATFORMS=cpu

end() {  # stops running processes, so that nothing remains at the end, after a failure, on Ctrl-C or on SIGTERM
  local running
  running=$(jobs -p)
  # shellcheck disable=SC2086  # one word per process
  [ -z "$running" ] || kill $running 2> /dev/null || true
  wait
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
step() {  # in the background, since bash handles no signal while it waits for a foreground command
  "$python" -m "gemma4_tpu.$1" "${@:2}" &
  wait $!
}

say "train: LoRA on synthetic Verilog"
step train "run_dir=$run" "$@"

say "merge: a checkpoint that others can load"
step merge "run=$run" "run_dir=$run/merges/demo"

say "evaluate: the run compared with its base"
step evaluate "run=$run" "run_dir=$run/evaluations/run"

say "serve: the merged checkpoint"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
endpoint=$run/endpoint.txt
"$python" -m gemma4_tpu.serve serving=local "run=$run" "serving.port=$port" "run_dir=$run/servings/demo" > "$endpoint" &
server=$!
until grep -q '^endpoint: ' "$endpoint"; do
  kill -0 "$server" 2> /dev/null || { echo "the server did not start" >&2; exit 1; }
  sleep 0.5
done

say "bench: load on the server"
step bench "served=$run/servings/demo" "run_dir=$run/benchmarks/demo" \
  'bench.lengths=[[64,32],[256,64]]' 'bench.rates=[4,16,inf]' bench.requests=16

say "evaluate: the server's answers"
step evaluate "eval.endpoint=http://127.0.0.1:$port/v1" eval.n=1 "run_dir=$run/evaluations/served"
end

say "report: everything on one page"
step report "run=$run" "prices={local:${DEMO_USD_PER_HOUR:-0.10}}"
say "done"
