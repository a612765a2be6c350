"""The pipeline with a teacher that makes every kind of mistake, and synth.py as users launch it."""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import command, run_script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from kaja.chat import Chat
from kaja.data import Example, load_examples
from kaja.demo_corpus import DEMO_DATA
from kaja.engine import Completion
from kaja.errors import UserError
from kaja.rubric import RUBRIC_VERSION, answer_messages, question_messages
from kaja.synthesis import (
    CUTS,
    SURPLUS,
    Row,
    Settings,
    Synthesis,
    finished_batches,
    fingerprint,
    hold_out,
    read_completion,
    run_batch,
    to_examples,
    usable_seeds,
)

SETTINGS = Settings(
    target=60, temperature=0.5, batch_size=24, max_question_tokens=200, max_answer_tokens=300,
    max_question_chars=60, max_answer_chars=80, max_length=4000, max_attempts=10, seed=0,
)  # fmt: skip
SEEDS = [
    Example(f"{source}-{number}", source, stream, f"{source}の質問その{number}です。")
    for source, stream in (("ac", "safety"), ("border", "borderline"), ("instructions", "helpfulness"))
    for number in range(7)
]


def make_chat() -> Chat:
    """A byte is a token; BOS 1, EOS 2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: index for index, name in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Chat(tokenizer, "llm-jp-3", 1, 2)


CHAT = make_chat()


def complete(text: str, max_tokens: int = 10_000) -> Completion:
    turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": text}]
    prompt = CHAT.encode_prompt(turns[:1])
    tokens = CHAT.encode(turns).input_ids[len(prompt):]
    reason = "stop" if len(tokens) <= max_tokens else "length"
    return Completion(tokens[:max_tokens], [0.0] * len(tokens[:max_tokens]), reason)


class FlawedTeacher:
    """Answers the slides' prompts; most of what it says has one of the flaws that the filters look for."""

    def __init__(self) -> None:
        self.calls = 0
        self.asked: list[str] = []

    def generate(
        self,
        prompts: list[list[int]],
        *,
        group_size: int = 1,
        max_tokens: int,
        temperature: float = 1.0,
        seeds: list[int],
    ) -> list[list[Completion]]:
        assert group_size == 1 and temperature == 0.5 and len(seeds) == len(prompts)
        self.calls += 1
        texts = [CHAT.decode(prompt) for prompt in prompts]
        self.asked += texts
        return [[complete(self.say(text, seed), max_tokens)] for text, seed in zip(texts, seeds)]

    def say(self, prompt: str, seed: int) -> str:
        rng = random.Random(f"{seed} {prompt}")
        if "参考質問:" in prompt:
            good = f"{rng.randrange(10**6)}番目の似た質問です。"
            copied = "ac の 質問その３です。"  # another source's seed, in other widths and spaces
            return rng.choice([
                f"Q: {good}", f"Q：{good}", f"Ｑ: {good}", f"  Q:\n{good}\n", f"Q: {good}", f"Q: {good}",
                good, "", f"はい。Q: {good}", f"Q: {good}\nQ: {good}", f"Q: {good}\nA: {good}", "Q:", "Q: 何",
                "Q: " + good * 5, "Q: " + good * 30, f"Q: {copied}", "Q: いつも同じ質問です。",
            ])  # fmt: skip
        question = prompt.split("Q: ")[1].split("\n")[0]
        good = f"お答えできません。その理由は{question}"
        return rng.choice([
            f"A: {good}", f"A：{good}", f"A: {good}", f"A: {good}", f"A: {good}", "A: 1. はい\n2. いいえ",
            good, f"A: {good}\nA: {good}", f"A: {good}\nQ: {good}", "A:", "A: ：", "A: " + good * 3,
            "A: " + good * 30, "A: お答えできません。その理由は、", "A: 犯罪にあたるか",
        ])  # fmt: skip

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        raise NotImplementedError

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        raise NotImplementedError

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def synthesize(settings: Settings = SETTINGS, seeds: list[Example] = SEEDS) -> tuple[Synthesis, list[list[Row]]]:
    synthesis, batches, teacher = Synthesis(seeds, settings), [], FlawedTeacher()
    while batch := synthesis.plan():
        assert len(batch) <= settings.batch_size + len(synthesis.seeds)
        batches.append(run_batch(synthesis, batch, teacher, CHAT))
        synthesis.add(batches[-1])
    return synthesis, batches


