"""TorchEngine against transformers; vLLM, the real one, against TorchEngine."""

import math
import os
import re
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TopKLogitsWarper, TopPLogitsWarper

import kaja.engine
from kaja import sampling
from kaja.checkpoint import load_model
from kaja.engine import Completion, Engine, EngineFailed, TorchEngine, VLLMEngine, make_engine
from kaja.errors import UserError
from kaja.sampling import _keep_likely, packed_stream
from kaja.sync import check_sync, sync_error
from conftest import ROOT, make_model_folder

MAX_LENGTH = 96
VOCAB_SIZE = 400
MANY_STOPS = list(range(2, 60))  # about one token in seven ends a random model's completion


def random_prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


PROMPTS = random_prompts(7, 23, 1, 40, 12)
SEEDS = [11, 12, 13, 14, 15]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """head_dim 32: the smallest that vLLM's CPU attention takes."""
    return make_model_folder(tmp_path_factory.mktemp("engine"), head_dim=32)


def torch_engine(folder: Path, stops: list[int], **options: int) -> TorchEngine:
    return TorchEngine(load_model(folder), stops, MAX_LENGTH, **options)


@pytest.fixture(scope="session")
def engine(folder: Path) -> TorchEngine:
    return torch_engine(folder, [2])


def reference_log_probs(
    folder: Path, prompt: list[int], completion: Completion, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> torch.Tensor:
    """What transformers gives the tokens of a completion, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
    tokens = torch.tensor(completion.token_ids)
    logits = logits / temperature
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def sampler_ratios(folder: Path, groups: list[list[Completion]], **options: float) -> torch.Tensor:
    """exp(trainer - engine) of every sampled token, as GRPO's first update sees them."""
    ratios = []
    model = load_model(folder)
    for prompt, group in zip(PROMPTS, groups):
        for completion in group:
            stream = packed_stream([(prompt + completion.token_ids)[:-1]], torch.device("cpu"))
            labels = torch.tensor((prompt + completion.token_ids)[1:])
            with torch.no_grad():
                log_probs = model(*stream, labels, torch.arange(len(labels)) >= len(prompt) - 1, **options)[0]
                without_mask = model(*stream, labels, **options)[0]
            torch.testing.assert_close(without_mask[len(prompt) - 1 :], log_probs[len(prompt) - 1 :])
            ratios.append((log_probs[len(prompt) - 1 :] - torch.tensor(completion.log_probs)).exp())
    return torch.cat(ratios)


def tokens_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


# ---------------------------------------------------------------------------------------------------
# TorchEngine
# ---------------------------------------------------------------------------------------------------


def test_greedy_equals_transformers(folder: Path, engine: TorchEngine) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    groups = engine.generate(PROMPTS, group_size=2, max_tokens=30, temperature=0, seeds=SEEDS)
    for prompt, (first, second) in zip(PROMPTS, groups):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=2, pad_token_id=0
        )[0, len(prompt) :]
        assert first.token_ids == expected.tolist()
        assert second == first


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_log_probs_are_those_of_the_sampled_distribution(
    folder: Path, engine: TorchEngine, temperature: float
) -> None:
    groups = engine.generate(PROMPTS, group_size=3, max_tokens=20, temperature=temperature, seeds=SEEDS)
    for prompt, group in zip(PROMPTS, groups):
        for completion in group:
            expected = reference_log_probs(folder, prompt, completion, temperature or 1.0)
            torch.testing.assert_close(torch.tensor(completion.log_probs).double(), expected, rtol=0, atol=1e-5)


TRUNCATED = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}


@pytest.mark.parametrize("options", [TRUNCATED, {**TRUNCATED, "top_k": 0}, {**TRUNCATED, "top_p": 1.0}])
def test_truncated_sampling_and_the_trainers_ratio(
    folder: Path, engine: TorchEngine, options: dict[str, float]
) -> None:
    groups = engine.generate(PROMPTS, group_size=3, max_tokens=20, seeds=SEEDS, **options)
    for prompt, group in zip(PROMPTS, groups):
        for completion in group:
            expected = reference_log_probs(folder, prompt, completion, **options)
            torch.testing.assert_close(torch.tensor(completion.log_probs).double(), expected, rtol=0, atol=1e-5)
    ratios = sampler_ratios(folder, groups, **options)
    assert len(ratios) > 200 and abs(ratios.mean() - 1) < 1e-3 and (ratios - 1).abs().max() < 1e-2
    whole = sampler_ratios(folder, groups, temperature=0.7)  # what the trainer would get without truncation
    assert whole.mean() < 0.97


