"""Judging while others are still being generated; micro-batches with shared prompts; the speeds of a step's phases."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kaja.batching import pack
from kaja.data import Example
from kaja.distributed import Ranks
from kaja.engine import Completion
from kaja.loss import add_stats, policy_loss, summarise_stats
from kaja.model import CausalLM, ModelConfig, init_weights
from kaja.reward import Verdict
from kaja.rollouts import Judging, MicroBatch, Rollout, micro_batches, throughput

EXAMPLES = [Example(str(number), "test", "safety", f"質問{number}") for number in range(3)]


class Judge:
    """Gives as many points as the completion has letters, and notes what it was asked in which thread."""

    name = "letters"
    concurrent = True

    def __init__(self) -> None:
        self.calls: list[tuple[bool, list[str], list[str]]] = []
        self.called = threading.Event()

    def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
        in_main = threading.current_thread() is threading.main_thread()
        self.calls.append((in_main, [example.id for example in examples], list(completions)))
        self.called.set()
        return [Verdict(float(len(text))) for text in completions]

    def close(self) -> None:
        pass


def group(*lengths: int) -> list[Completion]:
    return [Completion([7] * length, [0.0] * length, "stop") for length in lengths]


def decode(token_ids: Sequence[int]) -> str:
    return "x" * len(token_ids)


def test_a_finished_group_is_judged_while_another_is_generated() -> None:
    judge = Judge()
    with Judging(judge, EXAMPLES, decode) as judging:
        judging.ask(2, group(1, 2))  # generation goes on, and the judge does not wait for its end
        assert judge.called.wait(timeout=10)
        judging.ask(0, group(3, 4))
        verdicts = judging.verdicts([group(3, 4), group(5, 0), group(1, 2)])
    assert [[verdict.score for verdict in one] for one in verdicts] == [[3, 4], [5, 0], [1, 2]]
    assert judge.calls[0] == (False, ["2", "2"], ["x", "xx"])
    assert (True, ["1", "1"], ["xxxxx", ""]) in judge.calls  # what was not asked for before, at once
    assert len(judge.calls) == 3


def test_without_asking_ahead_the_judge_is_asked_once() -> None:
    judge = Judge()
    with Judging(judge, EXAMPLES, decode) as judging:
        verdicts = judging.verdicts([group(1), group(2), group(3)])
    assert [one[0].score for one in verdicts] == [1, 2, 3]
    assert judge.calls == [(True, ["0", "1", "2"], ["x", "xx", "xxx"])]


def test_an_error_of_the_judge_is_not_lost() -> None:
    class Broken(Judge):
        def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
            raise ConnectionError("gone")

    before = set(threading.enumerate())  # other tests of this process may have left some
    with pytest.raises(ConnectionError, match="gone"), Judging(Broken(), EXAMPLES, decode) as judging:
        judging.ask(0, group(1))
        judging.verdicts([group(1)])
    assert set(threading.enumerate()) <= before


def test_ctrl_c_does_not_wait_for_a_judge_that_hangs() -> None:
    class Hanging(Judge):
        closed = threading.Event()

        def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
            self.called.set()
            assert self.closed.wait(timeout=10)
            return []

    judge, before = Hanging(), set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), Judging(judge, EXAMPLES, decode) as judging:
        judging.ask(0, group(1))
        assert judge.called.wait(timeout=10)
        raise KeyboardInterrupt
    left = set(threading.enumerate()) - before
    assert len(left) == 1 and not judge.closed.is_set()
    judge.closed.set()  # as the end of open_judge does
    for thread in left:
        thread.join(timeout=10)
        assert not thread.is_alive()


# ------------------------------------------------------------------- micro-batches

SHAPE = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-5,
    rope={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip
# Prompt's length: the lengths of its completions that are kept. Two prompts beside each other may be the same.
KEPT = [(30, [9, 1, 16, 4]), (1, [5, 2]), (12, [7]), (2, [16, 16, 16, 16]), (12, [3, 3, 3]), (12, [1])]
LONGEST = 30 + 16
OPTIONS: dict[str, dict[str, Any]] = {
    "GRPO": {"kl_coef": 0.04, "kl": "k3", "correction": "token"},
    "DAPO": {"aggregation": "token", "clip_high": 0.28},
    "GSPO": {"ratio": "sequence", "kl_coef": 0.1, "correction": "sequence"},
    "CISPO": {"surrogate": "cispo", "aggregation": "constant"},
}


def kept_rollouts() -> list[tuple[Rollout, float]]:
    generator = torch.Generator().manual_seed(3)
    kept = []
    for number, (length, sizes) in enumerate(KEPT):
        if number != 5:  # the last prompt is that of the group before it
            prompt = torch.randint(61, (length,), generator=generator).tolist()
        for size in sizes:
            token_ids = torch.randint(61, (size,), generator=generator).tolist()
            log_probs = (torch.rand(size, generator=generator) - 4.5).tolist()
            advantage = torch.randn((), generator=generator).item()
            rollout = Rollout(EXAMPLES[0], prompt, Completion(token_ids, log_probs, "stop"), "", Verdict(1.0))
            kept.append((rollout, advantage))
    return kept


def plain_micro_batches(kept: list[tuple[Rollout, float]]) -> list[MicroBatch]:
    """One completion behind its own prompt in each."""
    made = []
    for rollout, advantage in kept:
        stream = pack([rollout.sequence()])
        sampled = torch.tensor([0.0] * (len(rollout.prompt_ids) - 1) + rollout.completion.log_probs)
        made.append(MicroBatch(stream, torch.full((len(stream.labels),), advantage), sampled))
    return made


def loss_gradient_and_stats(
    batches: list[MicroBatch], options: dict[str, Any], dtype: torch.dtype
) -> tuple[float, Tensor, dict[str, float]]:
    """As train_grpo.py's update_policy; the policy has moved from the one that sampled, and from the reference."""
    policy, old, reference = (CausalLM(SHAPE).to(dtype) for _ in range(3))
    for seed, model in enumerate((policy, old, reference)):
        init_weights(model, seed, std=0.2)

    def log_probs_of(model: CausalLM, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        stream = batch.stream
        return model(
            stream.input_ids, stream.positions, stream.cu_seqlens, stream.labels, stream.completion_mask,
            temperature=0.7, with_entropy=True, prefixes=stream.prefixes,
        )  # fmt: skip

    total, loss = {}, 0.0
    for batch in batches:
        with torch.no_grad():
            old_log_probs, ref_log_probs = log_probs_of(old, batch)[0], log_probs_of(reference, batch)[0]
        log_probs, entropy = log_probs_of(policy, batch)
        part, stats = policy_loss(
            log_probs, old_log_probs, batch.advantages, batch.stream.completion_mask, batch.stream.sequence_ids,
            ref_log_probs=ref_log_probs, sampling_log_probs=batch.sampling_log_probs, entropy=entropy,
            denominator=15, **options,
        )  # fmt: skip
        part.backward()
        loss += part.item()
        total = add_stats(total, stats)
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])
    return loss, gradient, summarise_stats(total)


