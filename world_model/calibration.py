"""Does a world model know what it doesn't know?  Its probability that the task's object is seen at a first visit.

Nobody can know what lies in a drawer that was never opened, but how often an apple lies there can be known.  The
probability is the share of sampled observations that show an object of the task's type.  It is judged by the Brier
score, the mean squared difference to what was seen (0 or 1), and by a reliability diagram: in each bin of
probabilities, how often was the object seen?

Source: Brier (1950); the correction for the finite number of samples follows Ferro (2014), "Fair scores for ensemble
forecasts".
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from itp.agent.world_model import WorldModel
from itp.envs.alfworld.vocabulary import task_object
from itp.errors import PromptTooLong
from itp.seeding import derive_seed
from itp.text.alfworld_phrases import contents, kind
from itp.text.kinds import kind_of
from itp.text.state import State, parse
from itp.transitions import Transition

log = logging.getLogger(__name__)
EDGES = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 1.0)
"""The bins of the reliability diagram; most first visits don't show the object, so the lowest are narrow."""


async def calibration(world_model: WorldModel, transitions: Sequence[Transition], samples: int,
                      seed: int) -> dict[str, Any]:
    """The Brier score and the reliability diagram over the first visits among ``transitions``.

    ``brier_of_base_rate``: the score of always giving the share of first visits that show the object.  Empty where no
    first visit has a task that names an object.  A visit whose prompt the model's context doesn't hold is left out.
    """
    visits = [(state, t) for t in transitions if task_object((state := parse(t.state)).task)
              and kind_of(state, t.action, t.next_state) == "first_visit"]
    shares = await asyncio.gather(*(
        _probability(world_model, state, t.action, samples, derive_seed(seed, "calibration", i))
        for i, (state, t) in enumerate(visits)))
    outcomes = [_shows(t.next_state, task_object(state.task)) for state, t in visits]
    fitting = [(share, outcome) for share, outcome in zip(shares, outcomes, strict=True) if share is not None]
    if too_long := len(visits) - len(fitting):
        log.warning("%d of %d first visits are left out: the model's context doesn't hold their prompts", too_long,
                    len(visits))
    if not fitting:
        return {}
    probabilities, outcomes = zip(*fitting, strict=True)
    return {"samples": samples, **judged(probabilities, outcomes, samples)}


async def _probability(world_model: WorldModel, state: State, action: str, samples: int, seed: int) -> float | None:
    try:
        seen = await world_model.sample(state, action, samples, seed)
    except PromptTooLong:
        return None
    return sum(_shows(observation, task_object(state.task)) for observation in seen) / samples


def _shows(observation: str, wanted: str) -> bool:
    return any(kind(thing) == wanted for place in contents(observation) for thing in place.things)


def judged(probabilities: Sequence[float], outcomes: Sequence[bool], samples: int) -> dict[str, Any]:
    """``brier``, ``brier_of_base_rate``, ``bins`` and ``n`` of ``probabilities`` that are shares of ``samples``."""
    n, rate = len(outcomes), sum(outcomes) / len(outcomes)
    # A share of few samples scatters around the probability, which adds p (1 - p) / samples to the squared difference.
    noise = [p * (1 - p) / (samples - 1) if samples > 1 else 0.0 for p in probabilities]
    brier = sum((p - y) ** 2 - extra for p, y, extra in zip(probabilities, outcomes, noise, strict=True)) / n
    bins = []
    for low, high in zip(EDGES, EDGES[1:], strict=False):
        inside = [(p, y) for p, y in zip(probabilities, outcomes, strict=True)
                  if low <= p < high or p == high == EDGES[-1]]
        if inside:
            bins.append({"from": low, "to": high, "predicted": sum(p for p, _ in inside) / len(inside),
                         "observed": sum(y for _, y in inside) / len(inside), "n": len(inside)})
    return {"brier": brier, "brier_of_base_rate": rate * (1 - rate), "bins": bins, "n": n}
