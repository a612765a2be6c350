"""token_log_probs against log_softmax of the full logits: values, gradients, memory."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kaja.loss import token_log_probs


def random_case(
    num_tokens: int, width: int = 5, vocabulary: int = 11, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return hidden, weight, labels


def full_logits_way(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    log_probs = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, labels[:, None])[:, 0], entropy


def test_hand_worked() -> None:
    # Two tokens, three words, hidden = 1: the logits are the weights 0, log 2, log 5; p = 1/8, 2/8, 5/8.
    weight = torch.tensor([[0.0], [math.log(2.0)], [math.log(5.0)]], dtype=torch.float64)
    hidden = torch.ones(2, 1, dtype=torch.float64)
    log_probs, entropy = token_log_probs(hidden, weight, torch.tensor([0, 2]), with_entropy=True)
    assert log_probs.tolist() == pytest.approx([math.log(0.125), math.log(0.625)], abs=1e-12)
    # H = 1/8 log 8 + 1/4 log 4 + 5/8 log 8/5 = 0.2599301927 + 0.3465735903 + 0.2937522683
    assert entropy is not None
    assert entropy.tolist() == pytest.approx([0.9002560513, 0.9002560513], abs=1e-9)
    # Temperature 1/2 squares the odds: 1, 4, 25 of 30.
    log_probs, _ = token_log_probs(hidden, weight, torch.tensor([0, 2]), temperature=0.5)
    assert log_probs.tolist() == pytest.approx([math.log(1 / 30), math.log(25 / 30)], abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
@pytest.mark.parametrize("num_tokens, num_columns", [(7, 2048), (7, 11), (7, 4), (7, 1), (8, 10), (1, 4)])
def test_equals_full_logits(num_tokens: int, num_columns: int, temperature: float) -> None:
    hidden, weight, labels = random_case(num_tokens)
    upstream = torch.randn(2, num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for function in ("full", "tiles"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if function == "full":
            log_probs, entropy = full_logits_way(h, w, labels, temperature)
        else:
            log_probs, optional = token_log_probs(h, w, labels, temperature, True, num_columns=num_columns)
            assert optional is not None
            entropy = optional
        (upstream[0] @ log_probs + upstream[1] @ entropy).backward()
        results.append((log_probs, entropy, h.grad, w.grad))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_columns", [1, 2, 4, 6, 64])
def test_gradcheck(num_columns: int) -> None:
    hidden, weight, labels = random_case(5, width=3, vocabulary=6)
    hidden.requires_grad_()
    weight.requires_grad_()

    def both(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        return token_log_probs(h, w, labels, temperature=0.7, with_entropy=True, num_columns=num_columns)

    def without_entropy(h: Tensor, w: Tensor) -> Tensor:
        return token_log_probs(h, w, labels, temperature=0.7, num_columns=num_columns)[0]

    assert torch.autograd.gradcheck(both, (hidden, weight))
    assert torch.autograd.gradcheck(without_entropy, (hidden, weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_input_frozen(frozen: str) -> None:
    hidden, weight, labels = random_case(4)
    trained, fixed = (weight, hidden) if frozen == "hidden" else (hidden, weight)
    trained.requires_grad_()
    log_probs, entropy = token_log_probs(hidden, weight, labels, with_entropy=True, num_columns=3)
    assert entropy is not None
    (actual,) = torch.autograd.grad(log_probs.sum() + 2 * entropy.sum(), trained)
    log_probs, entropy = full_logits_way(hidden, weight, labels, 1.0)
    (expected,) = torch.autograd.grad(log_probs.sum() + 2 * entropy.sum(), trained)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert not fixed.requires_grad and fixed.grad is None


@pytest.mark.parametrize("option", ["with_entropy", "equal_gradients"])
def test_no_tokens(option: str) -> None:
    hidden, weight, labels = random_case(0)
    hidden.requires_grad_()
    weight.requires_grad_()
    log_probs, entropy = token_log_probs(hidden, weight, labels, **{option: True})
    assert log_probs.shape == (0,)
    if entropy is not None:
        assert entropy.shape == (0,)
        log_probs = log_probs + entropy
    log_probs.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"with_entropy": True}])
@pytest.mark.parametrize("num_rows", [1, 3, 256])
def test_equal_gradients_are_those_of_any_gradients(options: dict[str, Any], num_rows: int) -> None:
    hidden, weight, labels = random_case(7)
    results = []
    for equal in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        log_probs, _ = token_log_probs(h, w, labels, 0.7, equal_gradients=equal, num_rows=num_rows, **options)
        (log_probs.sum() / -14).backward()
        results.append((log_probs, h.grad, w.grad))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_equal_gradients_with_one_input_frozen(frozen: str) -> None:
    hidden, weight, labels = random_case(4)
    trained = weight if frozen == "hidden" else hidden
    trained.requires_grad_()
    (actual,) = torch.autograd.grad(token_log_probs(hidden, weight, labels, equal_gradients=True)[0].sum(), trained)
    (expected,) = torch.autograd.grad(full_logits_way(hidden, weight, labels, 1.0)[0].sum(), trained)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_equal_gradients_that_are_not_equal() -> None:
    hidden, weight, labels = random_case(3)
    hidden.requires_grad_()
    log_probs, _ = token_log_probs(hidden, weight, labels, equal_gradients=True)
    with pytest.raises(ValueError, match="differ"):
        (log_probs @ torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)).backward()


def test_one_nan_among_equal_gradients_is_seen() -> None:
    hidden, weight, labels = random_case(3)
    hidden.requires_grad_()
    log_probs, _ = token_log_probs(hidden, weight, labels, equal_gradients=True)
    log_probs.backward(torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64))
    assert hidden.grad is not None and hidden.grad.isnan().all()


def test_equal_gradients_are_used_only_once() -> None:
    hidden, weight, labels = random_case(3)
    hidden.requires_grad_()
    loss = 2 * token_log_probs(hidden, weight, labels, equal_gradients=True)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_entropy_only_when_asked() -> None:
    hidden, weight, labels = random_case(4)
    assert token_log_probs(hidden, weight, labels)[1] is None


def test_no_gradient_mode() -> None:
    hidden, weight, labels = random_case(4)
    weight.requires_grad_()
    with torch.no_grad():
        log_probs, _ = token_log_probs(hidden, weight, labels)
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs, full_logits_way(hidden, weight, labels, 1.0)[0].detach())


def test_large_logits_stay_finite() -> None:
    # Logits of +-1000: the probability of the label is 1 or underflows; log-probs are 0 and -2000, entropy 0.
    weight = torch.tensor([[1000.0], [-1000.0]])
    hidden = torch.ones(2, 1, requires_grad=True)
    log_probs, entropy = token_log_probs(hidden, weight, torch.tensor([0, 1]), with_entropy=True)
    assert entropy is not None
    assert log_probs.tolist() == [0.0, -2000.0]
    assert entropy.tolist() == [0.0, 0.0]
    (log_probs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    # d/dh of -2000 h for the second token; nothing for the first.
    assert hidden.grad[:, 0].tolist() == [0.0, -2000.0]


def test_bfloat16_inputs_give_float32_log_probs() -> None:
    # A bfloat16 log-prob has three digits: useless for ratios. So float32 results, gradients as the inputs.
    hidden, weight, labels = random_case(6, width=16, vocabulary=50)
    h = hidden.to(torch.bfloat16).requires_grad_()
    w = weight.to(torch.bfloat16).requires_grad_()
    log_probs, entropy = token_log_probs(h, w, labels, with_entropy=True, num_columns=32)
    assert entropy is not None
    assert log_probs.dtype == entropy.dtype == torch.float32
    (log_probs.sum() + entropy.sum()).backward()
    assert h.grad is not None and h.grad.dtype == torch.bfloat16
    assert w.grad is not None and w.grad.dtype == torch.bfloat16
    expected, _ = full_logits_way(h.detach().double(), w.detach().double(), labels, 1.0)
    torch.testing.assert_close(log_probs.double(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("options", [{"num_columns": 2}, {"num_rows": 1, "equal_gradients": True}])
def test_bfloat16_gradients_are_summed_in_float32(options: dict[str, Any]) -> None:
    # 400 terms: rounded to bfloat16 one after the other, they would be off by several percent.
    hidden, weight, labels = random_case(400, width=4, vocabulary=6)
    h, w = hidden.to(torch.bfloat16).requires_grad_(), weight.to(torch.bfloat16).requires_grad_()
    token_log_probs(h, w, labels, **options)[0].sum().backward()
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    full_logits_way(h64, w64, labels, 1.0)[0].sum().backward()
    for actual, expected in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert actual is not None and expected is not None
        torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-5)


def kept_of(logits: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """Which of (V,) logits top-k and top-p keep: a token stays while those more likely hold less than top_p."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k:
        order = [token for token in order if logits[token] >= logits[order[min(top_k, len(order)) - 1]]]
    weights = np.exp(logits - logits.max())
    total, above, kept = weights[order].sum(), 0.0, np.zeros(len(logits), dtype=bool)
    for token in order:
        if top_p < 1 and above >= top_p * total:
            break
        kept[token] = True
        above += weights[token]
    return kept


