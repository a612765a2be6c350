"""The losses of the papers in plain float64 numpy, written apart from kaja.loss to test it.

A batch is a list of completions. Every function loops over completions and tokens just as the sums of the
papers do, so each can be read beside its equation:

- GRPO: DeepSeekMath, arXiv 2402.03300, equations 3 and 4.
- Dr. GRPO: Understanding R1-Zero-like training, arXiv 2503.20783, section 3.2.
- DAPO: arXiv 2503.14476, equation 8.
- GSPO: arXiv 2507.18071, equations 5 and 7.
- CISPO: MiniMax-M1, arXiv 2506.13585, equations 4 and 5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Completion:
    """The trained tokens of one completion; arrays have one float64 entry a token."""

    advantage: float
    log_probs: np.ndarray
    old_log_probs: np.ndarray
    ref_log_probs: np.ndarray
    sampling_log_probs: np.ndarray

    def __len__(self) -> int:
        return len(self.log_probs)


Batch = list[Completion]


def clipped_term(ratio: float, advantage: float, clip_low: float, clip_high: float) -> float:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)."""
    clipped = min(max(ratio, 1.0 - clip_low), 1.0 + clip_high)
    return min(ratio * advantage, clipped * advantage)


def kl_k1(log_prob: float, ref_log_prob: float) -> float:
    return log_prob - ref_log_prob


def kl_k2(log_prob: float, ref_log_prob: float) -> float:
    return 0.5 * (log_prob - ref_log_prob) ** 2


def kl_k3(log_prob: float, ref_log_prob: float) -> float:
    return math.exp(ref_log_prob - log_prob) - (ref_log_prob - log_prob) - 1.0


KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


# --------------------------------------------------------------------------- advantages


def group_advantages(rewards: list[list[float]], scale: str, eps: float = 1e-4) -> list[list[float]]:
    """(r - mean of the group) / (std + eps) over the rewards that are numbers; ddof = 1."""
    centred = []
    for group in rewards:
        valid = [reward for reward in group if not math.isnan(reward)]
        mean = sum(valid) / len(valid) if valid else 0.0
        centred.append([0.0 if math.isnan(reward) else reward - mean for reward in group])
    every = [reward for group in rewards for reward in group if not math.isnan(reward)]
    advantages = []
    for group, differences in zip(rewards, centred):
        valid = [reward for reward in group if not math.isnan(reward)]
        if scale == "none":
            divisor = 1.0
        elif scale == "group":
            divisor = (float(np.std(valid, ddof=1)) if len(valid) > 1 else 0.0) + eps
        else:
            divisor = (float(np.std(every, ddof=1)) if len(every) > 1 else 0.0) + eps
        advantages.append([difference / divisor for difference in differences])
    return advantages


# --------------------------------------------------------------------------- the papers' losses


def grpo(batch: Batch, clip: float, beta: float) -> float:
    """-1/G sum_i 1/|o_i| sum_t { min(r A, clip(r) A) - beta (ref/pi - log ref/pi - 1) }."""
    total = 0.0
    for completion in batch:
        inner = 0.0
        for t in range(len(completion)):
            ratio = math.exp(completion.log_probs[t] - completion.old_log_probs[t])
            penalty = kl_k3(completion.log_probs[t], completion.ref_log_probs[t])
            inner += clipped_term(ratio, completion.advantage, clip, clip) - beta * penalty
        total += inner / len(completion)
    return -total / len(batch)


def dr_grpo(batch: Batch, clip: float, max_length: int) -> float:
    """GRPO without 1/|o_i|: the sum over tokens is divided by a constant, the generation budget."""
    total = 0.0
    for completion in batch:
        for t in range(len(completion)):
            ratio = math.exp(completion.log_probs[t] - completion.old_log_probs[t])
            total += clipped_term(ratio, completion.advantage, clip, clip)
    return -total / (len(batch) * max_length)


def dapo(batch: Batch, clip_low: float, clip_high: float) -> float:
    """-1 / sum_i |o_i| sum_i sum_t min(r A, clip(r, 1 - low, 1 + high) A)."""
    total = 0.0
    tokens = 0
    for completion in batch:
        tokens += len(completion)
        for t in range(len(completion)):
            ratio = math.exp(completion.log_probs[t] - completion.old_log_probs[t])
            total += clipped_term(ratio, completion.advantage, clip_low, clip_high)
    return -total / tokens


def gspo(batch: Batch, clip_low: float, clip_high: float) -> float:
    """-1/G sum_i min(s_i A_i, clip(s_i) A_i) with s_i = (pi(o_i) / pi_old(o_i)) ** (1 / |o_i|)."""
    total = 0.0
    for completion in batch:
        likelihood_ratio = math.exp(float(np.sum(completion.log_probs - completion.old_log_probs)))
        ratio = likelihood_ratio ** (1.0 / len(completion))
        total += clipped_term(ratio, completion.advantage, clip_low, clip_high)
    return -total / len(batch)


