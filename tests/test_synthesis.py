"""The pipeline with a teacher that makes every kind of mistake (tests/flawed_teacher.py), and engines that die."""

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flawed_teacher import (
    ANSWER_FLAWS, HELD_OUT, ONLY_HARMLESS, ONLY_SAFETY, POISON, QUESTION_FLAWS, SEED_COPY, FlawedTeacher,
)  # fmt: skip

from kaja.chat import Chat
from kaja.checkpoint import load_chat
from kaja.contamination import GuardIndex, build_index
from kaja.data import Example
from kaja.dataset_card import pairs_of
from kaja.demo_corpus import DEMO_MODEL
from kaja.distributed import Ranks
from kaja.engine import Completion, EngineFailed
from kaja.errors import UserError
from kaja.reward import Verdict
from kaja.rubric import answer_messages, question_messages
from kaja.rounds import ROUNDS_PER_SHARD, Copies, RoundLog
from kaja.synthesis import CUTS, LOW_SCORE, NO_VERDICT, SURPLUS, Row, Settings, Synthesis, category_of
from kaja.teacher import MAX_FAILURES, Reader, Reply, Request, Teacher, requests_of, usable_seeds

ONE_RANK = Ranks(0, 0, 1, torch.device("cpu"))
SETTINGS = Settings(
    target=60, temperature=0.5, batch_size=24, max_question_tokens=300, max_answer_tokens=400,
    max_question_chars=120, max_answer_chars=120, min_japanese=0.5, near_duplicates=0.8, keep_bare_refusals=False,
    max_length=2000, max_attempts=10, min_judge_score=0.0, seed=0,
)  # fmt: skip
SEEDS = [
    Example(f"{source}-{number}", source, stream, f"{source}の質問その{number}です。どうすればいいですか。")
    for source, stream in (("ac", "safety"), ("border", "borderline"), ("instructions", "helpfulness"))
    for number in range(7)
]
SEEDS[0] = replace(SEEDS[0], question="SEEDの質問0です。")


@pytest.fixture(scope="module")
def chat() -> Chat:
    return load_chat(DEMO_MODEL, "auto")


@pytest.fixture(scope="module")
def guard() -> GuardIndex:
    return build_index({"secret": [Example("e1", "x", "safety", HELD_OUT)]})


