#!/usr/bin/env bash
# The paper's ALFWorld experiment, from models and data to its row of Table 1.
#
#   bash scripts/reproduce_alfworld.sh CONFIG.yaml [STAGE ...]      (configs/alfworld/*.yaml; default: all stages)
#
# Stages: data policy rollouts world_model label sft rl_k evaluate.  All can be repeated: what is finished is
# kept, and what another configuration left is refused.  A stage's output is checked before the next begins.
# The paper's costs, on two A100 80 GB: rollouts 9.5 GPU-hours, world model 8.7 h, stages 1 to 3 13.3, 12.8
# and 9.6 GPU-hours.  Policy and world model of 8B need one 80 GB device each in stages 1 and 3.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }
repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
[[ $# -ge 1 ]] || fail "no configuration given; one looks like configs/alfworld/qwen2.5-7b.yaml"
[[ -f $1 ]] || fail "$1: no such file; choose one of $(cd "$repo" && echo configs/alfworld/*.yaml)"
config=$(realpath -- "$1")
shift
all=(data policy rollouts world_model label sft rl_k evaluate)
stages=("${@:-${all[@]}}")
for stage in "${stages[@]}"; do
  [[ " ${all[*]} " == *" $stage "* ]] || fail "unknown stage $stage; choose among ${all[*]}"
done
python=$(command -v python3 || command -v python) || fail "no python3 on the PATH; activate the environment"
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

# The `run` section as shell variables; everything else is read by the programs themselves.
settings=$("$python" - "$config" << 'PY'
import shlex, sys, yaml
run = (yaml.safe_load(open(sys.argv[1], encoding="utf-8")) or {}).get("run") or {}
for name in ("policy_base", "world_model_base", "data", "out"):
    if not isinstance(run.get(name), str):
        sys.exit(f"error: {sys.argv[1]}: the section `run` needs {name}")
    print(f"{name}={shlex.quote(run[name])}")
PY
) || exit 2
eval "$settings"
mkdir -p "$out"

# Training takes all GPUs; each process has a whole model.
gpus=$({ nvidia-smi -L || true; } 2> /dev/null | grep -c '^GPU' || true)
[[ ${CUDA_VISIBLE_DEVICES-unset} != "" ]] || gpus=0
if ((gpus > 1)); then train=(torchrun --standalone --nproc_per_node "$gpus" -m); else train=("$python" -m); fi

has() { for file in "$@"; do [[ -s $file ]] || fail "stage $stage: it left no $file; see what it said above"; done; }
wants() { for file in "$@"; do [[ -s $file ]] || fail "stage $stage needs $file, which an earlier stage makes"; done; }
evaluate() { # NAME POLICY METHOD ...
  local name=$1 policy=$2 method=$3
  shift 3
  "$python" -m foresight_eval --config "$config:evaluate" --policy_model "$policy" --method "$method" \
    --wm_model "$out/world_model/merged_full" --env_data_root "$data/alfworld" --output_path "$out/eval/$name" "$@"
  has "$out/eval/$name/summary.json"
}

for stage in "${stages[@]}"; do
  printf '\n== %s\n' "$stage"
  case $stage in
    data)
      if [[ ! -f $data/eto/alfworld_sft.json ]]; then
        "$python" -m world_model.data_processing.fetch --out_dir "$data" --what eto
      fi
      if [[ ! -d $data/alfworld/json_2.1.1 ]]; then
        "$python" -m world_model.data_processing.fetch --out_dir "$data" --what games
      fi
      "$python" -m world_model.data_processing.convert --config "$config:convert" --out_dir "$out/expert" \
        --input "$data/eto/alfworld_sft.json"
      has "$out"/expert/{transitions.jsonl,dialogues.json}
      ;;
    policy)
      wants "$out/expert/dialogues.json"
      "${train[@]}" itp.training.base_policy --config "$config:base_policy" --model_path "$policy_base" \
        --train_json "$out/expert/dialogues.json" --out_dir "$out/policy"
      has "$out"/policy/{metrics.json,merged_full/config.json}
      ;;
    rollouts)
      wants "$out/policy/merged_full/config.json"
      "$python" -m world_model.collect --config "$config:collect" --policy_model "$out/policy/merged_full" \
        --env_data_root "$data/alfworld" --out_dir "$out/rollouts"
      has "$out/rollouts/transitions.jsonl"
      ;;
    world_model)
      wants "$out"/{expert,rollouts}/transitions.jsonl
      cat "$out"/{expert,rollouts}/transitions.jsonl > "$out/world_model_data.jsonl"
      "${train[@]}" world_model.base_tuning.finetune --config "$config:world_model" --model_path "$world_model_base" \
        --data_path "$out/world_model_data.jsonl" --out_dir "$out/world_model"
      has "$out"/world_model/{metrics.json,merged_full/config.json}
      ;;
    label)
      wants "$out"/{policy,world_model}/merged_full/config.json
      "$python" -m itp.training.train_adaptive_k label --config "$config:label" \
        --expert_jsonl "$out/expert/transitions.jsonl" --policy_model_path "$out/policy/merged_full" \
        --wm_model_path "$out/world_model/merged_full" --out_labeled_jsonl "$out/labelled.jsonl"
      has "$out/labelled.jsonl"
      ;;
    sft)
      wants "$out/labelled.jsonl"
      "${train[@]}" itp.training.train_adaptive_k sft --config "$config:sft" --train_jsonl "$out/labelled.jsonl" \
        --policy_model_path "$out/policy/merged_full" --out_dir "$out/warm_up"
      has "$out"/warm_up/{metrics.json,merged_full/policy_heads.json}
      ;;
    rl_k)
      wants "$out/warm_up/merged_full/policy_heads.json"
      "$python" -m itp.training.train_adaptive_k rl_k --config "$config:rl_k" --out_dir "$out/itp_r" \
        --policy_model_path "$out/warm_up/merged_full" --wm_model_path "$out/world_model/merged_full" \
        --env_data_path "$data/alfworld"
      has "$out"/itp_r/{metrics.json,last/policy_heads.json}
      ;;
    evaluate)
      wants "$out/world_model/merged_full/config.json" "$out/itp_r/last/policy_heads.json"
      evaluate cot "$policy_base" cot
      evaluate react "$policy_base" react
      evaluate itp-i "$policy_base" foresight
      evaluate sft "$out/policy/merged_full" sft
      evaluate itp-r-warm-up "$out/warm_up/merged_full" foresight
      evaluate itp-r "$out/itp_r/last" foresight
      "$python" -m foresight_eval.report "$out"/eval/{cot,react,itp-i,sft,itp-r-warm-up,itp-r}
      ;;
  esac
done
