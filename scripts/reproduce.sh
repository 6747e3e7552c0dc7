#!/usr/bin/env bash
# The paper's experiment in one environment, from models and data to its row of Table 1: what reproduce_alfworld.sh
# and reproduce_scienceworld.sh do.
#
#   bash scripts/reproduce_ENV.sh CONFIG.yaml [STAGE ...]      (configs/ENV/*.yaml; default: all stages)
#
# Stages: data policy rollouts world_model label sft rl_k evaluate.  All can be repeated: what is finished is
# kept, and what another configuration left is refused.  A stage's output is checked before the next begins.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }
repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
[[ ${1-} == alfworld || ${1-} == scienceworld ]] || fail "start reproduce_alfworld.sh or reproduce_scienceworld.sh"
env=$1
shift
[[ $# -ge 1 ]] || fail "no configuration given; one looks like configs/$env/qwen2.5-7b.yaml"
[[ -f $1 ]] || fail "$1: no such file; choose one of $(cd "$repo" && echo configs/"$env"/*.yaml)"
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
settings=$("$python" - "$config" "$env" << 'PY'
import shlex, sys, yaml
path, env = sys.argv[1:]
run = (yaml.safe_load(open(path, encoding="utf-8")) or {}).get("run") or {}
for name in ("env", "policy_base", "world_model_base", "data", "out"):
    if not isinstance(run.get(name), str):
        sys.exit(f"error: {path}: the section `run` needs {name}")
if run["env"] != env:
    sys.exit(f"error: {path} is about {run['env']}; start scripts/reproduce_{run['env']}.sh with it")
for name in ("policy_base", "world_model_base", "data", "out"):
    print(f"{name}={shlex.quote(run[name])}")
PY
) || exit 2
eval "$settings"
mkdir -p "$out"

# What differs between the environments: ALFWorld's games lie in files, ScienceWorld's in its simulator, and ETO's
# lists say which of them the field plays.  Table 1 has seen games of both, and unseen ones of ScienceWorld.
if [[ $env == alfworld ]]; then
  dialogues=$data/eto/alfworld_sft.json evaluation=foresight_eval splits=(dev)
  collect_on=(--env_data_root "$data/alfworld") learn_on=(--env_data_path "$data/alfworld")
else
  dialogues=$data/eto/sciworld_sft.json evaluation=foresight_eval.runner_sciworld splits=(dev test)
  collect_on=(--pairs "$data/eto/train_indices.json") learn_on=("${collect_on[@]}")
fi

# What the paper reports on two A100 80 GB with 8B models, for the stages that it reports.
cost() {
  case $1 in
    rollouts) echo "9.5 GPU-hours" ;;
    world_model) echo "8.7 hours" ;;
    label) echo "13.3 GPU-hours; policy and world model take a GPU of 80 GB each" ;;
    sft) echo "12.8 GPU-hours" ;;
    rl_k) echo "9.6 GPU-hours; policy and world model take a GPU of 80 GB each" ;;
    evaluate) echo "ITP-R, one request at a time: 14 s a decision, 11.8 episodes an hour" ;;
  esac
}

