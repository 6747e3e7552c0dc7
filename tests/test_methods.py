"""Each planning method on a deterministic toy model: what it asks, what it compares, what it executes."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from itp.agent.policy import Choice, Policy, distinct
from itp.agent.world_model import WorldModel
from itp.config import flag_fields
from itp.envs.base import Observation
from itp.games import Game
from itp.lm.base import GenParams, Usage, asking, metered
from itp.methods.base import Decision, Method, View
from itp.methods.implement import FAILED, RECENT, what_it_knows
from itp.methods.no_repeat import states
from itp.methods.registry import METHODS, build
from itp.methods.settings import NEED_WORLD_MODEL, NEED_YES_OR_NO, MethodSettings
from itp.text.prompt_format import TUNED
from itp.text.prompts import foresight_text, policy_prompt, proposal_text
from itp.text.state import State, parse
from tests.toy import ACTIONS, ToyLM, p_yes

GAME = Game("alfworld", "train", "toy/1", "toy", "pick_and_place_simple")
START = State("put a clean plate in fridge", "you see 7")
VIEW = View(GAME, 0, START, Observation(START.observation, START.task), 5)


def made(name: str, **changes) -> tuple[Method, ToyLM, ToyLM]:
    policy_lm, wm_lm = ToyLM("policy"), ToyLM("world_model")
    return build(name, Policy(policy_lm), WorldModel(wm_lm), MethodSettings(**changes)), policy_lm, wm_lm


def value(steps: list[tuple[str, str]]) -> float:
    """What the toy critic thinks of an imagined trajectory from START."""
    return p_yes(policy_prompt(START.render(), "Helps", foresight=foresight_text(steps)))


def labels(lm: ToyLM) -> Counter[str]:
    return Counter(prompt.rpartition("\n")[2] for prompt, _ in lm.asked)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_decides_and_says_what_it_cost(name: str) -> None:
    method, policy_lm, wm_lm = made(name, candidates=3)
    with metered() as usage:
        decision = asyncio.run(method.act(VIEW))
    assert method.name == name and decision.action in ACTIONS
    assert usage["policy"].calls == len(policy_lm.asked) > 0
    assert ("world_model" in usage) == bool(wm_lm.asked)
    assert not wm_lm.asked or name in NEED_WORLD_MODEL
    assert (labels(policy_lm)["Helps:"] > 0) == (name in NEED_YES_OR_NO)
    again = asyncio.run(made(name, candidates=3)[0].act(VIEW))
    assert again == decision


def test_mpc_takes_the_action_whose_future_the_critic_likes_best() -> None:
    method, policy_lm, wm_lm = made("mpc", candidates=6, max_k=3)
    decision = asyncio.run(method.act(VIEW))
    values = {action: v for action, v, _ in decision.considered}
    assert len(values) > 2 and decision.action == max(values, key=values.__getitem__)
    assert decision.k == 3 == len(decision.imagined.steps) and decision.imagined.steps[0][0] == decision.action
    assert values[decision.action] == pytest.approx(value(decision.imagined.steps))
    n = len(values)
    assert len(wm_lm.asked) == 3 * n and labels(policy_lm) == {"Action:": 6 + 2 * n, "Helps:": n}


def test_tot_keeps_the_best_of_every_level() -> None:
    method, policy_lm, wm_lm = made("tot", candidates=3, beam=2, max_k=3)
    decision = asyncio.run(method.act(VIEW))
    first = {action: v for action, v, _ in decision.considered}
    judged = {prompt: p_yes(prompt) for prompt, _ in policy_lm.asked if prompt.endswith("Helps:")}
    depth = {prompt: prompt.count("\nIf: ") for prompt in judged}
    assert first == {p.split("\nIf: ")[1].split("\n")[0]: pytest.approx(v) for p, v in judged.items() if depth[p] == 1}
    for level in (1, 2):  # only the two best of a level have successors
        here = sorted((p for p in judged if depth[p] == level), key=judged.__getitem__, reverse=True)
        grown = {p for p in here for q in judged
                 if depth[q] == level + 1 and q.startswith(p.removesuffix("\nHelps:") + "\nIf: ")}
        assert grown == set(here[:2])
    assert value(decision.imagined.steps) == pytest.approx(max(v for p, v in judged.items() if depth[p] == 3))
    assert decision.imagined.steps[0][0] == decision.action and len(wm_lm.asked) == len(judged)


def test_rafa_plans_one_future_for_each_action() -> None:
    method, policy_lm, wm_lm = made("rafa", candidates=3, max_k=3)
    decision = asyncio.run(method.act(VIEW))
    judged = {prompt: p_yes(prompt) for prompt, _ in policy_lm.asked if prompt.endswith("Helps:")}

    def best_after(prompt: str) -> str:
        start = prompt.removesuffix("\nHelps:") + "\nIf: "
        return max((p for p in judged if p.startswith(start) and p.count("\nIf: ") == prompt.count("\nIf: ") + 1),
                   key=judged.__getitem__)

    ends = [best_after(best_after(p)) for p in judged if p.count("\nIf: ") == 1]
    assert len(ends) == len(decision.considered) > 1
    best = max(ends, key=judged.__getitem__)
    assert decision.imagined.text() in best and best.endswith(decision.imagined.text() + "\nHelps:")


def test_no_repeat_does_nothing_twice_in_the_same_state() -> None:
    method, _, _ = made("no_repeat", candidates=20)
    state, seen = START, []
    for step in range(4):
        seen.append(asyncio.run(method.act(replace(VIEW, step=step, state=state))).action)
        state = state.after(seen[-1], "Nothing happens.")
    assert len(set(seen)) == 4 and seen[0] == asyncio.run(made("sft")[0].act(VIEW)).action
    known = [*states(START, "alfworld"), *states(state, "alfworld")]
    assert len(known) == 6 and len(set(known)) == 1
    moved = START.after("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see a mug 1.")
    assert len(set(states(moved, "alfworld"))) == 2
    # There it may do again what it did elsewhere.
    first = asyncio.run(made("sft")[0].act(replace(VIEW, state=moved))).action
    assert asyncio.run(method.act(replace(VIEW, step=1, state=moved))).action == first
    assert len(set(states(moved.after("look", START.first), "scienceworld"))) == 2


def test_statler_writes_a_state_and_reads_nothing_older() -> None:
    """Three steps: the writer reads its last state, the last command and its answer; the reader the new state."""
    method, policy_lm, _ = made("statler")
    state, past = START, ()
    for t in range(3):
        policy_lm.asked.clear()
        decision = asyncio.run(method.act(replace(VIEW, state=state, past=past)))
        (write, _), (read, _) = policy_lm.asked
        now = f"Task: put a clean plate in fridge\nObservation: {state.observation}"
        before = past and f"\nWorld state before: {past[-1].memory}\nLast command: {past[-1].action}" or ""
        assert write == f"{now}{before}\nWorld state:"
        assert read == f"{now}\nWorld state: {decision.reflection}\nAction:"
        state, past = state.after(decision.action, f"you see {t}"), (*past, decision)
    assert len({decision.memory for decision in past}) == 3


def test_statler_writes_the_state_anew_where_it_decided_nothing_yet() -> None:
    """A server's client sends a history: the state is written from its beginning on."""
    state = START.after("take mug 1", "you see 1").after("clean mug 1", "you see 2")
    method, policy_lm, _ = made("statler")
    asyncio.run(method.act(replace(VIEW, step=2, state=state)))
    writes = [prompt for prompt, _ in policy_lm.asked if prompt.endswith("World state:")]
    assert len(writes) == 3 and "before" not in writes[0]
    assert [prompt.split("\n")[1] for prompt in writes] == [
        f"Observation: {seen}" for seen in (START.first, "you see 1", "you see 2")]
    assert [prompt.split("Last command: ")[1].split("\n")[0] for prompt in writes[1:]] == ["take mug 1", "clean mug 1"]


