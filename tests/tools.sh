#!/usr/bin/env bash
# tests/tools.sh COMMAND[/COMMAND…]:PACKAGE…: installs the Debian packages of commands that are missing, where it may, and
# says what stays missing. Exit code: 0 nothing, 1 something.
set -uo pipefail

find_missing() {  # packages of which there is no command
  local tool names
  missing=()
  for tool in "$@"; do
    IFS=/ read -ra names <<< "${tool%%:*}"
    command -v "${names[@]}" > /dev/null || missing+=("${tool#*:}")
  done
}

find_missing "$@"
if [[ ${#missing[@]} -gt 0 && $(id -u) == 0 ]] && command -v apt-get > /dev/null; then
  echo "Installing ${missing[*]} …"
  apt-get -qq update
  for package in "${missing[@]}"; do
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$package" > /dev/null
  done
  find_missing "$@"
fi
if [[ " $* " == *" bwrap:"* ]] && command -v bwrap > /dev/null; then
  refusal=$(bwrap --unshare-all --ro-bind / / true 2>&1) \
    || echo "bubblewrap does not work on this machine (${refusal%%$'\n'*}): its tests are skipped"
fi
if [[ ${#missing[@]} -gt 0 ]]; then
  echo "Missing: ${missing[*]}. What needs them is skipped or refused. On Debian or Ubuntu: sudo apt-get install" \
    "${missing[*]}  (macOS: brew; Icarus Verilog is icarus-verilog there)"
  exit 1
fi
