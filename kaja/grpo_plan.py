"""How much memory each phase of train_grpo.py needs on a GPU, and its node's host memory: formulas, no GPU.

A rank's GPU holds the trainer's shards, the reference's, a vLLM engine for the policy and, in a process of its own, the
judge's server, unless that has other GPUs. A step is

    generate    the policy's engine samples,           update     backward passes and AdamW
                and the judge reads what is finished   sync       the engine takes over the weights, tensor by tensor
    judge       the judge reads the rest
    log_probs   reference (and policy) without gradients

and an engine that sleeps (vLLM's level 1) keeps nothing on the GPU: weights and CUDA graphs move to pinned host
memory, keys and values are dropped. `GRPOSettings.sleep` says what the policy's does while the trainer works
(log_probs, update). The judge's server never sleeps.

kaja/memory_plan.py has the trainer's part and MARGIN. The engines' activations and CUDA graphs are estimates from
vLLM 0.32's source, not measured. Bytes throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kaja.errors import UserError
from kaja.memory_plan import (
    BFLOAT16, FLOAT32, GIB, GPUS_PER_NODE, MARGIN, Settings, forward_memory, parameter_count, parameter_shapes,
    pinned_bytes, plan_memory, usable_bytes,
)  # fmt: skip
from kaja.model import ModelConfig
from kaja.sampling import cache_bytes_per_token

Phase = Literal["generate", "judge", "log_probs", "update", "sync"]
Sleep = Literal["policy", "none"]

CACHE_BLOCK = 16  # tokens of a block of vLLM's cache on CUDA
# vLLM's batches with LLM(): (tokens of a step, sequences), from 70 GiB on and below (A100: below in any case).
LARGE_BATCH, SMALL_BATCH = (16384, 1024), (8192, 256)
VOCABULARY_STEP = 64  # vLLM pads the vocabulary to a multiple of it
CUDA_GRAPHS = 1 * GIB
SAMPLER_COPIES = 4  # float32 logits, their log-softmax, probabilities, random numbers
# CUDA context, cuBLAS and kernels of the judge's process: 1.19 GiB "still in use" is what vLLM reports of a sleeping
# engine on an H100 (vllm issue 28714).
JUDGE_PROCESS = int(1.2 * GIB)
RESIDENT_VERDICTS = 4  # longest prompts that a judge beside the trainer has keys and values for


@dataclass(frozen=True)
class GRPOSettings:
    """What of a GRPO run decides its memory; names and defaults of train_grpo.py (on GPUs)."""

    world_size: int = 8
    prompts_per_step: int = 64
    group_size: int = 8
    max_completion_tokens: int = 256
    max_length: int = 768
    """Longest prompt and completion together."""
    micro_batch_size: int = 8
    updates_per_step: int = 1
    kl_coef: float = 0.04
    activation_checkpointing: bool = True
    cpu_offload: bool = False
    sleep: Sleep = "policy"
    """Whether the policy's engine sleeps while the trainer works."""
    reshard: bool = True
    """Whether models give back embedding and head after a forward without a backward, as train_grpo.py sees to."""
    judge_length: int = 4096
    """Longest prompt and answer of the judge."""
    judge_memory: float = 0.0
    """Share of the GPU that the judge's server takes; 0: what it needs for a few prompts at a time."""

    def __post_init__(self) -> None:
        if not self.max_completion_tokens < self.max_length:
            raise UserError(
                f"max_length {self.max_length}: it holds prompt and completion, so it must be more than "
                f"max_completion_tokens ({self.max_completion_tokens})"
            )

    @property
    def trainer(self) -> Settings:
        """The policy's update, in the terms of kaja/memory_plan.py."""
        return Settings(
            world_size=self.world_size, micro_batch_size=self.micro_batch_size, max_length=self.max_length,
            global_batch_size=self.prompts_per_step * self.group_size,
            activation_checkpointing=self.activation_checkpointing, cpu_offload=self.cpu_offload,
        )  # fmt: skip

    @property
    def completions(self) -> int:
        """The most completions of one rank in a step."""
        return -(-self.prompts_per_step // self.world_size) * self.group_size


@dataclass(frozen=True)
class EnginePlan:
    """One rank's engine."""

    weights: int
    activations: int
    """The largest of its largest batch: the MLP's, or the sampler's."""
    slept: int
    """Pinned host memory of its weights and CUDA graphs while it sleeps."""
    token: int
    """Keys and values of one token."""
    longest: int
    """Tokens of its longest sequence."""
    shared: int
    """Of them those of the prompt that a group has in common, in whole cache blocks."""
    group_size: int
    sequences: int
    """The most of a step: keys and values for more are of no use."""
    keys_values: int = 0

    @property
    def resident(self) -> int:
        """What it holds on the GPU while it is awake, keys and values apart."""
        return self.weights + CUDA_GRAPHS

    @property
    def own_blocks(self) -> int:
        return -(-(self.longest - self.shared) // CACHE_BLOCK)

    def bytes_for(self, sequences: int) -> int:
        """Keys and values of so many of its longest sequences; vLLM keeps one block to itself."""
        groups = -(-sequences // self.group_size)
        blocks = 1 + groups * self.shared // CACHE_BLOCK + sequences * self.own_blocks
        return blocks * CACHE_BLOCK * self.token

    @property
    def tokens(self) -> int:
        return self.keys_values // (CACHE_BLOCK * self.token) * CACHE_BLOCK

    def options(self, usable: int) -> dict[str, Any]:
        """make_engine's, for an engine of this size."""
        return {"kv_cache_memory_bytes": self.keys_values, "gpu_memory_utilization": self.share(usable)}

    def share(self, usable: int) -> float:
        """gpu_memory_utilization to build it with: vLLM refuses to start where so much is not free."""
        return (self.resident + self.activations + self.keys_values) / usable

    @property
    def at_a_time(self) -> int:
        """Longest sequences that are worked on together."""
        return next((n for n in range(self.sequences, 0, -1) if self.bytes_for(n) <= self.keys_values), 0)


@dataclass(frozen=True)
class PhasePlan:
    """Bytes of the fullest rank's GPU in one phase."""

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    """The policy's shard of float32 weights, its gradients, its moments; the reference's float32 weights."""
    gathered_weights: int
    """Whole weights in bfloat16. Unless `reshard`: after a forward without backward embedding and head stay."""
    activations: int
    """The trainer's, with the buffers of head and reductions."""
    transfer: int = 0
    """Tensors between trainer and engine."""
    policy_engine: int = 0
    judge_engine: int = 0
    """Weights and CUDA graphs of the engines that are awake."""
    engine_activations: int = 0
    policy_keys_values: int = 0
    judge_keys_values: int = 0
    margin: int = MARGIN

    @property
    def keys_values(self) -> int:
        return self.policy_keys_values + self.judge_keys_values

    @property
    def trainer(self) -> int:
        state = self.parameters + self.gradients + self.optimizer + self.reference
        return state + self.gathered_weights + self.activations + self.transfer

    @property
    def peak(self) -> int:
        engines = self.policy_engine + self.judge_engine + self.engine_activations + self.keys_values
        return self.trainer + engines + self.margin


@dataclass(frozen=True)
class GRPOPlan:
    """The phases of a step in their order (those without work are left out), and what all of them share."""

    phases: dict[Phase, PhasePlan]
    policy: EnginePlan
    judge: EnginePlan | None
    host_slept: int
    """Host memory of a node's ranks for the policy's sleeping engine."""
    host_offloaded: int
    """And for policy, gradients, optimiser and reference, with cpu_offload."""
    usable: int

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: self.phases[phase].peak)

    @property
    def fits(self) -> bool:
        """Whether no phase needs more than there is, and each engine has room for its longest sequence."""
        engines = [engine for engine in (self.policy, self.judge) if engine]
        return self.phases[self.peak_phase].peak <= self.usable and all(e.at_a_time > 0 for e in engines)


# ---------------------------------------------------------------------------------------------------
# Engines
# ---------------------------------------------------------------------------------------------------


def engine_tensors(config: ModelConfig, quantization: dict[str, Any] | None = None) -> Iterator[int]:
    """Bytes of each of vLLM's tensors: bfloat16, q/k/v and gate/up in one; of AWQ the matrices of the blocks packed.

    AWQ of a matrix (K, N) with b bits and groups of g: qweight K N b / 8, qzeros and float16 scales for each of
    (K / g, N). The embedding and the head stay as they are.
    """
    width, inner = config.hidden_size, config.intermediate_size
    query_size, key_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    matrices = [(width, query_size + 2 * key_size), (query_size, width), (width, 2 * inner), (inner, width)]
    block_shapes, root_shapes = parameter_shapes(config)
    vectors = [shape[0] for shape in block_shapes if len(shape) == 1]
    for _ in range(config.num_hidden_layers):
        yield from (BFLOAT16 * size for size in vectors)
        for rows, columns in matrices:
            if quantization is None:
                yield BFLOAT16 * rows * columns
            else:
                bits, groups = quantization["bits"], rows // quantization["group_size"]
                yield from (rows * columns * bits // 8, groups * columns * bits // 8, groups * columns * BFLOAT16)
    for shape in root_shapes:
        rows = -(-shape[0] // VOCABULARY_STEP) * VOCABULARY_STEP if len(shape) > 1 else shape[0]
        yield BFLOAT16 * rows * torch.Size(shape[1:]).numel()


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """bits and group_size of an AWQ model's config.json; None for one that is not quantised."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method")
    if method != "awq":
        raise UserError(f"judge's config.json: quant_method is {method!r}; the memory plan knows 'awq' and none")
    bits, group_size = quantization.get("bits", 4), quantization.get("group_size", 128)
    return {"bits": bits, "group_size": group_size}


def _engine(
    config: ModelConfig, gpu_memory: float, *, longest: int, shared: int = 0, group_size: int = 1, sequences: int,
    quantization: dict[str, Any] | None = None,
) -> EnginePlan:  # fmt: skip
    tensors = list(engine_tensors(config, quantization))
    batched, rows = LARGE_BATCH if gpu_memory >= 71 else SMALL_BATCH
    batched = min(batched, rows * longest)
    # Residual, norm and attention's output beside gate, up and their product.
    forward = BFLOAT16 * batched * (3 * config.hidden_size + 3 * config.intermediate_size)
    sampler = SAMPLER_COPIES * FLOAT32 * min(rows, batched) * config.vocab_size
    return EnginePlan(
        weights=sum(tensors), activations=max(forward, sampler),
        slept=sum(map(pinned_bytes, tensors)) + pinned_bytes(CUDA_GRAPHS),
        token=cache_bytes_per_token(config, torch.bfloat16), longest=longest,
        shared=shared // CACHE_BLOCK * CACHE_BLOCK, group_size=group_size, sequences=sequences,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Phases
# ---------------------------------------------------------------------------------------------------


def plan_grpo(
    config: ModelConfig, judge: dict[str, Any] | None, settings: GRPOSettings, gpu_memory: float
) -> GRPOPlan:
    """The memory of train_grpo.py's step, phase by phase.

    Args:
        config: the policy's shape, and the reference's.
        judge: its config.json; None for one that takes nothing of these GPUs: it has others, or is a rule.
        gpu_memory: of a GPU in GB, as on the box.
    """
    policy_engine = _engine(
        config, gpu_memory, longest=settings.max_length,
        shared=settings.max_length - settings.max_completion_tokens, group_size=settings.group_size,
        sequences=settings.completions,
    )  # fmt: skip
    judge_engine = None
    if judge is not None:
        shape = ModelConfig.from_hf(judge)
        judge_engine = _engine(
            shape, gpu_memory, longest=min(settings.judge_length, shape.max_position_embeddings),
            sequences=settings.completions, quantization=quantization_of(judge),
        )  # fmt: skip
    phases = {
        phase: _with_engines(phase, plan, policy_engine, judge_engine, settings.sleep)
        for phase, plan in _trainer_phases(config, settings)
        if phase != "judge" or judge_engine
    }
    usable = usable_bytes(gpu_memory)
    if judge_engine:
        free = usable - max(plan.peak for plan in phases.values())
        if settings.judge_memory:
            room = int(settings.judge_memory * usable) - judge_engine.resident - judge_engine.activations
        else:
            room = min(free, judge_engine.bytes_for(min(RESIDENT_VERDICTS, judge_engine.sequences)))
        judge_engine = replace(judge_engine, keys_values=max(0, room))
        phases = {
            phase: replace(plan, judge_keys_values=judge_engine.keys_values) for phase, plan in phases.items()
        }
    free = usable - max(plan.peak for phase, plan in phases.items() if _has_cache(phase, settings.sleep))
    useful = policy_engine.bytes_for(policy_engine.sequences)
    policy_engine = replace(policy_engine, keys_values=max(0, min(free, useful)))
    phases = {
        phase: replace(plan, policy_keys_values=policy_engine.keys_values)
        if _has_cache(phase, settings.sleep) else plan
        for phase, plan in phases.items()
    }  # fmt: skip
    slept, offloaded = _host_bytes(config, settings, policy_engine)
    return GRPOPlan(phases, policy_engine, judge_engine, slept, offloaded, usable)


def _awake(phase: Phase, sleep: Sleep) -> bool:
    """Whether the policy's engine is."""
    return sleep == "none" or phase in ("generate", "judge", "sync")


def _has_cache(phase: Phase, sleep: Sleep) -> bool:
    """The policy's keys and values come back after the sync, for the canary: as much as in the next generate."""
    return sleep == "none" or phase in ("generate", "judge")


def _with_engines(
    phase: Phase, plan: PhasePlan, policy: EnginePlan, judge: EnginePlan | None, sleep: Sleep
) -> PhasePlan:
    """Add the policy's engine where it is awake, and the judge. While one samples, the other reads."""
    running = policy.activations if phase == "generate" else 0
    if judge and phase in ("generate", "judge"):
        running += judge.activations
    return replace(
        plan, policy_engine=policy.resident if _awake(phase, sleep) else 0,
        judge_engine=judge.resident + JUDGE_PROCESS if judge else 0, engine_activations=running,
    )  # fmt: skip


def _trainer_phases(config: ModelConfig, settings: GRPOSettings) -> Iterator[tuple[Phase, PhasePlan]]:
    """The trainer's and the reference's part, in the order of a step after the first (moments are there)."""
    update = plan_memory(config, settings.trainer)
    has_reference = settings.kl_coef > 0
    _, root_shapes = parameter_shapes(config)
    root = 0 if settings.reshard else BFLOAT16 * sum(torch.Size(shape).numel() for shape in root_shapes)
    of_reference = root if has_reference else 0
    idle = PhasePlan(
        parameters=update.parameters, gradients=0, optimizer=update.optimizer,
        reference=FLOAT32 * parameter_count(config, settings.world_size)
        if has_reference and not settings.cpu_offload else 0,
        gathered_weights=root + of_reference, activations=0,
    )  # fmt: skip
    yield "generate", idle
    yield "judge", idle
    if has_reference or settings.updates_per_step > 1:
        gathered, activations, buffers = forward_memory(config, settings.world_size, settings.trainer.tokens)
        yield "log_probs", replace(
            idle, gathered_weights=gathered + of_reference, activations=activations + buffers
        )
    yield "update", replace(
        idle, gradients=update.gradients, gathered_weights=update.gathered_weights + of_reference,
        activations=update.activations + update.buffers,
    )  # fmt: skip
    yield "sync", _sync_phase(config, settings, idle, of_reference)


def _sync_phase(config: ModelConfig, settings: GRPOSettings, idle: PhasePlan, of_reference: int) -> PhasePlan:
    """The larger of two: a tensor on its way, or the trainer's part of the canary, one prompt long.

    On its way: a module's whole tensors in float32 (offloaded: gathered on the host) and vLLM's new bfloat16 copy.
    The engine's part of the canary, after that, is what `generate` needs.
    """
    largest = max(engine_tensors(config)) // BFLOAT16
    on_the_way = largest * (BFLOAT16 if settings.cpu_offload else FLOAT32 + BFLOAT16)
    loading = replace(idle, gathered_weights=of_reference, transfer=on_the_way)
    prompt = settings.max_length - settings.max_completion_tokens
    gathered, activations, buffers = forward_memory(config, settings.world_size, prompt)
    canary = replace(idle, gathered_weights=gathered + of_reference, activations=activations + buffers)
    return max(loading, canary, key=lambda plan: plan.peak)


def _host_bytes(config: ModelConfig, settings: GRPOSettings, policy: EnginePlan) -> tuple[int, int]:
    """A node's host memory for the sleeping engine, and for what cpu_offload keeps there."""
    ranks = min(GPUS_PER_NODE, settings.world_size)
    slept = policy.slept if settings.sleep == "policy" else 0
    if not settings.cpu_offload:
        return ranks * slept, 0
    offloaded = plan_memory(config, settings.trainer).host_bytes_per_node
    if settings.kl_coef > 0:
        block, root = parameter_shapes(config)
        for shape in root + config.num_hidden_layers * block:
            rows = -(-shape[0] // settings.world_size)
            offloaded += ranks * pinned_bytes(FLOAT32 * rows * torch.Size(shape[1:]).numel())
    return ranks * slept, offloaded
