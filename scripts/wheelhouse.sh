#!/usr/bin/env bash
# A folder of wheels for a machine that has CUDA, PyTorch, Transformers, PEFT and Accelerate but no network.
#
#   bash scripts/wheelhouse.sh FOLDER [PYTHON]      (PYTHON: that machine's version, such as 3.12; default: this one's)
#
# scripts/gpu_check.sh installs from there.  Linux on x86-64.  ScienceWorld and its Java (70 MB) aren't among them.
# bitsandbytes keeps its libraries for CUDA $CUDA only (default: 130, as in CUDA 13.0); with all of them it has 43 MB.
set -euo pipefail

[[ $# -ge 1 ]] || { echo "usage: bash scripts/wheelhouse.sh FOLDER [PYTHON]" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd -- "$1" && pwd)
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
: "${PYTHON:=python3}" "${CUDA:=130}"
version=${2:-$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}

# PyPI has these as sources.  What is built of them holds no extension module, so any Python takes it.
sources=(deepspeed fast_downward_textworld jericho)
wheels=(alfworld textworld tatsu hashids mementos more_itertools prompt_toolkit wcwidth termcolor hjson networkx
  pydantic pydantic_core annotated_types typing_inspection openai jiter httpx2 httpcore2 truststore sniffio distro
  py4j psutil pytest pytest_asyncio pytest_xdist execnet bitsandbytes)
# What the machine probably has, in a version that suits its PyTorch, is left out: numpy, tqdm, pyyaml, matplotlib.

platforms=()
for glibc in 34 31 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

# The versions that were tested together, where requirements.txt names one.
pinned=$(mktemp -d)
trap 'rm -rf "$pinned"' EXIT
sed 's/ *#.*//' requirements.txt > "$pinned/constraints.txt"
version_of() { sed -n "s/^${1//_/[-_]}==/==/ip" "$pinned/constraints.txt"; }
pin() { for name in "$@"; do echo "$name$(version_of "$name")"; done; }

mapfile -t wanted < <(pin "${sources[@]}")
DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "${wanted[@]}"
# pydantic wants exactly one pydantic_core, so that the resolver chooses it.
mapfile -t wanted < <(pin "${wheels[@]}")
core=$("$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest "$pinned" "pydantic$(version_of pydantic)" &&
  unzip -p "$pinned"/pydantic-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([0-9.]*\).*/\1/p')
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  "${platforms[@]}" --dest "$folder" "${wanted[@]/#pydantic_core/pydantic_core==$core}"

"$PYTHON" - "$folder" "$CUDA" << 'PY'
import sys
import zipfile
from pathlib import Path

folder, cuda = Path(sys.argv[1]), sys.argv[2]
for wheel in folder.glob("bitsandbytes-*.whl"):
    smaller = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            library = entry.filename.endswith(".so")
            if not library or entry.filename.endswith((f"_cuda{cuda}.so", "_cpu.so")):
                new.writestr(entry, old.read(entry))  # pip reads RECORD, and doesn't mind what it names in vain
    smaller.replace(wheel)
PY
echo "$(find "$folder" -name '*.whl' | wc -l) wheels for Python $version, $(du -sh "$folder" | cut -f1), in $folder"
