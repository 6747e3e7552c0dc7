#!/usr/bin/env bash
# Policies that learn from their own experience, at several amounts of real environment steps, for
#
#   bash scripts/when_it_pays.sh                       (the policies that they start from)
#   bash scripts/experience.sh [OUTPUT_FOLDER]         (default: runs/experience)
#   python scripts/experiment.py configs/experiments/experience.yaml
#
# All start from the same imitation of an expert on GAMES games.  IWM: the base LM tries actions at the expert's states
# and learns what they lead to together with the expert's dialogues (docs/experience.md).  A2C: stage 3 without
# imagination.  STEPS: environment steps besides the expert's, those that only lead to a state included.
# What is finished is kept, what is missing is made.
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:-$repo/runs/experience}"
run=$(cd -- "${1:-$repo/runs/experience}" && pwd)
: "${START:=$repo/runs/when_it_pays}"
START=$(cd -- "$START" && pwd)
DATA=$(cd -- "${DATA:-$START/data}" && pwd)
cd "$repo"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

: "${GAMES:=55}" "${SEEDS:=1 2}" "${STEPS:=2000 8000}" "${MISSIONS:=6}" "${EPOCHS:=12}" "${ALTERNATIVES:=3}"
expert=$START/expert-$GAMES

for seed in $SEEDS; do
  base=$START/base-$GAMES-$seed/merged_full
  policy=$START/policy-$GAMES-$seed/merged_full

  echo "== heads for stage 3, seed $seed"
  python -m itp.training.train_adaptive_k label --expert_jsonl "$expert/transitions.jsonl" \
    --policy_model_path "$policy" --wm_model_path models/alfworld/world_model --max_rows 300 --kmax 1 \
    --out_labeled_jsonl "$run/labeled-$seed.jsonl"
  python -m itp.training.train_adaptive_k sft --train_jsonl "$run/labeled-$seed.jsonl" --kmax 1 \
    --policy_model_path "$policy" --out_dir "$run/warm_up-$seed" --config configs/demo/warm_up.yaml

  for steps in $STEPS; do
    echo "== IWM, $steps steps, seed $seed"
    python -m world_model.early_experience --expert_jsonl "$expert/transitions.jsonl" --env_data_root "$DATA" \
      --policy_model "$base" --action_selection constrained --alternatives "$ALTERNATIVES" --max_env_steps "$steps" \
      --out_dir "$run/early-$steps-$seed" --env_processes "$CPUS"
    python -m itp.training.base_policy --train_json "$expert/dialogues.json,$run/early-$steps-$seed/outcomes.json" \
      --model_path "$base" --out_dir "$run/iwm-$steps-$seed" --epochs "$EPOCHS" --lora_r 0 --lr 0.006 --seed "$seed" \
      --steps_per_sequence 0 --config configs/demo/from_nothing.yaml

    [[ ! -d $run/a2c-$steps-$seed ]] || continue
    echo "== A2C up to $steps steps, seed $seed"
    python -m itp.training.train_adaptive_k rl_k --policy_model_path "$run/warm_up-$seed/merged_full" --fixed_k 0 \
      --env_data_path "$DATA" --missions "$MISSIONS" --out_dir "$run/a2c-$seed" --max_env_steps "$steps" \
      --episodes_per_epoch 100000 --episodes_per_update 16 --num_envs 16 --lr_scheduler_type constant --seed "$seed" \
      --env_processes "$CPUS" --config configs/demo/rl_k.yaml
    cp -r "$run/a2c-$seed/last" "$run/.a2c-$steps-$seed"
    mv "$run/.a2c-$steps-$seed" "$run/a2c-$steps-$seed"
  done
done
