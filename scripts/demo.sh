#!/usr/bin/env bash
# The models of this repository play 20 ALFWorld games in rooms that no training saw, with imagination and without.
#
#   bash scripts/demo.sh [OUTPUT_FOLDER]                 (default: runs/demo)
#
# CPU only, no downloads but Python packages.  What is finished is kept, what is missing is made.
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:-$repo/runs/demo}"
run=$(cd -- "${1:-$repo/runs/demo}" && pwd)
[[ ! -d ${MODELS:-} ]] || MODELS=$(cd -- "$MODELS" && pwd)  # they may be given from where one is
cd "$repo"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
: "${GAMES:=20}" "${MODELS:=models/alfworld}"
started=$SECONDS

echo "== $GAMES games, made by the engine's own generator"
python -m itp.envs.alfworld_games --out "$run/data" --train 0 --seen 0 --unseen "$GAMES" --processes "$CPUS"

play() {
  local name=$1
  shift
  echo "== $name"
  python -m foresight_eval --policy_model "$MODELS/policy" --env_data_root "$run/data" --split unseen \
    --action_selection constrained --max_steps 40 --output_path "$run/eval/$name" --env_processes "$CPUS" \
    --concurrency "$GAMES" "$@"
}
wm=(--method foresight --wm_model "$MODELS/world_model" --max_k 2)
play acts-at-once "${wm[@]}" --fixed_k 0
play imagines-1 "${wm[@]}" --fixed_k 1
play plans --method implement --implement_choice gain --wm_model "$MODELS/world_model"

echo
python -m foresight_eval.report "$run"/eval/{acts-at-once,imagines-1,plans} --out_dir "$run/report"
echo
echo "Done in $((SECONDS - started)) s.  Every game, decision and imagined step: $run/report/index.html"
if [[ -t 1 && -n ${DISPLAY:-}${WAYLAND_DISPLAY:-} ]] && command -v xdg-open > /dev/null; then
  xdg-open "$run/report/index.html" > /dev/null 2>&1 &
elif [[ -t 1 && $(uname) == Darwin ]]; then
  open "$run/report/index.html"
fi
