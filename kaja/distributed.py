"""One process or many through the same code: set-up, FSDP2 sharding, reductions, gathering.

`python script.py` is one rank without a process group; `torchrun` makes many (nccl on CUDA, gloo on
CPU). Every function here does the right thing for both, so the loops never ask.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kaja.model import CausalLM

ItemT = TypeVar("ItemT")


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
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Ranks(rank, local_rank, world_size, device)


def teardown() -> None:
    # A group of one rank is vLLM's own, and its next engine in this process needs it.
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------------------------------
# Sharding
# ---------------------------------------------------------------------------------------------------


def shard_model(
    model: CausalLM, ranks: Ranks, *, activation_checkpointing: bool = False, cpu_offload: bool = False
) -> None:
    """Apply activation checkpointing and FSDP2 to a CausalLM, in place.

    Each block is one FSDP group, embeddings, norm and head are the root's. Parameters stay float32
    (the master weights); on CUDA they are gathered as bfloat16 and gradients are reduced in float32.
    Gradients are *summed* over ranks: the losses already divide by global counts (kaja/loss.py).

    activation_checkpointing: keep only each block's input and compute the block again in the backward.
    cpu_offload: parameters, gradients and optimiser state live in host memory; AdamW runs there.

    On one CPU rank there is nothing to shard: the model is left as it is.
    """
    if activation_checkpointing:
        for index, block in enumerate(model.model.layers):
            model.model.layers[index] = checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT)
    if ranks.world_size == 1 and ranks.device.type == "cpu":
        return
    on_cuda = ranks.device.type == "cuda"
    if not dist.is_initialized():  # one GPU without torchrun: FSDP still gives bf16 compute and offload
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": precision if on_cuda else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_cuda) if cpu_offload else OffloadPolicy(),
    }
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # neither setting is recursive
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


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
    values = {name: stats[name].detach().double() for name in names}
    if ranks.world_size > 1:
        for chosen, operation in (
            ([n for n in names if not n.endswith("_max")], dist.ReduceOp.SUM),
            ([n for n in names if n.endswith("_max")], dist.ReduceOp.MAX),
        ):
            if chosen:
                packed = torch.stack([values[name] for name in chosen]).to(ranks.device)
                dist.all_reduce(packed, operation)
                values.update(zip(chosen, packed))
    return {name: float(values[name]) for name in names}


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
