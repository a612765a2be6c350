"""--dry-run of train_sft.py and train_grpo.py: what a run will need, as text, before anyone pays for GPUs.

The memory comes from kaja/memory_plan.py and kaja/grpo_plan.py. Tokens per second are an estimate
from stated assumptions, good for comparing settings and for ordering machines, no better.
"""

import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from kaja.errors import UserError
from kaja.files import read_json
from kaja.flops import PEAK_TFLOPS, train_flops
from kaja.grpo_plan import GRPOPlan, GRPOSettings, Sleep, plan_grpo, quantization_of
from kaja.memory_plan import (
    FLOAT32, GIB, GPUS_PER_NODE, REDUCE_EVERY, MemoryPlan, Settings, SimulatedMemory, parameter_count, plan_memory,
    simulate_memory, usable_bytes,
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
# The recipe's judge: Llama 3 8B, its blocks in 4 bits.
ELYZA_JUDGE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
}  # fmt: skip


def judge_config_of(name: str) -> dict[str, Any] | None:
    """config.json of a judge: a local folder, a hub id, the recipe's (known offline); None for `rule`."""
    if name == "rule":
        return None
    return ELYZA_JUDGE if name == "elyza/Llama-3-ELYZA-JP-8B-AWQ" and not Path(name).exists() else _read_config(name)


