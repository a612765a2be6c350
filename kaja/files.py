"""Reading and writing files: UTF-8, written aside and renamed, errors that name file and line."""

import codecs
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kaja.errors import UserError


class BadRecord(UserError):
    """A record that does not fit, while the rest of its file can be read: it may be left out and counted instead."""

    def __init__(self, place: str, problem: str, fix: str, kind: str = "") -> None:
        """`kind`: what it is counted under, where the problem tells details."""
        super().__init__(f"{place}: {problem}; {fix}")
        self.place = place
        self.kind = kind or problem


OnBad = Callable[[BadRecord], None]


def raise_bad(error: BadRecord) -> None:
    raise error


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
    """The whole file without its byte order mark; UserError where it is missing, a folder, unreadable or not UTF-8."""
    path = existing_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    refuse_utf16(path, content[:4])
    try:
        # As text files are read: every end of a line is "\n".
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise not_utf8(f"{path}, line {line}", path, content, error) from None


def read_lines(path: Path | str) -> Iterator[tuple[int, bytes]]:
    """(number, line with its end) of a file of any size, without a byte order mark; `decoded` makes text of a line."""
    path = existing_file(path)
    try:
        with path.open("rb") as file:
            # Binary lines end at b"\n" only: U+2028 and friends are legal inside JSON strings.
            for number, line in enumerate(file, start=1):
                if number == 1:
                    refuse_utf16(path, line[:4])
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield number, line
    except OSError as error:
        raise unreadable(path, error) from None


def decoded(line: bytes, path: Path | str, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(f"{path}, line {number}", path, line, error) from None


def existing_file(path: Path | str) -> Path:
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; give the path of an existing file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder where a file is expected; name the file in it")
    return path


def unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); check its permissions")


def refuse_utf16(path: Path, start: bytes) -> None:
    """UTF-16 begins with a mark, or shows by the zero byte of an ASCII character ("[", "{", a column's name)."""
    marked = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if marked or (b"\0" in start[:2] and start[:2] != b"\0\0"):
        encoding = "UTF-16" if marked else "UTF-16BE" if start[0] == 0 else "UTF-16LE"
        raise UserError(f"{path}, line 1: not UTF-8, {iconv(path, encoding)}")


def not_utf8(place: str, path: Path | str, content: bytes, error: UnicodeDecodeError) -> BadRecord:
    """With the encoding that the bytes probably have, and the command that converts the file."""
    problem = "not UTF-8"
    # Another encoding fails at its first character outside of ASCII; UTF-8 that was damaged or cut off fails later.
    if not content[: error.start].isascii() or error.reason == "unexpected end of data":
        return BadRecord(place, problem, "it is damaged or cut off; mend or remove it, or write the file again")
    # EUC-JP first: nearly all of it could be Shift_JIS too (as half-width katakana), but not the other way round.
    for encoding, name in (("euc_jp", "EUC-JP"), ("cp932", "CP932")):
        try:
            content.decode(encoding)
        except UnicodeDecodeError:
            continue
        return BadRecord(place, problem, iconv(path, name))
    return BadRecord(place, problem, "nor a Japanese encoding; kaja reads UTF-8 only; write the file again as UTF-8")


def iconv(path: Path | str, encoding: str) -> str:
    old, new = (shlex.quote(str(name)) for name in (path, Path(path).with_suffix(f".utf8{Path(path).suffix}")))
    name = "Shift_JIS (CP932)" if encoding == "CP932" else encoding
    return f"it looks like {name}; kaja reads UTF-8 only; convert it: `iconv -f {encoding} -t UTF-8 {old} > {new}`"


def read_json(path: Path | str) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise invalid_json(path, error) from None


def invalid_json(path: Path | str, error: Exception) -> UserError:
    line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
    return UserError(f"{path}{line}: not valid JSON ({json_reason(error)}); mend the line or write the file again")


def json_reason(error: Exception) -> str:
    """A JSONDecodeError, or what else json.loads raises: numbers of over 4,300 digits, nesting without end."""
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: {error.msg}"
    return str(error).partition(";")[0]


def read_jsonl(path: Path | str, on_bad: OnBad = raise_bad) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank, line by line; `on_bad` gets every line that is no object.

    Unless on_bad says otherwise, the first bad line is a UserError that names file and line.
    """
    for number, line in read_lines(path):
        try:
            row = parse_line(line, path, number)
        except BadRecord as error:
            on_bad(error)
            continue
        if row is not None:
            yield number, row


def parse_line(line: bytes, path: Path | str, number: int) -> dict[str, Any] | None:
    """The object in a line, None for a blank one; BadRecord for anything else."""
    text = decoded(line, path, number).strip()
    if not text:
        return None
    place = f"{path}, line {number}"
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(
            place, f"not valid JSON ({json_reason(error)})",
            "every line holds one whole JSON object; mend or remove the line", kind="not valid JSON",
        ) from None  # fmt: skip
    if not isinstance(row, dict):
        raise BadRecord(place, f"{type(row).__name__} where a JSON object is expected", "write one {...} per line")
    return row
