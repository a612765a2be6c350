"""Host memory and time per rank of load_model, save_model and CheckpointWriter.save, on a random 304M-parameter model.

1. The folder (bfloat16, 580 MiB) is made in a temporary directory and removed afterwards. Parameters are loaded as
   float32: 1,160 MiB for the whole model, and three times as much with AdamW's moments.
2. Each operation is measured in fresh processes, on 1 rank without FSDP2 and on several gloo ranks with it, after a
   warm-up with a tiny model, which loads the libraries.
3. Memory is RssAnon of /proc/PID/status, read every 2 ms by a process of its own, above its value at the start: pages
   of a memory-mapped file are the system's cache, not the rank's, and do not count.

    OMP_NUM_THREADS=1 python bench/load_model.py
    OMP_NUM_THREADS=1 python bench/load_model.py --ranks 1 2 4 --layers 8

Targets: load_model: the rank's shard and one tensor. save_model: one file and one tensor. CheckpointWriter.save: a
copy of the rank's parameters and moments, also while they are being written, and the loop does not stand still then.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kaja import checkpoint  # noqa: E402
from kaja.checkpoint import load_model, save_model  # noqa: E402
from kaja.distributed import Ranks, barrier, setup, teardown  # noqa: E402
from kaja.files import write_json  # noqa: E402
from kaja.model import CausalLM, ModelConfig  # noqa: E402
from kaja.resume import CheckpointWriter  # noqa: E402

MIB = 2**20
OPERATIONS = ("load_model", "save_model", "CheckpointWriter.save")
# Says "ready", then the highest value that it saw until its input ended.
SAMPLER = r"""
import re, select, sys
peak = 0
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.002)[0]:
    status = open(f"/proc/{sys.argv[1]}/status", encoding="ascii").read()
    peak = max(peak, int(re.search(r"RssAnon:\s+(\d+) kB", status).group(1)))
