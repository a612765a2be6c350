"""One training run for each way to lay a model over ranks; test_distributed.py reads what it writes.

    torchrun --nproc_per_node 2 tests/distributed_worker.py FOLDER

One launch runs all cases of its world size: starting the processes costs more than the training does.
The same run_case on one rank, in the test's own process and without FSDP, is what they must equal.
"""

import functools
import gc
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kaja.batching import Batch, filler, pack, plan_streams
from kaja.chat import TokenSequence
from kaja.distributed import (
    Ranks, Sharding, apply_fsdp, clip_gradients, full_tensors, make_mesh, named_shards, of_node,
    reduce_gradients, reduce_stats, setup, shard_model, teardown,
)  # fmt: skip
from kaja.files import write_json
from kaja.loss import sft_loss
from kaja.model import CausalLM, ModelConfig, init_weights
from kaja.optim import parameter_groups, set_learning_rate

# 2 does not divide the vocabulary, 4 does not divide the MLP either: shards of unequal size.
CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=54, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-5,
    rope={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip
TIED = replace(CONFIG, tie_word_embeddings=True, qkv_bias=True, qk_norm=True)
BATCH_SIZES = (12, 7, 1, 10, 3)  # sequences of each step; the third leaves a rank without any
LONGEST = 40
MAX_GRAD_NORM = 1.5  # below the norm of some steps, above that of others
# SGD is linear in the gradients. Adam divides by their size: where they are nearly 0, rounding decides the sign.
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(parameter_groups(model, 0.01), lr=0.5),
    "adamw": lambda model: torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3, betas=(0.9, 0.98), fused=True),
}


@dataclass(frozen=True)
class Case:
    sharding: Sharding = Sharding()
    every: bool = True  # reduce after every micro-batch
    max_tokens: int = 80  # of a stream
    config: ModelConfig = CONFIG


CASES: dict[int, dict[str, Case]] = {
    2: {
        "plain": Case(),
        "offload": Case(Sharding(cpu_offload=True)),
        "checkpointing": Case(Sharding(activation_checkpointing=True)),
        "offload, checkpointing": Case(Sharding(activation_checkpointing=True, cpu_offload=True)),
        "reduce last": Case(every=False),
        "one stream": Case(max_tokens=1000),
        "many streams": Case(max_tokens=LONGEST),
        "copies": Case(Sharding(replicas=2)),
        "copies, reduce last": Case(Sharding(replicas=2), every=False),
        "compile": Case(Sharding(compile=True)),
        "all on, tied": Case(Sharding(True, True, True), every=False, config=TIED),
    },
    4: {
        "plain": Case(max_tokens=LONGEST),
        "copies": Case(Sharding(replicas=2), max_tokens=LONGEST),
        "copies, reduce last": Case(Sharding(replicas=2), every=False, max_tokens=LONGEST),
        "copies, offload, checkpointing": Case(Sharding(True, True, replicas=2), max_tokens=LONGEST),
    },
}


def batches() -> list[list[TokenSequence]]:
    """Sequences of 3 to 41 tokens; the first third of each is not trained on."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in BATCH_SIZES:
        lengths = torch.randint(3, LONGEST + 2, (size,), generator=generator).tolist()
        ids = [torch.randint(CONFIG.vocab_size, (length,), generator=generator).tolist() for length in lengths]
        made.append([TokenSequence(i, [position >= len(i) // 3 for position in range(len(i))]) for i in ids])
    return made


def fresh_model(config: ModelConfig = CONFIG) -> CausalLM:
    model = CausalLM(config)
    init_weights(model, seed=0, std=0.1)
    return model


def sharded_model(case: Case, ranks: Ranks) -> CausalLM:
    model = fresh_model(case.config)
    shard_model(model, ranks, case.sharding)
    return model


def log_probs_of(model: CausalLM, packed: Batch) -> Tensor:
    return model(packed.input_ids, packed.positions, packed.cu_seqlens, packed.labels, packed.completion_mask)[0]


def add_gradients(
    model: CausalLM, batch: list[TokenSequence], case: Case, ranks: Ranks, look: Callable[[], None] = lambda: None
) -> float:
    """The gradient of a global batch, micro-batch by micro-batch, and its loss; `look` is called after each."""
    num_trained = sum(sequence.num_trained for sequence in batch)
    lengths = [len(sequence.input_ids) - 1 for sequence in batch]
    plan = plan_streams(lengths, ranks.world_size, case.max_tokens, case.config.hidden_size)
    streams = [[batch[i] for i in stream] or [filler(batch)] for stream in plan[ranks.rank]]
    loss_sum = torch.zeros(())
    for number, stream in enumerate(streams, start=1):
        reduce_gradients(model, every=case.every, last=number == len(streams))
        packed = pack(stream)
        loss = sft_loss(log_probs_of(model, packed), packed.completion_mask, num_trained)
        loss.backward()
        loss_sum += loss.detach()
        look()
    return reduce_stats({"loss": loss_sum}, ranks)["loss"]


def whole(tensor: Tensor) -> Tensor:
    # A copy: without FSDP it would be the parameter itself, which the next step changes.
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run_case(case: Case, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Five steps with each optimiser.

    Returns:
        tensors: "gradient/NAME" of the first step before clipping; "OPTIMIZER/NAME" after the last.
        record: losses and gradient norms of each optimiser; "traffic": of each micro-batch of the first
            step [reduce-scatters, all-reduces, parameters that then have a gradient]; "digest" of the tensors.
    """
    tensors: dict[str, Tensor] = {}
    record: dict[str, Any] = {}
    for optimizer_name, make_optimizer in OPTIMIZERS.items():
        model = sharded_model(case, ranks)
        optimizer = make_optimizer(model)
        losses, norms = [], []
        for step, batch in enumerate(batches()):
            if step == 0:
                loss, record["traffic"] = watch_traffic(model, batch, case, ranks)
                tensors |= {f"gradient/{name}": whole(shard.grad) for name, shard in named_shards(model)}
            else:
                loss = add_gradients(model, batch, case, ranks)
            losses.append(loss)
            norms.append(clip_gradients(model, MAX_GRAD_NORM))
            optimizer.step()
            optimizer.zero_grad()
        record[optimizer_name] = {"losses": losses, "norms": norms}
        tensors |= {f"{optimizer_name}/{name}": whole(tensor) for name, tensor in full_tensors(model)}
    if case.config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("lm_head.weight")}
    numbers = b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
    record["digest"] = hashlib.sha256(numbers).hexdigest()
    return tensors, record


