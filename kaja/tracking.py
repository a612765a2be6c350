"""What a run tells while it goes: metrics.jsonl always, TensorBoard when installed, a progress bar.

Only rank 0 writes. The loops call `log` once per step and never ask who they are.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from kaja.files import append_jsonl, write_jsonl


class Tracker:
    """Writes one row of metrics per step and moves the progress bar.

    Args:
        folder: the run's output folder; rows go to metrics.jsonl, curves to tensorboard/.
        total: steps of the whole run.
        initial: steps done before (a resumed run); later rows of an earlier try are removed.
        shown: names of the metrics beside the progress bar.
        enabled: False makes an object that does nothing (ranks other than 0).
    """

    def __init__(
        self, folder: Path, *, total: int, initial: int = 0, shown: tuple[str, ...] = ("loss",), enabled: bool = True
    ) -> None:
        self.enabled, self.shown = enabled, shown
        if not enabled:
            return
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            write_jsonl(self.path, complete_rows(self.path, initial))
        self.bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True)
        self.writer = _tensorboard_writer(folder / "tensorboard", initial)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of `step` (1-based)."""
        if not self.enabled:
            return
        # JSON has no NaN and no infinity: null.
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append_jsonl(self.path, [{"step": step, **row}])
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
        self.bar.set_postfix({name: f"{metrics[name]:.4g}" for name in self.shown if name in metrics}, refresh=False)
        self.bar.update()

    def warn(self, lines: Iterable[str]) -> None:
        """Print lines on stderr, above the progress bar."""
        if self.enabled:
            for line in lines:
                self.bar.write(f"warning: {line}", file=sys.stderr)

    def close(self) -> None:
        if self.enabled:
            self.bar.close()
            if self.writer is not None:
                self.writer.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def complete_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The rows of steps up to `last_step`. A last line cut by a kill is dropped: its step is redone."""
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
    rows = [json.loads(line) for line in text.split("\n") if line]
    return [row for row in rows if row["step"] <= last_step]


def _tensorboard_writer(folder: Path, initial: int) -> Any:
    """A SummaryWriter, or None where TensorBoard is not installed (pip install 'kaja[report]')."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=initial + 1)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has had so far: of the GPU, or on a CPU its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


class Stopwatch:
    """Seconds spent in named phases: `with watch("update"): ...` adds to seconds["seconds/update"]."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        name = f"seconds/{phase}"
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
