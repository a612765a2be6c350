"""The rounds of the synthesis on rank 0: what is cut because of other texts, and every finished round on disk."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from kaja import filters
from kaja.contamination import GuardIndex, check
from kaja.data import Example
from kaja.dedup import Duplicates
from kaja.errors import UserError
from kaja.files import append_jsonl, read_jsonl
from kaja.reward import Verdict
from kaja.synthesis import (
    CONTAMINATED, COPIED, DUPLICATE, LOW_SCORE, NEAR_DUPLICATE, NO_REPLY, NO_VERDICT, Attempt, Round, Row, Settings,
    category_of,
)  # fmt: skip
from kaja.teacher import Reply

ROUNDS_PER_SHARD = 20  # lines of a file in rounds/
SEED = "seed "  # begins the key of a seed among the texts that must not be copied


class Copies:
    """What a text is cut for because of others: seeds, earlier questions, evaluation sets."""

    def __init__(self, seeds: Sequence[Example], settings: Settings, guard: GuardIndex | None = None) -> None:
        self.settings, self.guard = settings, guard
        self.known = Duplicates(threshold=settings.near_duplicates)
        for example in seeds:
            self.known.add(f"{SEED}{example.source} {example.id}", example.question)

    def remember(self, outcome: Row) -> None:
        """Take in the questions of a round that another process did."""
        for row in outcome["questions"]:
            if not row["cut"]:
                self.known.add(str(row["attempt"]), row["question"])

    def outcome(
        self, round_: Round, replies: Sequence[Reply], verdicts: Sequence[Verdict] = ()
    ) -> Row:
        """What became of a round, as it stands in rounds/: rows of questions, answers and verdicts."""
        split = len(round_.attempts)
        return {
            "questions": self.questions(round_.attempts, replies[:split]),
            "answers": self.answers(round_.unanswered, replies[split:]),
            "verdicts": [self.verdict(*pair) for pair in zip(round_.unjudged, verdicts, strict=True)],
            "tokens": {
                "prompt": sum(reply.prompt_tokens for reply in replies),
                "completion": sum(reply.tokens for reply in replies),
            },
        }

    def questions(self, attempts: Sequence[Attempt], replies: Sequence[Reply]) -> list[Row]:
        rows = []
        for attempt, reply in zip(attempts, replies, strict=True):
            row = {
                "attempt": attempt.number, "source": attempt.seed.source, "stream": attempt.seed.stream,
                "seed_id": attempt.seed.id, "sampling_seed": attempt.sampling_seed,
            }  # fmt: skip
            rows.append(row | read_reply("question", reply))
        self.cut_contaminated("question", rows)
        for row in rows:
            if not row["cut"]:
                self.cut_copy(row)
        return rows

    def answers(self, asked: Sequence[Row], replies: Sequence[Reply]) -> list[Row]:
        rows = [
            {"attempt": row["attempt"], **read_reply("answer", reply)}
            for row, reply in zip(asked, replies, strict=True)
        ]
        self.cut_contaminated("answer", rows)
        return rows

    def cut_contaminated(self, kind: filters.Kind, rows: Sequence[Row]) -> None:
        if self.guard is None:
            return
        kept = {str(row["attempt"]): row for row in rows if not row["cut"]}
        for hit in check(((number, {kind: row[kind]}) for number, row in kept.items()), self.guard):
            row = kept[hit.record]
            row["cut"] = f"{kind}: {CONTAMINATED}"
            row.setdefault("hits", []).append({name: value for name, value in asdict(hit).items() if name != "record"})

    def cut_copy(self, row: Row) -> None:
        """Cut a question that is nearly a seed's or an earlier one's, of a pair or not; else remember it."""
        signature = self.known.signature(row["question"])
        copied = self.known.find(row["question"], signature)
        if copied is None:
            self.known.add(str(row["attempt"]), row["question"], signature)
        else:
            exact = self.known.find_exact(row["question"]) is not None
            row["cut"] = f"question: {COPIED if copied.startswith(SEED) else DUPLICATE if exact else NEAR_DUPLICATE}"

    def verdict(self, row: Row, verdict: Verdict) -> Row:
        if verdict.score is None:
            return {"attempt": row["attempt"], "cut": NO_VERDICT, "cause": verdict.cause}
        cut = LOW_SCORE if verdict.score < self.settings.min_judge_score else ""
        return {"attempt": row["attempt"], "cut": cut, "score": verdict.score}

    def passed(self) -> list[str]:
        """Names of what every pair went through."""
        return [
            "format", "length", "language", "repetition",
            "refusals of harmless questions" if self.settings.keep_bare_refusals else "refusals",
            "near-duplicates" if self.settings.near_duplicates < 1 else "duplicates",
            *(["evaluation sets"] if self.guard else []),
            *([f"judge at least {self.settings.min_judge_score:g}"] if self.settings.min_judge_score else []),
        ]  # fmt: skip


def read_reply(kind: filters.Kind, reply: Reply) -> Row:
    if reply.error:
        return {"cut": f"{kind}: {NO_REPLY}", kind: "", "error": reply.error}
    return {"cut": reply.cut, kind: reply.text}


class RoundLog:
    """The finished rounds of a run in files of ROUNDS_PER_SHARD lines; the first line says which seeds they are of,
    and which evaluation sets they were compared with.

    A line is forced to disk before the next round begins. What a kill left of a last line is removed.
    """

    def __init__(self, folder: Path, seeds: Sequence[Example], guard: GuardIndex | None = None) -> None:
        self.folder, self.header = folder, {"seeds": fingerprint(seeds), "guard": fingerprint_of_guard(guard)}

    def begin(self) -> Iterator[Row]:
        """The rounds of an earlier run, if there are any; exhaust it before anything is appended."""
        self.folder.mkdir(exist_ok=True)
        shards = self.shards()
        if shards:
            drop_half_line(shards[-1])
        first = next(iter(read_jsonl(shards[0])), None) if shards else None
        if first is None:
            append_jsonl(self.shard(0), [self.header])
        else:
            self.check_same(first[1])
        return iter(self)

    def check_same(self, header: Row) -> None:
        """The set says of every pair what it went through: what was begun goes on in the same way."""
        for name, what, rule in (
            ("seeds", "other seeds", "read the same seed files"),
            ("guard", "other evaluation sets", "be given the same --guard or --allow-contaminated"),
        ):
            if header.get(name) != self.header[name]:
                raise UserError(
                    f"{self.folder}: was begun with {what}; a resumed run must {rule}; restore them, or start anew "
                    "in another --output-dir"
                )

    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))

    def shard(self, round_number: int) -> Path:
        return self.folder / f"{round_number // ROUNDS_PER_SHARD:05d}.jsonl"

    def __iter__(self) -> Iterator[Row]:
        """The outcomes of all rounds, in order; UserError where one is missing."""
        number = 0
        for shard in self.shards():
            for line_number, row in read_jsonl(shard):
                if "seeds" in row:
                    continue
                if row["round"] != number:
                    raise UserError(
                        f"{shard}, line {line_number}: round {row['round']} where {number} is expected; a line or "
                        "file was lost; restore it, or start anew in another --output-dir"
                    )
                number += 1
                yield row

    def append(self, number: int, outcome: Row) -> None:
        append_jsonl(self.shard(number), [{"round": number, **outcome}])


def drop_half_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def fingerprint(seeds: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in seeds:
        parts = [example.source, example.stream, example.id, example.question, category_of(example)]
        digest.update(json.dumps(parts, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def fingerprint_of_guard(guard: GuardIndex | None) -> str:
    """Of the texts that it knows, under their names; "" where nothing is compared."""
    if guard is None:
        return ""
    digest = hashlib.sha256()
    for item in guard.items:
        digest.update(json.dumps([item.set, item.id, item.part, item.whole], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
