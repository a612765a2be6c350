"""Files are whole or not there, and errors name the file and the line."""

import shutil
from pathlib import Path

import pytest

from kaja.errors import UserError
from kaja.files import (
    append_jsonl, check_free_space, read_json, read_jsonl, read_text, replacing, write_json, write_jsonl,
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
        ("鍵".encode("cp932"), "not UTF-8 (byte 0)"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_jsonl(path))
    assert str(path) in str(error.value) and expected in str(error.value)
    assert "\n" not in str(error.value)


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
