"""metrics.jsonl survives a kill: half a line and the steps after the checkpoint go, the rest stays."""

from pathlib import Path

import pytest
import torch

from kaja.files import read_jsonl
from kaja.tracking import Stopwatch, Tracker, peak_memory_gib


def test_rows_are_written_and_resumed(tmp_path: Path) -> None:
    with Tracker(tmp_path, total=4) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": step / 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with Tracker(tmp_path, total=4, initial=2) as tracker:
        tracker.log(3, {"loss": 9.0})
    rows = [row for _, row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0}]


def test_other_ranks_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, total=1, enabled=False) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_the_bar_shows_what_was_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, total=1, shown=("reward", "absent")) as tracker:
        tracker.log(1, {"loss": 1.0, "reward": 0.25})
    bar = capfd.readouterr().err
    assert "1/1" in bar and "reward=0.25" in bar and "loss" not in bar


def test_a_stopwatch_adds_up_phases() -> None:
    watch = Stopwatch()
    for phase in ("generate", "update", "generate"):
        with watch(phase):
            pass
    assert set(watch.seconds) == {"seconds/generate", "seconds/update"}
    assert min(watch.seconds.values()) >= 0


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    with Tracker(tmp_path, total=1) as tracker:
        tracker.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "tokens": 7})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "tokens": 7}\n'


def test_peak_memory_of_a_process_is_its_high_water_mark() -> None:
    status = Path("/proc/self/status").read_text()
    high_water_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(high_water_kib / 2**20, rel=0.02)