print(peak * 1024)
"""


# ---------------------------------------------------------------------------------------------------
# In the ranks
# ---------------------------------------------------------------------------------------------------


class Measurement:
    """Around an operation: seconds, and how far this process's anonymous memory rose above its start."""

    def __enter__(self) -> "Measurement":
        self.sampler = subprocess.Popen(
            [sys.executable, "-c", SAMPLER, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.sampler.stdout is not None and self.sampler.stdout.readline() == "ready\n"
        barrier()
        status = Path("/proc/self/status").read_text(encoding="ascii")
        match = re.search(r"RssAnon:\s+(\d+) kB", status)
        assert match is not None, "/proc/self/status has no RssAnon: this benchmark needs Linux"
        self.start_bytes, self.start = int(match.group(1)) * 1024, time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.start
        output, _ = self.sampler.communicate()
        self.mebibytes = (int(output) - self.start_bytes) / MIB


def bytes_here(tensor: Tensor) -> int:
    return tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes


def measure_load(folder: Path, scratch: Path, ranks: Ranks) -> dict[str, float]:
    with Measurement() as measured:
        model = load_model(folder, ranks=ranks)
    tensors = list(model.parameters())
    return {
        "holds": sum(map(bytes_here, tensors)) / MIB, "tensor": max(map(bytes_here, tensors)) / MIB,
        "peak": measured.mebibytes, "seconds": measured.seconds,
    }  # fmt: skip


def measure_save(folder: Path, scratch: Path, ranks: Ranks) -> dict[str, float]:
    model = load_model(folder, ranks=ranks)
    with Measurement() as measured:
        save_model(model, scratch / "hf", folder, ranks)
    files = [path.stat().st_size for path in (scratch / "hf").glob("*.safetensors")]
    tensor = max(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    # One rank without FSDP2 writes from the parameters' own memory: it needs none.
    holds = max(files) / MIB if ranks.world_size > 1 else 0.0
    return {"holds": holds, "tensor": tensor / MIB, "peak": measured.mebibytes, "seconds": measured.seconds}


def measure_checkpoint(folder: Path, scratch: Path, ranks: Ranks) -> dict[str, float]:
    model = load_model(folder, ranks=ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    copied, stalled = [], 0.0
    with Measurement() as measured, CheckpointWriter(scratch, ranks) as checkpoints:
        for step in (1, 2):
            started = time.perf_counter()
            checkpoints.save(step, model, optimizer)
            copied.append(time.perf_counter() - started)
            while not (scratch / "checkpoints" / f"step_{step:06d}").exists():
                before = time.perf_counter()
                time.sleep(0.001)
                stalled = max(stalled, time.perf_counter() - before)
    return {
        "holds": 3 * sum(map(bytes_here, model.parameters())) / MIB, "tensor": 0.0, "peak": measured.mebibytes,
        "seconds": copied[0], "again": copied[1], "on_disk": measured.seconds / 2, "stall": stalled,
    }  # fmt: skip


MEASURES = dict(zip(OPERATIONS, (measure_load, measure_save, measure_checkpoint)))


def be_rank(args: argparse.Namespace) -> None:
    ranks = setup()
    checkpoint.MAX_SHARD_BYTES = args.file_mebibytes * MIB
    work = Path(args.work)
    for name in ("tiny", "model"):  # the first loads the libraries
        result = MEASURES[args.operation](work / name, work / f"{args.operation} {ranks.world_size} {name}", ranks)
        barrier()
    write_json(work / f"rank {ranks.rank}.json", result)
    teardown()


# ---------------------------------------------------------------------------------------------------
# In the process that starts them
# ---------------------------------------------------------------------------------------------------


def make_folder(folder: Path, **changes: int) -> int:
    """A model folder of random bfloat16 numbers without a tokenizer; returns how many they are."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 99584,
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
        "num_key_value_heads": 12, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, **changes,
    }  # fmt: skip
    folder.mkdir()
    write_json(folder / "config.json", config)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CausalLM(ModelConfig.from_hf(config)).state_dict().items()}
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def run_ranks(operation: str, world_size: int, work: Path, file_mebibytes: int) -> list[dict[str, float]]:
    command = [sys.executable]
    if world_size > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    options = ["--operation", operation, "--work", str(work), "--file-mebibytes", str(file_mebibytes)]
    finished = subprocess.run([*command, __file__, *options], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return [json.loads((work / f"rank {rank}.json").read_text(encoding="utf-8")) for rank in range(world_size)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--file-mebibytes", type=int, default=320, help="largest file of save_model (5 GB in kaja)")
    parser.add_argument("--operation", choices=OPERATIONS, help=argparse.SUPPRESS)  # set for the ranks
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.operation:
        be_rank(args)
        return
    with tempfile.TemporaryDirectory(prefix="kaja-bench-") as name:
        work = Path(name)
        make_folder(work / "tiny", vocab_size=512, hidden_size=96, intermediate_size=192, num_hidden_layers=1)
        parameters = make_folder(work / "model", num_hidden_layers=args.layers)
        print(
            f"{parameters / 1e6:.0f}M parameters: {parameters * 2 / MIB:,.0f} MiB of bfloat16 on disk, "
            f"{parameters * 4 / MIB:,.0f} MiB of float32 in memory; files of at most {args.file_mebibytes} MiB\n"
        )
        print(f"{'':24}{'ranks':>6}{'rank':>6}{'holds MiB':>11}{'+ tensor':>10}{'peak MiB':>10}{'seconds':>9}")
        for operation in OPERATIONS:
            for world_size in args.ranks:
                for rank, row in enumerate(run_ranks(operation, world_size, work, args.file_mebibytes)):
                    print(
                        f"{operation:24}{world_size:>6}{rank:>6}{row['holds']:>11,.0f}{row['tensor']:>10,.0f}"
                        f"{row['peak']:>10,.0f}{row['seconds']:>9.2f}",
                        f"  second time {row['again']:.2f} s; on disk after {row['on_disk']:.1f} s; "
                        f"longest stall of the loop meanwhile {row['stall']:.3f} s"
                        if "on_disk" in row else "",
                    )  # fmt: skip
    print("\nholds: the shard (load_model), a file (save_model), the copy (CheckpointWriter)")


if __name__ == "__main__":
    main()
