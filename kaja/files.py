"""Reading and writing files: UTF-8, written aside and renamed, errors that name file and line."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kaja.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` when the block ends well.

    The block writes a file or makes a folder there. A reader sees the old content or the new, never
    half of it; after an error the old content stays and the temporary path is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One folder per writer: whatever is made in it is on the same file system as `path`.
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary = scratch / path.name
    try:
        yield temporary
        if path.is_dir():  # a non-empty folder cannot be renamed over
            path.rename(scratch / f"{path.name}.old")
        temporary.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_free_space(folder: Path, needed: int, purpose: str) -> None:
    """UserError if `folder`'s disk has no room for the bytes that a run will hold there (what it holds now counts)."""
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if needed - held > free:
        raise UserError(
            f"{folder}: {free / 1e9:.1f} GB free, but the run needs {(needed - held) / 1e9:.1f} GB there for "
            f"{purpose}; make room or choose another --output-dir"
        )


def write_text(path: Path | str, text: str) -> None:
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    with replacing(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def append_jsonl(path: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows and force them to disk: a kill can cost at most half of a last line."""
    with Path(path).open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_text(path: Path | str) -> str:
    """The whole file; UserError where it is missing, a folder, unreadable or not UTF-8."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; give the path of an existing file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder where a file is expected; name the file in it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 (byte {error.start}); kaja reads UTF-8 only; "
            f"convert it, for example with `iconv -f CP932 -t UTF-8`"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def read_json(path: Path | str) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}); mend the line or write the file again"
        ) from None


def read_jsonl(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank; UserError names file and line."""
    # split("\n"), not splitlines(): U+2028 and friends are legal inside JSON strings.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not valid JSON ({error.msg}); "
                f"every line holds one whole JSON object; mend or remove the line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: {type(row).__name__} where a JSON object is expected; "
                f"write one {{...}} per line"
            )
        yield number, row
