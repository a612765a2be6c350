"""Sharding, for real: gloo processes train like one, hold only their shards, leak nothing and compile once."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, command
from distributed_worker import BATCH_SIZES, CASES, CONFIG, MAX_GRAD_NORM, Case
from safetensors.torch import load_file
from torch import Tensor

from kaja.batching import pack, plan_streams
from kaja.chat import TokenSequence
from kaja.distributed import (
    Ranks, Sharding, barrier, check_replicas, clip_gradients, recompute_blocks, reduce_gradients, setup, shard_model,
    teardown,
)  # fmt: skip
from kaja.errors import UserError
from kaja.model import CausalLM

# One worker of pytest-xdist runs the whole file: the launches are shared.
pytestmark = pytest.mark.xdist_group("distributed")
ONE_RANK = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
GROUPS = CONFIG.num_hidden_layers + 1  # FSDP groups: blocks and root
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def reference() -> Callable[[Case], tuple[Tensors, dict[str, Any]]]:
    """The case's model on one rank, everything off, each global batch one stream."""
    known: dict[bool, tuple[Tensors, dict[str, Any]]] = {}

    def run(case: Case) -> tuple[Tensors, dict[str, Any]]:
        tied = case.config.tie_word_embeddings
        if tied not in known:
            known[tied] = worker.run_case(Case(max_tokens=1000, config=case.config), ONE_RANK)
        return known[tied]

    return run


FAULTS_OF_LARGE_TENSORS = """
import resource, sys
import torch
from kaja.distributed import setup

if "setup" in sys.argv:
    setup()
for _ in range(20):  # until the heap has grown
    torch.ones(16, 2**20)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(16, 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc's malloc")
def test_freed_memory_is_used_again_after_setup() -> None:
    def page_faults(*arguments: str) -> int:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("GLIBC_TUNABLES", None)
        python = [sys.executable, "-c", FAULTS_OF_LARGE_TENSORS, *arguments]
        return int(subprocess.run(python, env=environment, capture_output=True, text=True, check=True).stdout)

    pages = 20 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert page_faults() > 0.9 * pages  # else there was nothing to mend
    assert page_faults("setup") < 0.1 * pages


def launch(world_size: int, folder: Path) -> Path:
    # Building a vLLM engine in this process sets the variable that turns torch.compile off.
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = command("tests/distributed_worker.py", folder, ranks=world_size)
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Folder with the results of all cases of a world size."""
    folders: dict[int, Path] = {}

    def run(world_size: int) -> Path:
        if world_size not in folders:
            folders[world_size] = launch(world_size, tmp_path_factory.mktemp(f"ranks{world_size}"))
        return folders[world_size]

    return run


Reference = Callable[[Case], tuple[Tensors, dict[str, Any]]]
Launched = Callable[[int], Path]


def records_of(folder: Path) -> dict[str, Any]:
    records: dict[str, Any] = json.loads((folder / "records.json").read_text(encoding="utf-8"))
    return records


def largest_difference(mine: Tensors, theirs: Tensors, kind: str) -> float:
    """Of the tensors "kind/...", relative to the largest number in any of them."""
    names = [name for name in theirs if name.startswith(kind)]
    assert names and mine.keys() == theirs.keys()
    scale = max(theirs[name].abs().max().item() for name in names)
    return max((mine[name] - theirs[name]).abs().max().item() for name in names) / scale


# --------------------------------------------------------------------------- many ranks are one


