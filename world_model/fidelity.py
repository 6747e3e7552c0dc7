"""How accurate is a world model, and how far ahead?  Measured on real trajectories that no training saw.

    python -m world_model.fidelity --wm_model runs/wm/merged_full --transitions expert.jsonl,policy.jsonl

Several world models (comma-separated) are judged on the same samples, those of each actor (``source``) apart:

* one step: share of next observations that are predicted exactly, token F1, and Fact-F1
  (:mod:`itp.text.facts`), by kind of action;
* open loop: the same by depth 1..K, the world model fed with its own predictions under the recorded actions;
* calibration (with ``--calibration_samples``): see :mod:`world_model.calibration`;
* consistency (with ``--policy_model`` and ``--env_data_root``): see :mod:`world_model.consistency`.

Figures that ``--out_json`` has already, of the same models and data, are printed and not measured again.

ALFWorld's kinds are those of :mod:`itp.text.kinds`.  There Delta-F1 is the F1 of the changes that a prediction makes to
the belief about the room (:mod:`itp.text.belief`), so that what stays as it was counts for nothing.
ScienceWorld's (``--env scienceworld``) are the verbs of the actions; with two words where the first says little
(``look around``, ``look at``, ``look in``), and ``invalid``.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from itp.agent.world_model import RecallFlag, WorldModel
from itp.config import by_own_names, flag, parse_settings
from itp.devices import DTYPES
from itp.envs.alfworld.games import list_games
from itp.envs.scienceworld.env import INVALID
from itp.errors import PromptTooLong, UserError
from itp.files import check_output_file, read_object, short_names, write_json
from itp.games import ENVIRONMENTS
from itp.lm.base import metered
from itp.lm.scheduler import BatchBarrier
from itp.models import load_policy, load_world_model
from itp.pretrained import check_model_path, model_fingerprint
from itp.program import run_main
from itp.rollout import LeftOut
from itp.run_dir import versions
from itp.seeding import derive_seed
from itp.text.belief import delta_f1
from itp.text.episodes import episodes_of, read_steps
from itp.text.facts import fact_f1
from itp.text.kinds import KINDS, kinds_of
from itp.text.state import State, parse
from itp.transitions import Transition
from world_model.calibration import calibration
from world_model.consistency import consistency

log = logging.getLogger(__name__)


@dataclass
class FidelitySettings(RecallFlag):
    """What is measured."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "wm_model", "transitions", "env", "out_json", "max_rows",
        "max_depth", "policy_model", "env_data_root", "device", "dtype")
    wm_model: str = flag(help="world models, comma-separated: model folders, or names on the Hugging Face hub")
    transitions: str = flag(help="transitions.jsonl of episodes that no training saw; several comma-separated")
    env: str = flag("alfworld", help="environment of the transitions", choices=ENVIRONMENTS)
    out_json: str = flag("", help="where to write the figures too (foresight_eval.report --fidelity shows them)")
    max_rows: int = flag(2000, at_least=0, help="a random sample of so many transitions of each actor (0: all)")
    max_depth: int = flag(5, at_least=0, help="how deep to look in open loop: K_max (0: not at all)")
    max_starts: int = flag(200, at_least=0, help="open-loop rollouts of each actor, from random steps of its episodes")
    calibration_samples: int = flag(0, at_least=0, help="ALFWorld: sampled observations of each first visit, for the "
                                                        "calibration of what can't be known (0: none; 10 are enough)")
    policy_model: str = flag("", help="policy that acts inside the world model, to measure consistency")
    env_data_root: str = flag("", help="folder that holds json_2.1.1, for the games that it acts in")
    split: str = flag("unseen", help="split of these games")
    max_games: int = flag(50, at_least=0, help="a random choice of so many of them (0: all)")
    max_steps: int = flag(40, at_least=1, help="steps of such an episode at most")
    device: str = flag("cuda", help="device of all models")
    dtype: str = flag("fp16", help="their precision on a GPU", choices=DTYPES)
    wm_max_new_tokens: int = flag(256, at_least=1, help="new tokens of a prediction at most",
                                  aliases=("foresight_tokens",))
    seed: int = flag(123, help="seed of the samples")


