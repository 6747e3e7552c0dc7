#!/usr/bin/env bash
# Trains the models in models/alfworld from nothing: on a GPU in minutes (the games and episodes take a CPU longer),
# on two CPU cores in some hours.
#
#   bash scripts/train_released.sh [OUTPUT_FOLDER]       (default: runs/released)
#
# The expert corrects the mistakes of a small policy (LEARNER), the quickstart's: run scripts/quickstart.sh before.
# The world model sees random walks only, of an expert's dialogues just the vocabulary.  What is finished is kept, what
# is missing is made.
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:-$repo/runs/released}"
run=$(cd -- "${1:-$repo/runs/released}" && pwd)
[[ ! -d ${LEARNER:-} ]] || LEARNER=$(cd -- "$LEARNER" && pwd)  # it may be given from where one is
cd "$repo"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

: "${TRAIN_GAMES:=2500}" "${UNSEEN_GAMES:=408}" "${LABEL_ROWS:=12000}" "${DRILLS:=20000}" "${COPYING:=6000}"
: "${HELD_OUT:=100}" "${MAX_K:=2}" "${LEARNER:=runs/quickstart/policy/merged_full}"
config=configs/released.yaml
if [[ ! -f $LEARNER/config.json ]]; then  # before half an hour of games and episodes
  echo "LEARNER=$LEARNER: no model folder; run scripts/quickstart.sh, or give another small policy" >&2
  exit 2
fi

step() { printf '\n== %s\n' "$*"; }

step "1/7 games"
python -m itp.envs.alfworld_games --out "$run/data" --train "$TRAIN_GAMES" --seen 6 --unseen "$UNSEEN_GAMES" --seed 7 \
  --processes "$CPUS"

step "2/7 episodes: random walks, an expert's, and an expert's corrections of a learner"
collect() {
  local name=$1
  shift
  python -m world_model.collect --env_data_root "$run/data" --out_dir "$run/$name" --env_processes "$CPUS" \
    --concurrency 64 "$@"
}
collect walks --actor random --missions 2 --max_steps 40
collect d_exp --actor expert --missions 6 --noise 0,0,0.15,0.3
corrected=(--actor expert --noise_policy "$LEARNER" --noise 0.3,0.6,0.9 --max_steps 30 --action_selection constrained
  --foresight_k "$MAX_K" --foresight_share 2)
collect d_mixed_1 "${corrected[@]}" --missions 1
collect d_mixed_2 "${corrected[@]}" --missions 2 --seed 9

step "3/7 the policy's base LM, and the base policy"
python -m itp.training.base_lm --transitions "$run/d_exp/transitions.jsonl,$run/walks/transitions.jsonl" \
  --words_of "$run/d_exp/dialogues.json" --out_dir "$run/base_lm" --drills "$DRILLS" --config "$config:base_lm"
python -m itp.training.base_policy --model_path "$run/base_lm/merged_full" --out_dir "$run/policy" \
  --train_json "$run/d_exp/dialogues.json,$run/d_mixed_1/dialogues.json,$run/d_mixed_2/dialogues.json" \
  --config "$config:base_policy"

step "4/7 the world model's base LM, and the world model: random walks only"
python -m itp.training.base_lm --transitions "$run/walks/transitions.jsonl" --words_of "$run/d_exp/dialogues.json" \
  --out_dir "$run/wm_base_lm" --copying "$COPYING" --config "$config:base_lm"
python -m world_model.base_tuning.finetune --model_path "$run/wm_base_lm/merged_full" \
  --data_path "$run/walks/transitions.jsonl" --out_dir "$run/world_model" --config "$config:world_model"

step "5/7 the policy learns to read what this world model imagines, and when to look"
label() {
  local name=$1
  shift
  python -m itp.training.train_adaptive_k label --expert_jsonl "$run/$name/transitions.jsonl" \
    --policy_model_path "$run/policy/merged_full" --wm_model_path "$run/world_model/merged_full" \
    --out_labeled_jsonl "$run/labelled_$name.jsonl" --kmax "$MAX_K" --lambda_k 0.02 --wm_batch_size 64 --concurrency 64 "$@"
}
label d_mixed_2 --max_rows "$LABEL_ROWS"
label d_exp --max_rows $((LABEL_ROWS * 2 / 3))
cat "$run"/labelled_{d_mixed_2,d_exp}.jsonl > "$run/labelled.jsonl"
python -m itp.training.train_adaptive_k sft --train_jsonl "$run/labelled.jsonl" --kmax "$MAX_K" --act_on all --k_balance 0.7 --lr 0.0001 \
  --policy_model_path "$run/policy/merged_full" --out_dir "$run/itp_r" --config configs/demo/warm_up.yaml

step "6/7 models for release, in half precision"
python scripts/release_model.py --model "$run/itp_r/merged_full" --about models/alfworld/policy.md \
  --out_dir "$run/models/policy"
python scripts/release_model.py --model "$run/world_model/merged_full" --about models/alfworld/world_model.md \
  --out_dir "$run/models/world_model"

step "7/7 figures on $UNSEEN_GAMES games in rooms that no training saw"
evaluate() {
  local name=$1
  shift
  python -m foresight_eval --policy_model "$run/models/policy" --env_data_root "$run/data" --split unseen \
    --method foresight --action_selection constrained --max_k "$MAX_K" --max_steps 40 --output_path "$run/eval/$name" \
    --env_processes "$CPUS" --concurrency 64 "$@"
}
wm=(--wm_model "$run/models/world_model")
evaluate base-policy "${wm[@]}" --fixed_k 0 --policy_model "$run/policy/merged_full"  # the last of two flags counts
evaluate k0 "${wm[@]}" --fixed_k 0
evaluate k1 "${wm[@]}" --fixed_k 1
evaluate k2 "${wm[@]}" --fixed_k 2
evaluate k-head "${wm[@]}"
evaluate k1-perfect --wm_backend engine --fixed_k 1
evaluate no-repeat --method no_repeat
evaluate gain "${wm[@]}" --method implement --implement_choice gain
evaluate gain-perfect --wm_backend engine --method implement --implement_choice gain
for actor in expert random; do
  collect "held_out/$actor" --actor "$actor" --split unseen --noise 0.3 --max_games "$HELD_OUT" --max_steps 30
done
cat "$run"/held_out/{expert,random}/transitions.jsonl > "$run/held_out/transitions.jsonl"
python -m world_model.fidelity --wm_model "$run/models/world_model" --transitions "$run/held_out/transitions.jsonl" \
  --max_rows 1200 --max_depth 0 --out_json "$run/held_out/fidelity.json"
python -m foresight_eval.report "$run"/eval/{k0,k1,k2,k-head,k1-perfect,no-repeat,gain,gain-perfect,base-policy}
