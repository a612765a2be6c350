"""One process or many through the same code: set-up, FSDP2 sharding, reductions, gathering.

`python script.py` is one rank without a process group; `torchrun` makes many (nccl on CUDA, gloo on
CPU). Every function here does the right thing for both, so the loops never ask.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kaja.errors import UserError
from kaja.model import CausalLM

ItemT = TypeVar("ItemT")
# Numbers and values of malloc.h, for keep_freed_memory: nothing by mmap, of which each block is returned when freed;
# the heap is not shortened below 2 GiB of free memory, and grows by 64 MiB.
MALLOC_OPTIONS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**26)}


@dataclass(frozen=True)
class Ranks:
    """Who this process is, and where it computes."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup() -> Ranks:
    """Join the process group that torchrun announces in the environment, if it did."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Ranks(rank, local_rank, world_size, device)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed for the next that asks, where it would return it to the system.

    A step on a CPU asks for the same large tensors again and again. Returned ones come back as pages of zeros, one page
    fault for every 4 KiB: a tenth of a step with a large vocabulary. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    for option, value in MALLOC_OPTIONS.values():
        mallopt(option, value)


def teardown() -> None:
    # A group of one rank is vLLM's, whose next engine in this process needs it, or ends with the process.
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------------------------------
# Sharding
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharding:
    """How a model is laid over the ranks; the defaults are plain FSDP2."""

    activation_checkpointing: bool = False
    """Keep only each block's input and compute the block again in the backward."""
    cpu_offload: bool = False
    """Parameters, gradients and optimiser state live in host memory; AdamW runs there."""
    compile: bool = False
    """torch.compile each block (attention excepted: its sequences differ from stream to stream)."""
    replicas: int = 1
    """Whole copies of the model (HSDP): ranks shard inside a copy, copies add up their gradients."""


def recompute_blocks(activation_checkpointing: str, ranks: Ranks) -> bool:
    """What the option "auto", "on" or "off" means here: auto saves memory where it is scarce, on GPUs."""
    return activation_checkpointing == "on" or (activation_checkpointing == "auto" and ranks.device.type == "cuda")


def check_replicas(replicas: int, world_size: int) -> None:
    """UserError unless every copy of the model gets the same number of ranks."""
    if world_size % replicas:
        possible = [number for number in range(1, world_size + 1) if world_size % number == 0]
        nearest = sorted(possible, key=lambda number: (abs(number - replicas), number))[:2]
        raise UserError(
            f"replicas {replicas} with {world_size} ranks: it must divide the number of ranks; "
            f"nearest possible: {' or '.join(map(str, sorted(nearest)))}"
        )


def shard_model(model: CausalLM, ranks: Ranks, sharding: Sharding = Sharding()) -> None:
    """Apply torch.compile, activation checkpointing and FSDP2 to a CausalLM, in place and in this order.

    Each block is one FSDP group, embeddings, norm and head are the root's. Parameters stay float32
    (the master weights); on CUDA they are gathered as bfloat16 and gradients are reduced in float32.
    Gradients are *summed* over ranks: the losses already divide by global counts (kaja/loss.py).

    On one CPU rank there is nothing to shard: FSDP2 is left out.
    """
    for index, block in enumerate(model.model.layers):
        if sharding.compile:
            compile_block(block)
        if sharding.activation_checkpointing:
            model.model.layers[index] = checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT)
    if ranks.world_size == 1 and ranks.device.type == "cpu":
        return
    if not dist.is_initialized():  # one GPU without torchrun: FSDP still gives bf16 compute and offload
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    apply_fsdp(model, make_mesh(ranks, sharding.replicas), cpu_offload=sharding.cpu_offload)


def compile_block(block: nn.Module) -> None:
    """torch.compile what stands around the attention: once, for all blocks and for streams of any length.

    Attention stays eager: compiled, it would be compiled again for each new number of sequences, and
    after a few of them not at all.
    """
    for module, method in ((block.self_attn, "project"), (block, "add_mlp")):
        setattr(module, method, torch.compile(getattr(module, method), dynamic=True, fullgraph=True))


