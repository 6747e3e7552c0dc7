"""Advantages against numbers worked out by hand and slow loops: of a critic, of groups, of steps at equal states."""

from __future__ import annotations

import math
import random
import statistics
import threading
from typing import Any

import pytest

from itp.distributed import Processes
from itp.training.itp_r.a2c_settings import RlSettings
from itp.training.itp_r.advantages import (
    Advantages, Played, advantages_of, gae, n_step_returns, normalized, token_credit,
)


def test_returns_by_hand() -> None:
    rewards, values = [1.0, 0.0, 2.0], [0.5, 0.25, 1.0]
    # n = 1: r + γV(s'); the end of the episode is worth nothing, unless it was only cut there.
    assert n_step_returns(rewards, values, 0.5, 1) == pytest.approx([1 + 0.125, 0.5, 2.0])
    assert n_step_returns(rewards, values, 0.5, 1, bootstrap=4.0) == pytest.approx([1.125, 0.5, 4.0])
    assert n_step_returns(rewards, values, 0.5, 2) == pytest.approx([1 + 0 + 0.25, 0 + 1.0, 2.0])
    assert n_step_returns(rewards, values, 0.5, 0) == pytest.approx([1 + 0 + 0.5, 1.0, 2.0])
    assert n_step_returns(rewards, values, 0.5, 0, bootstrap=4.0) == pytest.approx([1.5 + 0.5, 2.0, 4.0])


def test_gae_by_hand_and_by_its_sum() -> None:
    # δ = (1 + .5·.25 − .5, 0 + .5·1 − .25, 2 − 1) = (.625, .25, 1); γλ = .25
    assert gae([1.0, 0.0, 2.0], [0.5, 0.25, 1.0], 0.5, 0.5) == pytest.approx([0.625 + 0.0625 + 0.0625, 0.5, 1.0])
    draw = random.Random(1)
    rewards, values = [draw.gauss(0, 1) for _ in range(9)], [draw.gauss(0, 1) for _ in range(9)]
    after = [*values, 0.7]
    deltas = [r + 0.9 * after[t + 1] - after[t] for t, r in enumerate(rewards)]
    slow = [sum((0.9 * 0.8) ** (j - t) * deltas[j] for j in range(t, 9)) for t in range(9)]
    assert gae(rewards, values, 0.9, 0.8, 0.7) == pytest.approx(slow)


@pytest.mark.parametrize("lam, n", [(0.0, 1), (1.0, 0)])
def test_the_ends_of_gae_are_n_step_returns(lam: float, n: int) -> None:
    draw = random.Random(2)
    rewards, values = [draw.gauss(0, 1) for _ in range(6)], [draw.gauss(0, 1) for _ in range(6)]
    returns = n_step_returns(rewards, values, 0.97, n, 0.3)
    assert gae(rewards, values, 0.97, lam, 0.3) == pytest.approx([r - v for r, v in zip(returns, values, strict=True)])


def test_normalised_advantages() -> None:
    assert normalized([1.0, 3.0], [1.0, 3.0]) == pytest.approx([-1.0, 1.0])
    assert normalized([3.0], [1.0, 3.0, 1.0, 3.0]) == pytest.approx([1.0])
    assert normalized([2.0, 2.0], [2.0, 2.0]) == pytest.approx([0.0, 0.0])


# ---------------------------------------------------------------- of tokens


def test_the_credit_of_tokens_by_hand() -> None:
    """Two actions, of three drawn tokens and of one; γ = .5.

    V(s_0) = 1, within it 2 and 4; V(s_1) = 6; rewards 3 and 8.  δ: 2 − 1, 4 − 2, 3 + .5·6 − 4 and 8 − 6.
    """
    rewards, values, within = [3.0, 8.0], [1.0, 6.0], [[2.0, 4.0], []]
    td, targets = token_credit(rewards, values, within, 0.5, 0.0)
    assert td == [[1.0, 2.0, 2.0], [2.0]]
    assert targets == [[4.0, 6.0], []]  # before the second token the third one's value, before it r + γV(s_1)
    # λ = .5: the last token 2 + .5·.5·2, and backwards 2 + .5·2.5, 1 + .5·3.25
    credits, targets = token_credit(rewards, values, within, 0.5, 0.5)
    assert credits == [[2.625, 3.25, 2.5], [2.0]]
    assert targets == [[2 + 3.25, 4 + 2.5], []]
    # cut at the limit, where the last state is worth 10: 8 + .5·10 − 6
    assert token_credit(rewards, values, within, 0.5, 0.0, bootstrap=10.0)[0][1] == [7.0]


