"""Checkpoints to resume from: written in the background by torch.distributed.checkpoint, read on any number of ranks.

A checkpoint is a folder of output_dir/checkpoints: parameters and AdamW moments as safetensors, one file per
rank, and state.json. It appears under its name when it is complete: a kill at any moment leaves the last good
one. Nothing is ever unpickled.
"""

import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from kaja.checkpoint import file_dtype, move_folder, write_tensors
from kaja.distributed import Ranks, gather_shares, named_shards, on_main
from kaja.errors import UserError
from kaja.files import check_free_space, read_json, write_json
from kaja.model import CausalLM, ModelConfig

# One rank writes without a process group: as intended. (catch_warnings is not for threads.)
warnings.filterwarnings("ignore", "torch.distributed is disabled")


class CheckpointWriter:
    """Saves in the background; use it as a context manager around the loop.

    `save` copies this rank's shard of parameters and moments into host memory and returns. A thread writes
    the copy; its ranks talk over a process group of their own, since the default one is the training's. As
    soon as all have written, rank 0 gives the folder its name and removes all but the last `keep` (at least
    1). One save at a time is under way: the next one and `close` wait for it, and raise on every rank what
    went wrong on one. After an error of the loop, leaving waits too, but only for ranks that live.

    Not dcp.async_save: it would copy and start a thread, which is the easy part, into new memory each time,
    and leave the folder's name, the removal of half-written ones and the agreement of the ranks to be done.
    """

    def __init__(self, output_dir: Path, ranks: Ranks, *, keep: int = 2) -> None:
        self.output_dir, self.ranks, self.keep = output_dir, ranks, keep
        self._copies: dict[str, Tensor] = {}  # kept: to fill old memory is several times faster than new
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._folder = output_dir  # of the save under way
        if ranks.is_main:
            for leftover in (output_dir / "checkpoints").glob(".step_*.tmp"):  # of a killed run
                shutil.rmtree(leftover, ignore_errors=True)
        self._group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, reference: nn.Module | None = None,
        **counters: int,
    ) -> None:  # fmt: skip
        """Begin to write checkpoints/step_XXXXXX.

        reference: a second model whose weights change during the run. counters: what else it needs to go on.
        """
        self._wait()
        tensors = _training_tensors(model, optimizer, reference)
        if tensors.keys() == self._copies.keys():
            for name, tensor in tensors.items():
                self._copies[name].copy_(tensor)
        else:  # the first time; a DTensor's shard stays the shard of a DTensor
            self._copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        state = {
            "step": step, "optimizer_steps": _optimizer_steps(optimizer),
            "world_size": self.ranks.world_size, "counters": counters,
        }  # fmt: skip
        self._folder = self.output_dir / "checkpoints" / f"step_{step:06d}"
        self._thread = threading.Thread(target=self._write, args=(state,), name="checkpoint")
        self._thread.start()

    def close(self) -> None:
        """Wait until the last checkpoint is on disk; UserError if it could not be written."""
        self._wait()
        self._copies = {}

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        # The save under way may still be completed. If another rank has died, gloo ends it at once.
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            error.add_note(f"{self._folder}: not written either ({self._failure})")

    def _write(self, state: dict[str, Any]) -> None:
        """What the thread does."""
        temporary = self._folder.with_name(f".{self._folder.name}.tmp")

        def publish(files: list[str]) -> None:
            write_json(temporary / "state.json", {**state, "files": files})
            move_folder(temporary, self._folder)
            for old in _checkpoints(self.output_dir)[: -self.keep]:
                half_removed = old.with_name(f".{old.name}.tmp")
                old.rename(half_removed)
                shutil.rmtree(half_removed, ignore_errors=True)  # the next run removes what stays

        writer = _Writer(temporary, publish)
        try:
            dcp.save(self._copies, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except BaseException as error:  # the main thread raises it: CheckpointException is no Exception
            self._failure = error
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)

    def _wait(self) -> None:
        """Until nothing is under way; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is None:
            return
        cause = _cause(failure)
        if not isinstance(cause, OSError):
            raise RuntimeError(f"{self._folder}: the checkpoint could not be written") from failure
        good = _checkpoints(self.output_dir)
        raise UserError(
            f"{self._folder}: the checkpoint could not be written ({cause.strerror or cause}); "
            f"{f'the last good one is {good[-1].name}' if good else 'there is no earlier one'}; "
            f"make room there, then go on with --resume auto"
        )


def check_room(output_dir: Path, config: ModelConfig, ranks: Ranks, *, checkpoints: bool) -> None:
    """UserError if the disk of output_dir cannot hold the trained model and, with `checkpoints`, those too.

    The model's file has 2 bytes a parameter (4 on a CPU); a checkpoint 12, and there may be three: two that
    are kept and one being written. Without `checkpoints` SIGTERM may still ask for one.
    """
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in CausalLM(config).parameters())
    needed = count * (file_dtype(ranks).itemsize + 12 * (3 if checkpoints else 1))
    on_main(lambda: check_free_space(output_dir, needed, "the model and checkpoints"), ranks)


class _Writer(HuggingFaceStorageWriter):
    """DCP's writer of safetensors, but straight from the tensors' memory, and publishing when all is written.

    The base class first makes byte strings of it all, twice its size, and holds Python's lock meanwhile, so
    that the training stands still.
    """

    def __init__(self, folder: Path, publish: Callable[[list[str]], None]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.publish = publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Called on every rank: write its tensors, and see them on disk."""
        path = Path(self.path) / f"rank_{plan.storage_data['shard_index'] - 1:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        offsets = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor) and item.tensor_data is not None  # there is nothing else in it
            tensors[item.index.fqn] = tensor
            offsets[item.index.fqn] = {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
        if tensors:  # a copy of the model (HSDP) may have nothing to add
            write_tensors(tensors, path, {"format": "pt", CUSTOM_METADATA_KEY: json.dumps(offsets)})
            with path.open("rb") as file:
                os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(item.index, tensors[item.index.fqn].nbytes, path.name) for item in plan.items])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0 when all ranks have written; DCP raises on all of them what goes wrong here."""
        self.publish(sorted({result.storage_data for written in results for result in written}))


def resume_checkpoint(
    output_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks,
    reference: nn.Module | None = None,
) -> dict[str, int]:  # fmt: skip
    """Load the newest checkpoint into model and optimiser; return its step and counters, {"step": 0} without one.

    The number of ranks and the sharding may differ from those of the run that saved it.
    """
    checkpoints = _checkpoints(output_dir)
    newest = set(gather_shares([checkpoints[-1].name if checkpoints else "none"], ranks))
    if len(newest) > 1:  # a network file system that is behind
        raise UserError(
            f"{output_dir}/checkpoints: the newest is not the same on all nodes ({', '.join(sorted(newest))}); "
            f"they must share the folder; start again in a minute"
        )
    if not checkpoints:
        return {"step": 0}
    folder = checkpoints[-1]
    state, damage = _read_state(folder)
    if damage:
        before = f"to go on from {checkpoints[-2].name}" if len(checkpoints) > 1 else "to start from the beginning"
        raise UserError(f"{folder}: a damaged checkpoint ({damage}); remove this folder {before}")
    _prime_optimizer(optimizer, state["optimizer_steps"])
    reader = HuggingFaceStorageReader(str(folder))
    try:
        dcp.load(_training_tensors(model, optimizer, reference), storage_reader=reader, no_dist=ranks.world_size == 1)
    except CheckpointException as error:
        raise UserError(
            f"{folder}: cannot be loaded into this model ({_cause(error)}); go on with the model it was saved from, "
            f"or start anew in another --output-dir"
        ) from None
    return {"step": state["step"], **state["counters"]}


def _read_state(folder: Path) -> tuple[dict[str, Any], str]:
    """state.json, and what is wrong with the checkpoint, if anything."""
    kinds = {"step": int, "optimizer_steps": int, "counters": dict, "files": list}
    try:
        state = read_json(folder / "state.json")
    except UserError:
        return {}, "state.json is not there or not valid JSON"
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
        return {}, f"state.json lacks one of {', '.join(kinds)}"
    for name in state["files"]:
        try:
            with safe_open(folder / name, framework="pt"):  # reads the header, compares it with the file's length
                pass
        except (OSError, SafetensorError) as error:
            return {}, f"{name}: {error}"
    return state, ""


def _checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = [path for path in (output_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank where something did."""
    return error.failures[min(error.failures)][0] if isinstance(error, CheckpointException) else error


def _training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, reference: nn.Module | None
) -> dict[str, Tensor]:
    """Parameters and both AdamW moments under one flat naming; loading writes into these very tensors."""
    tensors = {}
    for name, parameter in named_shards(model):
        tensors[f"model.{name}"] = parameter.detach()
        state = optimizer.state.get(parameter, {})  # none before the first step
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                tensors[f"{moment}.{name}"] = state[moment]
    for name, parameter in named_shards(reference) if reference is not None else ():
        tensors[f"reference.{name}"] = parameter.detach()
    return tensors


def _prime_optimizer(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Give AdamW the state it makes at its first step, so that there is something to load into."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if steps else []:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


def _optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """Zero before the first step; the parameters all have had the same number."""
    return next((int(state["step"]) for state in optimizer.state.values()), 0)