def scienceworld_kind(state: State, action: str, next_state: str) -> str:
    """The verb of a ScienceWorld action."""
    if next_state.startswith(INVALID):
        return "invalid"
    words = action.split()
    return " ".join(words[:2] if words[:1] == ["look"] else words[:1])


def token_f1(predicted: str, true: str) -> float:
    """F1 of the bags of words."""
    a, b = Counter(re.findall(r"\w+", predicted)), Counter(re.findall(r"\w+", true))
    common = sum((a & b).values())
    return 2 * common / (sum(a.values()) + sum(b.values())) if common else 0.0


@dataclass(frozen=True)
class Score:
    """One prediction against what the environment answered.  ``delta_f1``: None where it isn't judged."""

    exact_match: float
    token_f1: float
    fact_f1: float
    delta_f1: float | None = None

    @classmethod
    def of(cls, predicted: str, true: str, delta: float | None = None) -> Score:
        return cls(float(predicted == true), token_f1(predicted, true), fact_f1(predicted, true), delta)


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Means and their number, with the 95 % intervals (normal approximation) of both F1.

    ``delta_f1`` is the mean over the ``delta_n`` transitions that change the belief, or are predicted to, if there are
    any.  So it depends on the model how many these are.
    """
    n = len(scores)
    means = {name: sum(getattr(score, name) for score in scores) / n for name in ("exact_match", "token_f1", "fact_f1")}
    deltas = [score.delta_f1 for score in scores if score.delta_f1 is not None]
    if deltas:
        means |= {"delta_f1": sum(deltas) / len(deltas), "delta_n": len(deltas)}
    intervals = {f"{name}_interval": _interval([getattr(score, name) for score in scores], means[name])
                 for name in ("token_f1", "fact_f1")}
    return {**means, **intervals, "n": n}


def _interval(values: Sequence[float], mean: float) -> list[float]:
    """The 95 % interval of the mean of values from 0 to 1."""
    half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)
    return [max(0.0, mean - half), min(1.0, mean + half)]


async def measure(world_model: WorldModel, transitions: Sequence[Transition],
                  env: str = "alfworld") -> dict[str, dict[str, Any]]:
    """One-step predictions against what the environment answered: :func:`summary` by kind and for all."""
    states = [parse(t.state) for t in transitions]
    predicted, cut = await predict(world_model, states, [t.action for t in transitions])
    scores = defaultdict(list)
    for state, t, answer in zip(states, transitions, predicted, strict=True):
        if answer is None:
            continue
        if env == "scienceworld":
            kinds, score = (scienceworld_kind(state, t.action, t.next_state),), Score.of(answer, t.next_state)
        else:
            kinds = kinds_of(state, t.action, t.next_state)
            score = Score.of(answer, t.next_state, delta_f1(state, t.action, answer, t.next_state))
        for name in (*kinds, "all"):
            scores[name].append(score)
    names = sorted(scores.keys() - {"all"}) if env == "scienceworld" else KINDS
    figures = {name: summary(scores[name]) for name in (*names, "all") if scores[name]}
    for name in ("delta_f1", "delta_n"):  # where nothing changes, a prediction is judged only if it is wrong
        figures.get("invalid", {}).pop(name, None)
    figures["all"]["cut"] = cut
    return figures


async def predict(world_model: WorldModel, states: Sequence[State],
                  actions: Sequence[str]) -> tuple[list[str | None], int]:
    """The predicted observations, and how many of them were cut at the limit of tokens: they count as they are.

    None where the model's context doesn't hold the prompt: it is left out.  Raises PromptTooLong where it holds none.
    """
    with metered() as usage:
        try:
            predicted = await world_model.step(states, actions)
        except PromptTooLong:
            predicted = await _one_by_one(world_model, states, actions)
    return predicted, sum(spent.cut for spent in usage.values())


async def _one_by_one(world_model: WorldModel, states: Sequence[State], actions: Sequence[str]) -> list[str | None]:
    async def one(state: State, action: str) -> str | PromptTooLong:
        try:
            return (await world_model.step([state], [action]))[0]
        except PromptTooLong as error:
            return error

    answers = await asyncio.gather(*(one(state, action) for state, action in zip(states, actions, strict=True)))
    errors = [answer for answer in answers if isinstance(answer, PromptTooLong)]
    if len(errors) == len(answers):
        raise errors[0]
    log.warning("%d of %d predictions are left out: %s", len(errors), len(answers), errors[0])
    return [None if isinstance(answer, PromptTooLong) else answer for answer in answers]


async def measure_depth(world_model: WorldModel, windows: Sequence[Sequence[Transition]]) -> dict[int, dict[str, Any]]:
    """Open-loop rollouts over ``windows`` of equally many successive transitions: :func:`summary` by depth.

    The first state is real; from there on the world model reads its own predictions.
    """
    states: list[State | None] = [parse(window[0].state) for window in windows]  # None: too long for the model
    by_depth = {}
    for depth, step in enumerate(zip(*windows, strict=True), start=1):
        steps = [t for t, state in zip(step, states, strict=True) if state is not None]
        try:
            answers, cut = await predict(world_model, [s for s in states if s is not None], [t.action for t in steps])
        except PromptTooLong as error:
            if not by_depth:
                raise
            log.warning("depth %d and deeper is left out: %s", depth, error)
            break
        rest = iter(answers)
        predicted = [None if state is None else next(rest) for state in states]
        by_depth[depth] = summary([Score.of(p, t.next_state) for p, t in zip(predicted, step, strict=True)
                                   if p is not None])
        by_depth[depth]["cut"] = cut
        states = [None if p is None else state.after(t.action, p)
                  for state, t, p in zip(states, step, predicted, strict=True)]
    return by_depth


def windows_of(transitions: Sequence[Transition], depth: int) -> list[list[Transition]]:
    """All runs of ``depth`` successive transitions of one episode."""
    episodes = episodes_of([(t, parse(t.state)) for t in transitions])
    return [[transitions[i] for i in episode[start:start + depth]]
            for episode in episodes for start in range(len(episode) - depth + 1)]


def _sample(settings: FidelitySettings, what: str, rows: list, n: int) -> list:
    """A random ``n`` of ``rows``, the same for every world model (0: all)."""
    return random.Random(derive_seed(settings.seed, what)).sample(rows, n) if 0 < n < len(rows) else rows


async def judge(settings: FidelitySettings, model: str, sources: Mapping[str, list[Transition]]) -> dict[str, Any]:
    """All figures of one world model: one_step and by_depth by source, and consistency where it is asked for."""
    barrier = BatchBarrier()
    world_model = load_world_model(model, env=settings.env, device=settings.device, dtype=settings.dtype,
                                   barrier=barrier, max_new_tokens=settings.wm_max_new_tokens,
                                   recall=settings.wm_recall)
    figures: dict[str, Any] = {"one_step": {}, "by_depth": {}}
    for source, transitions in sources.items():
        rows = _sample(settings, "rows", transitions, settings.max_rows)
        figures["one_step"][source] = await measure(world_model, rows, settings.env)
        windows = windows_of(transitions, settings.max_depth) if settings.max_depth else []
        if windows:
            windows = _sample(settings, "windows", windows, settings.max_starts)
            figures["by_depth"][source] = await measure_depth(world_model, windows)
        if settings.calibration_samples and settings.env == "alfworld":
            figures.setdefault("calibration", {})[source] = await calibration(
                world_model, rows, settings.calibration_samples, settings.seed)
    if settings.policy_model:
        games = list_games(settings.split, settings.env_data_root)
        # It writes freely: nobody knows what an imagined state admits.
        policy = load_policy(settings.policy_model, device=settings.device, dtype=settings.dtype, barrier=barrier)
        figures["consistency"] = await consistency(
            policy, world_model, _sample(settings, "games", games, settings.max_games),
            max_steps=settings.max_steps, seed=settings.seed, barrier=barrier)
        await policy.lm.close()
    await world_model.close()
    return figures


def print_figures(model: str, figures: Mapping[str, Any]) -> None:
    def block(title: str, rows: Mapping[Any, Mapping[str, Any]]) -> None:
        print(f"\n{title:34}{'exact match':>12}{'token F1':>10}{'Fact-F1':>9}{'Delta-F1':>10}{'of':>7}{'n':>7}")
        for name, row in rows.items():
            delta = f"{row['delta_f1']:.3f}" if "delta_f1" in row else "-"
            of = row.get("delta_n", "-")  # figures on file may be of before it was counted
            print(f"{name!s:34}{row['exact_match']:12.3f}{row['token_f1']:10.3f}{row['fact_f1']:9.3f}{delta:>10}{of:>7}"
                  f"{row['n']:7}")
        if cut := sum(row.get("cut", 0) for row in rows.values()):  # figures on file may be of before it was counted
            print(f"{cut} of these predictions were cut at the limit of tokens: raise --wm_max_new_tokens")

    for source, rows in figures["one_step"].items():
        block(f"{model}, one step of {source}", rows)
        if source in figures["by_depth"]:
            block(f"{model}, depth on {source}", figures["by_depth"][source])
    for source, row in figures.get("calibration", {}).items():
        if row:
            print(f"\n{model}, first visits of {source}: is the task's object there?  Brier score {row['brier']:.3f} "
                  f"(always the base rate: {row['brier_of_base_rate']:.3f}, n {row['n']})")
            for part in row["bins"]:
                print(f"  predicted {part['predicted']:.2f}   seen {part['observed']:.2f}   n {part['n']}")
    if "consistency" in figures:
        c = figures["consistency"]
        ratio = "-" if c["ratio"] is None else f"{c['ratio']:.2f}"
        print(f"\n{model}: of {c['games']} games {c['dreamed']} were solved inside the world model, {c['replayed']} "
              f"when these plans were replayed in the real one ({c['both']} both): consistency {ratio}")


def identify(settings: FidelitySettings) -> dict[str, Any]:
    """What the figures depend on: settings, and the models and transitions by their content."""
    files = settings.transitions.split(",")
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"--transitions {path}: no such file")
    models = {path: model_fingerprint(path) for path in (*settings.wm_model.split(","), settings.policy_model) if path}
    content = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files}
    return {"config": asdict(settings), "fingerprints": models, "sha256": content}


def read_measured(out_json: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by world model that this very measurement has left; none where it is to be made, or left games out."""
    if not out_json or not Path(out_json).is_file():
        return {}
    found = read_object(out_json, {"config": dict, "models": dict}, "delete it, or choose another --out_json")
    found["config"] = by_own_names(found["config"], FidelitySettings)
    same = all(found.get(key) == value for key, value in identity.items())
    return found["models"] if same and not left_out(found["models"]) else {}


