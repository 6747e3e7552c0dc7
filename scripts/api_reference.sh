#!/usr/bin/env bash
# The reference of the public modules (docs/api.md lists them) as HTML, from their docstrings.  No network.
#
#   bash scripts/api_reference.sh [OUTPUT_FOLDER]        (default: runs/api)
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:-$repo/runs/api}"
out=$(cd -- "${1:-$repo/runs/api}" && pwd)
cd "$repo"
if ! python -c "import pdoc" 2> /dev/null; then
  echo 'error: pdoc is missing; pip install -e ".[docs]"' >&2
  exit 2
fi
# shellcheck disable=SC2046
PYTHONPATH=$PWD python -m pdoc --docformat restructuredtext -o "$out" $(sed -n 's/^| `\([a-z_.]*\)` .*/\1/p' docs/api.md)
echo "reference: $out/index.html"
