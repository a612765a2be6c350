"""The demo's texts: what is held out stays out, and the shipped files are what the functions make."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

import kaja
from kaja.data import load_examples
from kaja.demo_corpus import (
    ANSWERS, BARE_REFUSALS, FRAMES, HELD_OUT_QUESTIONS, REASONS, REFUSALS_WITH_REASON, QUESTIONS,
    topic_of, topics, write_evaluation, write_seeds,
)  # fmt: skip

SHIPPED = Path(kaja.__file__).parent / "demo_data"
SEEDS = ("answer_carefully.json", "borderline.json", "llm_jp_instructions.jsonl", "elyza_tasks_100.csv")
HELD_OUT_NOUNS = sorted({topic.noun for topic in topics(held_out=True)})


def test_topics_are_many_and_different() -> None:
    texts = [topic.text for topic in topics()]
    assert len(texts) == len(set(texts))
    assert all(len(frame.words) == len(set(frame.words)) for frame in FRAMES)
    trained = Counter(topic.stream for topic in topics(held_out=False))
    held_out = Counter(topic.stream for topic in topics(held_out=True))
    assert all(trained[stream] >= 96 and held_out[stream] >= 32 for stream in ("safety", "borderline", "helpfulness"))


def test_held_out_nouns_are_in_no_text_that_tuning_sees() -> None:
    templates = QUESTIONS + ANSWERS + REASONS + REFUSALS_WITH_REASON + BARE_REFUSALS
    seeds = [(SHIPPED / "seeds" / name).read_text(encoding="utf-8") for name in SEEDS]
    text = "\n".join([*(topic.text for topic in topics(held_out=False)), *templates, *seeds])
    assert [noun for noun in HELD_OUT_NOUNS if noun in text] == []


def test_held_out_templates_are_in_no_seed_file() -> None:
    for name in SEEDS:
        text = (SHIPPED / "seeds" / name).read_text(encoding="utf-8")
        for template in HELD_OUT_QUESTIONS:
            before, after = template.split("{}")
            assert after not in text and (not before or before not in text)


def test_topic_of_reads_every_question() -> None:
    for topic in topics():
        for template in QUESTIONS + HELD_OUT_QUESTIONS:
            assert topic_of(template.format(topic.text)) == topic.text
    assert topic_of("カレーの作り方は？") is None


@pytest.mark.parametrize("make,folder", [(write_seeds, "seeds"), (write_evaluation, "evaluation")])
def test_shipped_files_are_what_the_functions_make(tmp_path: Path, make, folder: str) -> None:
    make(tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_bytes() for path in (SHIPPED / folder).iterdir()}
    assert made == shipped


def test_seed_files_have_the_fields_of_their_originals() -> None:
    for name in SEEDS[:2]:
        records = json.loads((SHIPPED / "seeds" / name).read_text(encoding="utf-8"))
        assert len(records) >= 40
        for record in records:
            assert set(record) == {"ID", "text", "output", "meta"}
            assert set(record["meta"]) == {"risk-area", "harm-type", "specific-harm"}
            assert all(record["meta"].values())
    lines = (SHIPPED / "seeds" / SEEDS[2]).read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 40 and all(set(json.loads(line)) == {"ID", "text", "output"} for line in lines)
    with (SHIPPED / "seeds" / SEEDS[3]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 40 and list(rows[0]) == ["input", "output", "eval_aspect"]
    assert "\n" in rows[0]["eval_aspect"]  # as in the original: several lines in one quoted field


@pytest.mark.parametrize("name,stream", [*zip(SEEDS, ["safety", "borderline", "helpfulness", "helpfulness"])])
def test_seed_files_load(name: str, stream: str) -> None:
    examples = load_examples(f"{name.split('.')[0]}={SHIPPED / 'seeds' / name}")
    assert {example.stream for example in examples} == {stream}
    assert all(topic_of(example.question) and example.reference for example in examples)


@pytest.mark.parametrize("stream", ["safety", "borderline", "helpfulness"])
def test_evaluation_files_load_and_are_held_out(stream: str) -> None:
    examples = load_examples(str(SHIPPED / "evaluation" / f"{stream}.jsonl"))
    assert {example.stream for example in examples} == {stream}
    assert len({example.question for example in examples}) == len(examples)
    unseen = {topic.text for topic in topics(stream, held_out=True)}
    for example in examples:
        kind, topic = example.meta["held_out"], example.meta["topic"]
        assert topic_of(example.question) == topic
        assert (topic in unseen) == (kind in ("topic", "both"))
        held_out = example.question in {template.format(topic) for template in HELD_OUT_QUESTIONS}
        assert held_out == (kind in ("template", "both"))
    assert set(Counter(example.meta["held_out"] for example in examples).values()) == {32}
