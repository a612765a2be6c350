"""What the four scripts share around their loop: command line, output folder, exit codes."""

import dataclasses
import errno
import fcntl
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import tyro

from kaja.distributed import Ranks, on_main
from kaja.errors import Stopped, UserError
from kaja.files import read_json, write_json

ConfigT = TypeVar("ConfigT")

# Fields that may differ between a run and its resumption: they do not change what is computed.
NOT_COMPARED = (
    "output_dir", "data", "eval_data", "eval_every", "resume", "save_every", "show_data", "dry_run", "world_size",
    "gpu_memory", "max_kl", "generation_timeout", "activation_checkpointing", "cpu_offload", "reduce_every", "compile",
    "replicas", "judge_url", "judge_gpus", "judge_memory", "judge_concurrency", "judge_timeout", "judge_cache",
    "max_judge_failures", "canary_every", "guard", "allow_contaminated",
)  # fmt: skip
LOCK = ".lock"  # in the output folder, locked while a process works there
# The file system's fault, not kaja's: full, over quota, read-only, or too large a file for it.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def run(main: Callable[[ConfigT], None], config_class: type[ConfigT], argv: Sequence[str] | None = None) -> int:
    """Parse the command line into `config_class`, call `main`, return the exit code.

    0: done. 2: the command line, the input or the disk is at fault; one line on stderr says what. 143:
    SIGTERM came, the run saved and stopped. Any other exception is a defect of kaja and keeps its traceback.
    """
    description = sys.modules[main.__module__].__doc__
    try:
        main(_parse(config_class, argv, description))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":  # all ranks stop after the same step
            print(stopped, file=sys.stderr)
        return 128 + signal.SIGTERM
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or "the output folder"
        print(
            f"error: {where}: cannot be written ({os.strerror(error.errno)}); what was written before is kept; "
            f"make room, then go on with --resume auto", file=sys.stderr,
        )  # fmt: skip
        return 2
    return 0


@contextmanager
def noticing_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process: spot machines and schedulers announce
    the end with it. The loop looks at it between steps."""
    received = threading.Event()

    def notice(number: int, frame: FrameType | None) -> None:
        received.set()  # more of them change nothing: a scheduler's reaches each rank, and torchrun passes its own on

    previous = signal.signal(signal.SIGTERM, notice)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parse(config_class: type[ConfigT], argv: Sequence[str] | None, description: str | None) -> ConfigT:
    """tyro.cli, with the box that it draws around a mistake folded into one line."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(config_class, args=argv, description=description)
    except SystemExit as error:
        if not error.code:  # --help
            raise
        raise UserError(_fold(box.getvalue())) from None


def _fold(box: str) -> str:
    """What stands in tyro's box below its title, on one line, without the options' help (the deeper lines)."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", box).split("\n")[1:]
    inside = [line[2:].rstrip(" │╯") for line in lines]
    said = " ".join(re.sub(r"^[─-]+$", ";", line).strip() for line in inside if not line.startswith(" " * 8))
    return re.sub(r"\.? ; ", "; ", said).strip("; ")


def check_range(
    config: Any,
    *,
    positive: Sequence[str] = (),
    at_least_1: Sequence[str] = (),
    at_least_0: Sequence[str] = (),
    at_most: dict[str, float] | None = None,
) -> None:
    """UserError for the first named field of `config` that is out of its range."""
    rules = [
        *((name, getattr(config, name) > 0, "above 0") for name in positive),
        *((name, getattr(config, name) >= 1, "at least 1") for name in at_least_1),
        *((name, getattr(config, name) >= 0, "at least 0") for name in at_least_0),
        *((name, getattr(config, name) <= limit, f"at most {limit}") for name, limit in (at_most or {}).items()),
    ]
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"{name} {getattr(config, name)}: must be {rule}; change --{name.replace('_', '-')}")


def prepare_output_dir(output_dir: str, config: Any, *, resume: bool, ranks: Ranks | None = None) -> Path:
    """Make the output folder and write config.json (on rank 0); refuse a folder that holds another run.

    Without `resume` the folder must be new or empty. With it, config.json of the earlier run must
    agree with `config` in every field that changes what is computed.
    """
    folder = Path(output_dir)
    fields = dataclasses.asdict(config)
    if ranks is None:
        _claim_folder(folder, fields, resume)
    else:
        on_main(lambda: _claim_folder(folder, fields, resume), ranks)
    if not folder.is_dir():
        raise UserError(f"{folder}: rank 0 made it, but this node does not see it; all nodes must share --output-dir")
    return folder


def _claim_folder(folder: Path, config: dict[str, Any], resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; --output-dir must name a folder; choose another path")
    # config.json alone is a run that stopped before it began.
    used = folder.is_dir() and any(path.name not in ("config.json", LOCK) for path in folder.iterdir())
    if used and not resume:
        raise UserError(
            f"{folder}: is not empty; a run never overwrites another; "
            f"choose another --output-dir, or go on with --resume auto"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        if used and (folder / "config.json").exists():
            _check_same_config(read_json(folder / "config.json"), config, folder)
        write_json(folder / "config.json", config)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"{folder}: cannot be written ({reason}); choose a writable --output-dir") from None


def _lock(folder: Path) -> None:
    """Hold the folder until this process ends, however it ends; UserError if another process holds it."""
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_WRONLY)  # left open: closing it would let go
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder}: another process is running in it; wait for it, or choose another --output-dir"
        ) from None


def _check_same_config(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    for name, value in new.items():
        now = list(value) if isinstance(value, tuple) else value  # JSON knows lists, not tuples
        if isinstance(now, dict):  # a group of options: name the one that differs
            _check_same_config(old.get(name) or {}, now, folder)
        elif name not in NOT_COMPARED and old.get(name) != now:
            raise UserError(
                f"{folder}/config.json: {name} was {old.get(name)!r} and is now {now!r}; a resumed run must "
                f"compute the same; give the old value, or start anew in another --output-dir"
            )


def check_same_data(state: dict[str, int], fingerprint: int) -> int:
    """The fingerprint of the data, for the next checkpoint; UserError if the one resumed from saw other data."""
    if state.get("data", fingerprint) != fingerprint:
        raise UserError(
            "data: not what the checkpoint was trained on; a resumed run must see the same samples in the same "
            "order; give the old files, or start anew in another --output-dir"
        )
    return fingerprint
