"""From transitions to rules: all short rules that hold, checked on others, and the few that mend the world model.

After WALL-E and WALL-E 2.0 (:mod:`itp.methods.walle`), in three steps.

induce  For every command with slots and every answer to it that was given ``support`` times, all conjunctions of at
        most ``max_conditions`` conditions under which the answer was always that one (up to ``precision``).  None says
        more than is needed: without one of its conditions it doesn't hold.
verify  A rule that transitions of other episodes contradict is dropped.
prune   Greedy maximum coverage: the rule that explains the most of the transitions that the world model predicted
        wrongly, and that no chosen rule explains, until none explains ``least`` of them.  Of equals the one with fewer
        conditions, then the one that holds more often.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from itp.text.alfworld_phrases import kind
from itp.text.belief import Belief
from itp.text.rules import PREDICATES, Condition, Rule, Situation, lift
from itp.text.state import State

BEAM = 400
"""Conjunctions that are extended by another condition: those with the fewest exceptions."""


@dataclass(frozen=True)
class Case:
    """A transition as rules see it.  ``answer``: with slots; ``said``: the text; ``wrong``: whether the world model
    predicted something else."""

    situation: Situation
    answer: str
    said: str
    wrong: bool = False

    @classmethod
    def of(cls, state: State, action: str, observation: str, wrong: bool = False) -> Case:
        situation = Situation.of(Belief.of(state), action)
        return cls(situation, lift(observation, situation), observation, wrong)


@dataclass(frozen=True)
class InductionLimits:
    """``support``: cases that a rule needs; ``precision``: the share of them that it must have right."""

    max_conditions: int = 2
    support: int = 5
    precision: float = 1.0


def induce(cases: Sequence[Case], limits: InductionLimits = InductionLimits()) -> list[Rule]:
    """Every rule of at most ``max_conditions`` conditions that holds in ``cases`` and says no more than is needed."""
    by_action = defaultdict(list)
    for case in cases:
        by_action[case.situation.action].append(case)
    return [rule for action, some in sorted(by_action.items()) for rule in _of_action(action, some, limits)]


def _of_action(action: str, cases: Sequence[Case], limits: InductionLimits) -> Iterator[Rule]:
    masks = _masks(cases)
    for answer, n in Counter(case.answer for case in cases).items():
        if n >= limits.support:
            right = _mask(case.answer == answer for case in cases)
            for conditions in _conjunctions(masks, right, (1 << len(cases)) - 1, limits):
                yield Rule(action, conditions, answer)


def _conjunctions(masks: dict[Condition, int], right: int, everything: int,
                  limits: InductionLimits) -> Iterator[tuple[Condition, ...]]:
    """The shortest conjunctions that hold where ``right`` has a bit, and hardly anywhere else."""
    found: list[frozenset[Condition]] = []
    level: dict[frozenset[Condition], int] = {frozenset(): everything}
    for size in range(limits.max_conditions + 1):
        open_ones = []
        for body, mask in level.items():
            covered, wrong = (mask & right).bit_count(), (mask & ~right).bit_count()
            if covered < limits.support:
                continue
            if covered >= limits.precision * (covered + wrong):
                found.append(body)
                yield tuple(sorted(body))
            else:
                open_ones.append((wrong / covered, len(open_ones), body, mask))
        if size == limits.max_conditions:
            return
        level = {}
        for _, _, body, mask in sorted(open_ones)[:BEAM]:
            for condition, holds in masks.items():
                longer = body | {condition}
                # A condition that rules out no exception says more than is needed.
                if condition not in body and mask & holds & ~right != mask & ~right and longer not in level \
                        and not any(short <= longer for short in found):
                    level[longer] = mask & holds


def _masks(cases: Sequence[Case]) -> dict[Condition, int]:
    """For every condition that holds in some of the cases and not in all, a bit for each case where it does."""
    slots = range(len(cases[0].situation.names))
    masks = {}
    for fact in itertools.chain.from_iterable(_facts_of(predicate, slots, cases) for predicate in PREDICATES):
        holds = _mask(case.situation.holds(Condition(fact)) for case in cases)
        every = (1 << len(cases)) - 1
        if holds and holds != every:
            masks |= {Condition(fact): holds, Condition(fact, False): every ^ holds}
    return masks


def _facts_of(predicate: str, slots: range, cases: Sequence[Case]) -> Iterator[tuple[str, ...]]:
    """The facts with ``predicate`` and slots as arguments; of ``is``: with the types that stand in the slots."""
    if predicate == "is":
        for i in slots:
            for name in sorted({kind(case.situation.names[i]) for case in cases}):
                yield ("is", f"{{{i}}}", name)
        return
    for chosen in itertools.permutations(slots, PREDICATES[predicate]):
        yield (predicate, *(f"{{{i}}}" for i in chosen))


def _mask(bits: Iterator[bool]) -> int:
    return sum(1 << i for i, bit in enumerate(bits) if bit)


def verify(rules: Sequence[Rule], cases: Sequence[Case], precision: float = 1.0) -> list[Rule]:
    """The rules that ``cases`` don't contradict: where one applies, it has at least ``precision`` of the answers."""
    by_action = defaultdict(list)
    for case in cases:
        by_action[case.situation.action].append(case)
    kept = []
    for rule in rules:
        said = [(rule.answer(case.situation), case.said) for case in by_action[rule.action]]
        right = [answer == true for answer, true in said if answer is not None]
        if sum(right) >= precision * len(right):
            kept.append(rule)
    return kept


def explained(rule: Rule, cases: Sequence[Case]) -> frozenset[int]:
    """The cases that the world model predicted wrongly, and ``rule`` doesn't."""
    return frozenset(i for i, case in enumerate(cases) if case.wrong and rule.action == case.situation.action
                     and rule.answer(case.situation) == case.said)


def prune(rules: Sequence[Rule], cases: Sequence[Case], max_rules: int = 0, least: int = 1) -> list[tuple[Rule, int]]:
    """A few of ``rules``, in the order of their choice, each with how many failures it explains that the ones before it
    don't.  ``max_rules``: at most so many (0: all that explain ``least`` or more)."""
    support = Counter()
    for case in cases:
        support.update({rule: 1 for rule in rules if rule.applies(case.situation)})
    covers = {rule: explained(rule, cases) for rule in rules}
    covers = {rule: which for rule, which in covers.items() if which}
    chosen: list[tuple[Rule, int]] = []
    left = frozenset().union(*covers.values())

    def rank(rule: Rule) -> tuple[int, int, int, str]:
        return -len(covers[rule] & left), len(rule.conditions), -support[rule], str(rule)

    while covers and (not max_rules or len(chosen) < max_rules):
        best = min(covers, key=rank)
        if (new := len(covers.pop(best) & left)) < least:
            break
        left -= explained(best, cases)
        chosen.append((best, new))
    return chosen
