"""A batched sampler in pure torch: TorchEngine's inner loop, and what both engines share (kaja/engine.py).

A wave is P prompts with G completions each, sampled together:
1. prefill: the prompts run once, as packed streams; their keys and values are kept once per prompt,
   not once per completion;
2. decode: one token of every live row a step. A row attends to its prompt's keys (shared by the
   group: one matrix product for G rows) and to its own;
3. a row that samples a stop token leaves the batch: the last rows of the cache fill the holes, so a
   step never works on finished rows and never copies more than those.

Sampling is inverse-CDF from one uniform number per (row, position), so a completion does not depend on
what else is in the batch. `torch.multinomial` would cost five times the output head at V = 100k.
"""

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kaja.errors import UserError
from kaja.loss import _least_likely_kept, _less_likely
from kaja.model import Attend, CausalLM, ModelConfig, packed_attention

# Tokens of one prefill or scoring forward: bounds the activations, costs no speed.
PACK_TOKENS = 4096
# Tokens per block of the two-level inverse CDF.
BLOCK_SIZE = 128
# Tokens of one product of the output head: on a CPU a fifth faster than all at once, for V = 100k.
HEAD_CHUNK = 1024
# vLLM turns temperatures below into 0.01 without a word; so both engines refuse them.
MIN_TEMPERATURE = 0.01


@dataclass(frozen=True)
class Completion:
    """One sampled completion."""

    token_ids: list[int]  # with the stop token, if one was sampled
    log_probs: list[float]  # of each token, under the distribution it was sampled from
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Sampled:
    """What one wave sampled; rows in the order (prompt 0, g 0), (prompt 0, g 1), ..."""

    token_ids: Tensor  # (P * G, max_tokens) int64, valid up to the row's length
    log_probs: Tensor  # (P * G, max_tokens) float32
    lengths: Tensor  # (P * G,) int64, the stop token included
    stopped: Tensor  # (P * G,) bool, False = max_tokens reached

    def completions(self, rows: slice) -> list[Completion]:
        columns = (self.token_ids, self.log_probs, self.lengths, self.stopped)
        return [
            Completion(ids[:length], values[:length], "stop" if stopped else "length")
            for ids, values, length, stopped in zip(*(column[rows].tolist() for column in columns))
        ]


_Groups = Generator[tuple[int, list[Completion]], None, None]


class EngineFailed(RuntimeError):
    """The engine died, or did not finish in time twice. One line: what happened and what to do."""


def each_limit(max_tokens: int | Sequence[int], num_prompts: int) -> list[int]:
    """max_tokens of every prompt; UserError for a list of another length or a limit below 1."""
    limits = [max_tokens] * num_prompts if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != num_prompts:
        raise UserError(
            f"{num_prompts} prompts came with {len(limits)} max_tokens; it must be one number, or one for each prompt"
        )
    if min(limits, default=1) < 1:
        raise UserError(f"max_tokens {min(limits)} must be at least 1")
    return limits


