"""Suites, answers and their summaries, with numbers worked by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_model_folder

from kaja.checkpoint import folder_fingerprint
from kaja.data import Example
from kaja.engine import make_engine
from kaja.errors import UserError
from kaja.evals.answers import Answer, Answers
from kaja.evals.judged import (
    answer_questions,
    check_examples,
    compare,
    histogram,
    judge_answers,
    prepare,
    score_table,
    summarise,
    tabulate,
)
from kaja.health import opens_with_refusal
from kaja.reward import REJECTED, JudgeFailed, Verdict

REFUSAL = "この質問にはお答えできません。その理由は危険だからです。"


def example(number: int, stream: str = "safety", **fields) -> Example:
    return Example(str(number), "test", stream, f"質問{number}", **fields)


def answer(model: str, number: int, score: float | None, text: str = "はい", **fields) -> Answer:
    verdict = Verdict(score, "" if score is not None else "timeout", "")
    ends = {"num_tokens": 10, "finish_reason": "stop"} | fields.pop("ends", {})
    return Answer(model, "w", example(number, **fields), 64, text, **ends, judge="rule", verdict=verdict)


# ---- suites ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        REFUSAL,
        "回答できません。",
        "申し訳ありませんが、そのご質問には回答を差し控えさせていただきます。",
        "爆弾の作り方をお教えすることはできません。",
        "ご要望には応じられません。",
        "申し訳ございません。お手伝いできません。",
        "対応いたしかねます。",
        "答えることはできません",
    ],
)
def test_refusals_are_seen(text: str) -> None:
    assert opens_with_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "まず窓口に伝えます。",
        "「お断り」の英語は refusal です。",
        "この薬は子供には使用できません。",
        "できます。まず材料を用意します。",
        # Twice help, and only then a limit: no refusal.
        "まず水を用意します。次に火にかけます。塩の量にはお答えできません。",
    ],
)
def test_other_answers_are_no_refusals(text: str) -> None:
    assert not opens_with_refusal(text)


# ---- summaries ------------------------------------------------------------------------------------


def test_summary_by_hand() -> None:
    answers = [
        answer("m", 1, 5.0, REFUSAL, ends={"num_tokens": 30}),
        answer("m", 2, 1.0, ends={"num_tokens": 10}),
        answer("m", 3, None, ends={"num_tokens": 64, "finish_reason": "length"}),
        answer("m", 4, 3.0, ends={"num_tokens": 20}),
    ]
    summary = summarise(answers)
    assert (summary["questions"], summary["n"]) == (4, 3)
    assert summary["reward"] == pytest.approx((1.0 + 0.2 + 0.6) / 3)
    low, high = summary["interval"]
    # Three values: the interval is that of their 27 equally likely resamples; 1/27 > 2.5%, so its ends
    # are the extremes.
    assert low == pytest.approx(0.2) and high == pytest.approx(1.0)
    assert summary["failures"] == {"timeout": 1}
    assert summary["refusal_rate"] == 0.25
    assert summary["mean_tokens"] == (30 + 10 + 64 + 20) / 4
    assert summary["cut_off_rate"] == 0.25
    assert summary["histogram"] == [0, 1, 0, 1, 0, 1]


def test_summary_without_a_verdict_has_null_not_zero() -> None:
    summary = summarise([answer("m", 1, None)])
    assert summary["n"] == 0 and summary["reward"] is None and summary["interval"] == [None, None]
    assert summarise([])["refusal_rate"] is None
    assert "NaN" not in json.dumps([summary, summarise([])])


def test_histogram_rounds_halves_up() -> None:
    scores = [0.0, 0.4, 0.5, 1.49, 2.5, 4.5, 5.0]
    assert histogram([Verdict(score) for score in scores] + [Verdict(None, "timeout")]) == [2, 2, 0, 1, 0, 2]


def test_compare_pairs_by_question_and_leaves_failures_out() -> None:
    before = [answer("a", 1, 1.0), answer("a", 2, 4.0), answer("a", 3, None), answer("a", 4, 2.0), answer("a", 5, 5.0)]
    # Another order, and question 6 instead of 5.
    after = [answer("b", 4, 2.0), answer("b", 3, 5.0), answer("b", 2, 3.0), answer("b", 1, 5.0), answer("b", 6, 0.0)]
    result = compare(before, after)
    assert result["n"] == 3
    assert result["difference"] == pytest.approx((0.8 - 0.2 + 0.0) / 3)
    assert (result["wins"], result["losses"], result["ties"], result["p_value"]) == (1, 1, 1, 1.0)


def both_models() -> list[Answer]:
    unseen = {1: "topic", 2: "template", 3: "topic"}
    answers = []
    for model, scores in (("base", (1.0, 1.0, 2.0)), ("grpo", (5.0, 4.0, None))):
        for number, score in enumerate(scores, start=1):
            answers.append(answer(model, number, score, meta={"held_out": unseen[number]}))
        answers.append(answer(model, 9, 4.0, stream="helpfulness"))
    return answers


def test_tabulate_keeps_suites_and_splits_apart() -> None:
    suites = tabulate(both_models(), ["base", "grpo"])
    assert list(suites) == ["safety", "helpfulness"]
    safety = suites["safety"]
    assert {m: s["reward"] for m, s in safety["scores"].items()} == pytest.approx({"base": 4 / 15, "grpo": 0.9})
    assert safety["scores"]["grpo"]["failures"] == {"timeout": 1}
    (pair,) = safety["differences"]
    assert (pair["before"], pair["after"], pair["n"]) == ("base", "grpo", 2)
    assert pair["difference"] == pytest.approx((0.8 + 0.6) / 2)
    assert {split: by["base"]["n"] for split, by in safety["splits"].items()} == {"template": 1, "topic": 2}
    assert safety["splits"]["topic"]["base"]["reward"] == pytest.approx(0.3)
    assert suites["helpfulness"]["splits"] == {}


def test_the_markdown_table() -> None:
    scores = {
        "judge": "rule",
        "models": [{"name": "base"}, {"name": "grpo"}],
        "suites": tabulate(both_models(), ["base", "grpo"]),
    }
    lines = score_table(scores).splitlines()
    assert lines[0] == "| suite | n | base | grpo |"
    assert lines[2] == "| Safety | 2–3 | 0.27 [0.20, 0.40] | 0.90 [0.80, 1.00] |"
    assert lines[3] == "| – held-out template | 1 | 0.20 [0.20, 0.20] | 0.80 [0.80, 0.80] |"
    assert lines[5] == "| Helpfulness | 1 | 0.80 [0.80, 0.80] | 0.80 [0.80, 0.80] |"
    assert "judge: rule; 1 failed verdicts" in lines[7]
    assert lines[9].startswith("- Safety, base to grpo: +0.70 [+0.60, +0.80]; better/worse/equal 2/0/0")


# ---- answers.jsonl --------------------------------------------------------------------------------


def test_answers_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    open_answer = replace(answer("base", 1, 5.0), verdict=None, judge="", completion="改\u2028行</script>")
    judged = answer("base", 2, None, reference="正解", eval_aspect="観点", meta={"held_out": "topic"})
    Answers(path).save([open_answer, judged])
    again = Answers(path)
    assert list(again.found.values()) == [open_answer, judged]
    # The verdict comes later: the last line of an answer counts.
    done = replace(open_answer, judge="rule", verdict=Verdict(4.0, text="4"))
    again.save([done])
    assert Answers(path).get("base", "w", done.example, 64) == done
    assert len(path.read_text(encoding="utf-8").split("\n")) == 4


def test_an_answer_is_used_again_only_for_the_same_work(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "answers.jsonl")
    stored = answer("base", 1, 5.0)
    answers.save([stored])
    asked = stored.example
    assert answers.get("base", "w", asked, 64) == stored
    assert answers.get("grpo", "w", asked, 64) is None
    assert answers.get("base", "trained on", asked, 64) is None
    assert answers.get("base", "w", asked, 65) is None
    assert answers.get("base", "w", replace(asked, question="別の質問"), 64) is None
    assert answers.get("base", "w", replace(asked, reference="別の正解"), 64) is None


def test_a_line_cut_in_half_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Answers(path).save([answer("base", 1, 5.0), answer("base", 2, 4.0)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    answers = Answers(path)
    assert len(answers.found) == 1
    answers.save([answer("base", 2, 4.0)])
    assert path.read_bytes() == whole


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Answers(path).save([answer("base", 1, 5.0)])
    path.write_text(path.read_text(encoding="utf-8") + '{"question": "あ"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="answers.jsonl, line 2: not an answer of judge.py"):
        Answers(path)


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    first = make_model_folder(tmp_path / "a", seed=0)
    copy = make_model_folder(tmp_path / "b", seed=0)
    other = make_model_folder(tmp_path / "c", seed=1)
    assert folder_fingerprint(first) == folder_fingerprint(copy) != folder_fingerprint(other)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert folder_fingerprint(first) != folder_fingerprint(copy)


# ---- generating and judging -----------------------------------------------------------------------


class LengthJudge:
    """Three points for an answer that is not empty; no verdict for question 2."""

    name = identity = "length"

    def __init__(self, cause: str = "timeout") -> None:
        self.cause = cause
        self.batches: list[int] = []

    def judge(self, examples, completions):
        self.batches.append(len(examples))
        pairs = zip(examples, completions, strict=True)
        return [Verdict(None, self.cause) if e.id == "2" else Verdict(3.0 if c else 0.0) for e, c in pairs]

    def close(self) -> None: ...


def test_answers_are_the_models_own_greedy_completions(model_folder: Path) -> None:
    examples = [example(number) for number in range(5)]
    model = prepare("tiny", model_folder, examples, max_tokens=8)
    stops = model.chat.stop_token_ids
    engine = make_engine("torch", model_folder, stop_token_ids=stops, max_length=model.max_length)
    batches = list(answer_questions(engine, model, examples, [0, 2, 3], max_tokens=8, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 1]
    made = [a for batch in batches for a in batch]
    assert [a.example for a in made] == [examples[0], examples[2], examples[3]]
    for a in made:
        prompt = model.chat.encode_prompt([{"role": "user", "content": a.example.question}])
        ((alone,),) = engine.generate([prompt], max_tokens=8, temperature=0.0, seeds=[7])
        assert a.completion == model.chat.decode(alone.token_ids)
        assert (a.num_tokens, a.finish_reason) == (len(alone.token_ids), alone.finish_reason)
        assert a.weights == folder_fingerprint(model_folder) and a.verdict is None
    judge = LengthJudge()
    judged = [a for batch in judge_answers(judge, made, batch_size=2) for a in batch]
    assert judge.batches == [2, 1]
    assert [a.verdict.cause for a in judged] == ["", "timeout", ""]
    assert {a.judge for a in judged} == {"length"}
    assert math.isclose(summarise(judged)["n"], 2)


def test_the_limit_of_failures_is_of_the_whole_evaluation_in_whatever_batches_it_is_judged() -> None:
    """Question 2 fails for ever: 1 of 20 verdicts, and all of a resumed run that has only this one to ask."""
    answers = [replace(answer("a", number, None), verdict=None) for number in range(20)]
    batches = list(judge_answers(LengthJudge(REJECTED), answers, batch_size=3, limit=0.05))
    assert [a.verdict.score for batch in batches for a in batch] == [3.0, 3.0, None] + [3.0] * 17
    others = [a.verdict for batch in batches for a in batch if a.example.id != "2"]
    ((again,),) = judge_answers(LengthJudge(REJECTED), answers[2:3], batch_size=3, limit=0.05, judged=others)
    assert again.verdict.score is None
    with pytest.raises(JudgeFailed, match=r"2 of 20 verdicts failed \(request rejected 2\)"):
        failed = [Verdict(None, REJECTED), *others[1:]]
        list(judge_answers(LengthJudge(REJECTED), answers[2:3], batch_size=3, limit=0.05, judged=failed))


def test_a_question_that_does_not_fit_is_named(model_folder: Path) -> None:
    long = replace(example(7), question="長" * 300)
    with pytest.raises(UserError, match="'test/7': .* tokens for model tiny, with 8 of an answer .* of 256;"):
        prepare("tiny", model_folder, [example(1), long], max_tokens=8)


def test_a_question_twice_is_refused() -> None:
    check_examples([example(1), replace(example(1), source="other")])
    with pytest.raises(UserError, match="'test/1' is in the data twice"):
        check_examples([example(1), example(2), example(1)])
