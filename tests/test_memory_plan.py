"""The memory formulas against torch's tracker, which watches kaja's own training step on tensors without data."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from kaja.dry_run import LADDER, model_config_of
from kaja.errors import UserError
from kaja.memory_plan import GIB, MARGIN, MemoryPlan, Settings, parameter_count, plan_memory, simulate_memory
from kaja.model import CausalLM, ModelConfig

# One worker process for all simulations of this file: they need a process without a process group.
pytestmark = pytest.mark.xdist_group("memory_plan")

LLM_JP_13B = model_config_of("llm-jp/llm-jp-3-13b-instruct")
SMALL = ModelConfig(
    vocab_size=16000, hidden_size=512, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=2048, rms_norm_eps=1e-5,
    rope={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip
LLAMA_3_LIKE = replace(SMALL, num_key_value_heads=2, intermediate_size=1792, tie_word_embeddings=True)
QWEN_3_LIKE = replace(SMALL, num_key_value_heads=4, head_dim=96, qk_norm=True)
QWEN_2_LIKE = replace(SMALL, num_key_value_heads=2, qkv_bias=True)
BIG_HEAD = replace(SMALL, vocab_size=99584, hidden_size=256, head_dim=32, intermediate_size=512)

PLAIN = Settings(max_length=512)
CHECKPOINTING = replace(PLAIN, activation_checkpointing=True)
CASES = [
    pytest.param(SMALL, PLAIN, id="plain"),
    pytest.param(SMALL, replace(CHECKPOINTING, world_size=2), id="checkpointing-2-ranks"),
    pytest.param(SMALL, replace(PLAIN, world_size=2, reduce_every="step"), id="step-2-ranks"),
    pytest.param(SMALL, replace(CHECKPOINTING, max_length=16), id="hardly-any-tokens"),
    pytest.param(SMALL, replace(PLAIN, world_size=3), id="uneven-shards"),
    pytest.param(SMALL, replace(PLAIN, world_size=8, replicas=4), id="copies"),
    pytest.param(SMALL, replace(PLAIN, world_size=1), id="one-gpu"),
    pytest.param(LLAMA_3_LIKE, replace(CHECKPOINTING, world_size=2), id="grouped-and-tied"),
    pytest.param(QWEN_3_LIKE, replace(PLAIN, world_size=2), id="qk-norm"),
    pytest.param(QWEN_2_LIKE, CHECKPOINTING, id="qkv-bias"),
    pytest.param(BIG_HEAD, CHECKPOINTING, id="big-head"),
]


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def parameters_of(config: ModelConfig) -> list[torch.nn.Parameter]:
    with torch.device("meta"):
        return list(CausalLM(config).parameters())


@pytest.mark.parametrize(("config", "settings"), CASES)
def test_formulas_equal_the_tracker(config: ModelConfig, settings: Settings, worker: ProcessPoolExecutor) -> None:
    simulated = worker.submit(simulate_memory, config, settings).result()
    plan = plan_memory(config, settings)
    assert plan.parameters == simulated.parameters
    step_counters = 4 * len(parameters_of(config))  # AdamW's, one float32 per tensor
    assert plan.optimizer + step_counters == simulated.optimizer
    if settings.reduce_every == "micro-batch" and settings.replicas == 1:
        assert plan.gradients == simulated.gradients
    assert plan.tracked == pytest.approx(simulated.peak, rel=0.01)


@pytest.mark.slow
def test_formulas_equal_the_tracker_for_13b(worker: ProcessPoolExecutor) -> None:
    settings = Settings(activation_checkpointing=True)
    simulated = worker.submit(simulate_memory, LLM_JP_13B, settings).result()
    assert plan_memory(LLM_JP_13B, settings).tracked == pytest.approx(simulated.peak, rel=0.01)
    # 34.7 GiB were simulated for a step of one micro-batch (FACTS); with several, 6.4 GiB of gradients are there too.
    assert simulated.peak / GIB == pytest.approx(34.7 + 6.4, rel=0.03)


@pytest.mark.slow
def test_layers_add_linearly(worker: ProcessPoolExecutor) -> None:
    from_few_layers = [
        worker.submit(simulate_memory, replace(SMALL, num_hidden_layers=layers), PLAIN).result().peak
        for layers in (4, 5, 6)
    ]
    first, second = from_few_layers[1] - from_few_layers[0], from_few_layers[2] - from_few_layers[1]
    assert first == pytest.approx(second, rel=0.001)


def test_what_is_sharded_adds_up_to_sixteen_bytes_a_parameter() -> None:
    plan = plan_memory(LLM_JP_13B, Settings())
    total = sum(parameter.numel() for parameter in parameters_of(LLM_JP_13B))
    assert parameter_count(LLM_JP_13B) == total == 13_707_924_480
    assert 8 * (plan.parameters + plan.gradients + plan.optimizer) == 16 * total


def test_gradients_stay_whole_until_the_step() -> None:
    settings = Settings(reduce_every="step")
    total = sum(parameter.numel() for parameter in parameters_of(LLM_JP_13B))
    assert plan_memory(LLM_JP_13B, settings).gradients == 4 * total
    assert plan_memory(LLM_JP_13B, replace(settings, cpu_offload=True)).gradients == 4 * total


def test_offload_moves_the_state_to_the_host_and_nothing_else() -> None:
    on_gpu, offloaded = (plan_memory(LLM_JP_13B, Settings(cpu_offload=offload)) for offload in (False, True))
    assert (offloaded.parameters, offloaded.gradients, offloaded.optimizer) == (0, 0, 0)
    assert offloaded.gathered_weights == on_gpu.gathered_weights
    assert (offloaded.activations, offloaded.buffers) == (on_gpu.activations, on_gpu.buffers)
    state = 8 * (on_gpu.parameters + on_gpu.gradients + on_gpu.optimizer)
    assert on_gpu.host_bytes_per_node == 0
    # 204 GiB without the rounding of pinned memory; half of the state is pinned, and at most doubles.
    assert state / GIB == pytest.approx(204, rel=0.01)
    assert state < offloaded.host_bytes_per_node < 1.5 * state


def test_pinned_tensors_are_rounded_up_to_powers_of_two() -> None:
    # Every parameter of this model, and so every half of one, is a power of two: nothing to round.
    even = replace(SMALL, vocab_size=4096, intermediate_size=1024)
    settings = Settings(world_size=2, cpu_offload=True)
    assert plan_memory(even, settings).host_bytes_per_node == 16 * parameter_count(even)
    # 3 x 2^n is rounded to 4 x 2^n: the three MLP matrices of each block.
    odd = replace(even, intermediate_size=1536)
    rounded = even.num_hidden_layers * 3 * 512 * (2048 - 1536)
    assert plan_memory(odd, settings).host_bytes_per_node == 16 * parameter_count(odd) + 2 * 4 * rounded


def test_copies_keep_the_sums_of_their_gradients_on_the_gpu() -> None:
    plan = plan_memory(LLM_JP_13B, Settings(world_size=16, replicas=2, cpu_offload=True))
    assert (plan.parameters, plan.optimizer) == (0, 0)
    assert plan.gradients == 4 * parameter_count(LLM_JP_13B) // 8


@pytest.mark.parametrize("size", LADDER)
def test_peak_moves_the_right_way(size: str) -> None:
    config = model_config_of(f"llm-jp/llm-jp-3-{size}")

    def peak(settings: Settings) -> int:
        return plan_memory(config, settings).peak

    for base in (Settings(), Settings(activation_checkpointing=True), Settings(reduce_every="step")):
        assert peak(replace(base, activation_checkpointing=True)) <= peak(base)
        assert peak(replace(base, cpu_offload=True)) < peak(base)
        assert peak(replace(base, reduce_every="micro-batch")) <= peak(base)
        assert peak(replace(base, world_size=16)) < peak(base)
        assert peak(replace(base, world_size=16, replicas=2)) == peak(base)
        assert peak(replace(base, micro_batch_size=2)) < peak(base)
        assert peak(replace(base, max_length=2048)) == peak(replace(base, micro_batch_size=2))


def test_13b_on_eight_gpus_of_80_gb() -> None:
    def plan(**changes: object) -> MemoryPlan:
        return plan_memory(LLM_JP_13B, Settings(**changes))  # type: ignore[arg-type]

    assert plan(activation_checkpointing=True).peak < 80 * 0.98 * GIB
    assert plan().peak > 80 * GIB
    assert plan(activation_checkpointing=True, reduce_every="step").peak > 80 * GIB
    assert plan(activation_checkpointing=True, cpu_offload=True).peak < 40 * 0.98 * GIB
    assert plan().peak == plan().tracked + MARGIN


def test_copies_must_divide_the_ranks() -> None:
    with pytest.raises(UserError, match="replicas 3 with 8 ranks"):
        Settings(replicas=3)
