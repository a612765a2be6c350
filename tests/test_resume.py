"""Checkpoints: exact, in the background, one complete folder at a time; harmed disks, files and processes."""

import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoint_worker import run_cases
from conftest import make_model_folder
from safetensors.torch import load_file
from torch import Tensor

from kaja import resume
from kaja.checkpoint import load_model
from kaja.distributed import Ranks
from kaja.errors import UserError
from kaja.files import read_json
from kaja.model import CausalLM
from kaja.optim import parameter_groups
from kaja.resume import CheckpointWriter, resume_checkpoint

ONE = Ranks(0, 0, 1, torch.device("cpu"))
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
IDS = torch.tensor([1, 5, 17, 40, 3, 200])


def train(model: CausalLM, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        hidden = model(IDS, torch.arange(len(IDS)), torch.tensor([0, len(IDS)], dtype=torch.int32))
        (hidden @ model.lm_head.weight.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(folder: Path, steps: int) -> tuple[CausalLM, torch.optim.AdamW]:
    model = load_model(folder)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2, fused=True)
    train(model, optimizer, steps)
    return model, optimizer


def state(model: CausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all that a checkpoint must bring back."""
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{key} of {name}": value.clone() for key, value in optimizer.state[parameter].items()}
    return tensors


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


@pytest.fixture
def two(tmp_path: Path, model_folder: Path) -> Path:
    """An output folder with checkpoints of steps 1 and 2."""
    model, optimizer = trained(model_folder, 0)
    with CheckpointWriter(tmp_path, ONE) as checkpoints:
        for step in (1, 2):
            train(model, optimizer, 1)
            checkpoints.save(step, model, optimizer)
    return tmp_path


# ---------------------------------------------------------------------------------------------------
# What is written and read
# ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_restores_parameters_moments_and_counters_exactly(tmp_path: Path, model_folder: Path) -> None:
    model, optimizer = trained(model_folder, 3)
    with CheckpointWriter(tmp_path, ONE, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, model, optimizer, skipped=step, data=12345678901234)
    assert names(tmp_path) == ["step_000002", "step_000003"]
    assert read_json(tmp_path / "checkpoints" / "step_000003" / "state.json") == {
        "step": 3, "optimizer_steps": 3, "world_size": 1, "counters": {"skipped": 3, "data": 12345678901234},
        "files": ["rank_00000.safetensors"],
    }  # fmt: skip
    # A later checkpoint that a kill cut short does not count.
    (tmp_path / "checkpoints" / ".step_000004.tmp").mkdir()

    fresh, fresh_optimizer = trained(model_folder, 0)
    counters = resume_checkpoint(tmp_path, fresh, fresh_optimizer, ONE)
    assert counters == {"step": 3, "skipped": 3, "data": 12345678901234}
    assert_same(state(fresh, fresh_optimizer), state(model, optimizer))
    CheckpointWriter(tmp_path, ONE).close()
    assert names(tmp_path) == ["step_000002", "step_000003"]


def test_a_checkpoint_before_the_first_step(tmp_path: Path, model_folder: Path) -> None:
    model, optimizer = trained(model_folder, 0)
    with CheckpointWriter(tmp_path, ONE) as checkpoints:
        checkpoints.save(0, model, optimizer)
    fresh, fresh_optimizer = trained(model_folder, 0)
    assert resume_checkpoint(tmp_path, fresh, fresh_optimizer, ONE) == {"step": 0}
    assert not fresh_optimizer.state
    train(model, optimizer, 2)
    train(fresh, fresh_optimizer, 2)
    assert_same(state(fresh, fresh_optimizer), state(model, optimizer))


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", tie_word_embeddings=True)
    model, optimizer = trained(folder, 2)
    with CheckpointWriter(tmp_path, ONE) as checkpoints:
        checkpoints.save(2, model, optimizer)
    written = load_file(tmp_path / "checkpoints" / "step_000002" / "rank_00000.safetensors")
    assert "model.model.embed_tokens.weight" in written and "model.lm_head.weight" not in written
    fresh, fresh_optimizer = trained(folder, 0)
    resume_checkpoint(tmp_path, fresh, fresh_optimizer, ONE)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert_same(state(fresh, fresh_optimizer), state(model, optimizer))


def test_without_a_checkpoint_a_run_starts_at_its_beginning(tmp_path: Path, model_folder: Path) -> None:
    model, optimizer = trained(model_folder, 0)
    assert resume_checkpoint(tmp_path, model, optimizer, ONE) == {"step": 0}


def test_the_newest_is_the_one_with_the_largest_number(tmp_path: Path, model_folder: Path) -> None:
    model, optimizer = trained(model_folder, 0)
    with CheckpointWriter(tmp_path, ONE) as checkpoints:
        for step in (999_999, 1_000_000):
            checkpoints.save(step, model, optimizer)
    (tmp_path / "checkpoints" / "step_000007_copy").mkdir()  # somebody's own
    assert resume_checkpoint(tmp_path, model, optimizer, ONE) == {"step": 1_000_000}


def test_a_step_may_be_saved_twice(two: Path, model_folder: Path) -> None:
    """As when SIGTERM comes right after a checkpoint."""
    model, optimizer = trained(model_folder, 3)
    with CheckpointWriter(two, ONE) as checkpoints:
        checkpoints.save(2, model, optimizer)
    assert names(two) == ["step_000001", "step_000002"]
    fresh, fresh_optimizer = trained(model_folder, 0)
    resume_checkpoint(two, fresh, fresh_optimizer, ONE)
    assert_same(state(fresh, fresh_optimizer), state(model, optimizer))


# ---------------------------------------------------------------------------------------------------
# In the background
# ---------------------------------------------------------------------------------------------------


class SlowDisk:
    """Writing waits until `go` is set."""

    def __init__(self) -> None:
        self.started, self.go, self.write = threading.Event(), threading.Event(), resume.write_tensors

    def __call__(self, tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        self.started.set()
        assert self.go.wait(60)
        self.write(tensors, path, metadata)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    disk = SlowDisk()
    monkeypatch.setattr(resume, "write_tensors", disk)
    return disk


def test_save_returns_before_it_has_written_and_writes_what_was_there(
    tmp_path: Path, model_folder: Path, slow_disk: SlowDisk
) -> None:
    model, optimizer = trained(model_folder, 2)
    expected = state(model, optimizer)
    checkpoints = CheckpointWriter(tmp_path, ONE)
    checkpoints.save(2, model, optimizer)
    assert slow_disk.started.wait(60)
    train(model, optimizer, 3)  # changes parameters and moments in place
    assert names(tmp_path) == [".step_000002.tmp"]
    slow_disk.go.set()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    thread.join()
    assert names(tmp_path) == ["step_000002"]  # without another call
    fresh, fresh_optimizer = trained(model_folder, 0)
    resume_checkpoint(tmp_path, fresh, fresh_optimizer, ONE)
    assert_same(state(fresh, fresh_optimizer), expected)
    checkpoints.close()
    # The training took no notice of it.
    assert_same(state(model, optimizer), state(*trained(model_folder, 5)))


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, model_folder: Path, slow_disk: SlowDisk) -> None:
    model, optimizer = trained(model_folder, 1)
    with CheckpointWriter(tmp_path, ONE) as checkpoints:
        checkpoints.save(1, model, optimizer)
        threading.Timer(0.1, slow_disk.go.set).start()
        checkpoints.save(2, model, optimizer)
        assert "step_000001" in names(tmp_path)
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_an_exception_of_the_loop_comes_through_and_the_save_is_completed(tmp_path: Path, model_folder: Path) -> None:
    model, optimizer = trained(model_folder, 1)
    with pytest.raises(ZeroDivisionError) as caught, CheckpointWriter(tmp_path, ONE) as checkpoints:
        checkpoints.save(1, model, optimizer)
        raise ZeroDivisionError
    assert names(tmp_path) == ["step_000001"] and not hasattr(caught.value, "__notes__")


def test_an_exception_of_the_loop_hides_that_of_the_save(tmp_path: Path, model_folder: Path) -> None:
    model, optimizer = trained(model_folder, 1)
    (tmp_path / "checkpoints").touch()  # no folder
    with pytest.raises(ZeroDivisionError) as caught, CheckpointWriter(tmp_path, ONE) as checkpoints:
        checkpoints.save(1, model, optimizer)
        raise ZeroDivisionError
    assert "step_000001: not written either" in caught.value.__notes__[0]


def test_an_unwritable_folder(tmp_path: Path, model_folder: Path) -> None:
    model, optimizer = trained(model_folder, 1)
    (tmp_path / "checkpoints").touch()  # no folder
    checkpoints = CheckpointWriter(tmp_path, ONE)
    checkpoints.save(1, model, optimizer)
    with pytest.raises(UserError, match=r"step_000001: the checkpoint could not be .* there is no earlier one; make"):
        checkpoints.close()


def test_a_defect_is_not_taken_for_a_full_disk(tmp_path: Path, model_folder: Path) -> None:
    model, optimizer = trained(model_folder, 1)
    checkpoints = CheckpointWriter(tmp_path, ONE)
    with mock.patch.object(resume, "move_folder", side_effect=KeyError("defect")):
        checkpoints.save(1, model, optimizer)
        with pytest.raises(RuntimeError, match="step_000001: the checkpoint could not be written") as caught:
            checkpoints.close()
    assert "defect" in str(caught.value.__cause__)


# ---------------------------------------------------------------------------------------------------
# Damaged checkpoints
# ---------------------------------------------------------------------------------------------------


def without_weights(folder: Path) -> None:
    (folder / "rank_00000.safetensors").unlink()


def with_half_a_file(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def with_a_broken_header(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    path.write_bytes(b"\xff" * 100 + path.read_bytes()[100:])


def without_state(folder: Path) -> None:
    (folder / "state.json").unlink()


def with_half_a_state(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text()[:20])


def with_a_state_of_something_else(folder: Path) -> None:
    (folder / "state.json").write_text(json.dumps({"step": "two"}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_weights, "rank_00000.safetensors: No such file"),
        (with_half_a_file, "rank_00000.safetensors: .*incomplete"),
        (with_a_broken_header, "rank_00000.safetensors: .*header"),
        (without_state, "state.json is not there"),
        (with_half_a_state, "state.json is not there or not valid JSON"),
        (with_a_state_of_something_else, "state.json lacks one of step"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    two: Path, model_folder: Path, damage: Callable[[Path], None], expected: str
) -> None:
    newest = two / "checkpoints" / "step_000002"
    damage(newest)
    with pytest.raises(UserError, match=expected) as caught:
        resume_checkpoint(two, *trained(model_folder, 0), ONE)
    assert str(newest) in str(caught.value)
    assert str(caught.value).endswith("remove this folder to go on from step_000001")
    shutil.rmtree(newest)
    model, optimizer = trained(model_folder, 0)
    assert resume_checkpoint(two, model, optimizer, ONE) == {"step": 1}
    assert_same(state(model, optimizer), state(*trained(model_folder, 1)))


def test_a_checkpoint_of_another_model_is_refused(two: Path, tmp_path: Path) -> None:
    for changes in ({"num_hidden_layers": 3}, {"intermediate_size": 48}):
        other = make_model_folder(tmp_path / f"other {changes}", **changes)
        with pytest.raises(UserError, match="step_000002: cannot be loaded into this model"):
            resume_checkpoint(two, *trained(other, 0), ONE)


# ---------------------------------------------------------------------------------------------------
# Several ranks, harmed processes (tests/checkpoint_worker.py)
# ---------------------------------------------------------------------------------------------------

CASES = ("reshard", "full_disk", "killed", "dead_rank")


@pytest.fixture(scope="module")
def done(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    return run_cases(model_folder, tmp_path_factory.mktemp("ranks"), *CASES)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("case", CASES)
def test_on_several_ranks(case: str, done: subprocess.CompletedProcess[str]) -> None:
    assert f"passed {case}\n" in done.stdout, done.stderr[-3000:]