def model_config_of(name: str) -> ModelConfig:
    """The shape of a model without its weights: a local folder, a hub id, or an llm-jp-3 model (known offline)."""
    known = re.fullmatch(r"llm-jp/llm-jp-3-([0-9.]+[mb])(-.*)?", name)
    if known and known[1] in LADDER and not Path(name).is_dir():
        layers, width, inner, heads = LADDER[known[1]]
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        return ModelConfig(99584, width, inner, layers, heads, heads, width // heads, 4096, 1e-5, rope)
    return ModelConfig.from_hf(_read_config(name))


def _read_config(name: str) -> dict[str, Any]:
    folder = Path(name)
    if folder.is_dir():
        return read_json(folder / "config.json")
    if folder.exists() or name.startswith((".", "/")) or name.count("/") != 1:
        raise UserError(f"{name}: no such model folder; give an existing folder or a hub id like owner/name")
    try:
        path = hf_hub_download(name, "config.json")
    except (OSError, HFValidationError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: no config.json on the hub ({reason}); check the name and the network") from None
    return read_json(path)


# ---------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------

MFU = 0.40  # with activation checkpointing, as llm-foundry publishes for 13B; see kaja/flops.py for the counting
PCIE_BYTES_PER_SECOND = 25e9  # per GPU, pinned memory
PAGEABLE_BYTES_PER_SECOND = 5e9  # the same into memory that is not pinned
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
        # FSDP2 copies into pinned memory only where there is no gradient yet to add to.
        transfer = FLOAT32 * shard * (1 / PCIE_BYTES_PER_SECOND + (reductions - 1) / PAGEABLE_BYTES_PER_SECOND)
        on_host = (12 * (reductions - 1) + 40) * on_node / HOST_BYTES_PER_SECOND
        seconds += (transfer + on_host) / micro_batches
    return settings.tokens / seconds


# ---------------------------------------------------------------------------------------------------
# The dry run's report
# ---------------------------------------------------------------------------------------------------

COLUMNS = f"{'no offload':>20}{'--cpu-offload':>20}"


def fits(plan: MemoryPlan, gpu_memory: float) -> bool:
    """Whether it fits a GPU with `gpu_memory` GB as written on its box."""
    return plan.peak <= usable_bytes(gpu_memory)


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
    usable = f"{gpu_memory:g} GB have {usable_bytes(gpu_memory) / GIB:.1f} GiB"
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
    yield f"  PCIe at {PCIE_BYTES_PER_SECOND / 1e9:.0f} GB/s per GPU ({PAGEABLE_BYTES_PER_SECOND / 1e9:.0f} from the "\
        f"second micro-batch), their sums and AdamW use host memory at {HOST_BYTES_PER_SECOND / 1e9:.0f} GB/s"
    yield f"  per node with OMP_NUM_THREADS = cores / ranks, and a step is {settings.global_batch_size} full sequences."


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


# ---------------------------------------------------------------------------------------------------
# GRPO
# ---------------------------------------------------------------------------------------------------

AWAKE: dict[Sleep, str] = {"policy": "except in training", "none": "always"}  # the policy's engine


def dry_run_grpo(
    model: str, judge_model: str, settings: GRPOSettings, gpu_memory: float, *, judge_apart: bool = False
) -> str:
    """What `train_grpo.py --dry-run` prints: the memory of each phase.

    Args:
        gpu_memory: in GB as on the box.
        judge_apart: the judge has GPUs of its own, or is behind a URL.
    """
    config, judge = model_config_of(model), None if judge_apart else judge_config_of(judge_model)
    plan = plan_grpo(config, judge, settings, gpu_memory)
    offload, checkpointing = (
        "with" if chosen else "no" for chosen in (settings.cpu_offload, settings.activation_checkpointing)
    )
    quantization = quantization_of(judge) if judge else None
    bits = f" ({quantization['bits']}-bit AWQ)" if quantization else ""
    return "\n".join((
        f"{model}: {parameter_count(config):,} parameters on {settings.world_size} x {gpu_memory:g} GB",
        f"Judge: {judge_model}{bits}{'' if judge else ', not on these GPUs'}. "
        f"The policy's engine is awake {AWAKE[settings.sleep]}",
        f"{settings.prompts_per_step} prompts x {settings.group_size} completions of at most "
        f"{settings.max_completion_tokens} tokens; streams of {settings.micro_batch_size} x {settings.max_length:,}, "
        f"{checkpointing} checkpointing, {offload} offload",
        "", *_phase_lines(plan, settings, gpu_memory),
        "", *_sleep_lines(config, judge, settings, gpu_memory),
        "", *_cache_lines(plan),
        "", *_host_lines(config, plan, settings),
        "", fill(recommendation_grpo(config, judge, settings, gpu_memory), 110),
    ))  # fmt: skip


def _phase_lines(plan: GRPOPlan, settings: GRPOSettings, gpu_memory: float) -> Iterator[str]:
    """One column a phase; rows that are 0 everywhere are left out."""
    shard = f"1/{settings.world_size}"
    rows = {
        f"policy: parameters (float32, {shard})": "parameters",
        f"policy: gradients (float32, {shard})": "gradients",
        f"policy: AdamW's moments (float32, {shard})": "optimizer",
        f"reference: parameters (float32, {shard})": "reference",
        "gathered weights (bfloat16)": "gathered_weights",
        "activations and buffers": "activations",
        "weights on their way to the engine": "transfer",
        "policy's engine: weights, CUDA graphs": "policy_engine",
        "policy's engine: keys and values": "policy_keys_values",
        "judge's server: weights, CUDA graphs, context": "judge_engine",
        "judge's server: keys and values": "judge_keys_values",
        "activations of the engines at work": "engine_activations",
        "margin (CUDA, NCCL, fragments)": "margin",
        "peak": "peak",
    }
    phases = plan.phases
    yield f"{'GiB per GPU':<46}" + "".join(f"{phase:>12}" for phase in phases)
    for label, field in rows.items():
        sizes = [getattr(phase, field) for phase in phases.values()]
        if any(sizes):
            yield f"  {label:<44}" + "".join(f"{size / GIB:>12.1f}" for size in sizes)
    verdicts = ("fits" if phase.peak <= plan.usable else "too much" for phase in phases.values())
    yield f"  {f'{gpu_memory:g} GB have {plan.usable / GIB:.1f} GiB':<44}" + "".join(f"{word:>12}" for word in verdicts)


def _sleep_lines(
    config: ModelConfig, judge: dict[str, Any] | None, settings: GRPOSettings, gpu_memory: float
) -> Iterator[str]:
    """What is needed besides keys and values, with and without sleep."""
    plans = {sleep: plan_grpo(config, judge, replace(settings, sleep=sleep), gpu_memory) for sleep in AWAKE}
    phases = plans["policy"].phases
    yield f"{'But for keys and values, policy engine awake':<46}" + "".join(f"{phase:>12}" for phase in phases)
    for sleep, plan in plans.items():
        sizes = (phase.peak - phase.keys_values for phase in plan.phases.values())
        yield f"  {AWAKE[sleep]:<44}" + "".join(f"{size / GIB:>12.1f}" for size in sizes)


def _cache_lines(plan: GRPOPlan) -> Iterator[str]:
    yield f"{'Keys and values':<46}{'GiB':>12}{'KiB a token':>12}{'tokens':>12}{'at a time':>12}{'of':>8}"
    engines = {"completions": plan.policy, "verdicts": plan.judge}
    for what, engine in engines.items():
        if engine:
            label = f"{what}, each of {engine.longest:,} tokens"
            numbers = f"{engine.keys_values / GIB:>12.1f}{engine.token / 1024:>12.0f}{engine.tokens:>12,}"
            yield f"  {label:<44}{numbers}{engine.at_a_time:>12}{engine.sequences:>8}"


def _host_lines(config: ModelConfig, plan: GRPOPlan, settings: GRPOSettings) -> Iterator[str]:
    writing = 3 * FLOAT32 * parameter_count(config, settings.world_size) * min(GPUS_PER_NODE, settings.world_size)
    parts = {
        "sleeping engine": plan.host_slept, "offloaded": plan.host_offloaded,
        "while a checkpoint is written": writing,
    }  # fmt: skip
    named = ", ".join(f"{label} {size / GIB:,.0f}" for label, size in parts.items() if size)
    yield f"Host memory per node, GiB: {sum(parts.values()) / GIB:,.0f} ({named})"


def recommendation_grpo(
    config: ModelConfig, judge: dict[str, Any] | None, settings: GRPOSettings, gpu_memory: float
) -> str:
    """One sentence: the settings fit, or the cheapest change that makes them fit, or how many GPUs it takes."""
    machine = f"{settings.world_size} x {gpu_memory:g} GB"
    plan = plan_grpo(config, judge, settings, gpu_memory)
    if plan.fits:
        return f"Fits {machine} as it is, fullest in {plan.peak_phase}, with {_at_a_time(plan)}."
    here = list(_cheaper_grpo(settings, judge))
    wider = (replace(settings, world_size=settings.world_size * 2**doublings) for doublings in range(1, 5))
    there = [variant for more in wider for variant in _cheaper_grpo(more, judge) if not variant[0].cpu_offload]
    answers = []
    for variants in (here, there):
        plans = ((changed, plan_grpo(config, beside, changed, gpu_memory), beside) for changed, beside in variants)
        if found := next(((changed, plan, beside) for changed, plan, beside in plans if plan.fits), None):
            changed, plan, beside = found
            answers.append(f"{_grpo_difference(settings, changed, beside != judge)} ({_at_a_time(plan)})")
            if not changed.cpu_offload:
                break
    if answers:
        return f"Does not fit {machine} as it is; fits {', or '.join(answers)}."
    changed, beside = here[-1]
    least = plan_grpo(config, beside, changed, gpu_memory)
    fullest = least.phases[least.peak_phase]
    return (
        f"Does not fit GPUs of {gpu_memory:g} GB, however many: even "
        f"{_grpo_difference(settings, changed, beside != judge)}, {least.peak_phase} takes "
        f"{(fullest.peak - fullest.keys_values) / GIB:.1f} GiB; take larger ones."
    )


def _at_a_time(plan: GRPOPlan) -> str:
    return f"{plan.policy.at_a_time} of a rank's {plan.policy.sequences} completions at a time"


def _cheaper_grpo(
    settings: GRPOSettings, judge: dict[str, Any] | None
) -> Iterator[tuple[GRPOSettings, dict[str, Any] | None]]:
    """Settings, and a judge on these GPUs or not, that need less memory; those that cost less come first."""
    for offload in sorted({settings.cpu_offload, True}):
        for beside in (judge, None) if judge else (None,):
            for halvings in range(settings.micro_batch_size.bit_length()):
                yield replace(
                    settings, activation_checkpointing=True, cpu_offload=offload, sleep="policy",
                    judge_memory=0.0, micro_batch_size=settings.micro_batch_size >> halvings,
                ), beside  # fmt: skip


def _grpo_difference(settings: GRPOSettings, changed: GRPOSettings, judge_moved: bool) -> str:
    """What leads from one to the other, in words."""
    changes = {
        f"on {changed.world_size} GPUs": changed.world_size != settings.world_size,
        "with --activation-checkpointing on": changed.activation_checkpointing != settings.activation_checkpointing,
        f"with --micro-batch-size {changed.micro_batch_size}": changed.micro_batch_size != settings.micro_batch_size,
        "with --cpu-offload": changed.cpu_offload != settings.cpu_offload,
        "if the policy's engine sleeps while the trainer works": changed.sleep != settings.sleep,
        "without --judge-memory": changed.judge_memory != settings.judge_memory,
        "with the judge on other GPUs (--judge-gpus, --judge-url)": judge_moved,
    }
    return ", ".join(change for change, differs in changes.items() if differs)
