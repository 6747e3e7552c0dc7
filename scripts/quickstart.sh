#!/usr/bin/env bash
# From an empty machine to a first result: real ALFWorld games, a small base LM, a base policy, a world
# model, and imagine-then-plan on rooms that no training saw.  CPU only, no downloads but Python packages.
#
#   bash scripts/quickstart.sh [OUTPUT_FOLDER]          (default: runs/quickstart)
#
# Everything can be repeated: what is finished is kept, what is missing is made.
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:-$repo/runs/quickstart}"
run=$(cd -- "${1:-$repo/runs/quickstart}" && pwd)
cd "$repo"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

# Sizes of the demo; tests/test_quickstart.py runs the same pipeline in miniature.
: "${TRAIN_GAMES:=200}" "${SEEN_GAMES:=6}" "${UNSEEN_GAMES:=102}" "${MISSIONS:=12}" "${MAX_STEPS:=40}"
: "${LM_EPOCHS:=2}" "${POLICY_EPOCHS:=4}" "${WM_ROWS:=2500}" "${WM_EPOCHS:=1}" "${MAX_K:=2}" "${CPUS:=$(nproc)}"

step() { printf '\n== %s\n' "$*"; }
started=$SECONDS

step "1/8 games: $TRAIN_GAMES to train on, $UNSEEN_GAMES in rooms that training never sees"
python -m itp.envs.alfworld_games --out "$run/data" --train "$TRAIN_GAMES" --seen "$SEEN_GAMES" \
  --unseen "$UNSEEN_GAMES" --processes "$CPUS"

step "2/8 trajectories: an expert that acts from observations (D_exp), and random walks"
python -m world_model.collect --actor expert --env_data_root "$run/data" --out_dir "$run/d_exp" \
  --missions "$MISSIONS" --noise 0,0,0.15,0.3 --foresight_k 5 --env_processes "$CPUS"
python -m world_model.collect --actor random --env_data_root "$run/data" --out_dir "$run/walks" \
  --max_games 100 --max_steps 40 --env_processes "$CPUS"

step "3/8 base LM from nothing, on transcripts of the engine"
small=(--batch_size 8 --grad_accum 1 --max_seq_len 1536 --adam_beta2 0.95 --wd 0.05 --eval_share 0.02
  --eval_every_epoch false --logging_steps 100)
python -m itp.training.base_lm --transitions "$run/d_exp/transitions.jsonl,$run/walks/transitions.jsonl" \
  --out_dir "$run/base_lm" --epochs "$LM_EPOCHS" --lr 3e-3 "${small[@]}"

step "4/8 base policy: supervised fine-tuning on the expert's dialogues"
python -m itp.training.base_policy --train_json "$run/d_exp/dialogues.json" \
  --model_path "$run/base_lm/merged_full" --out_dir "$run/policy" --epochs "$POLICY_EPOCHS" --lr 3e-3 --lora_r 0 \
  "${small[@]}"

step "5/8 rollouts of the base policy (D_roll): what it does wrong, the world model must know"
python -m world_model.collect --actor policy --policy_model "$run/policy/merged_full" --env_data_root "$run/data" \
  --out_dir "$run/d_roll" --max_games 100 --max_steps 30 --temperature 0.7 --env_processes "$CPUS"

step "6/8 world model: LoRA under DeepSpeed on D_exp and D_roll"
cat "$run"/{d_exp,d_roll,walks}/transitions.jsonl > "$run/world_model_data.jsonl"
MODEL_PATH=$run/base_lm/merged_full DATA_PATH=$run/world_model_data.jsonl OUTPUT_DIR=$run/world_model EPOCHS=$WM_EPOCHS \
  LR=2e-3 PER_DEVICE_BS=16 GRAD_ACC=1 LORA_R=16 LORA_ALPHA=32 SAVE_STEPS=0 FP16=False \
  bash world_model/base_tuning/run_worldmodel_tuning.sh --max_rows "$WM_ROWS" --eval_every_epoch false

step "7/8 evaluation on unseen rooms"
evaluate() {
  local name=$1
  shift
  python -m foresight_eval --policy_model "$run/policy/merged_full" --wm_model "$run/world_model/merged_full" \
    --env_data_root "$run/data" --split unseen --max_k "$MAX_K" --max_steps "$MAX_STEPS" \
    --output_path "$run/eval/$name" --env_processes "$CPUS" "$@"
}
evaluate sft --method sft --action_selection constrained
evaluate sft-free --method sft --action_selection generate
evaluate foresight --method foresight --action_selection constrained

step "8/8 how true is the world model (expert with mistakes and random walks, in unseen rooms)"
for actor in expert random; do
  python -m world_model.collect --actor "$actor" --split unseen --env_data_root "$run/data" --noise 0.3 \
    --max_games 30 --max_steps 30 --out_dir "$run/held_out/$actor" --env_processes "$CPUS"
done
cat "$run"/held_out/{expert,random}/transitions.jsonl > "$run/held_out/transitions.jsonl"
python -m world_model.fidelity --wm_model "$run/world_model/merged_full" \
  --transitions "$run/held_out/transitions.jsonl" --out_json "$run/held_out/fidelity.json"

step "done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
echo "Success in percent on $UNSEEN_GAMES unseen games (sft: no imagination; constrained to admissible actions,"
echo "and writing freely; foresight: K by the policy's own choice, up to $MAX_K steps ahead):"
python -m foresight_eval.report "$run"/eval/{sft,sft-free,foresight}
cat <<EOF

games         $run/data
models        $run/{base_lm,policy,world_model}/merged_full
trajectories  $run/{d_exp,d_roll,walks}
results       $run/eval/*/{0,1,...}.json, summary.json, log.txt
EOF
