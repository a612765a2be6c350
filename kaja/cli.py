"""What the four scripts share around their loop: command line, output folder, exit codes."""

import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import tyro

from kaja.distributed import Ranks, barrier
from kaja.errors import UserError
from kaja.files import read_json, write_json

ConfigT = TypeVar("ConfigT")

# Fields that may differ between a run and its resumption: they do not change what is computed.
NOT_COMPARED = ("output_dir", "resume", "save_every", "keep_checkpoints", "show_data")


def run(main: Callable[[ConfigT], None], config_class: type[ConfigT], argv: Sequence[str] | None = None) -> int:
    """Parse the command line into `config_class`, call `main`, return the exit code.

    0: done. 2: the command line or the input is wrong; one line on stderr says what. Any other
    exception is a defect of kaja and keeps its traceback.
    """
    description = sys.modules[main.__module__].__doc__
    try:
        main(_parse(config_class, argv, description))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


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
    if ranks is None or ranks.is_main:
        _claim_folder(folder, dataclasses.asdict(config), resume)
    barrier()
    return folder


def _claim_folder(folder: Path, config: dict[str, Any], resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; --output-dir must name a folder; choose another path")
    # config.json alone is a run that stopped before it began.
    if folder.is_dir() and any(path.name != "config.json" for path in folder.iterdir()):
        if not resume:
            raise UserError(
                f"{folder}: is not empty; a run never overwrites another; "
                f"choose another --output-dir, or go on with --resume auto"
            )
        if (folder / "config.json").exists():
            _check_same_config(read_json(folder / "config.json"), config, folder)
    try:
        write_json(folder / "config.json", config)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"{folder}: cannot be written ({reason}); choose a writable --output-dir") from None


def _check_same_config(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    for name, value in new.items():
        now = list(value) if isinstance(value, tuple) else value  # JSON knows lists, not tuples
        if name not in NOT_COMPARED and old.get(name) != now:
            raise UserError(
                f"{folder}/config.json: {name} was {old.get(name)!r} and is now {now!r}; a resumed run must "
                f"compute the same; give the old value, or start anew in another --output-dir"
            )
