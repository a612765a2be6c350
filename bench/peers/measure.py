"""What every contestant measures, in its own process and in the same way: CPU and wall seconds of the training loop.

Imported in kaja's environment and in the peers': standard library only. A contestant is a script that is called
with the path of a job, a JSON file; it enters `Window` around its training loop and calls `report` after it:

    job = read_job()
    window = Window()
    with window: ...training...
    report(job, window, losses=[...], phases=window.phases)

CPU seconds are user and system time of the process with all its threads. They hardly depend on what else the machine
does, wall seconds do.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Window:
    """The training loop: from entering to leaving, and the named phases in it.

    Before and after, the machine's matrix product is timed: a busy machine also makes CPU seconds dearer (caches and
    memory are shared), and this shows by how much.
    """

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}  # CPU seconds
        self.measured: dict[str, float] = {}

    def __enter__(self) -> "Window":
        startup = {"startup_cpu": time.process_time(), "loop_began": time.time()}
        self.measured = {**startup, "matmul_flops": matmul_flops()}
        self._before = resource.getrusage(resource.RUSAGE_SELF)
        self._started = time.time()
        return self

    def __exit__(self, *error: object) -> None:
        after = resource.getrusage(resource.RUSAGE_SELF)
        wall = time.time() - self._started
        user, system = after.ru_utime - self._before.ru_utime, after.ru_stime - self._before.ru_stime
        self.measured |= {
            "cpu_seconds": user + system, "system_seconds": system, "wall_seconds": wall,
            "page_faults": after.ru_minflt - self._before.ru_minflt,
            "peak_mib": after.ru_maxrss / 1024,  # of the whole process so far: imports and loading included
        }  # fmt: skip
        self.measured["matmul_flops"] = (self.measured["matmul_flops"] + matmul_flops()) / 2

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the CPU seconds of the block to phases[name]."""
        started = time.process_time()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.process_time() - started

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each call of it a phase."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **options)

        return call


def read_job() -> dict[str, Any]:
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def report(job: dict[str, Any], window: Window, **found: Any) -> None:
    """Write what was measured where the job wants it."""
    result = {**window.measured, **found, "startup_wall": window.measured["loop_began"] - job["launched"]}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def matmul_flops(size: int = 1024, tries: int = 12) -> float:
    """Float32 operations per CPU second of a matrix product: the median of some tries, a quarter of a second in all."""
    import torch  # the only import that is not of the standard library; both environments have it

    left, right = torch.ones(size, size), torch.ones(size, size)
    seconds = []
    for _ in range(tries + 1):
        started = time.process_time()
        left @ right
        seconds.append(time.process_time() - started)
    return 2.0 * size**3 / statistics.median(seconds[1:])  # the first call loads libraries
