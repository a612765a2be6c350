"""Packing and the division of samples over steps, ranks and streams."""

import itertools
import random

import pytest
import torch

from kaja.batching import (
    batch_indices, check_batch_size, cut_into_chunks, filler, fingerprint, fresh_indices, mixed_indices, pack,
    pack_groups, plan_streams, steps_per_epoch, stream_quotas,
)  # fmt: skip
from kaja.chat import TokenSequence
from kaja.errors import UserError


def test_pack_shifts_once_and_marks_the_borders() -> None:
    two = [TokenSequence([1, 5, 6, 2], [False, False, True, True]), TokenSequence([1, 7, 2], [False, True, True])]
    batch = pack(two)
    assert batch.input_ids.tolist() == [1, 5, 6, 1, 7]
    assert batch.labels.tolist() == [5, 6, 2, 7, 2]
    assert batch.completion_mask.tolist() == [False, True, True, True, True]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5] and batch.cu_seqlens.dtype == torch.int32
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1, 1]


def test_a_lone_token_has_nothing_to_predict() -> None:
    with pytest.raises(ValueError, match="fewer than two tokens"):
        pack([TokenSequence([1, 2], [False, True]), TokenSequence([1], [False])])


def test_a_prompt_is_laid_once_before_its_completions() -> None:
    batch = pack_groups([([1, 5, 6], [[7, 8, 2], [9]]), ([3], [[4, 2], [2]])])
    # The prompts but for their last tokens, which begin the completions.
    assert batch.input_ids.tolist() == [1, 5, *[6, 7, 8], 6, *[3, 4], 3]
    assert batch.labels.tolist() == [5, 6, *[7, 8, 2], 9, *[4, 2], 2]
    assert batch.positions.tolist() == [0, 1, *[2, 3, 4], 2, *[0, 1], 0]
    assert batch.completion_mask.tolist() == [False, False] + [True] * 7
    assert batch.sequence_ids.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 6, 8, 9] and batch.cu_seqlens.dtype == torch.int32
    assert batch.prefixes is not None and batch.prefixes.tolist() == [-1, 0, 0, -1, -1]  # a lone token is no prefix
    moved = batch.to(torch.device("cpu"))
    assert moved.prefixes is not None and moved.prefixes.tolist() == [-1, 0, 0, -1, -1]
    assert pack([TokenSequence([1, 2], [False, True])]).to(torch.device("cpu")).prefixes is None


def test_filler_trains_nothing() -> None:
    chosen = filler([TokenSequence([1, 2, 3, 4], [False, True, True, True]), TokenSequence([5, 6], [False, True])])
    assert chosen.input_ids == [5, 6]  # the shortest: it costs least
    assert not pack([chosen]).completion_mask.any()


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_every_sequence_is_in_one_stream_that_has_room(world_size: int, count: int) -> None:
    lengths = [random.Random(0).randint(1, 100) for _ in range(count)]
    plan = plan_streams(lengths, world_size, max_tokens=120, width=64)
    assert len(plan) == world_size and len({len(streams) for streams in plan}) == 1
    streams = list(itertools.chain.from_iterable(plan))
    assert sorted(itertools.chain.from_iterable(streams)) == list(range(count))
    assert max(sum(lengths[index] for index in stream) for stream in streams) <= 120
    if count >= world_size * len(plan[0]):
        assert all(streams)


def test_ranks_get_nearly_equal_cost() -> None:
    generator = random.Random(1)
    lengths = [min(1024, int(generator.lognormvariate(5, 1)) + 2) for _ in range(256)]
    plan = plan_streams(lengths, 8, max_tokens=4096, width=256)
    costs = [sum(n * (1 + n / (12 * 256)) for stream in rank for n in (lengths[i] for i in stream)) for rank in plan]
    assert max(costs) / min(costs) < 1.05


def test_shared_tokens_take_room_but_cost_nothing() -> None:
    # All four are 60 long, but three of them share 50 tokens: together these cost as much as the other.
    lengths, computed = [60, 60, 60, 60], [10, 10, 10, 30]
    assert plan_streams(lengths, 2, max_tokens=180, width=10**9, computed=computed) == [[[3]], [[0, 1, 2]]]
    assert [len(rank) for rank in plan_streams(lengths, 1, max_tokens=120, width=64, computed=computed)] == [2]


def test_streams_are_as_few_as_tokens_allow() -> None:
    assert [len(rank) for rank in plan_streams([50] * 8, 2, max_tokens=100, width=64)] == [2, 2]


def test_a_sequence_too_long_for_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="101 tokens does not fit a stream of 100"):
        plan_streams([101], 1, max_tokens=100, width=64)


