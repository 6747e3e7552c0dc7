#!/usr/bin/env bash
# Policies that have seen few of an expert's dialogues, and the games to compare methods on, for
#
#   bash scripts/when_it_pays.sh [OUTPUT_FOLDER]         (default: runs/when_it_pays)
#   python scripts/experiment.py configs/experiments/when_it_pays.yaml
#
# For each number of GAMES that an expert plays (MISSIONS dialogues each) and each of SEEDS: a base LM on those episodes and
# on random walks, and a policy on the dialogues.  DATA names games that there are already, such as runs/released/data;
# the experiment then needs --data, too.
# What is finished is kept, what is missing is made.
set -euo pipefail

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:-$repo/runs/when_it_pays}"
run=$(cd -- "${1:-$repo/runs/when_it_pays}" && pwd)
[[ ! -d ${DATA:-} ]] || DATA=$(cd -- "$DATA" && pwd)  # it may be given from where one is
cd "$repo"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

: "${GAMES:=18 55}" "${SEEDS:=1 2 3}" "${MISSIONS:=6}" "${TRAIN_GAMES:=400}" "${UNSEEN_GAMES:=204}" "${DRILLS:=20000}"
: "${EPISODES:=6000}"  # a policy reads about so many in all, but no dialogue more than MOST_EPOCHS times
: "${MOST_EPOCHS:=12}"

if [[ -z ${DATA:-} ]]; then
  DATA=$run/data
  echo "== $TRAIN_GAMES games to learn on, $UNSEEN_GAMES in rooms that training never sees"
  python -m itp.envs.alfworld_games --out "$DATA" --train "$TRAIN_GAMES" --seen 0 --unseen "$UNSEEN_GAMES" --seed 11 \
    --processes "$CPUS"
fi
collect() {
  local name=$1
  shift
  echo "== $name"
  python -m world_model.collect --env_data_root "$DATA" --out_dir "$run/$name" --env_processes "$CPUS" \
    --concurrency 64 "$@"
}
collect walks --actor random --max_games "$TRAIN_GAMES" --max_steps 40
for games in $GAMES; do
  collect "expert-$games" --actor expert --max_games "$games" --missions "$MISSIONS" --noise 0
  epochs=$((EPISODES / (games * MISSIONS)))
  epochs=$((epochs < 1 ? 1 : epochs > MOST_EPOCHS ? MOST_EPOCHS : epochs))
  for seed in $SEEDS; do
    echo "== policy of $games games, seed $seed"
    python -m itp.training.base_lm --transitions "$run/expert-$games/transitions.jsonl,$run/walks/transitions.jsonl" \
      --words_of "$run/expert-$games/dialogues.json" --out_dir "$run/base-$games-$seed" --drills "$DRILLS" --epochs 2 \
      --seed "$seed" --config configs/demo/from_nothing.yaml
    python -m itp.training.base_policy --train_json "$run/expert-$games/dialogues.json" \
      --model_path "$run/base-$games-$seed/merged_full" --out_dir "$run/policy-$games-$seed" --epochs "$epochs" \
      --lora_r 0 --lr 0.006 --seed "$seed" --config configs/demo/from_nothing.yaml
  done
done
