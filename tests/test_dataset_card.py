"""What a synthesis leaves: the files, the card, the page; with numbers counted by hand."""

import importlib.util
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kaja.data import Example, load_examples
from kaja.dataset_card import (
    SAMPLES, TERMS, Contents, choose_samples, hold_out, histogram, median, pairs_of, render_card, render_samples,
    table, to_example, write_pairs,
)  # fmt: skip
from kaja.synthesis import Settings

SETTINGS = Settings(
    target=4, temperature=0.5, batch_size=8, max_question_tokens=9, max_answer_tokens=9, max_question_chars=99,
    max_answer_chars=99, min_japanese=0.5, near_duplicates=0.8, keep_bare_refusals=False, max_length=99,
    max_attempts=10, min_judge_score=0.0, seed=7,
)  # fmt: skip
FUNNEL = {
    "target": 4, "attempts": 1234, "pairs": 4, "rounds": 3, "teacher_tokens": {"prompt": 5000, "completion": 1700},
    "sources": [
        {"source": "answer_carefully", "stream": "safety", "seeds": 5, "wanted": 2, "attempts": 1200, "pairs": 2,
         "categories": {"詐欺|盗み": {"attempts": 1000, "pairs": 1}, "<差別>": {"attempts": 200, "pairs": 1}}},
        {"source": "mine", "stream": "helpfulness", "seeds": 1, "wanted": 2, "attempts": 34, "pairs": 2,
         "categories": {}},
    ],
    "filters": [
        {"filter": "question: no Q:", "in": 1234, "cut": 1000},
        {"filter": "answer: unfinished", "in": 234, "cut": 230},
        {"filter": "answer: in an evaluation set", "in": 4, "cut": 0},
        {"filter": "judge: no verdict", "in": 4, "cut": 0},
    ],
    "evaluation_sets": {"demo": 288, "ac|test": 1336},
}  # fmt: skip


def row(attempt: int, stream: str = "safety", **changes: Any) -> dict[str, Any]:
    return {
        "attempt": attempt, "source": "answer_carefully", "stream": stream, "seed_id": "s1", "sampling_seed": 99,
        "cut": "", "question": f"質問{attempt}", "answer": "答え" * attempt, **changes,
    }  # fmt: skip


def example(attempt: int, stream: str = "safety", **changes: Any) -> Example:
    return to_example(row(attempt, stream, **changes), "teacher/x", SETTINGS, ["format"])


def test_a_pair_knows_where_it_came_from() -> None:
    pair = example(12, score=4.0)
    assert (pair.id, pair.source, pair.stream, pair.question) == ("synth-0000012", "synth", "safety", "質問12")
    assert pair.meta == {
        "seed_source": "answer_carefully", "seed_id": "s1", "teacher": "teacher/x", "prompt_version": "slides-1",
        "temperature": 0.5, "sampling_seed": 99, "filters": ["format"], "judge_score": 4.0,
    }  # fmt: skip
    assert "judge_score" not in example(12).meta


def test_pairs_are_put_together_from_the_rounds_that_they_went_through() -> None:
    def question(attempt: int) -> dict[str, Any]:
        return {"attempt": attempt, "cut": "", "question": f"q{attempt}"}

    rounds = [
        {"questions": [question(0), question(1), question(2)], "answers": [], "verdicts": []},
        {"questions": [question(3)], "answers": [{"attempt": n, "cut": "", "answer": f"a{n}"} for n in range(3)],
         "verdicts": []},
        {"questions": [], "answers": [{"attempt": 3, "cut": "", "answer": "a3"}],
         "verdicts": [{"attempt": n, "cut": "", "score": n} for n in (2, 1)]},
        {"questions": [], "answers": [], "verdicts": [{"attempt": 3, "cut": "low", "score": 0}]},
    ]  # fmt: skip
    unjudged = [{**one, "verdicts": []} for one in rounds]
    found = [(r["attempt"], r["question"], r["answer"]) for r in pairs_of(unjudged, {0, 2, 3}, judged=False)]
    assert found == [(0, "q0", "a0"), (2, "q2", "a2"), (3, "q3", "a3")]
    judged = [(r["attempt"], r["answer"], r["score"]) for r in pairs_of(rounds, {1, 2}, judged=True)]
    assert judged == [(2, "a2", 2), (1, "a1", 1)]


