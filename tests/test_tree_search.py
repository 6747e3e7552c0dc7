"""Tree search against a plain, literal implementation on a deterministic toy model: equal statistics, fewer calls."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from itp.agent.policy import Policy
from itp.agent.world_model import WorldModel
from itp.envs.base import Observation
from itp.games import Game
from itp.lm.base import metered
from itp.methods.base import Decision, EarlierTrial, View
from itp.methods.lats import Lats
from itp.methods.mcts import Mcts
from itp.methods.rap import Rap, goal_overlap
from itp.methods.reflexion import Reflexion
from itp.methods.settings import MethodSettings
from itp.methods.tree import Node
from itp.seeding import derive_seed
from itp.text.prompts import policy_prompt, world_model_prompt
from itp.text.state import State
from tests.toy import ACTIONS, ToyLM, p_yes, unit

GAME = Game("alfworld", "train", "toy/1", "toy", "pick_and_place_simple")
START = State("put a clean plate in fridge", "you see 7")


def view(state: State = START, seed: int = 5, admissible: tuple[str, ...] | None = None, past=()) -> View:
    return View(GAME, 0, state, Observation(state.observation, state.task, admissible=admissible), seed, past)


class Literal:
    """RAP as it reads: every expanded state has all its actions proposed, scored, predicted and judged.

    The tree keeps what it expanded; what a simulation passes through is computed again by the next one.
    ``calls`` counts requests by kind.
    """

    def __init__(self, settings: MethodSettings) -> None:
        self.settings = settings
        self.calls: Counter[str] = Counter()
        self.visits: Counter[tuple[str, ...]] = Counter()
        self.total: dict[tuple[str, ...], float] = defaultdict(float)
        self.kept: dict[tuple[str, ...], list[tuple[str, float, State]]] = {}

    def expand(self, state: State, seed: int) -> list[tuple[str, float, State]]:
        """(action, reward, next state) of every proposal in ``state``."""
        d, prompt = self.settings.rap_d_actions, policy_prompt(state.render())
        drawn = derive_seed(seed, "drawn")
        draws = [drawn, *(derive_seed(drawn, i) for i in range(1, d - 1))]
        proposed = [ACTIONS[int(len(ACTIONS) * unit(prompt, s))] for s in (0, *draws)]
        self.calls["propose"] += d
        children = []
        for action in proposed:
            asked = world_model_prompt(state.render(), action)
            after = state.after(action, f"you see {int(1000 * unit(asked, 0))}")
            yes = p_yes(policy_prompt(state.render(), "Helps", foresight=f"\nIf: {action}"))
            reward = 0.2 * (-4 * unit(prompt, action) / 4) + 0.6 * yes + 0.2 * goal_overlap(state.task, action)
            children.append((action, reward, after))
        self.calls.update(score=d, predict=d, judge=d)
        return list({child[0]: child for child in children}.values())

    def rollout(self, root: State, seed: int) -> None:
        settings, path, rewards, state, in_tree = self.settings, (), [], root, True
        steps = []
        while len(rewards) < settings.rap_depth_limit:
            children = self.kept.get(path) or self.expand(state, seed)
            if in_tree:
                self.kept[path] = children
                action = self.uct(path, [child[0] for child in children])
                steps.append((*path, action))
                in_tree = self.visits[(*path, action)] > 0
                if not in_tree:
                    added = (*path, action)
            else:
                action = children[0][0]
                if path == added:  # the new leaf joins the tree, what lies behind it doesn't
                    self.kept[path] = children
            _, reward, state = next(child for child in children if child[0] == action)
            rewards.append(reward)
            path, seed = (*path, action), derive_seed(seed, action)
        for i, step in enumerate(steps):
            self.visits[step] += 1
            self.total[step] += sum(rewards[i:]) / len(rewards[i:])

    def uct(self, path: tuple[str, ...], actions: list[str]) -> str:
        n = {a: self.visits[(*path, a)] for a in actions}
        for action in actions:
            if n[action] == 0:
                return action
        return max(actions, key=lambda a: self.total[(*path, a)] / n[a]
                   + self.settings.rap_uct_w * math.sqrt(math.log(sum(n.values())) / n[a]))


def statistics(node: Node, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], tuple[int, float]]:
    found = {}
    for action, edge in node.edges.items():
        if edge.visits:
            found[(*path, action)] = (edge.visits, edge.total)
            found |= statistics(edge.node, (*path, action)) if edge.node else {}
    return found


def searcher(kind=Rap, **changes) -> tuple[Rap | Mcts, ToyLM, ToyLM]:
    policy_lm, wm_lm = ToyLM("policy"), ToyLM("world_model")
    policy = Policy(policy_lm, selection=changes.pop("selection", "generate"))
    return kind(policy, WorldModel(wm_lm), MethodSettings(**changes)), policy_lm, wm_lm


def both(seed: int, **changes) -> tuple[dict, Literal, dict, ToyLM, ToyLM]:
    """Our statistics, the literal search, our usage, and what was asked; the two trees being equal."""
    rap, policy_lm, wm_lm = searcher(**changes)
    with metered() as usage:
        tree = asyncio.run(rap.search(view(seed=seed)))
    literal = Literal(rap.settings)
    for _ in range(rap.settings.rap_num_rollouts):
        literal.rollout(START, seed)
    ours = statistics(tree.root)
    assert {path: n for path, (n, _) in ours.items()} == {path: n for path, n in literal.visits.items() if n}
    assert all(total == pytest.approx(literal.total[path]) for path, (_, total) in ours.items())
    assert sum(n for path, (n, _) in ours.items() if len(path) == 1) == rap.settings.rap_num_rollouts
    return ours, literal, usage, policy_lm, wm_lm


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("changes", [{"rap_d_actions": 4, "rap_uct_w": 0.1, "rap_depth_limit": 4},
                                     {"rap_d_actions": 3, "rap_uct_w": 0.1, "rap_num_rollouts": 50},
                                     {"rap_depth_limit": 1}, {"rap_num_rollouts": 3}])
def test_rap_grows_the_literal_tree(seed: int, changes: dict) -> None:
    ours, *_ = both(seed, **changes)
    if "rap_uct_w" in changes:
        assert max(map(len, ours)) >= 4


def test_the_rewards_of_an_inner_node_come_together() -> None:
    rap, *_ = searcher(rap_d_actions=4, rap_uct_w=0.1)
    nodes, inner = [asyncio.run(rap.search(view())).root], []
    while nodes:
        node = nodes.pop()
        nodes += [edge.node for edge in node.edges.values() if edge.node]
        inner += [node] * (node.complete and node.state != START)
    assert inner and all({c.action for c in node.choices} <= node.edges.keys() for node in inner)
    assert not any(math.isnan(edge.reward) for node in inner for edge in node.edges.values())


@pytest.mark.parametrize("seed", range(5))
def test_rap_by_default_takes_a_tenth_of_the_literal_calls(seed: int) -> None:
    _, literal, usage, policy_lm, wm_lm = both(seed)
    calls = usage["policy"].calls + usage["world_model"].calls
    assert calls == len(policy_lm.asked) + len(wm_lm.asked)
    assert calls <= sum(literal.calls.values()) / 10
    judged = [prompt for prompt, _ in policy_lm.asked if prompt.endswith("Helps:")]
    assert len(set(judged)) == len(judged) and len(set(wm_lm.asked)) == len(wm_lm.asked)
    assert len(set(policy_lm.asked)) == len(policy_lm.asked)


def test_rap_executes_what_it_tried_most() -> None:
    rap, *_ = searcher(rap_num_rollouts=20)
    tree = asyncio.run(rap.search(view()))
    decision = tree.decision()
    edges = tree.root.edges
    assert edges[decision.action].visits == max(e.visits for e in edges.values())
    assert decision.considered == tuple((a, e.total / e.visits, e.visits) for a, e in edges.items())
    assert decision.imagined.steps[0] == (decision.action, edges[decision.action].node.state.observation)
    assert decision.k == len(decision.imagined.steps) and decision.memory is None


def test_imagined_states_have_their_own_actions() -> None:
    rap, policy_lm, _ = searcher(selection="constrained")
    admissible = ("look", "inventory", "help")
    tree = asyncio.run(rap.search(view(admissible=admissible)))
    assert set(tree.root.edges) <= set(admissible)
    deeper = {action for path in statistics(tree.root) for action in path[1:]}
    assert deeper and deeper <= set(ACTIONS)


def test_one_action_is_executed_without_a_search() -> None:
    rap, policy_lm, wm_lm = searcher(selection="constrained")
    assert asyncio.run(rap.act(view(admissible=("look",)))).action == "look"
    assert not wm_lm.asked and all(prompt.endswith("Action:") for prompt, _ in policy_lm.asked)


def test_the_kept_subtree_goes_on_where_reality_agreed() -> None:
    rap, *_ = searcher(rap_keep_tree=True)
    first = asyncio.run(rap.act(view()))
    before = statistics(first.memory)
    imagined = first.memory.state
    agreed = asyncio.run(rap.search(view(imagined, seed=6, past=(first,))))
    assert agreed.root is first.memory and before
    assert all(agreed.root.edges[path[0]].visits >= n for path, (n, _) in before.items() if len(path) == 1)
    surprised = asyncio.run(rap.search(view(START.after(first.action, "something else"), seed=6, past=(first,))))
    assert surprised.root is not first.memory
    assert sum(e.visits for e in surprised.root.edges.values()) == 32
    assert asyncio.run(searcher()[0].act(view())).memory is None
    assert isinstance(first, Decision)


def test_goal_overlap() -> None:
    assert goal_overlap("put a clean plate in fridge.", "clean plate 2 with sinkbasin 1") == pytest.approx(2 / 3)
    assert goal_overlap("put a clean plate in fridge.", "go to cabinet 1") == 0
    assert goal_overlap("", "look") == 0


def test_mcts_values_leaves_by_the_critic_alone() -> None:
    mcts, policy_lm, wm_lm = searcher(Mcts, rap_d_actions=3, rap_depth_limit=3, rap_num_rollouts=12)
    tree = asyncio.run(mcts.search(view()))
    edges = [(node, edge) for node in nodes(tree.root) for edge in node.edges.values() if edge.visits]
    for _, edge in edges:
        steps = edge.node.state.history
        told = "".join(f"\nIf: {action}\nThen: {seen}" for action, seen in steps)
        assert edge.reward == pytest.approx(p_yes(policy_prompt(START.render(), "Helps", foresight=told)))
    # An edge's return is its own value once, and those of all visits that went on from it.
    for _, edge in edges:
        below = [e for e in edge.node.edges.values() if e.visits]
        if len(edge.node.state.history) < 3:
            assert edge.total == pytest.approx(edge.reward + sum(e.total for e in below))
            assert edge.visits == 1 + sum(e.visits for e in below)
    assert sum(e.visits for e in tree.root.edges.values()) == 12
    assert len(set(policy_lm.asked)) == len(policy_lm.asked) and len(set(wm_lm.asked)) == len(wm_lm.asked)


class LiteralLats:
    """LATS as it reads, on plain dictionaries; what the policy answered in a state isn't asked again there."""

    def __init__(self, settings: MethodSettings, seed: int, said: tuple[str, ...] = ()) -> None:
        self.settings, self.seed, self.said, self.reflections = settings, seed, list(said), 0
        self.visits: Counter[tuple[str, ...]] = Counter()
        self.total: dict[tuple[str, ...], float] = defaultdict(float)
        self.first: dict[tuple[str, ...], str] = {}
        self.drawn: dict[tuple[str, ...], list[str]] = {}
        self.verdicts: dict[tuple[str, ...], float] = {}

    @property
    def notes(self) -> str:
        return "".join(f"\nReflection: {text}" for text in self.said[-3:])

    def state(self, path: tuple[str, ...]) -> State:
        state = START
        for action in path:
            state = state.after(action, f"you see {int(1000 * unit(world_model_prompt(state.render(), action), 0))}")
        return state

    def proposed(self, path: tuple[str, ...], seed: int) -> str:
        prompt = policy_prompt(self.state(path).render(), notes=self.notes)
        return ACTIONS[int(len(ACTIONS) * unit(prompt, seed))]

    def greedy(self, path: tuple[str, ...]) -> str:
        if path not in self.first:
            self.first[path] = self.proposed(path, 0)
        return self.first[path]

    def proposals(self, path: tuple[str, ...]) -> list[str]:
        """With repetitions."""
        if path not in self.drawn:
            seed = self.seed
            for action in path:
                seed = derive_seed(seed, action)
            seed, likeliest = derive_seed(seed, "drawn"), self.greedy(path)
            seeds = [seed, *(derive_seed(seed, i) for i in range(1, self.settings.rap_d_actions - 1))]
            self.drawn[path] = [likeliest, *(self.proposed(path, each) for each in seeds)]
        return self.drawn[path]

    def told(self, way: tuple[str, ...]) -> str:
        return "".join(f"\nIf: {action}\nThen: {seen}" for action, seen in self.state(way).history)

    def rollout(self, i: int) -> None:
        way: tuple[str, ...] = ()
        path: list[tuple[str, ...]] = []
        while len(way) < self.settings.rap_depth_limit and (not path or self.visits[way]):
            actions = list(dict.fromkeys(self.proposals(way)))
            new = [action for action in actions if not self.visits[(*way, action)]]
            n = sum(self.visits[(*way, action)] for action in actions)
            way = (*way, new[0] if new else max(actions, key=lambda a, way=way, n=n: self.mean((*way, a)) + (
                self.settings.rap_uct_w * math.sqrt(math.log(n) / self.visits[(*way, a)]))))
            path.append(way)
        proposed = self.proposals(way[:-1])
        consistent = proposed.count(way[-1]) / len(proposed)
        while len(way) < self.settings.rap_depth_limit:
            way = (*way, self.greedy(way))
        if way not in self.verdicts:
            self.verdicts[way] = p_yes(policy_prompt(START.render(), "Helps", foresight=self.told(way) + self.notes))
        weight = self.settings.lats_lm_weight
        for each in path:
            self.visits[each] += 1
            self.total[each] += weight * self.verdicts[way] + (1 - weight) * consistent
        if self.verdicts[way] < 0.5 and self.reflections < 3:
            prompt = policy_prompt(START.render(), "Reflection", foresight=self.told(way))
            self.said.append(ACTIONS[int(len(ACTIONS) * unit(prompt, 0))])
            self.reflections += 1

    def mean(self, path: tuple[str, ...]) -> float:
        return self.total[path] / self.visits[path]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("changes", [{"rap_d_actions": 4, "rap_depth_limit": 3, "rap_uct_w": 0.1},
                                     {"rap_d_actions": 5, "rap_depth_limit": 4, "lats_lm_weight": 0.8},
                                     {"rap_depth_limit": 1}, {"rap_num_rollouts": 3, "lats_lm_weight": 1.0}])
