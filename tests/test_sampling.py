"""The torch sampler: the inverse CDF, the waves' cache, the random numbers."""

import math

import numpy as np
import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from kaja.errors import UserError
from kaja.model import CausalLM, ModelConfig, init_weights
from kaja.sampling import (
    KVCache,
    _fill_holes,
    _keep_likely,
    _waves,
    check_prompts,
    check_request,
    each_limit,
    choose_tokens,
    pack,
    packed_stream,
    row_uniforms,
)

SHAPE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab_size", [5, 128, 1000, 4096])
def test_two_level_choice_is_the_inverse_of_the_running_sum(vocab_size: int) -> None:
    logits = random_logits(300, vocab_size)
    uniforms = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, log_probs = choose_tokens(logits.clone(), uniforms)

    ends = logits.double().softmax(-1).cumsum(-1)
    ends[:, -1] = 1.0
    for row, (token, u) in enumerate(zip(tokens.tolist(), uniforms.tolist())):
        begin = ends[row, token - 1].item() if token else 0.0
        assert begin - 1e-6 <= u < ends[row, token].item() + 1e-6
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=2e-6)


def test_frequencies_are_those_of_the_softmax() -> None:
    logits, count = random_logits(1, 300, seed=2), 200_000
    uniforms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = torch.zeros(300, dtype=torch.float64)
    for chunk in uniforms.split(20_000):
        tokens, _ = choose_tokens(logits.repeat(len(chunk), 1), chunk)
        found += torch.bincount(tokens, minlength=300)
    expected = count * logits[0].double().softmax(-1)
    common = expected > 5
    chi_square = ((found - expected)[common] ** 2 / expected[common]).sum().item()
    freedom = int(common.sum()) - 1
    assert freedom > 100
    # mean `freedom`, standard deviation sqrt(2 freedom): five of them is a chance of about 1e-6
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_impossible_tokens_are_never_chosen() -> None:
    logits = torch.full((4, 700), -torch.inf)
    logits[:, 130], logits[:, 600] = 0.0, 0.0
    edges = torch.tensor([0.0, 0.5 - 1e-12, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    tokens, log_probs = choose_tokens(logits, edges)
    assert tokens.tolist() == [130, 130, 600, 600]
    torch.testing.assert_close(log_probs, torch.full((4,), float(np.log(0.5))))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("top_p, top_k", [(0.9, 0), (0.3, 0), (1e-6, 0), (1.0, 1), (1.0, 20), (0.9, 20), (0.5, 700)])
def test_kept_logits_are_those_of_transformers(top_p: float, top_k: int, ties: bool) -> None:
    """Of equal logits at top-p's border transformers keeps any (its sort is unstable): then the values are compared."""
    logits = random_logits(100, 600)
    logits = logits.round() / 2 if ties else logits
    expected = logits.clone()
    for warper in ([TopKLogitsWarper(top_k)] if top_k else []) + [TopPLogitsWarper(top_p)] * (top_p < 1):
        expected = warper(None, expected)
    kept = logits.clone()
    _keep_likely(kept, top_p, top_k)
    assert torch.equal(kept.sort(-1).values, expected.sort(-1).values)
    assert ties or torch.equal(kept, expected)
    whole = kept > -torch.inf
    assert torch.equal(kept[whole], logits[whole])
    uniforms = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reference = kept.double().log_softmax(-1)
    tokens, log_probs = choose_tokens(kept, uniforms)
    assert whole.gather(1, tokens[:, None]).all()
    torch.testing.assert_close(log_probs.double(), reference.gather(1, tokens[:, None])[:, 0], rtol=0, atol=2e-6)


def test_the_lower_index_of_equal_logits_stays() -> None:
    logits = torch.tensor([[0.0, 2.0, 0.0, -torch.inf, 0.0]])
    _keep_likely(logits, top_p=0.85, top_k=0)  # p .711 .096 .096 .096
    assert logits.tolist() == [[0.0, 2.0, 0.0, -math.inf, -math.inf]]
    halves = torch.zeros(1, 2)
    _keep_likely(halves, top_p=0.5, top_k=0)  # a token that reaches top_p exactly is the last
    assert halves.tolist() == [[0.0, -math.inf]]
    nothing = torch.tensor([[0.0, 1.0]])
    _keep_likely(nothing, top_p=1.0, top_k=2)
    assert nothing.tolist() == [[0.0, 1.0]]


def test_greedy_choice() -> None:
    logits = random_logits(20, 333)
    tokens, log_probs = choose_tokens(logits.clone(), None)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).amax(-1))


def test_uniforms_depend_on_seed_and_place_alone() -> None:
    both = row_uniforms([3, 4], group_size=2, max_tokens=10)
    assert both.shape == (4, 10) and both.dtype == torch.float64
    assert torch.equal(both[2:], row_uniforms([4], 2, 10))
    assert torch.equal(both[:, :6], row_uniforms([3, 4], 2, 6))
    assert torch.equal(both[0], row_uniforms([3], 1, 10)[0])
    assert len(torch.unique(row_uniforms([0, 1, 2, 2**32, 2**32 + 1, 2**63], 8, 1))) == 48


