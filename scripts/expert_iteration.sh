#!/usr/bin/env bash
# Expert iteration: a policy plays with a planner in the world model, and learns from the episodes that were solved.
# No expert is asked beyond the DIALOGUES that the policy has learned from already.
#
#   BASE=BASE_LM POLICY=POLICY DIALOGUES=dialogues.json DATA=GAMES bash scripts/expert_iteration.sh OUTPUT_FOLDER
#
# Each of ROUNDS plays GAMES games of the training split by METHOD with the round's policy, and trains the next one from
# BASE on the DIALOGUES and on what was solved in all rounds: OUTPUT_FOLDER/round_N/policy/merged_full.
# The control is imitation alone, on the DIALOGUES for as many updates: OUTPUT_FOLDER/imitation/merged_full.
# What is finished is kept, what is missing is made.
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
: "${1:?say where the rounds go: bash scripts/expert_iteration.sh OUTPUT_FOLDER}"
: "${BASE:?the model that policies are trained from}" "${POLICY:?the policy of the first round}"
: "${DIALOGUES:?the dialogues that it was trained on}" "${DATA:?folder that holds json_2.1.1}"
BASE=$(realpath -- "$BASE") POLICY=$(realpath -- "$POLICY") DIALOGUES=$(realpath -- "$DIALOGUES") DATA=$(realpath -- "$DATA")
mkdir -p "$1"
run=$(cd -- "$1" && pwd)
cd "$repo"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

: "${WM:=models/alfworld/world_model}" "${ROUNDS:=1}" "${GAMES:=300}" "${SEED:=1}" "${MAX_STEPS:=40}"
: "${METHOD:=--method implement --implement_choice gain --wm_model $WM}"
: "${EPISODES:=6000}"  # a policy reads about so many in all, but no dialogue more than MOST_EPOCHS times
: "${MOST_EPOCHS:=12}"

count() { python -c 'import json, sys; print(sum(len(json.load(open(file))) for file in sys.argv[1:]))' "$@"; }
train() {  # OUT EPOCHS FILES...
  local out=$1 epochs=$2 files
  shift 2
  files=$(IFS=,; echo "$*")
  python -m itp.training.base_policy --train_json "$files" --model_path "$BASE" --out_dir "$out" --epochs "$epochs" \
    --lora_r 0 --lr 0.006 --seed "$SEED" --config configs/demo/from_nothing.yaml
}

files=("$DIALOGUES")
policy=$POLICY
for ((round = 1; round <= ROUNDS; round++)); do
  out=$run/round_$round
  echo "== round $round of $ROUNDS: $GAMES games"
  # Each round plays games of its own, so that it can find what the rounds before it didn't.
  # shellcheck disable=SC2086  # METHOD is several flags
  python -m foresight_eval --policy_model "$policy" --env_data_root "$DATA" --split train $METHOD \
    --action_selection constrained --max_k 2 --max_steps "$MAX_STEPS" --part_num "$ROUNDS" --part_idx "$((round - 1))" \
    --max_games "$((ROUNDS * GAMES))" --env_processes "$CPUS" --concurrency 64 --output_path "$out/play"
  python -m foresight_eval.extract_episodes --results "$out/play" --out_dir "$out/data"
  files+=("$out/data/dialogues.json")
  dialogues=$(count "${files[@]}")
  epochs=$((EPISODES / dialogues))
  epochs=$((epochs < 1 ? 1 : epochs > MOST_EPOCHS ? MOST_EPOCHS : epochs))
  echo "== round $round: a policy of $dialogues dialogues, $epochs epochs"
  train "$out/policy" "$epochs" "${files[@]}"
  policy=$out/policy/merged_full
done
echo "== control: imitation of the $(count "$DIALOGUES") dialogues alone, for as many updates"
train "$run/imitation" "$((epochs * dialogues / $(count "$DIALOGUES")))" "$DIALOGUES"