def test_tokens_and_actions_are_one_problem() -> None:
    """Bellman backups within and across actions agree: what POAD calls BAD."""
    draw = random.Random(4)
    rewards, values = [draw.gauss(0, 1) for _ in range(7)], [draw.gauss(0, 1) for _ in range(7)]
    within = [[draw.gauss(0, 1) for _ in range(draw.randrange(4))] for _ in range(7)]
    td, _ = token_credit(rewards, values, within, 0.9, 0.0, 0.3)
    assert [sum(own) for own in td] == pytest.approx(gae(rewards, values, 0.9, 0.0, 0.3))
    whole, _ = token_credit(rewards, values, within, 0.9, 1.0, 0.3)
    assert [own[0] for own in whole] == pytest.approx(gae(rewards, values, 0.9, 1.0, 0.3))
    alone, nothing = token_credit(rewards, values, [[]] * 7, 0.9, 0.7, 0.3)
    assert [a for a, in alone] == pytest.approx(gae(rewards, values, 0.9, 0.7, 0.3)) and nothing == [[]] * 7


# ---------------------------------------------------------------- within groups


def settings(**changes: Any) -> RlSettings:
    return RlSettings(policy_model="", out_dir="", **({"advantage": "group", "group_size": 2} | changes))


def played(group: str, rewards: list[float], observations: str = "") -> Played:
    """An episode whose observations are letters; those that aren't given are all different."""
    seen = list(observations) or [f"{group} {id(rewards)} {t}" for t in range(len(rewards))]
    return Played(group, rewards, [0.0] * len(rewards), seen)


def found(episodes: list[Played], **changes: Any) -> Advantages:
    return advantages_of(episodes, settings(**changes), Processes())


def test_groups_by_hand() -> None:
    """Returns 1 and 0 in one game, 3, 0 and 0 in the other: means .5 and 1, deviations .5 and √2."""
    episodes = [played("a", [0.0, 1.0]), played("b", [3.0]), played("a", [0.5, -0.5, 0.0]), played("b", [0.0, 0.0]),
                played("b", [1.0, -1.0])]
    made = found(episodes)
    assert made.steps == [[0.5, 0.5], [2.0], [-0.5] * 3, [-1.0, -1.0], [-1.0, -1.0]]
    root = 2 ** 0.5
    scaled = found(episodes, group_std=True)
    assert scaled.steps[0] == pytest.approx([1.0, 1.0]) and scaled.steps[2] == pytest.approx([-1.0] * 3)
    assert scaled.steps[1] == pytest.approx([root]) and scaled.steps[3] == pytest.approx([-1 / root] * 2)
    assert made.figures == pytest.approx({"groups_with_signal": 1.0, "advantage_mean": -2.5 / 10,
                                          "advantage_abs": 8.5 / 10, "advantage_std": statistics.pstdev(
                                              [0.5, 0.5, 2, -0.5, -0.5, -0.5, -1, -1, -1, -1])})
    assert found(episodes[:2], gamma=0.5).targets == [[0.5, 1.0], [3.0]]


@pytest.mark.parametrize("by_std", [False, True])
def test_where_all_returns_are_equal_nothing_is_learned(by_std: bool) -> None:
    """Also where equal sums differ in their last bits, and where an episode is alone."""
    split_otherwise = [0.1, 0.2], [0.3], [0.2, 0.1]
    assert len({math.fsum(rewards) for rewards in split_otherwise}) > 1
    made = found([*(played("a", rewards) for rewards in split_otherwise), played("b", [5.0, 1.0]), played("c", [1.0]),
                  played("c", [2.0])], group_std=by_std)
    assert [any(steps) for steps in made.steps] == [False] * 4 + [True] * 2
    assert made.figures["groups_with_signal"] == pytest.approx(1 / 3)


def test_an_episode_without_a_step_is_compared_with_nothing() -> None:
    made = found([played("a", []), played("a", [-1.0]), played("a", [-3.0])])
    assert made.steps == [[], [1.0], [-1.0]]


