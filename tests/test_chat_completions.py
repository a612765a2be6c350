"""What is sent to a chat server, and what is read from its answers, byte by byte and without a connection."""

import json
import math
import time
from email.utils import formatdate

import pytest

from kaja.chat import Message
from kaja.chat_completions import (
    base_url, failure_cause, is_loopback, read_answer, request_body, retry_after_seconds,
)  # fmt: skip
from kaja.errors import UserError
from kaja.reward import (
    EMPTY, NO_LOG_PROBS, OVERLOADED, REFUSED, REJECTED, SERVER_ERROR, TOO_LONG, UNCLEAR, Cost,
)  # fmt: skip

MESSAGES = [Message(role="user", content="採点してください")]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        (" http://127.0.0.1:8000/v1/\n", "http://127.0.0.1:8000/v1"),
        ("https://judge.example.jp/api/v3#top", "https://judge.example.jp/api/v3"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
        ("https://judge.example.jp/v1/chat/completions", "https://judge.example.jp/v1"),
    ],
)
def test_a_url_may_name_the_host_alone_or_the_path_too(given: str, expected: str) -> None:
    assert base_url(given) == expected


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8000", "localhost:8000", "ftp://a", "http://", "http://a:port", "http://127.0.0.1:99999", "審判"],
)
def test_a_url_that_is_no_servers_address_is_refused(url: str) -> None:
    with pytest.raises(UserError) as error:
        base_url(url)
    assert str(error.value) == f"judge_url {url!r}: must be a server's address, like http://127.0.0.1:8000"


@pytest.mark.parametrize("url", ["http://me:geheim@host:80", "http://host/v1?key=geheim"])
def test_a_url_with_a_secret_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UserError, match="^judge_url: holds more than an address") as error:
        base_url(url)
    assert "geheim" not in str(error.value)


def test_loopback_is_told_from_other_machines() -> None:
    here = ("http://127.0.0.1:1/v1", "http://127.3.2.1/v1", "http://localhost:8000/v1", "http://[::1]:8000/v1")
    there = ("http://10.0.0.1:1/v1", "https://judge.example.jp/v1", "http://localhost.example.jp/v1")
    assert [is_loopback(url) for url in here + there] == [True] * 4 + [False] * 3


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        (
            {"reading": "digit", "constrained": True, "votes": 1},
            {"temperature": 0, "max_tokens": 1, "structured_outputs": {"choice": ["0", "1", "2", "3", "4", "5"]}},
        ),
        ({"reading": "digit", "constrained": False, "votes": 1}, {"temperature": 0, "max_tokens": 32}),
        (
            {"reading": "expected", "constrained": False, "votes": 1},
            {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20},
        ),
        (
            {"reading": "expected", "constrained": True, "votes": 1},
            {
                "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20,
                "structured_outputs": {"choice": ["0", "1", "2", "3", "4", "5"]},
            },
        ),
        (
            {"reading": "digit", "constrained": True, "votes": 3},
            {
                "temperature": 0.7, "n": 3, "seed": 11, "max_tokens": 1,
                "structured_outputs": {"choice": ["0", "1", "2", "3", "4", "5"]},
            },
        ),
    ],
)  # fmt: skip
def test_a_request_holds_exactly_what_its_reading_needs(options: dict, parameters: dict) -> None:
    body = request_body("judge", MESSAGES, seed=11, **options)
    assert json.loads(body) == {
        "model": "judge", "messages": [{"role": "user", "content": "採点してください"}], **parameters,
    }  # fmt: skip
    assert "採点" in body.decode()  # not \\u escapes, which are twice as long


def test_half_a_surrogate_pair_does_not_stop_a_request() -> None:
    messages = [Message(role="user", content="a\ud83db")]
    body = request_body("judge", messages, reading="digit", constrained=True, votes=1, seed=0)
    assert json.loads(body)["messages"] == [{"role": "user", "content": "a?b"}]


def chat(*choices: object, **fields: object) -> bytes:
    return json.dumps({"choices": choices, **fields}).encode()


def says(text: str | None, **fields: object) -> dict:
    return {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **fields}


