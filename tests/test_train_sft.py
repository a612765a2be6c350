"""train_sft.py as users launch it: it learns, ranks do not matter, a kill does not either, errors are one line."""

import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, checkpoints_of, command, kill_after, make_model_folder, metrics_of, run_script, wait_for_rows
from safetensors.torch import load_file

import train_sft
from kaja.batching import batch_indices
from kaja.chat import TokenSequence
from kaja.checkpoint import load_chat
from kaja.data import load_examples
from kaja.files import write_jsonl
from kaja.optim import learning_rate_at

OPTIONS = ("--global-batch-size", 8, "--max-length", 128, "--learning-rate", 1e-3)


def sft(model: Path, data: Path, output: Path, *options: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    paths = ("--model", model, "--data", data, "--output-dir", output)
    return run_script("train_sft.py", *paths, *OPTIONS, *options, ranks=ranks)


def lengths_of(model: Path, data: Path) -> list[int]:
    chat = load_chat(model)
    return [len(chat.encode([
        {"role": "user", "content": e.question}, {"role": "assistant", "content": e.reference}
    ]).input_ids) for e in load_examples(str(data))]  # fmt: skip


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
@pytest.mark.parametrize(
    "options",
    [(), ("--activation-checkpointing", "on", "--cpu-offload", "--reduce-every", "step")],
    ids=["plain", "all on"],
)
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
    assert checkpoints_of(tmp_path / "killed")  # there is one to go on from
    again = sft(model_folder, data_file, tmp_path / "killed", *options, ranks=ranks)
    assert again.returncode != 0 and again.stderr.count("is not empty") == 1  # rank 0 alone speaks
    assert "RuntimeError" not in again.stderr
    again = sft(model_folder, data_file, tmp_path / "killed", *options, "--resume", "auto", ranks=ranks)
    assert again.returncode == 0, again.stderr
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    files = [tmp_path / run / "hf/model.safetensors" for run in ("killed", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_row_says_how_the_step_went(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["padding_waste"] == 0.0 and row["skipped_steps"] == 0
        assert 0 < row["mfu"] < 1.5  # of a measured matrix product, which may itself have been disturbed
        assert 0.05 < row["peak_memory_gib"] < 24
        # Accumulation: as few streams of 4 * 128 tokens as the batch's tokens need.
        assert row["streams"] == -(-row["tokens"] // 512)


def greedy(folder: Path, question: str, max_tokens: int) -> str:
    """transformers' own greedy answer."""
    from transformers import AutoModelForCausalLM

    chat = load_chat(folder)
    prompt = chat.encode_prompt([{"role": "user", "content": question}])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)[0]
    return chat.decode(ids[len(prompt):].tolist())


def test_the_trained_model_answers_for_a_person_to_read(finished: Path, data_file: Path) -> None:
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    examples = load_examples(str(data_file))[:4]
    assert [s["question"] for s in samples] == [e.question for e in examples]
    assert [s["reference"] for s in samples] == [e.reference for e in examples]
    for sample in samples:
        assert sample["completion"] == greedy(finished / "hf", sample["question"], 128)


def test_the_held_out_loss_is_transformers_own(tmp_path: Path, model_folder: Path, data_file: Path) -> None:
    """Mean over the tokens of all held-out answers, before and after; every two steps and at the end."""
    from transformers import AutoModelForCausalLM

    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(data_file.read_text(encoding="utf-8").splitlines(keepends=True)[:7]), encoding="utf-8")
    options = ("--eval-data", held_out, "--eval-every", 2, "--learning-rate", 1e-3)
    result = sft(model_folder, data_file, tmp_path / "run", *options)
    assert result.returncode == 0, result.stderr
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows if "held_out_loss" in row] == [2, 4, 6, 7]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/hf", dtype=torch.float32)
    chat = load_chat(model_folder)
    total, count = 0.0, 0
    for example in load_examples(str(held_out)):
        sequence = chat.encode([
            {"role": "user", "content": example.question}, {"role": "assistant", "content": example.reference}
        ])  # fmt: skip
        ids = torch.tensor([sequence.input_ids])
        labels = ids.masked_fill(~torch.tensor([sequence.completion_mask]), -100)
        total += model(ids, labels=labels).loss.item() * sequence.num_trained
        count += sequence.num_trained
    assert rows[-1]["held_out_loss"] == pytest.approx(total / count, rel=1e-5)
    assert rows[-1]["held_out_loss"] < rows[1]["held_out_loss"]
    samples = (tmp_path / "run/samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in samples] == ["0", "1", "2", "3"]


def test_chunks_train_on_the_same_tokens_in_fewer_sequences(
    tmp_path: Path, model_folder: Path, data_file: Path, finished: Path
) -> None:
    result = sft(model_folder, data_file, tmp_path / "run", "--batch-unit", "chunks")
    assert result.returncode == 0, result.stderr
    chunks, samples = metrics_of(tmp_path / "run"), metrics_of(finished)[:7]
    assert sum(row["trained_tokens"] for row in chunks) == sum(row["trained_tokens"] for row in samples)
    tokens = sum(row["tokens"] for row in samples) + 50 - 1  # each border between samples is a position too
    assert sum(row["tokens"] for row in chunks) == tokens
    assert len(chunks) == -(-(-(-tokens // 128)) // 8)
    # Whole chunks, but for the last batch of the epoch and the batch that has the rest of the tokens.
    assert sum(row["tokens"] != 8 * 128 for row in chunks) <= 2 < len(chunks)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch, data_file: Path, model_folder: Path) -> int:
    """The index of a sample that makes the loss of its stream NaN."""
    real, example = train_sft.loss_of, load_examples(str(data_file))[13]
    messages = [{"role": "user", "content": example.question}, {"role": "assistant", "content": example.reference}]
    bad = load_chat(model_folder).encode(messages).input_ids

    def loss_of(stream: list[TokenSequence], *arguments: Any) -> torch.Tensor:
        return real(stream, *arguments) * (math.nan if any(s.input_ids == bad for s in stream) else 1.0)

    monkeypatch.setattr(train_sft, "loss_of", loss_of)
    return 13


def test_a_step_without_a_number_is_skipped_and_counted(
    tmp_path: Path, model_folder: Path, data_file: Path, poisoned: int
) -> None:
    result = sft(model_folder, data_file, tmp_path / "run", "--epochs", 3)
    assert result.returncode == 0, result.stderr
    rows = metrics_of(tmp_path / "run")
    bad_steps = [step for step in range(21) if poisoned in batch_indices(step, 50, 8, seed=0)]
    assert [row["step"] - 1 for row in rows if row["loss"] is None] == bad_steps and len(bad_steps) == 3
    assert [row["skipped_steps"] for row in rows] == [sum(bad <= step for bad in bad_steps) for step in range(21)]
    skipped = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert [row["step"] - 1 for row in skipped] == bad_steps
    assert all("test 13" in row["samples"] and len(row["samples"]) in (2, 8) for row in skipped)
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    assert losses[-1] < losses[0]


def test_skipped_steps_that_are_redone_are_noted_once(
    tmp_path: Path, model_folder: Path, data_file: Path, poisoned: int
) -> None:
    options = ("--save-every", 1)
    assert sft(model_folder, data_file, tmp_path / "run", *options).returncode == 0
    before = (tmp_path / "run/skipped.jsonl").read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "run/checkpoints/step_000007")
    for _ in range(2):  # from step 6, then from step 7
        assert sft(model_folder, data_file, tmp_path / "run", *options, "--resume", "auto").returncode == 0
    assert (tmp_path / "run/skipped.jsonl").read_text(encoding="utf-8") == before
    bad_step = next(step for step in range(7) if poisoned in batch_indices(step, 50, 8, seed=0))
    assert json.loads(before)["step"] == bad_step + 1


def test_skipped_steps_change_no_weight_and_have_a_limit(
    tmp_path: Path, model_folder: Path, data_file: Path, poisoned: int
) -> None:
    options = ("--global-batch-size", 50, "--weight-decay", 0.1)  # every step has the bad sample
    assert sft(model_folder, data_file, tmp_path / "five", *options, "--epochs", 5).returncode == 0
    before, after = load_file(model_folder / "model.safetensors"), load_file(tmp_path / "five/hf/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    result = sft(model_folder, data_file, tmp_path / "six", *options, "--epochs", 6)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "step 6: loss nan, gradient norm nan; 5 such steps are skipped, this is one more; its samples: test " in (
        result.stderr
    )
    assert not (tmp_path / "six/hf").exists()


def test_long_answers_are_dropped_on_demand(tmp_path: Path, model_folder: Path, data_file: Path) -> None:
    result = sft(model_folder, data_file, tmp_path / "run", "--max-length", 40, "--too-long", "drop")
    assert result.returncode == 0, result.stderr
    lengths = lengths_of(model_folder, data_file)
    kept = sum(length <= 40 for length in lengths)
    assert 0 < kept < 50
    assert f"{kept} samples, 0 with their answer cut at 40 tokens, {50 - kept} left out" in result.stderr
    assert sum(row["tokens"] for row in metrics_of(tmp_path / "run")) == sum(n - 1 for n in lengths if n <= 40)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.gloo)])
def test_sigterm_saves_and_the_run_goes_on_from_there(
    tmp_path: Path, model_folder: Path, data_file: Path, ranks: int
) -> None:
    """Only one rank is told, as when a scheduler is sloppy: all of them stop after the same step."""
    options, output = ("--epochs", 30), tmp_path / "run"
    paths = ("--model", model_folder, "--data", data_file, "--output-dir", output)
    process = subprocess.Popen(
        command("train_sft.py", *paths, *OPTIONS, *options, ranks=ranks),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    wait_for_rows(output, 3, process)
    told = process.pid if ranks == 1 else int(subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()[-1])
    os.kill(told, signal.SIGTERM)
    os.kill(told, signal.SIGTERM)  # a scheduler's and torchrun's
    _, stderr = process.communicate(timeout=120)
    stopped = len(metrics_of(output))
    assert 3 <= stopped < 210
    assert stderr.count(f"SIGTERM: saved after step {stopped} of 210; go on with --resume auto") == 1
    assert process.returncode == 143 if ranks == 1 else process.returncode != 0
    assert not (output / "hf").exists()
    again = sft(model_folder, data_file, output, *options, "--resume", "auto")  # on one rank
    assert again.returncode == 0, again.stderr
    rows = metrics_of(output)
    assert [row["step"] for row in rows] == list(range(1, 211))
    if ranks == 1:
        assert sft(model_folder, data_file, tmp_path / "whole", *options).returncode == 0
        assert rows == metrics_of(tmp_path / "whole")


def test_other_data_under_the_old_name_is_noticed(tmp_path: Path, model_folder: Path, data_file: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(data_file.read_bytes())
    options = ("--save-every", 3, "--eval-data", data_file)
    assert sft(model_folder, data, tmp_path / "run", *options).returncode == 0
    moved = data.rename(tmp_path / "moved.jsonl")
    assert sft(model_folder, moved, tmp_path / "run", *options, "--resume", "auto").returncode == 0
    moved.write_text(data_file.read_text(encoding="utf-8").replace("質問7", "質問8"), encoding="utf-8")
    result = sft(model_folder, moved, tmp_path / "run", *options, "--resume", "auto")
    assert result.returncode == 2
    assert "data: not what the checkpoint was trained on" in result.stderr


def test_show_data_prints_and_trains_nothing(tmp_path: Path, model_folder: Path, data_file: Path) -> None:
    result = sft(model_folder, data_file, tmp_path / "run", "--show-data", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("### 応答:") == 2 and "</s>" in result.stdout
    assert not (tmp_path / "run").exists()


def test_data_of_an_evaluation_set_is_refused_unless_told_otherwise(
    tmp_path: Path, model_folder: Path, data_file: Path
) -> None:
    """One record of the demo's own evaluation set, which is always checked, and one of a set named with --guard."""
    rows = [json.loads(line) for line in data_file.read_text(encoding="utf-8").splitlines()]
    demo = load_examples(str(ROOT / "kaja/demo_data/evaluation/safety.jsonl"))[0]
    rows[3]["question"], rows[5]["question"] = f"次の質問に答えて。\n{demo.question}", "湖の水はなぜ冬に底から凍らないのですか。"
    write_jsonl(tmp_path / "data.jsonl", rows)
    write_jsonl(tmp_path / "own.jsonl", [{**rows[5], "id": "q1"}])
    result = sft(model_folder, tmp_path / "data.jsonl", tmp_path / "run")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: data: 1 of 50 records are in evaluation sets (demo-safety: 1), the first: question of 'test 3'" in (
        result.stderr
    )
    guard = ("--guard", tmp_path / "own.jsonl")
    result = sft(model_folder, tmp_path / "data.jsonl", tmp_path / "two", *guard)
    assert result.returncode == 2 and "2 of 50 records are in evaluation sets" in result.stderr
    result = sft(model_folder, tmp_path / "data.jsonl", tmp_path / "on", "--allow-contaminated", *guard)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning: data: 2 of 50 records are in evaluation sets") == 1
    # Another guard computes nothing else: the run may be gone on with.
    result = sft(model_folder, data_file, tmp_path / "on", "--resume", "auto")
    assert result.returncode == 0, result.stderr


def test_long_samples_are_cut_or_left_out_and_counted(tmp_path: Path, model_folder: Path, data_file: Path) -> None:
    result = sft(model_folder, data_file, tmp_path / "run", "--max-length", 40)
    assert result.returncode == 0, result.stderr
    lengths = lengths_of(model_folder, data_file)
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
        (("--data",), "data: no training file; name at least one with --data"),
        (("--eval-every", "2"), "eval_every 2: there is nothing to evaluate; name files with --eval-data"),
        (("--replicas", "2"), "replicas 2 with 1 ranks: it must divide the number of ranks; nearest possible: 1"),
        (("--batch-unit", "chunks", "--max-length", "300"), "max_length 300: the model's context is 256 tokens"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, model_folder: Path, data_file: Path, options: tuple[str, ...], expected: str
) -> None:
    result = sft(model_folder, data_file, tmp_path / "run", *options)
    assert result.returncode == 2
    assert expected in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "hf").exists()
