r"""The advantage A_t of each step of a batch of episodes, which weighs its log-probabilities in eq. 8.

    critic   A_t = V̂_t − V_θ(s_t), the paper's; V̂_t is the TD target (``--n_steps 1``), a longer return, or GAE's
    group    A_t = R − mean(R), the same for all steps of an episode: GRPO (Shao et al. 2024, arXiv 2402.03300)
    gigpo    A_t = R − mean(R) + ω (G_t − mean(G)): GiGPO (Feng et al. 2025, arXiv 2505.10978)

R = Σ_t r_{t+1} is an episode's return without discount, and mean(R) that of its *group*: the episodes of its game and
mission in the batch, which the same weights played with different seeds.  G_t = Σ_i γ^i r_{t+i+1} is the return from
step t on, and mean(G) that of the steps at *equal states*.  Two states are equal if they belong to episodes of one
group and their current observations are the same text; GiGPO calls the observation an anchor state.  Several steps of
one episode may be at equal states.  Histories aren't compared, so a text that several places give ("Nothing happens.")
counts as one state.  ``--group_std`` divides both differences by the standard deviation of what they are compared with.

``group`` and ``gigpo`` need no V_θ.  Here are plain floats only, and no torch.

With ``--credit token`` each token of an action has an advantage of its own (:func:`token_credit`), after POAD (Wen et
al. 2024, arXiv 2405.15821).  V_θ is read after each of its tokens, too.  Within an action the next token's state is
worth as much as this one promised, without reward and discount; the last token has the reward and γ V_θ(s_{t+1}).

    A_{t,i} = V_θ(s_t, w_{≤i}) − V_θ(s_t, w_{<i}) + λ A_{t,i+1}                                  i < m
    A_{t,m} = r_{t+1} + γ V_θ(s_{t+1}) − V_θ(s_t, w_{<m}) + γλ A_{t+1,1}

So at λ = 0 the advantages of an action's tokens add up to the action's TD advantage, and at λ = 1 that of its first
token is the action's own.  Departures from POAD: A2C in place of PPO, so no ratio is clipped and there is no target
network; tokens that were forced (the only admissible ones) are no decisions, and have none; K_t and V_θ at ``<CTRL>``
are learned by action, as without ``--credit token``.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from itp.distributed import Processes
    from itp.training.itp_r.a2c_settings import RlSettings

ROUNDING = 1e-9
"""Values that are no further apart are equal: sums of the same rewards in another order differ in their last bits."""
Keyed = tuple[Hashable, float]
"""A value, and the group in which it is compared."""


@dataclass(frozen=True)
class Played:
    """What the advantages of an episode of T steps are made of.

    ``group``: its game.  ``rewards``: r_1 ... r_T of eq. 7.  ``values``: V_θ(s_0) ... V_θ(s_{T−1}) by the
    weights that acted; ``bootstrap`` stands for V_θ(s_T).  ``observations``: the current ones of s_0 ... s_{T−1}.
    """

    group: Hashable
    rewards: list[float]
    values: list[float]
    observations: list[str]
    bootstrap: float = 0.0


@dataclass(frozen=True)
class Advantages:
    """``steps``: A_t, and ``targets``: V̂_t of each step of each episode; ``figures``: of all processes' episodes.

    Without a critic nothing learns V̂_t, which then is G_t.
    """

    steps: list[list[float]]
    targets: list[list[float]]
    figures: dict[str, float] = field(default_factory=dict)


def advantages_of(episodes: Sequence[Played], settings: RlSettings, processes: Processes) -> Advantages:
    """The advantages of this process's ``episodes``, in relation to those of all processes."""
    found = (_by_critic if settings.has_critic else _by_groups)(episodes, settings, processes)
    everyone = processes.gather([a for advantages in found.steps for a in advantages])
    figures = {"advantage_mean": statistics.fmean(everyone), "advantage_std": statistics.pstdev(everyone),
               "advantage_abs": statistics.fmean(map(abs, everyone))} | found.figures
    steps = found.steps
    if settings.normalize_advantages:
        steps = [normalized(advantages, everyone) for advantages in steps]
    return Advantages(steps, found.targets, figures)


# ---------------------------------------------------------------- with a critic


def _by_critic(episodes: Sequence[Played], settings: RlSettings, processes: Processes) -> Advantages:
    found = [_of_episode(episode, settings) for episode in episodes]
    targets = processes.gather([target for _, targets in found for target in targets])
    values = processes.gather([value for episode in episodes for value in episode.values])
    return Advantages([advantages for advantages, _ in found], [targets for _, targets in found], {
        "value_mean": statistics.fmean(values), "target_mean": statistics.fmean(targets),
        "explained_variance": 1 - statistics.pvariance([t - v for t, v in zip(targets, values, strict=True)])
        / (statistics.pvariance(targets) + 1e-8)})


def _of_episode(episode: Played, settings: RlSettings) -> tuple[list[float], list[float]]:
    """(A_t, V̂_t) of every step, by the values that the acting weights gave."""
    rewards, values = episode.rewards, episode.values
    if settings.n_steps:
        targets = n_step_returns(rewards, values, settings.gamma, settings.n_steps, episode.bootstrap)
        return [target - value for target, value in zip(targets, values, strict=True)], targets
    advantages = gae(rewards, values, settings.gamma, settings.gae_lambda, episode.bootstrap)
    return advantages, [a + value for a, value in zip(advantages, values, strict=True)]


