r"""Train the world model M_φ: p_φ(s'|s, a) on transitions, loss on s' only (eq. 1 of the paper).

Usually started by ``run_worldmodel_tuning.sh``.  The prompt is the one of
:func:`itp.text.prompts.world_model_prompt`, the same that inference uses.  Besides the held-out loss,
``metrics.json`` has the share of held-out transitions whose s' is predicted exactly (greedy).

Where rows have pictures (``image``), the model is a vision-language model: the prompts of all rows are chat messages of
its own processor, a row each, and a row's message holds its picture (:mod:`world_model.base_tuning.vision_task`).

The transitions of an episode share one sequence (:mod:`itp.training.packing`), with the losses of a row each, for a
fraction of the time.  A batch therefore counts sequences; ``--steps_per_sequence 1`` makes it count transitions.
"""

from __future__ import annotations

from collections.abc import Sequence

from itp.config import parse_settings
from itp.distributed import is_first_process
from itp.pretrained import load_tokenizer
from itp.program import run_main, say_next
from itp.training.run import open_run, train
from itp.training.settings import check_settings
from itp.transitions import Transition, read_transitions
from world_model.base_tuning.examples import WorldModelSettings, examples_for, predicts, sample, to_examples

DONE = "already done"
"""What ``--check_only`` prints where nothing is left to do; the shell script then stops."""


def main() -> None:
    settings = parse_settings(WorldModelSettings, prog="finetune.py", description=__doc__)
    transitions = read_transitions(settings.data_path)
    check_settings(settings)
    what = predicts(transitions, settings.data_path)
    if 0 < settings.max_rows < len(transitions):
        transitions = sample(settings, transitions)
    done = open_run(settings, [settings.data_path], pictures=[t.image for t in transitions if t.image])
    if done and settings.check_only:
        print(DONE)
    if settings.check_only:
        return
    if not done:
        learn(settings, transitions, what)
    if is_first_process():
        judge = "state_fidelity" if what == "state" else "fidelity"
        say_next(f"python -m world_model.{judge} --wm_model {settings.merged_path} --transitions HELD_OUT")


def learn(settings: WorldModelSettings, transitions: Sequence[Transition], what: str) -> None:
    """Train on ``transitions``, whose next states are of the kind ``what``."""
    if any(t.image for t in transitions):
        from world_model.base_tuning.vision_task import VisionTask

        train(settings, VisionTask(settings, list(to_examples(transitions)), what))
        return
    from world_model.base_tuning.task import WorldModelTask

    examples = examples_for(settings, load_tokenizer(settings.model_path), transitions)
    train(settings, WorldModelTask(settings, examples, what))



if __name__ == "__main__":
    run_main(main)
