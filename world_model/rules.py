"""Learn the rules of WALL-E: what the world model predicts wrongly, and short rules explain (:mod:`itp.methods.walle`).

    python -m world_model.rules --wm_model W --transitions rollouts.jsonl,walks.jsonl --out_dir runs/rules
    python -m world_model.rules ... --rounds 3 --policy_model P --env_data_root DATA

Round 0 learns from the transitions on file.  ``--held_out`` of the games are kept apart: one half of them only checks
rules, and the other half only measures.  Each further round plays games of ``--split`` with method ``walle`` and the
rules so far, adds what happened, and learns again from everything (:mod:`world_model.rule_induction`).
``OUT_DIR/rules.json`` has the rules, each with the failures that it explains, and by round the success in the games and
the accuracy of the world model on what measures, without and with the rules.  Give failed actions too: those of
``world_model.collect --failing``, or of a policy that writes freely.

WALL-E limits the set of rules by greedy coverage, as ``--max_rules`` does; its figure for ALFWorld is after 6 rounds.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from itp.config import Topic, flag, parse_settings
from itp.devices import DTYPES
from itp.envs.alfworld.games import list_games
from itp.envs.pool import EnvPool, processes_for
from itp.envs.registry import EnvFlags, engine_of
from itp.errors import UserError
from itp.files import content_digest, write_json
from itp.lm.scheduler import BatchBarrier
from itp.methods.settings import MethodSettings
from itp.methods.walle import Walle
from itp.models import load_policy, load_world_model
from itp.pretrained import check_model_path, model_fingerprint
from itp.program import run_main, say_next
from itp.rollout import LeftOut, run_episodes
from itp.run_dir import alone_in, open_run_dir
from itp.seeding import derive_seed
from itp.text.alfworld_phrases import NOTHING_HAPPENS
from itp.text.episodes import read_steps
from itp.text.rules import Rule
from itp.text.state import State, parse
from itp.transitions import Transition, read_transitions, write_transitions
from world_model.collect import episode_transitions
from world_model.rule_induction import Case, InductionLimits, induce, prune, verify

log = logging.getLogger(__name__)
RULES = "rules.json"
Step = tuple[Transition, State]


@dataclass
class RulesSettings:
    """What the rules are learned from."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "wm_model", "transitions", "out_dir", "rounds", "policy_model",
        "env_data_root", "games_per_round", "support", "max_rules", "device")
    wm_model: str = flag(help="world model: a model folder, or a name on the Hugging Face hub", affects_result=False)
    transitions: str = flag(help="transitions.jsonl to begin with; several comma-separated", affects_result=False)
    out_dir: str = flag(help="folder for rules.json, and the transitions of each round with the rules that it "
                              "played with", affects_result=False)
    max_rows: int = flag(4000, at_least=0, help="a random sample of so many transitions at most (0: all)")
    held_out: float = flag(0.25, above=0, below=1, help="share of the games that only check rules, or only measure")
    rounds: int = flag(0, at_least=0, help="rounds of playing and learning after the first")
    policy_model: str = flag("", help="policy that plays in these rounds", affects_result=False)
    env_data_root: str = flag("", help="folder that holds json_2.1.1, for the games", affects_result=False)
    split: str = flag("train", help="split of these games")
    games_per_round: int = flag(30, at_least=1, help="games of a round, none of which is played twice if there are "
                                                     "enough")
    max_steps: int = flag(30, at_least=1, help="steps of an episode at most")
    kept: ClassVar[Topic] = Topic("Which rules are kept")
    max_conditions: int = flag(2, at_least=0, help="conditions of a rule at most")
    support: int = flag(5, at_least=1, help="transitions in which a rule must hold")
    precision: float = flag(0.99, above=0, help="share of the answers that a rule must have right where it applies")
    max_rules: int = flag(40, at_least=0, help="rules at most (0: all that explain --least failures)")
    least: int = flag(2, at_least=1, help="failures that a rule must explain which those before it don't")
    running: ClassVar[Topic] = Topic("Devices, speed and chance")
    device: str = flag("cuda", help="device of the models", affects_result=False)
    dtype: str = flag("fp16", help="their precision on a GPU", choices=DTYPES)
    concurrency: int = flag(16, at_least=1, help="episodes at a time", affects_result=False)
    env_processes: int = flag(2, at_least=1, help="processes that run the environments", affects_result=False)
    seed: int = flag(123, help="seed of everything random")