def test_lats_grows_the_literal_tree(seed: int, changes: dict) -> None:
    lats, policy_lm, wm_lm = searcher(Lats, **changes)
    earlier = tuple(EarlierTrial(START, (), False, note) for note in ("a", "", "b"))
    tree = asyncio.run(lats.search(replace(view(seed=seed), earlier=earlier)))
    literal = LiteralLats(lats.settings, seed, ("a", "b"))
    for i in range(lats.settings.rap_num_rollouts):
        literal.rollout(i)
    ours = statistics(tree.root)
    assert {path: n for path, (n, _) in ours.items()} == {path: n for path, n in literal.visits.items() if n}
    assert all(total == pytest.approx(literal.total[path]) for path, (_, total) in ours.items())
    assert tree.notes == literal.notes and literal.reflections > 0
    reflected = [prompt for prompt, _ in policy_lm.asked if prompt.endswith("Reflection:")]
    assert len(reflected) == literal.reflections <= 3
    assert len(set(wm_lm.asked)) == len(wm_lm.asked)


def test_lats_looks_back_on_failed_trials_only() -> None:
    lats, policy_lm, _ = searcher(Lats)
    assert asyncio.run(lats.look_back(EarlierTrial(START, (), True), 1)) == "" and not policy_lm.asked
    assert asyncio.run(lats.look_back(EarlierTrial(START, (), False), 1)) in ACTIONS
    assert Lats.look_back is Reflexion.look_back  # one way of looking back


def nodes(node: Node) -> list[Node]:
    return [node, *(below for edge in node.edges.values() if edge.node for below in nodes(edge.node))]
