"""Sequences -> packed streams; samples -> batches that any number of ranks and a resumed run agree on.

All of it is a pure function of (lengths, step, seed, number of ranks): the state of the data is the
step, and a resumed run sees exactly what an uninterrupted one would.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kaja.chat import TokenSequence
from kaja.errors import UserError


@dataclass(frozen=True)
class Batch:
    """One packed stream. Position t of every (T,) tensor is about labels[t], the token after input_ids[t].

    A sequence of n tokens takes n - 1 positions: shifting happens here, once, and nowhere else.
    """

    input_ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64
    completion_mask: Tensor  # (T,) bool, True = labels[t] is trained on
    positions: Tensor  # (T,) int64, from 0 in each sequence that goes on from none
    cu_seqlens: Tensor  # (B + 1,) int32
    sequence_ids: Tensor  # (T,) int64, 0 .. B - 1
    prefixes: Tensor | None = None  # (B,) int64, the sequence that each one goes on from, -1: none; see pack_groups

    def to(self, device: torch.device) -> "Batch":
        tensors = {field.name: tensor for field in fields(self) if (tensor := getattr(self, field.name)) is not None}
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def pack(sequences: Sequence[TokenSequence]) -> Batch:
    """Lay sequences of at least two tokens end to end."""
    lengths = torch.tensor([len(sequence.input_ids) - 1 for sequence in sequences])
    if int(lengths.min()) < 1:
        raise ValueError("a sequence of fewer than two tokens has nothing to predict")
    ends = lengths.cumsum(0)
    return Batch(
        input_ids=torch.tensor([token for s in sequences for token in s.input_ids[:-1]]),
        labels=torch.tensor([token for s in sequences for token in s.input_ids[1:]]),
        completion_mask=torch.tensor([trained for s in sequences for trained in s.completion_mask[1:]]),
        positions=torch.cat([torch.arange(length) for length in lengths.tolist()]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32),
        sequence_ids=torch.repeat_interleave(torch.arange(len(sequences)), lengths),
    )


def pack_groups(groups: Sequence[tuple[list[int], list[list[int]]]]) -> Batch:
    """Lay (prompt, its completions) end to end, each prompt once: what is computed for it serves all its completions.

    A prompt of p tokens is a sequence of p - 1 positions, not trained on. A completion of n tokens is one of n, all
    trained on: it begins at position p - 1 with the prompt's last token, whose label is the completion's first, and
    goes on from the prompt's sequence (`prefixes`): it sees that, and no other completion. So log-probs and
    gradients are those of `pack` with the prompt before each completion.
    """
    sequences: list[TokenSequence] = []
    prefixes, starts = [], []
    for prompt, completions in groups:
        prefix = -1
        if len(prompt) > 1:
            prefix = len(sequences)
            sequences.append(TokenSequence(prompt, [False] * len(prompt)))
            prefixes.append(-1)
            starts.append(0)
        for completion in completions:
            sequences.append(TokenSequence([prompt[-1], *completion], [False] + [True] * len(completion)))
            prefixes.append(prefix)
            starts.append(len(prompt) - 1)
    packed = pack(sequences)
    positions = packed.positions + torch.tensor(starts)[packed.sequence_ids]
    return replace(packed, positions=positions, prefixes=torch.tensor(prefixes))


def filler(sequences: Sequence[TokenSequence]) -> TokenSequence:
    """The shortest of the sequences with nothing trained on: for a stream that has none of its own."""
    shortest = min(sequences, key=lambda sequence: len(sequence.input_ids))
    return TokenSequence(shortest.input_ids, [False] * len(shortest.completion_mask))


def cut_into_chunks(sequences: Sequence[TokenSequence], length: int, seed: int) -> list[TokenSequence]:
    """Shuffle the sequences, lay them end to end and cut that into chunks of `length` tokens.

    This is how NeMo-Aligner, the slides' tool, fed its data: chunks of 4,097 tokens, positions running
    through and attention reaching across the samples of a chunk. A chunk's last token is the next one's
    first, so that every trained token is predicted exactly once; the last chunk may be shorter.
    """
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed)).tolist()
    input_ids = [token for index in order for token in sequences[index].input_ids]
    mask = [trained for index in order for trained in sequences[index].completion_mask]
    starts = range(0, len(input_ids) - 1, length - 1)
    return [
        TokenSequence(input_ids[start : start + length], [False, *mask[start + 1 : start + length]])
        for start in starts
    ]


def fingerprint(sequences: Iterable[Sequence[int]]) -> int:
    """A number that tells the tokens of one data set from another's: a resumed run must see the same."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(array("q", [len(sequence), *sequence]).tobytes())
    return int.from_bytes(digest.digest()[:6], "big")


