"""train_grpo.py learns: with a rule as the reward, every method of kaja.loss.policy_loss's table, with the KL on."""

import pytest

from bench.grpo_learns import METHODS, points, start, train
from kaja.data import Example

RUNS = [("GRPO", 0), ("GRPO", 1), ("GRPO", 2), *((method, 0) for method in METHODS if method != "GRPO")]


def test_the_rule_has_points_to_gain() -> None:
    example = Example("1", "test", "helpfulness", "カレーを作る方法を教えてください。", "")
    reason = "その理由は、慣れると楽になるからです。"
    assert points(example, "カレーを作る方法は、まず道具をそろえて、順番に進めることです。") == 0
    assert points(example, "はい。カレーを作る手順は、準備、実行、確認の三つです。") == 2
    assert points(example, "カレーを作る方法は、まず道具をそろえることです。" + reason) == 3
    assert points(example, "はい。カレーを作る手順は、準備、実行、確認の三つです。" + reason) == 5
    assert points(example, "はい。ケーキを焼く手順は、準備、実行、確認の三つです。" + reason) == 0  # off topic
    assert points(example, "はい。カレーを作る手順は、準備、実行") == 0  # unfinished
    assert 0.1 < start() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("method", "seed"), RUNS)
def test_reward_gains_half_of_what_is_possible(method: str, seed: int) -> None:
    curve = train(METHODS[method], seed)
    assert len(curve.rows) <= 60
    assert curve.share >= 0.5, f"reward {start():.2f} -> {curve.end:.2f}: {curve.rewards}"
    # The KL was on, the policy moved from the reference, and the later update of a step was off-policy.
    assert all(row["kl"] > 0 and row["ratio_max"] > 1 for row in curve.rows)
    # It is a habit, not the training questions by heart: the same holds for others, from 0.16 on.
    assert curve.held_out >= 0.4


@pytest.mark.slow
def test_without_a_learning_rate_nothing_rises() -> None:
    """The same questions, seeds and rule: what the others gain is learned, and not a matter of luck."""
    curve = train((*METHODS["GRPO"], "--learning-rate", "1e-9"), 0)
    assert abs(curve.share) < 0.15
    assert all(row["kl"] < 1e-6 for row in curve.rows)