def numpy_way(
    hidden: np.ndarray, weight: np.ndarray, labels: np.ndarray, temperature: float, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """log-probs and entropies over the tokens `kept` (T, V) alone."""
    log_probs, entropies = [], []
    for state, label, row in zip(hidden, labels, kept):
        logits = (weight @ state / temperature)[row]
        log_p = logits - np.log(np.exp(logits).sum())
        log_probs.append(log_p[np.flatnonzero(row).tolist().index(label)])
        entropies.append(-(np.exp(log_p) * log_p).sum())
    return np.array(log_probs), np.array(entropies)


def truncated_case(top_p: float, top_k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """Labels that are kept, but for the last one, the least likely token; and the kept set with the labels in it."""
    hidden, weight, _ = random_case(9, vocabulary=40)
    logits = (hidden @ weight.T / temperature).numpy()
    kept = np.stack([kept_of(row, top_p, top_k) for row in logits])
    rng = np.random.default_rng(0)
    labels = np.array([rng.choice(np.flatnonzero(row)) for row in kept])
    labels[-1] = logits[-1].argmin()
    assert not kept[-1, labels[-1]]
    kept[np.arange(9), labels] = True
    return hidden, weight, torch.from_numpy(labels), kept


TRUNCATIONS = [(0.9, 0), (0.4, 0), (1.0, 5), (1.0, 1), (0.8, 12), (1e-9, 0)]


@pytest.mark.parametrize("top_p, top_k", TRUNCATIONS[:3] + TRUNCATIONS[4:5])
@pytest.mark.parametrize("num_rows", [4, 256])
def test_truncated_equals_numpy(top_p: float, top_k: int, num_rows: int) -> None:
    """Values against numpy, gradients against central differences with the kept set held."""
    temperature = 0.7
    hidden, weight, labels, kept = truncated_case(top_p, top_k, temperature)
    hidden.requires_grad_(), weight.requires_grad_()
    options = {"top_p": top_p, "top_k": top_k, "num_rows": num_rows}
    log_probs, entropy = token_log_probs(hidden, weight, labels, temperature, with_entropy=True, **options)
    assert entropy is not None
    h, w, tokens = hidden.detach().numpy(), weight.detach().numpy(), labels.numpy()
    expected = numpy_way(h, w, tokens, temperature, kept)
    np.testing.assert_allclose(log_probs.detach(), expected[0], atol=1e-10)
    np.testing.assert_allclose(entropy.detach(), expected[1], atol=1e-10)
    alone, _ = token_log_probs(hidden, weight, labels, temperature, **options)
    torch.testing.assert_close(alone, log_probs, rtol=0, atol=1e-12)

    upstream = np.random.default_rng(1).standard_normal((2, 9))
    loss = torch.from_numpy(upstream[0]) @ log_probs + torch.from_numpy(upstream[1]) @ entropy
    gradients = torch.autograd.grad(loss, (hidden, weight))
    for array, gradient in zip((h, w), gradients):
        for index in np.ndindex(*array.shape):
            before, sums = array[index], []
            for step in (1e-6, -1e-6):
                array[index] = before + step
                sums.append((upstream * np.stack(numpy_way(h, w, tokens, temperature, kept))).sum())
            array[index] = before
            assert gradient[index].item() == pytest.approx((sums[0] - sums[1]) / 2e-6, abs=1e-7)
    (of_log_probs,) = torch.autograd.grad(alone @ torch.from_numpy(upstream[0]), hidden)
    assert torch.isfinite(of_log_probs).all()


@pytest.mark.parametrize("top_p, top_k", TRUNCATIONS)
def test_a_label_outside_the_kept_set_is_added_to_it(top_p: float, top_k: int) -> None:
    hidden, weight, labels, kept = truncated_case(top_p, top_k, 1.0)
    hidden.requires_grad_()
    log_probs, entropy = token_log_probs(hidden, weight, labels, with_entropy=True, top_p=top_p, top_k=top_k)
    assert entropy is not None
    others = kept[-1].nonzero()[0].tolist()
    others.remove(int(labels[-1]))
    logits = weight @ hidden[-1].detach()
    # p = e^z_label / (e^z_label + sum over the kept set): below every kept token's
    ratio = (logits[others] - logits[labels[-1]]).exp().sum()
    assert log_probs[-1].item() == pytest.approx(-math.log1p(ratio.item()), abs=1e-12)
    (gradient,) = torch.autograd.grad(log_probs.sum() + 0 * entropy.sum(), hidden)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


def test_truncation_that_keeps_all_is_the_plain_way_bit_by_bit() -> None:
    hidden, weight, labels = random_case(6, width=16, vocabulary=50)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    results = []
    for options in ({}, {"top_p": 1.0, "top_k": 0}, {"top_k": 50}, {"top_k": 10**6}):
        log_probs, entropy = token_log_probs(hidden, weight, labels, 0.7, with_entropy=True, **options)
        assert entropy is not None
        gradients = torch.autograd.grad(log_probs.sum() + entropy.sum(), (hidden, weight))
        results.append((log_probs, entropy, *gradients))
    for others in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], others))