def test_greedy_ignores_truncation(engine: TorchEngine) -> None:
    arguments = {"max_tokens": 5, "temperature": 0, "seeds": SEEDS}
    assert engine.generate(PROMPTS, **arguments, top_p=0.5, top_k=2) == engine.generate(PROMPTS, **arguments)


def test_a_completion_depends_on_prompt_seed_and_place_alone(folder: Path) -> None:
    engine = torch_engine(folder, MANY_STOPS)
    groups = engine.generate(PROMPTS, group_size=6, max_tokens=30, seeds=SEEDS)
    lengths = {len(completion.token_ids) for group in groups for completion in group}
    assert len(lengths) > 5  # rows left at many different steps
    assert len({tuple(completion.token_ids) for completion in groups[0]}) > 1
    backwards = engine.generate(PROMPTS[::-1], group_size=6, max_tokens=30, seeds=SEEDS[::-1])
    assert tokens_of(backwards[::-1]) == tokens_of(groups)
    for prompt, seed, group in zip(PROMPTS, SEEDS, groups):
        assert tokens_of(engine.generate([prompt], group_size=2, max_tokens=30, seeds=[seed])) == tokens_of([group[:2]])
    for completion, reference in zip(backwards[0], groups[-1]):
        np.testing.assert_allclose(completion.log_probs, reference.log_probs, atol=1e-5)


def test_waves_bound_rows_and_memory_without_changing_results(folder: Path) -> None:
    whole = torch_engine(folder, MANY_STOPS).generate(PROMPTS, group_size=2, max_tokens=10, seeds=SEEDS)
    few_rows = torch_engine(folder, MANY_STOPS, max_rows=4)
    assert tokens_of(few_rows.generate(PROMPTS, group_size=2, max_tokens=10, seeds=SEEDS)) == tokens_of(whole)
    # 2 layers x keys and values x 2 heads x 32 x 4 bytes = 1 KiB a token
    small = torch_engine(folder, MANY_STOPS, kv_cache_memory_bytes=100 * 1024)
    assert small.cache_tokens == 100
    assert tokens_of(small.generate(PROMPTS, group_size=2, max_tokens=10, seeds=SEEDS)) == tokens_of(whole)


LIMITS = [30, 3, 12, 30, 1]


def check_limits_of_their_own(engine: Engine) -> None:
    """With a max_tokens for each prompt, each gets the beginning of what it gets with the largest."""
    whole = engine.generate(PROMPTS, group_size=2, max_tokens=30, seeds=SEEDS)
    limited = engine.generate(PROMPTS, group_size=2, max_tokens=LIMITS, seeds=SEEDS)
    for limit, group, longer_group in zip(LIMITS, limited, whole, strict=True):
        for completion, longer in zip(group, longer_group, strict=True):
            assert completion.token_ids == longer.token_ids[:limit]
            ended = len(longer.token_ids) <= limit and longer.finish_reason == "stop"
            assert completion.finish_reason == ("stop" if ended else "length")
    assert {len(completion.token_ids) for group in limited for completion in group} >= {1, 3, 12}


def test_every_prompt_may_have_its_own_limit(folder: Path) -> None:
    check_limits_of_their_own(torch_engine(folder, [2]))
    with pytest.raises(UserError, match="5 prompts came with 2 max_tokens"):
        torch_engine(folder, [2]).generate(PROMPTS, max_tokens=[3, 4], seeds=SEEDS)
    with pytest.raises(UserError, match="prompt 1 of 2 has 5 tokens, with 92 new ones 97"):
        torch_engine(folder, [2]).generate([[5] * 5] * 2, max_tokens=[10, 92], seeds=[0, 0])


