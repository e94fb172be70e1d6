#!/usr/bin/env bash
# launch/install.sh VENV: installs the locked dependencies, checking hashes, and this checkout into a new virtual
# environment. Needs python3 with pip, or uv; fetches Python 3.11 or 3.12 if missing. Used on TPU VMs, by SkyPilot and
# in the container image.
set -euo pipefail

venv=${1:?usage: launch/install.sh VENV}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv=$(command -v uv || true)
if [[ -z $uv ]]; then
  tools=$(mktemp -d)
  trap 'rm -rf "$tools"' EXIT
  sed -n '/^uv==/,/[^\\]$/p' requirements/dev.lock > "$tools/uv.lock"
  python3 -m pip install --quiet --require-hashes --no-deps --target "$tools" -r "$tools/uv.lock"
  uv=$tools/bin/uv
fi

"$uv" venv --quiet --clear --python '>=3.11,<3.13' "$venv"
export VIRTUAL_ENV=$venv
"$uv" pip install --quiet --require-hashes --no-deps -r requirements/core.lock
"$uv" pip install --quiet --no-deps --no-build-isolation --editable .
"$venv/bin/python" -c 'import gemma4_tpu; print("gemma4-tpu", gemma4_tpu.__version__, "is installed")'