def shares(kept: list[tuple[Rollout, float]], max_tokens: int, world_size: int) -> list[list[MicroBatch]]:
    """Each rank's micro-batches."""
    ranks = [Ranks(rank, rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    return [micro_batches(kept, max_tokens, SHAPE.hidden_size, one) for one in ranks]


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("max_tokens", [LONGEST, 2 * LONGEST, 8 * LONGEST])
def test_every_completion_is_in_one_stream_with_room_for_it_and_its_prompt(max_tokens: int, world_size: int) -> None:
    kept = kept_rollouts()
    per_rank = shares(kept, max_tokens, world_size)
    assert len({len(batches) for batches in per_rank}) == 1
    found = []
    for batch in (batch for batches in per_rank for batch in batches):
        stream, room = batch.stream, 0
        if stream.prefixes is None:  # a stream for a rank that has nothing to do
            assert not stream.completion_mask.any() and not batch.advantages.any()
            continue
        borders = stream.cu_seqlens.tolist()
        spans = [slice(*borders[n:n + 2]) for n in range(len(borders) - 1)]
        for span, source in zip(spans, stream.prefixes.tolist()):
            if not stream.completion_mask[span].any():
                continue
            prompt = stream.input_ids[spans[source]].tolist() if source >= 0 else []
            prompt.append(int(stream.input_ids[span][0]))
            (advantage,) = set(batch.advantages[span].tolist())
            found.append((prompt, stream.labels[span].tolist(), batch.sampling_log_probs[span].tolist(), advantage))
            room += len(prompt) - 1 + len(stream.labels[span])
        assert room <= max_tokens
    expected = [
        (rollout.prompt_ids, rollout.completion.token_ids, rollout.completion.log_probs, advantage)
        for rollout, advantage in kept
    ]
    assert len(found) == len(expected) == 15
    for one, other in zip(sorted(found), sorted(expected), strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2]) and one[3] == pytest.approx(other[3])


def test_prompts_are_computed_once_where_a_stream_has_room() -> None:
    ((batch,),) = shares(kept_rollouts(), 1000, 1)
    completions = sum(sum(sizes) for _, sizes in KEPT)
    assert len(batch.stream.input_ids) == 29 + 0 + 11 + 1 + 11 + completions  # the last two groups have one prompt


def test_no_rank_is_idle_beside_one_with_a_whole_group() -> None:
    completion = Completion([7] * 10, [-1.0] * 10, "stop")
    prompts = [[5] * 4] * 4 + [[6] * 4] * 4
    kept = [(Rollout(EXAMPLES[0], prompt, completion, "", Verdict(1.0)), 0.5) for prompt in prompts]
    per_rank = shares(kept, 1000, 4)
    assert [len(batches) for batches in per_rank] == [1] * 4
    assert [int(batch.stream.completion_mask.sum()) for batches in per_rank for batch in batches] == [20] * 4
    assert [len(batch.stream.labels) for batches in per_rank for batch in batches] == [3 + 20] * 4  # shared by two


def test_a_shared_prompt_counts_once_in_the_balance_of_ranks() -> None:
    """440 tokens; 4 completions that share 100, so 140 to compute; 300 tokens: the first are as much as the others."""
    kept = []
    for number, (prompt, size, count) in enumerate([(341, 100, 1), (101, 10, 4), (201, 100, 1)]):
        completion = Completion([7] * size, [-1.0] * size, "stop")
        kept += [(Rollout(EXAMPLES[0], [number] * prompt, completion, "", Verdict(1.0)), 0.5)] * count
    streams = [[len(batch.stream.labels) for batch in batches] for batches in shares(kept, 1000, 2)]
    assert streams == [[440], [300 + 140]]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("method", OPTIONS)
def test_loss_and_gradient_are_those_of_completions_with_prompts_of_their_own(
    method: str, dtype: torch.dtype, tolerance: float
) -> None:
    """However they are divided into streams and over ranks."""
    kept = kept_rollouts()
    loss, gradient, stats = loss_gradient_and_stats(plain_micro_batches(kept), OPTIONS[method], dtype)
    assert gradient.norm() > 0.01
    for max_tokens, world_size in ((LONGEST, 1), (2 * LONGEST, 2), (1000, 1), (1000, 8)):
        batches = [batch for batches in shares(kept, max_tokens, world_size) for batch in batches]
        one, its_gradient, its_stats = loss_gradient_and_stats(batches, OPTIONS[method], dtype)
        assert one == pytest.approx(loss, rel=tolerance, abs=tolerance)
        assert (its_gradient - gradient).norm() <= tolerance * gradient.norm()
        assert its_stats == pytest.approx(stats, rel=10 * tolerance)


def test_throughput_counts_new_tokens_in_generation_and_all_elsewhere() -> None:
    rollouts = [Rollout(EXAMPLES[0], [1] * 10, one, "", Verdict(1.0)) for one in group(4, 6)]
    speeds = throughput(rollouts, {"seconds/generate": 2.0, "seconds/update": 0.5, "seconds/log_probs": 0.0})
    assert speeds == {"tokens_per_second/generate": 5.0, "tokens_per_second/update": 60.0}
