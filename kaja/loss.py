"""The losses of SFT and GRPO, exactly: sums over this micro-batch divided by global counts.

Every loss here is `local masked sum / denominator`, where `denominator` counts the whole global batch
(all micro-batches, all ranks). The gradients of micro-batches and ranks are then *added*, never
averaged, so loss and gradient do not depend on how a batch is split or packed.

Read in this order: token_log_probs -> sft_loss -> group_advantages -> kl_estimate -> policy_loss.
All of it is pure tensor arithmetic: no files, no network, no torch.distributed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# exp() of a larger log-ratio is beyond any use and soon beyond float32 (e^88). Where a log-ratio is
# clamped it gets no gradient.
MAX_LOG_RATIO = 20.0


# ---------------------------------------------------------------------------------------------------
# Log-probabilities of tokens, without the (T, V) logits
# ---------------------------------------------------------------------------------------------------


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    top_p: float = 1.0,
    top_k: int = 0,
    equal_gradients: bool = False,
    num_rows: int = 256,
    num_columns: int = 2048,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) at `labels`, and optionally the entropy.

    With z = hidden @ weight.T / temperature, and K all tokens or those that top-k and top-p keep of z:
        log p_label = z_label - log sum_{v in K} exp z_v         H = -sum_{v in K} p_v log p_v
    K is chosen as the engine chooses it (_least_likely_kept) but from these z, and the label is always in it:
    engine and trainer round differently, so a token sampled at K's border may lie outside of the trainer's.
    Its log-prob is then finite, and at most that of every other token kept.

    The (T, V) logits are never there at once. They are worked on in tiles of (T, num_columns), with a running maximum
    and sum for each row, and the backward computes each tile again: four matrix products in all, and each row of the
    weight's gradient is written once. Where whole rows are needed, tiles are (num_rows, V): for top-p and top-k, and
    for equal_gradients.

    Args:
        hidden: (T, D) states after the final norm.
        weight: (V, D) output embedding.
        labels: (T,) int64 in [0, V).
        temperature: > 0; logits are divided by it.
        with_entropy: also return the entropy of each softmax; costs one more tile of memory.
        top_p: in (0, 1]; 1 is off. Sorts the logits in the forward: five more tiles of memory.
        top_k: 0 is off.
        equal_gradients: the caller's word that the loss depends on the sum of the log-probs alone, as SFT's does. On a
            CPU the gradients of that sum are then computed in the forward, from logits that are there: three matrix
            products instead of four. Not with_entropy, and not on a GPU, which would wait for the memory: each tile
            reads and writes the weight's whole gradient.
        num_rows, num_columns: sizes of the tiles; a tile is the largest tensor ever made.

    Returns:
        log_probs (T,) and entropy (T,) or None: float32, or float64 for float64 inputs. bfloat16
        inputs are multiplied with float32 results: rounded logits would be useless in ratios.
        Both carry gradients to `hidden` and `weight`, which are summed in float32, too.

    Gradients, with K a constant (p_v = 0 outside of it):
        d log p_label / d z_v = [v = label] - p_v        dH / d z_v = -p_v (log p_v + H)

    Raises:
        ValueError: temperature, num_rows or num_columns not positive, top_p or top_k out of range, or shapes that do
            not fit; in the backward, log-probs that get different gradients in spite of equal_gradients.
    """
    if not temperature > 0 or min(num_rows, num_columns) < 1:
        raise ValueError(f"temperature {temperature}, num_rows {num_rows}, num_columns {num_columns}: expected > 0")
    if not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"top_p {top_p} and top_k {top_k}: expected 0 < top_p <= 1 and top_k >= 0")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: "
            f"expected (T, D), (V, D), (T,)"
        )
    in_forward = equal_gradients and not with_entropy and not hidden.is_cuda and torch.is_grad_enabled()
    log_probs, entropy = _TokenLogProbs.apply(
        hidden, weight, labels, temperature, with_entropy, top_p, top_k, in_forward, num_rows, num_columns
    )
    return log_probs, entropy


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        with_entropy: bool,
        top_p: float,
        top_k: int,
        gradients_now: bool,
        num_rows: int,
        num_columns: int,
    ) -> tuple[Tensor, Tensor | None]:
        truncated = top_p < 1 or 0 < top_k < len(weight)
        ctx.temperature, ctx.gradients_now = temperature, gradients_now
        whole_rows = truncated or gradients_now
        ctx.tile = (num_rows, len(weight)) if whole_rows else (max(1, len(labels)), num_columns)
        ctx.set_materialize_grads(False)  # an entropy that is only looked at costs no gradient
        border = torch.empty_like(labels) if truncated else None
        gradients = _Gradients(ctx, hidden, weight) if gradients_now else None

        label_logits = hidden.new_zeros(len(labels), dtype=_dtype_of_sums(hidden))
        # Of the columns so far: the maximum, and the sums of exp(z - maximum) and of (z - maximum) exp(z - maximum).
        highest = torch.full_like(label_logits, torch.finfo(label_logits.dtype).min)
        total = torch.zeros_like(label_logits)
        weighted = torch.zeros_like(label_logits) if with_entropy else None
        for rows, columns, logits in _logit_tiles(hidden, weight, temperature, ctx.tile):
            dropped = None
            if border is not None:
                border[rows] = _least_likely_kept(logits, top_p, top_k)
                dropped = _less_likely(logits, border[rows], labels[rows])
                logits.masked_fill_(dropped, -torch.inf)
            column, is_here = _column_of(labels[rows], columns)
            label_logits[rows] += torch.where(is_here, logits.gather(1, column), 0.0).squeeze(1)
            higher = torch.maximum(highest[rows], logits.amax(dim=1))
            rise = higher - highest[rows]
            highest[rows] = higher
            logits.sub_(higher[:, None])
            if weighted is None:
                exponentials = logits.exp_()
            else:
                exponentials = logits.exp()
                if dropped is not None:
                    logits.masked_fill_(dropped, 0.0)  # 0 * -inf is NaN
                sums = logits.mul_(exponentials).sum(dim=1)
                weighted[rows] = (weighted[rows] - rise * total[rows]) * rise.neg().exp() + sums
            total[rows] = total[rows] * rise.neg().exp() + exponentials.sum(dim=1)
            if gradients is not None:  # of the sum of these rows' log-probs: their totals are whole
                grad_logits = exponentials.div_(-total[rows, None])
                grad_logits.scatter_add_(1, column, is_here.to(grad_logits.dtype))
                gradients.add(grad_logits, rows, columns)
                del grad_logits
            del logits, exponentials, dropped  # before the next tile is made
        log_total = total.log()
        entropy = None if weighted is None else log_total - weighted / total
        if gradients is None:
            ctx.save_for_backward(hidden, weight, labels, highest + log_total, entropy, border)
        else:
            ctx.save_for_backward(*gradients.results())
        return label_logits - highest - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradients_now:
            return *_scale_gradients(ctx.saved_tensors, grad_log_probs), *[None] * 9
        hidden, weight, labels, log_normalizer, entropy, border = ctx.saved_tensors
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(log_normalizer)
        gradients = _Gradients(ctx, hidden, weight)
        for rows, columns, log_p in _logit_tiles(hidden, weight, ctx.temperature, ctx.tile):
            dropped = None if border is None else _less_likely(log_p, border[rows], labels[rows])
            log_p.sub_(log_normalizer[rows, None])
            upstream = grad_log_probs[rows, None]
            if dropped is not None:
                log_p.masked_fill_(dropped, -torch.inf)
            if grad_entropy is None:
                grad_logits = log_p.exp_().mul_(-upstream)
            else:
                p = log_p.exp()
                if dropped is not None:
                    log_p.masked_fill_(dropped, 0.0)
                # -p (g_log_prob + g_entropy (log p + H))
                log_p.add_(entropy[rows, None]).mul_(-grad_entropy[rows, None]).sub_(upstream)
                grad_logits = log_p.mul_(p)
            column, is_here = _column_of(labels[rows], columns)
            grad_logits.scatter_add_(1, column, torch.where(is_here, upstream, 0.0))
            gradients.add(grad_logits, rows, columns)
            del log_p, grad_logits, dropped  # before the next tile is made
        return *gradients.results(), *[None] * 9