def make_mesh(ranks: Ranks, replicas: int = 1) -> DeviceMesh:
    """(shard,) for one copy of the model, (replicate, shard) for several."""
    check_replicas(replicas, ranks.world_size)
    if replicas == 1:
        return init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    shape = (replicas, ranks.world_size // replicas)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))


def apply_fsdp(
    model: CausalLM, mesh: DeviceMesh, *, cpu_offload: bool = False, mixed_precision: bool | None = None
) -> None:
    """fully_shard of blocks and root over `mesh`; bfloat16 compute on CUDA, or as `mixed_precision` says."""
    on_cuda = mesh.device_type == "cuda"
    in_bfloat16 = on_cuda if mixed_precision is None else mixed_precision
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": precision if in_bfloat16 else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_cuda) if cpu_offload else OffloadPolicy(),
    }
    blocks = [fully_shard(block, **options) for block in model.model.layers]
    fully_shard(model, **options)
    # Ask for a block's weights while the one before still computes; the root's are there from the start.
    for block, following in zip(blocks, blocks[1:]):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    for module in model.modules():
        if isinstance(module, FSDPModule):  # neither setting is recursive
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reduce_gradients(model: nn.Module, *, every: bool, last: bool) -> None:
    """Say what the coming backward does with its gradients.

    every: reduce them over the ranks after every micro-batch, so that they stay sharded. Otherwise
        after the last one only: less to send, but until then each rank holds the gradients of the
        whole model in float32.
    last: this is the step's last micro-batch. Copies of the model (HSDP) add up their shards only here.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(every or last)
        model.set_requires_all_reduce(last)


def reshard(model: nn.Module) -> None:
    """Give back what FSDP still holds whole: after a forward without a backward the root's parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def named_shards(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(Hugging Face name, this rank's shard) of every parameter, as the optimiser knows them."""
    reshard(model)  # or named_parameters() would show what is whole
    for name, parameter in model.named_parameters():
        yield name.replace("_checkpoint_wrapped_module.", ""), parameter


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """The weights of one model into another that is laid over the ranks in the same way."""
    for (_, theirs), (_, own) in zip(named_shards(source), named_shards(target), strict=True):
        own.copy_(theirs)


def full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of the state dict, gathered one at a time; every rank must exhaust it."""
    for name, tensor in model.state_dict().items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their global norm is at most `max_norm`; return the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


# ---------------------------------------------------------------------------------------------------
# Reductions and gathering
# ---------------------------------------------------------------------------------------------------


def reduce_stats(stats: dict[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """Add each statistic over the ranks (names that end in "_max": take the maximum), in two reductions."""
    names = sorted(stats)
    values = {name: stats[name].detach().to(ranks.device, torch.float64) for name in names}
    if ranks.world_size > 1:
        for chosen, operation in (
            ([n for n in names if not n.endswith("_max")], dist.ReduceOp.SUM),
            ([n for n in names if n.endswith("_max")], dist.ReduceOp.MAX),
        ):
            if chosen:
                packed = torch.stack([values[name] for name in chosen])
                dist.all_reduce(packed, operation)
                values.update(zip(chosen, packed))
    return {name: float(values[name]) for name in names}


def on_main(action: Callable[[], None], ranks: Ranks) -> None:
    """Call it on rank 0. Where it raises UserError, the other ranks end too, and leave the talking to rank 0."""
    failure: UserError | None = None
    if ranks.is_main:
        try:
            action()
        except UserError as error:
            failure = error
    if any(gather_shares([failure is not None], ranks)):
        raise failure or SystemExit(2)


def my_share(items: list[ItemT], ranks: Ranks) -> list[ItemT]:
    """Every world_size-th item, from `rank` on; gather_shares puts the results back in order."""
    return items[ranks.rank :: ranks.world_size]


def gather_shares(mine: list[ItemT], ranks: Ranks) -> list[ItemT]:
    """The results of my_share of all ranks, in the order of the undivided list, on every rank."""
    if ranks.world_size == 1:
        return mine
    parts: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(parts, mine)
    gathered: list[Any] = [None] * sum(len(part) for part in parts)
    for rank, part in enumerate(parts):
        gathered[rank :: ranks.world_size] = part
    return gathered


def from_main(value: ItemT, ranks: Ranks) -> ItemT:
    """Rank 0's value, on every rank; all must call it, and what the others give is dropped."""
    (shared,) = gather_shares([value] if ranks.is_main else [], ranks)
    return shared


def of_node(value: ItemT, ranks: Ranks) -> ItemT:
    """What the first rank of this rank's node holds; every rank must call it."""
    if ranks.world_size == 1:
        return value
    node = int(os.environ.get("GROUP_RANK", 0))  # torchrun's number of the node
    held: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(held, (node, ranks.local_rank, value))
    return next(theirs for number, local_rank, theirs in held if (number, local_rank) == (node, 0))
