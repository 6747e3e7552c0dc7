#!/usr/bin/env bash
# Every planning method on the same games with the same two models, and one table of what each reached and cost.
#
#   bash scripts/compare_methods.sh [RUN_FOLDER] [FLAGS OF foresight_eval ...]     (default: runs/quickstart)
#
# RUN_FOLDER is what scripts/quickstart.sh made; POLICY, WORLD_MODEL, DATA and OUT name other models, games and results.
# The budgets are small, for the demo's models on a CPU; those of the authors' release are
# `--rap_d_actions 8 --rap_depth_limit 6 --rap_num_rollouts 32`.  What is finished is kept: the same command goes on.
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
run=$(cd -- "${1:-$repo/runs/quickstart}" && pwd)
shift || true
: "${POLICY:=$run/policy/merged_full}" "${WORLD_MODEL:=$run/world_model/merged_full}" "${DATA:=$run/data}"
: "${OUT:=$run/methods}" "${MAX_K:=2}" "${CPUS:=$(nproc)}"
all="sft cot react self_refine multi_attempt k_candidates foresight foresight-k$MAX_K mpc tot rafa mcts rap implement"
: "${METHODS:=$all}"
mkdir -p "$OUT"
POLICY=$(realpath "$POLICY") WORLD_MODEL=$(realpath "$WORLD_MODEL") DATA=$(realpath "$DATA") OUT=$(realpath "$OUT")
cd "$repo"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

for name in $METHODS; do
  printf '\n== %s\n' "$name"
  own=(--method "$name" --action_selection constrained)
  case $name in
    cot | react) own=(--method "$name" --action_selection generate) ;;  # thought and action in one reply
    foresight-k*) own=(--method foresight --action_selection constrained --fixed_k "${name#foresight-k}") ;;
  esac
  python -m foresight_eval --policy_model "$POLICY" --wm_model "$WORLD_MODEL" --env_data_root "$DATA" \
    --split unseen --max_k "$MAX_K" --candidates 3 --rounds 2 --belief_samples 5 --act_tokens 48 \
    --rap_d_actions 4 --rap_depth_limit 3 --rap_num_rollouts 8 --env_processes "$CPUS" \
    --output_path "$OUT/$name" "${own[@]}" "$@"
done
cat <<EOF

Success in percent; calls of both models a decision; p50: seconds of a decision, while episodes share the models.

EOF
# shellcheck disable=SC2086
(cd "$OUT" && PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH} python -m foresight_eval.report $METHODS)