def test_equal_logits_at_the_border() -> None:
    """logits 3 1 1 1 0: all equal to the 2nd largest are top-2; top-p keeps the lower indices of equal ones."""
    weight = torch.tensor([[1.0], [3.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)

    def entropy_of(**options: float) -> float:
        entropy = token_log_probs(one, weight, torch.tensor([1]), with_entropy=True, **options)[1]
        assert entropy is not None
        return float(entropy)

    def entropy_over(*logits: float) -> float:
        return torch.distributions.Categorical(logits=torch.tensor(logits, dtype=torch.float64)).entropy().item()

    assert entropy_of(top_k=2) == pytest.approx(entropy_over(3, 1, 1, 1))
    # p of the four: .711 .096 .096 .096: two of them hold .807 and three .904
    assert entropy_of(top_k=2, top_p=0.85) == pytest.approx(entropy_over(3, 1, 1))
    assert entropy_of(top_p=0.7) == pytest.approx(entropy_over(3, 1))  # of all five .677 is too little
    outside, _ = token_log_probs(one, weight, torch.tensor([4]), top_k=2, top_p=0.85)
    inside, _ = token_log_probs(one, weight, torch.tensor([2]), top_k=2, top_p=0.85)
    assert outside.item() == pytest.approx(1 - math.log(math.e**3 + 3 * math.e))
    assert inside.item() == pytest.approx(1 - math.log(math.e**3 + 2 * math.e))


def test_the_largest_logit_may_come_first_or_last() -> None:
    """Maxima and sums are carried from tile to tile: logits that rise or fall by 300 from one to the next."""
    logits = [900.0, 600.0, 599.0, 300.0, 0.0, -1e38]
    one = torch.ones(1, 1, dtype=torch.float64)
    for order in (logits, logits[::-1]):
        weight, label = torch.tensor(order, dtype=torch.float64)[:, None], order.index(600.0)
        log_probs, entropy = token_log_probs(one, weight, torch.tensor([label]), with_entropy=True, num_columns=1)
        assert entropy is not None
        assert log_probs.item() == -300.0
        assert 0 <= entropy.item() < 1e-100


def test_truncation_of_nan_logits_is_nan_and_no_crash() -> None:
    hidden, weight, labels = random_case(3)
    log_probs, _ = token_log_probs(hidden * float("nan"), weight, labels, top_p=0.9, top_k=3)
    assert log_probs.isnan().all()


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"top_k": -1}])
def test_impossible_truncation(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 < top_p <= 1 and top_k >= 0"):
        token_log_probs(*random_case(2), **options)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
        return result


NUM_TOKENS, WIDTH, VOCABULARY = 96, 8, 512
NUM_ROWS, NUM_COLUMNS = 20, 72  # neither divides what it cuts
TILE, TILE_OF_ROWS = NUM_TOKENS * NUM_COLUMNS, NUM_ROWS * VOCABULARY


@pytest.mark.parametrize(
    "options, in_forward, in_backward",
    [
        ({}, TILE, TILE),
        ({"with_entropy": True}, TILE, TILE),
        ({"with_entropy": True, "top_p": 0.9}, TILE_OF_ROWS, TILE_OF_ROWS),
        ({"equal_gradients": True}, TILE_OF_ROWS, VOCABULARY * WIDTH),  # no logits in the backward
        ({"equal_gradients": True, "with_entropy": True}, TILE, TILE),
    ],
)
def test_no_tensor_larger_than_a_tile_of_logits(options: dict[str, Any], in_forward: int, in_backward: int) -> None:
    hidden, weight, labels = random_case(NUM_TOKENS, WIDTH, VOCABULARY)
    hidden.requires_grad_()
    weight.requires_grad_()
    sizes = {"num_rows": NUM_ROWS, "num_columns": NUM_COLUMNS}
    with LargestTensor() as forward:
        log_probs, entropy = token_log_probs(hidden, weight, labels, **options, **sizes)
    total = log_probs.sum() if entropy is None else log_probs.sum() + entropy.sum()
    with LargestTensor() as backward:
        total.backward()
    assert forward.largest == in_forward  # the mode did see the logits ...
    assert backward.largest == in_backward  # ... also those that the backward recomputes
    with torch.no_grad(), LargestTensor() as without_gradients:
        token_log_probs(hidden, weight, labels, **options, **sizes)
    assert without_gradients.largest == (TILE_OF_ROWS if "top_p" in options else TILE)
    with LargestTensor() as full:
        full_logits_way(hidden, weight, labels, 1.0)
    assert full.largest == NUM_TOKENS * VOCABULARY


def peak_bytes(full_logits: bool = False, **options: Any) -> int:
    """Peak of the memory allocated during forward and backward, from the profiler's allocation events."""
    hidden, weight, labels = random_case(NUM_TOKENS, WIDTH, VOCABULARY)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        if full_logits:
            log_probs, entropy = full_logits_way(hidden, weight, labels, 1.0)
        else:
            log_probs, optional = token_log_probs(hidden, weight, labels, **options)
            entropy = log_probs if optional is None else optional
        (log_probs.sum() + entropy.sum()).backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("option, tile, most", [("", 16, 1), ("with_entropy", 16, 2), ("equal_gradients", 3, 1)])
def test_peak_memory_is_a_few_tiles(option: str, tile: int, most: int) -> None:
    tile_bytes = 4 * (tile * NUM_TOKENS if option != "equal_gradients" else tile * VOCABULARY)
    gradients = 2 * (NUM_TOKENS + VOCABULARY) * WIDTH * 4  # both, and one copy of them at work
    options = {option: True} if option else {}
    peak = peak_bytes(**options, num_rows=3, num_columns=16)
    assert tile_bytes <= peak <= most * tile_bytes + gradients
    assert peak < peak_bytes(full_logits=True) / 4