def check(settings: RulesSettings) -> None:
    """Raises UserError for what doesn't go together."""
    check_model_path(settings.wm_model)
    if settings.precision > 1:
        raise UserError(f"--precision {settings.precision}: a share, at most 1")
    if settings.rounds and not (settings.policy_model and settings.env_data_root):
        raise UserError("--rounds plays games: give --policy_model and --env_data_root, or --rounds 0")
    if settings.policy_model:
        check_model_path(settings.policy_model)


def split_steps(steps: Sequence[Step], share: float, seed: int) -> tuple[list[Step], list[Step], list[Step]]:
    """(to learn from, to check rules with, to measure with), whole games each; ``share``: of the last two together."""
    def game(step: Step) -> str:
        return step[0].episode_id.partition("#")[0].partition("@")[0]

    games = sorted(set(map(game, steps)), key=lambda name: derive_seed(seed, "held out", name))
    half = max(1, round(share * len(games) / 2))
    check, measure = set(games[:half]), set(games[half:2 * half])
    return ([s for s in steps if game(s) not in check | measure], [s for s in steps if game(s) in check],
            [s for s in steps if game(s) in measure])


@dataclass
class RuleLearner:
    """The transitions so far, what the world model says to each, and the rules."""

    settings: RulesSettings
    checks: list[Case]
    measured: list[Case]
    world_model: Any
    cases: list[Case] = dataclasses.field(default_factory=list)
    chosen: list[tuple[Rule, int]] = dataclasses.field(default_factory=list)

    @property
    def rules(self) -> list[Rule]:
        return [rule for rule, _ in self.chosen]

    async def add(self, steps: Sequence[Step]) -> None:
        self.cases += await cases_of(self.world_model, steps)

    def learn(self) -> None:
        """Induce, verify, prune."""
        s = self.settings
        found = induce(self.cases, InductionLimits(s.max_conditions, s.support, s.precision))
        sound = verify(found, self.checks, s.precision)
        self.chosen = prune(sound, self.cases, s.max_rules, s.least)
        log.info("%d rules hold in %d transitions, %d also in those that check; %d explain %d of %d failures",
                 len(found), len(self.cases), len(sound), len(self.chosen), sum(n for _, n in self.chosen),
                 sum(case.wrong for case in self.cases))

    def accuracy(self) -> dict[str, float]:
        """Shares of the measured answers that are predicted exactly, and of the failed actions that are foreseen."""
        failed = [case for case in self.measured if case.said == NOTHING_HAPPENS]
        return {"n": len(self.measured), "world_model": _share([not case.wrong for case in self.measured]),
                "with_rules": _share([right(self.rules, case) for case in self.measured]), "failed_n": len(failed),
                "failed_world_model": _share([not case.wrong for case in failed]),
                "failed_with_rules": _share([right(self.rules, case) for case in failed])}


def right(rules: Sequence[Rule], case: Case) -> bool:
    """Whether the world model with ``rules`` predicts the answer of ``case`` exactly."""
    said = next((answer for rule in rules if (answer := rule.answer(case.situation)) is not None), None)
    return not case.wrong if said is None else said == case.said


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0


async def cases_of(world_model: Any, steps: Sequence[Step]) -> list[Case]:
    """Transitions as rules see them, with whether ``world_model`` predicts them wrongly."""
    said = await world_model.step([state for _, state in steps], [t.action for t, _ in steps])
    return [Case.of(state, t.action, t.next_state, predicted != t.next_state)
            for (t, state), predicted in zip(steps, said, strict=True)]


