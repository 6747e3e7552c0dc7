"""The knowledge of WKM from transitions: what follows in which symbolic state, and how tasks are solved.

    python -m world_model.knowledge --transitions expert.jsonl,policy.jsonl --out_json runs/knowledge.json

State knowledge comes from the steps of solved episodes, with the action to imitate as the next one.  Task knowledge
comes from solved against failed episodes of tasks with the same words but for their types.  Both are data of
:mod:`itp.methods.knowledge`, which ``--method wkm --wkm_base runs/knowledge.json`` uses.
"""

from __future__ import annotations

from dataclasses import dataclass

from itp.config import flag, parse_settings
from itp.errors import UserError
from itp.files import check_output_file, write_json
from itp.methods.knowledge import learned
from itp.program import run_main, say_next
from itp.text.episodes import episodes_of, read_steps

NEEDS = ("state", "action", "next_state", "episode_id", "step", "success")


@dataclass
class KnowledgeSettings:
    """What the knowledge is made of."""

    transitions: str = flag(help="transitions.jsonl of solved and failed episodes; several comma-separated")
    out_json: str = flag(help="where to write the knowledge")


def main() -> None:
    settings = parse_settings(KnowledgeSettings, prog="python -m world_model.knowledge", description=__doc__)
    check_output_file(settings.out_json)
    steps = [step for path in settings.transitions.split(",") for step in read_steps(path, required=NEEDS)]
    episodes = []
    for indices in episodes_of(steps):
        success = steps[indices[-1]][0].success  # of a failed one what was done counts, which isn't to be imitated
        done = [(steps[i][1], steps[i][0].expert_action if success else steps[i][0].action) for i in indices]
        if rows := [(state, action) for state, action in done if action]:
            episodes.append((rows, success))
    solved = sum(success for _, success in episodes)
    if not solved:
        raise UserError(f"{settings.transitions}: no solved episode with actions to imitate; give those of an expert, "
                        "or of a policy that solves some")
    knowledge = learned(episodes)
    write_json(settings.out_json, knowledge.to_json())
    print(f"{solved} solved and {len(episodes) - solved} failed episodes: {len(knowledge.entries)} states with their "
          f"next action, {len(knowledge.tasks)} kinds of tasks, in {settings.out_json}")
    say_next(f"python -m foresight_eval --method wkm --wkm_base {settings.out_json} --policy_model DIR "
             "--env_data_root DIR --out_dir DIR")


if __name__ == "__main__":
    run_main(main)
