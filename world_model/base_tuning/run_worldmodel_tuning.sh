#!/usr/bin/env bash
# World-model training under DeepSpeed, set by environment variables; leaves $OUTPUT_DIR/merged_full.
#
#   MODEL_PATH=Qwen/Qwen2.5-7B-Instruct DATA_PATH=transitions.jsonl \
#     bash world_model/base_tuning/run_worldmodel_tuning.sh [further flags of finetune.py]
#
# Relative paths are relative to the folder that this is called from.  All visible GPUs are used (NPROC
# takes fewer); without a GPU one process, or NPROC, trains on the CPU.  The same command again resumes.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

RUN_NAME=${RUN_NAME:-wm_run}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/$RUN_NAME}
MERGED_DIR=${MERGED_DIR:-$OUTPUT_DIR/merged_full}
DS_CONFIG=${DS_CONFIG:-$here/config/deepspeed_config_s2.json}
# Any free port, unless one is given: trainings that start together would all find a fixed one free.
MASTER_PORT=${MASTER_PORT:-0}
BF16=${BF16:-False}
# BF16=True alone is enough: the default of FP16 gives way.
case ${BF16,,} in true | 1 | yes) FP16=${FP16:-False} ;; *) FP16=${FP16:-True} ;; esac
# A configuration named as the README does is found from any folder.
[[ -f $DS_CONFIG || $DS_CONFIG == /* || ! -f $here/../../$DS_CONFIG ]] || DS_CONFIG=$here/../../$DS_CONFIG

fail() { echo "error: $*" >&2; exit 2; }
[[ -n ${MODEL_PATH:-} ]] || fail "MODEL_PATH is not set; set it to a Hugging Face model folder or hub name"
[[ -n ${DATA_PATH:-} ]] || fail "DATA_PATH is not set; set it to a JSON or JSONL file of state, action, next_state"

flags=(
  --model_path "$MODEL_PATH" --data_path "$DATA_PATH" --out_dir "$OUTPUT_DIR" --merged_dir "$MERGED_DIR"
  --deepspeed "$DS_CONFIG" --fp16 "$FP16" --bf16 "$BF16" --save_every_steps "${SAVE_STEPS:-500}"
)
# The other variables become flags where they are set; a --config among the further flags says the rest.
set_flag() { [[ -z ${!2:-} ]] || flags+=("--$1" "${!2}"); }
set_flag max_seq_len CUTOFF_LEN
set_flag epochs EPOCHS
set_flag lr LR
set_flag wd WD
set_flag warmup_ratio WARMUP_RATIO
set_flag batch_size PER_DEVICE_BS
set_flag grad_accum GRAD_ACC
set_flag gradient_checkpointing GRAD_CKPT
set_flag lora_r LORA_R
set_flag lora_alpha LORA_ALPHA
set_flag lora_dropout LORA_DROPOUT
set_flag merge MERGE_LORA
set_flag q_lora Q_LORA
set_flag logging_steps LOGGING_STEPS
set_flag save_total_limit SAVE_TOTAL_LIMIT
flags+=("$@")
python=$(command -v python3 || command -v python) || fail "no python3 on the PATH; activate the environment"

# Seconds, without torch: unusable data, model or output folder stop here, before anything is launched.
# The package is found in a checkout that isn't installed, too.
export PYTHONPATH=$(cd -- "$here/../.." && pwd)${PYTHONPATH:+:$PYTHONPATH}
checked=$("$python" -m world_model.base_tuning.finetune "${flags[@]}" --check_only true)
[[ ${checked##*$'\n'} != "already done" ]] || exit 0

command -v deepspeed > /dev/null || fail "no deepspeed on the PATH; pip install deepspeed"

gpus=0
if [[ ${CUDA_VISIBLE_DEVICES-unset} != "" && ${CUDA_VISIBLE_DEVICES-unset} != "-1" ]]; then
  gpus=$({ nvidia-smi -L || true; } 2> /dev/null | grep -c '^GPU' || true)
fi
launcher=(--quiet --no_local_rank)
if ((gpus > 0)); then
  [[ -z ${NPROC:-} ]] || launcher+=(--num_gpus "$NPROC")
elif [[ ! -e /dev/kfd ]]; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  launcher+=(--num_gpus "${NPROC:-1}")
fi

port=$("$python" - "$MASTER_PORT" << 'EOF'
import socket, sys
for port in (int(sys.argv[1]), 0):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            continue
        print(probe.getsockname()[1])
        break
EOF
)
[[ $MASTER_PORT == 0 || $port == "$MASTER_PORT" ]] || echo "note: port $MASTER_PORT is busy; using $port" >&2

exec deepspeed "${launcher[@]}" --master_port "$port" --module world_model.base_tuning.finetune "${flags[@]}"