async def play(settings: RulesSettings, number: int, rules: Sequence[Rule], out: Path) -> list[Transition]:
    """The transitions of round ``number``: those on file, or of games played with the rules so far."""
    file = out / f"round-{number}.jsonl"
    if file.exists():
        return read_transitions(file)
    barrier, left_out = BatchBarrier(), LeftOut()
    policy = load_policy(settings.policy_model, device=settings.device, dtype=settings.dtype, barrier=barrier)
    world_model = load_world_model(settings.wm_model, device=settings.device, dtype=settings.dtype, barrier=barrier)
    so_far = out / f"rules-{number}.json"  # a file of this round alone: what is read of a path is kept
    write_json(so_far, {"rules": [rule.to_json() for rule in rules]})
    method = Walle(policy, world_model, MethodSettings(walle_rules=str(so_far)))
    pool = EnvPool(engine_of(EnvFlags(), want_admissible=method.want_admissible),
                   processes_for(settings.env_processes, settings.concurrency))
    transitions: list[Transition] = []
    try:
        async for episode in run_episodes(pool, method, _games(settings, number), max_steps=settings.max_steps,
                                          seed=derive_seed(settings.seed, "round", number),
                                          concurrency=settings.concurrency, barrier=barrier):
            if not left_out.takes(episode):
                transitions += episode_transitions(episode, "policy")
    finally:
        await pool.close()
        await policy.lm.close()
        await world_model.close()
    left_out.check_none_lost("games")
    write_transitions(file, sorted(transitions, key=lambda t: (t.episode_id, t.step)))
    return read_transitions(file)


def _games(settings: RulesSettings, number: int) -> list:
    games = list_games(settings.split, settings.env_data_root)
    random.Random(derive_seed(settings.seed, "games")).shuffle(games)
    first = (number - 1) * settings.games_per_round
    return [games[i % len(games)] for i in range(first, first + min(settings.games_per_round, len(games)))]


async def learn(settings: RulesSettings, out: Path) -> dict[str, Any]:
    """What ``rules.json`` holds, after all rounds."""
    steps = [step for path in settings.transitions.split(",") for step in read_steps(path)]
    if settings.max_rows and len(steps) > settings.max_rows:
        steps = random.Random(derive_seed(settings.seed, "rows")).sample(steps, settings.max_rows)
    known, check, measure = split_steps(steps, settings.held_out, settings.seed)
    world_model = load_world_model(settings.wm_model, device=settings.device, dtype=settings.dtype)
    rounds: list[dict[str, Any]] = []
    try:
        learner = RuleLearner(settings, await cases_of(world_model, check), await cases_of(world_model, measure),
                          world_model)
        await learner.add(known)
        for number in range(settings.rounds + 1):
            row: dict[str, Any] = {"round": number}
            if number:
                played = await play(settings, number, learner.rules, out)
                row |= {"games": sum(t.done for t in played), "success": _share([t.success for t in played if t.done]),
                        "failed_actions": _share([t.next_state == NOTHING_HAPPENS for t in played])}
                await learner.add([(t, parse(t.state)) for t in played])
            learner.learn()
            rounds.append(row | {"transitions": len(learner.cases), "rules": len(learner.chosen)} | learner.accuracy())
    finally:
        await world_model.close()
    return {"rules": [rule.to_json() | {"explains": n} for rule, n in learner.chosen], "rounds": rounds}


def print_rules(found: dict[str, Any]) -> None:
    for row in found["rules"]:
        print(f"{row['explains']:6}  {Rule.from_json(row, RULES)}")
    print(f"\n{'round':>5}{'games':>7}{'success':>9}{'failed actions':>16}{'rules':>7}{'accuracy':>10}"
          f"{'with rules':>12}{'of failed':>11}{'with rules':>12}")
    for row in found["rounds"]:
        played = f"{row['games']:7}{row['success']:9.1%}{row['failed_actions']:16.1%}" if row["round"] else " " * 32
        print(f"{row['round']:5}{played}{row['rules']:7}{row['world_model']:10.1%}{row['with_rules']:12.1%}"
              f"{row['failed_world_model']:11.1%}{row['failed_with_rules']:12.1%}")


def main() -> None:
    settings = parse_settings(RulesSettings, prog="python -m world_model.rules", description=__doc__)
    check(settings)
    facts = {"wm_fingerprint": model_fingerprint(settings.wm_model),
             "transitions_sha256": [content_digest(path) for path in settings.transitions.split(",")]}
    if settings.policy_model:
        facts["policy_fingerprint"] = model_fingerprint(settings.policy_model)
    with alone_in(settings.out_dir):
        out = open_run_dir(settings.out_dir, settings, facts=facts)
        found = asyncio.run(learn(settings, out))
        write_json(out / RULES, found)
    print_rules(found)
    say_next(f"python -m foresight_eval --method walle --walle_rules {out / RULES} --wm_model {settings.wm_model} "
             "--policy_model DIR --env_data_root DIR --out_dir DIR")


if __name__ == "__main__":
    run_main(main)
