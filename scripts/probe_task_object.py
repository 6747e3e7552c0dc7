"""Does a policy look for the object of its task?  P(take) with it in sight, and without.

    python scripts/probe_task_object.py --model_path runs/quickstart/policy/merged_full

One kitchen of ALFWorld, the first place that is visited, and for every kind of thing three lists of 2, 4 and 6 things:
once with the task's object among them, once with another thing in its place.  AUC is the probability that P(take) is
higher in a list with the object than in one without; a policy that ignores its task has .5.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from dataclasses import dataclass

from itp.config import flag, parse_settings
from itp.devices import resolve_device
from itp.lm.local import LocalLM
from itp.pretrained import check_model_path
from itp.program import run_main
from itp.text.prompts import policy_prompt

KINDS = ("apple", "bowl", "bread", "butterknife", "cup", "dishsponge", "egg", "fork", "kettle", "knife", "lettuce",
         "mug", "pan", "peppershaker", "plate", "pot", "potato", "saltshaker", "soapbottle", "spatula", "spoon",
         "tomato")
ROOM = ("You are in the middle of a room. Looking quickly around you, you see a cabinet 2, a cabinet 1, "
        "a countertop 2, a countertop 1, a drawer 2, a drawer 1, a fridge 1, a microwave 1, a sinkbasin 1, "
        "and a toaster 1.")


@dataclass
class ProbeSettings:
    model_path: str = flag(help="policy, prompted with plain text")
    device: str = flag("cpu", help="device of the model")


def prompt(kind: str, things: list[str]) -> str:
    listed = ", ".join(f"a {thing}" for thing in things[:-1]) + f", and a {things[-1]}"
    return policy_prompt(f"Task: put a {kind} in drawer\nObservation: {ROOM}\nAction: go to countertop 1\nObservation: "
                         f"You arrive at countertop 1. On the countertop 1, you see {listed}.")


async def probe(lm: LocalLM) -> tuple[list[float], list[float]]:
    """P(take) with and without the object, of the same lists otherwise."""
    draw = random.Random(1)
    prompts = []
    for kind in KINDS:
        for count in (2, 4, 6):
            things = [f"{other} {draw.randint(1, 3)}" for other in draw.sample([k for k in KINDS if k != kind], count)]
            shown = [*things]
            shown[count // 2] = f"{kind} 1"
            prompts += [prompt(kind, shown), prompt(kind, things)]
    scores = await lm.loglikelihood([(text, " take") for text in prompts])
    await lm.close()
    found = [math.exp(score.total) for score in scores]
    return found[::2], found[1::2]


def main() -> None:
    settings = parse_settings(ProbeSettings, prog="python scripts/probe_task_object.py", description=__doc__)
    check_model_path(settings.model_path)
    shown, absent = asyncio.run(probe(LocalLM.load(settings.model_path, device=resolve_device(settings.device))))
    auc = statistics.fmean((a > b) + 0.5 * (a == b) for a in shown for b in absent)
    print(f"P(take) with the object in sight {statistics.fmean(shown):.2f}, without it {statistics.fmean(absent):.2f}, "
          f"AUC {auc:.2f} (n = {len(shown)})")


if __name__ == "__main__":
    run_main(main)
