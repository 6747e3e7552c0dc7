"""The settings and the data of a critic: Q of exploration trees, or pairs of trajectories of the same task."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from itp.config import flag
from itp.errors import UserError
from itp.files import read_rows
from itp.games import ENVIRONMENTS
from itp.seeding import derive_seed
from itp.text.episodes import episodes_of, read_steps
from itp.text.state import State, parse
from itp.training.settings import FinetuneSettings, PackingFlags
from itp.transitions import Transition

LEARN = ("q", "reward")


@dataclass
class CriticSettings(PackingFlags, FinetuneSettings):
    """What the critic learns from, and what it learns."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "learn", "train_jsonl", "model_path", "out_dir", "env",
        "epochs", "lr", "lora_r", "bf16", "gradient_checkpointing")
    train_jsonl: str = flag(help="q: explored.jsonl of itp.training.explore; reward: transitions of solved and failed "
                                 "episodes; several files, separated by commas", affects_result=False, holds="data")
    learn: str = flag(help="q: the value of an action in a state; reward: which of two trajectories is the better one",
                      choices=LEARN)
    env: str = flag("alfworld", help="environment of the rows", choices=ENVIRONMENTS)
    pairs_per_task: int = flag(8, at_least=1, help="reward: pairs of a task at most")
    unfinished: int = flag(2, at_least=0, help="reward: pairs of each solved trajectory with a beginning of its own, "
                                               "which hasn't accomplished the task yet")


@dataclass(frozen=True)
class Scored:
    """``action`` in ``state`` is worth ``target``."""

    group: str
    state: State
    action: str
    target: float


@dataclass(frozen=True)
class Preferred:
    """The trajectory that ended in ``better`` is to be worth more than the one that ended in ``worse``."""

    group: str
    better: State
    worse: State


def read_examples(settings: CriticSettings) -> list[Scored] | list[Preferred]:
    """The examples of ``train_jsonl``, those of a task together.  Raises UserError for other files."""
    paths = settings.train_jsonl.split(",")
    if settings.learn == "q":
        return [one for path in paths for one in read_scored(path)]
    return pairs_of([step for path in paths for step in read_steps(path, required=REWARD_NEEDS)], settings)


REWARD_NEEDS = ("state", "action", "next_state", "episode_id", "step", "done", "success")


def read_scored(path: str) -> list[Scored]:
    """The actions of exploration trees, in such an order that neighbors share much of their text."""
    found = []
    for where, row in read_rows(path):
        try:
            found += [Scored(str(row["game_id"]), parse(node["state"]), node["action"], float(node["q"]))
                      for node in sorted(row["nodes"], key=lambda node: node["state"])]
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{where}: not a tree of python -m itp.training.explore ({error!r}); explore again, or "
                            "give another file") from error
    if not found:
        raise UserError(f"{path}: holds no actions; explore more games")
    return found


def pairs_of(steps: Sequence[tuple[Transition, State]], settings: CriticSettings) -> list[Preferred]:
    """Pairs of a solved and a failed episode of the same task, and of a solved one and its own beginning."""
    ends: dict[tuple[str, str], dict[bool, list[State]]] = defaultdict(lambda: {True: [], False: []})
    for episode in episodes_of(steps):
        t, state = steps[episode[-1]]
        if t.done:
            ends[t.episode_id.partition("#")[0], state.task][t.success].append(state.after(t.action, t.next_state))
    pairs = []
    for (game, task), by_success in sorted(ends.items()):
        draw = random.Random(derive_seed(settings.seed, "pairs", game, task))
        both = [(won, lost) for won in by_success[True] for lost in by_success[False]]
        both = draw.sample(both, min(len(both), settings.pairs_per_task))
        for won in by_success[True][:settings.pairs_per_task]:
            cuts = draw.sample(range(len(won.history)), min(settings.unfinished, len(won.history)))
            both += [(won, replace(won, history=won.history[:n])) for n in sorted(cuts)]
        pairs += [Preferred(game, won, lost) for won, lost in both]
    if not pairs:
        raise UserError(f"{settings.train_jsonl}: no task has a solved episode; give transitions that have some, such "
                        "as those of world_model.collect --actor policy --temperature 1")
    return pairs
