r"""Pseudo-labels (eq. 5) of one step: how far would it have paid to look ahead?

    K̃_t = argmax_{0 <= k <= K_max} [ log π_θ0(a*_t | s_t, τ̂_t(k)) − λ_K·k ], ties to the smaller k.

The longest trajectory is imagined once; those of smaller k are its beginnings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from itp.agent.imagination import ImaginedTrajectory, imagine
from itp.agent.policy import Policy
from itp.agent.world_model import WorldModel
from itp.lm.base import Usage, metered
from itp.seeding import derive_seed
from itp.text.prompts import action_target, foresight_text
from itp.text.state import State
from itp.training.itp_r.expert_steps import ExpertStep
from itp.training.itp_r.label_settings import LabelSettings


def penalized(logprobs: dict[int, float], lambda_k: float) -> dict[int, float]:
    """log π_θ0(a*|s, τ̂(k)) − λ_K·k for every candidate k."""
    return {k: value - lambda_k * k for k, value in sorted(logprobs.items())}


def best_k(scores: dict[int, float]) -> int:
    """K̃_t: the k of the highest score, of equal ones the smallest."""
    return min(scores, key=lambda k: (-scores[k], k))


@dataclass(frozen=True)
class Labeler:
    """Eq. 5 on one row.  Written as if alone: rows that run at the same time become batches in the LMs."""

    policy: Policy
    world_model: WorldModel
    candidates: tuple[int, ...]
    settings: LabelSettings

    async def label(self, row: ExpertStep) -> dict[str, Any]:
        """What is added to the row.  Raises PromptTooLong where the model's context doesn't hold a prompt."""
        with metered() as imagining:
            trajectory = await self._imagine(row)
        # An episode that ends sooner has no teacher-forced future beyond.
        candidates = [k for k in self.candidates if k <= len(trajectory.steps)]
        target = action_target(row.transition.expert_action)
        with metered() as scoring:
            totals, sizes, alone = await self._score(row, trajectory, candidates, target)
        norm = 1 if self.settings.logprob_norm == "sum" else sizes
        scores = penalized({k: v / norm for k, v in totals.items()}, self.settings.lambda_k)
        return {
            "k_label": best_k(scores),
            **self._imagined(row, trajectory),
            "scores": scores,
            "logprobs": totals,
            "tokens": {"imagine": computed(imagining.get("policy")), "score": computed(scoring["policy"]),
                       "largest_alone": alone, "world_model": computed(imagining.get("world_model")),
                       "target": sizes},
            "shortened": sum(usage.shortened for spent in (imagining, scoring) for usage in spent.values()),
        }

    async def _imagine(self, row: ExpertStep) -> ImaginedTrajectory:
        k = self.candidates[-1]
        if self.settings.imagination == "teacher_forced":
            forced = row.forced[:k]
            return await imagine(_Recorded(iter(forced)), self.world_model, row.state, len(forced), seed=0)
        return await imagine(self.policy, self.world_model, row.state, k, self._seed(row))

    def _seed(self, row: ExpertStep) -> int:
        return derive_seed(self.settings.seed, row.transition.episode_id, row.transition.step)

    def _imagined(self, row: ExpertStep, trajectory: ImaginedTrajectory) -> dict[str, Any]:
        """What a row says of what was imagined."""
        seen = [row.state.observation, *(observation for _, observation in trajectory.steps)]
        return {"obs_list": [seen[min(k, len(seen) - 1)] for k in range(self.settings.max_k + 1)],
                "imagined": [list(step) for step in trajectory.steps]}

    async def close(self) -> None:
        """Release both models."""
        for lm in (self.policy.lm, self.world_model.lm):
            await lm.close()

    async def _score(self, row: ExpertStep, trajectory: ImaginedTrajectory, candidates: Sequence[int],
                     target: str) -> tuple[dict[int, float], int, int]:
        """({k: log π_θ0(a*|s, τ̂(k))}, tokens of a*, tokens computed for the largest k).

        The largest k goes first and alone.  Its prompt holds the beginnings of all others, so that these,
        one batch, cost only what differs: the label and the action.
        """
        futures = [foresight_text(trajectory.steps[:k], self.policy.foresight_format) for k in candidates]
        tokens = self.policy.budget.longest([target])
        pairs = [(self.policy.action_prompt(row.state, tokens, foresight=future), target) for future in futures]
        largest = await self.policy.lm.loglikelihood(pairs[-1:])
        answers = [*await self.policy.lm.loglikelihood(pairs[:-1]), *largest]
        totals = {k: answer.total for k, answer in zip(candidates, answers, strict=True)}
        return totals, len(largest[0].logprobs), largest[0].prompt_tokens - largest[0].cached_tokens


class _Recorded:
    """Proposes what the expert did."""

    def __init__(self, actions: Iterator[str]) -> None:
        self.actions = actions

    async def propose(self, state: State, seed: int) -> str:
        return next(self.actions)


def computed(usage: Usage | None) -> int:
    """Tokens that really went through the model."""
    return usage.tokens - usage.cached_tokens if usage else 0
