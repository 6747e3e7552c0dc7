#!/usr/bin/env bash
# The test suite, from a bare checkout: makes or updates the virtual environment (scripts/environment.sh),
# then runs pytest on two files at a time.  Arguments go to pytest:
#
#   bash scripts/test.sh                          everything
#   bash scripts/test.sh tests/test_pool.py -x    one file, up to its first failure
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
unset ITP_NEXT                        # programs are tested as users start them
export TOKENIZERS_PARALLELISM=false  # the tests start processes after they have used a tokenizer
export OMP_NUM_THREADS=1             # two files at a time, with a core each, are faster than one with two
exec python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