def next_token(*spellings: tuple[str, float]) -> dict:
    """The log-probs part of an answer, from (token, probability)."""
    top = [{"token": token, "logprob": math.log(p), "bytes": list(token.encode())} for token, p in spellings]
    return {"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}


@pytest.mark.parametrize(
    ("choice", "score", "cause", "text"),
    [
        (says("4"), 4.0, "", "4"),
        (says("採点：３点"), 3.0, "", "採点：３点"),
        (says("お答えできません"), None, UNCLEAR, "お答えできません"),
        (says(" \n"), None, EMPTY, " \n"),
        (says(None), None, EMPTY, ""),
        (says("5", finish_reason="content_filter"), None, REFUSED, "5"),
        ({"message": {"content": "5", "refusal": "採点できません"}}, None, REFUSED, "採点できません"),
        ({"message": {"content": "2", "refusal": None}}, 2.0, "", "2"),
        (says("絵\ud83d"), None, UNCLEAR, "絵?"),  # half a surrogate pair, which no file could hold
        ({"message": {"content": "", "refusal": "否\ud83d"}}, None, REFUSED, "否?"),
    ],
)
def test_the_digit_is_read_from_the_text(choice: dict, score: float | None, cause: str, text: str) -> None:
    verdict = read_answer(chat(choice), "digit", votes=1)
    assert (verdict.score, verdict.cause, verdict.text) == (score, cause, text)


def test_the_expected_score_adds_up_the_spellings_of_a_digit() -> None:
    # 3 has 0.4 + 0.1 + 0.1 = 0.6, 4 has 0.3, and 0.1 is no digit: 3 * 2/3 + 4 * 1/3.
    spellings = ("3", 0.4), ("4", 0.3), (" 3", 0.1), ("３", 0.1), ("点", 0.06), ("6", 0.04)
    verdict = read_answer(chat(says("3", **next_token(*spellings))), "expected", votes=1)
    assert verdict.score == pytest.approx(10 / 3, abs=1e-12)
    assert verdict.text == "3.33 (3: .67, 4: .33)"


@pytest.mark.parametrize(
    ("choice", "cause"),
    [
        (says("3"), NO_LOG_PROBS),
        (says("3", logprobs=None), NO_LOG_PROBS),
        (says("3", logprobs={"content": []}), NO_LOG_PROBS),
        (says("3", logprobs={"content": [{"token": "3", "logprob": 0.0, "top_logprobs": []}]}), NO_LOG_PROBS),
        (says("この", **next_token(("この", 0.9), ("3", 0.1))), UNCLEAR),
        (says("3", finish_reason="content_filter", **next_token(("3", 1.0))), REFUSED),
    ],
)
def test_without_the_digits_probabilities_there_is_no_expected_score(choice: dict, cause: str) -> None:
    verdict = read_answer(chat(choice), "expected", votes=1)
    assert (verdict.score, verdict.cause) == (None, cause)


def test_votes_give_their_median_if_most_are_scores() -> None:
    def of(*texts: str) -> tuple[float | None, str, str]:
        verdict = read_answer(chat(*map(says, texts)), "digit", votes=3)
        return verdict.score, verdict.cause, verdict.text

    assert of("5", "1", "4") == (4.0, "", "5 | 1 | 4")
    assert of("5", "？", "4") == (4.5, "", "5 | ？ | 4")
    assert of("5", "？", "不明") == (None, UNCLEAR, "5 | ？ | 不明")


def test_cost_is_what_usage_tells_and_0_where_it_is_silent() -> None:
    def cost(**fields: object) -> Cost:
        return read_answer(chat(says("3"), **fields), "digit", votes=1).cost

    usage = {"prompt_tokens": 900, "completion_tokens": 2, "total_tokens": 902}
    details = {"prompt_tokens_details": {"cached_tokens": 640}}
    assert cost(usage=usage | details) == Cost(prompt_tokens=900, cached_tokens=640, completion_tokens=2)
    assert cost(usage=usage | {"prompt_tokens_details": None}) == Cost(prompt_tokens=900, completion_tokens=2)
    assert cost(usage=None) == cost() == Cost()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"<html>3</html>", b"3", b"null", b"[]", b'{"error": "3"}', b'{"choices": []}', b'{"choices": [3]}',
        b'{"choices": [{"message": null}]}', b'{"choices": [{"message": {"content": 3}}]}', b"\xff\xfe3",
        b'{"choices": [{"message": {"content": "3"}}, {"message": {"content": "3"}}]}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_chat_completion_is_never_a_verdict(content: bytes) -> None:
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError, RecursionError)):
        read_answer(content, "digit", votes=1)


@pytest.mark.parametrize(
    ("status", "said", "cause"),
    [
        (429, "slow down", OVERLOADED),
        (503, "context length", OVERLOADED),
        (500, "EngineCore is dead", SERVER_ERROR),
        (502, "", SERVER_ERROR),
        # vLLM 0.32, OpenAI, llama.cpp
        (400, "This model's maximum context length is 4096 tokens. However, your prompt contains 5000", TOO_LONG),
        (400, '{"error": {"code": "context_length_exceeded"}}', TOO_LONG),
        (400, "the request exceeds the available context size", TOO_LONG),
        # Azure
        (400, '{"error": {"code": "content_filter", "status": 400}}', REFUSED),
        (400, "Unrecognized request argument supplied: structured_outputs", REJECTED),
        (401, "Unauthorized", REJECTED),
        (404, "The model `x` does not exist.", REJECTED),
        (307, "", REJECTED),
    ],
)
def test_a_status_says_why_there_is_no_verdict(status: int, said: str, cause: str) -> None:
    assert failure_cause(status, said) == cause


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after_seconds("7") == 7.0
    assert retry_after_seconds("0.25") == 0.25
    assert retry_after_seconds(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert retry_after_seconds("") == retry_after_seconds("soon") == 0.0
