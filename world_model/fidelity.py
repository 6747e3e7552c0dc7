"""How true is the world model?  Next-state exact match and token F1 on real transitions, by kind of action.

    python -m world_model.fidelity --wm_model runs/wm/merged_full --transitions held_out.jsonl --out_json f.json

Kinds (ALFWorld): what the state determines, what nobody can know, and what must be remembered:

=============  ==========================================================================================
deterministic  take, move, heat, cool, clean, use, close, slice, and arriving at something that is closed
revisit        contents that the history has shown before (and perhaps changed since): go to, open, examine
first_visit    contents seen for the first time: unknowable, a guess from common sense at best
inspect        look, inventory, examining an object
invalid        the engine's "Nothing happens."
=============  ==========================================================================================

ScienceWorld's (``--env scienceworld``) are the verbs of the actions; with two words where the first says little
(``look around``, ``look at``, ``look in``), and ``invalid``.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from itp.config import flag, parse_settings
from itp.envs.scienceworld import INVALID
from itp.games import ENVIRONMENTS
from itp.lm.chat import asked_as
from itp.lm.local import LocalLM
from itp.runtime import DTYPES, check_model_path, derive_seed, run_main, versions, write_json
from itp.text.state import State, parse
from itp.transitions import Transition, read_transitions
from itp.world_model import WorldModel

KINDS = ("deterministic", "revisit", "first_visit", "inspect", "invalid")
VISITS = ("go", "open", "examine")
INSPECTIONS = ("look", "inventory", "help", "examine")

_CONTENTS = re.compile(r"(?:On the (?P<on>\w+ \d+)|The (?P<in>\w+ \d+) is open\. In it), you see")


@dataclass
class Settings:
    wm_model: str = flag(help="world model: a model folder, or a name on the Hugging Face hub")
    transitions: str = flag(help="transitions.jsonl of episodes that no training saw")
    env: str = flag("alfworld", help="environment of the transitions", choices=ENVIRONMENTS)
    out_json: str = flag("", help="where to write the figures too")
    max_rows: int = flag(2000, at_least=0, help="a random sample of so many transitions (0: all)")
    device: str = flag("cuda", help="device of the world model")
    dtype: str = flag("fp16", help="its precision on a GPU", choices=DTYPES)
    foresight_tokens: int = flag(256, at_least=1, help="new tokens of a prediction at most")
    seed: int = flag(123, help="seed of the sample")


def kind_of(state: State, action: str, next_state: str) -> str:
    """Which of KINDS a transition is."""
    if next_state == "Nothing happens.":
        return "invalid"
    verb = action.split(" ", 1)[0]
    shown = _CONTENTS.search(next_state)
    if verb in VISITS and shown:
        place = shown["on"] or shown["in"]
        seen = any(place in (m["on"], m["in"]) for _, o in state.history for m in _CONTENTS.finditer(o))
        return "revisit" if seen else "first_visit"
    return "inspect" if verb in INSPECTIONS else "deterministic"


def scienceworld_kind(state: State, action: str, next_state: str) -> str:
    """The verb of a ScienceWorld action."""
    if next_state.startswith(INVALID):
        return "invalid"
    words = action.split()
    return " ".join(words[:2] if words[0] == "look" else words[:1])


def token_f1(predicted: str, true: str) -> float:
    """F1 of the bags of words."""
    a, b = Counter(re.findall(r"\w+", predicted)), Counter(re.findall(r"\w+", true))
    common = sum((a & b).values())
    return 2 * common / (sum(a.values()) + sum(b.values())) if common else 0.0


async def measure(world_model: WorldModel, transitions: Sequence[Transition],
                  env: str = "alfworld") -> dict[str, dict[str, float]]:
    """Exact match and mean token F1 of one-step predictions, by kind and for all."""
    kind = scienceworld_kind if env == "scienceworld" else kind_of
    states = [parse(t.state) for t in transitions]
    predicted = await world_model.step(states, [t.action for t in transitions])
    scores = defaultdict(list)
    for state, t, answer in zip(states, transitions, predicted, strict=True):
        score = (answer == t.next_state, token_f1(answer, t.next_state))
        for name in (kind(state, t.action, t.next_state), "all"):
            scores[name].append(score)
    names = sorted(scores.keys() - {"all"}) if env == "scienceworld" else KINDS
    return {
        name: {"exact_match": sum(s[0] for s in rows) / len(rows), "token_f1": sum(s[1] for s in rows) / len(rows),
               "n": len(rows)}
        for name in (*names, "all") if (rows := scores[name])
    }


def main() -> None:
    settings = parse_settings(Settings, prog="python -m world_model.fidelity", description=__doc__)
    check_model_path(settings.wm_model)
    transitions = read_transitions(settings.transitions)
    if settings.max_rows and len(transitions) > settings.max_rows:
        transitions = random.Random(derive_seed(settings.seed, "rows")).sample(transitions, settings.max_rows)
    lm = LocalLM.load(settings.wm_model, device=settings.device, dtype=settings.dtype, role="world_model")
    style, turns = asked_as(settings.wm_model, lm.tokenizer, role="world_model", env=settings.env)
    world_model = WorldModel(lm, env=settings.env, style=style, turns=turns, max_new_tokens=settings.foresight_tokens)
    figures = asyncio.run(measure(world_model, transitions, settings.env))
    print(f"{'':14}{'exact match':>12}{'token F1':>10}{'n':>7}")
    for name, row in figures.items():
        print(f"{name:14}{row['exact_match']:12.3f}{row['token_f1']:10.3f}{row['n']:7}")
    if settings.out_json:
        write_json(settings.out_json, {"config": asdict(settings), "versions": versions(), "figures": figures})


if __name__ == "__main__":
    run_main(main)
