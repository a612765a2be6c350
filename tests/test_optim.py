"""learning_rate_at against hand-computed points and NeMo's scheduler; parameter_groups on a model."""

import pytest
import torch
from torch import nn

import reference
from kaja.optim import learning_rate_at, parameter_groups

RECIPE = {"learning_rate": 1e-5, "min_learning_rate": 1e-7}


# cos(pi / 4) = 0.70710678: 1e-7 + 9.9e-6 * (1 + 0.70710678) / 2 = 8.5501785663e-6, and so on by hand.
@pytest.mark.parametrize(
    "step,expected",
    [
        (0, 1e-5),  # no warm-up: the first update has the full rate
        (20, 8.5501785663e-6),  # 1/4 of the way
        (26, 7.6363678953e-6),  # cos(26 pi / 80) = 0.5224985647
        (40, 5.05e-6),  # half-way: the mean of 1e-5 and 1e-7
        (60, 1.5498214337e-6),  # 3/4
        (79, 1.0381610e-7),  # the last update: cos(79 pi / 80) = -0.99922904
        (80, 1e-7),
        (200, 1e-7),
    ],
)
def test_recipe(step: int, expected: float) -> None:
    """The seeds' SFT: 1e-5 -> 1e-7, cosine, warm-up 0, constant 0; about 80 updates."""
    assert learning_rate_at(step, max_steps=80, **RECIPE) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "step,expected",
    [
        (0, 0.25),
        (1, 0.5),
        (2, 0.75),
        (3, 1.0),  # warm-up 3: (step + 1) / 4, full at step 3
        (5, 0.8681980515),
        (7, 0.55),  # cosine over 8 steps: 0.1 + 0.9 (1 + cos(pi / 4)) / 2; the middle
        (11, 0.1),
        (12, 0.1),
        (13, 0.1),
        (14, 0.1),  # constant tail of 2, and beyond the end
    ],
)
def test_warmup_cosine_tail(step: int, expected: float) -> None:
    """max_steps 13 = warm-up 3 + cosine 8 + tail 2, learning rate 1 -> 0.1."""
    rate = learning_rate_at(
        step, max_steps=13, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=3, constant_steps=2
    )
    assert rate == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "max_steps,warmup_steps,constant_steps",
    [
        (1, 0, 0),
        (7, 0, 0),
        (80, 0, 0),
        (1000, 0, 0),
        (7, 4, 0),
        (80, 1, 0),
        (1000, 50, 0),
        (7, 0, 3),
        (80, 0, 20),
    ],
)
def test_equals_nemo(max_steps: int, warmup_steps: int, constant_steps: int) -> None:
    for step in range(max_steps + 3):
        rate = learning_rate_at(
            step, max_steps=max_steps, warmup_steps=warmup_steps, constant_steps=constant_steps, **RECIPE
        )
        expected = reference.nemo_cosine_annealing(step, max_steps, 1e-5, 1e-7, warmup_steps, constant_steps)
        assert rate == pytest.approx(expected, rel=1e-12), step


def test_warmup_with_tail_differs_from_nemo_only_in_the_warmup() -> None:
    """With a constant tail NeMo's warm-up is step / warmup, whose first update is lost; kaja's never is 0."""
    options = {"max_steps": 40, "warmup_steps": 5, "constant_steps": 10}
    for step in range(42):
        rate = learning_rate_at(step, **options, **RECIPE)
        expected = reference.nemo_cosine_annealing(step, 40, 1e-5, 1e-7, 5, 10)
        if step >= 5:
            assert rate == pytest.approx(expected, rel=1e-12)
        else:
            assert rate > expected
    assert learning_rate_at(0, **options, **RECIPE) > 0
    assert reference.nemo_cosine_annealing(0, 40, 1e-5, 1e-7, 5, 10) == 0


def test_never_rises_after_the_warmup_nor_leaves_its_bounds() -> None:
    rates = [
        learning_rate_at(step, max_steps=50, warmup_steps=5, constant_steps=5, **RECIPE) for step in range(60)
    ]
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert max(rates) == pytest.approx(1e-5, rel=1e-12) and min(rates) > 0
    assert rates[-1] == pytest.approx(1e-7, rel=1e-12)


class Small(nn.Module):
    """The parameter names of kaja.model.CausalLM, with tied embeddings."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 4)
        self.q_proj = nn.Linear(4, 4, bias=True)
        self.input_layernorm = nn.LayerNorm(4, bias=False)
        self.q_norm = nn.RMSNorm(2)
        self.lm_head = nn.Linear(4, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def names_of(model: nn.Module, group: dict) -> list[str]:
    return sorted(
        name
        for name, parameter in model.named_parameters()
        if any(parameter is one for one in group["params"])
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_groups(tied: bool, decay_embeddings: bool) -> None:
    model = Small(tied)
    groups = parameter_groups(model, weight_decay=0.1, decay_embeddings=decay_embeddings)
    decayed = [name for group in groups if group["weight_decay"] == 0.1 for name in names_of(model, group)]
    spared = [name for group in groups if group["weight_decay"] == 0.0 for name in names_of(model, group)]
    embeddings = ["embed_tokens.weight"] if tied else ["embed_tokens.weight", "lm_head.weight"]
    vectors = ["input_layernorm.weight", "q_norm.weight", "q_proj.bias"]
    assert decayed == sorted((embeddings if decay_embeddings else []) + ["q_proj.weight"])
    assert spared == sorted(vectors + ([] if decay_embeddings else embeddings))
    every = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(every) == sorted({id(parameter) for parameter in model.parameters()})  # each exactly once


def test_frozen_parameters_are_left_out() -> None:
    model = Small(tied=False)
    model.q_proj.weight.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1)
    assert not any(parameter is model.q_proj.weight for group in groups for parameter in group["params"])


def test_decay_is_decoupled_and_spares_vectors() -> None:
    """One AdamW step with zero gradients: matrices shrink by lr * decay, vectors stay."""
    model = Small(tied=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
            parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=0.5).step()
    assert model.q_proj.weight.unique().item() == pytest.approx(2.0 * (1 - 0.5 * 0.1))
    assert model.q_proj.bias.unique().item() == model.q_norm.weight.unique().item() == 2.0
