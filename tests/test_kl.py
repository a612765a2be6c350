"""Which KL estimator, added to the loss, has the gradient of KL(policy || reference)?

A tabular softmax policy has few enough outcomes to take every expectation exactly, by enumeration. Sampling
is on-policy: the outcomes are weighted by the policy's probabilities, which are constants for the gradient.

- k1 = d, d = log pi - log ref:      the value is KL, the expected gradient is zero
- k2 = d^2 / 2:                      the value is not KL, the expected gradient is that of KL(pi || ref)
- k3 = exp(-d) - 1 + d:              the value is KL, the expected gradient is that of KL(ref || pi)
"""

import inspect
import math

import pytest
import torch
from torch import Tensor

from kaja.loss import kl_estimate, policy_loss

KINDS = ("k1", "k2", "k3")


def random_policy(seed: int, outcomes: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(outcomes, generator=generator, dtype=torch.float64)
    ref_log_probs = torch.log_softmax(torch.randn(outcomes, generator=generator, dtype=torch.float64), 0)
    return logits.requires_grad_(), ref_log_probs


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def test_hand_worked() -> None:
    # log pi - log ref = log 2: k1 = log 2, k2 = (log 2)^2 / 2, k3 = 1/2 - 1 + log 2
    log_probs = torch.tensor([math.log(0.5)], dtype=torch.float64)
    ref_log_probs = torch.tensor([math.log(0.25)], dtype=torch.float64)
    expected = {"k1": 0.6931471806, "k2": 0.2402265070, "k3": 0.1931471806}
    for kind in KINDS:
        assert kl_estimate(log_probs, ref_log_probs, kind).tolist() == pytest.approx(
            [expected[kind]], abs=1e-10
        )
        assert kl_estimate(log_probs, log_probs, kind).tolist() == [0.0]


def test_k2_and_k3_are_never_negative() -> None:
    differences = torch.tensor([-100.0, -3.0, -1e-4, 0.0, 1e-4, 3.0, 100.0])
    for kind in ("k2", "k3"):
        values = kl_estimate(differences, torch.zeros(7), kind)
        assert bool((values >= 0).all()) and bool(torch.isfinite(values).all())


@pytest.mark.parametrize("seed", range(4))
def test_expected_values(seed: int) -> None:
    logits, ref_log_probs = random_policy(seed)
    log_probs = torch.log_softmax(logits, 0)
    probabilities = log_probs.exp().detach()
    exact = float(probabilities @ (log_probs.detach() - ref_log_probs))
    values = {
        kind: float(probabilities @ kl_estimate(log_probs.detach(), ref_log_probs, kind)) for kind in KINDS
    }
    assert values["k1"] == pytest.approx(exact, abs=1e-12)
    assert values["k3"] == pytest.approx(exact, abs=1e-12)
    assert values["k2"] != pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_expected_gradients(seed: int) -> None:
    logits, ref_log_probs = random_policy(seed)
    log_probs = torch.log_softmax(logits, 0)
    probabilities = log_probs.exp().detach()
    gradients = {
        kind: gradient(probabilities @ kl_estimate(log_probs, ref_log_probs, kind), logits) for kind in KINDS
    }
    exact = gradient((log_probs.exp() * (log_probs - ref_log_probs)).sum(), logits)
    reverse = gradient((ref_log_probs.exp() * (ref_log_probs - log_probs)).sum(), logits)
    torch.testing.assert_close(gradients["k2"], exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients["k3"], reverse, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(exact), rtol=0.0, atol=1e-12)
    assert float((exact - reverse).norm() / exact.norm()) > 0.1  # k3's is another direction, not rounding


@pytest.mark.parametrize("kind", KINDS)
def test_policy_loss_adds_that_gradient(kind: str) -> None:
    """The same through policy_loss: each outcome is a completion of one token, of weight 1 / denominator."""
    logits, ref_log_probs = random_policy(seed=7)
    log_probs = torch.log_softmax(logits, 0)
    probabilities = log_probs.exp().detach()
    total = torch.zeros((), dtype=torch.float64)
    for outcome in range(len(logits)):
        one = log_probs[outcome : outcome + 1]
        loss, _ = policy_loss(
            one,
            one.detach(),
            torch.zeros(1, dtype=torch.float64),
            torch.ones(1, dtype=torch.bool),
            torch.zeros(1, dtype=torch.long),
            ref_log_probs=ref_log_probs[outcome : outcome + 1],
            kl_coef=0.3,
            kl=kind,
            denominator=1.0 / float(probabilities[outcome]),
        )
        total = total + loss
    exact = gradient((log_probs.exp() * (log_probs - ref_log_probs)).sum(), logits)
    reverse = gradient((ref_log_probs.exp() * (ref_log_probs - log_probs)).sum(), logits)
    expected = {"k1": torch.zeros_like(exact), "k2": exact, "k3": reverse}[kind]
    torch.testing.assert_close(gradient(total, logits), 0.3 * expected, rtol=1e-10, atol=1e-12)


def test_two_tokens() -> None:
    """Completions of two tokens: k2's gradient is that of the sum of the exact KLs at the visited prefixes.

    The prefixes count as given: no per-token loss sees that the first token decides where the second KL is
    taken.
    """
    generator = torch.Generator().manual_seed(3)
    outcomes = 4
    logits = torch.randn(1 + outcomes, outcomes, generator=generator, dtype=torch.float64).requires_grad_()
    ref_log_probs = torch.log_softmax(torch.randn(logits.shape, generator=generator, dtype=torch.float64), -1)
    log_probs = torch.log_softmax(logits, -1)  # row 0: first token; row 1 + a: second token after a
    probabilities = log_probs.exp().detach()
    loss = torch.zeros((), dtype=torch.float64)
    for first in range(outcomes):
        for second in range(outcomes):
            chosen = torch.stack([log_probs[0, first], log_probs[1 + first, second]])
            reference = torch.stack([ref_log_probs[0, first], ref_log_probs[1 + first, second]])
            weight = probabilities[0, first] * probabilities[1 + first, second]
            loss = loss + weight * kl_estimate(chosen, reference, "k2").sum()
    kl_of_prefix = (log_probs.exp() * (log_probs - ref_log_probs)).sum(-1)
    exact = kl_of_prefix[0] + probabilities[0] @ kl_of_prefix[1:]
    torch.testing.assert_close(gradient(loss, logits), gradient(exact, logits), rtol=1e-10, atol=1e-12)


def test_default_is_the_right_one() -> None:
    assert inspect.signature(kl_estimate).parameters["kind"].default == "k2"
    assert inspect.signature(policy_loss).parameters["kl"].default == "k2"


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
