"""`train_sft.py --dry-run`: what a run will need, as text, before anyone pays for GPUs.

The memory comes from kaja/memory_plan.py. Tokens per second are an estimate from stated assumptions, good for
comparing settings and for ordering machines, no better.
"""

import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from kaja.errors import UserError
from kaja.files import read_json
from kaja.flops import PEAK_TFLOPS, train_flops
from kaja.memory_plan import (
    FLOAT32, GIB, GPUS_PER_NODE, REDUCE_EVERY, MemoryPlan, Settings, SimulatedMemory, parameter_count, plan_memory,
    simulate_memory,
)  # fmt: skip
from kaja.model import ModelConfig


# ---------------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------------

# llm-jp-3: layers, width, FFN, heads.
LADDER = {
    "150m": (12, 512, 2048, 8), "440m": (16, 1024, 3584, 8), "980m": (20, 1536, 5376, 8), "1.8b": (24, 2048, 7168, 16),
    "3.7b": (28, 3072, 8192, 24), "7.2b": (32, 4096, 11008, 32), "13b": (40, 5120, 13824, 40),
}  # fmt: skip


def model_config_of(name: str) -> ModelConfig:
    """The shape of a model without its weights: a local folder, a hub id, or an llm-jp-3 model (known offline)."""
    folder = Path(name)
    if folder.is_dir():
        return ModelConfig.from_hf(read_json(folder / "config.json"))
    known = re.fullmatch(r"llm-jp/llm-jp-3-([0-9.]+[mb])(-.*)?", name)
    if known and known[1] in LADDER:
        layers, width, inner, heads = LADDER[known[1]]
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        return ModelConfig(99584, width, inner, layers, heads, heads, width // heads, 4096, 1e-5, rope)
    if folder.exists() or name.startswith((".", "/")) or name.count("/") != 1:
        raise UserError(f"{name}: no such model folder; give an existing folder or a hub id like owner/name")
    try:
        path = hf_hub_download(name, "config.json")
    except (OSError, HFValidationError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: no config.json on the hub ({reason}); check the name and the network") from None
    return ModelConfig.from_hf(read_json(path))


# ---------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------

MFU = 0.40  # with activation checkpointing, as llm-foundry publishes for 13B; see kaja/flops.py for the counting
PCIE_BYTES_PER_SECOND = 25e9  # per GPU
HOST_BYTES_PER_SECOND = 200e9  # memory of a node


def tokens_per_second(config: ModelConfig, settings: Settings, peak: float) -> float:
    """Estimated for one GPU of `peak` FLOP/s, with full streams and communication hidden behind arithmetic.

    Without checkpointing the same hardware does 3/4 of the work for the same tokens. CPU offload adds what nothing
    hides: gradients to the host (4 bytes a weight) and, from the second micro-batch on, their sum (12 bytes); once
    a step clipping (12) and AdamW (28).
    """
    flops = train_flops(config, [settings.max_length] * settings.micro_batch_size, settings.tokens)
    seconds = flops / (MFU * peak) * (1.0 if settings.activation_checkpointing else 0.75)
    if settings.cpu_offload:
        shard = parameter_count(config, settings.shards)
        on_node = shard * min(GPUS_PER_NODE, settings.world_size)
        micro_batches = max(1, settings.global_batch_size // (settings.world_size * settings.micro_batch_size))
        reductions = micro_batches if settings.reduce_every == "micro-batch" else 1
        transfer = reductions * FLOAT32 * shard / PCIE_BYTES_PER_SECOND
        on_host = (12 * (reductions - 1) + 40) * on_node / HOST_BYTES_PER_SECOND
        seconds += (transfer + on_host) / micro_batches
    return settings.tokens / seconds


# ---------------------------------------------------------------------------------------------------
# The dry run's report
# ---------------------------------------------------------------------------------------------------

# An "80 GB" H100 or A100 has 79.1 GiB for programs, a "40 GB" A100 39.4, a "141 GB" H200 139.
USABLE = 0.985
COLUMNS = f"{'no offload':>20}{'--cpu-offload':>20}"


def fits(plan: MemoryPlan, gpu_memory: float) -> bool:
    """Whether it fits a GPU with `gpu_memory` GB as written on its box."""
    return plan.peak <= USABLE * gpu_memory * GIB


def dry_run(model: str, settings: Settings, gpu_memory: float) -> str:
    """What `train_sft.py --dry-run` prints; `gpu_memory` in GB as on the box. Takes about 10 s, without a GPU."""
    config = model_config_of(model)
    # The simulation needs a process group of its own.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        simulated = child.submit(simulate_memory, config, settings).result()
    return report(model, config, settings, gpu_memory, simulated)


def report(
    model: str, config: ModelConfig, settings: Settings, gpu_memory: float, simulated: SimulatedMemory
) -> str:
    """The plan as text: memory of the settings, speed, what else would fit, and one sentence of advice."""
    copies = f" ({settings.replicas} copies of the model)" if settings.replicas > 1 else ""
    checkpointing, offload = (
        "with" if chosen else "no" for chosen in (settings.activation_checkpointing, settings.cpu_offload)
    )
    return "\n".join((
        f"{model}: {parameter_count(config):,} parameters on {settings.world_size} x {gpu_memory:g} GB{copies}",
        f"Streams of {settings.micro_batch_size} x {settings.max_length:,} tokens, {checkpointing} activation "
        f"checkpointing, {offload} offload, gradients reduced every {settings.reduce_every}",
        "", *_memory_lines(config, settings, gpu_memory, simulated),
        "", *_speed_lines(config, settings),
        "", *_combination_lines(config, settings, gpu_memory),
        "", recommendation(config, settings, gpu_memory),
    ))  # fmt: skip


def _memory_lines(
    config: ModelConfig, settings: Settings, gpu_memory: float, simulated: SimulatedMemory
) -> Iterator[str]:
    off, on = (plan_memory(config, replace(settings, cpu_offload=offload)) for offload in (False, True))
    shard = f"1/{settings.shards}"
    gradients = "all of them" if settings.reduce_every == "step" else shard
    rows = {
        f"parameters (float32, {shard})": (off.parameters, on.parameters),
        f"gradients (float32, {gradients})": (off.gradients, on.gradients),
        f"optimiser (two float32 moments, {shard})": (off.optimizer, on.optimizer),
        "gathered weights (bfloat16)": (off.gathered_weights, on.gathered_weights),
        "activations (bfloat16)": (off.activations, on.activations),
        "buffers (head, gradients being reduced)": (off.buffers, on.buffers),
        "sum": (off.tracked, on.tracked),
        "sum simulated with torch's memory tracker": (simulated.peak, simulated.peak - off.tracked + on.tracked),
        "margin (CUDA, NCCL, fragments)": (off.margin, on.margin),
        "peak = sum + margin": (off.peak, on.peak),
    }
    yield f"{'GiB per GPU':<46}{COLUMNS}"
    for label, sizes in rows.items():
        yield f"  {label:<44}" + "".join(f"{size / GIB:>20.1f}" for size in sizes)
    verdicts = ("fits" if fits(plan, gpu_memory) else "does not fit" for plan in (off, on))
    usable = f"{gpu_memory:g} GB have {USABLE * gpu_memory:.1f} GiB"
    yield f"  {usable:<44}" + "".join(f"{verdict:>20}" for verdict in verdicts)
    writing = 3 * FLOAT32 * parameter_count(config, settings.shards) * min(GPUS_PER_NODE, settings.world_size)
    for label, added in (("Host memory per node, GiB", 0), ("  while a checkpoint is written", writing)):
        sizes = (added, added + on.host_bytes_per_node)
        yield f"{label:<46}" + "".join(f"{size / GIB:>20.1f}" for size in sizes)


def _speed_lines(config: ModelConfig, settings: Settings) -> Iterator[str]:
    yield f"{'Tokens per second, estimated: per GPU (all)':<46}{COLUMNS}"
    for name in ("H100", "A100"):
        cells = []
        for offload in (False, True):
            speed = tokens_per_second(config, replace(settings, cpu_offload=offload), PEAK_TFLOPS[name] * 1e12)
            cells.append(f"{speed:,.0f} ({speed * settings.world_size:,.0f})")
        yield f"  {f'{name} ({PEAK_TFLOPS[name]} TFLOP/s)':<44}" + "".join(f"{cell:>20}" for cell in cells)
    yield f"  Assumed: MFU {MFU:.2f} with activation checkpointing (published for 13B: 0.416 on H100, 0.439 on A100),"
    yield "  4/3 of it without; full streams; communication hidden behind arithmetic. With offload, gradients cross"
    yield f"  PCIe at {PCIE_BYTES_PER_SECOND / 1e9:.0f} GB/s per GPU, their sums and AdamW take host memory of "\
        f"{HOST_BYTES_PER_SECOND / 1e9:.0f} GB/s per node,"
    yield f"  and a step is {settings.global_batch_size} sequences of full length."


def _combination_lines(config: ModelConfig, settings: Settings, gpu_memory: float) -> Iterator[str]:
    """Peaks of all combinations, each with the smallest GPU that holds it."""
    sizes = sorted({40.0, 80.0, gpu_memory})
    micro_batches = sorted({1, 2, 4, settings.micro_batch_size})
    names = ", ".join(f"{size:g}" for size in sizes)
    yield f"Peak in GiB by --micro-batch-size (in brackets: the smallest GPU that it fits, of {names} GB; -: none)"
    columns = "".join(f"{micro_batch:>12}" for micro_batch in micro_batches)
    yield f"  --activation-checkpointing  --cpu-offload  --reduce-every{columns}"
    for checkpointing, offload in product((False, True), (False, True)):
        for reduce_every in REDUCE_EVERY:
            chosen = replace(
                settings, activation_checkpointing=checkpointing, cpu_offload=offload, reduce_every=reduce_every
            )
            cells = []
            for micro_batch in micro_batches:
                plan = plan_memory(config, replace(chosen, micro_batch_size=micro_batch))
                smallest = next((f"{size:g}" for size in sizes if fits(plan, size)), "-")
                cells.append(f"{plan.peak / GIB:.1f} ({smallest})")
            answers = f"{'on' if checkpointing else 'off':<28}{'yes' if offload else 'no':<15}{reduce_every:<14}"
            yield f"  {answers}" + "".join(f"{cell:>12}" for cell in cells)


def recommendation(config: ModelConfig, settings: Settings, gpu_memory: float) -> str:
    """One sentence: the settings fit, or the cheapest change that makes them fit, or how many GPUs it takes."""
    machine = f"{settings.world_size} x {gpu_memory:g} GB"
    if fits(plan_memory(config, settings), gpu_memory):
        return f"Fits {machine} as it is."
    answers = []
    cheaper = (changed for changed in _cheaper(settings) if fits(plan_memory(config, changed), gpu_memory))
    if found := next(cheaper, None):
        answers.append(f"with {_difference(settings, found)}")
        if found.cpu_offload:
            host = plan_memory(config, found).host_bytes_per_node / GIB
            answers[0] += f" ({host:,.0f} GiB of host memory per node)"
    if not found or found.cpu_offload:
        more = (replace(settings, world_size=settings.world_size * 2**doublings) for doublings in range(1, 11))
        variants = (changed for wider in more for changed in _cheaper(wider) if not changed.cpu_offload)
        if found := next((changed for changed in variants if fits(plan_memory(config, changed), gpu_memory)), None):
            answers.append(f"on {found.world_size} GPUs with {_difference(settings, found) or 'the same options'}")
    if not answers:
        return f"Does not fit GPUs of {gpu_memory:g} GB, however many; take larger ones or lower --max-length."
    return f"Does not fit {machine} as it is; fits {', or '.join(answers)}."


def _cheaper(settings: Settings) -> Iterator[Settings]:
    """Settings that need less memory; those that cost less time come first."""
    settings = replace(settings, reduce_every="micro-batch")
    yield settings
    for offload in sorted({settings.cpu_offload, True}):
        for halvings in range(settings.micro_batch_size.bit_length()):
            yield replace(
                settings, activation_checkpointing=True, cpu_offload=offload,
                micro_batch_size=settings.micro_batch_size >> halvings,
            )  # fmt: skip


def _difference(settings: Settings, changed: Settings) -> str:
    """The options that lead from one to the other."""
    options = {
        "--activation-checkpointing on": changed.activation_checkpointing != settings.activation_checkpointing,
        "--cpu-offload": changed.cpu_offload != settings.cpu_offload,
        f"--micro-batch-size {changed.micro_batch_size}": changed.micro_batch_size != settings.micro_batch_size,
        f"--reduce-every {changed.reduce_every}": changed.reduce_every != settings.reduce_every,
    }
    return " ".join(option for option, differs in options.items() if differs)
