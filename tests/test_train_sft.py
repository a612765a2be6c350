"""train_sft.py as users launch it: it learns, ranks do not matter, a kill does not either, errors are one line."""

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import command, kill_after, make_model_folder, metrics_of, run_script
from safetensors.torch import load_file

from kaja.batching import batch_indices
from kaja.checkpoint import load_chat
from kaja.data import load_examples
from kaja.optim import learning_rate_at

OPTIONS = ("--global-batch-size", 8, "--max-length", 128, "--learning-rate", 1e-3)


def sft(model: Path, data: Path, output: Path, *options: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    paths = ("--model", model, "--data", data, "--output-dir", output)
    return run_script("train_sft.py", *paths, *OPTIONS, *options, ranks=ranks)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> Path:
    output = tmp_path_factory.mktemp("sft") / "run"
    result = sft(model_folder, data_file, output, "--epochs", 4)
    assert result.returncode == 0, result.stderr
    assert "50 samples, 0 with their answer cut" in result.stderr
    return output


def test_the_first_step_is_what_transformers_computes(finished: Path, model_folder: Path, data_file: Path) -> None:
    """Loss and gradient norm of the first batch, from transformers' own loss, sample by sample, unpacked."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    chat = load_chat(model_folder)
    examples = load_examples(str(data_file))
    losses, count = [], 0
    for index in batch_indices(0, len(examples), 8, seed=0):
        example = examples[index]
        sequence = chat.encode([
            {"role": "user", "content": example.question}, {"role": "assistant", "content": example.reference}
        ])  # fmt: skip
        ids = torch.tensor([sequence.input_ids])
        labels = torch.where(torch.tensor([sequence.completion_mask]), ids, -100)
        trained = sum(sequence.completion_mask)
        losses.append(model(input_ids=ids, labels=labels).loss * trained)
        count += trained
    loss = torch.stack(losses).sum() / count
    loss.backward()
    first = metrics_of(finished)[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert first["grad_norm"] == pytest.approx(
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item(), rel=1e-5
    )
    assert first["trained_tokens"] == count and first["learning_rate"] == 1e-3


def test_it_learns_at_the_planned_rate(finished: Path) -> None:
    rows = metrics_of(finished)
    assert len(rows) == 28  # 4 epochs of ceil(50 / 8)
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    planned = [learning_rate_at(s, max_steps=28, learning_rate=1e-3, min_learning_rate=1e-7) for s in range(28)]
    assert [row["learning_rate"] for row in rows] == planned


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--activation-checkpointing", "--cpu-offload")], ids=["plain", "all on"])
def test_two_ranks_equal_one(
    tmp_path: Path, model_folder: Path, data_file: Path, finished: Path, options: tuple[str, ...]
) -> None:
    result = sft(model_folder, data_file, tmp_path / "run", "--epochs", 4, *options, ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = metrics_of(finished), metrics_of(tmp_path / "run")
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in two[:5]] == pytest.approx([row[name] for row in one[:5]], rel=1e-5)
    mine, theirs = load_file(finished / "hf/model.safetensors"), load_file(tmp_path / "run/hf/model.safetensors")
    for name in mine:  # Adam's division magnifies rounding where a gradient is nearly 0
        torch.testing.assert_close(mine[name], theirs[name], atol=3e-4, rtol=0)


@pytest.mark.gloo
@pytest.mark.slow
def test_two_ranks_with_tied_embeddings(tmp_path: Path, data_file: Path) -> None:
    folder = make_model_folder(tmp_path / "model", tie_word_embeddings=True)
    runs = []
    for ranks in (1, 2):
        output = tmp_path / f"run{ranks}"
        result = sft(folder, data_file, output, ranks=ranks)
        assert result.returncode == 0, result.stderr
        runs.append(metrics_of(output))
        assert "lm_head.weight" not in load_file(output / "hf/model.safetensors")
    assert [row["loss"] for row in runs[1]] == pytest.approx([row["loss"] for row in runs[0]], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.gloo)])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, model_folder: Path, data_file: Path, ranks: int
) -> None:
    options = ("--epochs", 6, "--save-every", 3)
    assert sft(model_folder, data_file, tmp_path / "whole", *options, ranks=ranks).returncode == 0
    paths = ("--model", model_folder, "--data", data_file, "--output-dir", tmp_path / "killed")
    kill_after(tmp_path / "killed", 8, command("train_sft.py", *paths, *OPTIONS, *options, ranks=ranks))
    again = sft(model_folder, data_file, tmp_path / "killed", *options)
    assert again.returncode != 0 and "is not empty" in again.stderr
    again = sft(model_folder, data_file, tmp_path / "killed", *options, "--resume", "auto", ranks=ranks)
    assert again.returncode == 0, again.stderr
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    files = [tmp_path / run / "hf/model.safetensors" for run in ("killed", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_show_data_prints_and_trains_nothing(tmp_path: Path, model_folder: Path, data_file: Path) -> None:
    result = sft(model_folder, data_file, tmp_path / "run", "--show-data", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("### 応答:") == 2 and "</s>" in result.stdout
    assert not (tmp_path / "run").exists()


def test_long_samples_are_cut_or_left_out_and_counted(tmp_path: Path, model_folder: Path, data_file: Path) -> None:
    result = sft(model_folder, data_file, tmp_path / "run", "--max-length", 40)
    assert result.returncode == 0, result.stderr
    lengths = [len(load_chat(model_folder).encode([
        {"role": "user", "content": e.question}, {"role": "assistant", "content": e.reference}
    ]).input_ids) for e in load_examples(str(data_file))]  # fmt: skip
    cut = sum(length > 40 for length in lengths)
    assert 0 < cut < 50
    assert f"50 samples, {cut} with their answer cut at 40 tokens, 0 left out" in result.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--data", "/none.jsonl"), "error: /none.jsonl: no such file"),
        (("--model", "/none"), "error: /none: no such model folder"),
        (("--global-batch-size", "0"), "global_batch_size 0: must be at least 1"),
        (("--learning-rte", "1"), "--learning-rte"),
        (("--warmup-steps", "8"), "warmup_steps 8: must be at most 7"),
        (("--max-length", "5"), "max_length 5: leaves no sample an answer"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, model_folder: Path, data_file: Path, options: tuple[str, ...], expected: str
) -> None:
    result = sft(model_folder, data_file, tmp_path / "run", *options)
    assert result.returncode == 2
    assert expected in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "hf").exists()