def cispo(batch: Batch, clip_low: float, clip_high: float, weights_of: Batch) -> float:
    """-1 / sum_i |o_i| sum_i sum_t sg(clip(r, 1 - low, 1 + high)) A log pi.

    The weights are taken from `weights_of`, a copy that finite differences do not move: the stop-gradient.
    """
    total = 0.0
    tokens = 0
    for completion, fixed in zip(batch, weights_of):
        tokens += len(completion)
        for t in range(len(completion)):
            ratio = math.exp(fixed.log_probs[t] - fixed.old_log_probs[t])
            weight = min(max(ratio, 1.0 - clip_low), 1.0 + clip_high)
            total += weight * completion.advantage * completion.log_probs[t]
    return -total / tokens


# --------------------------------------------------------------------------- every combination


def policy_loss(
    batch: Batch,
    weights_of: Batch,
    denominator: float,
    *,
    ratio: str = "token",
    surrogate: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl: str = "k2",
    correction: str = "none",
    correction_cap: float = 2.0,
    correction_mode: str = "truncate",
    aggregation: str = "sequence",
) -> float:
    """The five choices of kaja.loss.policy_loss, one completion and one token at a time."""
    total = 0.0
    for completion, fixed in zip(batch, weights_of):
        if len(completion) == 0:
            continue
        inner = 0.0
        for t in range(len(completion)):
            objective = surrogate_term(completion, fixed, t, ratio, surrogate, clip_low, clip_high)
            weight = correction_weight(completion, t, correction, correction_cap, correction_mode)
            penalty = KL[kl](completion.log_probs[t], completion.ref_log_probs[t]) if kl_coef else 0.0
            inner += -weight * objective + kl_coef * penalty
        total += inner / len(completion) if aggregation == "sequence" else inner
    return total / denominator


def surrogate_term(
    completion: Completion,
    fixed: Completion,
    t: int,
    ratio: str,
    surrogate: str,
    clip_low: float,
    clip_high: float,
) -> float:
    source = fixed if surrogate == "cispo" else completion
    log_ratios = source.log_probs - source.old_log_probs
    value = math.exp(log_ratios[t] if ratio == "token" else float(np.mean(log_ratios)))
    if surrogate == "clip":
        return clipped_term(value, completion.advantage, clip_low, clip_high)
    weight = min(max(value, 1.0 - clip_low), 1.0 + clip_high)
    return weight * completion.advantage * completion.log_probs[t]


def correction_weight(completion: Completion, t: int, level: str, cap: float, mode: str) -> float:
    if level == "none":
        return 1.0
    log_weights = completion.old_log_probs - completion.sampling_log_probs
    weight = math.exp(log_weights[t] if level == "token" else float(np.mean(log_weights)))
    if mode == "truncate":
        return min(weight, cap)
    return weight if weight <= cap else 0.0


def numerical_gradient(function: Callable[[Batch], float], batch: Batch, step: float = 1e-6) -> np.ndarray:
    """Central differences of function(batch) with respect to the log-probs of all tokens, in order."""
    gradient = []
    for i, completion in enumerate(batch):
        for t in range(len(completion)):
            values = []
            for sign in (1.0, -1.0):
                moved = completion.log_probs.copy()
                moved[t] += sign * step
                values.append(function(batch[:i] + [replace(completion, log_probs=moved)] + batch[i + 1 :]))
            gradient.append((values[0] - values[1]) / (2.0 * step))
    return np.array(gradient)


# --------------------------------------------------------------------------- learning rate


def nemo_cosine_annealing(
    step: int, max_steps: int, learning_rate: float, minimum: float, warmup_steps: int, constant_steps: int
) -> float:
    """NeMo's CosineAnnealing (nemo/core/optim/lr_scheduler.py), its two branches told as one sentence each.

    Without a constant tail the warm-up is (step + 1) / (warmup + 1), so that step 0 trains; with one it is
    Megatron's step / warmup, whose first step has a learning rate of 0.
    """
    if step > max_steps or step > max_steps - constant_steps:
        return minimum
    if warmup_steps > 0 and step <= warmup_steps:
        if constant_steps == 0:
            return learning_rate * (step + 1) / (warmup_steps + 1)
        return learning_rate * step / warmup_steps
    share = (step - warmup_steps) / (max_steps - warmup_steps - constant_steps)
    return minimum + (learning_rate - minimum) * (1.0 + math.cos(math.pi * share)) / 2.0
