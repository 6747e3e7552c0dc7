r"""Train a critic, a value head at the end of a text: step-level Q, or a reward model of trajectories.

    python -m itp.training.critic --learn q --train_jsonl runs/tree/explored.jsonl --model_path POLICY --out_dir OUT
    python -m itp.training.critic --learn reward --train_jsonl runs/d_roll/transitions.jsonl --model_path POLICY ...

``q`` (2409.09345, QLASS 2502.02584; :mod:`itp.methods.step_q`): regression on the Q of every action in the trees of
:mod:`itp.training.explore`.  ``reward`` (ARMAP, 2502.12130; :mod:`itp.methods.armap`): the loss of Bradley and Terry on
pairs of trajectories of the same task, a solved one against a failed one, and against beginnings of its own.

The model starts as ``--model_path``, all of which learns (or LoRA's adapters).  ``OUT/merged_full`` is a folder for
``--critic_model``.  ``--steps_per_sequence 0`` packs the texts of a game into one sequence, which computes their common
beginning once.  The rest is as in :mod:`itp.training.run`, and the same command again goes on.
"""

from __future__ import annotations

import logging

from itp.config import parse_settings
from itp.distributed import is_first_process
from itp.program import run_main, say_next
from itp.training.critic_data import CriticSettings, read_examples
from itp.training.run import open_run, train
from itp.training.settings import check_settings

log = logging.getLogger(__name__)


def main() -> None:
    settings = parse_settings(CriticSettings, prog="python -m itp.training.critic", description=__doc__)
    examples = read_examples(settings)
    check_settings(settings)
    if not open_run(settings, settings.train_jsonl.split(",")):
        log.info("%d examples of %d games", len(examples), len({one.group for one in examples}))
        from itp.training.critic_task import CriticTask

        train(settings, CriticTask(settings, examples))
    if is_first_process():
        method = "step_q" if settings.learn == "q" else "armap --wm_model DIR"
        say_next(f"python -m foresight_eval --method {method} --critic_model {settings.merged_path} --policy_model DIR "
                 "--env_data_root DIR --out_dir DIR")


if __name__ == "__main__":
    run_main(main)
