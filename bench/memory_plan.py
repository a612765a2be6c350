"""Memory of every llm-jp-3 model on 8 GPUs, and the plan's formulas against torch's memory tracker.

1. A table in Markdown: peak per GPU (margin included) and host memory, for the README; and one for GRPO.
2. plan_memory against simulate_memory: relative error and seconds, for 13B and smaller models in several settings.

    OMP_NUM_THREADS=1 python bench/memory_plan.py

Nothing of it needs a GPU or weights; about 2 minutes on one core.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kaja.dry_run import ELYZA_JUDGE, LADDER, fits, model_config_of  # noqa: E402
from kaja.grpo_plan import GRPOSettings, plan_grpo  # noqa: E402
from kaja.memory_plan import GIB, Settings, parameter_count, plan_memory, simulate_memory  # noqa: E402

PLAIN = Settings()
CHECKPOINTING = Settings(activation_checkpointing=True)
COMPARED = (
    ("13b", CHECKPOINTING),
    ("13b", PLAIN),
    ("13b", replace(CHECKPOINTING, reduce_every="step")),
    ("13b", replace(CHECKPOINTING, micro_batch_size=1)),
    ("13b", replace(CHECKPOINTING, world_size=16, replicas=2)),
    ("7.2b", CHECKPOINTING),
    ("1.8b", PLAIN),
    ("1.8b", replace(PLAIN, world_size=2)),
    ("980m", CHECKPOINTING),
    ("150m", PLAIN),
    ("150m", replace(CHECKPOINTING, world_size=1)),
)


def ladder() -> None:
    columns = {
        "`--activation-checkpointing off`": PLAIN,
        "on": CHECKPOINTING,
        "off, `--cpu-offload`": replace(PLAIN, cpu_offload=True),
        "on, `--cpu-offload`": replace(CHECKPOINTING, cpu_offload=True),
    }
    print(f"| GiB per GPU, 8 GPUs | parameters | {' | '.join(columns)} | host memory with offload |")
    print(f"|---|{'---|' * (len(columns) + 2)}")
    for size in LADDER:
        config = model_config_of(f"llm-jp/llm-jp-3-{size}")
        plans = [plan_memory(config, settings) for settings in columns.values()]
        cells = [f"{plan.peak / GIB:.1f}{'' if fits(plan, 80) else ' (over 80 GB)'}" for plan in plans]
        host = plans[-1].host_bytes_per_node / GIB
        print(f"| {size} | {parameter_count(config) / 1e9:.2f}B | {' | '.join(cells)} | {host:.0f} |")


def grpo() -> None:
    """Peaks without keys and values, and how many completions the rest holds, with and without sleep and judge."""
    print("\n| GRPO, GiB per GPU, 8 x 80 GB | no sleep | sleep | sleep, judge elsewhere | completions |")
    print(f"|---|{'---|' * 4}")
    for size in LADDER:
        config, cells, held = model_config_of(f"llm-jp/llm-jp-3-{size}"), [], []
        for sleep, judge in (("none", ELYZA_JUDGE), ("policy", ELYZA_JUDGE), ("policy", None)):
            plan = plan_grpo(config, judge, GRPOSettings(sleep=sleep), 80)
            least = max(phase.peak - phase.keys_values for phase in plan.phases.values()) / GIB
            cells.append(f"{least:.1f}{'' if plan.fits else ' (over 80 GB)'}")
            held.append(f"{plan.policy.at_a_time} of {plan.policy.sequences}")
        print(f"| {size} | {' | '.join(cells)} | {', '.join(held[1:])} |")


def comparison() -> None:
    print(f"\n{'model':6}{'GPUs':>6}{'copies':>8}{'micro':>7}  {'checkpointing':15}{'reduced every':15}", end="")
    print(f"{'formula':>9}{'simulated':>11}{'error':>8}{'seconds':>9}")
    for size, settings in COMPARED:
        config = model_config_of(f"llm-jp/llm-jp-3-{size}")
        started = time.perf_counter()
        simulated = simulate_memory(config, settings).peak
        seconds = time.perf_counter() - started
        planned = plan_memory(config, settings).tracked
        checkpointing = "yes" if settings.activation_checkpointing else "no"
        print(f"{size:6}{settings.world_size:>6}{settings.replicas:>8}{settings.micro_batch_size:>7}", end="  ")
        print(f"{checkpointing:15}{settings.reduce_every:15}{planned / GIB:>9.2f}{simulated / GIB:>11.2f}", end="")
        print(f"{planned / simulated - 1:>+8.2%}{seconds:>9.1f}", flush=True)


if __name__ == "__main__":
    ladder()
    grpo()
    comparison()