def check_prompts(prompts: Sequence[Sequence[int]], room: Sequence[int], max_length: int, vocab_size: int) -> None:
    """UserError for the first prompt that is empty, too long for its `room` more tokens, or out of vocabulary."""
    for index, (prompt, new) in enumerate(zip(prompts, room, strict=True)):
        if not prompt:
            raise UserError(f"prompt {index} of {len(prompts)} is empty; it needs a token; drop it")
        if len(prompt) + new > max_length:
            raise UserError(
                f"prompt {index} of {len(prompts)} has {len(prompt)} tokens, with {new} new ones "
                f"{len(prompt) + new}; prompt and completion must fit into {max_length}; "
                f"drop the prompt, ask for fewer tokens or raise the engine's max_length"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(
                f"prompt {index} of {len(prompts)} holds token ids from {min(prompt)} to {max(prompt)}; "
                f"the model's vocabulary ends at {vocab_size - 1}; use the tokenizer of this model"
            )


def check_request(
    prompts: list[list[int]],
    seeds: list[int],
    group_size: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    timeout: float | None = None,
) -> None:
    """UserError for numbers that neither engine could honour."""
    if len(seeds) != len(prompts):
        raise UserError(f"{len(prompts)} prompts came with {len(seeds)} seeds; each prompt needs one")
    if min(seeds, default=0) < 0:
        raise UserError(f"seed {min(seeds)} is negative; seeds must be 0 or more")
    if group_size < 1:
        raise UserError(f"group_size {group_size} must be at least 1")
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < float("inf"):
        raise UserError(f"temperature {temperature} must be 0 (greedy) or at least {MIN_TEMPERATURE}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p} must be above 0 and at most 1 (1 samples from all tokens)")
    if top_k < 0:
        raise UserError(f"top_k {top_k} must be 0 (off) or more")
    if timeout is not None and not timeout > 0:
        raise UserError(f"timeout {timeout} must be above 0 seconds, or None")


class _OutOfTime(Exception):
    def __init__(self, unfinished: int) -> None:
        super().__init__()
        self.unfinished = unfinished


def _limit(timeout: float | None) -> Callable[[int], None]:
    """To be called with the number of unfinished completions: raises _OutOfTime from `timeout` seconds on."""
    end = math.inf if timeout is None else time.monotonic() + timeout

    def check(unfinished: int) -> None:
        if time.monotonic() > end:
            raise _OutOfTime(unfinished)

    return check


def _collect(
    attempt: Callable[[list[int], Callable[[int], None]], _Groups],
    num_prompts: int,
    group_size: int,
    timeout: float | None,
    on_group: Callable[[int, list[Completion]], None] | None,
) -> list[list[Completion]]:
    """The groups that `attempt(indices of prompts, check)` yields; what it leaves out of time, in a second one."""
    groups: dict[int, list[Completion]] = {}
    retried = False
    while True:
        waiting = [index for index in range(num_prompts) if index not in groups]
        try:
            with closing(attempt(waiting, _limit(timeout))) as finished:
                for index, group in finished:
                    groups[index] = group
                    if on_group:
                        on_group(index, group)
            return [groups[index] for index in range(num_prompts)]
        except _OutOfTime as late:
            problem = f"{late.unfinished} of {num_prompts * group_size} completions unfinished after {timeout:g} s"
            if retried:
                raise EngineFailed(
                    f"{problem}, for the second time; allow more time (--generation-timeout), ask for fewer or "
                    f"shorter completions, or see whether the device hangs or is shared"
                ) from None
        warnings.warn(f"{problem}; trying these once more")
        retried = True


def _waves(
    lengths: list[int], rows: int, limits: list[int], cache_tokens: int, max_rows: int
) -> Iterator[list[int]]:
    """Prompt indices, shortest first, in waves of at most `max_rows` rows that fit into the cache.

    The prompts of a wave have the same limit (max_tokens): the cache has room for as much of every row.
    """
    wave: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (limits[index], lengths[index])):
        num_prompts = len(wave) + 1
        tokens = num_prompts * (lengths[index] + rows * limits[index])  # each prompt padded to the longest
        full = tokens > cache_tokens or num_prompts * rows > max_rows
        if wave and (full or limits[index] != limits[wave[0]]):
            yield wave
            wave = []
        wave.append(index)
    if wave:
        yield wave


def row_uniforms(seeds: Sequence[int], group_size: int, max_tokens: int) -> Tensor:
    """(P * G, max_tokens) float64 in [0, 1): row (seed, g) depends on nothing but seed and g.

    A smaller max_tokens gives a prefix of a larger one. numpy's generator, because torch's CPU
    generator keeps only 32 bits of its seed and cannot take a pair.
    """
    rows = [
        # g first: it fits one 32-bit word, so no two pairs are the same list of words
        np.random.Generator(np.random.PCG64([g, seed])).random(max_tokens)
        for seed in seeds
        for g in range(group_size)
    ]
    return torch.from_numpy(np.stack(rows))


def _keep_likely(logits: Tensor, top_p: float, top_k: int) -> None:
    """Set what top-k, then top-p drops of logits (R, V) to -inf, in place; top_p 1 and top_k 0 drop nothing."""
    if top_p < 1 or 0 < top_k < logits.shape[1]:
        dropped = _less_likely(logits, _least_likely_kept(logits, top_p, top_k))
        logits.masked_fill_(dropped, -torch.inf)


