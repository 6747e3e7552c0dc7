#!/usr/bin/env bash
# The paper's ALFWorld experiment: bash scripts/reproduce_alfworld.sh configs/alfworld/qwen2.5-7b.yaml [STAGE ...]
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/reproduce.sh" alfworld "$@"
