"""TorchEngine against transformers; vLLM, the real one, against TorchEngine."""

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kaja.checkpoint import load_model
from kaja.engine import Completion, Engine, TorchEngine, VLLMEngine, make_engine
from kaja.errors import UserError
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


def reference_log_probs(folder: Path, prompt: list[int], completion: Completion, temperature: float) -> torch.Tensor:
    """What transformers gives the tokens of a completion, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
    tokens = torch.tensor(completion.token_ids)
    return (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]


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
    assert [len(wave) for wave in few_rows._waves([7, 23, 1, 40, 12], rows=2, max_tokens=10)] == [2, 2, 1]
    assert tokens_of(few_rows.generate(PROMPTS, group_size=2, max_tokens=10, seeds=SEEDS)) == tokens_of(whole)
    # 2 layers x keys and values x 2 heads x 32 x 4 bytes = 1 KiB a token
    small = torch_engine(folder, MANY_STOPS, kv_cache_memory_bytes=100 * 1024)
    assert list(small._waves([7, 23, 1, 40, 12], rows=2, max_tokens=10)) == [[2, 0, 4], [1], [3]]
    assert tokens_of(small.generate(PROMPTS, group_size=2, max_tokens=10, seeds=SEEDS)) == tokens_of(whole)


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
def test_vllm_refuses_bad_prompts(vllm_engine: Engine) -> None:
    with pytest.raises(UserError, match="prompt 1 of 2 is empty"):
        vllm_engine.generate([[5], []], max_tokens=4, seeds=[0, 0])
    with pytest.raises(UserError, match="prompt 0 of 1 has 93 tokens, with 4 new ones 97"):
        vllm_engine.generate([[5] * 93], max_tokens=4, seeds=[0])
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
    first, second = (done.stdout.split(f"rank {rank}: ")[1].split("\n")[0] for rank in (0, 1))
    assert first == second
