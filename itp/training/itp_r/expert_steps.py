"""The steps of an expert that stage 1 labels, read from a file of transitions."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from itp.errors import UserError
from itp.seeding import derive_seed
from itp.text.episodes import episodes_of
from itp.text.state import State, parse
from itp.transitions import REQUIRED, Transition, locate_transitions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExpertStep:
    """One step to label.  ``forced``: the expert's actions a*_t, a*_{t+1}, ... as far as they were executed."""

    index: int
    where: str
    transition: Transition
    state: State
    forced: tuple[str, ...]


def read_expert(path: str, skipped: list[str] | None) -> list[ExpertStep]:
    """The rows of an expert file that hold something to imitate.

    What is wrong with one is raised, or put into ``skipped`` if it is a list.
    """
    rows: list[ExpertStep] = []
    for where, transition in locate_transitions(path, required=(*REQUIRED, "episode_id", "step"), skipped=skipped):
        try:
            rows.append(ExpertStep(len(rows), where, transition, parse(transition.state), ()))
        except ValueError as error:
            message = f"{where}: field 'state' isn't a state ({error})"
            if skipped is None:
                raise UserError(message) from error
            skipped.append(message)
    if not rows:
        raise UserError(f"{path}: holds no usable rows; give a JSONL file of the expert's transitions")
    imitated = [dataclasses.replace(row, index=i, forced=forced)
                for i, (row, forced) in enumerate(zip(rows, _forced_actions(rows), strict=True)) if forced]
    if not imitated:
        raise UserError(f"{path}: 'expert_action' is empty in every row, so nothing is to be imitated; give the "
                        "expert's transitions")
    if left_out := len(rows) - len(imitated):
        log.info("%d rows with an empty 'expert_action' are left out: they aren't to be imitated", left_out)
    return imitated


def _forced_actions(rows: Sequence[ExpertStep]) -> Iterator[tuple[str, ...]]:
    """For every row the expert's actions from there on, as long as they were executed and belong together."""
    following = {i: after for episode in episodes_of([(row.transition, row.state) for row in rows])
                 for i, after in itertools.pairwise(episode)}
    for start in range(len(rows)):
        actions, i = [], start
        while i is not None and (here := rows[i].transition).expert_action:
            actions.append(here.expert_action)
            # After another action than the expert's, the next row isn't what follows from the expert's.
            i = following.get(i) if here.action == here.expert_action else None
        yield tuple(actions)


def choose_rows(rows: list[ExpertStep], max_rows: int, seed: int) -> list[ExpertStep]:
    """``max_rows`` rows of episodes drawn by chance, in the order of the file.

    Whole episodes, because their steps share most of what is to be computed.
    """
    if not max_rows:
        return rows
    drawn = sorted(rows, key=lambda r: (derive_seed(seed, "rows", r.transition.episode_id), r.index))
    return sorted(drawn[:max_rows], key=lambda row: row.index)