def _logit_tiles(
    hidden: Tensor, weight: Tensor, temperature: float, tile: tuple[int, int]
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, logits[rows, columns]) of the (T, V) logits; each may be overwritten, and is by the next."""
    size = min(tile[0], len(hidden)) * min(tile[1], len(weight))
    memory = None if hidden.is_cuda else hidden.new_empty(size, dtype=_dtype_of_sums(hidden))
    for rows in _slices(len(hidden), tile[0]):
        for columns in _slices(len(weight), tile[1]):
            yield rows, columns, _scaled_logits(hidden[rows], weight[columns], temperature, memory)


class _Gradients:
    """Of hidden and weight, where they are asked for: the sums of the tiles' matrix products."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor) -> None:
        self.inputs, self.temperature = (hidden, weight), ctx.temperature
        wide = _dtype_of_sums(hidden)
        # Tiles of all rows add to each row of the weight's gradient only once: no sum that must be wider.
        of_weight = wide if ctx.tile[0] < len(hidden) else weight.dtype
        self.totals = [
            torch.zeros_like(tensor, dtype=dtype) if asked else None
            for tensor, dtype, asked in zip(self.inputs, (wide, of_weight), ctx.needs_input_grad)
        ]

    def add(self, grad_logits: Tensor, rows: slice, columns: slice) -> None:
        """The products of a tile; overwrites grad_logits (C, N)."""
        hidden, weight = self.inputs
        if self.temperature != 1.0:
            grad_logits.div_(self.temperature)
        if hidden.is_cuda:
            grad_logits = grad_logits.to(hidden.dtype)
        grad_hidden, grad_weight = self.totals
        if grad_hidden is not None:
            _add_product(grad_hidden[rows], grad_logits, weight[columns])
        if grad_weight is not None:
            _add_product(grad_weight[columns], grad_logits.T, hidden[rows])

    def results(self) -> list[Tensor | None]:
        """In the dtypes of the inputs."""
        return [None if total is None else total.to(tensor.dtype) for total, tensor in zip(self.totals, self.inputs)]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in float32 or better, whatever the three are."""
    if left.dtype == right.dtype == _dtype_of_sums(left):
        total.addmm_(left, right)
    else:
        total.add_(_wide_product(left, right))


def _scale_gradients(gradients: Sequence[Tensor | None], grad_log_probs: Tensor | None) -> list[Tensor | None]:
    """Those of the log-probs' sum -> of a loss whose gradient at each log-prob is the same; in place."""
    if grad_log_probs is None:
        return [None, None]
    if len(grad_log_probs) == 0:
        return list(gradients)
    lowest, highest = grad_log_probs.aminmax()
    if lowest < highest:  # NaN, be it of one only, is let through: whoever looks at the gradients shall see it
        raise ValueError("equal_gradients was promised, but the log-probs' gradients differ")
    return [None if gradient is None else gradient.mul_(highest) for gradient in gradients]


