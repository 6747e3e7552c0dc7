r"""What does a world model on symbolic states know, and what do earlier trials in the same room add?

    python -m world_model.state_fidelity --wm_model runs/metaicl/wm/merged_full --text_wm_model runs/wm/merged_full \
        --transitions runs/held_out/transitions.jsonl

The transitions are of several episodes in each game (``world_model.collect --episodes_per_game 3``), in rooms that no
training saw.  The episodes of a room in front of one are its earlier trials.  Both models predict greedily:

next state  share of transitions whose next symbolic state is predicted exactly, and the F1 of its changes, by kind of
            action (:mod:`itp.text.kinds`), without earlier trials.  A text world model reads the whole history, and
            its state is what the predicted observation leads to
memory      first visits of receptacles that an earlier trial saw.  *Found*: share of the types of objects that the
            earlier trial saw there, and that are there now, which are predicted.  *True*: share of the predicted types
            that are there.  With earlier trials the state model is given conditions, the text world model the steps
            that showed them (:mod:`itp.methods.memory`).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from itp.agent.state_model import StateModel
from itp.agent.world_model import WorldModel
from itp.config import flag, parse_settings
from itp.devices import DTYPES
from itp.envs.alfworld.vocabulary import openable_types
from itp.errors import UserError
from itp.files import check_output_file, write_json
from itp.lm.scheduler import BatchBarrier
from itp.methods.base import EarlierTrial
from itp.methods.memory import chosen, remembered, unseen, with_memory
from itp.model_card import predicts_states
from itp.models import load_state_model, load_world_model
from itp.pretrained import check_model_path
from itp.program import run_main
from itp.seeding import derive_seed
from itp.text.alfworld_phrases import NOTHING_HAPPENS, contents
from itp.text.belief import Belief, changes
from itp.text.conditions import Conditions, target_of, types
from itp.text.episodes import read_steps
from itp.text.kinds import kind_of
from itp.text.state import State
from itp.transitions import Transition
from world_model.data_processing.metaicl import scenes_of, usable


@dataclass
class StateFidelitySettings:
    """What is measured, and with which models."""

    wm_model: str = flag(help="world model on symbolic states: a model folder")
    text_wm_model: str = flag("", help="a text world model to compare with")
    transitions: str = flag(help="transitions.jsonl of several episodes in each game, in rooms that no training saw")
    out_json: str = flag("", help="where to write the figures too")
    max_rows: int = flag(500, at_least=0, help="a random sample of so many transitions, and of so many first visits "
                                               "(0: all)")
    max_new_tokens: int = flag(1024, at_least=1, help="new tokens of a prediction at most")
    device: str = flag("cuda", help="device of the models")
    dtype: str = flag("fp16", help="their precision on a GPU", choices=DTYPES)
    seed: int = flag(123, help="seed of the samples")


@dataclass(frozen=True)
class Asked:
    """A transition, and the earlier trials in its room."""

    transition: Transition
    state: State
    earlier: tuple[EarlierTrial, ...] = ()

    @property
    def before(self) -> Belief:
        return Belief.of(self.state)

    @property
    def after(self) -> Belief:
        return self.before.after(self.transition.action, self.transition.next_state)

    @property
    def kind(self) -> str:
        return kind_of(self.state, self.transition.action, self.transition.next_state)


class OfStates:
    """A state model's predictions."""

    def __init__(self, model: StateModel, seed: int) -> None:
        self.model, self.seed = model, seed

    async def after(self, case: Asked, remembers: bool) -> Belief:
        action, known = case.transition.action, Conditions()
        if remembers:
            known = Conditions.of_all((trial.state, trial.invalid) for trial in case.earlier).chosen(
                case.before, action, openable_types(), _draw(self.seed, case))
        predicted, = await self.model.predict(case.before, action, known, 1, 0, 0.0)
        return predicted


class OfText:
    """The states that a text world model's predictions lead to."""

    def __init__(self, model: WorldModel, seed: int) -> None:
        self.model, self.seed = model, seed

    async def after(self, case: Asked, remembers: bool) -> Belief:
        state, action = case.state, case.transition.action
        if remembers:
            memory = unseen(remembered(case.earlier), state)
            state = with_memory(state, chosen(memory, target_of(action), _draw(self.seed, case)))
        said, = await self.model.step([state], [action])
        return case.before.after(action, said)


def _draw(seed: int, case: Asked) -> random.Random:
    return random.Random(derive_seed(seed, case.transition.episode_id, case.transition.step))


def main() -> None:
    settings = parse_settings(StateFidelitySettings, prog="python -m world_model.state_fidelity", description=__doc__)
    check_model_path(settings.wm_model)
    if not predicts_states(settings.wm_model):
        raise UserError(f"--wm_model {settings.wm_model} predicts observations: it goes into --text_wm_model, and "
                        "world_model.fidelity judges it")
    if settings.text_wm_model:
        check_model_path(settings.text_wm_model)
    if settings.out_json:
        check_output_file(settings.out_json)
    cases = list(cases_of(usable(read_steps(settings.transitions), Counter())))
    if not cases:
        raise UserError(f"{settings.transitions}: no transition of ALFWorld whose state has its whole history")
    figures = asyncio.run(judge(settings, cases))
    print_figures(figures)
    if settings.out_json:
        write_json(settings.out_json, figures)


