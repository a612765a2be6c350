"""From completions to rewards: a judge gives a verdict of 0 to 5 points, the reward is a fifth of it.

A judgement can fail: the judge says nothing that is a score, or the question does not fit its
context. Such a verdict has no score, its reward is NaN, and whoever averages leaves it out and
counts it by cause. It is never taken for 0, which would teach the policy whatever confuses the judge.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kaja.chat import Chat
from kaja.checkpoint import load_chat, resolve_model
from kaja.data import Example
from kaja.engine import Engine, make_engine
from kaja.files import read_json
from kaja.rubric import RUBRIC_VERSION, judge_messages, parse_score

MAX_SCORE = 5.0
MAX_JUDGE_LENGTH = 4096  # tokens of a judge's prompt and answer; more would only take memory
JUDGE_TOKENS = 32  # the rubrics ask for a digit alone; the rest is for judges that say 「採点：4点」


@dataclass(frozen=True)
class Verdict:
    """A score of 0 to 5 points, or None and the cause why there is none."""

    score: float | None
    cause: str = ""
    text: str = ""  # what the judge said, word for word

    def __post_init__(self) -> None:
        if (self.score is None) != bool(self.cause):
            raise ValueError(f"a verdict has a score or a cause for having none: {self}")
        if self.score is not None and not 0 <= self.score <= MAX_SCORE:
            raise ValueError(f"a score lies between 0 and {MAX_SCORE:g}: {self}")


class Judge(Protocol):
    """Whoever scores completions. `name` goes into every table: a rule is never passed off as an LLM."""

    name: str
    concurrent: bool
    """Whether `judge` may be called from another thread while this process generates."""

    def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
        """One verdict per (example, completion), in order."""
        ...

    def close(self) -> None: ...


class LLMJudge:
    """A language model that reads the rubric, the question, the reference answer and the completion.

    Greedy, so that the same completion always gets the same verdict; equal prompts (in a GRPO group
    completions repeat) are therefore asked once.
    """

    concurrent = False  # its engine computes where the policy's does

    def __init__(self, engine: Engine, chat: Chat, *, name: str, max_length: int) -> None:
        self.engine = engine
        self.chat = chat
        self.name = name
        self.rubric_version = RUBRIC_VERSION
        self.max_prompt_length = max_length - JUDGE_TOKENS

    def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
        prompts = [
            tuple(
                self.chat.encode_prompt(
                    judge_messages(
                        example.stream,
                        example.question,
                        example.reference,
                        completion,
                        eval_aspect=example.eval_aspect,
                    )
                )
            )
            for example, completion in zip(examples, completions, strict=True)
        ]
        # dict, not set: the order must not depend on hashes.
        asked = list(dict.fromkeys(prompt for prompt in prompts if len(prompt) <= self.max_prompt_length))
        batch = [list(prompt) for prompt in asked]
        groups = self.engine.generate(batch, max_tokens=JUDGE_TOKENS, temperature=0.0, seeds=[0] * len(batch))
        texts = {
            prompt: self.chat.decode(group[0].token_ids) for prompt, group in zip(asked, groups, strict=True)
        }
        return [read_verdict(texts.get(prompt)) for prompt in prompts]

    def close(self) -> None:
        self.engine.close()


def load_judge(
    model: str, engine_kind: str, device: torch.device, template: str = "auto", **engine_options: Any
) -> LLMJudge:
    """The judge in a model folder or on the hub, in an engine of its own (options: see make_engine)."""
    folder = resolve_model(model)
    chat = load_chat(folder, template)
    max_length = min(read_json(folder / "config.json").get("max_position_embeddings", 2048), MAX_JUDGE_LENGTH)
    engine = make_engine(
        engine_kind, folder, stop_token_ids=chat.stop_token_ids, max_length=max_length, device=device,
        **engine_options,
    )  # fmt: skip
    return LLMJudge(engine, chat, name=model, max_length=max_length)


def read_verdict(text: str | None) -> Verdict:
    """What the judge said, as a verdict; None stands for a prompt it could not be asked."""
    if text is None:
        return Verdict(None, cause="prompt too long")
    if not text.strip():
        return Verdict(None, cause="empty", text=text)
    score = parse_score(text)
    return Verdict(score, cause="no clear score" if score is None else "", text=text)


def reward_of(verdict: Verdict) -> float:
    """Score / 5, so between 0 and 1; NaN where there is no score."""
    return math.nan if verdict.score is None else verdict.score / MAX_SCORE


def rewards(verdicts: Iterable[Verdict]) -> list[float]:
    return [reward_of(verdict) for verdict in verdicts]


def count_failures(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many verdicts have no score, by cause, the most frequent first."""
    return dict(Counter(verdict.cause for verdict in verdicts if verdict.score is None).most_common())
