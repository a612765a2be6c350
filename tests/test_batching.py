"""Packing and the division of samples over steps, ranks and streams."""

import itertools
import random

import pytest
import torch

from kaja.batching import batch_indices, pack, plan_streams, steps_per_epoch, without_training
from kaja.chat import TokenSequence


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


def test_filler_trains_nothing() -> None:
    filler = without_training(TokenSequence([1, 2, 3], [False, True, True]))
    assert not pack([filler]).completion_mask.any()


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
