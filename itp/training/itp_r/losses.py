r"""The formulas of stage 3, online A2C (eq. 7 and 8), as pure functions.

    r_{t+1} = r_env − λ_K·K_t − λ_step  (+ success bonus, + invalid-action penalty)             (eq. 7)
    L = L_act + α·L_value + β·L_ent                                                              (eq. 8)
    L_act = −E[A_t (log P_θ(K_t|s_t) + log π_θ(a_t|s_t, τ̂_t(K_t)))],  A_t = V̂_t − V_θ(s_t)
    L_value = E[(V_θ(s_t) − V̂_t)²],   L_ent = −E[H(P_θ(K|s_t))]

A_t and V̂_t come from :mod:`itp.training.itp_r.advantages`.  Everything with a gradient is a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Allowed = Sequence[Sequence[int] | None]
"""What each token was drawn from (:class:`itp.lm.base.Trace`): None the whole vocabulary, one id a forced token."""


def reward(env_reward: float, k: int, *, success: bool, invalid: bool, lambda_k: float, step_cost: float,
           success_bonus: float, invalid_action_penalty: float, efficacy: float = 1.0) -> float:
    """r_{t+1} of eq. 7.  ``invalid_action_penalty`` is what is added, a negative number.

    ``efficacy``: a factor of what the environment and success are worth, and not of what steps cost.
    """
    return (env_reward * efficacy - lambda_k * k - step_cost
            + (success_bonus * efficacy if success else 0.0) + (invalid_action_penalty if invalid else 0.0))


def k_entropy(k_logits: torch.Tensor) -> torch.Tensor:
    """H(P_θ(K|s)) in nats: (N, K_max + 1) logits -> (N,)."""
    logprobs = k_logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], allowed: Allowed,
                   temperature: float) -> torch.Tensor:
    """Log-probabilities of tokens that were drawn from softmax(logits / ``temperature``) over ``allowed``.

    ``logits`` (n, V) are those that predict the n tokens.  Returns (n,) in float32; a forced token has 0.
    """
    found = logits.new_zeros(len(token_ids), dtype=torch.float32)
    whole = [i for i, ids in enumerate(allowed) if ids is None]
    some = [i for i, ids in enumerate(allowed) if ids is not None and len(ids) > 1]
    if whole:
        targets = torch.tensor([token_ids[i] for i in whole], device=logits.device)
        logprobs = (logits[whole].float() / temperature).log_softmax(-1)
        found = found.index_put((_index(whole, logits),), logprobs.gather(1, targets[:, None])[:, 0])
    if some:
        width = max(len(allowed[i]) for i in some)
        options = torch.tensor([[*allowed[i], *[0] * (width - len(allowed[i]))] for i in some], device=logits.device)
        lengths = torch.tensor([len(allowed[i]) for i in some], device=logits.device)
        places = torch.tensor([list(allowed[i]).index(token_ids[i]) for i in some], device=logits.device)
        rows = logits[_index(some, logits)[:, None], options].float() / temperature  # (m, width)
        rows = rows.masked_fill(torch.arange(width, device=logits.device) >= lengths[:, None], float("-inf"))
        found = found.index_put((_index(some, logits),), rows.log_softmax(-1).gather(1, places[:, None])[:, 0])
    return found


def _index(rows: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rows, device=like.device)


@dataclass(frozen=True)
class ByToken:
    """What the drawn tokens of N actions add to the loss.

    ``acting``: Σ_i A_{t,i} log π_θ(w_i|·), (N,).  ``within``: squared errors of V_θ within actions, (W,), each of the
    action with the number in ``step``, (W,).
    """

    acting: torch.Tensor
    within: torch.Tensor
    step: torch.Tensor

    def errors(self, values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean squared error of each step's values, those within its action included: (N,)."""
        counts = torch.ones_like(values).index_add(0, self.step, torch.ones_like(self.within))
        return (values - targets).square().index_add(0, self.step, self.within) / counts


def a2c_loss(action_logprobs: torch.Tensor, k_logprobs: torch.Tensor, entropies: torch.Tensor, values: torch.Tensor,
             advantages: torch.Tensor, targets: torch.Tensor, *, value_coef: float, entropy_coef: float,
             count: int | None = None, by_token: ByToken | None = None) -> tuple[torch.Tensor, dict[str, float]]:
    """Eq. 8 on N steps (every argument is (N,)), and its parts L_act, L_value, L_ent.

    ``advantages`` and ``targets`` are constants.  ``count``: the steps of the whole batch that these N are
    a part of; the losses of the parts then add up to the batch's.  ``by_token``: where the tokens of an action have
    advantages of their own, these take the place of A_t log π_θ(a_t|·) and of (V_θ(s_t) − V̂_t)².
    """
    count = count or len(values)
    if by_token is None:
        act = -(advantages * (k_logprobs + action_logprobs)).sum() / count
        value = (values - targets).square().sum() / count
    else:
        act = -(advantages * k_logprobs + by_token.acting).sum() / count
        value = by_token.errors(values, targets).sum() / count
    entropy = -entropies.sum() / count
    total = act + value_coef * value + entropy_coef * entropy
    return total, {"loss_act": act.item(), "loss_value": value.item(), "loss_ent": entropy.item()}