@pytest.mark.parametrize(
    "kind, text, cut",
    [
        ("question", "Q: パンの作り方は？", ""),
        ("question", "Ｑ：パンの作り方は？ ", ""),
        ("question", "Q:パンの作り方は？", ""),
        ("question", "パンの作り方は？", "no Q:"),
        ("question", "A: パンの作り方は？", "no Q:"),
        ("question", "質問です。\nQ: パンの作り方は？", "no Q:"),
        ("question", "", "no Q:"),
        ("question", "Q: パンの作り方は？\n Q：何？", "more than one"),
        ("question", "Q: パンの作り方は？\nA: 練ります。", "more than one"),
        ("question", "Q: 「Q: A:」とは何の略？", ""),
        ("question", "Q: \n", "empty"),
        ("question", "Q: 何？", "too short"),
        ("question", "Q: " + "パ" * 61, "too long"),
        ("question", "Q: パンの作り方を教えて", ""),
        ("answer", "A: 粉を練ります。", ""),
        ("answer", "A: 次のとおりです。\n1. 粉を練る\n2. 焼く", ""),
        ("answer", "A: 次のとおりです。\n- 焼く", ""),
        ("answer", "A: 「粉を練ります」", ""),
        ("answer", "A: 合計は30", ""),
        ("answer", "A: 粉を練ってから、", "unfinished"),
        ("answer", "A: 粉を練ります。そして焼", "unfinished"),
        ("answer", "Q: 粉を練ります。", "no A:"),
        ("answer", "A: ：", "too short"),
    ],
)
def test_marks_and_filters(kind: str, text: str, cut: str) -> None:
    expected = (f"{kind}: {cut}", text.strip()) if cut else ("", text.strip()[1:].lstrip(":： "))
    assert read_completion(kind, complete(text), CHAT, 60) == expected


def test_a_completion_that_met_the_limit_is_cut_whatever_it_says() -> None:
    completion = complete("Q: パンの作り方は？", max_tokens=12)
    assert read_completion("question", completion, CHAT, 60)[0] == "question: cut off"


def test_the_set_is_full_even_clean_and_traceable() -> None:
    synthesis, _ = synthesize()
    examples = to_examples(synthesis, "flawed")
    assert len(examples) == 60 and synthesis.why_not_reached() == ""
    assert Counter(example.stream for example in examples) == {"safety": 20, "borderline": 20, "helpfulness": 20}
    assert len({example.id for example in examples}) == len({example.question for example in examples}) == 60
    by_seed = {(seed.source, seed.id): seed for seed in SEEDS}
    used = Counter()
    for example in examples:
        assert example.question.endswith("番目の似た質問です。") or example.question == "いつも同じ質問です。"
        assert example.reference == f"お答えできません。その理由は{example.question}" or example.reference[0] == "1"
        assert by_seed[example.meta["seed_source"], example.meta["seed_id"]].stream == example.stream
        assert (example.meta["teacher"], example.meta["prompt_version"]) == ("flawed", RUBRIC_VERSION)
        used[example.meta["seed_source"], example.meta["seed_id"]] += 1
    assert len(used) >= 18  # all seeds take turns


def test_seeds_take_turns() -> None:
    synthesis = Synthesis(SEEDS, SETTINGS)
    turns = [synthesis.seed_of_turn(("ac", "safety"), turn).id for turn in range(21)]
    rounds = [turns[:7], turns[7:14], turns[14:]]
    assert all(sorted(one) == sorted(rounds[0]) for one in rounds) and rounds[0] != rounds[1]


def test_the_funnel_adds_up_and_knows_every_flaw() -> None:
    synthesis, batches = synthesize(replace(SETTINGS, target=150))
    funnel = synthesis.funnel()
    rows = [row for batch in batches for row in batch]
    assert funnel["attempts"] == len(rows) == sum(source["attempts"] for source in funnel["sources"])
    left = funnel["attempts"]
    for step in funnel["filters"]:
        assert step["in"] == left
        left -= step["cut"]
        assert ("example" in step) == (step["cut"] > 0)
        if step["filter"] != SURPLUS:
            assert step["cut"] == sum(row["cut"] == step["filter"] for row in rows)
    assert left == funnel["pairs"] == 150
    assert {row["cut"] for row in rows} == {"", *CUTS}
    steps = {step["filter"]: step for step in funnel["filters"]}
    assert steps["question: copied from a seed"]["example"]["question"] == "ac の 質問その３です。"
    assert steps["answer: no A:"]["example"]["answer"].startswith("お答えできません。")


