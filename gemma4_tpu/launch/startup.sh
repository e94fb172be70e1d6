# What every host of a slice does: install, train (again after a preemption or a crash), upload, delete the slice.
# The lines above are rendered for one run (gemma4_tpu/launch/render.py); none below is. The VM runs this as root at
# each start, without arguments; it then runs itself as a service ("job"), and as a timer on the first host ("expire").
set -uo pipefail

ROOT=${GEMMA4_TPU_ROOT:-/opt/gemma4-tpu}
LOG=$ROOT/launch.log
OUTCOME=$LAUNCH_DIR/outcome.json
export HOME=${HOME:-/root} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
stopping=""
child=""

say() { echo "$(date -u +%FT%TZ) $*"; }

metadata() {
  curl -sf --retry 5 -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

upload_log() { gcloud storage cp --quiet "$LOG" "$LAUNCH_DIR/host-$HOST.log" > /dev/null 2>&1; }

retry() {  # COMMAND…: three attempts
  local attempt
  for attempt in 1 2 3; do
    "$@" && return 0
    say "attempt $attempt failed: $*"
    sleep "${PAUSE_SECONDS:-10}"
  done
  return 1
}

delete_slice() {
  if [[ $KEEP == true ]]; then
    say "launch.keep=true: the slice stays and costs money until it is deleted: $LAUNCHER delete $ID"
    return
  fi
  say "deleting $ID"
  upload_log
  retry gcloud compute tpus queued-resources delete "$ID" --project="$PROJECT" --zone="$ZONE" --force --quiet --async ||
    say "COULD NOT DELETE $ID: it costs money until it is deleted: $LAUNCHER delete $ID"
  upload_log
}

finish() {  # CODE REASON: the run is over, permanently and on every host
  say "$2 (exit code $1)"
  printf '{"code": %d, "host": %d, "reason": "%s"}\n' "$1" "$HOST" "$2" > "$ROOT/outcome.json"
  retry gcloud storage cp --quiet "$ROOT/outcome.json" "$OUTCOME"
  [[ $HOSTS == 1 ]] || sleep "${PAUSE_SECONDS:-10}"  # the others upload their logs
  delete_slice
  upload_log
  exit "$1"
}

fetch_source() {
  rm -rf "$ROOT/source" "$ROOT/fetched"
  if [[ -n $GIT_URL ]]; then
    git clone --quiet "$GIT_URL" "$ROOT/source" && git -C "$ROOT/source" checkout --quiet "$GIT_REF"
    return
  fi
  mkdir -p "$ROOT/fetched"
  gcloud storage cp --quiet "$LAUNCH_DIR/source.tar.gz" "$LAUNCH_DIR/source.bundle" "$ROOT/fetched/" &&
    git clone --quiet --no-checkout "$ROOT/fetched/source.bundle" "$ROOT/source" &&
    tar -xzf "$ROOT/fetched/source.tar.gz" -C "$ROOT/source" &&
    git -C "$ROOT/source" reset --quiet --mixed HEAD  # what differs from the commit shows as uncommitted
}

install() {
  [[ -e $ROOT/installed ]] && return
  say "installing"
  retry fetch_source && retry bash "$ROOT/source/launch/install.sh" "$ROOT/venv" || return 1
  if [[ $NEEDS_SIMULATOR == true ]] && ! command -v iverilog > /dev/null; then
    retry apt-get -o DPkg::Lock::Timeout=300 -qq update &&
      retry apt-get -o DPkg::Lock::Timeout=300 -qq install -y iverilog || return 1
  fi
  touch "$ROOT/installed"
}

stage_model() {  # to memory; again after a restart of the VM, which empties it
  [[ -z $MODEL_SOURCE || -e $MODEL_TARGET/.complete ]] && return
  say "copying $MODEL_SOURCE to $MODEL_TARGET"
  mkdir -p "$MODEL_TARGET"
  retry gcloud storage cp --quiet --recursive "$MODEL_SOURCE/*" "$MODEL_TARGET/" && touch "$MODEL_TARGET/.complete"
}

read_secrets() {
  local pair value
  for pair in "${SECRETS[@]}"; do
    value=$(gcloud secrets versions access latest --secret="${pair#*=}" --project="$PROJECT") || {
      say "the secret ${pair#*=} can't be read; may this VM's service account read it (roles/secretmanager.secretAccessor)?"
      return 1
    }
    export "${pair%%=*}=$value"
  done
}

run() {  # MODULE WORD…: in the foreground, but passes a SIGTERM on once and then waits
  "$ROOT/venv/bin/python" -m "$@" &
  child=$!
  wait "$child"
  local code=$?
  while [[ -n $stopping ]] && kill -0 "$child" 2> /dev/null; do
    wait "$child"
    code=$?
  done
  child=""
  return "$code"
}

has_done() { gcloud storage cat "$LAUNCH_DIR/stage-$1.done" > /dev/null 2>&1; }  # NUMBER, perhaps on an earlier slice

mark_done() { date -u > "$ROOT/stage.done" && retry gcloud storage cp --quiet "$ROOT/stage.done" "$LAUNCH_DIR/stage-$1.done"; }

terminate() {
  stopping=yes
  say "SIGTERM: the slice is going away"
  [[ -z $child ]] || kill -TERM "$child"
}

train() {  # until it has finished or can't; returns its last exit code
  local crashes=0 code
  while true; do
    [[ -z $stopping ]] || return 42
    run gemma4_tpu.train "${TRAIN[@]}"
    code=$?
    say "training: exit code $code"
    [[ -z $stopping ]] || return 42
    case $code in
      0 | 2 | 64 | 130) return "$code" ;;
      42) say "saved: resuming" ;;
      *)
        crashes=$((crashes + 1))
        if ((crashes > RESTARTS)); then return "$code"; fi
        say "restart $crashes of $RESTARTS"
        sleep "${PAUSE_SECONDS:-10}"
        ;;
    esac
  done
}