def test_stop_token_ends_a_completion_and_belongs_to_it(folder: Path, engine: TorchEngine) -> None:
    (free,), = engine.generate(PROMPTS[:1], max_tokens=20, temperature=0, seeds=[0])
    assert len(free.token_ids) == len(free.log_probs) == 20 and free.finish_reason == "length"
    stop = free.token_ids[5]
    end = free.token_ids.index(stop) + 1
    (stopped,), = torch_engine(folder, [2, stop]).generate(PROMPTS[:1], max_tokens=20, temperature=0, seeds=[0])
    assert stopped.token_ids == free.token_ids[:end] and stopped.finish_reason == "stop"
    np.testing.assert_allclose(stopped.log_probs, free.log_probs[:end], atol=1e-6)
    (exact,), = torch_engine(folder, [2, stop]).generate(PROMPTS[:1], max_tokens=end, temperature=0, seeds=[0])
    assert exact.finish_reason == "stop"


def test_sampled_frequencies_match_the_model(folder: Path, engine: TorchEngine) -> None:
    prompt, count, temperature = [5, 6], 4000, 0.5
    groups = engine.generate([prompt] * 8, group_size=500, max_tokens=1, temperature=temperature, seeds=list(range(8)))
    found = torch.bincount(
        torch.tensor([completion.token_ids[0] for group in groups for completion in group]), minlength=VOCAB_SIZE
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    expected = count * (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).detach()
    common = expected > 5
    rest = (found[~common].sum() - expected[~common].sum()) ** 2 / expected[~common].sum()
    chi_square = float(((found - expected)[common] ** 2 / expected[common]).sum() + rest)
    freedom = int(common.sum())
    assert freedom > 20 and abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_scores(folder: Path, engine: TorchEngine) -> None:
    scores = engine.score([*PROMPTS, [9] * MAX_LENGTH])
    assert [len(score) for score in scores] == [6, 22, 0, 39, 11, MAX_LENGTH - 1]
    for prompt, score in zip(PROMPTS, scores):
        expected = reference_log_probs(folder, prompt[:1], Completion(prompt[1:], [], "stop"), 1.0)
        torch.testing.assert_close(torch.tensor(score).double(), expected, rtol=0, atol=1e-5)
    assert engine.score([]) == []


@pytest.mark.parametrize("pack_tokens, head_rows", [(4096, 256), (30, 256), (4096, 2)])
def test_next_token_log_probs(
    folder: Path, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, pack_tokens: int, head_rows: int
) -> None:
    """Against transformers in float64, prompt by prompt; in one pack, in several, and in several products."""
    monkeypatch.setattr("kaja.engine.PACK_TOKENS", pack_tokens)
    monkeypatch.setattr("kaja.engine.HEAD_ROWS", head_rows)
    token_ids = [399, 3, 17, 3]
    found = engine.next_token_log_probs(PROMPTS, token_ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for prompt, row in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            whole = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        np.testing.assert_allclose(row, whole[token_ids], atol=1e-5)
    assert engine.next_token_log_probs([], token_ids) == []
    with pytest.raises(UserError, match="prompt 1 of 2 has 97 tokens"):
        engine.next_token_log_probs([[5], [5] * 97], token_ids)


def test_next_token_log_probs_makes_logits_of_last_positions_only(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    head = kaja.engine._scaled_logits

    def counted(hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        rows.append(len(hidden))
        return head(hidden, *rest)

    monkeypatch.setattr("kaja.engine._scaled_logits", counted)
    engine.next_token_log_probs(PROMPTS, [4])
    assert rows == [5]  # of 83 tokens


def watch_steps(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object]) -> list[int]:
    """Call `before(number)` in each of TorchEngine's steps; the list has one entry, the number of steps so far."""
    steps, choose = [0], sampling.choose_tokens

    def choose_tokens(logits: torch.Tensor, uniforms: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        before(steps[0])
        steps[0] += 1
        return choose(logits, uniforms)

    monkeypatch.setattr(sampling, "choose_tokens", choose_tokens)
    return steps


class FakeClock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(sampling, "time", self)

    def monotonic(self) -> float:
        return self.now


def test_out_of_time_twice_is_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = torch_engine(folder, [2], max_rows=6)  # two prompts a wave
    steps = watch_steps(monkeypatch, lambda _: time.sleep(0.4))
    twice = "15 of 15 completions unfinished after 0.2 s, for the second time; allow more time"
    with pytest.warns(UserWarning, match=r"15 of 15 completions unfinished after 0\.2 s; trying these once more"):
        with pytest.raises(EngineFailed, match=twice):
            engine.generate(PROMPTS, group_size=3, max_tokens=20, seeds=SEEDS, timeout=0.2)
    assert steps[0] <= 2  # one each, then the limit was noticed
    monkeypatch.undo()
    assert len(engine.generate(PROMPTS, max_tokens=5, seeds=SEEDS, timeout=600)) == 5
    with pytest.raises(UserError, match="timeout 0 must be above 0"):
        engine.generate(PROMPTS, max_tokens=5, seeds=SEEDS, timeout=0)


def test_only_what_is_unfinished_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = torch_engine(folder, MANY_STOPS, max_rows=6)
    arguments = {"group_size": 3, "max_tokens": 8, "seeds": SEEDS}
    expected = engine.generate(PROMPTS, **arguments)
    first_wave = max(len(completion.token_ids) for index in (2, 0) for completion in expected[index])
    clock = FakeClock(monkeypatch)
    # one step of the second wave takes an hour
    watch_steps(monkeypatch, lambda step: setattr(clock, "now", clock.now + 3600 * (step == first_wave + 1)))
    told: list[int] = []
    with pytest.warns(UserWarning, match=r"[789] of 15 completions unfinished after 60 s"):
        found = engine.generate(PROMPTS, **arguments, timeout=60, on_group=lambda index, _: told.append(index))
    assert tokens_of(found) == tokens_of(expected)
    assert sorted(told) == list(range(5)) and set(told[:2]) == {0, 2}


def test_groups_are_handed_on_as_they_finish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = torch_engine(folder, MANY_STOPS)
    steps = watch_steps(monkeypatch, lambda _: None)
    told: list[tuple[int, list[Completion], int]] = []
    groups = engine.generate(
        PROMPTS, group_size=2, max_tokens=30, seeds=SEEDS,
        on_group=lambda index, group: told.append((index, group, steps[0])),
    )  # fmt: skip
    assert groups == engine.generate(PROMPTS, group_size=2, max_tokens=30, seeds=SEEDS)
    assert {index: group for index, group, _ in told} == dict(enumerate(groups)) and len(told) == 5
    lengths = [max(len(completion.token_ids) for completion in group) for _, group, _ in told]
    assert lengths == [step for _, _, step in told]  # each at the very step that ended it
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]

    told.clear()
    engine.generate(
        PROMPTS, group_size=2, max_tokens=4, temperature=0, seeds=SEEDS,
        on_group=lambda index, group: told.append((index, group, 0)),
    )  # fmt: skip
    assert sorted(index for index, _, _ in told) == list(range(5)) and all(len(group) == 2 for _, group, _ in told)

    def broken(index: int, group: list[Completion]) -> None:
        raise TimeoutError("the judge is gone")

    with pytest.raises(TimeoutError, match="the judge is gone"):
        engine.generate(PROMPTS, max_tokens=4, seeds=SEEDS, on_group=broken, timeout=60)


def test_new_weights_change_the_outputs(folder: Path, tmp_path: Path) -> None:
    engine, other = torch_engine(folder, [2]), make_model_folder(tmp_path / "other", seed=1, head_dim=32)
    before = engine.generate(PROMPTS, max_tokens=10, seeds=SEEDS)
    engine.load_weights(load_model(other).state_dict().items())
    after = engine.generate(PROMPTS, max_tokens=10, seeds=SEEDS)
    assert after != before
    assert after == torch_engine(other, [2]).generate(PROMPTS, max_tokens=10, seeds=SEEDS)


def test_bad_prompts_are_refused_before_anything_is_generated(engine: TorchEngine) -> None:
    with pytest.raises(UserError, match="prompt 1 of 2 is empty"):
        engine.generate([[5], []], max_tokens=4, seeds=[0, 0])
    with pytest.raises(UserError, match="prompt 0 of 1 has 93 tokens, with 4 new ones 97"):
        engine.generate([[5] * 93], max_tokens=4, seeds=[0])
    with pytest.raises(UserError, match="prompt 0 of 1 has 97 tokens"):
        engine.score([[5] * 97])
    assert engine.generate([], max_tokens=4, seeds=[]) == []


def test_global_random_numbers_are_left_alone(engine: TorchEngine) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    engine.generate(PROMPTS, max_tokens=4, seeds=SEEDS)
    assert torch.equal(torch.get_rng_state(), state)


def test_make_engine(folder: Path, engine: TorchEngine) -> None:
    made = make_engine("torch", folder, stop_token_ids=[2], max_length=MAX_LENGTH)
    arguments = {"max_tokens": 5, "seeds": SEEDS}
    assert made.generate(PROMPTS, **arguments) == engine.generate(PROMPTS, **arguments)
    with pytest.raises(UserError, match="'tpu' is unknown; it must be 'torch' or 'vllm'"):
        make_engine("tpu", folder, stop_token_ids=[2], max_length=MAX_LENGTH)


def test_without_vllm_one_line_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(UserError, match=r"`make vllm`, pip install 'kaja\[vllm\]'"):
        make_engine("vllm", folder, stop_token_ids=[2], max_length=MAX_LENGTH)


def test_vllm_says_which_head_sizes_it_takes_on_a_cpu(model_folder: Path) -> None:
    with pytest.raises(UserError, match="head_dim is 8; vLLM on a CPU takes 32, 64,"):
        make_engine("vllm", model_folder, stop_token_ids=[2], max_length=MAX_LENGTH)


# ---------------------------------------------------------------------------------------------------
# vLLM
# ---------------------------------------------------------------------------------------------------

vllm = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("vllm")]


def with_marks(test):
    for mark in vllm:
        test = mark(test)
    return test


@pytest.fixture(scope="session")
def vllm_engine(folder: Path) -> Iterator[Engine]:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), torch.set_num_threads
    engine = make_engine("vllm", folder, stop_token_ids=[2], max_length=MAX_LENGTH)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), torch.set_num_threads
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    yield engine
    engine.close()