def test_statler_with_the_state_that_the_observations_give() -> None:
    method, policy_lm, _ = made("statler", statler_writer="belief")
    room = "You are in the middle of a room. Looking quickly around you, you see a desk 1, and a fridge 1."
    state = State("find a mug", room).after("go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 1.")
    state = state.after("take mug 1 from desk 1", "You pick up the mug 1 from the desk 1.")
    asyncio.run(method.act(replace(VIEW, state=state)))
    (read, _), = policy_lm.asked
    written = json.loads(read.split("\n")[2].removeprefix("World state: "))
    assert (written["agent_location"], written["inventory"]) == ("desk 1", "mug 1")
    assert written["world_state"]["desk 1"] == {"visited": True, "open": "N/A", "objects": []}
    assert not written["world_state"]["fridge 1"]["visited"]


def test_an_instruct_model_is_told_the_form_of_the_state() -> None:
    prompt = policy_prompt(START.render(), "World state", replace(TUNED, style="instruct"))
    assert '{"agent_location": ..., "inventory": ..., "world_state": {place: {"visited"' in prompt


def test_compute_matched_methods() -> None:
    decision = asyncio.run(made("k_candidates", candidates=6)[0].act(VIEW))
    judged = {a: p_yes(policy_prompt(START.render(), "Helps", foresight=proposal_text(a)))
              for a, _, _ in decision.considered}
    assert len(judged) > 2 and decision.action == max(judged, key=judged.__getitem__) and decision.k == 0

    decision = asyncio.run(made("multi_attempt", candidates=40)[0].act(VIEW))
    votes = {a: n for a, _, n in decision.considered}
    assert sum(votes.values()) == 40 and votes[decision.action] == max(votes.values())

    method, policy_lm, _ = made("self_refine", rounds=3)
    decision = asyncio.run(method.act(VIEW))
    asked = [prompt for prompt, _ in policy_lm.asked]
    assert asked[0] == policy_prompt(START.render())
    assert len(asked) % 2 == 1 and len(asked) <= 7
    told = f"{START.render()}\nIf: "
    assert asked[1].startswith(told) and asked[1].endswith("\nReflection:")
    assert asked[2].startswith(asked[1]) and asked[2].endswith("\nAction:")
    assert decision.reflection and f"Reflection: {decision.reflection}\nAction:" in asked[-1]