def watch_traffic(
    model: CausalLM, batch: list[TokenSequence], case: Case, ranks: Ranks
) -> tuple[float, list[list[int]]]:
    """add_gradients, counting its collectives."""
    calls: Counter[str] = Counter()
    rows = []

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def count(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(*args, **options)

        return mock.patch.object(dist, name, count)

    def look() -> None:
        present = sum(parameter.grad is not None for parameter in model.parameters())
        rows.append([calls["reduce_scatter_single"], calls["all_reduce"], present])
        calls.clear()

    with counting("reduce_scatter_single"), counting("all_reduce"):
        return add_gradients(model, batch, case, ranks, look), rows


def shard_sizes(sharding: Sharding, ranks: Ranks) -> dict[str, list[int]]:
    """name -> [elements of the whole parameter, of rank 0's part, of rank 1's, ...], after a backward."""
    model = sharded_model(Case(sharding), ranks)
    add_gradients(model, batches()[0], Case(sharding), ranks)
    sizes = {}
    for name, shard in named_shards(model):
        assert isinstance(shard, DTensor) and isinstance(shard.grad, DTensor), name
        assert shard.to_local().shape == shard.grad.to_local().shape, name
        sizes[name] = [shard.numel(), *gathered(shard.to_local().numel())]
    return sizes


def names_after_scoring(ranks: Ranks) -> list[str]:
    """What named_shards yields after a forward without a backward; they must be the optimiser's tensors."""
    model = sharded_model(Case(Sharding(activation_checkpointing=True)), ranks)
    optimizer = OPTIMIZERS["adamw"](model)
    with torch.no_grad():
        log_probs_of(model, pack(batches()[0][:2]))
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [name for name, shard in named_shards(model) if id(shard) in known and isinstance(shard, DTensor)]


def bfloat16_step(ranks: Ranks) -> dict[str, Any]:
    """The first step computed in bfloat16, as on CUDA."""
    model = fresh_model()
    apply_fsdp(model, make_mesh(ranks), mixed_precision=True)
    loss = add_gradients(model, batches()[0], Case(every=False), ranks)
    dtypes = {str(tensor.dtype) for _, shard in named_shards(model) for tensor in (shard, shard.grad)}
    return {"loss": loss, "norm": clip_gradients(model, MAX_GRAD_NORM), "dtypes": sorted(dtypes)}


def watch_memory(ranks: Ranks) -> list[dict[str, int]]:
    """200 steps of fused AdamW; after every 50th what there is: Python objects, tensors among them, memory."""
    case = Case()
    model = sharded_model(case, ranks)
    optimizer = OPTIMIZERS["adamw"](model)
    batch = batches()[-1]
    rows = []
    for step in range(1, 201):
        add_gradients(model, batch, case, ranks)
        set_learning_rate(optimizer, 1e-4 / step)
        clip_gradients(model, 2.0 * (step % 2))  # scaled to 0, or left as they are
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            gc.collect()
            living = gc.get_objects()
            rows.append({
                "objects": len(living),
                "tensors": sum(issubclass(type(thing), Tensor) for thing in living),
                "bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            })  # fmt: skip
            del living
    return rows


def gathered(value: Any) -> list[Any]:
    """Every rank's value."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_of_two_nodes(ranks: Ranks) -> list[str]:
    """What each rank gets of its node's first, if half of the ranks were on another node."""
    node, local_rank = divmod(ranks.rank, ranks.world_size // 2)
    with mock.patch.dict(os.environ, {"GROUP_RANK": str(node)}):
        return gathered(of_node(f"rank {ranks.rank}", replace(ranks, local_rank=local_rank)))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = setup()
    world_size = ranks.world_size
    records: dict[str, Any] = {"runs": {}, "graphs": {}, "shards": {}, "meshes": {}}
    # The graphs run as they are captured: C++ would take 10 s a rank, and has its own test.
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        for name, case in CASES[world_size].items():
            torch._dynamo.utils.counters.clear()
            tensors, record = run_case(case, ranks)
            records["runs"][name] = gathered(record)
            records["graphs"][name] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            if ranks.is_main:
                save_file(tensors, folder / f"{name}.safetensors")
    for replicas in sorted({1, world_size // 2, world_size}):
        mesh = make_mesh(ranks, replicas)
        records["meshes"][replicas] = [list(mesh.mesh_dim_names), mesh.mesh.tolist()]
        records["shards"][replicas] = shard_sizes(Sharding(replicas=replicas), ranks)
    records["nodes"] = first_of_two_nodes(ranks)
    if world_size == 2:
        records |= {"names": names_after_scoring(ranks), "bfloat16": bfloat16_step(ranks)}
        records["memory"] = gathered(watch_memory(ranks))
    if ranks.is_main:
        write_json(folder / "records.json", records)
    teardown()
    assert not dist.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
