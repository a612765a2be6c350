"""Medians, ratios, targets and the Markdown of the results. Pure: numbers in, text out."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """What issue 9 asks for: peer's CPU seconds / kaja's at least, kaja's peak memory / peer's at most."""

    cpu: float = 0.0
    memory: float = 0.0


def median(results: Sequence[Result], key: str) -> float:
    return statistics.median(result[key] for result in results)


def cost(result: Result) -> float:
    """CPU milliseconds per token: per completion token in GRPO, where each contestant samples its own, else per token.

    Tokens of SFT are those of the data, not the padding: that is the contestant's own business.
    """
    return 1000 * result["cpu_seconds"] / (result.get("completion_tokens") or result["tokens"])


def median_cost(results: Sequence[Result]) -> float:
    return statistics.median(map(cost, results))


def ratio_table(
    runs: Mapping[str, Sequence[Result]], targets: Mapping[str, Target], ours: str = "kaja", flops: float = 0.0
) -> str:
    """One row per contestant; ratios against `ours`. "machine": GFLOP per CPU second of a matrix product meanwhile.

    Args:
        runs: contestant -> its results, one per round.
        flops: what the work needs of matrix products (kaja.flops.train_flops). The last row is then of nothing but
            these, as fast as the machine multiplied large matrices beside `ours`: what nobody can undercut.
    """
    phases = sorted({phase for results in runs.values() for result in results for phase in result.get("phases", {})})
    head = ["", "CPU-s", *(f"of it {phase}" for phase in phases), "wall s", "CPU-ms per token", "CPU ratio", "target",
            "peak MiB", "kaja's part of it", "target", "machine"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for name, results in runs.items():
        if not results:
            continue
        target = targets.get(name, Target())
        seconds = [result["cpu_seconds"] for result in results]
        spread = f" ({min(seconds):.1f}-{max(seconds):.1f})" if len(seconds) > 1 else ""
        ratio = median_cost(results) / median_cost(runs[ours])
        memory = median(runs[ours], "peak_mib") / median(results, "peak_mib")
        lines.append([
            name, f"{statistics.median(seconds):.1f}{spread}",
            *(f"{statistics.median(result['phases'][phase] for result in results):.1f}" for phase in phases),
            f"{median(results, 'wall_seconds'):.1f}", f"{median_cost(results):.3f}", f"{ratio:.2f}",
            verdict(ratio, at_least=target.cpu), f"{median(results, 'peak_mib'):,.0f}", f"{memory:.2f}",
            verdict(memory, at_most=target.memory), f"{median(results, 'matmul_flops') / 1e9:.0f}",
        ])  # fmt: skip
    if flops:
        of_products = [flops / result["matmul_flops"] for result in runs[ours]]
        ratio = statistics.median(floor / result["cpu_seconds"] for floor, result in zip(of_products, runs[ours]))
        row = ["matrix products alone", f"{statistics.median(of_products):.1f}", *[""] * (len(head) - 2)]
        row[head.index("CPU ratio")] = f"{ratio:.2f}"
        lines.append(row)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(value: float, *, at_least: float = 0.0, at_most: float = 0.0) -> str:
    """The target and whether it is met; nothing where there is none (0)."""
    if at_least:
        return f"{at_least:g} {'met' if value >= at_least else 'missed'}"
    if at_most:
        return f"{at_most:g} {'met' if value <= at_most else 'missed'}"
    return ""


def grid(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A plain table: a name and its cells in each row."""
    lines = [[corner, *columns], ["---"] * (len(columns) + 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def loss_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest difference of two loss curves, step by step; infinite where one has more steps."""
    if len(ours) != len(theirs):
        return float("inf")
    return max((abs(a - b) for a, b in zip(ours, theirs)), default=0.0)
