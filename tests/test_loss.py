"""The small functions of kaja.loss: aggregate, sft_loss, overlong_penalty, groups_with_spread.

The larger ones have files of their own: test_token_log_probs, test_advantages, test_kl, test_policy_loss.
"""

import math

import pytest
import torch

from kaja.loss import aggregate, groups_with_spread, overlong_penalty, sft_loss

FLOAT = torch.float64


def test_hand_worked_aggregate() -> None:
    values = torch.tensor([math.nan, 1.0, 3.0, math.nan, 10.0], dtype=FLOAT)
    mask = torch.tensor([False, True, True, False, True])
    ids = torch.tensor([0, 0, 0, 1, 1])
    assert aggregate(values, mask, ids, "sequence", 2).item() == 6.0  # (4 / 2 + 10 / 1) / 2
    assert aggregate(values, mask, ids, "token", 4).item() == 3.5  # 14 / 4
    assert aggregate(values, mask, ids, "constant", 7).item() == 2.0  # 14 / 7


def test_hand_worked_sft_loss() -> None:
    log_probs = torch.tensor([math.nan, -1.0, -2.0, -5.0, math.inf], dtype=FLOAT, requires_grad=True)
    mask = torch.tensor([False, True, True, True, False])
    loss = sft_loss(log_probs, mask, denominator=4)
    assert loss.item() == 2.0  # (1 + 2 + 5) / 4
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert gradient.tolist() == [0.0, -0.25, -0.25, -0.25, 0.0]


@pytest.mark.parametrize("denominator", [0, 3])
def test_sft_loss_of_nothing(denominator: int) -> None:
    log_probs = torch.tensor([math.nan, -1.0], requires_grad=True)
    loss = sft_loss(log_probs, torch.tensor([False, False]), denominator)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert loss.item() == 0.0 and gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sft_loss_of_micro_batches(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(8, 5, generator=generator, dtype=FLOAT)  # 8 sequences of 5 tokens
    mask = torch.rand(8, 5, generator=generator) < 0.6
    tokens = int(mask.sum())
    whole = sft_loss(log_probs.flatten(), mask.flatten(), tokens).item()
    assert whole == pytest.approx(-log_probs[mask].mean().item(), abs=1e-12)
    parts = [
        sft_loss(log_probs[i : i + size].flatten(), mask[i : i + size].flatten(), tokens)
        for i in range(0, 8, size)
    ]
    assert sum(part.item() for part in parts) == pytest.approx(whole, abs=1e-12)


def test_hand_worked_overlong_penalty() -> None:
    # L_max 20, buffer 4: free up to 16, then -1/4 a token.
    lengths = torch.tensor([1, 15, 16, 17, 18, 20])
    assert overlong_penalty(lengths, max_length=20, buffer=4).tolist() == [0.0, 0.0, 0.0, -0.25, -0.5, -1.0]
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(lengths, max_length=20, buffer=0)


def test_groups_with_spread() -> None:
    nan = math.nan
    rewards = torch.tensor(
        [
            [0.2, 0.4, 0.2],
            [0.3, 0.1 + 0.2, 0.3],
            [nan, 0.2, 0.4],
            [nan, nan, 0.4],
            [nan, nan, nan],
            [1.0, 1.0, 1.0],
        ],
        dtype=FLOAT,
    )
    assert groups_with_spread(rewards).tolist() == [True, False, True, False, False, False]
