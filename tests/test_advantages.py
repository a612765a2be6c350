"""group_advantages: hand-worked groups, failed verdicts, groups without spread, random comparison."""

import math
import random

import pytest
import torch

import reference
from kaja.loss import group_advantages

NAN = float("nan")


def test_hand_worked_group() -> None:
    # (1, 2, 3, 6): mean 3, squared differences 4 + 1 + 0 + 9 = 14, ddof 1: std = sqrt(14 / 3) = 2.160246899
    advantages = group_advantages(torch.tensor([[1.0, 2.0, 3.0, 6.0]], dtype=torch.float64), eps=0.0)
    expected = [-0.9258200998, -0.4629100499, 0.0, 1.3887301497]
    assert advantages[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_eps_is_added_to_the_std() -> None:
    # (0, 1): mean .5, std sqrt(.5) = 0.7071067812; 0.5 / 0.8071067812 = 0.6194967155
    advantages = group_advantages(torch.tensor([[0.0, 1.0]], dtype=torch.float64), eps=0.1)
    assert advantages[0].tolist() == pytest.approx([-0.6194967155, 0.6194967155], abs=1e-9)
    default = group_advantages(torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    assert default[0, 1].item() == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-4), abs=1e-12)


def test_scale_none_only_centres() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]), scale="none")
    assert advantages.tolist() == [[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]]


def test_scale_batch_divides_all_groups_alike() -> None:
    # Rewards 0, 2, 0, 4: mean 1.5, squared differences 2.25 + .25 + 2.25 + 6.25 = 11, std = sqrt(11 / 3)
    advantages = group_advantages(
        torch.tensor([[0.0, 2.0], [0.0, 4.0]], dtype=torch.float64), scale="batch", eps=0.0
    )
    std = math.sqrt(11.0 / 3.0)
    assert advantages.flatten().tolist() == pytest.approx([-1 / std, 1 / std, -2 / std, 2 / std], abs=1e-12)


def test_failed_verdicts_take_no_part() -> None:
    with_failures = group_advantages(torch.tensor([[1.0, NAN, 2.0, NAN, 6.0]], dtype=torch.float64))
    without = group_advantages(torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64))
    assert with_failures[0, [0, 2, 4]].tolist() == pytest.approx(without[0].tolist(), abs=1e-12)
    assert with_failures[0, [1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_with_no_or_one_verdict(scale: str) -> None:
    advantages = group_advantages(torch.tensor([[NAN, NAN], [NAN, 0.8], [0.0, 1.0]]), scale=scale)
    assert advantages[:2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert advantages[2, 0] < 0 < advantages[2, 1]
    every = group_advantages(torch.tensor([[NAN, NAN]]), scale=scale)
    assert every.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_no_spread_is_exactly_zero(scale: str, dtype: torch.dtype, eps: float) -> None:
    nearly = 0.1 + 0.2  # 0.30000000000000004: a std of 1e-17 that is rounding, not a difference
    rewards = torch.tensor(
        [[0.3, nearly, 0.3, nearly], [0.6, 0.6, 0.6, 0.6], [0.0, 0.0, 0.0, 0.0], [0.2, 0.4, 0.6, 0.8]],
        dtype=dtype,
    )
    advantages = group_advantages(rewards, scale=scale, eps=eps)
    assert advantages[:3].abs().max().item() == 0.0
    assert bool(torch.isfinite(advantages).all()) and bool((advantages[3] != 0).all())


def test_float_noise_of_1e_9_is_no_spread() -> None:
    # Eight equal scores whose mean is not exact: their std is about 1e-9 in float64, 1e-8 in float32.
    noise = torch.tensor([[0.7, 0.7 + 1e-9, 0.7 - 1e-9, 0.7]], dtype=torch.float64)
    assert group_advantages(noise).abs().max().item() == 0.0
    same = torch.full((1, 7), 0.1 * 3)
    assert group_advantages(same).abs().max().item() == 0.0


def test_smallest_real_difference_counts() -> None:
    # A judge's step is 0.2 and an average of 100 verdicts differs by 0.002: both are spread.
    for step in (0.2, 0.002):
        advantages = group_advantages(torch.tensor([[0.6, 0.6 + step]], dtype=torch.float64))
        assert advantages[0, 1].item() == pytest.approx(step / 2 / (step / math.sqrt(2) + 1e-4), rel=1e-6)


def test_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="group"):
        group_advantages(torch.tensor([[1.0], [2.0]]))


def test_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="median"):
        group_advantages(torch.tensor([[1.0, 2.0]]), scale="median")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_random_groups_equal_the_reference(scale: str) -> None:
    rng = random.Random(0)
    for _ in range(30):
        prompts, group_size = rng.randint(1, 5), rng.randint(2, 6)
        rewards = [
            [NAN if rng.random() < 0.2 else rng.randint(0, 5) / 5 for _ in range(group_size)]
            for _ in range(prompts)
        ]
        actual = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale=scale)
        expected = torch.tensor(reference.group_advantages(rewards, scale), dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_invariances() -> None:
    rewards = torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = group_advantages(rewards, eps=0.0)
    assert advantages.sum(-1).abs().max().item() < 1e-12  # zero mean in every group
    torch.testing.assert_close(advantages.std(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(group_advantages(3 * rewards + 5, eps=0.0), advantages)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(group_advantages(rewards[:, order], eps=0.0), advantages[:, order])