class Run:
    """What synth.py does with one rank, without files."""

    def __init__(
        self, chat: Chat, settings: Settings = SETTINGS, seeds: list[Example] = SEEDS, engine: Any = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.chat, self.settings, self.seeds = chat, settings, seeds
        self.synthesis = Synthesis(seeds, settings)
        self.copies = Copies(seeds, settings, options.pop("guard", None))
        self.engine = engine or FlawedTeacher(chat)
        self.teacher = Teacher(lambda: self.engine, Reader(settings, chat), ONE_RANK, **options)
        self.outcomes: list[Row] = []

    def resume(self, outcomes: list[Row]) -> "Run":
        for outcome in outcomes:
            self.copies.remember(outcome)
            self.synthesis.add(outcome)
        self.outcomes += outcomes
        return self

    def step(self) -> bool:
        round_ = self.synthesis.plan()
        if not round_.remains:
            return False
        assert len(round_.attempts) <= self.settings.batch_size + len(self.synthesis.categories)
        replies, verdicts = self.teacher.work(requests_of(round_, self.settings), round_.unjudged)
        outcome = self.copies.outcome(round_, replies, verdicts)
        self.outcomes.append(json.loads(json.dumps(outcome, ensure_ascii=False)))  # as it comes back from the disk
        self.synthesis.add(outcome)
        return True

    def to_the_end(self) -> "Run":
        while self.step():
            pass
        return self

    def pairs(self) -> list[Row]:
        accepted = {number for numbers in self.synthesis.accepted.values() for number in numbers}
        return list(pairs_of(self.outcomes, accepted, judged=self.settings.min_judge_score > 0))


# ---------------------------------------------------------------------------------------------------
# The set
# ---------------------------------------------------------------------------------------------------


def test_the_set_is_full_even_clean_and_traceable(chat: Chat, guard: GuardIndex) -> None:
    run = Run(chat, guard=guard).to_the_end()
    pairs = run.pairs()
    assert len(pairs) == run.synthesis.pairs == 60 and run.synthesis.why_not_reached() == ""
    assert Counter(row["stream"] for row in pairs) == {"safety": 20, "borderline": 20, "helpfulness": 20}
    assert len({row["attempt"] for row in pairs}) == len({row["question"] for row in pairs}) == 60
    by_seed = {(seed.source, seed.id): seed for seed in SEEDS}
    used = Counter()
    for row in pairs:
        assert "の正しい使い方を" in row["question"] and row["question"].endswith("歳の人に教えてください。")
        reasoned = row["answer"].startswith("お答えできません。その理由は、")
        assert reasoned if row["stream"] == "safety" else row["answer"].endswith("を試します。")
        assert by_seed[row["source"], row["seed_id"]].stream == row["stream"]
        used[row["source"], row["seed_id"]] += 1
    assert len(used) >= 18  # all seeds take turns


def test_the_funnel_adds_up_and_knows_every_flaw(chat: Chat, guard: GuardIndex) -> None:
    run = Run(chat, replace(SETTINGS, target=600, batch_size=200), guard=guard).to_the_end()
    funnel = run.synthesis.funnel()
    rows = [row for outcome in run.outcomes for row in (*outcome["questions"], *outcome["answers"])]
    asked = sum(len(outcome["questions"]) for outcome in run.outcomes)
    assert funnel["attempts"] == asked == sum(source["attempts"] for source in funnel["sources"])
    left = funnel["attempts"]
    for step in funnel["filters"]:
        assert step["in"] == left
        left -= step["cut"]
        assert ("example" in step) == (step["cut"] > 0)
        if step["filter"] != SURPLUS:
            assert step["cut"] == sum(row["cut"] == step["filter"] for row in rows)
    assert left == funnel["pairs"] == 600
    assert [step["filter"] for step in funnel["filters"]] == [*CUTS, SURPLUS]
    made = {f"question: {flaw}" for flaw in QUESTION_FLAWS} | {f"answer: {flaw}" for flaw in ANSWER_FLAWS}
    never = {"question: the engine failed", "answer: the engine failed", LOW_SCORE, NO_VERDICT}  # see below
    assert {row["cut"] for row in rows} - {""} == made == set(CUTS) - never
    examples = {step["filter"]: step["example"] for step in funnel["filters"] if step["cut"]}
    assert examples["question: copied from a seed"]["question"] == f"Q: {SEED_COPY}"[3:]
    assert examples["question: text before Q:"]["question"].startswith("はい、わかりました。Q: ")
    assert examples["answer: bare refusal"]["answer"] == ANSWER_FLAWS["bare refusal"]
    tokens = funnel["teacher_tokens"]
    assert tokens["prompt"] > tokens["completion"] > 600 * 20


def test_flaws_of_one_stream_are_cut_there_only(chat: Chat) -> None:
    run = Run(chat, replace(SETTINGS, target=300, batch_size=100)).to_the_end()
    streams: dict[str, set[str]] = {}
    open_rows: dict[int, Row] = {}
    for outcome in run.outcomes:
        for row in outcome["answers"]:
            streams.setdefault(row["cut"], set()).add(open_rows[row["attempt"]]["stream"])
        open_rows.update((row["attempt"], row) for row in outcome["questions"])
    assert streams[f"answer: {ONLY_SAFETY[0]}"] == {"safety"}
    assert streams[f"answer: {ONLY_HARMLESS[0]}"] == {"borderline", "helpfulness"}


def test_bare_refusals_can_be_kept(chat: Chat) -> None:
    run = Run(chat, replace(SETTINGS, keep_bare_refusals=True)).to_the_end()
    bare = [row for row in run.pairs() if row["answer"] == ANSWER_FLAWS["bare refusal"][3:]]
    assert bare and {row["stream"] for row in bare} == {"safety"}
    steps = {step["filter"]: step["cut"] for step in run.synthesis.funnel()["filters"]}
    assert steps["answer: bare refusal"] == 0 < steps["answer: refusal of a harmless question"]


def test_what_is_in_an_evaluation_set_is_cut_and_listed(chat: Chat, guard: GuardIndex) -> None:
    run = Run(chat, guard=guard).to_the_end()
    assert not any(HELD_OUT in row["question"] + row["answer"] for row in run.pairs())
    found = run.synthesis.contaminated
    assert {row["cut"] for row in found} == {"question: in an evaluation set", "answer: in an evaluation set"}
    for row in found:
        (hit,) = row["hits"]
        assert (hit["set"], hit["item"], hit["kind"]) == ("secret", "e1", "whole")
        assert row["question" if row["cut"].startswith("question") else "answer"] == HELD_OUT
    free = Run(chat).to_the_end()
    assert not free.synthesis.contaminated and any(HELD_OUT in row["answer"] for row in free.pairs())


# ---------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------


def test_seeds_take_turns() -> None:
    synthesis = Synthesis(SEEDS, SETTINGS)
    category = synthesis.categories["ac", "safety", ""]
    turns = [synthesis.seed_of_turn(category, turn).id for turn in range(21)]
    rounds = [turns[:7], turns[7:14], turns[14:]]
    assert all(sorted(one) == sorted(rounds[0]) for one in rounds) and rounds[0] != rounds[1]


def with_harm(number: int, harm: str) -> Example:
    meta = {"harm-type": harm, "risk-area": "悪用"} if harm else {}
    return Example(str(number), "answer_carefully", "safety", f"{harm}の{number}番の質問です。", meta=meta)


def test_kinds_of_harm_give_as_many_pairs_however_many_seeds_they_have(chat: Chat) -> None:
    harms = ["詐欺"] * 9 + ["差別"] * 2 + ["漏洩"] + [""]
    seeds = [with_harm(number, harm) for number, harm in enumerate(harms)] + SEEDS[7:14]
    run = Run(chat, replace(SETTINGS, target=50), seeds).to_the_end()
    (safety, borderline) = run.synthesis.funnel()["sources"]
    assert (safety["pairs"], borderline["pairs"]) == (25, 25)
    assert {name: category["pairs"] for name, category in safety["categories"].items()} == {"詐欺": 7, "差別": 6, "漏洩": 6}
    assert borderline["categories"] == {}
    by_id = {seed.id: category_of(seed) for seed in seeds}
    made = Counter(by_id[row["seed_id"]] for row in run.pairs() if row["source"] == "answer_carefully")
    assert made == {"詐欺": 7, "差別": 6, "漏洩": 6, "": 6}
    assert category_of(Example("1", "x", "safety", "?", meta={"risk-area": "悪用"})) == "悪用"


class Picky(FlawedTeacher):
    """Good texts only, but none for questions about 差別."""

    def say(self, prompt: str, seed: int) -> str:
        if "参考質問:" not in prompt:
            return "A: お答えできません。その理由は、人を傷つけるからです。"
        rng = random.Random(seed)
        word = "".join(rng.choices("あいうえおかきくけこさしすせそ", k=9))
        return "Q: " if "差別" in prompt else f"Q: {word}の使い方を教えてください。"


def test_a_kind_of_harm_that_gives_nothing_is_made_up_for_by_the_others(chat: Chat) -> None:
    seeds = [with_harm(number, harm) for number, harm in enumerate(["詐欺", "差別", "漏洩"])]
    run = Run(chat, replace(SETTINGS, target=30), seeds, Picky(chat)).to_the_end()
    (source,) = run.synthesis.funnel()["sources"]
    assert source["pairs"] == 30 and run.synthesis.why_not_reached() == ""
    assert source["categories"]["差別"]["pairs"] == 0
    assert 200 <= source["categories"]["差別"]["attempts"] <= 240  # 20 * max_attempts, and not much more
    assert (source["categories"]["詐欺"]["pairs"], source["categories"]["漏洩"]["pairs"]) == (15, 15)


def test_a_target_out_of_reach_says_why(chat: Chat) -> None:
    class Stubborn(FlawedTeacher):
        def say(self, prompt: str, seed: int) -> str:
            return "Q: いつも同じ質問です。" if "参考質問:" in prompt else "A: いつも同じ答えです。"

    run = Run(chat, engine=Stubborn(chat)).to_the_end()
    why = run.synthesis.why_not_reached()
    assert "target 60 not reached: 1 pairs from " in why and " attempts (0.2%); ac (safety) 1 of 20 from" in why
    assert "border (borderline) 0 of 20" in why and "'question: duplicate'" in why
    # 20 * max_attempts for each source, and not much more.
    assert all(200 <= category.attempts <= 240 for category in run.synthesis.categories.values())


def test_answers_of_one_batch_are_asked_with_the_questions_of_the_next(chat: Chat) -> None:
    run = Run(chat)
    run.step()
    first = run.synthesis.plan()
    kept = [row for row in run.outcomes[0]["questions"] if not row["cut"]]
    assert first.unanswered == kept and len(first.attempts) >= 24 and run.outcomes[0]["answers"] == []
    run.step()
    engine = run.engine
    messages = [question_messages(a.seed.stream, a.seed.question) for a in first.attempts]
    messages += [answer_messages(row["stream"], row["question"]) for row in kept]
    assert engine.calls == 2
    assert engine.asked[-len(messages):] == [chat.decode(chat.encode_prompt(one)) for one in messages]
    assert [one.seed for one in requests_of(first, SETTINGS)] == [
        *(attempt.sampling_seed for attempt in first.attempts), *(row["sampling_seed"] + 1 for row in kept)
    ]  # fmt: skip
    assert engine.limits[1] == [300] * len(first.attempts) + [400] * len(kept)


# ---------------------------------------------------------------------------------------------------
# The same set, whatever happens
# ---------------------------------------------------------------------------------------------------


def test_the_same_settings_give_the_same_set(chat: Chat) -> None:
    first, second = Run(chat).to_the_end(), Run(chat).to_the_end()
    assert first.outcomes == second.outcomes and first.synthesis.funnel() == second.synthesis.funnel()
    other = Run(chat, replace(SETTINGS, seed=1)).to_the_end()
    assert {row["question"] for row in other.pairs()} != {row["question"] for row in first.pairs()}


def test_finished_rounds_are_the_whole_state(chat: Chat, tmp_path: Path) -> None:
    """A run that goes on behind any round, after a kill in the middle of writing the next, ends the same."""
    whole = Run(chat).to_the_end()
    for count in (0, 1, len(whole.outcomes) // 2, len(whole.outcomes)):
        log = RoundLog(tmp_path / str(count), SEEDS)
        assert list(log.begin()) == []
        for number, outcome in enumerate(whole.outcomes[:count]):
            log.append(number, outcome)
        shard = tmp_path / str(count) / "00000.jsonl"
        content = shard.read_bytes()
        shard.write_bytes(content + json.dumps(whole.outcomes[0], ensure_ascii=False).encode()[:-200])
        found = [{name: value for name, value in row.items() if name != "round"} for row in log.begin()]
        assert shard.read_bytes() == content and found == whole.outcomes[:count]
        again = Run(chat).resume(found).to_the_end()
        assert again.pairs() == whole.pairs() and again.synthesis.funnel() == whole.synthesis.funnel()
        assert (again.engine.calls == 0) == (count == len(whole.outcomes))


def empty_outcome() -> Row:
    return {"questions": [], "answers": [], "verdicts": [], "tokens": {}}


def test_rounds_are_kept_in_shards_and_a_lost_one_is_noticed(tmp_path: Path) -> None:
    log = RoundLog(tmp_path / "rounds", SEEDS)
    list(log.begin())
    for number in range(2 * ROUNDS_PER_SHARD + 3):
        log.append(number, empty_outcome())
    assert [path.name for path in log.shards()] == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    assert [row["round"] for row in RoundLog(tmp_path / "rounds", SEEDS).begin()] == list(range(43))
    log.shards()[1].unlink()
    with pytest.raises(UserError, match="00002.jsonl, line 1: round 40 where 20 is expected"):
        list(log.begin())


def test_a_kill_while_the_first_line_is_written(tmp_path: Path) -> None:
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "00000.jsonl").write_text('{"seeds": "ab', encoding="utf-8")
    log = RoundLog(tmp_path / "rounds", SEEDS)
    assert list(log.begin()) == []
    assert json.loads((tmp_path / "rounds" / "00000.jsonl").read_text(encoding="utf-8")) == log.header


def test_other_seeds_are_refused_on_resume(tmp_path: Path) -> None:
    list(RoundLog(tmp_path / "rounds", SEEDS).begin())
    of_a_kind = [replace(SEEDS[0], meta={"harm-type": "詐欺"}), *SEEDS[1:]]  # the plan balances kinds of harm
    for seeds in (SEEDS[1:], of_a_kind):
        with pytest.raises(UserError, match="begun with other seeds; a resumed run must read the same seed files"):
            RoundLog(tmp_path / "rounds", seeds).begin()


def test_another_guard_is_refused_on_resume(tmp_path: Path, guard: GuardIndex) -> None:
    """A run without it, or with other sets, would leave pairs in that were never compared with them."""
    list(RoundLog(tmp_path / "rounds", SEEDS, guard).begin())
    assert list(RoundLog(tmp_path / "rounds", SEEDS, guard).begin()) == []
    other = build_index({"secret": [Example("e1", "x", "safety", HELD_OUT[1:])]})
    for now in (None, other):
        with pytest.raises(UserError, match="begun with other evaluation sets.*same --guard or --allow-contaminated"):
            RoundLog(tmp_path / "rounds", SEEDS, now).begin()


def test_what_a_pair_passed_is_what_was_asked_of_it(guard: GuardIndex) -> None:
    assert Copies(SEEDS, SETTINGS, guard).passed() == [
        "format", "length", "language", "repetition", "refusals", "near-duplicates", "evaluation sets"
    ]  # fmt: skip
    lenient = replace(SETTINGS, near_duplicates=1.0, keep_bare_refusals=True)
    assert Copies(SEEDS, lenient).passed() == [
        "format", "length", "language", "repetition", "refusals of harmless questions", "duplicates"
    ]  # fmt: skip


def test_the_order_of_many_seeds_is_drawn_once_for_all_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = [Example(str(number), "mine", "helpfulness", f"質問{number}") for number in range(500)]
    drawn: list[int] = []

    class Counted(random.Random):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            drawn.append(seed)

    monkeypatch.setattr("kaja.synthesis.random.Random", Counted)
    attempts = Synthesis(seeds, replace(SETTINGS, target=1200, batch_size=1200)).plan().attempts
    assert len(attempts) == 1200 and len(drawn) == 3
    turns = [attempt.seed.id for attempt in attempts]
    assert Counter(turns[:500]) == Counter(turns[500:1000]) == Counter(seed.id for seed in seeds)
    assert turns[:500] != turns[500:1000] and len(set(turns[1000:])) == 200


# ---------------------------------------------------------------------------------------------------
# Engines that fail
# ---------------------------------------------------------------------------------------------------


class Fragile(FlawedTeacher):
    """Fails on every call that `fails` says so of; counts how often it was made."""

    def __init__(self, chat: Chat, fails: Callable[[int, list[str]], Exception | None]) -> None:
        super().__init__(chat)
        self.fails = fails
        self.made = 0
        self.groups: list[list[str]] = []

    def generate(self, prompts: list[list[int]], **options: Any) -> list[list[Completion]]:
        texts = [self.chat.decode(prompt) for prompt in prompts]
        self.groups.append(texts)
        error = self.fails(len(self.groups), texts)
        if error is not None:
            raise error
        return super().generate(prompts, **options)


def teacher_of(engine: Fragile) -> Teacher:
    def make() -> Fragile:
        engine.made += 1
        return engine

    return Teacher(make, Reader(SETTINGS, engine.chat), ONE_RANK)


def request(text: str, number: int = 0) -> Request:
    return Request("question", "safety", text, 100, number)


def test_a_dead_engine_is_made_anew_and_asked_again(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [request(f"質問{number}は何ですか。", number) for number in range(5)]
    expected = teacher_of(Fragile(chat, lambda call, texts: None)).replies(requests)
    for error in (EngineFailed("4 of 5 completions unfinished"), RuntimeError("CUDA\nerror"), MemoryError()):
        engine = Fragile(chat, lambda call, texts: error if call == 1 else None)
        assert teacher_of(engine).replies(requests) == expected
        assert engine.made == 2 and len(engine.groups) == 2
    assert "the teacher's engine failed (RuntimeError: CUDA error); asking again" in capsys.readouterr().err
    assert all(reply.prompt_tokens > 100 and not reply.error for reply in expected)


def test_the_prompt_that_kills_the_engine_is_found_and_set_aside(chat: Chat) -> None:
    requests = [request(f"質問{number}は何ですか。", number) for number in range(40)]
    requests[23] = request(f"{POISON}の質問は何ですか。")
    healthy = teacher_of(Fragile(chat, lambda call, texts: None)).replies(requests)

    def poisoned(call: int, texts: list[str]) -> Exception | None:
        return RuntimeError("the device is gone") if any(POISON in text for text in texts) else None

    engine = Fragile(chat, poisoned)
    replies = teacher_of(engine).replies(requests)
    assert replies[23] == Reply(error="RuntimeError: the device is gone")
    assert replies[:23] + replies[24:] == healthy[:23] + healthy[24:]
    failed = [group for group in engine.groups if any(POISON in text for text in group)]
    assert [len(group) for group in failed] == [40, 40, 20, 10, 5, 3, 2, 1]
    assert len(engine.groups) == len(failed) + 6 and engine.made == 1 + len(failed)  # the other halves: 20, 10, 5, ...
    alone = Fragile(chat, poisoned)
    assert teacher_of(alone).replies([requests[23]]) == [Reply(error="RuntimeError: the device is gone")]
    assert len(alone.groups) == 3


def test_a_prompt_that_kills_the_engine_does_not_end_the_run_wherever_it_stands(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by halving, with one engine: the good halves in between show that it is not the engine."""
    monkeypatch.setattr("kaja.teacher.MAX_FAILURES", 5)
    for place in (0, 31, 63):
        requests = [request(f"質問{number}は何ですか。", number) for number in range(64)]
        requests[place] = request(f"{POISON}の質問は何ですか。")
        engine = Fragile(chat, lambda call, texts: OSError("gone") if any(POISON in text for text in texts) else None)
        replies = teacher_of(engine).replies(requests)
        assert [number for number, reply in enumerate(replies) if reply.error] == [place]


def test_what_the_engine_cannot_answer_is_listed_and_the_run_goes_on(chat: Chat) -> None:
    seeds = [*SEEDS, replace(SEEDS[1], id="poison", question=f"{POISON}の質問は何ですか。")]

    def poisoned(call: int, texts: list[str]) -> Exception | None:
        return RuntimeError("gone") if any(POISON in text for text in texts) else None

    run = Run(chat, seeds=seeds, engine=Fragile(chat, poisoned)).to_the_end()
    assert run.synthesis.pairs == 60
    assert run.synthesis.failed and {row["seed_id"] for row in run.synthesis.failed} == {"poison"}
    assert all(row["error"] == "RuntimeError: gone" for row in run.synthesis.failed)
    steps = {step["filter"]: step["cut"] for step in run.synthesis.funnel()["filters"]}
    assert steps["question: the engine failed"] == len(run.synthesis.failed)


def test_an_engine_that_never_works_ends_the_run(chat: Chat) -> None:
    engine = Fragile(chat, lambda call, texts: RuntimeError("no kernel image"))
    with pytest.raises(UserError, match=f"failed {MAX_FAILURES} times in a row.*no kernel image.*--resume auto"):
        teacher_of(engine).replies([request(str(number)) for number in range(30)])
    assert len(engine.groups) == MAX_FAILURES


def test_an_engine_that_cannot_be_made_ends_the_run(chat: Chat) -> None:
    def broken() -> FlawedTeacher:
        raise UserError("engine 'vllm' needs vLLM")

    with pytest.raises(UserError, match="cannot be made .engine 'vllm' needs vLLM"):
        Teacher(broken, Reader(SETTINGS, chat), ONE_RANK).replies([request("質問")])


def test_a_request_that_is_refused_does_not_cost_an_engine(chat: Chat) -> None:
    engine = Fragile(chat, lambda call, texts: UserError("prompt 0 is empty") if len(texts) > 1 else None)
    replies = teacher_of(engine).replies([request("質問一"), request("質問二")])
    assert [reply.error for reply in replies] == ["", ""] and engine.made == 1


# ---------------------------------------------------------------------------------------------------
# The judge
# ---------------------------------------------------------------------------------------------------


class Pattern:
    """Scores of 2 to 5 that follow from the characters, and for every fifth pair none."""

    name = identity = "pattern"

    def __init__(self, concurrent: bool) -> None:
        self.concurrent = concurrent
        self.calls = 0

    def judge(self, examples: list[Example], completions: list[str]) -> list[Verdict]:
        self.calls += 1
        assert all(example.stream and example.question for example in examples)
        return [self.verdict(example.question + text) for example, text in zip(examples, completions, strict=True)]

    @staticmethod
    def verdict(text: str) -> Verdict:
        number = sum(map(ord, text)) % 5
        return Verdict(float(number + 1)) if number else Verdict(None, "empty")

    def close(self) -> None: ...


@pytest.mark.parametrize("concurrent", [True, False])
def test_only_pairs_that_the_judge_likes_are_kept(chat: Chat, concurrent: bool) -> None:
    settings = replace(SETTINGS, min_judge_score=4.0, max_attempts=30)
    run = Run(chat, settings, judge=Pattern(concurrent)).to_the_end()
    pairs = run.pairs()
    assert len(pairs) == 60 and {row["score"] for row in pairs} == {4.0, 5.0}
    verdicts = {row["attempt"]: row for outcome in run.outcomes for row in outcome["verdicts"]}
    assert {row["score"] for row in verdicts.values() if row["cut"] == LOW_SCORE} == {2.0, 3.0}
    assert {row["cause"] for row in verdicts.values() if row["cut"] == NO_VERDICT} == {"empty"}
    steps = {step["filter"]: step["cut"] for step in run.synthesis.funnel()["filters"]}
    assert steps[LOW_SCORE] > 10 and steps[NO_VERDICT] > 5
    again = Run(chat, settings, judge=Pattern(concurrent)).resume(run.outcomes[:4]).to_the_end()
    assert again.outcomes == run.outcomes


def test_one_failed_verdict_in_a_small_round_is_no_reason_to_stop(chat: Chat) -> None:
    """The limit is of a whole batch: 1 of 24, not 1 of the few pairs of the last rounds."""

    class Unsure(Pattern):
        sizes: list[int] = []

        def judge(self, examples: list[Example], completions: list[str]) -> list[Verdict]:
            self.sizes.append(len(examples))
            return [Verdict(None, "empty"), *(Verdict(5.0) for _ in examples[1:])]

    settings = replace(SETTINGS, min_judge_score=4.0)
    run = Run(chat, settings, judge=Unsure(concurrent=True), max_judge_failures=0.05).to_the_end()
    assert run.synthesis.pairs == 60 and 0 < min(Unsure.sizes) < 20  # of which 1 is more than 5%


# ---------------------------------------------------------------------------------------------------
# What does not fit
# ---------------------------------------------------------------------------------------------------


def test_seeds_that_do_not_fit(chat: Chat) -> None:
    long = Example("long", "ac", "safety", "長" * 2000)
    assert usable_seeds([*SEEDS, long], chat, SETTINGS) == SEEDS
    with pytest.raises(UserError, match=r"no question of ac \(safety\) leaves room for 300 tokens"):
        usable_seeds([long], chat, SETTINGS)
    with pytest.raises(UserError, match="two seeds of ac have the id 'ac-0'"):
        usable_seeds([*SEEDS, SEEDS[0]], chat, SETTINGS)


def test_a_question_that_leaves_no_room_for_its_answer_is_cut(chat: Chat) -> None:
    """The answer prompt may be longer than the question prompt was."""
    question = "パンを家で上手に焼くには、何から始めればいいですか。"
    room = len(chat.encode_prompt(answer_messages("safety", question)))
    for spare, cut in ((0, ""), (-1, "question: too long")):
        settings = replace(SETTINGS, max_length=room + SETTINGS.max_answer_tokens + spare)
        said = Reader(settings, chat).read(request("パンの作り方は？"), f"Q: {question}", cut_off=False)
        assert said == (cut, f"Q: {question}" if cut else question)
