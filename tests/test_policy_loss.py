"""policy_loss: hand-worked numbers, the papers' losses, clip edges, degenerate inputs, splits.

The hand-worked batch has two completions. With clip_low = clip_high = 0.2:

    completion   A    ratio   min(r A, clip(r) A)   gradient of the loss flows
        0       +1     1.5          1.2             no (clipped above)
        0       +1     0.9          0.9             yes
        1       -1     0.5         -0.8             no (clipped below)
"""

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from kaja.loss import add_stats, policy_loss, summarise_stats
from reference import Batch, Completion

FLOAT = torch.float64


def completion(advantage: float, log_probs: list[float], ratios: list[float]) -> Completion:
    """A completion with these log-probs and ratios to the old policy, which is reference and sampler too."""
    current = np.array(log_probs)
    old = current - np.log(np.array(ratios))
    return Completion(advantage, current, old, old, old)


HAND_WORKED = [completion(1.0, [-1.0, -2.0], [1.5, 0.9]), completion(-1.0, [-3.0], [0.5])]


def random_batch(rng: random.Random, spread: float = 0.3) -> Batch:
    def one() -> Completion:
        length = rng.choice([1, 1, 2, 3, 5, 8])
        old = np.array([-rng.uniform(0.01, 4.0) for _ in range(length)])
        near = [old + np.array([rng.gauss(0.0, spread) for _ in range(length)]) for _ in range(3)]
        return Completion(rng.gauss(0.0, 1.0), near[0], old, near[1], near[2])

    return [one() for _ in range(rng.randint(1, 5))]


def pack(batch: Batch, dtype: torch.dtype = FLOAT, prompt_tokens: int = 2) -> dict[str, Tensor]:
    """One packed stream; each completion follows `prompt_tokens` untrained positions that hold NaN."""
    columns: dict[str, list[float]] = {
        name: []
        for name in ("log_probs", "old_log_probs", "ref_log_probs", "sampling_log_probs", "advantages")
    }
    mask: list[bool] = []
    ids: list[int] = []
    for number, one in enumerate(batch):
        for name, values in columns.items():
            trained = [one.advantage] * len(one) if name == "advantages" else getattr(one, name).tolist()
            values += [math.nan] * prompt_tokens + trained
        mask += [False] * prompt_tokens + [True] * len(one)
        ids += [number] * (prompt_tokens + len(one))
    tensors = {name: torch.tensor(values, dtype=dtype) for name, values in columns.items()}
    return tensors | {
        "completion_mask": torch.tensor(mask, dtype=torch.bool),
        "sequence_ids": torch.tensor(ids, dtype=torch.long),
    }