@pytest.fixture
def fresh(vllm_engine: VLLMEngine, folder: Path) -> Iterator[VLLMEngine]:
    """The session's engine, for a test that changes its weights."""
    yield vllm_engine
    vllm_engine.load_weights(load_model(folder).state_dict().items())


@with_marks
def test_vllm_greedy_equals_torch(vllm_engine: Engine, engine: TorchEngine) -> None:
    arguments = {"group_size": 2, "max_tokens": 30, "temperature": 0, "seeds": SEEDS}
    ours, theirs = engine.generate(PROMPTS, **arguments), vllm_engine.generate(PROMPTS, **arguments)
    assert tokens_of(theirs) == tokens_of(ours)
    for our_group, their_group in zip(ours, theirs):
        for our, their in zip(our_group, their_group):
            assert our.finish_reason == their.finish_reason
            np.testing.assert_allclose(their.log_probs, our.log_probs, atol=1e-4)


@with_marks
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vllm_log_probs_are_those_of_the_sampled_distribution(
    vllm_engine: Engine, folder: Path, temperature: float
) -> None:
    """So the ratio of trainer and sampler is 1 on fresh weights, also at temperature 0.7."""
    state = torch.get_rng_state()
    groups = vllm_engine.generate(PROMPTS, group_size=3, max_tokens=20, temperature=temperature, seeds=SEEDS)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(completion.token_ids) for completion in groups[0]}) == 3
    for prompt, group in zip(PROMPTS, groups):
        for completion in group:
            expected = reference_log_probs(folder, prompt, completion, temperature)
            torch.testing.assert_close(torch.tensor(completion.log_probs).double(), expected, rtol=0, atol=1e-4)


