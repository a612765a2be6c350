"""The optimiser's parameter groups and its learning rate, step by step."""

import math
from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float, decay_embeddings: bool = True) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices decay, vectors (norms, biases) never do.

    Args:
        model: every parameter that requires a gradient is in exactly one group, tied ones once.
        weight_decay: decoupled weight decay (arXiv 1711.05101) of the matrices.
        decay_embeddings: False also spares `embed_tokens` and `lm_head`.
    """
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_embedding = "embed_tokens" in name or "lm_head" in name
        if parameter.dim() >= 2 and (decay_embeddings or not is_embedding):
            decayed.append(parameter)
        else:
            spared.append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def learning_rate_at(
    step: int,
    *,
    max_steps: int,
    learning_rate: float,
    min_learning_rate: float = 0.0,
    warmup_steps: int = 0,
    constant_steps: int = 0,
) -> float:
    """Learning rate of update `step` (0-based): linear warmup, cosine, constant tail at the minimum.

    With D = max_steps - warmup_steps - constant_steps and s = step - warmup_steps:
        warmup   learning_rate * (step + 1) / (warmup_steps + 1)            step < warmup_steps
        cosine   min + (lr - min) * (1 + cos(pi * s / D)) / 2               0 <= s < D
        tail     min                                                        s >= D

    This is NeMo's CosineAnnealing (which, with a constant tail, starts its warmup at 0 instead). With the
    recipe's warmup 0 and constant 0 it is min + (lr - min) * (1 + cos(pi * step / max_steps)) / 2, so the
    first update uses the full rate.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    decay_steps = max_steps - warmup_steps - constant_steps
    progress = step - warmup_steps
    if progress >= decay_steps:
        return min_learning_rate
    cosine = (1 + math.cos(math.pi * progress / decay_steps)) / 2
    return min_learning_rate + (learning_rate - min_learning_rate) * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> float:
    """Use `learning_rate` for the coming update; returned, so that what is logged is what is used."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    return learning_rate


def is_due(step: int, every: int, max_steps: int) -> bool:
    """Whether something that happens after each `every` steps (0: not), and after the last, happens after `step`."""
    return step + 1 == max_steps or (every > 0 and (step + 1) % every == 0)
