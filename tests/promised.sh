#!/usr/bin/env bash
# tests/promised.sh RUN PLAN: whether README's demo and plan leave what they promise; one line for each thing that is missing.
# RUN is the demo's run folder, PLAN a file with what the plan printed.
set -euo pipefail
run=$1 plan=$2
missing=()
filled() {  # a file, which is not empty
  [[ -s $run/$1 ]] || missing+=("$run/$1 is missing or empty")
}
says() {  # a file, a pattern, what it would say
  grep -qE "$2" "$1" 2> /dev/null || missing+=("$1 does not say $3")
}

filled result.json                      # trained
filled merged/model.safetensors         # merged
filled servings/demo/result.json        # served
filled evaluations/run/result.json      # evaluated
filled evaluations/served/result.json
filled plots/loss.png                   # with pictures
filled report.html
pictures=$(find "$run" -name '*.png' | wc -l)
while read -r picture; do missing+=("$picture is empty"); done < <(find "$run" -name '*.png' -empty)
[[ $pictures -ge 3 ]] || missing+=("$run has $pictures pictures, not at least three")
says "$run/report.html" 'src="data:image/' "it in pictures"
says "$run/report.md" '^\| [^|]+\| \*measured\*.*\| \$[0-9]' "what the training run cost"  # costed

scheduled=$(mktemp)
trap 'rm -f "$scheduled"' EXIT
sed -n '/^Schedule /,$p' "$plan" > "$scheduled"  # what comes before has assumed times
says "$scheduled" '^Schedule .* per update by the compiler' "how long an update takes by the compiler's schedule"
says "$scheduled" '^Run .* updates: .*(min|h).* to ' "how long the run takes by the schedule"
says "$scheduled" '^On demand +\$[0-9.]+ to [0-9.$]+' "how many dollars the run takes by the schedule"

[[ ${#missing[@]} -eq 0 ]] || { printf 'promised, but: %s\n' "${missing[@]}"; exit 1; }
echo "promised, and here: $pictures pictures, a page that names the cost, a plan with minutes and dollars by the schedule"
