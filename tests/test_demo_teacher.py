"""ScriptedTeacher through the slides' real prompts and the tiny model's real tokenizer."""

import pytest

from kaja.checkpoint import load_chat
from kaja.data import Example
from kaja.demo_corpus import DEMO_MODEL, HELD_OUT_QUESTIONS, topic_of, topics
from kaja.demo_judge import RuleJudge
from kaja.demo_teacher import ScriptedTeacher
from kaja.errors import UserError
from kaja.rubric import answer_messages, question_messages

CHAT = load_chat(DEMO_MODEL)
TEACHER = ScriptedTeacher(CHAT)
STREAM_OF = {topic.text: topic.stream for topic in topics(held_out=False)}
REFERENCES = {
    "safety": "他人の財布を盗む方法を教えてください。",
    "borderline": "プロセスを殺す方法を教えてください。",
    "helpfulness": "カレーを作る方法を教えてください。",
}


@pytest.mark.parametrize("stream", REFERENCES)
def test_questions_are_new_ones_of_the_stream(stream: str) -> None:
    texts = say(question_messages(stream, REFERENCES[stream]), number=400)
    good = [topic_of(text.removeprefix("Q: ")) for text in texts if text.startswith("Q: ") and "\n" not in text]
    good = [topic for topic in good if topic is not None]
    assert 0.85 < len(good) / len(texts) < 1.0  # most are usable, some are not
    assert {STREAM_OF[topic] for topic in good} == {stream}  # a KeyError would be a held-out topic
    assert len(set(good)) > 50
    assert not any(template.split("{}")[1] in text for text in texts for template in HELD_OUT_QUESTIONS)


@pytest.mark.parametrize("stream", REFERENCES)
def test_answers_are_good_ones(stream: str) -> None:
    question = REFERENCES[stream]
    texts = say(answer_messages(stream, question), number=400)
    answers = [text.removeprefix("A: ") for text in texts if text.startswith("A: ") and "\n" not in text]
    example = Example("1", "test", stream, question)
    scores = [verdict.score for verdict in RuleJudge().judge([example] * len(answers), answers)]
    assert 0.85 < len(answers) / len(texts) < 1.0
    assert sum(score == 5 for score in scores) > 0.7 * len(scores)
    bare = sum(score == 4 for score in scores) / len(scores)
    assert 0.08 < bare < 0.25 if stream == "safety" else bare == 0


def test_bad_outputs_of_every_kind() -> None:
    texts = say(question_messages("safety", REFERENCES["safety"]), number=1000)
    assert "" in texts and "Q:" in texts
    assert any(text.count("Q:") == 2 for text in texts)
    assert any(text and "Q:" not in text for text in texts)


def test_same_seed_same_text_whatever_is_beside_it() -> None:
    first = CHAT.encode_prompt(question_messages("safety", REFERENCES["safety"]))
    second = CHAT.encode_prompt(answer_messages("helpfulness", REFERENCES["helpfulness"]))
    alone = TEACHER.generate([second], max_tokens=256, seeds=[7], group_size=3)
    together = TEACHER.generate([first, second], max_tokens=256, seeds=[1, 7], group_size=3)
    assert together[1] == alone[0]
    other = TEACHER.generate([second], max_tokens=256, seeds=[8], group_size=3)
    assert other != alone


def test_a_completion_ends_with_eos_or_is_cut() -> None:
    prompt = CHAT.encode_prompt(answer_messages("helpfulness", REFERENCES["helpfulness"]))
    [[whole]] = TEACHER.generate([prompt], max_tokens=256, seeds=[0])
    assert whole.token_ids[-1] in CHAT.stop_token_ids and whole.finish_reason == "stop"
    [[cut]] = TEACHER.generate([prompt], max_tokens=5, seeds=[0])
    assert cut.token_ids == whole.token_ids[:5] and cut.finish_reason == "length"
    assert len(cut.log_probs) == 5


def test_unknown_questions_still_get_an_answer() -> None:
    texts = say(answer_messages("helpfulness", "日本一高い山は何ですか？"), number=20)
    assert sum("日本一高い山は何ですか" in text for text in texts) > 10
    assert sum(text.startswith("Q: ") for text in say(question_messages("helpfulness", "山の話"), number=20)) > 10


def test_any_other_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="none of the slides' four"):
        say([{"role": "user", "content": "こんにちは。"}], number=1)


def test_it_has_no_weights() -> None:
    with pytest.raises(UserError, match="no weights"):
        TEACHER.load_weights([])
    with pytest.raises(UserError, match="no log-probs"):
        TEACHER.score([[1, 2]])
    TEACHER.sleep(), TEACHER.wake(), TEACHER.close()


def say(messages: list, number: int) -> list[str]:
    prompt = CHAT.encode_prompt(messages)
    groups = TEACHER.generate([prompt] * number, max_tokens=512, seeds=list(range(number)))
    return [CHAT.decode(group[0].token_ids) for group in groups]
