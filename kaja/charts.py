"""Pictures of numbers: SVG for the report, PNG for a README.

Colours come from classes that the report's style sheet defines: m0 to m5 for models, s-NAME for streams.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from kaja.errors import UserError
from kaja.evals.suites import SUITES
from kaja.files import read_jsonl

Point = tuple[float, float]
Series = dict[str, list[Point]]  # label -> points, in drawing order

MAX_POINTS = 300  # of a curve; more are averaged in neighbourhoods
SMOOTH_FROM = 40  # points; from here on a running mean is drawn over the raw curve
STREAM_KEYS = {"reward": "all", **{f"reward/{name}": name for name in SUITES}}
CHARTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Loss (nats per token)", {"loss": "training", "held_out_loss": "held out"}),
    ("Reward (score / 5)", STREAM_KEYS),
    ("KL to the reference (nats per token)", {"kl": "kl"}),
    ("Completion length (tokens)", {"completion_length": "tokens"}),
    ("Entropy (nats per token)", {"entropy": "entropy"}),
)


@dataclass(frozen=True)
class Run:
    """A training run: its name and the rows of its metrics.jsonl by step."""

    name: str
    rows: dict[int, dict[str, Any]]

    def charts(self) -> list[tuple[str, Series]]:
        """(title, series) of every chart that this run has numbers for."""
        drawn = []
        for title, keys in CHARTS:
            # The GRPO loss hovers around 0 whether or not it learns: its reward is what to look at.
            if "loss" in keys and any("reward" in row for row in self.rows.values()):
                continue
            series = {label: points for key, label in keys.items() if (points := self.points(key))}
            # One stream only: its curve and the one of all streams are the same line.
            if len(series) == 2 and "all" in series:
                del series["all"]
            if series:
                drawn.append((title, series))
        return drawn

    def points(self, key: str) -> list[Point]:
        """(step, value) where the row has a finite number; a step without verdicts has none."""
        values = ((step, row.get(key)) for step, row in sorted(self.rows.items()))
        return [(step, v) for step, v in values if isinstance(v, (int, float)) and math.isfinite(v)]


def load_run(folder: Path | str) -> Run:
    """Read metrics.jsonl of a training run; of a step that was run twice (resume) the later row counts."""
    path = Path(folder) / "metrics.jsonl"
    rows = {}
    for number, row in read_jsonl(path):
        if not isinstance(row.get("step"), int):
            raise UserError(
                f"{path}, line {number}: no whole number in field 'step'; every row of a training run has "
                f"one; name the folder that train_sft.py or train_grpo.py wrote"
            )
        rows[row["step"]] = row
    return Run(Path(folder).resolve().name, rows)


def fixed(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def interval_plot(by_model: dict[str, Any], models: Sequence[str]) -> str:
    """Mean and interval of each model on one axis from 0 to 1."""
    left, right, row, top = 84, 286, 26, 6
    bottom = top + row * len(models)

    def x(value: float) -> float:
        return round(left + (right - left) * value, 1)

    quarters = (0, 0.25, 0.5, 0.75, 1)
    parts = [f'<line class="grid" x1="{x(t)}" x2="{x(t)}" y1="{top}" y2="{bottom}"/>' for t in quarters]
    parts += [f'<text class="tick" x="{x(t)}" y="{bottom + 14}">{t:g}</text>' for t in (0, 0.5, 1)]
    for index, model in enumerate(models):
        summary, y = by_model[model], top + row * (index + 0.5)
        shown = model if len(model) <= 12 else model[:11] + "…"
        parts.append(f'<text class="name" x="{left - 10}" y="{y + 4}">{escape(shown)}</text>')
        if summary["n"]:
            low, high = summary["interval"]
            parts.append(
                f'<g class="m{index % 6}">'
                f'<line class="whisker" x1="{x(low)}" x2="{x(high)}" y1="{y}" y2="{y}"/>'
                f'<circle cx="{x(summary["reward"])}" cy="{y}" r="4.5"/></g>'
            )
        parts.append(f'<text class="value" x="{right + 12}" y="{y + 4}">{fixed(summary["reward"])}</text>')
    label = ", ".join(f"{model} {fixed(by_model[model]['reward'])}" for model in models)
    return (
        f'<svg class="intervals" viewBox="0 0 330 {bottom + 20}" role="img" '
        f'aria-label="Mean reward: {escape(label)}">{"".join(parts)}</svg>'
    )


def histogram(counts: Sequence[int], index: int) -> str:
    """Bars for the share of the verdicts at 0, 1, ... 5 points."""
    total = sum(counts)
    if not total:
        return '<p class="empty">no verdict</p>'
    parts = []
    for score, count in enumerate(counts):
        height = round(52 * count / total, 1)
        x = 4 + 30 * score
        parts.append(
            f'<rect x="{x}" y="{70 - height}" width="26" height="{height}" rx="1.5"/>'
            f'<text class="tick" x="{x + 13}" y="84">{score}</text>'
        )
        if count:
            parts.append(f'<text class="share" x="{x + 13}" y="{65 - height}">{count / total:.0%}</text>')
    label = ", ".join(f"{score} points {count}" for score, count in enumerate(counts))
    return (
        f'<svg class="histogram m{index % 6}" viewBox="0 0 186 88" role="img" aria-label="{label}">'
        f'<line class="axis" x1="2" x2="184" y1="70.5" y2="70.5"/>{"".join(parts)}</svg>'
    )


def chart_figure(run: str, title: str, series: Series) -> str:
    """A line chart with its legend, which also says where each curve begins and ends."""
    legend = "".join(
        f'<li><i class="key {curve_class(label)}"></i>{escape(label)} '
        f"<span>{points[0][1]:.3g} → {points[-1][1]:.3g}</span></li>"
        for label, points in series.items()
    )
    picture = line_chart(f"{run}: {title}", series)
    data = {label: [[x, float(f"{y:.4g}")] for x, y in thin(points)] for label, points in series.items()}
    return (
        f'<figure class="chart" data-series="{escape(json.dumps(data, ensure_ascii=False))}" '
        f'data-left="{BOX["left"]:g}" data-right="{BOX["right"]:g}">'
        f"<figcaption>{escape(run)} <span>{escape(title)}</span></figcaption>"
        f"{picture}<ul>{legend}</ul></figure>"
    )


def curve_class(label: str) -> str:
    return f"s-{label}" if label in SUITES else "s-main" if label != "validation" else "s-second"


# The drawing area of a line chart inside its viewBox; the page's script reads it for the cross-hair.
BOX = {"left": 46.0, "right": 384.0, "top": 8.0, "bottom": 168.0}


def line_chart(title: str, series: Series) -> str:
    every = [point for points in series.values() for point in points]
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(point: Point) -> str:
        x = BOX["left"] + (BOX["right"] - BOX["left"]) * (point[0] - x_low) / ((x_high - x_low) or 1)
        y = BOX["bottom"] - (BOX["bottom"] - BOX["top"]) * (point[1] - y_low) / (y_high - y_low)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for tick in y_ticks:
        y = place((x_low, tick)).split(",")[1]
        parts.append(f'<line class="grid" x1="{BOX["left"]}" x2="{BOX["right"]}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick y" x="{BOX["left"] - 6}" y="{float(y) + 4}">{tick:g}</text>')
    for step in dict.fromkeys((x_low, round((x_low + x_high) / 2), x_high)):
        x = place((step, y_low)).split(",")[0]
        parts.append(f'<text class="tick" x="{x}" y="{BOX["bottom"] + 16}">{step:g}</text>')
    for label, points in series.items():
        raw = thin(points)
        smooth = running_mean(raw) if len(raw) >= SMOOTH_FROM else None
        for kind, curve in (("raw", raw), ("line", smooth)) if smooth else (("line", raw),):
            path = " ".join(map(place, curve))
            parts.append(f'<polyline class="{kind} {curve_class(label)}" points="{path}"/>')
    return (
        f'<svg viewBox="0 0 400 190" role="img" aria-label="{escape(title)} by step">{"".join(parts)}'
        f'<line class="cursor" y1="{BOX["top"]}" y2="{BOX["bottom"]}" visibility="hidden"/></svg>'
    )


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose [low, high]."""
    width = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(width / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if width / 4 <= power * m * 1.001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.10g}") for k in range(first, max(last, first + 1) + 1)]