@pytest.mark.parametrize("by_std", [False, True])
def test_the_advantages_of_a_group_have_mean_0(by_std: bool) -> None:
    draw = random.Random(4)
    episodes = [played(draw.choice("abc"), [draw.gauss(0, 1) for _ in range(draw.randint(1, 9))]) for _ in range(40)]
    made = found(episodes, group_std=by_std)
    for name in "abc":
        own = [steps[0] for e, steps in zip(episodes, made.steps, strict=True) if e.group == name]
        assert statistics.fmean(own) == pytest.approx(0, abs=1e-9) and len(own) > 2
        assert statistics.pstdev(own) == pytest.approx(1.0 if by_std else statistics.pstdev(
            [sum(e.rewards) for e in episodes if e.group == name]))
    assert all(len(set(steps)) == 1 for steps in made.steps)


def test_equal_states_by_hand() -> None:
    """γ .5 and ω 2.  In game a state x is met at steps 0 and 2 of the first episode, and at step 0 of the second.

    Returns from there are .25, 1 and 0, their mean 5/12; y and z are met once; x of game b is another state.
    """
    episodes = [played("a", [0.0, 0.0, 1.0], "xyx"), played("a", [0.0, 0.0], "xz"), played("b", [5.0], "x")]
    made = found(episodes, advantage="gigpo", step_weight=2.0, gamma=0.5)
    assert made.steps[0] == pytest.approx([0.5 + 2 * (1 / 4 - 5 / 12), 0.5, 0.5 + 2 * (1 - 5 / 12)])
    assert made.steps[1] == pytest.approx([-0.5 - 2 * 5 / 12, -0.5]) and made.steps[2] == [0.0]
    assert made.figures["groups_with_signal"] == 0.5
    deviation = statistics.pstdev([1 / 4, 1, 0])
    scaled = found(episodes, advantage="gigpo", step_weight=2.0, gamma=0.5, group_std=True)
    assert scaled.steps[0] == pytest.approx([1 + 2 * (1 / 4 - 5 / 12) / deviation, 1.0,
                                             1 + 2 * (1 - 5 / 12) / deviation])
    assert found(episodes, advantage="gigpo", step_weight=0.0).steps == found(episodes).steps


def test_equal_states_tell_steps_apart_where_all_returns_are_equal() -> None:
    episodes = [played("a", [1.0, 0.0], "xy"), played("a", [0.0, 1.0], "xy")]
    assert found(episodes, gamma=0.5).figures["groups_with_signal"] == 0
    made = found(episodes, advantage="gigpo", gamma=0.5)  # from x 1 and .5, from y 0 and 1
    assert made.steps == [[0.25, -0.5], [-0.25, 0.5]] and made.figures["groups_with_signal"] == 1


class Threads(Processes):
    """One of several processes, which here are threads."""

    def __init__(self, rank: int, meeting: threading.Barrier, given: dict[int, list]) -> None:
        self.rank, self.count = rank, meeting.parties
        self._meeting, self._given = meeting, given

    def gather(self, values: list) -> list:
        self._given[self.rank] = values
        self._meeting.wait()
        everyone = [value for rank in range(self.count) for value in self._given[rank]]
        self._meeting.wait()
        return everyone


@pytest.mark.parametrize("advantage", ["group", "gigpo"])
def test_a_group_in_several_processes_is_one_group(advantage: str) -> None:
    """Its episodes are dealt out one by one, and a third process has none."""
    episodes = [played("a", [0.0, 1.0], "xx"), played("a", [0.25, 0.0], "xy"), played("b", [2.0], "x"),
                played("b", [1.0, -4.0], "xx")]
    chosen, meeting, given, made = settings(advantage=advantage), threading.Barrier(3), {}, {}

    def work(rank: int) -> None:
        own = episodes[rank::2] if rank < 2 else []
        made[rank] = advantages_of(own, chosen, Threads(rank, meeting, given))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    whole = advantages_of(episodes, chosen, Processes())
    assert (made[0].steps, made[1].steps, made[2].steps) == (whole.steps[::2], whole.steps[1::2], [])
    for each in made.values():
        assert each.figures == pytest.approx(whole.figures)
