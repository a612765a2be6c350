"""Files are whole or not there, and errors name the file and the line."""

import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from kaja.errors import UserError
from kaja.files import (
    BadRecord, append_jsonl, check_free_space, read_json, read_jsonl, read_text, replacing, write_json, write_jsonl,
)  # fmt: skip


def test_json_keeps_japanese_readable(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"質問": "鍵\u2028開け"})
    assert "質問" in path.read_text(encoding="utf-8")
    assert read_json(path) == {"質問": "鍵\u2028開け"}


def test_jsonl_round_trip_with_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"a": "一\u2028二"}])  # a line separator inside a string does not end the line
    append_jsonl(path, [{"a": "三"}])
    assert list(read_jsonl(path)) == [(1, {"a": "一\u2028二"}), (2, {"a": "三"})]


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("2")
        raise KeyError
    assert read_json(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for content in ("old", "new"):
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        (b'{"a": 1}\n\n[1]\n', "line 3: list where a JSON object is expected"),
        (b'{"a": 1}\n{"a": "b', "line 2: not valid JSON (column 7: Unterminated string starting at)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1: not valid JSON (Exceeds the limit (4300 digits)"),
        (b'{"a": ' + b"[" * 100_000, "line 1: not valid JSON (maximum recursion depth exceeded"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_jsonl(path))
    assert str(path) in str(error.value) and expected in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_lines_can_be_collected_instead(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n' + '"鍵"'.encode("cp932") + '\n\n{"a": "二\u2028"}\n{"a'.encode())
    found: list[BadRecord] = []
    assert list(read_jsonl(path, found.append)) == [(1, {"a": 1}), (5, {"a": "二\u2028"})]
    assert [(error.place, error.kind) for error in found] == [
        (f"{path}, line 2", "not valid JSON"), (f"{path}, line 3", "not UTF-8"), (f"{path}, line 6", "not valid JSON"),
    ]  # fmt: skip


TEXT = "{\"質問\": 1}\n"


@pytest.mark.parametrize(
    ("encoding", "found", "option"),
    [
        ("cp932", "line 1: not UTF-8; it looks like Shift_JIS (CP932)", "CP932"),
        ("euc_jp", "line 1: not UTF-8; it looks like EUC-JP", "EUC-JP"),
        ("utf-16", "line 1: not UTF-8, it looks like UTF-16", "UTF-16"),
        ("utf-16-le", "line 1: not UTF-8, it looks like UTF-16LE", "UTF-16LE"),
        ("utf-16-be", "line 1: not UTF-8, it looks like UTF-16BE", "UTF-16BE"),
    ],
)
@pytest.mark.parametrize("read", [lambda path: list(read_jsonl(path)), read_json, read_text])
def test_other_encodings_come_with_the_command_that_mends_them(
    tmp_path: Path, encoding: str, found: str, option: str, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "データ 1.jsonl"
    path.write_bytes(TEXT.encode(encoding))
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert f"{path}, {found}; kaja reads UTF-8 only; convert it: `iconv -f {option} -t UTF-8 '{path}' > " in message
    command = message.split("`")[1]
    subprocess.run(["bash", "-c", command], check=True)
    assert (tmp_path / "データ 1.utf8.jsonl").read_text(encoding="utf-8").removeprefix("\ufeff") == TEXT


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{}\n{"a": "caf\xe9"}\n', "line 2: not UTF-8; nor a Japanese encoding"),
        ('{}\n{"a": "鍵", "b": "鍵'.encode()[:-1], "line 2: not UTF-8; it is damaged or cut off"),
        ('{}\n{"a": "鍵'.encode()[:-1], "line 2: not UTF-8; it is damaged or cut off"),
        ('{}\n{"a": "鍵'.encode() + b'\x82\xa0"}\n', "line 2: not UTF-8; it is damaged or cut off"),
    ],
)
@pytest.mark.parametrize("read", [lambda path: list(read_jsonl(path)), read_text])
def test_what_is_in_no_encoding_is_said_so(
    tmp_path: Path, content: bytes, why: str, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=why):
        read(path)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert read_text(path) == '{"a": 1}\n{"a": 2}\n'
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (2, {"a": 2})]


def test_long_files_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + "{" * 50_000_000, encoding="utf-8")
    tracemalloc.start()
    assert next(read_jsonl(path)) == (1, {"a": 1})
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_text(tmp_path / "none")
    with pytest.raises(UserError, match="is a folder"):
        read_text(tmp_path)


def test_a_run_that_does_not_fit_the_disk_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_free_space(tmp_path, free // 2, "the model")
    with pytest.raises(UserError, match=r"GB free, but the run needs \d+\.\d GB there for the model and checkpoints"):
        check_free_space(tmp_path, free * 2, "the model and checkpoints")
    # What is there already needs no room again.
    with (tmp_path / "old").open("wb") as file:
        file.truncate(free * 2)  # sparse
    check_free_space(tmp_path, free * 2, "the model")