def test_the_cases_are_not_trivial(reference: Reference) -> None:
    """Several streams a rank, a rank without a sequence, steps that clip and steps that do not, weights that move."""
    sizes = [len(batch) for batch in worker.batches()]
    assert tuple(sizes) == BATCH_SIZES and min(sizes) < 2
    lengths = [len(sequence.input_ids) - 1 for sequence in worker.batches()[0]]
    assert len(set(lengths)) > 5
    assert len(plan_streams(lengths, 2, Case().max_tokens, CONFIG.hidden_size)[0]) == 2
    assert len(plan_streams(lengths, 2, worker.LONGEST, CONFIG.hidden_size)[0]) == 4
    tensors, record = reference(Case())
    start = worker.fresh_model().state_dict()
    for optimizer in worker.OPTIMIZERS:
        norms = record[optimizer]["norms"]
        assert min(norms) < MAX_GRAD_NORM < max(norms)
        for name, tensor in start.items():
            assert (tensors[f"{optimizer}/{name}"] - tensor).norm() > 1e-3 * tensor.norm(), name  # 100 tolerances


@pytest.mark.slow
def test_the_reference_is_what_transformers_computes(reference: Reference) -> None:
    """Loss, gradient and its norm of the first batch: transformers' model, sample by sample, unpacked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=CONFIG.vocab_size, hidden_size=CONFIG.hidden_size, intermediate_size=CONFIG.intermediate_size,
        num_hidden_layers=CONFIG.num_hidden_layers, num_attention_heads=CONFIG.num_attention_heads,
        num_key_value_heads=CONFIG.num_key_value_heads, head_dim=CONFIG.head_dim, rms_norm_eps=CONFIG.rms_norm_eps,
        max_position_embeddings=CONFIG.max_position_embeddings, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    model.load_state_dict(worker.fresh_model().state_dict())
    batch = worker.batches()[0]
    total = 0.0
    for sequence in batch:
        ids = torch.tensor([sequence.input_ids])
        targets = torch.where(torch.tensor([sequence.completion_mask]), ids, -100)[0, 1:]
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], targets, reduction="sum")
        loss = losses / sum(s.num_trained for s in batch)
        loss.backward()
        total += loss.item()
    tensors, record = reference(Case())
    theirs = {f"gradient/{name}": parameter.grad for name, parameter in model.named_parameters()}
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith("gradient")}
    assert largest_difference(mine, theirs, "gradient") < 2e-6
    assert record["sgd"]["losses"][0] == pytest.approx(total, rel=1e-6)
    norm = torch.cat([grad.flatten() for grad in theirs.values()]).double().norm().item()
    assert record["sgd"]["norms"][0] == pytest.approx(norm, rel=1e-6)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "name"), [(size, name) for size, cases in CASES.items() for name in cases])
def test_many_ranks_equal_one(world_size: int, name: str, launched: Launched, reference: Reference) -> None:
    folder = launched(world_size)
    theirs, expected = reference(CASES[world_size][name])
    mine = load_file(folder / f"{name}.safetensors")
    records = records_of(folder)["runs"][name]
    for optimizer in worker.OPTIMIZERS:
        for quantity in ("losses", "norms"):
            for record in records:  # of each rank
                assert record[optimizer][quantity] == pytest.approx(expected[optimizer][quantity], rel=1e-5)
    assert len({record["digest"] for record in records}) == 1  # every rank, every copy has the same model
    assert largest_difference(mine, theirs, "gradient") < 1e-6
    assert largest_difference(mine, theirs, "sgd") < 1e-5
    assert largest_difference(mine, theirs, "adamw") < 3e-4
    close = [torch.isclose(mine[n], theirs[n], rtol=1e-5, atol=1e-6).flatten() for n in theirs if n.startswith("adamw")]
    assert torch.cat(close).float().mean() > 0.999


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["offload", "checkpointing", "offload, checkpointing"])
def test_saving_memory_changes_no_bit(name: str, launched: Launched) -> None:
    runs = records_of(launched(2))["runs"]
    assert runs[name] == runs["plain"]  # the digest of all tensors too


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "name"), [(size, name) for size, cases in CASES.items() for name in cases])
def test_gradients_are_clipped_by_their_true_norm(world_size: int, name: str, launched: Launched) -> None:
    """The norm that ranks compute from their shards is that of the gathered gradients."""
    tensors = load_file(launched(world_size) / f"{name}.safetensors")
    gradients = [tensor.numpy().astype("float64") for key, tensor in tensors.items() if key.startswith("gradient")]
    norm = sum((gradient**2).sum() for gradient in gradients) ** 0.5
    for record in records_of(launched(world_size))["runs"][name]:
        assert record["sgd"]["norms"][0] == pytest.approx(norm, rel=1e-6)


# --------------------------------------------------------------------------- what is where, and when it travels


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "replicas"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_ranks_hold_only_their_shards(world_size: int, replicas: int, launched: Launched) -> None:
    shards = records_of(launched(world_size))["shards"][str(replicas)]
    assert shards.keys() == worker.fresh_model().state_dict().keys()
    ranks_of_a_copy = world_size // replicas
    for name, (whole, *parts) in shards.items():
        assert len(parts) == world_size and sum(parts) == replicas * whole, name
        assert max(parts) <= whole / ranks_of_a_copy + whole / 16, name  # rows are never divided
        for copy in range(replicas):
            assert sum(parts[copy * ranks_of_a_copy : (copy + 1) * ranks_of_a_copy]) == whole, name


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.gloo
def test_a_nodes_first_rank_speaks_for_the_node(launched: Launched) -> None:
    assert records_of(launched(2))["nodes"] == ["rank 0", "rank 1"]
    assert records_of(launched(4))["nodes"] == ["rank 0", "rank 0", "rank 2", "rank 2"]


@pytest.mark.slow
def test_copies_are_of_neighbouring_ranks(launched: Launched) -> None:
    """torchrun numbers the ranks of a node one after another: a copy stays inside a node."""
    assert records_of(launched(2))["meshes"] == {
        "1": [["shard"], [0, 1]], "2": [["replicate", "shard"], [[0], [1]]],
    }  # fmt: skip
    assert records_of(launched(4))["meshes"] == {
        "1": [["shard"], [0, 1, 2, 3]],
        "2": [["replicate", "shard"], [[0, 1], [2, 3]]],
        "4": [["replicate", "shard"], [[0], [1], [2], [3]]],
    }


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "name", "first", "last"),
    [
        (2, "plain", (GROUPS, 0, 21), (GROUPS, 0, 21)),
        (2, "offload, checkpointing", (GROUPS, 0, 21), (GROUPS, 0, 21)),
        (2, "reduce last", (0, 0, 0), (GROUPS, 0, 21)),
        (2, "copies", (0, 0, 0), (0, GROUPS, 21)),
        (4, "copies", (GROUPS, 0, 0), (GROUPS, GROUPS, 21)),
        (4, "copies, reduce last", (0, 0, 0), (GROUPS, GROUPS, 21)),
    ],
)
def test_when_gradients_are_reduced(
    world_size: int, name: str, first: tuple[int, ...], last: tuple[int, ...], launched: Launched
) -> None:
    """Reduce-scatters (in a copy), all-reduces (between copies) and parameters with a gradient, each micro-batch."""
    for record in records_of(launched(world_size))["runs"][name]:
        assert record["traffic"] == [list(first), list(last)]


@pytest.mark.gloo
@pytest.mark.slow
def test_named_shards_after_scoring(launched: Launched) -> None:
    """FSDP leaves the root's parameters whole after a forward without backward; the optimiser's are still found."""
    assert records_of(launched(2))["names"] == list(worker.fresh_model().state_dict())


@pytest.mark.gloo
@pytest.mark.slow
def test_bfloat16_compute_with_float32_weights_and_gradients(launched: Launched, reference: Reference) -> None:
    result, expected = records_of(launched(2))["bfloat16"], reference(Case())[1]["sgd"]
    assert result["dtypes"] == ["torch.float32"]
    assert result["loss"] == pytest.approx(expected["losses"][0], rel=3e-3)
    assert result["norm"] == pytest.approx(expected["norms"][0], rel=3e-2)
    assert result["loss"] != pytest.approx(expected["losses"][0], rel=1e-6)  # it was bfloat16


@pytest.mark.gloo
@pytest.mark.slow
def test_two_hundred_steps_leak_nothing(launched: Launched) -> None:
    """Fused AdamW on DTensors kept objects of every step in some torch versions (pytorch 188174, 181761, 178276)."""
    for warm, *later in records_of(launched(2))["memory"]:
        for row in later:
            assert row["tensors"] == warm["tensors"]
            assert row["objects"] < warm["objects"] + 50  # one a step would be 50 a row
            assert row["bytes"] < warm["bytes"] + 2**22


# --------------------------------------------------------------------------- torch.compile


@pytest.mark.gloo
@pytest.mark.slow
def test_blocks_share_their_compiled_graphs(launched: Launched) -> None:
    """Two graphs, before and after attention, for all blocks, both optimisers and streams of every shape."""
    graphs = records_of(launched(2))["graphs"]
    assert graphs["plain"] == 0 and graphs["compile"] == 2 and graphs["all on, tied"] == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real generated code: more kinds of stream than torch compiles variants of a function before it gives up."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # a vLLM engine in this process sets it
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = worker.fresh_model(), worker.fresh_model()
    shard_model(compiled, ONE_RANK, Sharding(compile=True, activation_checkpointing=True))
    sequences = [sequence for batch in worker.batches() for sequence in batch]
    streams = [sequences[first : first + number] for number in range(1, 11) for first in (0, 11)]
    for stream in streams:
        results = [gradient_of(model, stream) for model in (eager, compiled)]
        torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
        assert largest_difference(results[1][1], results[0][1], "") < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def gradient_of(model: CausalLM, stream: list[TokenSequence]) -> tuple[Tensor, Tensors]:
    model.zero_grad()
    log_probs = worker.log_probs_of(model, pack(stream))
    log_probs.sum().backward()
    names = worker.named_shards(model)
    return log_probs.detach(), {name: parameter.grad for name, parameter in names if parameter.grad is not None}


# --------------------------------------------------------------------------- one rank, and mistakes


def test_one_cpu_rank_is_not_sharded() -> None:
    model = worker.fresh_model()
    before = dict(model.named_parameters())
    shard_model(model, ONE_RANK, Sharding(cpu_offload=True))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    reduce_gradients(model, every=False, last=False)
    gradient_of(model, worker.batches()[0])
    norm = torch.cat([parameter.grad.flatten() for parameter in before.values()]).norm().item()
    assert clip_gradients(model, norm / 4) == pytest.approx(norm, rel=1e-6)
    clipped = torch.cat([parameter.grad.flatten() for parameter in before.values()]).norm().item()
    assert clipped == pytest.approx(norm / 4, rel=1e-5)


def test_setup_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = dist.is_initialized()
    ranks = setup()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    assert ranks == Ranks(0, 0, 1, device) and ranks.is_main
    barrier()
    teardown()
    assert dist.is_initialized() == before


def test_teardown_spares_a_group_of_one() -> None:
    """vLLM's engines make one in this process, and the next engine needs it."""
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    teardown()
    assert dist.is_initialized()
    if mine:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("replicas", "world_size", "nearest"),
    [(3, 8, "2 or 4"), (5, 8, "2 or 4"), (16, 8, "4 or 8"), (2, 1, "1"), (2, 7, "1 or 7"), (5, 6, "3 or 6")],
)
def test_impossible_replicas(replicas: int, world_size: int, nearest: str) -> None:
    with pytest.raises(UserError) as error:
        check_replicas(replicas, world_size)
    assert str(error.value) == (
        f"replicas {replicas} with {world_size} ranks: it must divide the number of ranks; nearest possible: {nearest}"
    )


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_possible_replicas(replicas: int) -> None:
    check_replicas(replicas, 8)


@pytest.mark.parametrize(
    ("option", "device", "expected"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("on", "cpu", True), ("off", "cuda", False)],
)
def test_when_blocks_are_recomputed(option: str, device: str, expected: bool) -> None:
    assert recompute_blocks(option, Ranks(0, 0, 1, torch.device(device))) == expected