def check_batch_size(global_batch_size: int, world_size: int) -> None:
    """UserError unless every rank gets at least one sequence of a full batch.

    Nothing else needs to divide anything: streams are planned anew for every batch (plan_streams).
    """
    if global_batch_size < world_size:
        raise UserError(
            f"global_batch_size {global_batch_size} with {world_size} ranks: every rank needs a sequence in each "
            f"step; nearest possible: --global-batch-size {world_size}, or {global_batch_size} ranks"
        )


def plan_streams(
    lengths: Sequence[int], world_size: int, max_tokens: int, width: int, computed: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Divide sequences into streams, equally many for each rank and of nearly equal cost.

    Args:
        lengths: tokens of each sequence, each at most max_tokens.
        world_size: ranks; each gets the same number of streams, because FSDP's collectives must match.
        max_tokens: most tokens in one stream.
        width: hidden size; a sequence of n tokens costs n (1 + n / (12 width)): matrix products grow
            with n, attention with n^2, and they meet at n = 12 width.
        computed: the n of that cost, where it is less than the length because tokens are shared (pack_groups).

    Returns:
        plan[rank][stream] = indices into `lengths`, each index exactly once. A stream is empty where there
        are fewer sequences than streams.
    """
    if max(lengths) > max_tokens:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit a stream of {max_tokens}")
    costs = [n * (1 + n / (12 * width)) for n in computed or lengths]
    costliest_first = sorted(range(len(lengths)), key=lambda index: (-costs[index], index))
    per_rank = max(1, -(-sum(lengths) // (max_tokens * world_size)))
    while True:
        streams = _fill(costliest_first, lengths, costs, per_rank * world_size, max_tokens)
        if streams is not None:
            return [streams[rank::world_size] for rank in range(world_size)]
        per_rank += 1


def _fill(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[float], count: int, max_tokens: int
) -> list[list[int]] | None:
    """Each sequence into the cheapest of `count` streams that has room; None if one finds no room."""
    streams: list[list[int]] = [[] for _ in range(count)]
    tokens, cost = [0] * count, [0.0] * count
    for index in order:
        open_streams = [s for s in range(count) if tokens[s] + lengths[index] <= max_tokens]
        if not open_streams:
            return None
        chosen = min(open_streams, key=lambda s: (cost[s], s))
        streams[chosen].append(index)
        tokens[chosen] += lengths[index]
        cost[chosen] += costs[index]
    return streams


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    return -(-num_samples // batch_size)


def stream_quotas(weights: dict[str, float], batch_size: int) -> dict[str, int]:
    """How many of a batch each stream gets: its share by weight, rounded so that they add up (largest remainders)."""
    total = sum(weights.values())
    shares = {name: batch_size * weight / total for name, weight in weights.items()}
    quotas = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(weights, key=lambda name: quotas[name] - shares[name])
    for name in by_remainder[: batch_size - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def mixed_indices(step: int, members: dict[str, list[int]], quotas: dict[str, int], seed: int) -> list[int]:
    """The samples of global step `step` where each stream has a fixed share of every batch.

    Each stream runs through permutations of its own members, one after the other: within a stream every
    sample is seen once before any is seen again.
    """
    chosen = []
    for number, (name, quota) in enumerate(quotas.items()):
        count = len(members[name])
        for position in range(step * quota, (step + 1) * quota):
            epoch, place = divmod(position, count)
            chosen.append(members[name][_permutation(count, seed * 1_000_003 + epoch, number)[place]])
    return chosen


def fresh_indices(step: int, draw: int, num_samples: int, count: int, used: set[int], seed: int) -> list[int]:
    """At most `count` samples that the step has not used yet, for its `draw`-th try at groups with spread."""
    order = _permutation(num_samples, (seed * 1_000_003 + step) * 1_000_003 + draw)
    return [index for index in order if index not in used][:count]


@lru_cache(maxsize=64)
def _permutation(count: int, *seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(count).tolist()


def batch_indices(step: int, num_samples: int, batch_size: int, seed: int) -> list[int]:
    """The samples of global step `step` (0-based): each epoch is a fresh permutation, each sample seen once.

    The last batch of an epoch holds what is left: nothing is dropped, nothing seen twice.
    """
    epoch, position = divmod(step, steps_per_epoch(num_samples, batch_size))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_samples, generator=generator)
    return order[position * batch_size : (position + 1) * batch_size].tolist()
