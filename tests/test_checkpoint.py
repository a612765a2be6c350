"""Hugging Face folders in and out (against transformers), and checkpoints to resume from."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_model_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kaja import checkpoint
from kaja.checkpoint import load_chat, load_model, resolve_model, resume_checkpoint, save_checkpoint, save_model
from kaja.distributed import Ranks
from kaja.errors import UserError
from kaja.files import read_json, write_json
from kaja.model import CausalLM
from kaja.optim import parameter_groups

ONE = Ranks(0, 0, 1, torch.device("cpu"))
IDS = torch.tensor([1, 5, 17, 40, 3, 200])


def logits(model: CausalLM) -> torch.Tensor:
    hidden = model(IDS, torch.arange(len(IDS)), torch.tensor([0, len(IDS)], dtype=torch.int32))
    return hidden @ model.lm_head.weight.T


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_bytes", [5 * 10**9, 40_000], ids=["one file", "many files"])
def test_a_saved_folder_gives_transformers_the_same_logits(
    tmp_path: Path, tied: bool, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model_folder(tmp_path / "source", tie_word_embeddings=tied)
    model = load_model(source)
    with torch.no_grad():  # what is saved is the model's own state, not the source file's
        model.model.embed_tokens.weight.mul_(1.5)
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", max_bytes)
    save_model(model, tmp_path / "out", source, ONE)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == (1 if max_bytes > 10**9 else len(set(read_json(
        tmp_path / "out/model.safetensors.index.json")["weight_map"].values())))  # fmt: skip
    assert len(files) > 1 or max_bytes > 10**9

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(theirs(IDS[None]).logits[0], logits(model), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(load_model(tmp_path / "out")), logits(model), atol=0, rtol=0)
    question = "犬の散歩"
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")(question)["input_ids"]
        == AutoTokenizer.from_pretrained(source)(question)["input_ids"]
    )


def test_tied_embeddings_stay_one_parameter(tmp_path: Path) -> None:
    model = load_model(make_model_folder(tmp_path, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_half_a_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def with_another_shape(folder: Path) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "intermediate_size": 48})


def without_a_shard(folder: Path) -> None:
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "model-2.safetensors"}})


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_weights, "no weights; kaja reads model.safetensors"),
        (with_half_a_file, "not a whole safetensors file"),
        (without_a_tensor, "tensor model.norm.weight is missing"),
        (with_another_shape, r"mlp.gate_proj.weight has shape \(64, 32\), config.json says \(48, 32\)"),
        (without_a_shard, "model-2.safetensors: missing"),
        (without_config, "no config.json"),
    ],
)
def test_a_damaged_folder_is_refused(
    tmp_path: Path, model_folder: Path, damage: Callable[[Path], None], expected: str
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    damage(folder)
    with pytest.raises(UserError, match=expected):
        load_model(resolve_model(str(folder)))


@pytest.mark.parametrize("name", ["/none/such", "./none", "runs/sft/hf", "nothing"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        resolve_model(name)


def test_the_chat_of_a_folder(tmp_path: Path, model_folder: Path) -> None:
    chat = load_chat(model_folder)
    prompt = chat.encode_prompt([{"role": "user", "content": "犬"}])
    assert prompt[0] == 1 and prompt.count(1) == 1
    assert chat.stop_token_ids == [2]
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**config, "eos_token": None})
    with pytest.raises(UserError, match="no eos_token"):
        load_chat(folder)
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": None})
    with pytest.raises(UserError, match="no chat template"):
        load_chat(folder)


def trained(folder: Path, steps: int) -> tuple[CausalLM, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = load_model(folder)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2, fused=True)
    for _ in range(steps):
        logits(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_a_checkpoint_restores_parameters_and_moments_exactly(tmp_path: Path, model_folder: Path) -> None:
    model, optimizer = trained(model_folder, 3)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, model, optimizer, ONE, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    # A later checkpoint that a kill cut short does not count.
    (tmp_path / "checkpoints" / ".step_000004.tmp").mkdir()

    fresh, fresh_optimizer = trained(model_folder, 0)
    assert resume_checkpoint(tmp_path, fresh, fresh_optimizer, ONE) == 3
    for one, two in zip(model.parameters(), fresh.parameters()):
        assert torch.equal(one, two)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[one][key], fresh_optimizer.state[two][key])


def test_without_a_checkpoint_a_run_starts_at_its_beginning(tmp_path: Path, model_folder: Path) -> None:
    model, optimizer = trained(model_folder, 0)
    assert resume_checkpoint(tmp_path, model, optimizer, ONE) == 0