def choose_tokens(logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token per row of logits (R, V), and its log-prob under softmax(logits).

    Args:
        logits: (R, V) float32, overwritten. -inf is never chosen.
        uniforms: (R,) float64 in [0, 1) for the inverse CDF; None chooses the most likely token.
    """
    top, best = logits.max(dim=-1, keepdim=True)
    weights = logits.sub_(top).exp_()  # unnormalised probabilities
    if uniforms is None:
        tokens, totals = best, weights.sum(dim=-1, keepdim=True)
    else:
        tokens, totals = _inverse_cdf(weights, uniforms[:, None])
    # log of a float32 weight keeps its relative precision, however small the weight is
    log_probs = weights.gather(1, tokens).log() - totals.log()
    return tokens.squeeze(1), log_probs.squeeze(1).float()


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (R, 1) where the running sum of weights (R, V) first exceeds uniforms (R, 1) of the total.

    Two levels: first the block of tokens, from the sums of the blocks, then the token in the block. So
    only V / BLOCK_SIZE + BLOCK_SIZE numbers a row are summed up one after the other, in float64.
    """
    rows, vocab_size = weights.shape
    if vocab_size % BLOCK_SIZE:
        weights = F.pad(weights, (0, -vocab_size % BLOCK_SIZE))
    blocks = weights.view(rows, -1, BLOCK_SIZE)
    block_ends = blocks.sum(dim=-1).double().cumsum(dim=-1)  # (R, V / BLOCK_SIZE)
    totals = block_ends[:, -1:]
    targets = uniforms * totals
    block = _first_above(block_ends, targets)
    targets = targets - (block_ends.gather(1, block) - blocks.sum(dim=-1).double().gather(1, block))
    token_ends = blocks[torch.arange(rows, device=weights.device), block[:, 0]].double().cumsum(dim=-1)
    return block * BLOCK_SIZE + _first_above(token_ends, targets), totals


def _first_above(ends: Tensor, targets: Tensor) -> Tensor:
    """(R, 1) first index whose running sum exceeds the target.

    Rounding can lift a target to the last sum: then the last index that adds to it, never one of weight 0.
    """
    last = torch.searchsorted(ends, ends[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(ends, targets.contiguous(), right=True), last)


def pack(lengths: Sequence[int], limit: int) -> list[range]:
    """Neighbouring sequences in runs of at most `limit` tokens; a longer one stands alone."""
    packs, start, total = [], 0, 0
    for index, length in enumerate(lengths):
        if index > start and total + length > limit:
            packs.append(range(start, index))
            start, total = index, 0
        total += length
    return packs + [range(start, len(lengths))]


def packed_stream(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences end to end: input_ids (T,), positions (T,), cu_seqlens (B + 1,)."""
    input_ids = torch.tensor([token for sequence in sequences for token in sequence], device=device)
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences]).to(device)
    cu_seqlens = np.cumsum([0] + [len(sequence) for sequence in sequences])
    return input_ids, positions, torch.tensor(cu_seqlens, dtype=torch.int32, device=device)


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


class KVCache:
    """Keys and values of one wave: each prompt's once, and each row's own tokens.

    `prompt` is (layers, 2, P, K, longest prompt, d), `own` is (layers, 2, R, K, max_tokens - 1, d).
    Both shrink from the end as rows leave; nothing is moved but what fills the holes.
    """

    def __init__(self, model: CausalLM, prompt_lengths: Tensor, group_size: int, max_tokens: int) -> None:
        config, weight = model.config, model.lm_head.weight
        device, dtype = weight.device, weight.dtype
        self.group_size, self.kv_heads = group_size, config.num_key_value_heads
        num_prompts, longest = len(prompt_lengths), int(prompt_lengths.max())
        layers, heads, size = config.num_hidden_layers, self.kv_heads, config.head_dim
        # Zeros, not empty: masked places are multiplied with weight 0, and 0 * NaN is NaN.
        self.prompt = torch.zeros(layers, 2, num_prompts, heads, longest, size, dtype=dtype, device=device)
        own_shape = (layers, 2, num_prompts * group_size, heads, max(max_tokens - 1, 1), size)
        self.own = torch.empty(own_shape, dtype=dtype, device=device)
        self.row_slots = torch.arange(num_prompts * group_size, device=device)  # row -> prompt * G + g
        # (P, K, 1, longest) added to the scores: -inf beyond a prompt's end
        beyond = torch.arange(longest, device=device) >= prompt_lengths[:, None]
        bias = torch.zeros(beyond.shape, dtype=dtype, device=device).masked_fill_(beyond, -torch.inf)
        self.prompt_bias = bias[:, None, None].repeat(1, self.kv_heads, 1, 1)

    def prefill(self, first: int, positions: Tensor, cu_seqlens: Tensor) -> Attend:
        """Attention of a packed stream of whole prompts, from number `first`, that also fills the cache."""
        packed = packed_attention(cu_seqlens)
        prompts = torch.arange(first, first + len(cu_seqlens) - 1, device=positions.device)
        prompts = prompts.repeat_interleave(cu_seqlens.diff())  # (T,)

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            self.prompt[layer, 0][prompts, :, positions] = keys
            self.prompt[layer, 1][prompts, :, positions] = values
            return packed(layer, queries, keys, values)

        return attend

    def decode(self, step: int) -> Attend:
        """Attention of one token per live row, the one after `step` own tokens."""

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            rows, heads, head_dim = queries.shape
            own_keys, own_values = self.own[layer, :, :rows].unbind()  # (R, K, max_tokens - 1, d)
            own_keys[:, :, step], own_values[:, :, step] = keys, values
            own_keys = own_keys.view(rows * self.kv_heads, -1, head_dim)[:, : step + 1]
            own_values = own_values.view(rows * self.kv_heads, -1, head_dim)[:, : step + 1]
            prompt_keys, prompt_values = self.prompt[layer].flatten(1, 2).unbind()  # (P * K, longest, d)

            queries = queries * head_dim**-0.5
            to_prompt = torch.baddbmm(
                self.prompt_bias.flatten(0, 1), self._by_prompt(queries), prompt_keys.transpose(1, 2)
            )
            to_own = torch.bmm(queries.reshape(rows * self.kv_heads, -1, head_dim), own_keys.transpose(1, 2))
            scores = torch.cat([self._by_row(to_prompt), to_own.view(rows, heads, -1)], dim=-1)
            precision = torch.promote_types(values.dtype, torch.float32)  # not bfloat16
            weights = scores.softmax(dim=-1, dtype=precision).to(values.dtype)

            longest = prompt_keys.shape[1]
            from_prompt = torch.bmm(self._by_prompt(weights[..., :longest]), prompt_values)
            own_weights = weights[..., longest:].reshape(rows * self.kv_heads, -1, step + 1)
            from_own = torch.bmm(own_weights, own_values)
            return self._by_row(from_prompt) + from_own.view(rows, heads, head_dim)

        return attend

    def _by_prompt(self, x: Tensor) -> Tensor:
        """(R, H, n) of the live rows -> (P * K, G * H / K, n); slots of finished rows hold anything."""
        slots = x.new_empty(self.prompt.shape[2] * self.group_size, *x.shape[1:])
        slots.index_copy_(0, self.row_slots, x)
        by_head = slots.view(-1, self.group_size, self.kv_heads, x.shape[1] // self.kv_heads, x.shape[2])
        return by_head.transpose(1, 2).reshape(self.prompt.shape[2] * self.kv_heads, -1, x.shape[2])

    def _by_row(self, x: Tensor) -> Tensor:
        """(P * K, G * H / K, n) -> (R, H, n) of the live rows."""
        by_head = x.view(self.prompt.shape[2], self.kv_heads, self.group_size, -1, x.shape[2])
        slots = by_head.transpose(1, 2).reshape(self.prompt.shape[2] * self.group_size, -1, x.shape[2])
        return slots.index_select(0, self.row_slots)

    def keep(self, alive: Tensor, step: int) -> Tensor:
        """Drop the rows (and whole prompts) that finished; `step` own tokens are in use.

        Returns:
            order (live rows,): the row that is now at each place.
        """
        order = _fill_holes(alive)
        self.own = _move(self.own[..., :step, :], order, self.own)
        self.row_slots = self.row_slots[order]
        prompts, g = self.row_slots // self.group_size, self.row_slots % self.group_size
        prompt_alive = torch.zeros(self.prompt.shape[2], dtype=torch.bool, device=alive.device)
        prompt_alive[prompts] = True
        if not prompt_alive.all():
            prompt_order = _fill_holes(prompt_alive)
            self.prompt = _move(self.prompt, prompt_order, self.prompt)
            self.prompt_bias = self.prompt_bias[prompt_order]
            places = torch.empty(len(prompt_alive), dtype=torch.int64, device=alive.device)
            places[prompt_order] = torch.arange(len(prompt_order), device=alive.device)
            self.row_slots = places[prompts] * self.group_size + g
        return order


def _fill_holes(alive: Tensor) -> Tensor:
    """The live indices, the last of them moved into the holes: alive 1 0 1 1 -> 0 3 2."""
    kept = int(alive.sum())
    order = torch.arange(kept, device=alive.device)
    order[~alive[:kept]] = kept + alive[kept:].nonzero().squeeze(1)
    return order


def _move(used: Tensor, order: Tensor, whole: Tensor) -> Tensor:
    """Apply `order` to dimension 2 of a cache in place, copying only rows that move and what is `used`."""
    targets = (order != torch.arange(len(order), device=order.device)).nonzero().squeeze(1)
    used[:, :, targets] = used[:, :, order[targets]]
    return whole[:, :, : len(order)]


@torch.inference_mode()
def sample_wave(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor | None,
    *,
    group_size: int,
    max_tokens: int,
    temperature: float,
    stop_token_ids: Sequence[int],
    top_p: float = 1.0,
    top_k: int = 0,
    between_steps: Callable[[int], None] | None = None,
) -> _Groups:
    """Sample `group_size` completions of each prompt together.

    Args:
        uniforms: (P * G, max_tokens) float64 from row_uniforms; None chooses the most likely token.
        temperature: > 0; the logits are divided by it.
        top_p, top_k: see _keep_likely; the log-probs are those of the distribution that is left.
        between_steps: called before each step with the number of unfinished completions.

    Yields:
        The index of a prompt and its completions, as soon as they are all finished.
    """
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = KVCache(model, lengths, group_size, max_tokens)
    num_rows = len(prompts) * group_size
    sampled = Sampled(
        token_ids=torch.zeros(num_rows, max_tokens, dtype=torch.int64, device=device),
        log_probs=torch.zeros(num_rows, max_tokens, device=device),
        lengths=torch.full((num_rows,), max_tokens, device=device),
        stopped=torch.zeros(num_rows, dtype=torch.bool, device=device),
    )
    stops = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=device)
    head = _Head(model, num_rows, temperature)
    if uniforms is not None:
        uniforms = uniforms.to(device)

    waiting = set(range(len(prompts)))
    rows = torch.arange(num_rows, device=device)  # which completion each live row is
    positions = lengths.repeat_interleave(group_size)
    hidden = _prefill(model, prompts, cache).repeat_interleave(group_size, dim=0)  # (R, D)
    for step in range(max_tokens):
        if between_steps:
            between_steps(len(rows))
        at_step = None if uniforms is None else uniforms[rows, step]
        logits = head.logits(hidden)
        _keep_likely(logits, top_p, top_k)
        tokens, log_probs = choose_tokens(logits, at_step)
        sampled.token_ids[rows, step] = tokens
        sampled.log_probs[rows, step] = log_probs
        finished = torch.isin(tokens, stops)
        if finished.any():
            sampled.lengths[rows[finished]] = step + 1
            sampled.stopped[rows[finished]] = True
            order = cache.keep(~finished, step)
            rows, positions, tokens = rows[order], positions[order], tokens[order]
            for prompt in sorted(waiting.difference((rows // group_size).tolist())):
                waiting.remove(prompt)
                yield prompt, sampled.completions(slice(prompt * group_size, (prompt + 1) * group_size))
        if len(rows) == 0 or step == max_tokens - 1:
            break
        hidden = model.model(tokens, positions, cache.decode(step))
        positions = positions + 1
    for prompt in sorted(waiting):
        yield prompt, sampled.completions(slice(prompt * group_size, (prompt + 1) * group_size))


def _prefill(model: CausalLM, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Run the prompts once, filling the cache; the hidden state (P, D) after each one's last token."""
    states = []
    for run in pack([len(prompt) for prompt in prompts], PACK_TOKENS):
        stream = packed_stream([prompts[index] for index in run], cache.prompt.device)
        input_ids, positions, cu_seqlens = stream
        hidden = model.model(input_ids, positions, cache.prefill(run.start, positions, cu_seqlens))
        states.append(hidden[cu_seqlens[1:].long() - 1])
    return torch.cat(states)


class _Head:
    """The output head, writing into one buffer: fresh (R, V) tensors each step cost more in page faults."""

    def __init__(self, model: CausalLM, max_rows: int, temperature: float) -> None:
        self.weight, self.temperature = model.lm_head.weight, temperature
        self.vocab_size = len(self.weight)
        width = self.vocab_size + -self.vocab_size % BLOCK_SIZE  # so that choose_tokens need not copy
        self.buffer = torch.empty(max_rows, width, device=self.weight.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (R, D) -> logits / temperature, (R, V and some columns of -inf), float32."""
        logits = self.buffer[: len(hidden)]
        logits[:, self.vocab_size :] = -torch.inf
        if hidden.dtype == torch.float32:
            hidden = hidden / self.temperature  # cheaper than dividing the logits
            for start in range(0, self.vocab_size, HEAD_CHUNK):
                end = min(start + HEAD_CHUNK, self.vocab_size)
                torch.mm(hidden, self.weight[start:end].t(), out=logits[:, start:end])
        else:
            logits[:, : self.vocab_size] = F.linear(hidden, self.weight).float() / self.temperature
        return logits
