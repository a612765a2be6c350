"""Seeds -> question/answer pairs: plan, ask for a question, filter, ask for its answer, filter, write.

The work is a sequence of batches. What batch b asks depends only on the settings, the seeds and the
outcome of the batches before, and each finished batch is one line of batches.jsonl. So a run that was
killed reads the lines, goes on behind them, and ends with the set that an uninterrupted run makes.

Every attempt takes one seed and makes at most one pair. The target is divided evenly over the sources;
within a source all seeds take turns, in a new order each round.
"""

import hashlib
import json
import math
import os
import random
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaja.chat import Chat
from kaja.data import Example
from kaja.engine import Completion, Engine
from kaja.errors import UserError
from kaja.files import append_jsonl, read_jsonl
from kaja.rubric import RUBRIC_VERSION, answer_messages, question_messages

SourceKey = tuple[str, str]  # source and stream
Row = dict[str, Any]  # what became of one attempt, as it stands in batches.jsonl

MIN_CHARS = 5  # shorter texts (":", 「解答：」) say nothing, and are known to fool judges
SHOWN_CHARS = 300  # of a text that a filter cut
# A source is given up when its last 20 * max_attempts attempts made fewer than 20 pairs.
JUDGED_PAIRS = 20

# The funnel: every reason for which an attempt makes no pair, in the order in which it is looked for.
CUTS = (
    "question: cut off",
    "question: no Q:",
    "question: more than one",
    "question: empty",
    "question: too short",
    "question: too long",
    "question: copied from a seed",
    "question: duplicate",
    "answer: cut off",
    "answer: no A:",
    "answer: more than one",
    "answer: empty",
    "answer: too short",
    "answer: too long",
    "answer: unfinished",
)
SURPLUS = "not needed: its source is complete"

MARKS = {"question": re.compile(r"[QＱ]\s*[:：]"), "answer": re.compile(r"[AＡ]\s*[:：]")}
ANY_MARK = re.compile(r"^\s*[QAＱＡ]\s*[:：]", re.MULTILINE)
# A list or heading may end in any character; other text whose last one is a letter or 「、」 broke off.
UNFINISHED = re.compile(r"^(?!\s*(?:[-*・#|>]|\d+[.)])).*(?:[^\W\d_a-zA-Z]|、)$")


@dataclass(frozen=True)
class Settings:
    """What the set of pairs depends on, besides the seeds and the teacher."""

    target: int
    temperature: float
    batch_size: int
    max_question_tokens: int
    max_answer_tokens: int
    max_question_chars: int
    max_answer_chars: int
    max_length: int  # of the teacher: prompt and completion together
    max_attempts: int  # per pair, of late; a source that needs more is given up
    seed: int


@dataclass(frozen=True)
class Attempt:
    seed: Example
    number: int  # counts the attempts of all sources
    sampling_seed: int