@with_marks
@pytest.mark.parametrize("options", [TRUNCATED, {**TRUNCATED, "top_k": 0}, {**TRUNCATED, "top_p": 1.0}])
def test_vllm_truncated_sampling_and_the_trainers_ratio(
    vllm_engine: Engine, folder: Path, options: dict[str, float]
) -> None:
    groups = vllm_engine.generate(PROMPTS, group_size=3, max_tokens=20, seeds=SEEDS, **options)
    for prompt, group in zip(PROMPTS, groups):
        for completion in group:
            expected = reference_log_probs(folder, prompt, completion, **options)
            torch.testing.assert_close(torch.tensor(completion.log_probs).double(), expected, rtol=0, atol=1e-4)
    ratios = sampler_ratios(folder, groups, **options)
    assert len(ratios) > 200 and abs(ratios.mean() - 1) < 1e-3 and (ratios - 1).abs().max() < 1e-2


@with_marks
@pytest.mark.parametrize("top_p, top_k", [(0.9, 0), (1.0, 20), (0.9, 20), (0.3, 5)])
def test_vllm_keeps_the_same_tokens(top_p: float, top_k: int) -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    logits = 3 * torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    ours = logits.clone()
    _keep_likely(ours, top_p, top_k)
    k = torch.full((200,), top_k) if top_k else None
    p = torch.full((200,), top_p) if top_p < 1 else None
    assert torch.equal(ours, apply_top_k_top_p_pytorch(logits.clone(), k, p))