def cases_of(steps: Sequence[tuple[Transition, State]]) -> Iterator[Asked]:
    """Each transition with the episodes of its room that stand before its own."""
    for scene in scenes_of(list(steps)):
        earlier: tuple[EarlierTrial, ...] = ()
        for episode in scene.episodes:
            for transition, state in episode:
                yield Asked(transition, state, earlier)
            last, state = episode[-1]
            end = state.after(last.action, last.next_state)
            failed = tuple(seen == NOTHING_HAPPENS for _, seen in end.history)
            earlier = (*earlier, EarlierTrial(end, failed, last.success, ""))


def remembered_visits(cases: Sequence[Asked]) -> list[tuple[Asked, Counter[str]]]:
    """First visits that show types of objects which an earlier trial saw there, with these types."""
    found = []
    for case in cases:
        shown = contents(case.transition.next_state)
        if case.kind != "first_visit" or not case.earlier or not shown:
            continue
        lists = Conditions.of_all((trial.state, trial.invalid) for trial in case.earlier).object_lists
        now = Counter(types(shown[0].things))
        if both := now & Counter(lists.get(shown[0].place, ())):
            found.append((case, both))
    return found


async def judge(settings: StateFidelitySettings, cases: Sequence[Asked]) -> dict[str, Any]:
    """The figures of all models: ``next_state`` by kind, and ``memory`` with and without earlier trials."""
    barrier = BatchBarrier()
    options = {"device": settings.device, "dtype": settings.dtype, "barrier": barrier}
    states = load_state_model(settings.wm_model, state_tokens=settings.max_new_tokens, **options)
    models: dict[str, OfStates | OfText] = {"state": OfStates(states, settings.seed)}
    if settings.text_wm_model:
        models["text"] = OfText(load_world_model(settings.text_wm_model, max_new_tokens=settings.max_new_tokens,
                                                 limit_flag="--max_new_tokens", **options), settings.seed)
    draw, n = random.Random(settings.seed), settings.max_rows
    visits = remembered_visits(cases)
    rows = draw.sample(cases, n) if 0 < n < len(cases) else list(cases)
    visits = draw.sample(visits, n) if 0 < n < len(visits) else visits
    figures: dict[str, Any] = {}
    for name, model in models.items():
        figures[name] = {"next_state": _by_kind(rows, await _all(model, barrier, rows, False)), "memory": {}}
        for remembers in (True, False):
            predicted = await _all(model, barrier, [case for case, _ in visits], remembers)
            figures[name]["memory"]["with" if remembers else "without"] = _found(visits, predicted)
        await model.model.close()
    return figures


async def _all(model: OfStates | OfText, barrier: BatchBarrier, cases: Sequence[Asked],
               remembers: bool) -> list[Belief]:
    """The predictions for all cases, in batches."""
    barrier.add(live=len(cases))

    async def one(case: Asked) -> Belief:
        try:
            return await model.after(case, remembers)
        finally:
            barrier.add(live=-1)

    return list(await asyncio.gather(*map(one, cases)))


def _by_kind(cases: Sequence[Asked], predicted: Sequence[Belief]) -> dict[str, dict[str, float]]:
    exact, f1 = defaultdict(list), defaultdict(list)
    for case, belief in zip(cases, predicted, strict=True):
        a, b = changes(case.before, belief), changes(case.before, case.after)
        for kind in (case.kind, "all"):
            exact[kind].append(belief.to_json() == case.after.to_json())
            if a or b:
                f1[kind].append(2 * len(a & b) / (len(a) + len(b)))
    return {kind: {"exact": _mean(values), "changes_f1": _mean(f1[kind]), "n": len(values)}
            for kind, values in sorted(exact.items())}


def _found(visits: Sequence[tuple[Asked, Counter[str]]], predicted: Sequence[Belief]) -> dict[str, float]:
    known, said, found, true = 0, 0, 0, 0
    for (case, both), belief in zip(visits, predicted, strict=True):
        place = contents(case.transition.next_state)[0].place
        now = Counter(types(case.after.places[place].objects))
        there = belief.places.get(place)
        guess = Counter(types(there.objects)) if there else Counter()
        known, found = known + both.total(), found + (both & guess).total()
        said, true = said + guess.total(), true + (now & guess).total()
    return {"found": round(found / known, 4) if known else 0.0, "true": round(true / said, 4) if said else 0.0,
            "types": known, "visits": len(visits)}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0


def print_figures(figures: Mapping[str, Any]) -> None:
    print(f"{'next state':16}{'':16}{'exact':>8}{'changes F1':>12}{'n':>7}")
    for name, these in figures.items():
        for kind, row in these["next_state"].items():
            print(f"{name:16}{kind:16}{row['exact']:8.3f}{row['changes_f1']:12.3f}{row['n']:7}")
    print(f"\n{'memory':16}{'earlier trials':16}{'found':>8}{'true':>12}{'types':>7}{'visits':>8}")
    for name, these in figures.items():
        for given, row in these["memory"].items():
            print(f"{name:16}{given:16}{row['found']:8.3f}{row['true']:12.3f}{row['types']:7}{row['visits']:8}")


if __name__ == "__main__":
    run_main(main)
