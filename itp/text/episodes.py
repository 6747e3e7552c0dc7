"""Transitions as episodes: files of them whose states are states, and which transition follows which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from itp.errors import UserError
from itp.text.state import State, parse
from itp.transitions import REQUIRED, Transition, locate_transitions


def read_steps(path: str | Path, *, required: tuple[str, ...] = REQUIRED) -> list[tuple[Transition, State]]:
    """The transitions of a file, with their states.  Raises UserError for a state in another form."""
    steps = []
    for where, transition in locate_transitions(path, required=required):
        try:
            steps.append((transition, parse(transition.state)))
        except ValueError as error:
            raise UserError(f"{where}: field 'state' isn't a state ({error}); convert the file first: python -m "
                            f"world_model.data_processing.convert --input {path} --out_dir DIR") from error
    return steps


def episodes_of(steps: Sequence[tuple[Transition, State]]) -> list[list[int]]:
    """The steps as episodes: the indices of each, in the order of its steps; where steps are missing it is several.

    The id and the number of a step don't tell an episode: in files that were joined several episodes have one id,
    because an expert and a random walk played the same game.  So the states decide.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(t.episode_id for t, _ in steps))}
    order = sorted(range(len(steps)), key=lambda i: (places[steps[i][0].episode_id], steps[i][0].step))
    episodes: list[list[int]] = []
    open_at: dict[tuple[str, int], list[list[int]]] = {}  # by id, and the number of the step that would come next
    for i in order:
        t, state = steps[i]
        waiting = open_at.get((t.episode_id, t.step), [])
        episode = next((e for e in waiting if _follows(state, *steps[e[-1]])), None)
        if episode is None:
            episodes.append(episode := [])
        else:
            waiting.remove(episode)
        episode.append(i)
        open_at.setdefault((t.episode_id, t.step + 1), []).append(episode)
    return episodes


def _follows(after: State, t: Transition, before: State) -> bool:
    """Whether ``after`` is the state behind ``t``, as far back as both states have history."""
    expected = before.after(t.action, t.next_state)
    both = min(len(expected.history), len(after.history))
    return both > 0 and ((after.task, after.first, after.history[-both:])
                         == (expected.task, expected.first, expected.history[-both:]))