def test_waves_are_bounded_by_rows_and_by_memory() -> None:
    lengths = [7, 23, 1, 40, 12]
    assert [len(wave) for wave in _waves(lengths, 2, [10] * 5, cache_tokens=10**6, max_rows=4)] == [2, 2, 1]
    assert list(_waves(lengths, 2, [10] * 5, cache_tokens=100, max_rows=512)) == [[2, 0, 4], [1], [3]]


def test_the_prompts_of_a_wave_have_the_same_limit() -> None:
    lengths, limits = [7, 23, 1, 40, 12], [10, 5, 10, 5, 5]
    assert list(_waves(lengths, 2, limits, cache_tokens=10**6, max_rows=512)) == [[4, 1, 3], [2, 0]]
    assert list(_waves(lengths, 2, limits, cache_tokens=66, max_rows=512)) == [[4, 1], [3], [2, 0]]


def test_limits_of_the_prompts() -> None:
    assert each_limit(7, 3) == [7, 7, 7] and each_limit((4, 5), 2) == [4, 5] and each_limit(7, 0) == []
    with pytest.raises(UserError, match="3 prompts came with 2 max_tokens"):
        each_limit([4, 5], 3)
    for wrong in (0, [4, 0]):
        with pytest.raises(UserError, match="max_tokens 0 must be at least 1"):
            each_limit(wrong, 2)


def test_pack_keeps_order_and_limit() -> None:
    assert [list(run) for run in pack([3, 3, 3, 9, 1], limit=6)] == [[0, 1], [2], [3], [4]]
    assert [list(run) for run in pack([2], limit=1)] == [[0]]
    input_ids, positions, cu_seqlens = packed_stream([[7, 8], [9]], torch.device("cpu"))
    assert (input_ids.tolist(), positions.tolist(), cu_seqlens.tolist()) == ([7, 8, 9], [0, 1, 0], [0, 2, 3])


def test_last_rows_fill_the_holes() -> None:
    assert _fill_holes(torch.tensor([True, False, True, False, True])).tolist() == [0, 4, 2]
    assert _fill_holes(torch.tensor([False, False])).tolist() == []
    assert _fill_holes(torch.tensor([True, True])).tolist() == [0, 1]


def test_cached_decoding_equals_the_packed_forward_while_rows_leave() -> None:
    """Teacher-forced: hidden states of the cache against those of whole sequences, in float64."""
    model = CausalLM(ModelConfig.from_hf(SHAPE))
    init_weights(model, seed=0, std=0.2)
    model = model.double()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(64, (n,), generator=generator).tolist() for n in (4, 1, 9)]
    group_size, steps = 3, 6
    tails = torch.randint(64, (9, steps), generator=generator)
    sequences = [prompts[row // group_size] + tails[row].tolist() for row in range(9)]
    leaves = {1: [3, 4], 3: [5, 0], 4: [8]}  # after these steps; with row 5 all of prompt 1 is gone

    with torch.inference_mode():
        input_ids, positions, cu_seqlens = packed_stream(prompts, torch.device("cpu"))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        cache = KVCache(model, lengths, group_size, steps + 1)
        model.model(input_ids, positions, cache.prefill(0, positions, cu_seqlens))
        rows, positions = torch.arange(9), lengths.repeat_interleave(group_size)
        for step in range(steps):
            hidden = model.model(tails[rows, step], positions, cache.decode(step))
            for place, row in enumerate(rows.tolist()):
                whole = packed_stream([sequences[row][: len(prompts[row // group_size]) + step + 1]], hidden.device)
                torch.testing.assert_close(hidden[place], model(*whole)[-1], rtol=0, atol=1e-12)
            positions = positions + 1
            if step in leaves:
                order = cache.keep(~torch.isin(rows, torch.tensor(leaves[step])), step + 1)
                rows, positions = rows[order], positions[order]
    assert sorted(rows.tolist()) == [1, 2, 6, 7] and cache.prompt.shape[2] == 2


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([[1], []], "prompt 1 of 2 is empty"),
        ([[1] * 7], "has 7 tokens, with 4 new ones 11; prompt and completion must fit into 10"),
        ([[1, 50]], "vocabulary ends at 49"),
        ([[-1]], "from -1 to -1"),
    ],
)
def test_bad_prompts(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_prompts(prompts, room=[4] * len(prompts), max_length=10, vocab_size=50)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": []}, "1 prompts came with 0 seeds"),
        ({"seeds": [-1]}, "seed -1 is negative"),
        ({"group_size": 0}, "group_size 0"),
        ({"temperature": 0.001}, "temperature 0.001 must be 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_k": -1}, "top_k -1 must be 0"),
    ],
)
def test_bad_requests(changes: dict[str, object], message: str) -> None:
    request = {"prompts": [[1]], "seeds": [0], "group_size": 1, "temperature": 1.0}
    check_request(**request)
    with pytest.raises(UserError, match=message):
        check_request(**{**request, **changes})
