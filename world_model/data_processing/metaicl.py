r"""Transitions -> training data for IMPLEMENT's world model: one model on symbolic states, in two modes.

    python -m world_model.data_processing.metaicl --transitions runs/d_exp/transitions.jsonl --out_dir runs/metaicl

``OUT_DIR/transitions.jsonl`` then holds two rows for each transition, which world-model training takes as they are:

[PER]  perception: action, whether it succeeded, old state, observation, with the picture of it, where the transition
       has one -> new state
[PRE]  prediction: action, old state, object lists, failed actions -> new state

States are symbolic (:mod:`itp.text.belief`).  The conditions of a row come from all episodes of the same scene
(:mod:`itp.text.conditions`): a random number of each kind, from none to all, so that the model learns to use few and
many (MetaICL).  Only actions that show contents are given object lists.  Episodes are of one scene if they begin with
the same observation and never show different contents at the first visit of a receptacle.

``report.json`` counts rows, scenes, conditions, and transitions that are left out: of other environments, whose states
have no such form, and of states that omit earlier steps.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from itp.config import flag, parse_settings
from itp.envs.alfworld.vocabulary import openable_types
from itp.errors import UserError
from itp.files import check_output_folder, write_json
from itp.program import run_main, say_next
from itp.seeding import derive_seed
from itp.text.alfworld_phrases import NOTHING_HAPPENS, contents, receptacles
from itp.text.belief import Belief
from itp.text.conditions import Conditions, shows_contents
from itp.text.episodes import episodes_of, read_steps
from itp.text.prompts import belief_text, perception_state, prediction_state
from itp.text.state import State
from itp.transitions import Transition, write_transitions

Steps = list[tuple[Transition, State]]


@dataclass
class MetaiclSettings:
    transitions: str = flag(help="transitions: JSON or JSONL; several, separated by commas, are read one after the "
                                 "other")
    out_dir: str = flag(help="folder for transitions.jsonl and report.json")
    max_failed: int = flag(0, at_least=0, help="failed actions in a row at most, for models with a short context (0: "
                                               "all)")
    seed: int = flag(123, help="what the conditions of each row are sampled from")


@dataclass
class Scene:
    """Episodes in one room.  ``first_seen``: the objects of each receptacle at the first visit of an episode."""

    episodes: list[Steps] = field(default_factory=list)
    first_seen: dict[str, list[str]] = field(default_factory=dict)

    def fits(self, seen: dict[str, list[str]]) -> bool:
        return all(self.first_seen.get(place, things) == things for place, things in seen.items())

    @property
    def conditions(self) -> Conditions:
        ends = map(_end, self.episodes)
        return Conditions.of_all((end, [seen == NOTHING_HAPPENS for _, seen in end.history]) for end in ends)


def main() -> None:
    settings = parse_settings(MetaiclSettings, prog="python -m world_model.data_processing.metaicl",
                              description=__doc__)
    check_output_folder(settings.out_dir)
    steps, counts = [], Counter[str]()
    for path in settings.transitions.split(","):
        steps += usable(read_steps(path), counts)
    if not steps:
        raise UserError(f"{settings.transitions}: no transition of ALFWorld whose state has its whole history")
    rows = list(to_rows(scenes_of(steps), settings.seed, counts, settings.max_failed))
    out = Path(settings.out_dir)
    write_transitions(out / "transitions.jsonl", rows)
    write_json(out / "report.json", dict(counts))
    print(", ".join(f"{n} {what}" for what, n in counts.items()) + f": {out / 'transitions.jsonl'}")
    say_next(f"python -m world_model.base_tuning.finetune --data_path {out / 'transitions.jsonl'} --model_path BASE "
             "--out_dir DIR --steps_per_sequence 1")


def usable(steps: Steps, counts: Counter[str]) -> Steps:
    """The transitions that have a symbolic state.  ``counts`` says how many are left out."""
    kept = [(t, state) for t, state in steps if not state.omitted and receptacles(state.first)]
    counts["left out: earlier steps omitted"] += sum(bool(state.omitted) for _, state in steps)
    counts["left out: no receptacles listed"] += sum(not s.omitted and not receptacles(s.first) for _, s in steps)
    return kept


def scenes_of(steps: Steps) -> list[Scene]:
    """The scenes, each with its episodes, in the order in which they are met."""
    scenes: dict[str, list[Scene]] = {}
    for indices in episodes_of(steps):
        episode = [steps[i] for i in indices]
        seen: dict[str, list[str]] = {}
        for _, observation in _end(episode).history:
            for place, things, _ in contents(observation):
                seen.setdefault(place, things)
        alike = scenes.setdefault(episode[0][1].first, [])
        scene = next((scene for scene in alike if scene.fits(seen)), None)
        if scene is None:
            alike.append(scene := Scene())
        scene.episodes.append(episode)
        scene.first_seen.update(seen)
    return [scene for alike in scenes.values() for scene in alike]


def _end(episode: Steps) -> State:
    """The state after an episode's last step, with the steps before its first one, if its state has some."""
    t, state = episode[-1]
    return state.after(t.action, t.next_state)


def to_rows(scenes: Sequence[Scene], seed: int, counts: Counter[str], max_failed: int = 0) -> Iterator[Transition]:
    """A [PER] row and a [PRE] row of each transition.  ``max_failed``: failed actions in a row at most; 0: all."""
    opens = openable_types()
    for scene in scenes:
        known = scene.conditions
        counts.update(scenes=1, episodes=len(scene.episodes))
        for number, episode in enumerate(scene.episodes):
            for t, state in episode:
                before = Belief.of(state)
                after = belief_text(before.after(t.action, t.next_state).to_json())
                draw = random.Random(derive_seed(seed, t.episode_id, number, t.step, t.action))
                given = sampled(known, t.action, opens, draw, max_failed)
                works = t.next_state != NOTHING_HAPPENS
                counts.update({"rows": 2, "object lists": len(given.object_lists), "failed actions": len(given.failed)})
                for mode, text in (
                        ("perception", perception_state(before.to_json(), works, t.next_state)),
                        ("prediction", prediction_state(before.to_json(), given.object_lists,
                                                        [one.row for one in given.failed]))):
                    yield Transition(t.episode_id, t.step, text, t.action, after, task_type=t.task_type, source=mode,
                                     image=t.image if mode == "perception" else "")


def sampled(known: Conditions, action: str, opens: frozenset[str], draw: random.Random,
            max_failed: int = 0) -> Conditions:
    """A random number of conditions of each kind, from none to all; lists only for an action that shows contents."""
    lists = [*known.object_lists.items()] if shows_contents(action, opens) else []
    failed = min(len(known.failed), max_failed or len(known.failed))
    return Conditions(dict(draw.sample(lists, draw.randint(0, len(lists)))),
                      tuple(draw.sample(known.failed, draw.randint(0, failed))))


if __name__ == "__main__":
    run_main(main)