def test_hold_out_takes_the_same_share_of_every_stream() -> None:
    accepted = {"safety": list(range(0, 40)), "helpfulness": list(range(100, 160))}
    held = hold_out(accepted, 0.1, seed=0)
    assert len(held & set(accepted["safety"])) == 4 and len(held & set(accepted["helpfulness"])) == 6
    assert hold_out(accepted, 0.0, seed=0) == set() and hold_out(accepted, 0.1, seed=1) != held
    assert hold_out(accepted, 0.1, seed=0) == held


def test_the_files_are_what_the_trainers_read(tmp_path: Path) -> None:
    pairs = [example(1), example(2, "helpfulness"), example(3), example(4, "helpfulness", answer="<b>\u2028改行\n")]
    contents = write_pairs(tmp_path, iter(pairs), {"synth-0000003"}, {"synth-0000002", "synth-0000003"})
    assert load_examples(f"{tmp_path}/train.jsonl") == [pairs[0], pairs[1], pairs[3]]
    assert load_examples(f"{tmp_path}/validation.jsonl") == [pairs[2]]
    assert contents.counts == {"train": {"safety": 1, "helpfulness": 2}, "validation": {"safety": 1}}
    assert contents.lengths["safety", "answer"] == Counter({2: 1, 6: 1})
    assert contents.samples == [pairs[1], pairs[2]]


def contents_of(*pairs: Example) -> Contents:
    contents = Contents()
    for number, pair in enumerate(pairs):
        contents.add("train" if number else "validation", pair, sampled=True)
    return contents


CONTENTS = contents_of(example(1), example(2), example(3, "helpfulness"), example(4, "helpfulness"))


def test_the_card_has_the_counts() -> None:
    card = render_card(CONTENTS, FUNNEL, "cyberagent/calm3-22b-chat", SETTINGS)
    assert "| safety | 1 | 1 | 2 |\n| helpfulness | 2 | 0 | 2 |\n| all | 3 | 1 | 4 |" in card
    assert "| answer_carefully (safety) | 5 | 2 | 1,200 | 2 | 0.2% |" in card
    assert "| — 詐欺\\|盗み |  |  | 1,000 | 1 | 0.1% |\n| — &lt;差別&gt; |  |  | 200 | 1 | 0.5% |" in card
    assert "| question: no Q: | 1,234 | 1,000 | 81.0% |\n| answer: unfinished | 234 | 230 | 98.3% |" in card
    assert "Of 1,234 attempts in 3 rounds 4 made a pair. The teacher read 5,000 tokens and wrote 1,700." in card
    assert "safety, answers (mean 3, median 2, longest 4)" in card
    assert "judge: no verdict" not in card
    judged = render_card(CONTENTS, FUNNEL, "cyberagent/calm3-22b-chat", replace(SETTINGS, min_judge_score=4.0))
    assert "| judge: no verdict | 4 | 0 | 0.0% |" in judged and "judge_score" in judged


def test_the_card_says_what_was_compared_and_asked_and_no_more() -> None:
    card = render_card(CONTENTS, FUNNEL, "x", SETTINGS)
    assert "evaluation sets, and with no others: demo (288 examples), ac\\|test (1,336 examples)." in card
    assert "| answer: in an evaluation set | 4 | 0 | 0.0% |" in card
    assert "and refusals without a reason; that every harmful question is turned down was not checked" in card
    card = render_card(
        CONTENTS, FUNNEL | {"evaluation_sets": {}}, "x", replace(SETTINGS, keep_bare_refusals=True)
    )  # fmt: skip
    assert "compared with no evaluation set." in card and "| answer: in an evaluation set" not in card
    assert "without a reason" not in card


def test_the_card_has_the_terms_of_every_source_and_the_teacher() -> None:
    card = render_card(CONTENTS, FUNNEL, "cyberagent/calm3-22b-chat", SETTINGS)
    assert f"- {TERMS['answer_carefully']}" in card and "serves that purpose only" in card
    assert "- mine: not known to kaja" in card and "ELYZA" not in card
    assert "what the licence of `cyberagent/calm3-22b-chat` says" in card
    assert "is the script of kaja's demo" in render_card(CONTENTS, FUNNEL, "scripted", SETTINGS)


