"""The judge's two rubrics and the teacher's four prompts, word for word from the slides; the score parser.

The texts are the files kaja/prompts/*.txt; what is put into them is never scanned for placeholders, so
braces, headings or scores inside a question stay what they are. The safety stream has its own texts;
borderline and helpfulness share the helpfulness ones. The helpfulness rubric is ELYZA's GPT-4 rubric,
in which 「論理的に答えられません」 reads 「倫理的に答えられません」: the slide's wording is kept.
"""

import re
import unicodedata
from functools import cache
from importlib import resources

from kaja.chat import Message
from kaja.errors import UserError

RUBRIC_VERSION = "slides-1"  # goes into every record that a prompt of this module had a part in

STREAMS = ("safety", "borderline", "helpfulness")

PLACEHOLDER = re.compile(r"\{(input_text|output_text|eval_aspect|pred|question)\}")
ASPECT_SECTION = "問題固有の採点基準\n{eval_aspect}\n\n"

# 「5点満点中」, 「5段階評価で」 and 「/5」 say what the scale is, not what the score is.
SCALE = re.compile(r"5\s*(?:点\s*満点|段階)(?:評価)?(?:\s*[中での])?|/\s*5(?![0-9.])(?:\s*点)?")
NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


def judge_messages(
    stream: str, question: str, reference: str, completion: str, eval_aspect: str = ""
) -> list[Message]:
    """What the judge reads to score a completion; without an aspect its heading is left out."""
    kind = prompt_kind(stream)
    rubric = prompt_text(f"judge_{kind}_user")
    if not eval_aspect:
        rubric = rubric.replace(ASPECT_SECTION, "")
    values = {
        "input_text": question,
        "output_text": reference,
        "eval_aspect": eval_aspect,
        "pred": completion,
    }
    return [
        Message(role="system", content=prompt_text(f"judge_{kind}_system")),
        Message(role="user", content=fill(rubric, values)),
    ]


def question_messages(stream: str, question: str) -> list[Message]:
    """Asks the teacher for a new question like the given one (its answer begins with "Q:")."""
    prompt = prompt_text(f"question_{prompt_kind(stream)}")
    return [Message(role="user", content=fill(prompt, {"question": question}))]


def answer_messages(stream: str, question: str) -> list[Message]:
    """Asks the teacher to answer a question (its answer begins with "A:").

    The prompt speaks of a text that begins with "Q:", which is how the question prompt has it written.
    """
    prompt = prompt_text(f"answer_{prompt_kind(stream)}")
    return [Message(role="user", content=fill(prompt, {"question": f"Q: {question}"}))]


def parse_score(text: str) -> float | None:
    """The score 0 to 5 that a judge's answer names, or None where it names none, or more than one.

    >>> parse_score("採点：４点"), parse_score("4か5"), parse_score("5点満点中3点です。"), parse_score("10")
    (4.0, None, 3.0, None)
    """
    plain = unicodedata.normalize("NFKC", text).replace("−", "-")
    numbers = {float(number) for number in NUMBER.findall(SCALE.sub(" ", plain))}
    if len(numbers) != 1:
        return None
    score = numbers.pop()
    return score if score in range(6) else None


def prompt_kind(stream: str) -> str:
    if stream not in STREAMS:
        raise UserError(f"stream {stream!r}: unknown; choose one of {', '.join(STREAMS)}")
    return "safety" if stream == "safety" else "helpfulness"


@cache
def prompt_text(name: str) -> str:
    return resources.files("kaja").joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")


def fill(prompt: str, values: dict[str, str]) -> str:
    """Replace every placeholder, in one pass: a value that looks like a placeholder stays as it is."""
    return PLACEHOLDER.sub(lambda found: values[found[1]], prompt)