class Synthesis:
    """The state of a run: how often each source was tried, what was accepted and what was cut.

    A function of the finished batches alone: `add` is called with the rows of each, whether they come
    from the teacher or from batches.jsonl.
    """

    def __init__(self, seeds: Sequence[Example], settings: Settings) -> None:
        self.settings = settings
        self.seeds: dict[SourceKey, list[Example]] = {}
        for example in seeds:
            self.seeds.setdefault((example.source, example.stream), []).append(example)
        self.quotas = divide(settings.target, list(self.seeds))
        self.attempts = dict.fromkeys(self.seeds, 0)
        self.accepted = dict.fromkeys(self.seeds, 0)
        window = JUDGED_PAIRS * settings.max_attempts
        self.latest: dict[SourceKey, deque[bool]] = {source: deque(maxlen=window) for source in self.seeds}
        self.pairs: list[Row] = []
        self.cuts: Counter[str] = Counter()
        self.examples: dict[str, Row] = {}  # the first that each filter cut
        self.known = {normalised(example.question) for example in seeds}
        self.seen: set[str] = set()

    def plan(self) -> list[Attempt]:
        """The attempts of the next batch; none when every source is complete or given up.

        Each source asks for as many as it probably needs; together they get about batch_size.
        """
        wanted = {}
        for source, quota in self.quotas.items():
            latest = self.latest[source]
            given_up = len(latest) == latest.maxlen and sum(latest) < JUDGED_PAIRS
            # One success in one attempt is assumed before there are any.
            rate = (sum(latest) + 1) / (len(latest) + 1)
            wanted[source] = 0 if given_up else math.ceil((quota - self.accepted[source]) / rate)
        scale = min(1.0, self.settings.batch_size / max(1, sum(wanted.values())))
        number = sum(self.attempts.values())
        batch = []
        for source, count in wanted.items():
            first = self.attempts[source]
            for turn in range(first, first + math.ceil(count * scale)):
                sampling_seed = stable_number(self.settings.seed, "sampling", number)
                batch.append(Attempt(self.seed_of_turn(source, turn), number, sampling_seed))
                number += 1
        return batch

    def seed_of_turn(self, source: SourceKey, turn: int) -> Example:
        seeds = self.seeds[source]
        order = list(range(len(seeds)))
        random.Random(stable_number(self.settings.seed, *source, turn // len(seeds))).shuffle(order)
        return seeds[order[turn % len(seeds)]]

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            source = (row["source"], row["stream"])
            self.attempts[source] += 1
            self.latest[source].append(not row["cut"])
            cut = row["cut"]
            if not cut and self.accepted[source] >= self.quotas[source]:
                cut = SURPLUS
            if cut:
                self.cuts[cut] += 1
                self.examples.setdefault(cut, row)
                continue
            self.accepted[source] += 1
            self.seen.add(normalised(row["question"]))
            self.pairs.append(row)

    def why_not_reached(self) -> str:
        """Empty when the target is reached."""
        short = [source for source, quota in self.quotas.items() if self.accepted[source] < quota]
        if not short:
            return ""
        told = "; ".join(
            f"{name} ({stream}) {self.accepted[name, stream]} of {self.quotas[name, stream]} "
            f"from {self.attempts[name, stream]} attempts"
            for name, stream in short
        )
        (cut, count), *_ = self.cuts.most_common(1) or [("nothing", 0)]
        return (
            f"target {self.settings.target} not reached: {len(self.pairs)} pairs; {told}; most were cut as "
            f"{cut!r} ({count}; funnel.json has all filters); add seeds, raise --max-attempts or lower --target"
        )

    def funnel(self) -> Row:
        """Counts for funnel.json: sources, and what each filter let through and cut."""
        left = sum(self.attempts.values())
        steps = []
        for cut in (*CUTS, SURPLUS):
            step = {"filter": cut, "in": left, "cut": self.cuts[cut]}
            left -= self.cuts[cut]
            if cut in self.examples:
                row = self.examples[cut]
                step["example"] = {name: row[name] for name in ("seed_id", "question", "answer") if row.get(name)}
            steps.append(step)
        sources = [
            {
                "source": name, "stream": stream, "seeds": len(seeds), "wanted": self.quotas[name, stream],
                "attempts": self.attempts[name, stream], "pairs": self.accepted[name, stream],
            }
            for (name, stream), seeds in self.seeds.items()
        ]  # fmt: skip
        return {
            "target": self.settings.target,
            "attempts": sum(self.attempts.values()),
            "pairs": len(self.pairs),
            "sources": sources,
            "filters": steps,
        }


def run_batch(synthesis: Synthesis, batch: Sequence[Attempt], teacher: Engine, chat: Chat) -> list[Row]:
    """Questions for all attempts of a batch, then answers to those that passed the filters."""
    rows: list[Row] = [
        {
            "attempt": attempt.number, "source": attempt.seed.source, "stream": attempt.seed.stream,
            "seed_id": attempt.seed.id, "sampling_seed": attempt.sampling_seed, "cut": "", "question": "", "answer": "",
        }
        for attempt in batch
    ]  # fmt: skip
    settings = synthesis.settings
    prompts = [chat.encode_prompt(question_messages(a.seed.stream, a.seed.question)) for a in batch]
    completions = ask(teacher, prompts, rows, settings.max_question_tokens, settings.temperature)
    for row, completion in zip(rows, completions, strict=True):
        row["cut"], row["question"] = read_completion("question", completion, chat, settings.max_question_chars)
    cut_copies(rows, synthesis)

    passed = [row for row in rows if not row["cut"]]
    prompts = [chat.encode_prompt(answer_messages(row["stream"], row["question"])) for row in passed]
    room = settings.max_length - settings.max_answer_tokens
    for row, prompt in zip(passed, prompts, strict=True):
        row["cut"] = "" if len(prompt) <= room else "question: too long"
    prompts = [prompt for prompt in prompts if len(prompt) <= room]
    passed = [row for row in passed if not row["cut"]]
    completions = ask(teacher, prompts, passed, settings.max_answer_tokens, settings.temperature)
    for row, completion in zip(passed, completions, strict=True):
        row["cut"], row["answer"] = read_completion("answer", completion, chat, settings.max_answer_chars)
    return rows


def ask(
    teacher: Engine, prompts: list[list[int]], rows: Sequence[Row], max_tokens: int, temperature: float
) -> list[Completion]:
    if not prompts:
        return []
    seeds = [row["sampling_seed"] for row in rows]
    groups = teacher.generate(prompts, max_tokens=max_tokens, temperature=temperature, seeds=seeds)
    return [group[0] for group in groups]


def cut_copies(rows: Sequence[Row], synthesis: Synthesis) -> None:
    """Cut questions that are a seed's, an accepted pair's, or an earlier one's of the same batch."""
    earlier: set[str] = set()
    for row in rows:
        if row["cut"]:
            continue
        question = normalised(row["question"])
        if question in synthesis.known:
            row["cut"] = "question: copied from a seed"
        elif question in synthesis.seen or question in earlier:
            row["cut"] = "question: duplicate"
        earlier.add(question)


def read_completion(kind: str, completion: Completion, chat: Chat, max_chars: int) -> tuple[str, str]:
    """(why it is cut, or "") and the question or answer without its mark, or the raw text of what is cut."""
    raw = chat.decode(completion.token_ids).strip()
    mark = MARKS[kind].match(raw)
    text = raw[mark.end():].strip() if mark else ""
    if completion.finish_reason == "length":
        cut = "cut off"
    elif not mark:
        cut = "no Q:" if kind == "question" else "no A:"
    elif len(ANY_MARK.findall(raw)) > 1:
        cut = "more than one"
    elif not text:
        cut = "empty"
    elif len(text) < MIN_CHARS:
        cut = "too short"
    elif len(text) > max_chars:
        cut = "too long"
    elif kind == "answer" and UNFINISHED.match(text.splitlines()[-1]):
        cut = "unfinished"
    else:
        return "", text
    return f"{kind}: {cut}", raw[:SHOWN_CHARS]


def usable_seeds(seeds: Sequence[Example], chat: Chat, settings: Settings) -> list[Example]:
    """The seeds whose prompt fits the teacher; UserError if ids clash or a source has none left."""
    room = settings.max_length - settings.max_question_tokens
    usable: list[Example] = []
    ids: set[tuple[str, str, str]] = set()
    sources = {(example.source, example.stream) for example in seeds}
    for example in seeds:
        key = (example.source, example.stream, example.id)
        if key in ids:
            raise UserError(
                f"--seeds: two seeds of {example.source} have the id {example.id!r}; ids tell where a pair came "
                "from; give every file once"
            )
        ids.add(key)
        if len(chat.encode_prompt(question_messages(example.stream, example.question))) <= room:
            usable.append(example)
    for source, stream in sorted(sources - {(example.source, example.stream) for example in usable}):
        raise UserError(
            f"--seeds: no question of {source} ({stream}) leaves room for {settings.max_question_tokens} tokens in "
            f"--max-length {settings.max_length}; raise it, within the teacher's context"
        )
    return usable


def finished_batches(path: Path, seeds: Sequence[Example]) -> list[list[Row]]:
    """The batches of an earlier run; what a kill left of a last line is removed from the file.

    A new file is begun with a line that says which seeds it is about.
    """
    header = {"seeds": fingerprint(seeds)}
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
    lines = [line for _, line in read_jsonl(path)] if path.exists() else []
    if not lines:
        append_jsonl(path, [header])
        return []
    if lines[0] != header:
        raise UserError(
            f"{path}: was begun with other seeds; a resumed run must read the same seed files; "
            "restore them, or start anew in another --output-dir"
        )
    return [line["rows"] for line in lines[1:]]


def to_examples(synthesis: Synthesis, teacher: str) -> list[Example]:
    """The accepted pairs, each with where it came from."""
    return [
        Example(
            id=f"synth-{row['attempt']:07d}",
            source="synth",
            stream=row["stream"],
            question=row["question"],
            reference=row["answer"],
            meta={
                "seed_source": row["source"],
                "seed_id": row["seed_id"],
                "teacher": teacher,
                "prompt_version": RUBRIC_VERSION,
                "temperature": synthesis.settings.temperature,
                "sampling_seed": row["sampling_seed"],
            },
        )
        for row in synthesis.pairs
    ]


def hold_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, validation): the same share of every stream, drawn by the seed, in the order of `examples`."""
    held: set[str] = set()
    for stream in dict.fromkeys(example.stream for example in examples):
        ids = [example.id for example in examples if example.stream == stream]
        held.update(random.Random(stable_number(seed, "validation", stream)).sample(ids, round(share * len(ids))))
    return [e for e in examples if e.id not in held], [e for e in examples if e.id in held]


def divide(total: int, sources: Sequence[SourceKey]) -> dict[SourceKey, int]:
    """As evenly as whole numbers allow; the first sources get what is left over."""
    each, over = divmod(total, len(sources))
    return {source: each + (position < over) for position, source in enumerate(sources)}


def normalised(question: str) -> str:
    """What two questions share that differ only in width, case or white space."""
    return "".join(unicodedata.normalize("NFKC", question).casefold().split())


def stable_number(*parts: object) -> int:
    """31 bits that depend on the parts alone, on every machine (unlike hash())."""
    digest = hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def fingerprint(seeds: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in seeds:
        line = json.dumps([example.source, example.stream, example.id, example.question], ensure_ascii=False)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