def test_implement_asks_until_the_policy_keeps_an_action_that_it_knows() -> None:
    method, policy_lm, wm_lm = made("implement", rounds=4, belief_samples=10)
    decision = asyncio.run(method.act(VIEW))
    rounds = labels(policy_lm)["Reflection:"]
    assert 1 <= rounds <= 4 and len(wm_lm.asked) == rounds  # none of the toy's actions gathers information
    assert len({seed for _, seed in wm_lm.asked}) == rounds
    last = [prompt for prompt, _ in policy_lm.asked if prompt.endswith("Action:")][-1]
    assert last.count("Reflection: ") == rounds == len(decision.considered)
    assert all(f"\nIf: {action}\nThen: you see " in last for action, _, _ in decision.considered)


def test_implement_must_choose_among_what_it_imagined_after_the_last_round() -> None:
    method, _, wm_lm = made("implement", rounds=1, belief_samples=3)
    decision = asyncio.run(method.act(VIEW))
    (asked, _, _), = decision.considered
    assert len(wm_lm.asked) == 1 and decision.action == asked and decision.k == 1


def test_implement_tells_the_world_model_what_failed_long_ago() -> None:
    history = tuple((f"a{i}", "Nothing happens." if i % 2 else "ok") for i in range(60))
    state = State("t", "o", history)
    view = View(GAME, 60, state, Observation("ok", "t"), 1, (Decision("x"),) * 60, tuple(i % 2 == 1 for i in range(60)))
    known = what_it_knows(view)
    kept = [int(action[1:]) for action, _ in known.history]
    assert kept[-RECENT:] == list(range(45, 60))
    assert kept[:-RECENT] == list(range(15, 45, 2)) and len(kept) == RECENT + FAILED
    assert known.omitted == 30 and parse(known.render()) == known
    assert what_it_knows(VIEW) == START


def test_distinct_actions_in_the_order_of_proposal() -> None:
    choices = [Choice(a, str(i)) for i, a in enumerate(["b", "", "a", "b", "a", "c"])]
    assert [(c.action, c.raw) for c in distinct(choices)] == [("b", "0"), ("a", "2"), ("c", "5")]
    assert [c.action for c in distinct([Choice("", "")] * 2)] == [""]


def test_yes_and_no_share_the_probability() -> None:
    lm = ToyLM("policy")
    said = [asyncio.run(Policy(lm).judge(START, proposal_text(a))) for a in ACTIONS]
    assert said == [pytest.approx(p_yes(policy_prompt(START.render(), "Helps", foresight=f"\nIf: {a}")))
                    for a in ACTIONS]
    assert min(said) < 0.5 < max(said)


def test_requests_at_the_same_time_wait_together() -> None:
    class Slow(ToyLM):
        async def generate(self, prompts, params):
            with asking(self.role) as answers:
                await asyncio.sleep(0.2)
                answers += [self.answer(p, 0, params) for p in prompts]
            return answers

    async def work() -> dict[str, Usage]:
        lm = Slow("policy")
        with metered() as usage:
            await asyncio.gather(*(lm.generate(["x\nAction:"], GenParams()) for _ in range(5)))
            await lm.generate(["y\nAction:", "z\nAction:"], GenParams())
        return usage

    usage = asyncio.run(work())["policy"]
    assert usage == Usage(calls=7, prompt_tokens=63, completion_tokens=28)
    assert 0.4 <= usage.seconds < 0.8


@pytest.mark.parametrize("flag", ["candidates", "rounds"])
def test_a_flag_names_the_methods_that_read_it(flag: str) -> None:
    field = next(field for field in flag_fields(MethodSettings) if field.name == flag)
    named = set(re.findall(r"\w+", field.metadata["flag"].help))
    read = re.compile(rf"settings\.{flag}\b")
    for name, method in METHODS.items():
        if any(read.search(inspect.getsource(cls)) for cls in method.__mro__ if cls.__module__.startswith("itp.")):
            assert name in named, f"--{flag}: {name} reads it"