def test_without_pairs_the_head_names_no_files() -> None:
    assert "configs" not in render_card(Contents(), FUNNEL, "x", SETTINGS).split("---\n")[1]


def test_the_head_names_the_files_of_the_splits_that_there_are() -> None:
    head = render_card(CONTENTS, FUNNEL, "x", SETTINGS).split("---\n")[1]
    assert "size_categories:\n- n<1K\n" in head and "language:\n- ja\n" in head
    assert head.endswith(
        "configs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: train.jsonl\n  - split: validation\n    path: validation.jsonl\n"
    )
    only_train = contents_of(example(1), example(2))
    only_train.counts["validation"].clear()
    assert "validation" not in render_card(only_train, FUNNEL, "x", SETTINGS).split("---\n")[1]


def test_an_empty_set_has_a_card_too() -> None:
    card = render_card(Contents(), FUNNEL, "x", SETTINGS)
    assert "| all | 0 | 0 | 0 |" in card


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
def test_datasets_loads_the_folder_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import load_dataset

    pairs = [example(number) for number in range(1, 6)]
    contents = write_pairs(tmp_path, iter(pairs), {"synth-0000003"}, set())
    (tmp_path / "README.md").write_text(render_card(contents, FUNNEL, "x", SETTINGS), encoding="utf-8")
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "00000.jsonl").write_text('{"seeds": "x"}\n', encoding="utf-8")
    (tmp_path / "failed.jsonl").write_text('{"error": "x"}\n', encoding="utf-8")
    loaded = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == {"train": 4, "validation": 1}
    assert loaded["train"][3]["meta"]["filters"] == ["format"] and loaded["validation"][0]["id"] == "synth-0000003"


def test_histogram_and_median() -> None:
    lengths = Counter({0: 1, 4: 2, 9: 4, 10: 1, 19: 8})  # 10 bars of 2
    lines = histogram(lengths).split("\n")
    assert len(lines) == 10
    assert lines[0] == " 0 - 1  █████ 1" and lines[4] == f" 8 - 9  {'█' * 20} 4" and lines[9] == f"18 - 19 {'█' * 40} 8"
    assert lines[1] == " 2 - 3   0"
    assert histogram(Counter({3: 2})) == f"0 - 0  0\n1 - 1  0\n2 - 2  0\n3 - 3 {'█' * 40} 2"
    assert (median(lengths), median(Counter({5: 1})), median(Counter({1: 1, 3: 1}))) == (10, 5, 1)


def test_tables_hold_any_text() -> None:
    assert table(["a", "b"], [["x|y\nz", 1234567]]) == "| a | b |\n|---|---:|\n| x\\|y z | 1,234,567 |"


class Texts(HTMLParser):
    """The texts of all dd elements, and the names of all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.texts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.inside = tag == "dd"
        if self.inside:
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "dd"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data


def test_the_page_shows_texts_as_text_and_loads_nothing() -> None:
    evil = "<script>alert(1)</script>\n&amp;<img src=x onerror=alert(1)>"
    pairs = [example(1, question=evil, answer="答え<b>"), example(2, score=4.5, seed_id='"><i>')]
    asked = {"s1": "もとの<質問>", '"><i>': "二"}
    seeds = [Example(number, "answer_carefully", "safety", question) for number, question in asked.items()]
    page = render_samples(pairs, seeds, 1234)
    parser = Texts()
    parser.feed(page)
    assert parser.texts == ["もとの<質問>", evil, "答え<b>", "二", "質問2", "答え答え"]
    assert not parser.names & {"script", "img", "b1", "i", "link", "iframe"}
    assert "2 of 1,234 synthetic pairs" in page and "judge 4.5" in page
    assert "default-src 'none'" in page and not re.search(r"https?:|@import|url\(", page)


def test_samples_are_drawn_from_all_pairs_once() -> None:
    accepted = {"safety": list(range(0, 2000, 2)), "borderline": list(range(1, 1000, 2))}
    chosen = choose_samples(accepted, seed=0)
    assert len(chosen) == SAMPLES and chosen <= set(range(2000))
    assert 50 < len([number for number in chosen if number % 2 == 0]) < 85  # two thirds
    assert choose_samples(accepted, seed=0) == chosen != choose_samples(accepted, seed=1)
    assert choose_samples({"safety": [3, 5]}, seed=0) == {3, 5}