@with_marks
def test_vllm_gives_every_prompt_its_own_limit(vllm_engine: Engine) -> None:
    check_limits_of_their_own(vllm_engine)


@with_marks
def test_vllm_completion_depends_on_prompt_seed_and_place_alone(vllm_engine: Engine) -> None:
    neighbours = vllm_engine.generate([PROMPTS[0]] * 2, group_size=3, max_tokens=20, seeds=[11, 12])
    (alone,) = vllm_engine.generate(PROMPTS[:1], group_size=2, max_tokens=20, seeds=[11])
    assert tokens_of([alone]) == tokens_of([neighbours[0][:2]])
    # vLLM counts seeds up within a group: prompt 12 must not repeat what prompt 11 got
    assert len({tuple(completion.token_ids) for group in neighbours for completion in group}) == 6


@with_marks
def test_vllm_scores_equal_torch(vllm_engine: Engine, engine: TorchEngine) -> None:
    sequences = [*PROMPTS, *random_prompts(MAX_LENGTH)]
    for their, our in zip(vllm_engine.score(sequences), engine.score(sequences), strict=True):
        np.testing.assert_allclose(their, our, atol=1e-4)


@with_marks
@pytest.mark.parametrize("tied", [False, True])
def test_vllm_takes_new_weights_and_a_broken_sync_is_noticed(
    fresh: VLLMEngine, folder: Path, tmp_path: Path, tied: bool
) -> None:
    if tied:
        folder = make_model_folder(tmp_path / "tied", head_dim=32, tie_word_embeddings=True)
        engine = make_engine("vllm", folder, stop_token_ids=[2], max_length=MAX_LENGTH)
    else:
        engine = fresh
    policy = load_model(folder)
    assert check_sync(engine, policy, PROMPTS, tolerance=1e-5) < 1e-5
    engine.generate(PROMPTS, max_tokens=2, seeds=SEEDS)  # fills the prefix cache, which the sync must empty
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(UserError, match="does not hold the trainer's weights"):
        check_sync(engine, policy, PROMPTS, tolerance=1e-3)
    engine.load_weights(policy.named_parameters() if tied else policy.state_dict().items())
    assert check_sync(engine, policy, PROMPTS, tolerance=1e-5) < 1e-5
    reference = TorchEngine(policy, [2], MAX_LENGTH)
    arguments = {"max_tokens": 20, "temperature": 0, "seeds": SEEDS}
    assert tokens_of(engine.generate(PROMPTS, **arguments)) == tokens_of(reference.generate(PROMPTS, **arguments))
    if tied:
        engine.close()


@with_marks
def test_vllm_refuses_to_go_on_with_half_a_sync(fresh: VLLMEngine, folder: Path) -> None:
    policy = load_model(folder)
    whole = dict(policy.state_dict())
    for wrong, message in (
        ({name: tensor for name, tensor in whole.items() if "norm" not in name}, "5 of 21 tensors are missing"),
        ({"model.nonsense": torch.zeros(1), **whole}, "no model.nonsense"),
    ):
        with pytest.raises(UserError, match=message):
            fresh.load_weights(wrong.items())
        with pytest.raises(RuntimeError, match="incomplete"):
            fresh.generate([[5]], max_tokens=1, seeds=[0])
    fresh.load_weights(whole.items())
    assert sync_error(fresh, policy, PROMPTS) < 1e-5


