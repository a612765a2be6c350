"""How much memory a training run will need on each GPU and on the host, before anyone pays for them.

Two ways to the same number:

    plan_memory        formulas that follow kaja's code; instant
    simulate_memory    kaja's own code under fake tensors and a fake process group, watched by torch's FSDPMemTracker

tests/test_memory_plan.py holds one to the other. Neither knows of CUDA's context, NCCL's buffers and fragments of the
caching allocator: those are MARGIN, a line of its own. Bytes throughout; printed in GiB (2^30).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from kaja.distributed import Ranks, apply_fsdp, check_replicas, clip_gradients, make_mesh, reduce_gradients
from kaja.loss import sft_loss, token_log_probs
from kaja.model import CausalLM, ModelConfig
from kaja.optim import parameter_groups

GIB = 2**30
# CUDA context, cuBLAS and NCCL buffers, what the caching allocator holds in fragments and for FSDP's streams: 3 to 6
# GiB are usual. The larger, because "fits" should hold.
MARGIN = 6 * GIB
GPUS_PER_NODE = 8
# An "80 GB" H100 or A100 has 79.1 GiB for programs, a "40 GB" A100 39.4, a "141 GB" H200 139.
USABLE = 0.985
HEAD_COLUMNS: int = signature(token_log_probs).parameters["num_columns"].default
FLOAT32, BFLOAT16 = 4, 2

ReduceEvery = Literal["micro-batch", "step"]
REDUCE_EVERY: tuple[ReduceEvery, ...] = ("micro-batch", "step")


@dataclass(frozen=True)
class Settings:
    """What of a run decides its memory; names and defaults of train_sft.py."""

    world_size: int = 8
    replicas: int = 1
    micro_batch_size: int = 4
    max_length: int = 4096
    global_batch_size: int = 256
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    reduce_every: ReduceEvery = "micro-batch"

    def __post_init__(self) -> None:
        check_replicas(self.replicas, self.world_size)

    @property
    def shards(self) -> int:
        """Ranks that one copy of the model is divided over."""
        return self.world_size // self.replicas

    @property
    def tokens(self) -> int:
        """The most tokens of one stream."""
        return self.micro_batch_size * self.max_length


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the fullest rank's GPU at the fullest moment of a step, and of the host."""

    parameters: int
    """Its shard of the master weights, float32."""
    gradients: int
    """Its shard in float32; all of them, not only a shard, with reduce_every="step"."""
    optimizer: int
    """AdamW's two moments of the shard, float32."""
    gathered_weights: int
    """Whole weights in bfloat16: embedding, norm and head all the time, one block in use, one on its way."""
    activations: int
    """What the forward keeps for the backward, and the backward's own."""
    buffers: int
    """The head's logits, gradients on their way to be reduced."""
    host_bytes_per_node: int
    """Host memory of the ranks of one node for parameters, gradients and optimiser; 0 without cpu_offload."""
    margin: int = MARGIN
    """What no formula knows: see MARGIN."""

    @property
    def tracked(self) -> int:
        """All tensors at the peak: what simulate_memory measures."""
        state = self.parameters + self.gradients + self.optimizer
        return state + self.gathered_weights + self.activations + self.buffers

    @property
    def peak(self) -> int:
        return self.tracked + self.margin


# ---------------------------------------------------------------------------------------------------
# Formulas
# ---------------------------------------------------------------------------------------------------


