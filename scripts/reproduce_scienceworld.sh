#!/usr/bin/env bash
# The paper's ScienceWorld experiment: bash scripts/reproduce_scienceworld.sh configs/scienceworld/qwen2.5-7b.yaml [STAGE ...]
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/reproduce.sh" scienceworld "$@"