def test_the_teacher_gets_the_prompts_of_the_slides_and_its_own_question() -> None:
    synthesis, teacher = Synthesis(SEEDS, SETTINGS), FlawedTeacher()
    batch = synthesis.plan()
    rows = run_batch(synthesis, batch, teacher, CHAT)
    expected = [question_messages(attempt.seed.stream, attempt.seed.question) for attempt in batch]
    answered = [row for row in rows if not row["cut"] or row["cut"].startswith("answer")]
    expected += [answer_messages(row["stream"], row["question"]) for row in answered]
    assert teacher.asked == [CHAT.decode(CHAT.encode_prompt(messages)) for messages in expected]
    assert answered and teacher.calls == 2


def test_the_same_settings_give_the_same_set() -> None:
    first, second = synthesize()[0], synthesize()[0]
    assert first.pairs == second.pairs and first.funnel() == second.funnel()
    other = synthesize(replace(SETTINGS, seed=1))[0]
    assert {row["question"] for row in other.pairs} != {row["question"] for row in first.pairs}


def test_finished_batches_are_the_whole_state(tmp_path: Path) -> None:
    """A run that goes on behind any batch, after a kill in the middle of writing the next, ends the same."""
    whole, batches = synthesize()
    for count in (0, 1, len(batches) // 2, len(batches)):
        path = tmp_path / f"{count}.jsonl"
        lines = [{"seeds": fingerprint(SEEDS)}, *({"rows": rows} for rows in batches[:count])]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        half = json.dumps({"rows": batches[0]}, ensure_ascii=False).encode()[:-200]
        path.write_bytes(text.encode() + half)
        synthesis, teacher = Synthesis(SEEDS, SETTINGS), FlawedTeacher()
        for rows in finished_batches(path, SEEDS):
            synthesis.add(rows)
        assert path.read_bytes() == text.encode()
        while batch := synthesis.plan():
            synthesis.add(run_batch(synthesis, batch, teacher, CHAT))
        assert synthesis.pairs == whole.pairs and synthesis.funnel() == whole.funnel()
        assert (teacher.calls == 0) == (count == len(batches))


def test_a_kill_while_the_first_line_is_written(tmp_path: Path) -> None:
    path = tmp_path / "batches.jsonl"
    path.write_text('{"seeds": "ab', encoding="utf-8")
    assert finished_batches(path, SEEDS) == []
    assert json.loads(path.read_text(encoding="utf-8")) == {"seeds": fingerprint(SEEDS)}


def test_other_seeds_are_refused_on_resume(tmp_path: Path) -> None:
    finished_batches(tmp_path / "batches.jsonl", SEEDS)
    with pytest.raises(UserError, match="begun with other seeds"):
        finished_batches(tmp_path / "batches.jsonl", SEEDS[1:])


def test_a_target_out_of_reach_says_why() -> None:
    class Stubborn(FlawedTeacher):
        def say(self, prompt: str, seed: int) -> str:
            return "Q: いつも同じ質問です。" if "参考質問:" in prompt else "A: いつも同じ答えです。"

    synthesis = Synthesis(SEEDS, SETTINGS)
    while batch := synthesis.plan():
        synthesis.add(run_batch(synthesis, batch, Stubborn(), CHAT))
    why = synthesis.why_not_reached()
    assert "target 60 not reached: 1 pairs; ac (safety) 1 of 20 from" in why
    assert "border (borderline) 0 of 20" in why and "'question: duplicate'" in why
    # 20 * max_attempts for each source, and not much more.
    assert all(200 <= count <= 240 for count in synthesis.attempts.values())


def test_seeds_that_do_not_fit() -> None:
    long = Example("long", "ac", "safety", "長" * 2000)
    assert usable_seeds([*SEEDS, long], CHAT, SETTINGS) == SEEDS
    with pytest.raises(UserError, match=r"no question of ac \(safety\) leaves room for 200 tokens"):
        usable_seeds([long], CHAT, SETTINGS)
    with pytest.raises(UserError, match="two seeds of ac have the id 'ac-0'"):
        usable_seeds([*SEEDS, SEEDS[0]], CHAT, SETTINGS)


def test_a_question_that_leaves_no_room_for_its_answer_is_cut() -> None:
    """The answer prompt may be longer than the question prompt was."""
    synthesis = Synthesis(SEEDS, replace(SETTINGS, max_length=SETTINGS.max_answer_tokens + 900))
    rows = run_batch(synthesis, synthesis.plan(), FlawedTeacher(), CHAT)
    assert not any(row["answer"] for row in rows)
    assert sum(row["cut"] == "question: too long" for row in rows) > 3


def test_hold_out_takes_the_same_share_of_every_stream() -> None:
    examples = to_examples(synthesize()[0], "flawed")
    train, validation = hold_out(examples, 0.1, seed=0)
    assert Counter(e.stream for e in validation) == {"safety": 2, "borderline": 2, "helpfulness": 2}
    assert sorted([*train, *validation], key=lambda e: e.id) == sorted(examples, key=lambda e: e.id)
    assert hold_out(examples, 0.0, seed=0) == (examples, [])
    assert hold_out(examples, 0.1, seed=1)[1] != validation


DEMO_SEEDS = [
    f"{name}={DEMO_DATA / 'seeds' / name}.{ending}"
    for name, ending in (("answer_carefully", "json"), ("borderline", "json"), ("llm_jp_instructions", "jsonl"))
]
OPTIONS = (
    "--teacher", "scripted", "--seeds", *DEMO_SEEDS, "--target", 90, "--batch-size", 8, "--validation-share", 0.1
)  # fmt: skip
RESULTS = ("train.jsonl", "validation.jsonl", "funnel.json", "batches.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("synth") / "whole"
    result = run_script("synth.py", *OPTIONS, "--output-dir", output)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("90 pairs from ")
    assert "81 to " in result.stdout and "9 to " in result.stdout
    return output


def test_synth_writes_what_the_trainers_read(finished: Path) -> None:
    train, validation = load_examples(f"{finished}/train.jsonl"), load_examples(f"{finished}/validation.jsonl")
    assert (len(train), len(validation)) == (81, 9)
    assert Counter(e.stream for e in train + validation) == {"safety": 30, "borderline": 30, "helpfulness": 30}
    assert all(e.reference and e.meta["seed_id"] and e.meta["teacher"] == "scripted" for e in train)
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert (config["target"], config["temperature"], config["seeds"]) == (90, 0.5, DEMO_SEEDS)


def test_synth_killed_and_resumed_ends_with_the_same_files(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    arguments = command("synth.py", *OPTIONS, "--output-dir", output)
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    batches = output / "batches.jsonl"
    while not batches.exists() or batches.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "train.jsonl").exists()
    with batches.open("ab") as file:  # a kill while the next line is written
        file.write(b'{"rows": [{"attempt": 3')
    result = run_script("synth.py", *OPTIONS, "--output-dir", output)
    assert result.returncode == 2 and "is not empty" in result.stderr
    result = run_script("synth.py", *OPTIONS, "--output-dir", output, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    for name in RESULTS:
        assert (output / name).read_bytes() == (finished / name).read_bytes(), name


def test_synth_resumed_after_the_end_changes_nothing(finished: Path) -> None:
    before = {name: (finished / name).read_bytes() for name in RESULTS}
    result = run_script("synth.py", *OPTIONS, "--output-dir", finished, "--resume", "auto")
    assert result.returncode == 0 and result.stdout.startswith("90 pairs from ")
    assert {name: (finished / name).read_bytes() for name in RESULTS} == before


def test_synth_with_a_model_that_cannot_do_it(model_folder: Path, tmp_path: Path) -> None:
    """A random model never writes "Q:"; what there is is written, and the reason is told."""
    seeds = tmp_path / "seeds.json"
    seeds.write_text(json.dumps([{"ID": "1", "text": "質問", "output": "答え"}]), encoding="utf-8")
    result = run_script(
        "synth.py", "--teacher", model_folder, "--engine", "torch", "--seeds", f"borderline={seeds}", "--target", 2,
        "--max-question-tokens", 4, "--max-answer-tokens", 4, "--max-attempts", 1, "--output-dir", tmp_path / "out",
        "--max-length", 2000,
    )  # fmt: skip
    assert result.returncode == 2
    assert "target 2 not reached: 0 pairs; borderline (borderline) 0 of 2 from" in result.stderr
    funnel = json.loads((tmp_path / "out" / "funnel.json").read_text(encoding="utf-8"))
    assert funnel["pairs"] == 0 and funnel["attempts"] >= 20


@pytest.mark.parametrize(
    "options, why",
    [
        (("--target", 0), "target 0: must be at least 1"),
        (("--validation-share", 0.9), "validation_share 0.9: must be at most 0.5"),
        (("--max-length", 100), "max_length 100: prompt and completion must fit"),
        (("--seeds", "borderlin=x.json"), "unknown source 'borderlin'"),
        (("--seeds", "borderline=missing.json"), "missing.json: no such file"),
        (("--teacher", "no/such/folder/here"), "no/such/folder/here"),
        (("--temperature", -1), "temperature -1.0: must be at least 0"),
    ],
)
def test_synth_refuses_in_one_line(options: tuple[object, ...], why: str, tmp_path: Path) -> None:
    result = run_script("synth.py", *OPTIONS, "--output-dir", tmp_path / "out", *options)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert why in result.stderr
    assert not (tmp_path / "out").exists()
