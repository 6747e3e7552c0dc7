"""Eq. 7 and 8 against numbers worked out by hand and slow loops."""

from __future__ import annotations

import math
import random

import pytest
import torch

from itp.training.itp_r.losses import ByToken, a2c_loss, k_entropy, reward, token_logprobs

PAPER = {"lambda_k": 0.2, "step_cost": 0.01, "success_bonus": 0.01, "invalid_action_penalty": -0.1}


def test_the_reward_of_equation_7() -> None:
    assert reward(0.0, 0, success=False, invalid=False, **PAPER) == pytest.approx(-0.01)
    assert reward(0.0, 3, success=False, invalid=False, **PAPER) == pytest.approx(-0.61)
    assert reward(0.0, 1, success=False, invalid=True, **PAPER) == pytest.approx(-0.31)
    assert reward(1.0, 2, success=True, invalid=False, **PAPER) == pytest.approx(1 - 0.4 - 0.01 + 0.01)


def test_the_entropy_of_k() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(1), math.log(3), -1e9, -1e9], [50.0, -50.0, -50.0, -50.0]])
    by_hand = [math.log(4), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), 0.0]
    assert k_entropy(logits).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_the_log_probability_of_what_was_drawn() -> None:
    logits = torch.log(torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 4.0, 2.0], [5.0, 1.0, 1.0, 1.0]]))
    allowed = [None, (1, 2), (3,)]
    by_hand = [math.log(0.4), math.log(4 / 5), 0.0]
    assert token_logprobs(logits, [3, 2, 3], allowed, 1.0).tolist() == pytest.approx(by_hand)
    # At temperature .5 the odds are squared.
    squared = [math.log(16 / 30), math.log(16 / 17), 0.0]
    assert token_logprobs(logits, [3, 2, 3], allowed, 0.5).tolist() == pytest.approx(squared)


def test_token_log_probabilities_equal_a_slow_loop_with_gradient() -> None:
    torch.manual_seed(0)
    draw = random.Random(3)
    logits = torch.randn(40, 11, requires_grad=True)
    tokens, allowed = [], []
    for _ in range(40):
        ids = draw.sample(range(11), draw.randint(1, 6))
        tokens.append(draw.choice(ids))
        allowed.append(None if draw.random() < 0.3 else tuple(ids))
    slow = torch.stack([(logits[i, tokens[i]] / 0.7) - torch.logsumexp(logits[i, list(ids or range(11))] / 0.7, 0)
                        for i, ids in enumerate(allowed)])
    fast = token_logprobs(logits, tokens, allowed, 0.7)
    assert fast.tolist() == pytest.approx(slow.tolist(), abs=1e-5)
    wanted, = torch.autograd.grad(slow.sum(), logits)
    given, = torch.autograd.grad(fast.sum(), logits)
    assert torch.allclose(wanted, given, atol=1e-6)


def test_a_rescaled_reward_leaves_the_costs() -> None:
    # .25·(1 + .01) − .2·2 − .01
    assert reward(1.0, 2, success=True, invalid=False, **PAPER, efficacy=0.25) == pytest.approx(-0.1575)
    assert reward(0.0, 0, success=False, invalid=True, **PAPER, efficacy=0.0) == pytest.approx(-0.11)


def test_the_loss_of_equation_8() -> None:
    action, k = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -1.5])
    values = torch.tensor([0.5, 1.0], requires_grad=True)
    entropies, advantages, targets = torch.tensor([0.7, 0.9]), torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0])
    # L_act = −(2·(−1.5) − 1·(−3.5)) / 2 = −.25;  L_value = (.25 + 4) / 2;  L_ent = −.8
    total, parts = a2c_loss(action, k, entropies, values, advantages, targets, value_coef=0.5, entropy_coef=0.1)
    assert parts == pytest.approx({"loss_act": -0.25, "loss_value": 2.125, "loss_ent": -0.8})
    assert float(total) == pytest.approx(-0.25 + 0.5 * 2.125 - 0.08)
    total.backward()
    assert values.grad.tolist() == pytest.approx([0.5 * (0.5 - 1.0), 0.5 * (1.0 - 3.0)])  # α·2(V − V̂)/N


def test_the_loss_where_tokens_have_their_own_advantages() -> None:
    """The first action has two drawn tokens and a value between them, the second one token."""
    k = torch.tensor([-0.5, -1.5])
    values, within = torch.tensor([0.5, 1.0], requires_grad=True), torch.tensor([0.25])
    by_token = ByToken(torch.tensor([3.0 * -0.25 + 1.0 * -2.0, -4.0 * -1.0]), within, torch.tensor([0]))
    advantages, targets = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0])
    total, parts = a2c_loss(torch.full((2,), math.nan), k, torch.zeros(2), values, advantages, targets,
                            value_coef=0.5, entropy_coef=0.0, by_token=by_token)
    # L_act = −(2·(−.5) − .75 − 2 − 1·(−1.5) + 4) / 2 = −.875;  L_value = ((.25 + .25) / 2 + 4) / 2
    assert parts == pytest.approx({"loss_act": -0.875, "loss_value": 2.125, "loss_ent": 0.0})
    total.backward()
    assert values.grad.tolist() == pytest.approx([0.5 * (0.5 - 1.0) / 2, 0.5 * (1.0 - 3.0)])


def test_the_losses_of_parts_add_up() -> None:
    torch.manual_seed(1)
    columns = torch.randn(6, 7)
    whole, _ = a2c_loss(*columns, value_coef=0.5, entropy_coef=0.1)
    parts = [a2c_loss(*columns[:, rows], value_coef=0.5, entropy_coef=0.1, count=7)[0]
             for rows in (slice(0, 3), slice(3, 7))]
    assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-5)