def run(tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, gradient with respect to all log_probs, stats)."""
    log_probs = tensors["log_probs"].clone().requires_grad_()
    loss, stats = policy_loss(**(tensors | {"log_probs": log_probs}), **options)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient, stats


def denominator_of(aggregation: str, batch: Batch) -> float:
    tokens = sum(len(one) for one in batch)
    return {"sequence": len(batch), "token": tokens, "constant": len(batch) * 10}[aggregation]


# --------------------------------------------------------------------------- hand-worked


@pytest.mark.parametrize(
    "aggregation,denominator,loss,gradient",
    [
        ("sequence", 2, -0.125, [0.0, -0.225, 0.0]),  # -((1.2 + .9) / 2 - .8) / 2;  -.9 / 2 / 2
        ("token", 3, -1.3 / 3, [0.0, -0.3, 0.0]),  # -(1.2 + .9 - .8) / 3
        ("constant", 8, -0.1625, [0.0, -0.1125, 0.0]),  # the same sum over 2 completions x length 4
    ],
)
def test_hand_worked_clip(aggregation: str, denominator: float, loss: float, gradient: list[float]) -> None:
    tensors = pack(HAND_WORKED)
    actual, slope, _ = run(tensors, aggregation=aggregation, denominator=denominator)
    assert actual.item() == pytest.approx(loss, abs=1e-12)
    assert slope[tensors["completion_mask"]].tolist() == pytest.approx(gradient, abs=1e-12)
    assert slope[~tensors["completion_mask"]].tolist() == [0.0] * 4


def test_hand_worked_sequence_ratio() -> None:
    # s_0 = sqrt(1.5 * 0.9) = 1.1618950039, inside; s_1 = 0.5, clipped to 0.8. Loss -(1.161895 - 0.8) / 2.
    # ds_0 / dlog_prob = s_0 / 2 for both tokens; each token of the completion carries the gradient.
    tensors = pack(HAND_WORKED)
    loss, gradient, _ = run(tensors, ratio="sequence", denominator=2)
    assert loss.item() == pytest.approx(-0.1809475019, abs=1e-9)
    expected = [-0.2904737510, -0.2904737510, 0.0]
    assert gradient[tensors["completion_mask"]].tolist() == pytest.approx(expected, abs=1e-9)


def test_hand_worked_cispo() -> None:
    # Weights 1.2, 0.9, 0.8: loss -(1.2 (-1) + 0.9 (-2) + 0.8 (-1) (-3)) / 3 = 0.2; gradient -weight A / 3.
    # Unlike the clipped surrogate no token loses its gradient.
    tensors = pack(HAND_WORKED)
    loss, gradient, _ = run(tensors, surrogate="cispo", aggregation="token", denominator=3)
    assert loss.item() == pytest.approx(0.2, abs=1e-12)
    assert gradient[tensors["completion_mask"]].tolist() == pytest.approx([-0.4, -0.3, 0.8 / 3], abs=1e-12)
    # clip_low = 1 switches the lower bound off: the third weight is 0.5.
    _, gradient, _ = run(tensors, surrogate="cispo", clip_low=1.0, aggregation="token", denominator=3)
    assert gradient[tensors["completion_mask"]].tolist() == pytest.approx([-0.4, -0.3, 0.5 / 3], abs=1e-12)


def test_hand_worked_kl() -> None:
    # One token, on-policy, advantage 0, log pi - log ref = log 2; kl_coef 0.5.
    one = Completion(
        0.0, np.array([-1.0]), np.array([-1.0]), np.array([-1.0 - math.log(2.0)]), np.array([-1.0])
    )
    expected = {"k1": (0.3465735903, 0.5), "k2": (0.1201132535, 0.3465735903), "k3": (0.0965735903, 0.25)}
    for kl, (value, slope) in expected.items():
        loss, gradient, _ = run(pack([one]), kl_coef=0.5, kl=kl, denominator=1)
        assert loss.item() == pytest.approx(value, abs=1e-9)
        assert gradient[2].item() == pytest.approx(slope, abs=1e-9)


def test_hand_worked_correction() -> None:
    # On-policy, A = 1; the sampler gave the tokens 1/4, 1 and 1/1.5 of the trainer's odds: w = 4, 1, 1.5.
    log_probs = np.array([-1.0, -1.0, -1.0])
    one = Completion(1.0, log_probs, log_probs, log_probs, log_probs - np.log(np.array([4.0, 1.0, 1.5])))
    tensors = pack([one])
    trained = tensors["completion_mask"]
    options = {"correction_cap": 2.0, "denominator": 1}
    _, gradient, stats = run(tensors, correction="token", **options)
    assert gradient[trained].tolist() == pytest.approx([-2 / 3, -1 / 3, -1.5 / 3], abs=1e-12)
    _, gradient, _ = run(tensors, correction="token", correction_mode="mask", **options)
    assert gradient[trained].tolist() == pytest.approx([0.0, -1 / 3, -1.5 / 3], abs=1e-12)
    # Per sequence: the geometric mean 6 ** (1/3) = 1.817 is under the cap, and cut by a cap of 1.8.
    _, gradient, _ = run(tensors, correction="sequence", **options)
    assert gradient[trained].tolist() == pytest.approx([-(6 ** (1 / 3)) / 3] * 3, abs=1e-12)
    _, gradient, _ = run(
        tensors, correction="sequence", correction_cap=1.8, correction_mode="mask", denominator=1
    )
    assert gradient.abs().sum().item() == 0.0
    summary = summarise_stats(stats)
    assert summary["correction"] == pytest.approx(6.5 / 3)  # mean of the weights before the cut
    assert summary["correction_max"] == pytest.approx(4.0)
    assert summary["correction_cut"] == pytest.approx(1 / 3)
    # k3 of the weights 4, 1 and 1.5: w - 1 - log w.
    assert summary["correction_kl"] == pytest.approx((3 - math.log(4) + 0 + 0.5 - math.log(1.5)) / 3)
    assert summary["effective_sample_size"] == pytest.approx(6.5**2 / (3 * (16 + 1 + 2.25)))


def test_correction_leaves_the_kl_term_alone() -> None:
    log_probs = np.array([-1.0])
    one = Completion(0.0, log_probs, log_probs, log_probs - 1.0, log_probs - 5.0)
    loss, gradient, _ = run(
        pack([one]), correction="token", correction_mode="mask", kl_coef=0.1, denominator=1
    )
    assert loss.item() == pytest.approx(0.05, abs=1e-12)
    assert gradient[2].item() == pytest.approx(0.1, abs=1e-12)


# --------------------------------------------------------------------------- the papers and the whole grid


def published(name: str, batch: Batch, fixed: Batch) -> float:
    if name == "grpo":
        return reference.grpo(batch, clip=0.2, beta=0.04)
    if name == "dr_grpo":
        return reference.dr_grpo(batch, clip=0.2, max_length=10)
    if name == "dapo":
        return reference.dapo(batch, clip_low=0.2, clip_high=0.28)
    if name == "gspo":
        return reference.gspo(batch, clip_low=3e-4, clip_high=4e-4)
    return reference.cispo(batch, clip_low=1.0, clip_high=0.5, weights_of=fixed)


METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coef": 0.04, "kl": "k3"},
    "dr_grpo": {"aggregation": "constant"},
    "dapo": {"aggregation": "token", "clip_high": 0.28},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.5, "aggregation": "token"},
}


@pytest.mark.parametrize("name", METHODS)
def test_published_methods(name: str) -> None:
    """The rows of policy_loss's table are the papers' equations: value and gradient."""
    rng = random.Random(1)
    for _ in range(10):
        batch = random_batch(rng, spread=0.3 if name != "gspo" else 5e-4)
        tensors = pack(batch)
        options = METHODS[name]
        denominator = denominator_of(options.get("aggregation", "sequence"), batch)
        loss, gradient, _ = run(tensors, denominator=denominator, **options)
        assert loss.item() == pytest.approx(published(name, batch, batch), rel=1e-9, abs=1e-12)
        step = 1e-6 if name != "gspo" else 1e-8
        expected = reference.numerical_gradient(lambda moved: published(name, moved, batch), batch, step)
        np.testing.assert_allclose(
            gradient[tensors["completion_mask"]].numpy(), expected, rtol=1e-5, atol=1e-7
        )


RATIOS = ("token", "sequence")
SURROGATES = ("clip", "cispo")
CORRECTIONS = ("none truncate", "token truncate", "token mask", "sequence truncate", "sequence mask")
AGGREGATIONS = ("sequence", "token", "constant")
KLS = ("off", "k1", "k2", "k3")
GRID = list(itertools.product(RATIOS, SURROGATES, CORRECTIONS, AGGREGATIONS, KLS))


def options_of(choices: tuple[str, str, str, str, str], kl_coef: float = 0.7) -> dict[str, Any]:
    """The keyword arguments of policy_loss for an entry of GRID."""
    ratio, surrogate, correction, aggregation, kl = choices
    level, mode = correction.split()
    options = {"ratio": ratio, "surrogate": surrogate, "aggregation": aggregation, "correction": level}
    options |= {"correction_mode": mode, "kl": "k2" if kl == "off" else kl}
    return options | {"kl_coef": 0.0 if kl == "off" else kl_coef}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_combination_equals_the_reference(ratio: str, aggregation: str) -> None:
    """All 240 combinations of the choices, each on a random batch, value and gradient."""
    rng = random.Random(2)
    bounds = {"clip_low": 0.15, "clip_high": 0.25, "correction_cap": 1.2}
    clipped = 0
    for choices in GRID:
        if (choices[0], choices[3]) != (ratio, aggregation):
            continue
        batch = random_batch(rng)
        options = options_of(choices) | bounds
        denominator = denominator_of(aggregation, batch)
        tensors = pack(batch)
        loss, gradient, stats = run(tensors, denominator=denominator, **options)
        clipped += int(stats["clip_low"] + stats["clip_high"])

        def expected_loss(moved: Batch) -> float:
            return reference.policy_loss(moved, batch, denominator, **options)

        assert loss.item() == pytest.approx(expected_loss(batch), rel=1e-9, abs=1e-12), options
        expected = reference.numerical_gradient(expected_loss, batch)
        trained = gradient[tensors["completion_mask"]]
        np.testing.assert_allclose(trained.numpy(), expected, rtol=1e-5, atol=1e-7, err_msg=str(options))
    assert clipped > 20  # the cases do reach the clip


# --------------------------------------------------------------------------- signs and edges


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def test_descent_follows_the_advantage(ratio: str, surrogate: str) -> None:
    for advantage in (1.5, -1.5):
        one = completion(advantage, [-1.0, -2.0, -0.5], [1.0, 1.05, 0.95])
        _, gradient, _ = run(pack([one]), ratio=ratio, surrogate=surrogate, denominator=1)
        assert bool((gradient[2:] * advantage < 0).all())  # minus the gradient raises what was good


def test_kl_gradient_pulls_to_the_reference() -> None:
    differences = np.array([-100.0, -30.0, -3.0, -0.1, 0.1, 3.0, 30.0, 100.0])
    log_probs = np.full(8, -1.0)
    one = Completion(0.0, log_probs, log_probs, log_probs - differences, log_probs)
    for kl in ("k2", "k3"):
        _, gradient, _ = run(pack([one]), kl_coef=1.0, kl=kl, denominator=1)
        # Positive where the policy is above the reference, negative (or given up, never positive) below it.
        assert bool((gradient[2:6] <= 0).all()), kl
        assert bool((gradient[4:6] < 0).all()) and bool((gradient[6:] > 0).all()), kl


# 1 - clip_low = 0.5 and 1 + clip_high = 2 are exact in binary, and so are exp(-+log 2).
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize(
    "value,advantage,clipped_side",
    [
        (2.0, 1.0, None),
        (2.0, -1.0, None),
        (0.5, 1.0, None),
        (0.5, -1.0, None),
        (2.0 + 1e-9, 1.0, "clip_high"),
        (2.0 + 1e-9, -1.0, None),
        (2.0 - 1e-9, 1.0, None),
        (0.5 - 1e-9, -1.0, "clip_low"),
        (0.5 - 1e-9, 1.0, None),
        (0.5 + 1e-9, -1.0, None),
        (50.0, 1.0, "clip_high"),
        (50.0, -1.0, None),
        (0.01, -1.0, "clip_low"),
        (0.01, 1.0, None),
    ],
)
def test_clip_edges(ratio: str, value: float, advantage: float, clipped_side: str | None) -> None:
    """At the edge the whole gradient flows; beyond it none, but only on the side the advantage pushes to."""
    tensors = pack([completion(advantage, [0.0], [value])])
    exact = torch.exp(tensors["log_probs"] - tensors["old_log_probs"])[2].item()
    assert exact == value or value not in (0.5, 2.0)
    loss, gradient, stats = run(tensors, ratio=ratio, clip_low=0.5, clip_high=1.0, denominator=1)
    bound = {None: value, "clip_low": 0.5, "clip_high": 2.0}[clipped_side]
    assert loss.item() == pytest.approx(-bound * advantage, rel=1e-12)
    assert gradient[2].item() == pytest.approx(0.0 if clipped_side else -value * advantage, rel=1e-12)
    for name in ("clip_low", "clip_high"):
        assert stats[name].item() == (1 if name == clipped_side else 0)


def test_on_policy_the_surrogates_agree() -> None:
    """At ratio 1 every surrogate and ratio has the policy gradient -A grad log pi, whatever the clip."""
    batch = [completion(0.7, [-1.0, -2.0], [1.0, 1.0]), completion(-0.3, [-1.5], [1.0])]
    for ratio, surrogate in itertools.product(("token", "sequence"), ("clip", "cispo")):
        _, gradient, stats = run(pack(batch), ratio=ratio, surrogate=surrogate, denominator=2)
        assert gradient[[2, 3, 6]].tolist() == pytest.approx([-0.175, -0.175, 0.15], abs=1e-12)
        assert stats["clip_low"].item() == stats["clip_high"].item() == 0


# --------------------------------------------------------------------------- degenerate inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_100_stay_finite(dtype: torch.dtype) -> None:
    rows = itertools.product((-100.0, 100.0), (-100.0, 100.0), (-100.0, 100.0), (-1.0, 1.0))
    batch = [
        Completion(advantage, np.array([0.0]), np.array([a]), np.array([b]), np.array([a + c]))
        for a, b, c, advantage in rows
    ]
    tensors = pack(batch, dtype)
    for choices in GRID:
        denominator = denominator_of(choices[3], batch)
        loss, gradient, stats = run(tensors, denominator=denominator, **options_of(choices))
        assert math.isfinite(loss.item()) and bool(torch.isfinite(gradient).all())
        assert all(math.isfinite(value) for value in summarise_stats(stats).values())


@pytest.mark.parametrize("prompt_tokens", [0, 3])
def test_nothing_to_train_on(prompt_tokens: int) -> None:
    """A mask of zeros, or a stream of no tokens: loss 0, gradient 0, no NaN, even with denominator 0."""
    empty = np.array([])
    tensors = pack([Completion(1.0, empty, empty, empty, empty)] * 2, prompt_tokens=prompt_tokens)
    for choices in GRID:
        for denominator in (0, 5):
            loss, gradient, stats = run(tensors, denominator=denominator, **options_of(choices))
            assert loss.item() == 0.0
            assert gradient.tolist() == [0.0] * (2 * prompt_tokens)
            assert all(math.isfinite(value) for value in summarise_stats(stats).values())
            assert stats["tokens"].item() == 0


def test_a_completion_without_trained_tokens_changes_nothing() -> None:
    """Truncated completions are dropped by their mask alone."""
    empty = np.array([])
    without = run(pack(HAND_WORKED), denominator=3)
    tensors = pack(HAND_WORKED + [Completion(9.0, empty, empty, empty, empty)])
    with_empty = run(tensors, denominator=3)
    assert with_empty[0].item() == without[0].item()
    assert with_empty[1][: len(without[1])].tolist() == without[1].tolist()


def test_length_one_makes_token_and_sequence_the_same() -> None:
    batch = [completion(1.0, [-1.0], [1.1]), completion(-2.0, [-0.3], [0.7]), completion(0.5, [-2.0], [1.6])]
    losses = [
        run(pack(batch), ratio=ratio, aggregation=aggregation, denominator=3)[0].item()
        for ratio in ("token", "sequence")
        for aggregation in ("sequence", "token")
    ]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-14)


def test_old_ref_and_sampler_get_no_gradient() -> None:
    tensors = pack(HAND_WORKED, prompt_tokens=0)
    for name in ("log_probs", "old_log_probs", "ref_log_probs", "sampling_log_probs"):
        tensors[name].requires_grad_()
    loss, stats = policy_loss(**tensors, kl_coef=0.1, correction="token", denominator=2)
    loss.backward()
    assert tensors["log_probs"].grad is not None
    assert all(
        tensors[name].grad is None for name in ("old_log_probs", "ref_log_probs", "sampling_log_probs")
    )
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize(
    "options,word",
    [
        ({"ratio": "word"}, "word"),
        ({"surrogate": "ppo"}, "ppo"),
        ({"aggregation": "batch"}, "batch"),
        ({"correction": "batch"}, "batch"),
        ({"correction": "token", "correction_mode": "drop"}, "drop"),
        ({"kl_coef": 0.1, "kl": "k4"}, "k4"),
    ],
)
def test_unknown_choices_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        run(pack(HAND_WORKED), denominator=2, **options)


@pytest.mark.parametrize(
    "missing,options", [("ref_log_probs", {"kl_coef": 0.1}), ("sampling_log_probs", {"correction": "token"})]
)
def test_missing_inputs_are_refused(missing: str, options: dict[str, Any]) -> None:
    tensors = pack(HAND_WORKED)
    del tensors[missing]
    with pytest.raises(ValueError, match=missing):
        run(tensors, denominator=2, **options)


# --------------------------------------------------------------------------- splits and packing


def join(runs: list[tuple[Tensor, Tensor, dict[str, Tensor]]]) -> dict[str, float]:
    total: dict[str, Tensor] = {}
    for _, _, stats in runs:
        total = add_stats(total, stats)
    return summarise_stats(total)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_any_split_gives_the_same_loss_gradient_and_stats(ratio: str, aggregation: str) -> None:
    rng = random.Random(3)
    batch = [one for _ in range(4) for one in random_batch(rng)]
    options: dict[str, Any] = {
        "ratio": ratio,
        "aggregation": aggregation,
        "kl_coef": 0.1,
        "correction": "token",
        "correction_cap": 1.3,
        "denominator": denominator_of(aggregation, batch),
    }
    whole = run(pack(batch), **options)
    expected = join([whole])
    assert min(expected["clip_low"], expected["clip_high"], expected["correction_cut"]) > 0
    for size in (1, 2, 4, 7):
        parts = [run(pack(batch[start : start + size]), **options) for start in range(0, len(batch), size)]
        assert sum(loss.item() for loss, _, _ in parts) == pytest.approx(whole[0].item(), abs=1e-12)
        torch.testing.assert_close(
            torch.cat([gradient for _, gradient, _ in parts]), whole[1], rtol=0.0, atol=1e-12
        )
        summary = join(parts)
        assert summary.keys() == expected.keys()
        for name, value in expected.items():
            assert summary[name] == pytest.approx(value, rel=1e-9), name


def test_order_in_the_stream_does_not_matter() -> None:
    """Completions may be interleaved and numbered freely: only sequence_ids tells whose a position is."""
    tensors = pack(random_batch(random.Random(4)) * 3)
    order = torch.randperm(len(tensors["log_probs"]), generator=torch.Generator().manual_seed(0))
    shuffled = {name: value[order] for name, value in tensors.items()}
    shuffled["sequence_ids"] = shuffled["sequence_ids"] * 3 + 5
    options: dict[str, Any] = {
        "ratio": "sequence",
        "correction": "sequence",
        "kl_coef": 0.1,
        "denominator": 6,
    }
    expected, actual = run(tensors, **options), run(shuffled, **options)
    assert actual[0].item() == pytest.approx(expected[0].item(), abs=1e-12)
    torch.testing.assert_close(actual[1], expected[1][order], rtol=0.0, atol=1e-12)


def test_hand_worked_stats() -> None:
    # Ratios 1.5 (clipped above), 0.9, 0.5 (clipped below); the same to the reference; entropy 1, 2, 6.
    tensors = pack(HAND_WORKED)
    entropy = torch.tensor([math.nan, math.nan, 1.0, 2.0, math.nan, math.nan, 6.0], dtype=FLOAT)
    _, stats = policy_loss(**tensors, entropy=entropy, denominator=2)
    summary = summarise_stats(stats)
    assert stats["tokens"].item() == 3
    assert summary["clip_low"] == summary["clip_high"] == pytest.approx(1 / 3)
    assert summary["ratio"] == pytest.approx(2.9 / 3)
    assert summary["ratio_max"] == pytest.approx(1.5)
    assert summary["entropy"] == pytest.approx(3.0)
    # k3 = 1/r - 1 + log r: 0.0721317748 + 0.0057505955 + 0.3068528194
    assert summary["kl"] == pytest.approx(0.3847351897 / 3, abs=1e-9)