# Training takes the visible GPUs, a process with a whole model each.  A batch is batch_size * grad_accum * processes,
# and is to stay what the configuration says, so that processes share the accumulation.
train() { # SECTION PROGRAM ARGUMENT ...
  local section=$1 shape processes grad_accum
  shift
  shape=$("$python" - "$config" "$section" << 'PY'
import sys, torch, yaml
path, section = sys.argv[1:]
grad_accum = (yaml.safe_load(open(path, encoding="utf-8")).get(section) or {}).get("grad_accum", 16)
gpus = max(torch.cuda.device_count(), 1)
processes = max(n for n in range(1, gpus + 1) if grad_accum % n == 0)
if processes < gpus:
    print(f"training on {processes} of {gpus} GPUs: grad_accum {grad_accum} isn't divisible by {gpus}, and the batch "
          "is to stay", file=sys.stderr)
print(processes, grad_accum // processes)
PY
  ) || exit 2
  read -r processes grad_accum <<< "$shape"
  local start=("$python" -m)
  ((processes == 1)) || start=(torchrun --standalone --nproc_per_node "$processes" -m)
  "${start[@]}" "$@" --config "$config:$section" --grad_accum "$grad_accum"
}

has() { for file in "$@"; do [[ -s $file ]] || fail "stage $stage: it left no $file; see what it said above"; done; }
wants() { for file in "$@"; do [[ -s $file ]] || fail "stage $stage needs $file, which an earlier stage makes"; done; }
games_there() { # A set smaller than the published one is the user's choice; an archive is what alfworld-download left.
  ! compgen -G "$data/alfworld/json_2.1.*.zip" > /dev/null &&
    [[ -n $(find "$data/alfworld/json_2.1.1/" -name game.tw-pddl -print -quit 2> /dev/null) ]]
}
fetch() { "$python" -m world_model.data_processing.fetch --out_dir "$data" --what "$1"; }
evaluate() { # SPLIT NAME POLICY METHOD
  local games=(--env_data_root "$data/alfworld")
  [[ $env == alfworld ]] || games=(--pairs "$data/eto/$1_indices.json")
  "$python" -m "$evaluation" --config "$config:evaluate" --split "$1" "${games[@]}" --policy_model "$3" --method "$4" \
    --wm_model "$out/world_model/merged_full" --output_path "$out/eval/$1/$2"
  has "$out/eval/$1/$2/summary.json"
}

for stage in "${stages[@]}"; do
  paper=$(cost "$stage")
  printf '\n== %s%s\n' "$stage" "${paper:+ (the paper, on two A100 80 GB: $paper)}"
  case $stage in
    data)
      [[ -f $dialogues ]] || fetch eto
      if [[ $env == alfworld ]]; then
        games_there || fetch games
      else
        [[ -f $data/eto/train_indices.json && -f $data/eto/dev_indices.json && -f $data/eto/test_indices.json ]] ||
          fetch lists
      fi
      "$python" -m world_model.data_processing.convert --config "$config:convert" --out_dir "$out/expert" \
        --input "$dialogues"
      has "$out"/expert/{transitions.jsonl,dialogues.json}
      ;;
    policy)
      wants "$out/expert/dialogues.json"
      train base_policy itp.training.base_policy --model_path "$policy_base" \
        --train_json "$out/expert/dialogues.json" --out_dir "$out/policy"
      has "$out"/policy/{metrics.json,merged_full/config.json}
      ;;
    rollouts)
      wants "$out/policy/merged_full/config.json"
      "$python" -m world_model.collect --config "$config:collect" "${collect_on[@]}" \
        --policy_model "$out/policy/merged_full" --out_dir "$out/rollouts"
      has "$out/rollouts/transitions.jsonl"
      ;;
    world_model)
      wants "$out"/{expert,rollouts}/transitions.jsonl
      cat "$out"/{expert,rollouts}/transitions.jsonl > "$out/world_model_data.jsonl"
      train world_model world_model.base_tuning.finetune --model_path "$world_model_base" \
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
      train sft itp.training.train_adaptive_k sft --train_jsonl "$out/labelled.jsonl" \
        --policy_model_path "$out/policy/merged_full" --out_dir "$out/warm_up"
      has "$out"/warm_up/{metrics.json,merged_full/policy_heads.json}
      ;;
    rl_k)
      wants "$out/warm_up/merged_full/policy_heads.json"
      "$python" -m itp.training.train_adaptive_k rl_k --config "$config:rl_k" "${learn_on[@]}" \
        --policy_model_path "$out/warm_up/merged_full" --wm_model_path "$out/world_model/merged_full" \
        --out_dir "$out/itp_r"
      has "$out"/itp_r/{metrics.json,last/policy_heads.json}
      ;;
    evaluate)
      wants "$out/world_model/merged_full/config.json" "$out/itp_r/last/policy_heads.json"
      for split in "${splits[@]}"; do
        evaluate "$split" cot "$policy_base" cot
        evaluate "$split" react "$policy_base" react
        evaluate "$split" itp-i "$policy_base" foresight
        evaluate "$split" sft "$out/policy/merged_full" sft
        evaluate "$split" itp-r-warm-up "$out/warm_up/merged_full" foresight
        evaluate "$split" itp-r "$out/itp_r/last" foresight
      done
      for split in "${splits[@]}"; do
        printf '\n%s games\n' "$split"
        "$python" -m foresight_eval.report "$out/eval/$split"/{cot,react,itp-i,sft,itp-r-warm-up,itp-r}
      done
      ;;
  esac
done
