"""Hugging Face folders in and out, shard by shard, and checkpoints to resume from.

No rank ever holds a full copy: weights are read slice by slice into each rank's shard, and written
tensor by tensor. Everything is safetensors and JSON; nothing is ever unpickled.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kaja.chat import TEMPLATES, Chat
from kaja.distributed import Ranks, barrier, full_tensors, shard_model
from kaja.errors import UserError
from kaja.files import read_json, read_text, replacing, write_json
from kaja.model import CausalLM, ModelConfig

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
# What belongs to a model beside its weights; copied as it is.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


# ---------------------------------------------------------------------------------------------------
# Hugging Face folders in
# ---------------------------------------------------------------------------------------------------


def resolve_model(name: str) -> Path:
    """A local model folder as it is, or a hub id downloaded (weights, config and tokenizer, no code)."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{folder}: no config.json; a model is a Hugging Face folder; name one that holds it")
        weight_files(folder)
        return folder
    if folder.exists() or name.startswith((".", "/")) or name.count("/") != 1:
        raise UserError(f"{name}: no such model folder; give an existing folder or a hub id like owner/name")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja"]))
    except (OSError, HFValidationError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: neither a local folder nor to be had from the hub ({reason}); check the name and the network"
        ) from None


def weight_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds which tensor; UserError where there are none or one is missing."""
    if (folder / INDEX).exists():
        files = {name: folder / file for name, file in read_json(folder / INDEX)["weight_map"].items()}
        for path in sorted(set(files.values())):
            if not path.exists():
                raise UserError(f"{path}: missing, but {INDEX} names it; copy the whole model folder again")
        return files
    path = folder / "model.safetensors"
    if not path.exists():
        raise UserError(
            f"{folder}: no weights; kaja reads model.safetensors or {INDEX} (never pickled .bin files); "
            f"convert the model with transformers' save_pretrained"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: path for name in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from None


def load_model(
    folder: Path | str,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks | None = None,
    *,
    activation_checkpointing: bool = False,
    cpu_offload: bool = False,
) -> CausalLM:
    """A model with the weights of a Hugging Face folder.

    Without `ranks`: whole, on the CPU. With them: sharded by kaja.distributed.shard_model, on their
    device. The model is born without memory (meta device), so that only shards are ever allocated.
    """
    folder = Path(folder)
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = CausalLM(config).to(dtype)
    device = torch.device("cpu")
    if ranks is not None:
        shard_model(model, ranks, activation_checkpointing=activation_checkpointing, cpu_offload=cpu_offload)
        device = torch.device("cpu") if cpu_offload else ranks.device
    model.to_empty(device=device)
    if config.tie_word_embeddings:  # to_empty gives each name its own memory
        model.lm_head.weight = model.model.embed_tokens.weight
    load_weights(model, folder)
    return model


@torch.no_grad()
def load_weights(model: CausalLM, folder: Path) -> None:
    """Fill a model's parameters, or this rank's shards of them, from a Hugging Face folder."""
    files = weight_files(folder)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name not in files:
            raise UserError(f"{folder}: tensor {name} is missing; the weights must fit config.json; copy them again")
        with safe_open(files[name], framework="pt") as file:
            source = file.get_slice(name)
            if tuple(source.get_shape()) != tuple(tensor.shape):
                raise UserError(
                    f"{files[name]}: {name} has shape {tuple(source.get_shape())}, config.json says "
                    f"{tuple(tensor.shape)}; the weights must fit config.json; copy both from the same model"
                )
            if isinstance(tensor, DTensor):
                shape, offset = compute_local_shape_and_global_offset(
                    tensor.shape, tensor.device_mesh, tensor.placements
                )
                tensor.to_local().copy_(source[tuple(slice(o, o + n) for o, n in zip(offset, shape))])
            else:
                tensor.copy_(source[:])


def load_chat(folder: Path | str, template: str = "auto") -> Chat:
    """The tokenizer of a model folder with its chat template.

    template "auto": one of kaja.chat.TEMPLATES where the folder's own template is recognised as such
    (they are tested to give the same tokens), else the folder's own.
    """
    folder = Path(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            raise UserError(
                f"{folder}: no {name}; a model folder holds its (fast) tokenizer; copy the tokenizer's files there"
            )
    tokenizer = Tokenizer.from_str(read_text(folder / "tokenizer.json"))
    config = read_json(folder / "tokenizer_config.json")
    if template == "auto":
        template = _recognise_template(folder, config)
    eos = _token_id(tokenizer, config, "eos_token")
    if eos is None:
        raise UserError(f"{folder}/tokenizer_config.json: no eos_token; completions must end; name one")
    return Chat(tokenizer, template, _token_id(tokenizer, config, "bos_token"), eos)


def _recognise_template(folder: Path, tokenizer_config: dict[str, Any]) -> str:
    jinja_file = folder / "chat_template.jinja"
    source = read_text(jinja_file) if jinja_file.exists() else tokenizer_config.get("chat_template")
    if not isinstance(source, str):
        raise UserError(
            f"{folder}: the tokenizer has no chat template; choose one with --template: {', '.join(TEMPLATES)}"
        )
    for name, mark in (("llm-jp-3", "### 指示:"), ("llama-3", "<|start_header_id|>")):
        if mark in source:
            return name
    return source


def _token_id(tokenizer: Tokenizer, config: dict[str, Any], key: str) -> int | None:
    token = config.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    return None if text is None else tokenizer.token_to_id(text)


# ---------------------------------------------------------------------------------------------------
# Hugging Face folders out
# ---------------------------------------------------------------------------------------------------


def save_model(model: nn.Module, folder: Path, source: Path, ranks: Ranks) -> None:
    """Write a Hugging Face folder: weights, and config and tokenizer of `source`.

    All ranks take part, one tensor is gathered at a time, rank 0 writes files of at most 5 GB. The
    folder appears when it is complete. On CUDA the weights are written as bfloat16, which is what
    generation reads; on the CPU, where all computing is float32, as float32.
    """
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    config = read_json(source / "config.json")
    tied = bool(config.get("tie_word_embeddings"))
    if not ranks.is_main:
        for _ in full_tensors(model):
            pass
        barrier()
        return
    with replacing(folder) as temporary:
        temporary.mkdir()
        _write_weights(model, temporary, dtype, skip={"lm_head.weight"} if tied else set())
        config.pop("torch_dtype", None)
        config.pop("auto_map", None)  # it points at code, which is not copied
        write_json(temporary / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
        for name in COMPANIONS:
            if (source / name).exists():
                shutil.copyfile(source / name, temporary / name)
    barrier()


def _write_weights(model: nn.Module, folder: Path, dtype: torch.dtype, skip: set[str]) -> None:
    """model.safetensors, or model-0000N-of-0000M.safetensors and an index."""
    sizes = {
        name: tensor.numel() * dtype.itemsize for name, tensor in model.state_dict().items() if name not in skip
    }
    shards = _plan_files(sizes)
    file_of = {name: number for number, names in enumerate(shards) for name in names}
    waiting: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(shards))}
    for name, tensor in full_tensors(model):
        if name in skip:
            continue
        number = file_of[name]
        waiting[number][name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if len(waiting[number]) == len(shards[number]):
            save_file(waiting.pop(number), folder / _file_name(number, len(shards)), metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: _file_name(number, len(shards)) for name, number in file_of.items()}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _plan_files(sizes: dict[str, int]) -> list[list[str]]:
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > MAX_SHARD_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


# ---------------------------------------------------------------------------------------------------
# Checkpoints to resume from
# ---------------------------------------------------------------------------------------------------


def save_checkpoint(
    output_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, *, keep: int = 2
) -> None:
    """Write output_dir/checkpoints/step_XXXXXX and remove all but the last `keep`.

    Every rank writes its own shards (torch.distributed.checkpoint as safetensors). The folder is made
    aside and renamed by rank 0 when all have finished: a kill at any moment leaves the last good one.
    """
    folder = output_dir / "checkpoints" / f"step_{step:06d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    if ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one rank: as intended
        dcp.save(_training_tensors(model, optimizer), storage_writer=writer, no_dist=ranks.world_size == 1)
    barrier()
    if ranks.is_main:
        write_json(temporary / "state.json", {"step": step, "optimizer_steps": _optimizer_steps(optimizer)})
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        for old in _checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    barrier()


def resume_checkpoint(output_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> int:
    """Load the newest checkpoint into model and optimiser; return its step, 0 if there is none.

    The number of ranks may differ from the run that saved it.
    """
    checkpoints = _checkpoints(output_dir)
    if not checkpoints:
        return 0
    state = read_json(checkpoints[-1] / "state.json")
    _prime_optimizer(optimizer, state["optimizer_steps"])
    reader = HuggingFaceStorageReader(str(checkpoints[-1]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(_training_tensors(model, optimizer), storage_reader=reader, no_dist=ranks.world_size == 1)
    return int(state["step"])


def _checkpoints(output_dir: Path) -> list[Path]:
    return sorted((output_dir / "checkpoints").glob("step_*"))


def _training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and both AdamW moments under one flat naming; loading writes into these very tensors."""
    tensors = {}
    for name, parameter in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        tensors[f"model.{name}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
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
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