@with_marks
def test_vllm_is_clean_after_an_interrupted_call(vllm_engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"max_tokens": 10, "temperature": 0, "seeds": SEEDS}
    expected = tokens_of(vllm_engine.generate(PROMPTS, **arguments))
    steps = iter(range(3))
    core = vllm_engine._llm.llm_engine
    step = core.step

    def interrupted() -> object:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vllm_engine.generate(PROMPTS, **arguments)
    monkeypatch.undo()
    assert not core.has_unfinished_requests()
    assert tokens_of(vllm_engine.generate(PROMPTS, **arguments)) == expected


def assert_clean(engine: VLLMEngine, expected: list[list[Completion]], arguments: dict[str, object]) -> None:
    """Nothing is queued, and the next call gives what it gave before."""
    core = engine._llm.llm_engine
    assert not core.has_unfinished_requests() and not core.output_processor.parent_requests
    assert engine.generate(PROMPTS, **arguments) == expected


SAMPLED = {"group_size": 3, "max_tokens": 10, "seeds": SEEDS}


@with_marks
@pytest.mark.parametrize("hanging", [False, True])
def test_vllm_out_of_time_twice_is_a_failure(
    vllm_engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch, hanging: bool
) -> None:
    expected = vllm_engine.generate(PROMPTS, **SAMPLED)
    core = vllm_engine._llm.llm_engine
    step = core.step

    def slow() -> list[object]:
        time.sleep(0.1)
        return [] if hanging else step()  # hanging: it goes round without getting anywhere

    monkeypatch.setattr(core, "step", slow)
    with pytest.warns(UserWarning, match=r"15 of 15 completions unfinished after 0\.25 s; trying these once more"):
        with pytest.raises(EngineFailed, match="15 of 15 completions unfinished after 0.25 s, for the second time"):
            vllm_engine.generate(PROMPTS, **SAMPLED, timeout=0.25)
    monkeypatch.undo()
    assert_clean(vllm_engine, expected, SAMPLED)
    greedy = {**SAMPLED, "temperature": 0}
    monkeypatch.setattr(core, "step", lambda: time.sleep(0.01) or [])
    with pytest.warns(UserWarning), pytest.raises(EngineFailed, match="^15 of 15 completions"):
        vllm_engine.generate(PROMPTS, **greedy, timeout=0.05)


@with_marks
def test_vllm_tries_again_what_is_unfinished(vllm_engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "stop_token_ids", MANY_STOPS)
    expected = vllm_engine.generate(PROMPTS, **SAMPLED)
    ends = sorted(max(len(completion.token_ids) for completion in group) for group in expected)
    assert ends[0] < ends[-1]
    core = vllm_engine._llm.llm_engine
    step, finished, told, clock = core.step, [], [], FakeClock(monkeypatch)

    def hanging_once() -> list[object]:
        if finished and not told.count("hung"):
            told.append("hung")
            clock.now += 3600
        outputs = step()
        finished.extend(output for output in outputs if output.finished)
        return outputs

    monkeypatch.setattr(core, "step", hanging_once)
    with pytest.warns(UserWarning, match="of 15 completions unfinished after 60 s"):
        found = vllm_engine.generate(PROMPTS, **SAMPLED, timeout=60, on_group=lambda index, _: told.append(index))
    assert [group == other for group, other in zip(found, expected)] == [True] * 5
    assert told.index("hung") < 5 and sorted(told, key=str) == [0, 1, 2, 3, 4, "hung"]
    monkeypatch.setattr(core, "step", step)
    assert_clean(vllm_engine, expected, SAMPLED)


