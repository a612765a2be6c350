"""Command lines and output folders: one clear line and exit code 2, never a traceback."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

from kaja.cli import check_range, noticing_sigterm, run
from kaja.errors import Stopped, UserError
from kaja.files import append_jsonl, read_json
from kaja.output_dir import check_same_data, prepare_output_dir


@dataclass(frozen=True)
class Config:
    steps: int = 1
    """Steps."""
    data: tuple[str, ...] = ()
    """Files."""
    resume: str = "never"
    """Resume."""

    def __post_init__(self) -> None:
        check_range(self, at_least_1=("steps",), at_most={"steps": 10})


def main(config: Config) -> None:
    if config.data:
        raise UserError(f"{config.data[0]}: no such file; give an existing one")


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, Config, []) == 0
    assert run(main, Config, ["--data", "a.jsonl"]) == 2
    assert capsys.readouterr().err == "error: a.jsonl: no such file; give an existing one\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "0"], "steps 0: must be at least 1; change --steps"),
        (["--steps", "11"], "steps 11: must be at most 10"),
        (["--stepz", "3"], "--stepz"),
        (["--steps", "three"], "three"),
    ],
)
def test_wrong_arguments(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, Config, arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert expected in captured.err and not captured.out


def test_help_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(main, Config, ["--help"])
    assert ended.value.code == 0
    assert "--steps INT" in capsys.readouterr().out


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    folder = prepare_output_dir(str(tmp_path / "run"), Config(data=("一",)), resume=False)
    assert read_json(folder / "config.json") == {"steps": 1, "data": ["一"], "resume": "never"}
    prepare_output_dir(str(folder), Config(steps=2), resume=False)  # that run never began
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        prepare_output_dir(str(folder), Config(), resume=False)
    assert read_json(folder / "config.json")["steps"] == 2


def test_resuming_needs_the_same_config(tmp_path: Path) -> None:
    folder = str(tmp_path)
    prepare_output_dir(folder, Config(steps=2, data=("a",)), resume=False)
    (tmp_path / "metrics.jsonl").write_text("")
    prepare_output_dir(folder, Config(steps=2, data=("a",), resume="auto"), resume=True)
    with pytest.raises(UserError, match="steps was 2 and is now 3"):
        prepare_output_dir(folder, Config(steps=3, data=("a",)), resume=True)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        prepare_output_dir(str(tmp_path / "file"), Config(), resume=False)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare_output_dir(str(tmp_path / "file" / "run"), Config(), resume=False)


HOLDER = """
import sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from kaja.output_dir import prepare_output_dir
from test_cli import Config
prepare_output_dir(sys.argv[2], Config(), resume=True)
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(ROOT), str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    for resume in (False, True):
        with pytest.raises(UserError, match="run: another process is running in it"):
            prepare_output_dir(str(tmp_path / "run"), Config(), resume=resume)
    holder.kill()
    holder.wait()
    prepare_output_dir(str(tmp_path / "run"), Config(), resume=False)
    prepare_output_dir(str(tmp_path / "run"), Config(), resume=True)  # our own lock is no hindrance


def test_sigterm_is_noticed_however_often_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with noticing_sigterm() as received:
        assert not received.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert received.wait(timeout=10)
        os.kill(os.getpid(), signal.SIGTERM)  # from torchrun, after the scheduler's own
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stopped_run_has_the_exit_code_of_sigterm(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(config: Config) -> None:
        raise Stopped(3, 8)

    assert run(stop, Config, []) == 143
    assert capsys.readouterr().err == "SIGTERM: saved after step 3 of 8; go on with --resume auto\n"


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fill(config: Config) -> None:
        append_jsonl("/dev/full", [{"step": 1}])

    assert run(fill, Config, []) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "No space left on device" in message and message.count("\n") == 1


def test_other_errors_of_the_system_keep_their_traceback() -> None:
    def fail(config: Config) -> None:
        open("/none/such")

    with pytest.raises(FileNotFoundError):
        run(fail, Config, [])


def test_a_resumed_run_must_see_the_same_data() -> None:
    assert check_same_data({"step": 0}, 17) == 17
    assert check_same_data({"step": 4, "data": 17}, 17) == 17
    with pytest.raises(UserError, match="data: not what the checkpoint was trained on"):
        check_same_data({"step": 4, "data": 18}, 17)


@pytest.mark.parametrize("script", ["synth.py", "train_sft.py", "train_grpo.py", "judge.py"])
def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(script: str) -> None:
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    print([end.code, 'torch' in sys.modules, 'numpy' in sys.modules])\n"
    )
    for option, expected in (("--help", "[0, False, False]"), ("--no-such-option", "[2, False, False]")):
        command = [sys.executable, "-c", f"import sys; sys.argv[0] = {script!r}\n{code}", option]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.endswith(f"{expected}\n"), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_what_has_no_optimiser_does_not_import_torchs_compiler() -> None:
    code = "import sys, synth, judge\nprint('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True False\n", done.stderr
