#!/usr/bin/env bash
# tests/release.sh [PYTHON VERSION …]: the wheel and the sdist of HEAD, each in an empty environment, before a release.
#
# For each version (by default 3.11, which gets JAX 0.10, 3.12 and 3.13, which get JAX 0.11) the wheel is installed with
# whatever its dependencies resolve to today; then the tiny model is trained, merged and read back, from a folder that is
# no checkout. The sdist has to build the same wheel. Needs uv, and a package registry; uv fetches what Python is missing.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
[[ $# -gt 0 ]] || set -- 3.11 3.12 3.13
uv=$(PATH=$repository/.venv/bin:$PATH command -v uv) || { echo "uv is not installed: pip install uv" >&2; exit 2; }
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
export JAX_PLATFORMS=cpu
unset VIRTUAL_ENV PYTHONPATH

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
contents() { python3 -m zipfile --list "$1" | awk '{print $1, $NF}' | sort; }

say "wheel and sdist of $(git -C "$repository" rev-parse --short HEAD)"
git -C "$repository" archive --prefix=source/ HEAD | tar -x -C "$place"
"$uv" build --quiet --out-dir "$place/dist" --sdist --wheel "$place/source"  # the wheel is of the checkout …
"$uv" build --quiet --out-dir "$place/again" --wheel "$place"/dist/*.tar.gz  # … and this one of the sdist
diff <(contents "$place"/dist/*.whl) <(contents "$place"/again/*.whl)

for version in "$@"; do
  say "Python $version"
  bin=$place/$version/bin
  "$uv" venv --quiet --python "$version" "$place/$version"
  "$uv" pip install --quiet --python "$bin/python" "$place"/dist/*.whl
  "$uv" pip check --quiet --python "$bin/python"
  mkdir "$place/home-$version" && cd "$place/home-$version"
  "$bin/gemma4-tpu" --version
  "$bin/gemma4-tpu" train trainer.max_updates=2 trainer.remat=none run_dir=run
  "$bin/gemma4-tpu" merge run=run
  "$bin/gemma4-tpu" check model=tiny model.path=run/merged
  "$bin/python" -c 'import jax, sys; print(f"works with Python {sys.version.split()[0]}, JAX {jax.__version__}")'
done
say "done"