def test_each_epoch_sees_every_sample_once_in_a_new_order() -> None:
    assert steps_per_epoch(10, 4) == 3
    epochs = [
        [index for step in range(3 * epoch, 3 * epoch + 3) for index in batch_indices(step, 10, 4, seed=5)]
        for epoch in range(2)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert len(batch_indices(2, 10, 4, seed=5)) == 2  # what is left
    assert batch_indices(1, 10, 4, seed=5) != batch_indices(1, 10, 4, seed=6)


def test_chunks_predict_every_trained_token_once() -> None:
    # Sequence k has the tokens 100 k, 100 k + 1, ...; the first two are its question.
    sequences = [
        TokenSequence(list(range(100 * k, 100 * k + n)), [False] * 2 + [True] * (n - 2))
        for k, n in enumerate([5, 9, 3, 30, 12], start=1)
    ]
    chunks = cut_into_chunks(sequences, 17, seed=3)
    assert [len(chunk.input_ids) for chunk in chunks] == [17, 17, 17, 11]  # 59 tokens, three shared by two chunks
    for one, two in zip(chunks, chunks[1:]):
        assert one.input_ids[-1] == two.input_ids[0]
    batch = pack(chunks)
    predicted = batch.labels[batch.completion_mask].tolist()
    assert sorted(predicted) == sorted(token for s in sequences for token in s.input_ids[2:])
    # Each sample's tokens stay together and in order, and the samples are shuffled.
    laid_out = chunks[0].input_ids + [token for chunk in chunks[1:] for token in chunk.input_ids[1:]]
    order = [token // 100 for token in laid_out if token % 100 == 0]
    assert sorted(order) == [1, 2, 3, 4, 5] and order != [1, 2, 3, 4, 5]
    assert laid_out == [token for k in order for token in sequences[k - 1].input_ids]
    # A chunk is one sequence: positions run through, and attention reaches back to its start.
    assert pack(chunks[:1]).positions.tolist() == list(range(16))


def test_a_chunk_never_has_a_lone_token() -> None:
    sequence = TokenSequence([1, 2, 3, 4, 5], [False, True, True, True, True])
    assert [chunk.input_ids for chunk in cut_into_chunks([sequence], 3, seed=0)] == [[1, 2, 3], [3, 4, 5]]


def test_the_fingerprint_tells_borders_and_order() -> None:
    numbers = {fingerprint(data) for data in ([[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]], [[1, 2, 3]], [[1, 2]])}
    assert len(numbers) == 5
    assert fingerprint([[1, 2], [3]]) == fingerprint(iter([[1, 2], [3]]))
    assert 0 <= fingerprint([[1]]) < 2**53  # whole in every JSON reader


def test_a_batch_smaller_than_the_number_of_ranks_is_refused() -> None:
    check_batch_size(8, 8)
    check_batch_size(256, 6)  # nothing has to divide: streams are planned for each batch
    with pytest.raises(UserError, match=r"global_batch_size 4 with 8 ranks: .* --global-batch-size 8, or 4 ranks"):
        check_batch_size(4, 8)


def test_quotas_add_up_and_follow_the_weights() -> None:
    assert stream_quotas({"safety": 2, "borderline": 1, "helpfulness": 1}, 64) == {
        "safety": 32, "borderline": 16, "helpfulness": 16
    }  # fmt: skip
    # 10 * (1/2, 1/3, 1/6) = 5, 3.33, 1.67: the largest remainder is rounded up.
    assert stream_quotas({"a": 3, "b": 2, "c": 1}, 10) == {"a": 5, "b": 3, "c": 2}
    assert stream_quotas({"a": 1.0}, 7) == {"a": 7}


def test_mixed_batches_have_their_shares_and_see_each_sample_once_before_any_twice() -> None:
    members = {"a": [0, 2, 4, 6, 8], "b": [1, 3, 5]}
    batches = [mixed_indices(step, members, {"a": 2, "b": 1}, seed=4) for step in range(15)]
    for batch in batches:
        assert [index % 2 for index in batch] == [0, 0, 1]
    drawn = {name: [i for batch in batches for i in batch if i in own] for name, own in members.items()}
    for name, own in members.items():
        rounds = [drawn[name][start : start + len(own)] for start in range(0, len(drawn[name]), len(own))]
        assert all(sorted(one) == own for one in rounds)
        assert len({tuple(one) for one in rounds}) > 1  # in a new order each time
    assert batches != [mixed_indices(step, members, {"a": 2, "b": 1}, seed=5) for step in range(15)]


def test_fresh_samples_are_unused_and_differ_by_draw() -> None:
    used = {1, 5, 7}
    first = fresh_indices(3, 1, 20, 4, used, seed=0)
    assert len(set(first)) == 4 and not used & set(first)
    assert first == fresh_indices(3, 1, 20, 4, used, seed=0)
    assert len({tuple(fresh_indices(step, draw, 20, 4, used, 0)) for step in range(3) for draw in (1, 2)}) == 6
    assert fresh_indices(0, 1, 4, 3, {0, 2, 3}, seed=0) == [1]  # no more than there are