@with_marks
def test_an_exception_inside_vllm_is_an_engine_failure(
    vllm_engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = vllm_engine.generate(PROMPTS, **SAMPLED)
    core = vllm_engine._llm.llm_engine
    runner = core.model_executor.driver_worker.model_runner
    monkeypatch.setattr(runner, "execute_model", lambda *_, **__: (_ for _ in ()).throw(MemoryError("out of\npaper")))
    with pytest.raises(EngineFailed, match=r"vLLM failed \(MemoryError: out of paper\); start the run") as caught:
        vllm_engine.generate(PROMPTS, **SAMPLED)
    assert isinstance(caught.value.__cause__, MemoryError)
    monkeypatch.undo()
    assert_clean(vllm_engine, expected, SAMPLED)


@with_marks
def test_vllm_groups_are_handed_on_as_they_finish(vllm_engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "stop_token_ids", MANY_STOPS)
    core = vllm_engine._llm.llm_engine
    told: list[tuple[int, list[Completion], bool]] = []

    def on_group(index: int, group: list[Completion]) -> None:
        torch.rand(1), random.random()  # a judge may draw random numbers, and what it draws stays drawn
        told.append((index, group, core.has_unfinished_requests()))

    torch.manual_seed(0)
    groups = vllm_engine.generate(PROMPTS, **SAMPLED, on_group=on_group)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(6)[5:])
    assert groups == vllm_engine.generate(PROMPTS, **SAMPLED)
    assert {index: group for index, group, _ in told} == dict(enumerate(groups)) and len(told) == 5
    lengths = [max(len(completion.token_ids) for completion in group) for _, group, _ in told]
    assert lengths == sorted(lengths) and told[0][2] and not told[-1][2]

    def broken(index: int, group: list[Completion]) -> None:
        raise TimeoutError("the judge is gone")

    with pytest.raises(TimeoutError, match="the judge is gone"):
        vllm_engine.generate(PROMPTS, **SAMPLED, on_group=broken, timeout=60)
    assert_clean(vllm_engine, groups, SAMPLED)


@with_marks
def test_closing_one_vllm_engine_leaves_the_other_alive(vllm_engine: Engine, folder: Path) -> None:
    """As in judge.py: the judge goes on while the engines of the answering models come and go."""
    arguments = {"max_tokens": 5, "temperature": 0, "seeds": SEEDS}
    expected = tokens_of(vllm_engine.generate(PROMPTS, **arguments))
    second = make_engine("vllm", folder, stop_token_ids=[2], max_length=MAX_LENGTH)
    assert tokens_of(second.generate(PROMPTS, **arguments)) == expected
    second.close()
    assert tokens_of(vllm_engine.generate(PROMPTS, **arguments)) == expected


@with_marks
def test_vllm_refuses_bad_prompts(vllm_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="prompt 1 of 2 is empty"):
        vllm_engine.generate([[5], []], max_tokens=4, seeds=[0, 0])
    with pytest.raises(UserError, match="prompt 0 of 1 has 93 tokens, with 4 new ones 97"):
        vllm_engine.generate([[5] * 93], max_tokens=4, seeds=[0])
    with monkeypatch.context() as patch, pytest.raises(UserError, match="timeout: the ranks of one engine"):
        patch.setattr(vllm_engine, "tensor_parallel_size", 2)
        vllm_engine.generate([[5]], max_tokens=4, seeds=[0], timeout=1)
    vllm_engine.sleep()  # nothing on a CPU
    vllm_engine.wake()
    assert vllm_engine.generate([], max_tokens=4, seeds=[]) == []


TWO_RANKS = """
import sys, torch
from kaja.checkpoint import load_model
from kaja.distributed import full_tensors, setup, teardown
from kaja.engine import make_engine
from kaja.sync import check_sync, sync_error
ranks = setup()
policy = load_model(sys.argv[1], ranks=ranks)
engine = make_engine("vllm", sys.argv[1], stop_token_ids=[2], max_length=96, device=ranks.device)
probe = [[5, 9, 33, 7, 8]]
check_sync(engine, policy, probe, 1e-5, ranks.device)
with torch.no_grad():
    for parameter in policy.parameters():
        parameter.mul_(1.2)
assert sync_error(engine, policy, probe, ranks.device) > 1e-2
engine.load_weights(full_tensors(policy))
check_sync(engine, policy, probe, 1e-5, ranks.device)
prompts = [[5, 6, 7]] * (1 + 2 * ranks.rank)
groups = engine.generate(prompts, max_tokens=5, temperature=0, seeds=[0] * len(prompts))
engine.close()
torch.distributed.barrier()
print(f"rank {ranks.rank}: {groups[0][0].token_ids}")
teardown()
"""


@with_marks
@pytest.mark.gloo
def test_vllm_on_two_ranks_takes_the_shards_of_both(folder: Path, tmp_path: Path) -> None:
    """Each rank has an engine and its own prompts; the weights come from FSDP2's shards."""
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script), str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    # Not line by line: the ranks' writes may interleave.
    first, second = (re.findall(rf"rank {rank}: (\[[\d, ]+\])", done.stdout) for rank in (0, 1))
    assert len(first) == 1 and first == second