job() {
  mkdir -p "$ROOT" && cd "$ROOT" || exit 1
  exec >> "$LOG" 2>&1
  trap terminate TERM
  local uploads
  (while sleep 60; do upload_log; done) &
  uploads=$!
  trap 'pkill -P "$uploads"; kill "$uploads" 2> /dev/null' EXIT
  if gcloud storage cat "$OUTCOME" > /dev/null 2>&1; then
    say "this run is over already"
    [[ $HOST != 0 ]] || delete_slice
    exit 0
  fi
  install || finish 1 "the installation failed"
  read_secrets || finish 1 "a secret can't be read"
  stage_model || finish 1 "the checkpoint can't be copied"
  train
  local code=$?
  if [[ -n $stopping ]]; then
    say "stopped by the VM; a new slice resumes from the last checkpoint"
    upload_log
    exit 42
  fi
  if [[ $HOST != 0 ]]; then  # the first host reports the outcome, and runs the stages
    upload_log
    exit "$code"
  fi
  [[ $code == 0 ]] || finish "$code" "the training ended with exit code $code"
  if ! after && [[ -z $stopping ]]; then
    finish 1 "trained, but a later stage failed"
  fi
  [[ -z $stopping ]] || exit 42
  finish 0 "finished"
}

expire() {  # launch.max_hours have passed, with launch.keep or without
  exec >> "$LOG" 2>&1
  systemctl stop gemma4-tpu  # saves first
  KEEP=false
  if gcloud storage cat "$OUTCOME" > /dev/null 2>&1; then
    delete_slice
    exit 0
  fi
  finish 42 "launch.max_hours are over; the same command with run_dir=$RUN_DIR goes on"
}

boot() {
  mkdir -p "$ROOT"
  cp "${BASH_SOURCE[0]}" "$ROOT/job.sh"
  systemctl reset-failed gemma4-tpu 2> /dev/null
  # Stopped by SIGTERM to this script alone, which passes it on once: a second one would not wait for the save.
  systemd-run --unit=gemma4-tpu --property=KillMode=mixed --property=TimeoutStopSec=600 \
    --setenv=HOST="$HOST" bash "$ROOT/job.sh" job
  if [[ -n $MAX_SECONDS ]]; then  # the first host ends before the others
    systemd-run --unit=gemma4-tpu-limit --on-active="$((MAX_SECONDS + 300 * HOST))s" --setenv=HOST="$HOST" \
      bash "$ROOT/job.sh" expire
  fi
}

HOST=${HOST:-$(metadata agent-worker-number)}
if [[ -z $HOST ]]; then
  [[ $HOSTS == 1 ]] || { say "this host's number is unknown"; exit 1; }
  HOST=0
fi
case ${1:-boot} in
  boot | job | expire) "${1:-boot}" ;;
  *) echo "usage: startup.sh [boot | job | expire]" >&2; exit 2 ;;
esac
