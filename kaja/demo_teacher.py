"""ScriptedTeacher: plays calm3-22b-chat for synth.py in the demo, through the same engine interface.

The tiny model cannot follow the slides' prompts, so a script answers them: it decodes the prompt, recognises
which of the four it is, and writes `Q: ...` or `A: ...` from the topics and templates of kaja.demo_corpus (those
for training only). A small share of its outputs is bad on purpose (no mark, doubled, empty, cut off), as a real
teacher's would be: the filters of synth.py have something to do.
"""

import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from kaja.chat import Chat, Message
from kaja.demo_corpus import (
    ANSWERS,
    BARE_REFUSALS,
    QUESTIONS,
    REASONS,
    REFUSALS_WITH_REASON,
    Topic,
    topic_of,
    topics,
)
from kaja.engine import Completion
from kaja.errors import UserError
from kaja.sampling import each_limit

ASKS_FOR_QUESTION = "Questionを作成してください"
ASKS_FOR_ANSWER = "Answerを作成してください"
HARMFUL = "有害な質問が与えられ"
# The reference question, or the question to answer, is the first line behind these.
LAST_LINE = re.compile(r"(?:参考質問:|A:で始めて下さい。)\s*(?:Q:)?\s*(?P<question>[^\n]*)")

BAD_SHARE = 0.08  # of all outputs
BARE_REFUSAL_SHARE = 0.15  # of the answers to harmful questions


class ScriptedTeacher:
    """An Engine whose completions are written by a script; a completion depends on (prompt, seed, index)."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def generate(
        self,
        prompts: list[list[int]],
        *,
        group_size: int = 1,
        max_tokens: int | Sequence[int],
        seeds: list[int],
        **sampling: Any,  # means nothing to a script
    ) -> list[list[Completion]]:
        texts = [self.chat.decode(prompt) for prompt in prompts]
        limits = each_limit(max_tokens, len(prompts))
        return [
            [
                self._completion(write(text, random.Random(f"{seed}/{index}/{text}")), limit)
                for index in range(group_size)
            ]
            for text, seed, limit in zip(texts, seeds, limits, strict=True)
        ]

    def _completion(self, text: str, max_tokens: int) -> Completion:
        messages = [Message(role="user", content="-"), Message(role="assistant", content=text)]
        sequence = self.chat.encode(messages)
        tokens = [t for t, own in zip(sequence.input_ids, sequence.completion_mask) if own][:max_tokens]
        whole = len(tokens) == sequence.num_trained
        return Completion(tokens, [0.0] * len(tokens), "stop" if whole else "length")

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        raise UserError("teacher 'scripted': it has no log-probs; only models can score; give a model folder")

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        raise UserError("teacher 'scripted': it has no weights to load; give a model folder")

    def sleep(self) -> None:
        """Nothing to free."""

    def wake(self) -> None:
        """Nothing to restore."""

    def close(self) -> None:
        """Nothing to end."""


def write(prompt: str, rng: random.Random) -> str:
    """What the teacher says to one of the slides' four prompts."""
    found = LAST_LINE.search(prompt)
    if not found or (ASKS_FOR_QUESTION in prompt) == (ASKS_FOR_ANSWER in prompt):
        raise UserError(
            f"teacher 'scripted': the prompt beginning {prompt.strip()[:40]!r} is none of the slides' four; "
            "the script understands nothing else; give a model folder as --teacher"
        )
    question = found["question"].strip()
    if ASKS_FOR_QUESTION in prompt:
        mark, text = "Q:", write_question(question, HARMFUL in prompt, rng)
    else:
        mark, text = "A:", write_answer(question, HARMFUL in prompt, rng)
    if rng.random() >= BAD_SHARE:
        return f"{mark} {text}"
    return rng.choice([text, "", f"{mark} {text}\n{mark} {text}", f"{mark} {text[: len(text) // 2]}", mark])


def write_question(reference: str, harmful: bool, rng: random.Random) -> str:
    """Another topic of the reference's kind, in another template."""
    return rng.choice(QUESTIONS).format(similar_topic(reference, harmful, rng).text)


def similar_topic(reference: str, harmful: bool, rng: random.Random) -> Topic:
    """A training topic of the reference's frame (half of the time) or stream; of any frame if it is unknown."""
    pool = [t for t in topics(held_out=False) if (t.stream == "safety") == harmful]
    like = next((t for t in topics() if t.text == topic_of(reference)), None)
    if like is not None:
        pool = [t for t in pool if t.stream == like.stream] or pool
        if rng.random() < 0.5:
            pool = [t for t in pool if t.frame is like.frame] or pool
    return rng.choice(pool)


def write_answer(question: str, harmful: bool, rng: random.Random) -> str:
    topic = topic_of(question) or question.rstrip("。？?")
    if not harmful:
        return rng.choice(ANSWERS).format(topic) + rng.choice(REASONS)
    if rng.random() < BARE_REFUSAL_SHARE:
        return rng.choice(BARE_REFUSALS)
    return rng.choice(REFUSALS_WITH_REASON).format(topic)
