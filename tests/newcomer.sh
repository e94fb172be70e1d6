#!/usr/bin/env bash
# tests/newcomer.sh [--timed] [FOLDER]: does what README tells a newcomer, and fails where anything does, or is not as
# promised (tests/promised.sh).
#
# HEAD is cloned into FOLDER (which must be empty; by default a temporary one that is removed), and HOME is an empty
# folder. README's two `make` commands run there as they stand, then its plan: no environment but the one that the first
# of them makes. Material in ../shared, which some tests read, is linked to where the clone looks for it. What is skipped,
# and how long everything took, is said at the end.
#
# --timed, before a release, on a machine that does nothing else: only the way to a costed 31B, which is the demo and the
# plan; a failure if they take more than 12 minutes.
set -euo pipefail
most_seconds=720
timed=
[[ ${1:-} != --timed ]] || { timed=yes; shift; }
repository=$(cd "$(dirname "$0")/.." && pwd)
if [[ $# -gt 0 ]]; then
  place=$1
  mkdir -p "$place"
  [[ -z $(ls -A "$place") ]] || { echo "$place is not empty" >&2; exit 2; }
  place=$(cd "$place" && pwd)
else
  place=$(mktemp -d)
  trap 'rm -rf "$place"' EXIT
fi
mkdir "$place/home"

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
as_newcomer() {  # runs a line of README
  env -u VIRTUAL_ENV -u PYTHONPATH -u JAX_PLATFORMS -u XLA_FLAGS -u XDG_CACHE_HOME -u XDG_CONFIG_HOME -u XDG_DATA_HOME \
    HOME="$place/home" bash -c "$1"
}

mapfile -t commands < <(grep '^make ' "$repository/README.md")
plan=$(grep -m 1 '^gemma4-tpu plan ' "$repository/README.md")
[[ ${#commands[@]} -eq 2 ]] || { echo "README shows ${#commands[@]} commands of make, not two" >&2; exit 2; }
[[ -z $(git -C "$repository" status --porcelain) ]] || echo "Uncommitted changes are left out: HEAD is what is cloned."

timings=()
took() { timings+=("$(printf '%5d s  %s' $((SECONDS - began)) "$1")"); }
[[ -z $timed ]] || commands=("${commands[0]}")

skipped=()
[[ -d $repository/../shared ]] || skipped+=("tests that read ../shared, which is not here")
[[ ! -d $repository/../shared ]] || ln -s "$(cd "$repository/../shared" && pwd)" "$place/shared"
git clone --quiet "$repository" "$place/gemma4-tpu"
cd "$place/gemma4-tpu"
for command in "${commands[@]}"; do
  say "$command"
  began=$SECONDS
  as_newcomer "$command" 2>&1 | tee -a "$place/log.txt"
  took "$command"
  [[ -z $(git status --porcelain) ]] || { echo "$command leaves the checkout changed:"; git status --short; exit 1; }
done
mapfile -t -O "${#skipped[@]}" skipped < <(grep '^SKIPPED ' "$place/log.txt" || true)

if [[ $(uname -sm) == "Linux x86_64" ]]; then
  say "$plan"
  began=$SECONDS
  as_newcomer "source .venv/bin/activate && $plan" 2>&1 | tee "$place/plan.txt"
  took "$plan"
  "$repository/tests/promised.sh" "$(echo outputs/demo/*)" "$place/plan.txt"
else
  skipped+=("the plan, since there is no libtpu for $(uname -sm)")
fi

say "README's commands work"
printf '%s\n' "${timings[@]}"
if [[ -n $timed && $SECONDS -gt $most_seconds ]]; then
  echo "$SECONDS s is more than the $most_seconds s that a newcomer is promised" >&2
  exit 1
fi
[[ ${#skipped[@]} -eq 0 ]] || printf 'skipped: %s\n' "${skipped[@]}"