def n_step_returns(rewards: Sequence[float], values: Sequence[float], gamma: float, n: int,
                   bootstrap: float = 0.0) -> list[float]:
    """V̂_t = Σ_{i<n} γ^i r_{t+i+1} + γ^n V(s_{t+n}), for an episode of T steps: T numbers.

    ``values``: V(s_0) ... V(s_{T−1}).  ``n`` 1 is the TD target, 0 the whole rest of the episode.
    ``bootstrap`` stands for V(s_T): 0 where the episode ended there.
    """
    length, after = len(rewards), [*values, bootstrap]
    returns = []
    for t in range(length):
        end = min(t + n, length) if n else length
        target = after[end]
        for i in reversed(range(t, end)):
            target = rewards[i] + gamma * target
        returns.append(target)
    return returns


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float,
        bootstrap: float = 0.0) -> list[float]:
    """Advantages A_t = Σ_i (γλ)^i δ_{t+i},  δ_t = r_{t+1} + γV(s_{t+1}) − V(s_t); V̂_t is A_t + V(s_t).

    λ 0 is the TD target's advantage, λ 1 that of the whole return.
    """
    after, advantage = [*values, bootstrap], 0.0
    advantages = [0.0] * len(rewards)
    for t in reversed(range(len(rewards))):
        advantage = rewards[t] + gamma * after[t + 1] - after[t] + gamma * lam * advantage
        advantages[t] = advantage
    return advantages


def token_credit(rewards: Sequence[float], values: Sequence[float], within: Sequence[Sequence[float]], gamma: float,
                 lam: float, bootstrap: float = 0.0) -> tuple[list[list[float]], list[list[float]]]:
    """(A_{t,i}, V̂_{t,i}) of an episode of T steps: of its decisions, and of ``within``.

    ``values``: V(s_0) ... V(s_{T−1}); ``bootstrap`` stands for V(s_T).  ``within[t]``: V(s_t, w_{<i}) before the second
    to the last token of a_t that was drawn.  A step has one advantage more than values within; where nothing was drawn,
    it is that of the whole action.
    """
    after, advantage = bootstrap, 0.0
    advantages: list[list[float]] = [[]] * len(rewards)
    for t in reversed(range(len(rewards))):
        before = [values[t], *within[t]]
        advantage = rewards[t] + gamma * after - before[-1] + gamma * lam * advantage
        credits = [advantage]
        for here, following in reversed(list(itertools.pairwise(before))):
            advantage = following - here + lam * advantage
            credits.append(advantage)
        advantages[t], after = credits[::-1], values[t]
    return advantages, [[a + value for a, value in zip(own[1:], inner, strict=True)]
                        for own, inner in zip(advantages, within, strict=True)]


def normalized(advantages: Sequence[float], among: Sequence[float]) -> list[float]:
    """Advantages in deviations from the mean of those of the whole batch, ``among``."""
    mean = sum(among) / len(among)
    deviation = (sum((a - mean) ** 2 for a in among) / len(among)) ** 0.5
    return [(a - mean) / (deviation + 1e-8) for a in advantages]


# ---------------------------------------------------------------- within groups


def _by_groups(episodes: Sequence[Played], settings: RlSettings, processes: Processes) -> Advantages:
    returns = [(episode.group, math.fsum(episode.rewards)) for episode in episodes if episode.rewards]
    relative = iter(relative_to_group(returns, processes.gather(returns), by_std=settings.group_std))
    steps = [[next(relative)] * len(episode.rewards) if episode.rewards else [] for episode in episodes]
    to_go = [n_step_returns(e.rewards, [0.0] * len(e.rewards), settings.gamma, 0) for e in episodes]
    if settings.advantage == "gigpo":
        at_states = [((e.group, seen), value) for e, values in zip(episodes, to_go, strict=True)
                     for seen, value in zip(e.observations, values, strict=True)]
        own = iter(relative_to_group(at_states, processes.gather(at_states), by_std=settings.group_std))
        steps = [[advantage + settings.step_weight * next(own) for advantage in advantages] for advantages in steps]
    signals = processes.gather([(e.group, any(a)) for e, a in zip(episodes, steps, strict=True)])
    with_signal = {group for group, signal in signals if signal}
    return Advantages(steps, to_go, {"groups_with_signal": len(with_signal) / len({group for group, _ in signals})})


def relative_to_group(values: Sequence[Keyed], everyone: Sequence[Keyed], *, by_std: bool) -> list[float]:
    """Each of ``values`` minus the mean of its group in ``everyone``, which holds ``values``, too.

    ``by_std``: in standard deviations of the group, those of a population.  Where all values of a group are equal, also
    where it has one only, this is exactly 0.
    """
    groups: dict[Hashable, list[float]] = {}
    for group, value in everyone:
        groups.setdefault(group, []).append(value)
    centers = {group: statistics.fmean(members) for group, members in groups.items()}
    scales = {group: _scale(members, by_std) for group, members in groups.items()}
    return [(value - centers[group]) * scales[group] for group, value in values]


def _scale(members: Sequence[float], by_std: bool) -> float:
    """The factor of differences from the mean of ``members``."""
    if max(members) - min(members) <= ROUNDING:
        return 0.0
    return 1 / statistics.pstdev(members) if by_std else 1.0
