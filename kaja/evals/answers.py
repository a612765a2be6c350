"""The state of an evaluation: who answered what, and with which verdict.

answers.jsonl grows by appended lines: first the answer, later the same answer with its verdict, and the
last line of an answer counts. A run that was killed therefore goes on where it stopped.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kaja.data import Example
from kaja.errors import UserError
from kaja.files import append_jsonl, read_jsonl, read_text, write_text
from kaja.reward import Verdict


@dataclass(frozen=True)
class Answer:
    """One model's completion for one example, with its verdict once it is judged."""

    model: str
    weights: str  # folder_fingerprint of the model's folder
    example: Example
    max_tokens: int
    completion: str
    num_tokens: int
    finish_reason: str
    judge: str = ""
    verdict: Verdict | None = None

    def row(self) -> dict[str, Any]:
        """Flat, for answers.jsonl; `score`, `cause` and `verdict` are there once it is judged."""
        row = {name: value for name, value in vars(self).items() if name not in ("example", "verdict")}
        row |= asdict(self.example)
        if self.verdict is not None:
            row |= {"score": self.verdict.score, "cause": self.verdict.cause, "verdict": self.verdict.text}
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Answer":
        example = Example(**{name: row.pop(name) for name in Example.__dataclass_fields__})
        verdict = None
        if "score" in row:
            verdict = Verdict(row.pop("score"), row.pop("cause"), row.pop("verdict"))
        return cls(**row, example=example, verdict=verdict)


class Answers:
    """All answers of an evaluation by model and question, in memory and in answers.jsonl."""

    def __init__(self, path: Path | str) -> None:
        """Read back what an earlier run left; a last line that a kill cut in half is dropped."""
        self.path = Path(path)
        self.found: dict[tuple[str, str], Answer] = {}
        if not self.path.exists():
            return
        text = read_text(self.path)
        if not text.endswith("\n"):
            write_text(self.path, text[: text.rfind("\n") + 1])
        for number, row in read_jsonl(self.path):
            try:
                self._add(Answer.from_row(row))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.path}, line {number}: not an answer of judge.py ({error}); only judge.py writes "
                    f"this file; remove the line, or start anew in another --output-dir"
                ) from None

    def _add(self, answer: Answer) -> None:
        self.found[answer.model, question_key(answer.example)] = answer

    def save(self, answers: Sequence[Answer]) -> None:
        append_jsonl(self.path, (answer.row() for answer in answers))
        for answer in answers:
            self._add(answer)

    def get(self, model: str, weights: str, example: Example, max_tokens: int) -> Answer | None:
        """The stored answer, unless other weights, another question or another limit made it."""
        answer = self.found.get((model, question_key(example)))
        if answer is None or (answer.weights, answer.max_tokens) != (weights, max_tokens):
            return None
        return answer if answer.example == example else None


def question_key(example: Example) -> str:
    return f"{example.source}/{example.id}"
