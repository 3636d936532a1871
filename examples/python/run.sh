#!/usr/bin/env bash
# Runs settle.py against a cluster: run.sh [HOST:PORT], by default where `verdict dev` listens.
#
# Makes what it needs on the way: a virtual environment in the cache folder (once), and the stubs in build/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

address=${1:-127.0.0.1:7400}
python=${PYTHON:-python3}
cache=${VERDICT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/verdict}

# One environment for each Python and each list of requirements. It gets its name when it is complete.
venv=$cache/python-$({ "$python" -VV && cat requirements.txt; } | sha256sum | cut -c 1-16)
if [[ ! -d $venv ]]; then
  mkdir -p "$cache"
  new=$(mktemp -d "$cache/python-new-XXXXXX")
  trap 'rm -rf "$new"' EXIT
  "$python" -m venv "$new"
  "$new/bin/python" -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
  mv -T "$new" "$venv" 2> /dev/null || [[ -d $venv ]] # somebody else was quicker
fi

mkdir -p build
"$venv/bin/python" -m grpc_tools.protoc --proto_path=../../proto --python_out=build --pyi_out=build --grpc_python_out=build \
  verdict/v1/types.proto verdict/v1/settlement.proto

PYTHONPATH=build exec "$venv/bin/python" settle.py "$address"
