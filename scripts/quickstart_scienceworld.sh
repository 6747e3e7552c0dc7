#!/usr/bin/env bash
# ScienceWorld from the simulator to a first result: gold paths, a small base LM, a base policy, a world model, the
# three stages of ITP-R, and held-out variations of the same tasks.  CPU only; Java comes with the Python packages.
#
#   bash scripts/quickstart_scienceworld.sh [OUTPUT_FOLDER]          (default: runs/quickstart_scienceworld)
#
# Everything can be repeated: what is finished is kept, what is missing is made.
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:-$repo/runs/quickstart_scienceworld}"
run=$(cd -- "${1:-$repo/runs/quickstart_scienceworld}" && pwd)
cd "$repo"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

# Sizes of the demo.
: "${TASKS:=find-plant,find-living-thing,find-non-living-thing}" "${TRAIN:=100}" "${HELD_OUT:=34}"
: "${LM_EPOCHS:=6}" "${POLICY_EPOCHS:=6}" "${WM_EPOCHS:=1}" "${WM_ROWS:=3000}" "${ROLLOUTS:=15}" "${WALKS:=160}" "${MAX_K:=2}"
: "${LABEL_ROWS:=1500}" "${RL_EPISODES:=64}"

step() { printf '\n== %s\n' "$*"; }
since() { echo "$(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"; }
started=$SECONDS
games=(--env scienceworld --tasks "$TASKS")
jvms=(--env_processes "$CPUS" --concurrency "$((2 * CPUS))")

evaluate() {
  local name=$1 policy=$2
  shift 2
  python -m foresight_eval.runner_sciworld --policy_model "$policy" --tasks "$TASKS" --variations "$HELD_OUT" \
    --split test --max_k "$MAX_K" "${jvms[@]}" --output_path "$run/eval/$name" "$@"
}

step "1/8 trajectories: the simulator's gold paths (D_exp), and random walks"
python -m world_model.collect "${games[@]}" "${jvms[@]}" --variations "$TRAIN" --out_dir "$run/d_exp" \
  --foresight_k "$MAX_K" --foresight_share 0.5
# Many, though a step takes five times as long where the simulator must list what is possible: gold paths go few ways,
# and a world model that has seen 12 walks predicts three of ten random actions.
python -m world_model.collect "${games[@]}" "${jvms[@]}" --variations "$WALKS" --out_dir "$run/walks" --actor random

step "2/8 base LM from nothing, on transcripts of the simulator"
python -m itp.training.base_lm --env scienceworld --out_dir "$run/base_lm" \
  --transitions "$run/d_exp/transitions.jsonl,$run/walks/transitions.jsonl" \
  --epochs "$LM_EPOCHS" --batch_size 4 --config configs/demo/from_nothing.yaml

step "3/8 base policy: supervised fine-tuning on the gold paths; $HELD_OUT held-out variations of each task"
python -m itp.training.base_policy --train_json "$run/d_exp/dialogues.json" \
  --model_path "$run/base_lm/merged_full" --out_dir "$run/policy" --epochs "$POLICY_EPOCHS" --lora_r 0 --lr 0.006 \
  --config configs/demo/from_nothing.yaml
evaluate sft "$run/policy/merged_full" --method sft

step "4/8 rollouts of the base policy (D_roll)"
python -m world_model.collect "${games[@]}" "${jvms[@]}" --variations "$ROLLOUTS" --out_dir "$run/d_roll" \
  --actor policy --policy_model "$run/policy/merged_full" --temperature 0.7

step "5/8 world model: LoRA under DeepSpeed on D_exp and D_roll"
cat "$run"/{d_exp,d_roll,walks}/transitions.jsonl > "$run/world_model_data.jsonl"
MODEL_PATH=$run/base_lm/merged_full DATA_PATH=$run/world_model_data.jsonl OUTPUT_DIR=$run/world_model \
  EPOCHS=$WM_EPOCHS LR=2e-3 PER_DEVICE_BS=16 GRAD_ACC=1 LORA_R=16 LORA_ALPHA=32 SAVE_STEPS=0 FP16=False \
  bash world_model/base_tuning/run_worldmodel_tuning.sh --max_rows "$WM_ROWS" --eval_every_epoch false \
  --steps_per_sequence 1

step "6/8 ITP-R, stages 1 and 2: pseudo-labels for $LABEL_ROWS steps, warm-up"
python -m itp.training.train_adaptive_k label --env scienceworld --expert_jsonl "$run/d_exp/transitions.jsonl" \
  --policy_model_path "$run/policy/merged_full" --wm_model_path "$run/world_model/merged_full" \
  --out_labeled_jsonl "$run/labelled.jsonl" --kmax "$MAX_K" --lambda_k 0.02 --max_rows "$LABEL_ROWS" --wm_batch_size 64
python -m itp.training.train_adaptive_k sft --env scienceworld --train_jsonl "$run/labelled.jsonl" --kmax "$MAX_K" \
  --k_balance 0.5 --act_on all \
  --policy_model_path "$run/policy/merged_full" --out_dir "$run/warm_up" --config configs/demo/warm_up.yaml

step "7/8 ITP-R, stage 3: online A2C over $RL_EPISODES episodes"
python -m itp.training.train_adaptive_k rl_k "${games[@]}" --policy_model_path "$run/warm_up/merged_full" \
  --wm_model_path "$run/world_model/merged_full" --out_dir "$run/itp_r" --episodes_per_epoch "$RL_EPISODES" \
  --env_processes "$CPUS" --config configs/demo/rl_k_scienceworld.yaml

step "8/8 evaluation on the same variations"
evaluate itp-r "$run/itp_r/last" --wm_model "$run/world_model/merged_full"
for actor in expert random; do
  python -m world_model.collect "${games[@]}" "${jvms[@]}" --split test --variations 3 --actor "$actor" \
    --out_dir "$run/held_out/$actor"
done
cat "$run"/held_out/{expert,random}/transitions.jsonl > "$run/held_out/transitions.jsonl"
python -m world_model.fidelity --env scienceworld --wm_model "$run/world_model/merged_full" \
  --transitions "$run/held_out/transitions.jsonl" --out_json "$run/held_out/fidelity.json" --max_depth 0

step "done in $(since)"
cat <<EOF
Success and mean score in percent on held-out variations.  sft: the base policy, nothing imagined; itp-r: ITP-R,
K by its K-head.

EOF
python -m foresight_eval.report "$run"/eval/{sft,itp-r}
cat <<EOF

models        $run/{base_lm,policy,world_model,warm_up}/merged_full, $run/itp_r/last
trajectories  $run/{d_exp,d_roll,walks}, $run/labelled.jsonl
results       $run/eval/*/{0,1,...}.json, summary.json, log.txt
EOF