def _column_of(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(C,) labels -> (C, 1) their places in these columns, 0 where they are elsewhere, and whether they are here."""
    is_here = (labels >= columns.start) & (labels < columns.stop)
    return torch.where(is_here, labels - columns.start, 0)[:, None], is_here[:, None]


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _scaled_logits(hidden: Tensor, weight: Tensor, temperature: float, memory: Tensor | None = None) -> Tensor:
    """(C, D), (N, D) -> (C, N) in float32 or better, whatever the inputs are; made in `memory`, if that is given."""
    logits = _wide_product(hidden, weight.T, memory)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _wide_product(left: Tensor, right: Tensor, memory: Tensor | None = None) -> Tensor:
    """left @ right in float32 or better."""
    dtype = _dtype_of_sums(left)
    if left.is_cuda and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    out = None if memory is None else memory[: len(left) * right.shape[1]].view(len(left), right.shape[1])
    return torch.mm(left.to(dtype), right.to(dtype), out=out)


def _dtype_of_sums(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _least_likely_kept(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """(C, V) -> (C,) int64: the last token that top-k, then top-p keeps. It alone describes the whole set.

    As in vLLM 0.32 and transformers, top-k keeps each logit not below the k-th largest (so all that equal it).
    Top-p renormalises over these and drops from the least likely on while the dropped probabilities sum up to at
    most 1 - top_p: the token that takes the kept ones over top_p is kept. Of equal logits the lower index stays.
    On equal logits vLLM's paths differ: the sort on a CPU keeps any of them, the Triton kernel also cuts top-k to k.
    """
    size = logits.shape[1]
    if 0 < top_k < size:
        lowest = logits.topk(top_k, dim=1).values[:, -1:]
        if top_p == 1:
            return size - 1 - (logits == lowest).flip(1).byte().argmax(dim=1)  # the last of equal ones
        size = max(top_k, int((logits >= lowest).sum(dim=1).max()))  # NaN logits are not >= anything
        columns = logits.topk(size, dim=1).indices.sort(dim=1).values
        values, order = logits.gather(1, columns).sort(dim=1, descending=True, stable=True)
        values.masked_fill_(values < lowest, -torch.inf)
        order = columns.gather(1, order)
    else:
        values, order = logits.sort(dim=1, descending=True, stable=True)
    sums = values.flip(1).softmax(dim=1).cumsum(dim=1)
    room = 1 - torch.tensor(top_p, dtype=logits.dtype)  # rounded like the sums, as vLLM does
    num_dropped = (sums[:, :-1] <= room).sum(dim=1, keepdim=True)  # the most likely token is never dropped
    return order.gather(1, size - 1 - num_dropped).squeeze(1)


def _less_likely(logits: Tensor, border: Tensor, labels: Tensor | None = None) -> Tensor:
    """(C, V) bool: what is less likely than the token `border` (C,), or equal and behind it; never the labels."""
    border = border[:, None]
    lowest = logits.gather(1, border)
    behind = torch.arange(logits.shape[1], device=logits.device) > border
    dropped = (logits < lowest) | ((logits == lowest) & behind)
    return dropped if labels is None else dropped.scatter_(1, labels[:, None], False)


# ---------------------------------------------------------------------------------------------------
# SFT
# ---------------------------------------------------------------------------------------------------


def sft_loss(log_probs: Tensor, completion_mask: Tensor, denominator: float) -> Tensor:
    """Negative log-likelihood of the completions: -(sum of log_probs where the mask is True) / denominator.

    Args:
        log_probs: (T,) float; what stands where the mask is False is dropped, even NaN.
        completion_mask: (T,) bool.
        denominator: trained-on tokens of the whole global batch (token mean).

    Returns:
        A scalar; 0 with zero gradient where the mask is all False.
    """
    return -_masked(log_probs, completion_mask).sum() / max(denominator, 1)


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    # where(), not multiplication: NaN * 0 is NaN, in the gradient too.
    return torch.where(mask, values, 0.0)


# ---------------------------------------------------------------------------------------------------
# GRPO: rewards -> advantages
# ---------------------------------------------------------------------------------------------------


def group_advantages(
    rewards: Tensor, scale: Literal["group", "batch", "none"] = "group", eps: float = 1e-4
) -> Tensor:
    """Advantages of the G completions of each prompt: reward minus the group's mean, scaled.

    DeepSeekMath (arXiv 2402.03300, section 4.1.2): A_i = (r_i - mean(r)) / std(r).

    Args:
        rewards: (P, G) float, G >= 2. NaN: no verdict; it takes no part in mean or std.
        scale: "group" divides by the group's std + eps (GRPO); "batch" by the std of all rewards + eps;
            "none" only centres (Dr. GRPO, arXiv 2503.20783: dividing favours easy and hard prompts).
        eps: added to the std.

    Returns:
        (P, G) in the dtype of `rewards`. Exactly 0 for NaN rewards, for groups with fewer than two
        verdicts, and for groups without spread: there the std is rounding noise, and dividing by it
        would turn noise into advantages of size one.

    The std has ddof=1, as in TRL and verl (verl: eps 1e-6; OpenRLHF: 1e-9; open-instruct, nano-aha
    and GRPO-Zero: ddof 0). Computed in float64.

    Raises:
        ValueError: not (P, G), a group of one, or an unknown scale.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards {tuple(rewards.shape)}: expected (P, G) with G >= 2: a group of one has no baseline")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale {scale!r}: expected 'group', 'batch' or 'none'")
    values = rewards.double()
    centred = values - values.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (_nan_std(values, dim=1) + eps)
    elif scale == "batch":
        centred = centred / (_nan_std(values.reshape(1, -1), dim=1) + eps)
    informative = groups_with_spread(rewards)[:, None] & ~rewards.isnan()
    return torch.where(informative, centred, 0.0).to(rewards.dtype)


