"""What needs several ranks, or a process that can be harmed: cases of test_checkpoint.py and test_resume.py.

    python tests/checkpoint_worker.py MODEL_FOLDER SCRATCH_FOLDER CASE...

Importing torch costs more than any case, so that one process imports it and forks the ranks of every case.
"""

import dataclasses
import faulthandler
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from kaja import checkpoint, resume
from kaja.checkpoint import load_model, save_model
from kaja.distributed import Ranks, Sharding, barrier, named_shards, setup, teardown
from kaja.errors import UserError
from kaja.model import CausalLM
from kaja.optim import parameter_groups
from kaja.resume import CheckpointWriter, resume_checkpoint

ROOT = Path(__file__).resolve().parent.parent
IDS = torch.tensor([1, 5, 17, 40, 3, 200])
TIME_LIMIT = 60  # seconds; a rank that hangs is a failure
SMALL_FILES = mock.patch.object(checkpoint, "MAX_SHARD_BYTES", 40_000)

SHARDINGS = {
    1: [Sharding()],
    2: [Sharding(), Sharding(activation_checkpointing=True, cpu_offload=True)],
    3: [Sharding()],  # divides neither vocabulary nor width: the last rank's shards are smaller
    4: [Sharding(replicas=2)],
}


def run_cases(model_folder: Path, scratch: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    """For the tests: these cases in a process of their own; it prints "passed NAME" for each that holds."""
    command = [sys.executable, __file__, str(model_folder), str(scratch), *cases]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


# ---------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------


def fork(world_size: int, function: Callable[..., None], *args: object) -> list[multiprocessing.Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=be_rank, args=(rank, world_size, port, function, *args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def be_rank(rank: int, world_size: int, port: int, function: Callable[..., None], *args: object) -> None:
    faulthandler.dump_traceback_later(TIME_LIMIT - 5)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    ranks = setup()
    function(ranks, *args)
    teardown()


def in_ranks(world_size: int, function: Callable[..., None], *args: object) -> list[int | None]:
    """Exit codes; a rank that hangs is killed."""
    processes = fork(world_size, function, *args)
    end = time.monotonic() + TIME_LIMIT
    for process in processes:
        process.join(max(0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


# ---------------------------------------------------------------------------------------------------
# A model under training
# ---------------------------------------------------------------------------------------------------


def trained(ranks: Ranks, steps: int, sharding: Sharding = Sharding()) -> tuple[CausalLM, torch.optim.Optimizer]:
    model = load_model(MODEL, ranks=ranks, sharding=sharding)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2, fused=True)
    for _ in range(steps):
        forward(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def forward(model: CausalLM) -> Tensor:
    cu_seqlens = torch.tensor([0, len(IDS) - 1], dtype=torch.int32)
    mask = torch.ones(len(IDS) - 1, dtype=torch.bool)
    return -model(IDS[:-1], torch.arange(len(IDS) - 1), cu_seqlens, IDS[1:], mask)[0].mean()


def whole_state(model: CausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every parameter, moment and step count, whole; named apart from the checkpoint's own names."""
    state = {}
    for name, parameter in named_shards(model):
        state[name] = parameter.detach()
        state |= {f"{key} {name}": value for key, value in optimizer.state[parameter].items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in state.items()
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_raises(function: Callable[[], None], *parts: str) -> None:
    try:
        function()
    except UserError as error:
        assert all(part in str(error) for part in parts), error
        return
    raise AssertionError("no UserError")


# ---------------------------------------------------------------------------------------------------
# Cases of test_checkpoint.py
# ---------------------------------------------------------------------------------------------------


def load_rank(ranks: Ranks, sharding: Sharding) -> None:
    """Each rank's shard holds the file's numbers; float32 as in the file, and converted on the way."""
    source = load_file(MODEL / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(MODEL, dtype, ranks, sharding)
        tensors = model.state_dict()
        assert tensors.keys() == source.keys()
        for name, tensor in tensors.items():
            assert isinstance(tensor, DTensor) and tensor.dtype == dtype
            share = -(-source[name].shape[0] * sharding.replicas // ranks.world_size)
            assert tensor.to_local().shape[0] <= share, name
            assert torch.equal(tensor.full_tensor(), source[name].to(dtype)), name


def load() -> None:
    """Shards of every layout hold the right numbers."""
    for world_size in (2, 3, 4):
        for sharding in SHARDINGS[world_size]:
            assert in_ranks(world_size, load_rank, sharding) == [0] * world_size, (world_size, sharding)


def save_rank(ranks: Ranks, folder: Path) -> None:
    model = load_model(MODEL, ranks=ranks, sharding=SHARDINGS[ranks.world_size][-1])
    with SMALL_FILES:
        save_model(model, folder, MODEL, ranks)
        on_cuda = dataclasses.replace(ranks, device=torch.device("cuda"))  # bfloat16, all else stays on the CPU
        save_model(model, folder / "bfloat16", MODEL, on_cuda)


def save() -> None:
    """Folders of 1 to 4 ranks, for the test to compare."""
    for world_size in SHARDINGS:
        assert in_ranks(world_size, save_rank, SCRATCH / f"hf {world_size}") == [0] * world_size


def save_on_a_full_disk_rank(ranks: Ranks, folder: Path) -> None:
    model = load_model(MODEL, ranks=ranks)
    with SMALL_FILES:
        if ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        assert_raises(lambda: save_model(model, folder, MODEL, ranks), f"{folder}: cannot", "rank 1: File too large")
    barrier()


def save_on_a_full_disk() -> None:
    """The disk is full for one rank: both say so, and what was there before is still there."""
    folder = SCRATCH / "full" / "hf"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("of an earlier run")
    assert in_ranks(2, save_on_a_full_disk_rank, folder) == [0, 0]
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]
    assert [path.name for path in folder.iterdir()] == ["config.json"]


# ---------------------------------------------------------------------------------------------------
# Cases of test_resume.py
# ---------------------------------------------------------------------------------------------------


def write_rank(ranks: Ranks) -> None:
    for sharding, folder in layouts(ranks.world_size):
        model, optimizer = trained(ranks, 3, sharding)
        expected = whole_state(model, optimizer)
        with torch.no_grad():
            forward(model)  # as for the held-out loss: FSDP leaves the root's parameters whole
        with CheckpointWriter(folder, ranks) as checkpoints:
            checkpoints.save(3, model, optimizer, epoch=1)
            forward(model).backward()
            optimizer.step()  # while it is being written
        if ranks.is_main:
            save_file(expected, folder / "expected.safetensors")


def resume_rank(ranks: Ranks) -> None:
    for sharding, _ in layouts(ranks.world_size):
        for world_size in SHARDINGS:
            for _, folder in layouts(world_size):
                model, optimizer = trained(ranks, 0, sharding)
                assert resume_checkpoint(folder, model, optimizer, ranks) == {"step": 3, "epoch": 1}
                assert_same(whole_state(model, optimizer), load_file(folder / "expected.safetensors"))


def layouts(world_size: int) -> list[tuple[Sharding, Path]]:
    """Each sharding with the folder of its checkpoint."""
    return [(sharding, SCRATCH / f"{world_size} {number}") for number, sharding in enumerate(SHARDINGS[world_size])]


def reshard() -> None:
    """A checkpoint of any number of ranks and any sharding resumes on any other, bit for bit."""
    for function in (write_rank, resume_rank):
        for world_size in SHARDINGS:
            assert in_ranks(world_size, function) == [0] * world_size, (function, world_size)


def full_disk_rank(ranks: Ranks, folder: Path) -> None:
    model, optimizer = trained(ranks, 1)
    expected = whole_state(model, optimizer)
    checkpoints = CheckpointWriter(folder, ranks)
    checkpoints.save(1, model, optimizer)
    checkpoints.close()
    checkpoints = CheckpointWriter(folder, ranks)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == ranks.world_size - 1:  # with two ranks, not the one that publishes
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    model, optimizer = trained(ranks, 2)
    checkpoints.save(2, model, optimizer)
    name = str(folder / "checkpoints" / "step_000002")
    said = (name, "File too large", "the last good one is step_000001", "--resume auto")
    assert_raises(lambda: checkpoints.save(3, model, optimizer), *said)
    checkpoints.save(2, model, optimizer)
    assert_raises(checkpoints.close, *said)
    checkpoints.close()  # said once
    barrier()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000001"]
    barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    model, optimizer = trained(ranks, 0)
    assert resume_checkpoint(folder, model, optimizer, ranks) == {"step": 1}
    assert_same(whole_state(model, optimizer), expected)
    with CheckpointWriter(folder, ranks) as checkpoints:  # there is room again
        checkpoints.save(2, model, optimizer)
    barrier()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000001", "step_000002"]


def full_disk() -> None:
    """A disk that is full for one rank: the next save and close say so on all, the checkpoint before stays."""
    for world_size in (1, 2):
        assert in_ranks(world_size, full_disk_rank, SCRATCH / f"full disk {world_size}") == [0] * world_size


def killed_rank(ranks: Ranks, folder: Path) -> None:
    model, optimizer = trained(ranks, 1)
    with CheckpointWriter(folder, ranks) as checkpoints:
        checkpoints.save(1, model, optimizer)
    original = resume.write_tensors

    def write_and_wait(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        original(tensors, path, metadata)
        if ranks.is_main:
            os.truncate(path, path.stat().st_size // 2)
            time.sleep(3600)

    with mock.patch.object(resume, "write_tensors", write_and_wait), CheckpointWriter(folder, ranks) as checkpoints:
        checkpoints.save(2, model, optimizer)


def after_the_kill_rank(ranks: Ranks, folder: Path) -> None:
    expected = whole_state(*trained(ranks, 1))
    model, optimizer = trained(ranks, 0)
    assert resume_checkpoint(folder, model, optimizer, ranks) == {"step": 1}
    assert_same(whole_state(model, optimizer), expected)
    CheckpointWriter(folder, ranks).close()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000001"]


def killed() -> None:
    """kill -9 while a checkpoint is half written: the one before is the newest, and the half one is tidied up."""
    folder = SCRATCH / "killed"
    processes = fork(2, killed_rank, folder)
    half = folder / "checkpoints" / ".step_000002.tmp"
    whole_size = 0
    while not whole_size:  # until rank 1 has written its file, and rank 0 half of its own
        sizes = [path.stat().st_size for path in half.glob("rank_*.safetensors")] if half.exists() else []
        whole_size = max(sizes) if len(sizes) == 2 and min(sizes) < max(sizes) * 0.6 else 0
        assert all(process.is_alive() for process in processes)
        time.sleep(0.002)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [".step_000002.tmp", "step_000001"]
    assert in_ranks(2, after_the_kill_rank, folder) == [0, 0]


def dead_rank_rank(ranks: Ranks, folder: Path, leave: str) -> None:
    model, optimizer = trained(ranks, 1)
    checkpoints = CheckpointWriter(folder, ranks)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with checkpoints:
            checkpoints.save(1, model, optimizer)
            if leave == "error":
                raise ValueError("of the loop")
    except ValueError as error:
        assert leave == "error" and str(error) == "of the loop" and "not written" in error.__notes__[0]
    except RuntimeError as error:
        assert leave == "end" and "step_000001: the checkpoint could not be written" in str(error)
    else:
        raise AssertionError("nothing was raised")
    assert not list((folder / "checkpoints").iterdir())
    os._exit(0)  # the process group is broken


def dead_rank() -> None:
    """A rank dies during a save: the other one does not wait for it, and its own exception comes through."""
    for leave in ("error", "end"):
        assert in_ranks(2, dead_rank_rank, SCRATCH / f"dead {leave}", leave) == [0, -signal.SIGKILL]


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[3:]:
        try:
            globals()[name]()
            print("passed", name, flush=True)
        except AssertionError:
            traceback.print_exc()


if __name__ == "__main__":
    MODEL, SCRATCH = Path(sys.argv[1]), Path(sys.argv[2])
    main()
