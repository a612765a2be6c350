"""Curves: what is read from metrics.jsonl, and where the points end up."""

import math
import re
from pathlib import Path

import pytest

from kaja.charts import (
    BOX,
    MAX_POINTS,
    Run,
    histogram,
    interval_plot,
    line_chart,
    load_run,
    plot_curves,
    running_mean,
    thin,
    ticks,
)
from kaja.errors import UserError
from kaja.files import write_jsonl


def test_load_run_takes_the_later_row_of_a_step(tmp_path: Path) -> None:
    folder = tmp_path / "sft"
    folder.mkdir()
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}]
    write_jsonl(folder / "metrics.jsonl", rows)
    run = load_run(folder)
    assert run.name == "sft"
    assert run.points("loss") == [(1, 3.0), (2, 2.0)]


def test_load_run_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="metrics.jsonl: no such file"):
        load_run(tmp_path)
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 3.0}, {"loss": 2.0}])
    with pytest.raises(UserError, match="metrics.jsonl, line 2: no whole number in field 'step'"):
        load_run(tmp_path)


def test_points_that_are_no_numbers_are_left_out() -> None:
    run = Run("r", {1: {"reward/safety": math.nan}, 2: {"reward/safety": 0.5}, 3: {}, 4: {"reward/safety": None}})
    assert run.points("reward/safety") == [(2, 0.5)]


def test_charts_of_the_two_kinds_of_runs() -> None:
    sft = Run("sft", {1: {"loss": 3.0, "learning_rate": 1e-5}, 2: {"loss": 2.0, "held_out_loss": 2.5}})
    assert sft.charts() == [
        ("Loss (nats per token)", {"training": [(1, 3.0), (2, 2.0)], "held out": [(2, 2.5)]})
    ]
    row = {"loss": 0.0, "reward": 0.5, "reward/safety": 0.4, "reward/helpfulness": 0.6, "kl": 0.1, "entropy": 1.0}
    titles = {title: list(series) for title, series in Run("grpo", {1: row}).charts()}
    assert titles == {
        "Reward (score / 5)": ["all", "safety", "helpfulness"],
        "KL to the reference (nats per token)": ["kl"],
        "Entropy (nats per token)": ["entropy"],
    }
    one_stream = Run("grpo", {1: {"reward": 0.4, "reward/safety": 0.4}})
    assert one_stream.charts() == [("Reward (score / 5)", {"safety": [(1, 0.4)]})]
    assert Run("empty", {}).charts() == []


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]),
        (0.13, 0.97, [0, 0.25, 0.5, 0.75, 1]),
        (31, 47, [30, 35, 40, 45, 50]),
        (-0.02, 0.05, [-0.02, 0, 0.02, 0.04, 0.06]),
        (2.0, 2.0, [2, 2.5]),
        (0.0, 0.0, [0, 0.25]),
        (1e-9, 5e-9, [1e-9, 2e-9, 3e-9, 4e-9, 5e-9]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_line_is_where_its_numbers_say() -> None:
    picture = line_chart("title", {"loss": [(0, 0.0), (5, 0.5), (10, 1.0)]})
    points = re.search(r'polyline class="line s-main" points="([^"]*)"', picture)
    assert points is not None
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in points[1].split())
    assert (x0, y0) == (BOX["left"], BOX["bottom"]) and (x2, y2) == (BOX["right"], BOX["top"])
    assert (x1, y1) == ((BOX["left"] + BOX["right"]) / 2, (BOX["top"] + BOX["bottom"]) / 2)
    assert "nan" not in line_chart("title", {"loss": [(3, 2.0)]})  # a single point


def test_long_curves_are_thinned_without_moving_their_mean() -> None:
    points = [(float(step), math.sin(step)) for step in range(1, 1201)]
    thinned = thin(points)
    assert len(thinned) == MAX_POINTS
    assert thinned[0] == (2.5, pytest.approx(sum(math.sin(step) for step in (1, 2, 3, 4)) / 4))
    assert sum(y for _, y in thinned) / 300 == pytest.approx(sum(y for _, y in points) / 1200)
    assert thin(points[:300]) == points[:300]


def test_running_mean_is_centred() -> None:
    line = [(float(step), 2.0 * step) for step in range(60)]
    smooth = running_mean(line)
    assert smooth[3:-3] == [(x, pytest.approx(y)) for x, y in line[3:-3]]  # a straight line stays one
    assert smooth[0] == (0.0, pytest.approx((0 + 2 + 4 + 6) / 4))


def test_interval_plot_and_histogram() -> None:
    summary = {"n": 3, "reward": 0.5, "interval": [0.0, 1.0]}
    picture = interval_plot({"base": summary}, ["base"])
    assert 'x1="84.0" x2="286.0"' in picture and 'cx="185.0"' in picture
    assert "circle" not in interval_plot({"base": summary | {"n": 0, "reward": None}}, ["base"])
    heights = re.findall(r'<rect [^>]*height="([\d.]+)"', histogram([0, 1, 0, 0, 0, 3], 0))
    assert [float(height) for height in heights] == [0, 13, 0, 0, 0, 39]
    assert "no verdict" in histogram([0] * 6, 0)


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = {step: {"reward": step / 100, "kl": 0.1} for step in range(1, 80)}
    plot_curves([Run("grpo", rows)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no training curve"):
        plot_curves([Run("empty", {})], tmp_path / "none.png")