def groups_with_spread(rewards: Tensor) -> Tensor:
    """(P, G) rewards -> (P,) bool: at least two verdicts, that differ by more than rounding.

    Only these groups teach anything. Rounding is 1e-6 of the largest reward (or of 1, if that is more).
    """
    missing = rewards.isnan()
    highest = rewards.masked_fill(missing, -torch.inf).amax(dim=1)
    lowest = rewards.masked_fill(missing, torch.inf).amin(dim=1)
    rounding = 1e-6 * torch.maximum(highest.abs(), lowest.abs()).clamp(min=1.0)
    return ((~missing).sum(dim=1) >= 2) & (highest - lowest > rounding)


def kept_completions(
    rewards: Tensor, truncated: Tensor | None = None, *, drop_groups_without_spread: bool = False
) -> Tensor:
    """Which completions enter the loss. The loss knows nothing of this: the others are left out of the batch.

    Args:
        rewards: (P, G); NaN, a failed verdict, is always left out.
        truncated: (P, G) bool; those that are True, cut off by the length limit, are left out too
            (DAPO's overlong filtering); None keeps them.
        drop_groups_without_spread: leave out what has advantage 0 throughout. The KL then ignores it too.

    Returns:
        (P, G) bool. The denominators count what is kept.
    """
    kept = ~rewards.isnan()
    if truncated is not None:
        kept = kept & ~truncated
    if drop_groups_without_spread:
        kept = kept & groups_with_spread(rewards)[:, None]
    return kept