def parameter_shapes(config: ModelConfig) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of all parameters of one block, and of the root group (embedding, final norm, head)."""
    with torch.device("meta"):
        model = CausalLM(replace(config, num_hidden_layers=1))
    block = [tuple(parameter.shape) for parameter in model.model.layers[0].parameters()]
    everything = [tuple(parameter.shape) for parameter in model.parameters()]
    for shape in block:
        everything.remove(shape)
    return block, everything


def _numel(shapes: list[tuple[int, ...]], shards: int = 1) -> int:
    """Elements of the first rank's shard: FSDP2 cuts along dimension 0 and rounds up, so no shard is larger."""
    return sum(-(-shape[0] // shards) * torch.Size(shape[1:]).numel() for shape in shapes)


def parameter_count(config: ModelConfig, shards: int = 1) -> int:
    """Parameters of the model, or of its largest shard."""
    block, root = parameter_shapes(config)
    return _numel(root, shards) + config.num_hidden_layers * _numel(block, shards)


def activation_bytes_per_token(config: ModelConfig) -> int:
    """What the backward of one block needs of its forward, a token's share.

    bfloat16: the block's input, both norms' outputs, the sum between attention and MLP (4 D); queries, keys after
    the rotation, values, attention's output (2 H d + 2 K d); gate, up, silu(gate), their product (4 F).
    float32: one number per norm, one per head (log-sum-exp). Qwen3's q_norm and k_norm keep their inputs as well.
    """
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    query_size, key_size = heads * config.head_dim, key_heads * config.head_dim
    elements = 4 * config.hidden_size + 2 * query_size + 2 * key_size + 4 * config.intermediate_size
    floats = 2 + heads
    if config.qk_norm:
        elements += query_size + key_size
        floats += heads + key_heads
    return BFLOAT16 * elements + FLOAT32 * floats


def plan_memory(config: ModelConfig, settings: Settings) -> MemoryPlan:
    """The memory of train_sft.py's step on CUDA, by formulas.

    Assumed: a full stream (micro_batch_size * max_length tokens, all trained on), a step of several micro-batches
    (so that gradients of the earlier ones are there), the optimiser's moments of an earlier step, and no
    torch.compile. The peak is in the backward, at the highest of _moments.
    """
    shard, whole = parameter_count(config, settings.shards), parameter_count(config)
    all_gradients = settings.reduce_every == "step"
    gradients = FLOAT32 * (whole if all_gradients else shard)
    # Copies of the model add up their shards at the last micro-batch; until then FSDP2 keeps them on the GPU.
    gradients_stay = all_gradients or not settings.cpu_offload or settings.replicas > 1
    gathered, activations, buffers = max(_moments(config, settings), key=sum)
    return MemoryPlan(
        parameters=0 if settings.cpu_offload else FLOAT32 * shard,
        gradients=gradients if gradients_stay else 0,
        optimizer=0 if settings.cpu_offload else 2 * FLOAT32 * shard,
        gathered_weights=gathered, activations=activations, buffers=buffers,
        host_bytes_per_node=_host_bytes(config, settings) if settings.cpu_offload else 0,
    )  # fmt: skip


def _moments(config: ModelConfig, settings: Settings) -> Iterator[tuple[int, int, int]]:
    """(gathered weights, activations, buffers) at every moment that can be the peak."""
    block_shapes, root_shapes = parameter_shapes(config)
    block, root, layers = _numel(block_shapes), _numel(root_shapes), config.num_hidden_layers
    tokens, width, vocabulary = settings.tokens, config.hidden_size, config.vocab_size
    hidden = BFLOAT16 * tokens * width  # one (T, D) tensor
    inner = BFLOAT16 * tokens * config.intermediate_size  # one (T, F) tensor
    head_gradient = BFLOAT16 * vocabulary * width  # of its weight: made first, reduced last
    full = tokens * activation_bytes_per_token(config)
    kept = hidden if settings.activation_checkpointing else full
    # A block's weights are asked for while the one before (in the backward: after) it computes.
    ahead = BFLOAT16 * block if settings.shards > 1 else 0
    in_use = BFLOAT16 * (root + block)

    # Head: norm's input and trained tokens' states; the weight's gradient, the states' in float32, a tile's logits in
    # float32 and bfloat16, and a product that is added to one of the gradients. The last block is on its way.
    columns = min(HEAD_COLUMNS, vocabulary)
    tile = tokens * columns * (FLOAT32 + BFLOAT16)
    product = FLOAT32 * width * max(tokens, columns)
    buffers = head_gradient + FLOAT32 * tokens * width + tile + product
    yield BFLOAT16 * root + ahead, layers * kept + 2 * hidden, buffers

    # MLP of a block: all that its forward keeps (computed again, with checkpointing), but the MLP's product freed;
    # gradients of the block's output, of the product, of silu(gate) and up; gradient of down_proj's weight.
    working = full - kept + hidden + 2 * inner
    down_gradient = BFLOAT16 * width * config.intermediate_size
    yield in_use + (ahead if layers > 1 else 0), layers * kept + working, head_gradient + down_gradient
    if layers > 1 and settings.reduce_every == "micro-batch":  # the block after it is still being reduced
        prefetched = ahead if layers > 2 else 0
        buffers = head_gradient + down_gradient + FLOAT32 * block
        yield in_use + prefetched, (layers - 1) * kept + working, buffers

    # Reductions. Of a block: its weights are freed, its bfloat16 gradients copied to float32.
    ahead = ahead if layers > 1 else 0
    reduction = _reduction_bytes(block_shapes, settings)
    yield BFLOAT16 * root + ahead, (layers - 1) * kept + hidden, head_gradient + reduction
    yield 0, 0, _reduction_bytes(root_shapes, settings)


def forward_memory(config: ModelConfig, shards: int, tokens: int) -> tuple[int, int, int]:
    """(gathered weights, activations, buffers) at the peak of a forward without gradients over one stream.

    FSDP2 keeps what it gathered, flat, beside the weights made of it until the next group has its own. So there
    are the root's weights and the first block's, twice; or a block's, twice, and the next one's on their way.
    """
    block_shapes, root_shapes = parameter_shapes(config)
    block, root = BFLOAT16 * _numel(block_shapes), BFLOAT16 * _numel(root_shapes)
    query_size, key_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sharded = shards > 1
    ahead = block if sharded and config.num_hidden_layers > 1 else 0
    # The block's input, the sum after the attention and its norm; silu(gate), up and their product.
    in_mlp = 3 * config.hidden_size + 3 * config.intermediate_size
    # The block's input and its norm; queries, keys and values while queries or, after them, keys are rotated.
    rotating = max(4 * query_size + 2 * key_size, 2 * query_size + 5 * key_size)
    in_attention = 2 * config.hidden_size + rotating
    cosines = 2 * config.head_dim
    logits = FLOAT32 * tokens * min(HEAD_COLUMNS, config.vocab_size)
    return max(
        ((root + block) * (2 if sharded else 1), BFLOAT16 * tokens * (config.hidden_size + cosines), 0),
        (root + block + sharded * block + ahead, BFLOAT16 * tokens * (max(in_mlp, in_attention) + cosines), 0),
        (root + sharded * block, BFLOAT16 * tokens * 2 * config.hidden_size, logits),
        key=sum,
    )  # fmt: skip


def _reduction_bytes(shapes: list[tuple[int, ...]], settings: Settings) -> int:
    """A group's gradients on their way from bfloat16, whole, to float32, reduced and cut into shards."""
    whole, shard = _numel(shapes), _numel(shapes, settings.shards)
    if settings.shards == 1:  # nothing to send, but FSDP2 divides by the factor 1 into a copy
        return 3 * FLOAT32 * whole
    return FLOAT32 * whole + max(BFLOAT16 * whole, FLOAT32 * shard)


def _host_bytes(config: ModelConfig, settings: Settings) -> int:
    """Parameters and gradients are pinned: torch rounds each such tensor up to a power of two. Moments are not."""
    block, root = parameter_shapes(config)
    total = 0
    for shape in root + config.num_hidden_layers * block:
        shard = FLOAT32 * _numel([shape], settings.shards)
        total += 2 * shard + 2 * pinned_bytes(shard)
    return total * min(GPUS_PER_NODE, settings.world_size)


def pinned_bytes(size: int) -> int:
    """Host memory that torch takes for a pinned tensor of `size` bytes: the next power of two."""
    return 1 << (size - 1).bit_length()


def usable_bytes(gpu_memory: float) -> int:
    """What programs get of a GPU with `gpu_memory` GB as written on its box."""
    return int(USABLE * gpu_memory * GIB)


# ---------------------------------------------------------------------------------------------------
# Simulation
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimulatedMemory:
    """Bytes of a rank at the peak, from torch's tracker: to be compared with MemoryPlan.tracked."""

    parameters: float
    gradients: float
    """The reduced ones of earlier micro-batches; whole ones (reduce_every="step") are part of `peak` alone."""
    optimizer: float
    peak: float


# Layers add linearly once there is a block before and after the one that is worked on.
SIMULATED_LAYERS = (4, 6)


def simulate_memory(config: ModelConfig, settings: Settings) -> SimulatedMemory:
    """kaja's model, loss, FSDP2 sharding and optimiser on tensors without data, as rank 0 of world_size.

    Deep models are run with two small numbers of layers and extrapolated. cpu_offload is left out: on a CPU the
    two memories are one. The process must not have a process group.
    """
    few, more = SIMULATED_LAYERS
    if config.num_hidden_layers <= more:
        return SimulatedMemory(**_simulate(config, settings))
    at_few, at_more = (_simulate(replace(config, num_hidden_layers=layers), settings) for layers in (few, more))
    steps = (config.num_hidden_layers - few) / (more - few)
    return SimulatedMemory(**{name: at_few[name] + steps * (at_more[name] - at_few[name]) for name in at_few})


def _simulate(config: ModelConfig, settings: Settings) -> dict[str, float]:
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=settings.world_size)
    try:
        mesh = make_mesh(Ranks(0, 0, settings.world_size, torch.device("cpu")), settings.replicas)
        with FakeTensorMode():
            model = CausalLM(config)
            if settings.activation_checkpointing:
                for index, block in enumerate(model.model.layers):
                    model.model.layers[index] = checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT)
            apply_fsdp(model, mesh, mixed_precision=True)
            optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-5, fused=True)
            # A tiny step makes the moments. It is not tracked: the tracker would count the whole tensors that
            # DTensor makes up to find the shapes of the optimiser's results. Fused AdamW itself needs no memory.
            _fake_micro_batch(model, replace(settings, micro_batch_size=1, max_length=8), last=True)
            with _answers(settings):
                clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tracker = FSDPMemTracker(model, optimizer)
            with tracker:
                for last in (False, True):
                    _fake_micro_batch(model, settings, last)
                    tracker.reset_mod_stats()
            (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    finally:
        dist.destroy_process_group()
    values = {str(getattr(kind, "value", kind)): float(size) for kind, size in snapshot.items()}
    return {
        "parameters": values["Sharded Param"], "gradients": values["Sharded Grad"],
        "optimizer": values["OptState"], "peak": values["Total"],
    }  # fmt: skip


def _fake_micro_batch(model: CausalLM, settings: Settings, last: bool) -> None:
    """The body of train_sft.py's loop, with a full stream."""
    tokens = settings.tokens
    ids, mask = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens, dtype=torch.bool)
    cu_seqlens = torch.zeros(settings.micro_batch_size + 1, dtype=torch.int32)
    reduce_gradients(model, every=settings.reduce_every == "micro-batch", last=last)
    with _answers(settings):
        log_probs, _ = model(ids, ids, cu_seqlens, ids, mask, equal_gradients=True)
        sft_loss(log_probs, mask, denominator=tokens).backward()


@contextmanager
def _answers(settings: Settings) -> Iterator[None]:
    """What fake tensors on the CPU cannot know: that they are on CUDA, and their content.

    `is_cuda` makes model.py and loss.py take the paths that they take on a GPU (varlen_attn, whose fake version runs
    anywhere; matrix products with float32 results). nonzero: all tokens are trained on. int: the longest sequence.
    """

    def everything(mask: Tensor) -> Tensor:
        return torch.arange(len(mask))[:, None]

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        return _FusedRMSNorm.apply(x, weight)

    known: dict[str, Any] = {
        "is_cuda": True, "nonzero": everything,
        "__int__": lambda tensor: settings.max_length, "__float__": lambda tensor: 1.0,
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(FakeTensor, create=True, **known))
        stack.enter_context(mock.patch.object(nn.functional, "rms_norm", rms_norm))
        yield


class _FusedRMSNorm(torch.autograd.Function):
    """The memory of CUDA's kernel, which keeps input and 1 / rms; the CPU's way makes many float32 tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