def left_out(models: Mapping[str, Any]) -> list[str]:
    """Why games are missing in the figures of world models."""
    return [fault for figures in models.values() for fault in figures.get("consistency", {}).get("left_out", ())]


def main() -> None:
    settings = parse_settings(FidelitySettings, prog="python -m world_model.fidelity", description=__doc__)
    if settings.policy_model and not settings.env_data_root:
        raise UserError("--policy_model needs --env_data_root, the games that it acts in")
    if settings.policy_model and settings.env != "alfworld":
        raise UserError(f"--policy_model with --env {settings.env}: consistency is measured in ALFWorld only")
    if settings.out_json:
        check_output_file(settings.out_json)
    paths = settings.wm_model.split(",")
    for path in (*paths, *filter(None, [settings.policy_model])):
        check_model_path(path)
    identity = identify(settings)
    if measured := read_measured(settings.out_json, identity):
        for name, figures in measured.items():
            print_figures(name, figures)
        return
    sources: dict[str, list[Transition]] = {}
    for path in settings.transitions.split(","):
        for t, _ in read_steps(path):
            sources.setdefault(t.source or Path(path).stem, []).append(t)
    names = short_names([path.removesuffix("/merged_full") for path in paths])
    models = {}
    for name, path in zip(names, paths, strict=True):
        models[name] = asyncio.run(judge(settings, path, sources))
        print_figures(name, models[name])
    if settings.out_json:
        write_json(settings.out_json, identity | {"versions": versions(), "models": models})
    LeftOut(broken=left_out(models)).check_none_broken()


if __name__ == "__main__":
    run_main(main)
