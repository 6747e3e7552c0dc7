#!/usr/bin/env bash
# What only a GPU can tell, on a machine that has CUDA, PyTorch, Transformers, PEFT and Accelerate but no network.
#
#   bash scripts/wheelhouse.sh .wheels 3.12                    (before, where there is a network)
#   bash scripts/gpu_check.sh .wheels OUT [flags of scripts/gpu_check.py, such as --parts tests,bench]
#
# Installs the wheels beside that machine's packages, which stay as they are, and runs scripts/gpu_check.py.
set -euo pipefail

[[ $# -ge 2 ]] || { echo "usage: bash scripts/gpu_check.sh WHEELS OUT [flags]" >&2; exit 2; }
wheels=$(cd -- "$1" && pwd)
mkdir -p "$2"
out=$(cd -- "$2" && pwd)
shift 2
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
export PYTHONPATH=$PWD:$site PATH=$site/bin:$PATH
export TOKENIZERS_PARALLELISM=false
python3 scripts/gpu_check.py --out_dir "$out" "$@"