def _nan_std(values: Tensor, dim: int) -> Tensor:
    """Standard deviation with ddof=1 over what is not NaN; dim is kept. NaN where fewer than two are left."""
    deviations = values - values.nanmean(dim=dim, keepdim=True)
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    return (deviations.square().nansum(dim=dim, keepdim=True) / (count - 1)).sqrt()


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """Soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13): 0 down to -1 over the last `buffer` tokens.

    Args:
        lengths: tokens of each completion, any shape, at most max_length.
        max_length: longest completion allowed.
        buffer: 0 < buffer <= max_length; the penalty begins at max_length - buffer.

    Returns:
        min(0, -(length - (max_length - buffer)) / buffer), to be added to the rewards.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer {buffer}: expected 0 < buffer <= max_length {max_length}")
    return -((lengths - (max_length - buffer)) / buffer).clamp(min=0.0, max=1.0)


# ---------------------------------------------------------------------------------------------------
# GRPO: the loss
# ---------------------------------------------------------------------------------------------------


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: Literal["k1", "k2", "k3"] = "k2") -> Tensor:
    """Per-token estimates of KL(policy || reference) from tokens of the policy.

    With d = log_probs - ref_log_probs (joschu.net/blog/kl-approx.html):
        k1 = d                  k2 = d^2 / 2                  k3 = exp(-d) - 1 + d

    As a *number* k1 and k3 are unbiased, and k3 is never negative. As a *loss*, differentiated through
    log_probs, they differ: on tokens of the policy the expected gradient of k2 is the gradient of
    KL(policy || reference); that of k1 is 0; that of k3 is the gradient of the other KL,
    KL(reference || policy). Hence k2 is the default here; k3 is what DeepSeekMath (eq. 4) and TRL
    differentiate. tests/test_kl.py shows all this by exact enumeration.

    Args:
        log_probs, ref_log_probs: (T,).

    Returns:
        (T,). In k3, -d is held at MAX_LOG_RATIO: exp(-d) stays finite, and there the gradient is 0.
    """
    difference = log_probs - ref_log_probs
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        # expm1: in float32, exp(x) - 1 - x is noise of either sign where x is small.
        opposite = (-difference).clamp(max=MAX_LOG_RATIO)
        return torch.expm1(opposite) - opposite
    raise ValueError(f"kl {kind!r}: expected 'k1', 'k2' or 'k3'")


def aggregate(
    values: Tensor,
    completion_mask: Tensor,
    sequence_ids: Tensor,
    aggregation: Literal["sequence", "token", "constant"],
    denominator: float,
) -> Tensor:
    """Per-token values (T,) -> this micro-batch's share of the global loss, a scalar.

        "sequence":  sum_i (1/|o_i|) sum_t values / denominator      denominator = completions, globally
        "token":     sum_i sum_t values / denominator                denominator = completion tokens, globally
        "constant":  sum_i sum_t values / denominator                denominator = completions x a fixed length

    |o_i| counts the True positions of completion i, all of which must be in this micro-batch.
    """
    values = _masked(values, completion_mask)
    if aggregation == "sequence":
        lengths = _sequence_sums(completion_mask.to(values.dtype), sequence_ids)
        values = values / lengths.clamp(min=1)[sequence_ids]
    elif aggregation not in ("token", "constant"):
        raise ValueError(f"aggregation {aggregation!r}: expected 'sequence', 'token' or 'constant'")
    return values.sum() / max(denominator, 1)


def _sequence_sums(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """(T,) -> (B,): the sum over each sequence."""
    count = int(sequence_ids.max()) + 1 if len(sequence_ids) else 0
    return values.new_zeros(count).index_add(0, sequence_ids, values)


def _sequence_means(values: Tensor, completion_mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """(T,) -> (T,): at each position the mean over its sequence's masked positions."""
    lengths = _sequence_sums(completion_mask.to(values.dtype), sequence_ids)
    sums = _sequence_sums(_masked(values, completion_mask), sequence_ids)
    return (sums / lengths.clamp(min=1))[sequence_ids]


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    sequence_ids: Tensor,
    *,
    ref_log_probs: Tensor | None = None,
    sampling_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    ratio: Literal["token", "sequence"] = "token",
    surrogate: Literal["clip", "cispo"] = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl: Literal["k1", "k2", "k3"] = "k2",
    correction: Literal["none", "token", "sequence"] = "none",
    correction_cap: float = 2.0,
    correction_mode: Literal["truncate", "mask"] = "truncate",
    aggregation: Literal["sequence", "token", "constant"] = "sequence",
    denominator: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO loss of one micro-batch, and sums for its statistics.

    With r = exp(log_probs - old_log_probs), A the advantages and w the sampler correction:
        clip:   l_t = -w_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
        cispo:  l_t = -w_t stop_gradient(clip(r_t, 1 - clip_low, 1 + clip_high)) A_t log_probs_t
        loss  = aggregate(l_t + kl_coef * kl_estimate_t)

    Which choices make which published method (clip bounds are the papers'):

        method                  advantage  ratio     surrogate  clip low/high  aggregation   KL
        GRPO  2402.03300 eq. 3  group      token     clip       .2 / .2        sequence      k3, .04
        Dr. GRPO  2503.20783    none       token     clip       .2 / .2        constant      off
        DAPO  2503.14476 eq. 8  group      token     clip       .2 / .28       token         off
        BNPO (TRL's loss_type)  group      token     clip       .2 / .2        token (1)     off
        GSPO  2507.18071 eq. 5  group      sequence  clip       3e-4 / 4e-4    sequence      off
        CISPO 2506.13585 eq. 4  group      token     cispo      1 (none) / (2) token         off
        (1) over the tokens of the micro-batch: equal to DAPO's when there is only one. Not Beta normalisation
            (arXiv 2506.02864), which bears the same letters
        (2) the paper tunes it; the lower bound is off

    Where public code differs: CISPO's upper bound is 1 + clip_high here and in verl, clip_high itself
    in TRL. The KL stands outside the correction w, as in TRL. TRL multiplies it by r by default.
    r is length-normalised for "sequence": exp(mean over the completion of log r), as GSPO defines it.

    Sampler correction (truncated importance sampling): the engine that sampled computes slightly other
    probabilities than the trainer. w = exp(old_log_probs - sampling_log_probs), a constant for the
    gradient; per token, or per sequence as the exponential of the mean (a sum would drift with length).
    "truncate" caps w at correction_cap, "mask" sets what is above it to 0.

    Args:
        log_probs: (T,) of the policy, with gradient.
        old_log_probs: (T,) of the policy before this batch's first update; no gradient.
        advantages: (T,) the completion's advantage at each of its positions.
        completion_mask: (T,) bool. All that is False is dropped, NaN included.
        sequence_ids: (T,) int64, which completion a position belongs to; a completion is never split.
        ref_log_probs: (T,) of the reference; needed when kl_coef is not 0.
        sampling_log_probs: (T,) as reported by the engine; needed when correction is not "none".
        entropy: (T,) of the policy, only for the statistics.
        denominator: the global count that `aggregation` asks for (see aggregate).

    Returns:
        loss: scalar, float. 0 with zero gradient where the mask is all False.
        stats: detached sums over this micro-batch. Those of micro-batches and ranks are added (names
            that end in "_max": the maximum is taken), then given to `summarise_stats`.

    Raises:
        ValueError: an unknown choice, or an input that a choice needs is missing.
    """
    if kl_coef and ref_log_probs is None:
        raise ValueError(f"kl_coef {kl_coef} needs ref_log_probs")
    log_probs = _masked(log_probs, completion_mask)
    old_log_probs = _masked(old_log_probs, completion_mask).detach()
    advantages = _masked(advantages, completion_mask)

    log_ratio = log_probs - old_log_probs
    if ratio == "sequence":
        log_ratio = _sequence_means(log_ratio, completion_mask, sequence_ids)
    elif ratio != "token":
        raise ValueError(f"ratio {ratio!r}: expected 'token' or 'sequence'")
    ratios = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratios.clamp(1 - clip_low, 1 + clip_high)

    if surrogate == "clip":
        losses = -torch.minimum(ratios * advantages, clipped * advantages)
    elif surrogate == "cispo":
        losses = -clipped.detach() * advantages * log_probs
    else:
        raise ValueError(f"surrogate {surrogate!r}: expected 'clip' or 'cispo'")

    raw_weights, weights = _correction_weights(
        old_log_probs, sampling_log_probs, completion_mask, sequence_ids, correction, correction_cap, correction_mode
    )
    losses = losses * weights
    if ref_log_probs is not None:
        ref_log_probs = _masked(ref_log_probs, completion_mask).detach()
        if kl_coef:
            losses = losses + kl_coef * kl_estimate(log_probs, ref_log_probs, kl)
    loss = aggregate(losses, completion_mask, sequence_ids, aggregation, denominator)

    # A clip bites where it changes the gradient: for "clip" only on the side the advantage pushes to.
    low, high = ratios < 1 - clip_low, ratios > 1 + clip_high
    if surrogate == "clip":
        low, high = low & (advantages < 0), high & (advantages > 0)
    of_tokens = {"clip_low": low, "clip_high": high, "ratio": ratios}
    if entropy is not None:
        of_tokens["entropy"] = entropy
    if ref_log_probs is not None:
        of_tokens["kl"] = kl_estimate(log_probs, ref_log_probs, "k3")
    if correction != "none":
        of_tokens |= {"correction": raw_weights, "correction_squared": raw_weights.square()}
        of_tokens["correction_cut"] = raw_weights > correction_cap
        of_tokens["correction_kl"] = raw_weights - 1 - raw_weights.log()  # k3 of KL(sampler || trainer)
    return loss, _token_stats(of_tokens, completion_mask)


@torch.no_grad()
def _token_stats(of_tokens: dict[str, Tensor], completion_mask: Tensor) -> dict[str, Tensor]:
    """Per-token values (T,) -> their sums over the mask, the number of tokens, and two maxima."""
    masked = {name: _masked(values.detach(), completion_mask) for name, values in of_tokens.items()}
    stats = {name: values.sum() for name, values in masked.items()} | {"tokens": completion_mask.sum()}
    for name in ("ratio", "correction"):  # both are positive: what is masked, 0, is never the maximum
        if name in masked:
            stats[f"{name}_max"] = masked[name].max() if len(completion_mask) else stats[name]
    return stats


def _correction_weights(
    old_log_probs: Tensor,
    sampling_log_probs: Tensor | None,
    completion_mask: Tensor,
    sequence_ids: Tensor,
    correction: str,
    cap: float,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """The importance weights exp(old - sampling), (T,), before and after truncating or masking; see policy_loss."""
    if correction == "none":
        ones = torch.ones_like(old_log_probs)
        return ones, ones
    if correction not in ("token", "sequence"):
        raise ValueError(f"correction {correction!r}: expected 'none', 'token' or 'sequence'")
    if sampling_log_probs is None:
        raise ValueError(f"correction {correction!r} needs sampling_log_probs")
    difference = old_log_probs - _masked(sampling_log_probs, completion_mask).detach()
    if correction == "sequence":
        difference = _sequence_means(difference, completion_mask, sequence_ids)
    weights = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if mode == "truncate":
        return weights, weights.clamp(max=cap)
    if mode == "mask":
        return weights, torch.where(weights > cap, 0.0, weights)
    raise ValueError(f"correction_mode {mode!r}: expected 'truncate' or 'mask'")


def add_stats(total: dict[str, Tensor], stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the statistics of two micro-batches: sums are added, "_max" entries compared."""
    joined = dict(total)
    for name, value in stats.items():
        if name not in joined:
            joined[name] = value
        elif name.endswith("_max"):
            joined[name] = torch.maximum(joined[name], value)
        else:
            joined[name] = joined[name] + value
    return joined


def summarise_stats(stats: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Globally added statistics -> per-token means, maxima, and the effective sample size as a share.

    effective_sample_size = (sum w)^2 / (n sum w^2): 1 when sampler and trainer agree, less when a few
    tokens carry the weight. Computed from the weights before they are cut.
    """
    values = {name: float(value) for name, value in stats.items()}
    tokens = max(values.pop("tokens"), 1.0)
    squared = values.pop("correction_squared", None)
    summary = {name: value if name.endswith("_max") else value / tokens for name, value in values.items()}
    if squared is not None:
        summary["effective_sample_size"] = values["correction"] ** 2 / max(tokens * squared, 1e-12)
    return summary
