"""The tree that tree search grows in imagination: statistics of its edges, and model calls made only once.

A node is a real or imagined state.  The actions to be tried there are the policy's own proposals: the greedy one,
and, when the search comes to the node a second time, draws.  What the models answered stays in the node, so no
prompt of a tree is computed twice, however often rollouts come by.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from itp.agent.imagination import ImaginedTrajectory
from itp.agent.policy import Choice, Policy, distinct
from itp.agent.world_model import Dynamics
from itp.methods.base import Decision, decide
from itp.seeding import derive_seed
from itp.text.state import State


@dataclass
class Edge:
    """An action in a state: N(s,a), the sum of its returns, and what the models say of it."""

    choice: Choice
    reward: float
    visits: int = 0
    total: float = 0.0
    node: Node | None = None
    """Where it leads; None until somebody looked."""

    @property
    def value(self) -> float:
        """Q(s,a), the mean return."""
        return self.total / self.visits if self.visits else 0.0


@dataclass
class Node:
    """A state, the actions proposed in it, and the edges of those that were tried."""

    state: State
    seed: int
    choices: list[Choice] = field(default_factory=list)
    complete: bool = False
    """All proposals are there, not just the greedy one."""
    shares: dict[str, float] = field(default_factory=dict)
    """Action -> the share of all proposals that were this one, once they are there."""
    edges: dict[str, Edge] = field(default_factory=dict)


Reward = Callable[[Node, Choice], Awaitable[float]]
Path = list[tuple[Node, Edge]]


class Tree:
    """``actions``: how many proposals a node has at most.  ``reward``: r(s,a), asked once for every edge.

    ``notes``: lines that the proposals made from now on read.
    """

    def __init__(self, root: Node, policy: Policy, world_model: Dynamics, actions: int, reward: Reward) -> None:
        self.root, self.policy, self.world_model = root, policy, world_model
        self.actions, self.reward, self.notes = actions, reward, ""

    async def widen(self, node: Node, admissible: Sequence[str] | None = None) -> list[Choice]:
        """All proposals of a node, in one batch.  ``admissible``: of the root, which alone is real."""
        if not node.complete:
            greedy, sampled = await asyncio.gather(
                self.greedy(node, admissible),
                self.policy.sample(node.state, admissible, self.actions - 1, derive_seed(node.seed, "drawn"),
                                   temperature=self.policy.temperature or 1.0, imagined=node is not self.root,
                                   notes=self.notes))
            proposed = [greedy, *sampled]
            node.shares = {action: n / len(proposed) for action, n in Counter(c.action for c in proposed).items()}
            node.choices, node.complete = distinct(proposed), True
        return node.choices

    async def greedy(self, node: Node, admissible: Sequence[str] | None = None) -> Choice:
        """The first proposal of a node: the policy's most likely action."""
        if not node.choices:
            node.choices = await self.policy.sample(node.state, admissible, 1, node.seed, temperature=0.0,
                                                    imagined=node is not self.root, notes=self.notes)
        return node.choices[0]

    async def follow(self, node: Node, choice: Choice, look: bool = True) -> Edge:
        """The edge of ``choice``, with its reward; ``look``: and with the state that it leads to."""
        edge = node.edges.get(choice.action)
        wanted = []
        if edge is None:
            edge = node.edges[choice.action] = Edge(choice, math.nan)
            wanted.append(self._judge(node, edge))
        if look and edge.node is None:
            wanted.append(self._predict(node, edge))
        await asyncio.gather(*wanted)
        return edge

    async def _judge(self, node: Node, edge: Edge) -> None:
        edge.reward = await self.reward(node, edge.choice)

    async def _predict(self, node: Node, edge: Edge) -> None:
        action = edge.choice.action
        observation, = await self.world_model.step([node.state], [action])
        edge.node = Node(node.state.after(action, observation), derive_seed(node.seed, action))

    async def select(self, depth: int, uct_w: float) -> Path:
        """From the root by UCT to the first edge that was never visited, or to ``depth``."""
        path: Path = []
        while len(path) < depth:
            node = path[-1][1].node if path else self.root
            choices = await self.widen(node)
            if node is not self.root:
                # All rewards in one batch, though a few of these edges are never taken.
                await asyncio.gather(*(self.follow(node, choice, look=False) for choice in choices))
            choice = _uct(node, choices, uct_w)
            path.append((node, await self.follow(node, choice, look=len(path) + 1 < depth)))
            if path[-1][1].visits == 0:
                break
        return path

    async def simulate(self, path: Path, depth: int) -> Path:
        """Go on from the end of ``path`` with the policy's most likely actions, up to ``depth`` steps in all."""
        path = list(path)
        while len(path) < depth:
            node = path[-1][1].node
            path.append((node, await self.follow(node, await self.greedy(node), look=len(path) + 1 < depth)))
        return path

    def decision(self, remember: bool = False) -> Decision:
        """The root's most visited action (of equals the one with the highest value), and what it was compared with.

        What was imagined is the most visited path that starts with it.  ``remember``: keep the subtree.
        """
        edges = [edge for c in self.root.choices if (edge := self.root.edges.get(c.action)) and edge.visits]
        if not edges:  # with one action to choose from nothing was searched
            return decide(self.root.choices[0])
        best = edge = max(edges, key=lambda e: (e.visits, e.value))
        trajectory = ImaginedTrajectory(self.root.state)
        while edge is not None and edge.node is not None:
            trajectory = trajectory.then(edge.choice.action, edge.node.state.observation)
            edge = max((e for e in edge.node.edges.values() if e.visits), key=lambda e: e.visits, default=None)
        return decide(best.choice, k=len(trajectory.steps), imagined=trajectory,
                      considered=tuple((e.choice.action, e.value, e.visits) for e in edges),
                      memory=best.node if remember else None)


def _uct(node: Node, choices: Sequence[Choice], uct_w: float) -> Choice:
    """argmax_a Q(s,a) + w sqrt(ln N(s) / N(s,a)); what was never tried goes first, in the order of proposal."""
    edges = [node.edges.get(choice.action) for choice in choices]
    for choice, edge in zip(choices, edges, strict=True):
        if edge is None or not edge.visits:
            return choice
    log_n = math.log(sum(edge.visits for edge in edges))
    return max(edges, key=lambda e: e.value + uct_w * math.sqrt(log_n / e.visits)).choice


def backup(path: Path, returns: Sequence[float]) -> None:
    """Count a visit of every edge of ``path`` with its return."""
    for (_, edge), value in zip(path, returns, strict=True):
        edge.visits += 1
        edge.total += value
