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
: "${TRAIN_GAMES:=110}" "${SEEN_GAMES:=6}" "${UNSEEN_GAMES:=102}" "${MISSIONS:=16}" "${MIXED_MISSIONS:=4}"
: "${MAX_STEPS:=40}" "${DRILLS:=20000}" "${LM_EPOCHS:=2}" "${POLICY_EPOCHS:=2}" "${WM_ROWS:=2600}" "${WM_EPOCHS:=1}"
: "${MAX_K:=2}" "${LABEL_ROWS:=1200}" "${RL_EPISODES:=2560}" "${ITP_R:=1}"
: "${ROUNDS:=5}" "${SAMPLES:=10}"  # of the actions and of the outcomes that implement imagines
: "${REASONING_SHARE:=0}"  # 0.25 teaches thoughts, reflections, yes and no as well: for configs/experiments/methods.yaml

step() { printf '\n== %s\n' "$*"; }
since() { echo "$(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"; }
started=$SECONDS

step "1/10 games: $TRAIN_GAMES to train on, $UNSEEN_GAMES in rooms that training never sees"
python -m itp.envs.alfworld_games --out "$run/data" --train "$TRAIN_GAMES" --seen "$SEEN_GAMES" \
  --unseen "$UNSEEN_GAMES" --processes "$CPUS"

step "2/10 trajectories: an expert that acts from observations (D_exp), and random walks"
collect() {
  local name=$1
  shift
  python -m world_model.collect --env_data_root "$run/data" --out_dir "$run/$name" --env_processes "$CPUS" \
    --concurrency 32 "$@"
}
collect d_exp --actor expert --missions "$MISSIONS" --noise 0,0,0.15,0.3 \
  --reasoning_share "$REASONING_SHARE"
collect walks --actor random --missions 2 --max_steps 40

step "3/10 base LM from nothing, on transcripts of the engine"
python -m itp.training.base_lm --transitions "$run/d_exp/transitions.jsonl,$run/walks/transitions.jsonl" \
  --words_of "$run/d_exp/dialogues.json" --out_dir "$run/base_lm" --drills "$DRILLS" --epochs "$LM_EPOCHS" \
  --config configs/demo/from_nothing.yaml

step "4/10 base policy: supervised fine-tuning on the expert's dialogues and its corrections of the learner (DAgger)"
collect d_mixed --actor expert --noise_policy "$run/base_lm/merged_full" --noise 0.3,0.6,0.9 \
  --missions "$MIXED_MISSIONS" --max_steps 30 --action_selection constrained \
  --foresight_k "$MAX_K" --foresight_share 2 --reasoning_share "$REASONING_SHARE"
python -m itp.training.base_policy --train_json "$run/d_exp/dialogues.json,$run/d_mixed/dialogues.json" \
  --model_path "$run/base_lm/merged_full" --out_dir "$run/policy" --epochs "$POLICY_EPOCHS" --lora_r 0 --lr 0.006 \
  --config configs/demo/from_nothing.yaml

step "5/10 rollouts of the base policy (D_roll): what it does wrong, the world model must know"
collect d_roll --actor policy --policy_model "$run/policy/merged_full" --max_games 60 --max_steps 30

step "6/10 world model: LoRA under DeepSpeed on D_exp and D_roll"
cat "$run"/{d_exp,d_roll,walks}/transitions.jsonl > "$run/world_model_data.jsonl"
MODEL_PATH=$run/base_lm/merged_full DATA_PATH=$run/world_model_data.jsonl OUTPUT_DIR=$run/world_model EPOCHS=$WM_EPOCHS \
  SAVE_STEPS=0 FP16=False bash world_model/base_tuning/run_worldmodel_tuning.sh --max_rows "$WM_ROWS" \
  --config configs/demo/world_model.yaml

