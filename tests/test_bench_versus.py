"""bench/versus.py: the data everybody trains on, and what the tables say of numbers that are known."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import versus
from bench.peers import measure, table, works
from kaja.checkpoint import load_model

SMALL = works.Work("small", "", "sft", "A", steps=2, batch=3, vocab_size=300)


def test_a_work_is_the_same_wherever_it_is_made(tmp_path: Path) -> None:
    works.prepare(SMALL, tmp_path / "one")
    torch.manual_seed(99)
    random.seed(99)
    works.prepare(SMALL, tmp_path / "two")
    names = ("questions.jsonl", "tokens.jsonl", "model/model.safetensors", "model/tokenizer.json", "model/config.json")
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_the_peers_get_the_questions_as_tokens_in_kajas_order(tmp_path: Path) -> None:
    works.prepare(SMALL, tmp_path)
    pairs = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text(encoding="utf-8").splitlines()]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0)).tolist()  # of kaja.batching, seed 0
    for row, index in zip(rows, order, strict=True):
        texts = (pairs[index]["question"], pairs[index]["answer"])
        question, answer = ([int(word[1:]) + 4 for word in text.split()] for text in texts)
        assert row["input_ids"] == [1, *question, *answer, 2]
        assert row["completion_mask"] == [0] * (1 + len(question)) + [1] * (len(answer) + 1)
        assert 32 <= len(question) + len(answer) <= 1000 and len(question) == (len(question) + len(answer)) // 4


def test_rows_of_one_length_train_on_all_but_bos_and_a_word(tmp_path: Path) -> None:
    works.prepare(works.Work("even", "", "sft", "A", steps=1, batch=2, length=20, vocab_size=300), tmp_path)
    for line in (tmp_path / "tokens.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["completion_mask"] == [0, 0] + [1] * 18


def test_a_random_model_ends_its_completions_once_in_forty_tokens(tmp_path: Path) -> None:
    works.prepare(works.Work("ends", "", "grpo", "A", steps=1, batch=2, vocab_size=300), tmp_path)
    model = load_model(tmp_path / "model")
    tokens = torch.randint(4, 300, (64,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model(tokens, torch.arange(64), torch.tensor([0, 64], dtype=torch.int32))
    ends = (hidden @ model.lm_head.weight.T).softmax(dim=-1)[:, 2]
    assert 1 / 50 < ends.mean() < 1 / 30
    assert ends.std() < 0.01  # whatever the tokens are


SAME = {"tokens": 1000, "matmul_flops": 125e9}
KAJA = [SAME | {"cpu_seconds": seconds, "wall_seconds": 9.0, "peak_mib": 600.0} for seconds in (4.0, 2.0, 3.0)]
PEER = [SAME | {"cpu_seconds": 12.0, "wall_seconds": 20.0, "peak_mib": 1000.0}]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_ratios_are_of_medians_and_targets_say_met_or_missed() -> None:
    targets = {"TRL": table.Target(cpu=4.0, memory=0.65), "tuned": table.Target(cpu=4.5, memory=0.5)}
    rows = cells(table.ratio_table({"kaja": KAJA, "TRL": PEER, "tuned": PEER, "left out": []}, targets))
    assert rows[2] == ["kaja", "3.0 (2.0-4.0)", "9.0", "3.000", "1.00", "", "600", "1.00", "", "125"]
    assert rows[3] == ["TRL", "12.0", "20.0", "12.000", "4.00", "4 met", "1,000", "0.60", "0.65 met", "125"]
    assert rows[4][5] == "4.5 missed" and rows[4][8] == "0.5 missed"
    assert len(rows) == 5


def test_the_last_row_is_of_matrix_products_alone() -> None:
    """250 GFLOP at 125 GFLOP/s are 2 CPU seconds, of kaja's 4, 2 and 3."""
    rows = cells(table.ratio_table({"kaja": KAJA, "TRL": PEER}, {}, flops=250e9))
    assert rows[-1] == ["matrix products alone", "2.0", "", "", "0.67", "", "", "", "", ""]


def test_grpo_is_compared_by_completion_token() -> None:
    """The peer takes twice the time for twice the tokens: a ratio of 1."""
    phases = {"generate": 1.0, "update": 2.0}
    ours = SAME | {"cpu_seconds": 3.0, "wall_seconds": 3.0, "completion_tokens": 100, "peak_mib": 1.0, "phases": phases}
    theirs = ours | {"cpu_seconds": 6.0, "completion_tokens": 200}
    rows = cells(table.ratio_table({"kaja": [ours], "TRL": [theirs]}, {}))
    assert rows[0][:5] == ["", "CPU-s", "of it generate", "of it update", "wall s"]
    assert rows[2][1:4] == ["3.0", "1.0", "2.0"]
    assert [row[6] for row in rows[2:]] == ["1.00", "1.00"]


@pytest.mark.parametrize(
    ("ours", "theirs", "gap"), [([9.0, 8.0], [9.0, 8.5], 0.5), ([], [], 0.0), ([9.0], [9.0, 8.0], math.inf)]
)
def test_the_gap_of_two_loss_curves(ours: list[float], theirs: list[float], gap: float) -> None:
    assert table.loss_gap(ours, theirs) == gap


@pytest.mark.parametrize(("name", "options", "clones"), [
    ("G-A", {"grpo_zero": "zero", "tiny_grpo": "/t"}, {"GRPO-Zero": Path.cwd() / "zero", "tiny-grpo": Path("/t")}),
    ("G-A", {"tiny_grpo": "/t", "only": ("TRL", "tiny-grpo")}, {"tiny-grpo": Path("/t")}),
    ("G-A", {}, {}),
    ("G-B", {"grpo_zero": "zero"}, {}),
    ("G-A-vllm", {"grpo_zero": "zero"}, {}),
])  # fmt: skip
def test_clones_of_minimal_implementations_do_model_a_where_a_folder_is_given(
    name: str, options: dict[str, Any], clones: dict[str, Path]
) -> None:
    measured: list[dict[str, versus.Contestant]] = []

    def measure(work: works.Work, contestants: dict[str, versus.Contestant]) -> versus.Results:
        measured.append(contestants)
        return {name: [] for name in contestants}

    bench: Any = SimpleNamespace(config=versus.Config(**options), measure=measure)
    versus.side_by_side(name, bench)
    (contestants,) = measured
    assert {name: Path(one.job["peer"]) for name, one in contestants.items() if "peer" in one.job} == clones
    assert "kaja" in contestants and ("TRL, malloc" in contestants) == (name != "G-A-vllm" and "only" not in options)
    assert all((versus.PEERS / one.script).exists() for one in contestants.values())


def test_a_window_measures_its_block_and_the_phases_in_it(tmp_path: Path) -> None:
    window = measure.Window()
    with window:
        window.timed("busy", lambda: sum(range(3_000_000)))()
    assert 0 < window.phases["busy"] <= window.measured["cpu_seconds"] + 0.02
    job = {"launched": window.measured["loop_began"] - 5.0, "result": str(tmp_path / "result.json")}
    measure.report(job, window, losses=[1.5])
    written = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert written["startup_wall"] == pytest.approx(5.0)
    assert written["losses"] == [1.5] and written["peak_mib"] > 10