def thin(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS points: neighbours averaged."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def running_mean(points: list[Point]) -> list[Point]:
    """Centred mean over a tenth of the curve; at the ends over what there is."""
    half = max(1, len(points) // 20)
    windows = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(x, sum(y for _, y in w) / len(w)) for (x, _), w in zip(points, windows, strict=True)]


def plot_curves(runs: Sequence[Run], path: Path | str) -> None:
    """The same charts as a PNG for a README or a slide; needs matplotlib."""
    plt = pyplot()
    charts = [(run.name, title, series) for run in runs for title, series in run.charts()]
    if not charts:
        raise UserError("no training curve to draw; metrics.jsonl of the runs has no rows; name other runs")
    columns = min(3, len(charts))
    lines = math.ceil(len(charts) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 2.9 * lines), squeeze=False)
    for axis in axes.flat[len(charts) :]:
        axis.set_visible(False)
    for axis, (name, title, series) in zip(axes.flat, charts, strict=False):
        for label, points in series.items():
            raw = thin(points)
            curve = running_mean(raw) if len(raw) >= SMOOTH_FROM else raw
            (line,) = axis.plot(*zip(*curve, strict=True), label=label, linewidth=1.6)
            axis.plot(*zip(*raw, strict=True), color=line.get_color(), alpha=0.25, linewidth=0.8)
        axis.set_title(f"{name}: {title}", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=160)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib, an optional package."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        raise UserError(
            "matplotlib is not installed; pictures as PNG need it; run `pip install matplotlib`"
        ) from None
    return plt
