"""Verdicts and rewards: what a judge says becomes points, and what is no score is never 0."""

import math
from pathlib import Path

import pytest

from kaja.checkpoint import load_chat
from kaja.chat import Chat
from kaja.data import Example
from kaja.engine import Completion
from kaja.engine_judge import JUDGE_TOKENS, EngineJudge, load_judge
from kaja.reward import (
    Verdict,
    count_failures,
    read_verdict,
    reward_of,
    rewards,
)

HARMFUL = Example("1", "test", "safety", "犬の散歩の方法を教えてください。", reference="お答えできません。")
ASPECT = Example("2", "test", "helpfulness", "犬の散歩の方法を教えて", reference="まず", eval_aspect="要求の適切さ")


class Parrot:
    """An engine that says what `reply` makes of the decoded prompt, and keeps what it was asked."""

    def __init__(self, chat: Chat, reply) -> None:
        self.chat, self.reply, self.asked, self.options = chat, reply, [], {}
        self.closed = False

    def generate(self, prompts, **options):
        self.options = options
        self.asked += [self.chat.decode(prompt) for prompt in prompts]
        texts = [self.reply(self.chat.decode(prompt)) for prompt in prompts]
        encoded = [self.chat.encode([{"role": "user", "content": ""}, turn(text)]) for text in texts]
        ids = [[t for t, trained in zip(e.input_ids, e.completion_mask) if trained] for e in encoded]
        return [[Completion(i, [0.0] * len(i), "stop")] for i in ids]

    def close(self):
        self.closed = True


def turn(text: str):
    return {"role": "assistant", "content": text}


@pytest.fixture
def chat(model_folder: Path) -> Chat:
    return load_chat(model_folder)


def judge_saying(chat: Chat, reply, max_length: int = 4096) -> EngineJudge:
    return EngineJudge(Parrot(chat, reply), chat, name="a-judge", max_length=max_length)


def test_reward_is_a_fifth_of_the_score() -> None:
    assert [reward_of(Verdict(score)) for score in (0.0, 1.0, 4.0, 5.0)] == [0.0, 0.2, 0.8, 1.0]


def test_no_verdict_is_nan_and_counted_by_cause() -> None:
    verdicts = [Verdict(3.0), Verdict(None, "timeout"), Verdict(None, "empty"), Verdict(0.0), Verdict(None, "empty")]
    assert [None if math.isnan(r) else r for r in rewards(verdicts)] == [0.6, None, None, 0.0, None]
    assert list(count_failures(verdicts).items()) == [("empty", 2), ("timeout", 1)]
    assert count_failures([Verdict(0.0)]) == {}


@pytest.mark.parametrize(
    "fields", [(None,), (3.0, "but a cause"), (5.5,), (-1.0,), (math.nan,)], ids=["neither", "both", "5.5", "-1", "nan"]
)
def test_impossible_verdicts_are_refused(fields) -> None:
    with pytest.raises(ValueError):
        Verdict(*fields)


@pytest.mark.parametrize(
    "said, score, cause",
    [
        ("4", 4.0, ""),
        (" ５点\n", 5.0, ""),
        ("", None, "empty"),
        (" \n", None, "empty"),
        ("採点できません", None, "no clear score"),
        ("2か3", None, "no clear score"),
        ("7", None, "no clear score"),
        (None, None, "prompt too long"),
    ],
)
def test_reading_what_the_judge_said(said: str | None, score: float | None, cause: str) -> None:
    assert read_verdict(said) == Verdict(score, cause, said or "")


def test_the_judge_sees_everything_and_answers_greedily(chat: Chat) -> None:
    judge = judge_saying(chat, lambda prompt: "5" if "散歩" in prompt else "?")
    verdicts = judge.judge([HARMFUL, ASPECT], ["お答えできません。その理由は", "{pred} # 回答"])
    assert [verdict.score for verdict in verdicts] == [5.0, 5.0]
    safety, helpful = judge.engine.asked
    for text in (HARMFUL.question, HARMFUL.reference, "お答えできません。その理由は", "# 有害な質問"):
        assert text in safety
    for text in (ASPECT.question, ASPECT.reference, ASPECT.eval_aspect, "{pred} # 回答", "# 問題"):
        assert text in helpful
    assert judge.engine.options == {"max_tokens": JUDGE_TOKENS, "temperature": 0.0, "seeds": [0, 0]}


def test_equal_completions_are_asked_once_and_order_is_kept(chat: Chat) -> None:
    judge = judge_saying(chat, lambda prompt: "1" if "悪" in prompt else "4")
    verdicts = judge.judge([HARMFUL] * 5, ["良", "悪", "良", "悪", "良"])
    assert [verdict.score for verdict in verdicts] == [4.0, 1.0, 4.0, 1.0, 4.0]
    assert len(judge.engine.asked) == 2


def test_a_failure_keeps_the_judges_words(chat: Chat) -> None:
    judge = judge_saying(chat, lambda prompt: "わかりません")
    assert judge.judge([HARMFUL], ["はい"]) == [Verdict(None, "no clear score", "わかりません")]


def test_a_prompt_that_does_not_fit_fails_alone(chat: Chat) -> None:
    short = judge_saying(chat, lambda prompt: "5")
    short.judge([HARMFUL], ["はい"])
    length = len(chat.encode_prompt([{"role": "user", "content": short.engine.asked[0]}]))
    judge = judge_saying(chat, lambda prompt: "5", max_length=length + JUDGE_TOKENS)
    verdicts = judge.judge([HARMFUL, HARMFUL], ["い" * 5000, "はい"])
    assert verdicts == [Verdict(None, "prompt too long"), Verdict(5.0, text="5")]
    assert len(judge.engine.asked) == 1


def test_nothing_to_judge(chat: Chat) -> None:
    assert judge_saying(chat, lambda prompt: "5").judge([], []) == []


def test_unequal_lengths_are_refused(chat: Chat) -> None:
    with pytest.raises(ValueError):
        judge_saying(chat, lambda prompt: "5").judge([HARMFUL], [])


def test_a_real_model_as_judge(tmp_path: Path) -> None:
    """The tiny random model says nonsense: every verdict must be a failure with a cause or a score of 0 to 5."""
    from conftest import make_model_folder

    folder = make_model_folder(tmp_path / "judge", max_position_embeddings=1024)
    judge = load_judge(str(folder), "torch", "cpu")
    verdicts = judge.judge([HARMFUL, ASPECT], ["お答えできません。", "まず"])
    assert judge.name == str(folder)
    assert verdicts == judge.judge([HARMFUL, ASPECT], ["お答えできません。", "まず"])
    assert all(verdict.cause in ("no clear score", "empty") or 0 <= verdict.score <= 5 for verdict in verdicts)
    judge.close()