step "7/10 evaluation on unseen rooms: the base policy, ITP-I, and choice by the expected gain of imagined outcomes"
evaluate() {
  local name=$1 policy=$2
  shift 2
  python -m foresight_eval --policy_model "$policy" --wm_model "$run/world_model/merged_full" \
    --env_data_root "$run/data" --split unseen --max_k "$MAX_K" --max_steps "$MAX_STEPS" \
    --output_path "$run/eval/$name" --env_processes "$CPUS" --concurrency 32 "$@"
}
evaluate sft "$run/policy/merged_full" --method sft --action_selection constrained
evaluate sft-free "$run/policy/merged_full" --method sft --action_selection generate
evaluate foresight "$run/policy/merged_full" --method foresight --action_selection constrained
evaluate implement "$run/policy/merged_full" --method implement --implement_choice gain --action_selection constrained \
  --rounds "$ROUNDS" --belief_samples "$SAMPLES"
for actor in expert random; do
  collect "held_out/$actor" --actor "$actor" --split unseen --noise 0.3 --max_games 30 --max_steps 30
done
cat "$run"/held_out/{expert,random}/transitions.jsonl > "$run/held_out/transitions.jsonl"
python -m world_model.fidelity --wm_model "$run/world_model/merged_full" \
  --transitions "$run/held_out/transitions.jsonl" --out_json "$run/held_out/fidelity.json" \
  --max_depth 0
echo "Success in percent on $UNSEEN_GAMES unseen games, after $(since):"
python -m foresight_eval.report "$run"/eval/{sft,sft-free,foresight,implement}
[[ $ITP_R == 1 ]] || exit 0

step "8/10 ITP-R, stage 1: how far is it worth to look ahead?  Pseudo-labels for $LABEL_ROWS steps of the expert"
python -m itp.training.train_adaptive_k label --expert_jsonl "$run/d_exp/transitions.jsonl" \
  --policy_model_path "$run/policy/merged_full" --wm_model_path "$run/world_model/merged_full" \
  --out_labeled_jsonl "$run/labelled.jsonl" --kmax "$MAX_K" --lambda_k 0.02 --max_rows "$LABEL_ROWS" --wm_batch_size 64

step "9/10 ITP-R, stages 2 and 3: warm-up, then online A2C over $RL_EPISODES episodes"
python -m itp.training.train_adaptive_k sft --train_jsonl "$run/labelled.jsonl" --kmax "$MAX_K" --k_balance 0.5 \
  --policy_model_path "$run/policy/merged_full" --out_dir "$run/warm_up" --config configs/demo/warm_up.yaml
python -m itp.training.train_adaptive_k rl_k --policy_model_path "$run/warm_up/merged_full" \
  --wm_model_path "$run/world_model/merged_full" --env_data_path "$run/data" --out_dir "$run/itp_r" \
  --missions "$MISSIONS" --episodes_per_epoch "$RL_EPISODES" --env_processes "$CPUS" --config configs/demo/rl_k.yaml

step "10/10 evaluation of what was learned, on the same games"
evaluate warm-up "$run/warm_up/merged_full" --method foresight --action_selection constrained
evaluate itp-r "$run/itp_r/last" --method foresight --action_selection constrained
evaluate itp-r-k0 "$run/itp_r/last" --method foresight --action_selection constrained --fixed_k 0
evaluate "itp-r-k$MAX_K" "$run/itp_r/last" --method foresight --action_selection constrained --fixed_k "$MAX_K"

step "done in $(since)"
cat <<EOF
Success in percent on $UNSEEN_GAMES unseen games.  sft: the base policy, nothing imagined; sft-free: the same, writing
freely instead of choosing among the admissible actions; foresight: ITP-I, K by prompt; implement: the action whose
imagined outcomes promise the most; warm-up: ITP-R after stage 2; itp-r: after stage 3, K by its K-head; itp-r-kN: the
same policy with K fixed.  NB: share of the tokens that always looking $MAX_K steps ahead costs.

EOF
python -m foresight_eval.report "$run"/eval/{sft,sft-free,foresight,implement,warm-up,itp-r,itp-r-k0,"itp-r-k$MAX_K"}
cat <<EOF

games         $run/data
models        $run/{base_lm,policy,world_model,warm_up}/merged_full, $run/itp_r/last
trajectories  $run/{d_exp,d_mixed,d_roll,walks}, $run/labelled.jsonl
results       $run/eval/*/{0,1,...}.json, summary.json, log.txt
EOF
