"""Seeds -> question/answer pairs: plan, ask for a question, filter, ask for its answer, filter, judge, keep.

The work is a sequence of rounds. One round asks the teacher for the questions of a batch and, in the same call,
for the answers of the batch before, so that the engine always has both to do; a judge, if there is one, scores
the answers of the round before meanwhile. What a round asks depends only on the settings, the seeds and the
outcome of the rounds before, and each finished round is one line in rounds/. So a run that was killed reads the
lines, goes on behind them, and ends with the set that an uninterrupted run makes.

| who               | on         | does                                                                             |
|-------------------|------------|----------------------------------------------------------------------------------|
| Synthesis         | rank 0     | counts what became of every attempt; plans the next round                        |
| Copies (rounds)   | rank 0     | cuts copies of seeds and of earlier questions, and what is in evaluation sets    |
| RoundLog (rounds) | rank 0     | has every finished round on disk                                                 |
| Teacher (teacher) | every rank | generates the rank's share of a round; survives an engine that dies              |
| Reader (teacher)  | every rank | reads what the teacher said there, and cuts texts for what they are              |

Every attempt takes one seed and makes at most one pair. The target is divided evenly over the sources, and within
a source over the categories of harm where its seeds have them; within a category all seeds take turns.
"""

import hashlib
import json
import math
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kaja import filters
from kaja.data import Example

Row = dict[str, Any]  # what became of one attempt

SHOWN_CHARS = 300  # of a text that a filter cut
# A category is given up when its last 20 * max_attempts attempts made fewer than 20 pairs.
JUDGED_PAIRS = 20
CATEGORIES = ("harm-type", "risk-area")  # of a seed's meta: the first that it has

NO_REPLY, COPIED = "the engine failed", "copied from a seed"
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near-duplicate"
CONTAMINATED = "in an evaluation set"
LOW_SCORE, NO_VERDICT = "judge: score too low", "judge: no verdict"
BARE_REFUSAL = "answer: bare refusal"
SURPLUS = "not needed: its category is complete"
# The funnel: every reason for which an attempt makes no pair, in the order in which it is looked for.
CUTS = (
    f"question: {NO_REPLY}",
    *filters.CUTS["question"],
    f"question: {CONTAMINATED}",
    f"question: {COPIED}",
    f"question: {DUPLICATE}",
    f"question: {NEAR_DUPLICATE}",
    f"answer: {NO_REPLY}",
    *filters.CUTS["answer"],
    f"answer: {CONTAMINATED}",
    LOW_SCORE,
    NO_VERDICT,
)


@dataclass(frozen=True)
class Settings:
    """What the set of pairs depends on, besides the seeds, the teacher, the judge and the guard."""

    target: int
    temperature: float
    batch_size: int
    max_question_tokens: int
    max_answer_tokens: int
    max_question_chars: int
    max_answer_chars: int
    min_japanese: float
    near_duplicates: float
    keep_bare_refusals: bool
    max_length: int  # of the teacher: prompt and completion together
    max_attempts: int  # per pair, of late; a category that needs more is given up
    min_judge_score: float  # 0: nobody is asked
    seed: int


@dataclass(frozen=True)
class Attempt:
    seed: Example
    number: int  # counts the attempts of all sources
    sampling_seed: int


@dataclass(frozen=True)
class Round:
    """What is to be done next: questions to ask for, questions to be answered, pairs to be judged."""

    attempts: list[Attempt] = field(default_factory=list)
    unanswered: list[Row] = field(default_factory=list)
    unjudged: list[Row] = field(default_factory=list)

    @property
    def remains(self) -> bool:
        return bool(self.attempts or self.unanswered or self.unjudged)


class Category:
    """The seeds of one source, stream and kind of harm ("" where seeds have none), and how they fared."""

    def __init__(self, key: tuple[str, str, str], window: int) -> None:
        self.key = key
        self.seeds: list[Example] = []
        self.quota = 0
        self.attempts = self.accepted = 0
        self.open = 0  # questions that passed, whose pairs are not decided yet
        self.given_up = False
        self.questions: deque[bool] = deque(maxlen=window)  # of the latest, whether they passed
        self.answers: deque[bool] = deque(maxlen=window)  # of the latest, whether they became pairs

    @property
    def source(self) -> str:
        return self.key[0]

    @property
    def complete(self) -> bool:
        return self.accepted >= self.quota

    def answer_rate(self) -> float:
        return rate(self.answers)

    def wanted(self) -> int:
        """Attempts that will probably complete it, besides those that are open."""
        missing = self.quota - self.accepted - self.open * self.answer_rate()
        return 0 if self.given_up else max(0, math.ceil(missing / (rate(self.questions) * self.answer_rate())))

    def hopeless(self) -> bool:
        """Of the last `window` attempts fewer than JUDGED_PAIRS make a pair, as far as can be told."""
        window = self.questions.maxlen or 0
        return len(self.questions) == window and sum(self.questions) * self.answer_rate() < JUDGED_PAIRS


def rate(outcomes: deque[bool]) -> float:
    """One success in one attempt is assumed before there are any."""
    return (sum(outcomes) + 1) / (len(outcomes) + 1)


class Synthesis:
    """The state of a run: how often each category was tried, what was accepted and what was cut.

    A function of the finished rounds alone: `add` is called with each, whether its rows come from the
    teacher or from rounds/. It holds the texts of open attempts only, not those of the pairs.
    """

    def __init__(self, seeds: Sequence[Example], settings: Settings) -> None:
        self.settings = settings
        self.categories: dict[tuple[str, str, str], Category] = {}
        self._of_seed: dict[tuple[str, str, str], Category] = {}
        self._orders: dict[tuple[str, str, str], tuple[int, list[int]]] = {}  # of a category's seeds: its latest
        for example in seeds:
            key = (example.source, example.stream, category_of(example))
            if key not in self.categories:
                self.categories[key] = Category(key, JUDGED_PAIRS * settings.max_attempts)
            self.categories[key].seeds.append(example)
            self._of_seed[example.source, example.stream, example.id] = self.categories[key]
        sources = list(dict.fromkeys(key[:2] for key in self.categories))
        self.quotas = dict(zip(sources, divide(settings.target, len(sources))))
        self.attempts = self.rounds = 0
        self.unanswered: dict[int, Row] = {}
        self.unjudged: dict[int, Row] = {}
        self.accepted: dict[str, list[int]] = {}  # numbers of the attempts, by stream
        self.cuts: Counter[str] = Counter()
        self.examples: dict[str, Row] = {}  # the first that each filter cut
        self.failed: list[Row] = []
        self.contaminated: list[Row] = []
        self.tokens: Counter[str] = Counter()
        self._set_quotas()

    @property
    def pairs(self) -> int:
        return sum(map(len, self.accepted.values()))

    @property
    def acceptance(self) -> float:
        """Pairs for each attempt whose fate is known."""
        return self.pairs / max(1, self.attempts - len(self.unanswered) - len(self.unjudged))

    def of_source(self, source: tuple[str, str]) -> list[Category]:
        return [category for category in self.categories.values() if category.key[:2] == source]

    def _set_quotas(self) -> None:
        """A source's quota over its categories; what one that is given up leaves is made up for by the others."""
        for source, quota in self.quotas.items():
            live = []
            for category in self.of_source(source):
                category.given_up = category.given_up or (not category.complete and category.hopeless())
                if category.given_up:
                    category.quota = category.accepted + category.open
                    quota -= category.quota
                else:
                    live.append(category)
            for category, share in zip(live, divide(quota, len(live))):
                category.quota = share

    def plan(self) -> Round:
        """The next round; an empty one when every category is complete or given up.

        Each category asks for as many attempts as it probably needs; together they get about batch_size.
        """
        wanted = {category: category.wanted() for category in self.categories.values()}
        scale = min(1.0, self.settings.batch_size / max(1, sum(wanted.values())))
        number = self.attempts
        attempts = []
        for category, count in wanted.items():
            for turn in range(category.attempts, category.attempts + math.ceil(count * scale)):
                sampling_seed = stable_number(self.settings.seed, "sampling", number)
                attempts.append(Attempt(self.seed_of_turn(category, turn), number, sampling_seed))
                number += 1
        return Round(attempts, list(self.unanswered.values()), list(self.unjudged.values()))

    def seed_of_turn(self, category: Category, turn: int) -> Example:
        """All seeds take a turn, in an order that is drawn anew, before one has its next."""
        cycle, place = divmod(turn, len(category.seeds))
        if self._orders.get(category.key, (-1,))[0] != cycle:  # else thousands of turns would each draw it
            order = list(range(len(category.seeds)))
            random.Random(stable_number(self.settings.seed, *category.key, cycle)).shuffle(order)
            self._orders[category.key] = (cycle, order)
        return category.seeds[self._orders[category.key][1][place]]

    def add(self, outcome: Row) -> None:
        """Take in a finished round: see Copies.outcome."""
        self.rounds += 1
        self.tokens.update(outcome["tokens"])
        for row in outcome["verdicts"]:
            self._decide({**self.unjudged.pop(row["attempt"]), **row})
        for row in outcome["answers"]:
            whole = {**self.unanswered.pop(row["attempt"]), **row}
            if row["cut"] or not self.settings.min_judge_score:
                self._decide(whole)
            else:
                self.unjudged[row["attempt"]] = whole
        for row in outcome["questions"]:
            category = self._category(row)
            self.attempts += 1
            category.attempts += 1
            category.questions.append(not row["cut"])
            if row["cut"]:
                self._cut(row)
            else:
                category.open += 1
                self.unanswered[row["attempt"]] = row
        self._set_quotas()
        for open_rows in (self.unanswered, self.unjudged):
            for number in [number for number, row in open_rows.items() if self._category(row).complete]:
                row = open_rows.pop(number)
                self._category(row).open -= 1
                self._cut({**row, "cut": SURPLUS})

    def _category(self, row: Row) -> Category:
        return self._of_seed[row["source"], row["stream"], row["seed_id"]]

    def _decide(self, row: Row) -> None:
        category = self._category(row)
        category.open -= 1
        category.answers.append(not row["cut"])
        if row["cut"] or category.complete:
            self._cut({**row, "cut": row["cut"] or SURPLUS})
            return
        category.accepted += 1
        self.accepted.setdefault(row["stream"], []).append(row["attempt"])

    def _cut(self, row: Row) -> None:
        self.cuts[row["cut"]] += 1
        self.examples.setdefault(row["cut"], row)
        if "error" in row:
            self.failed.append(row)
        if "hits" in row:
            self.contaminated.append(row)

    def why_not_reached(self) -> str:
        """Empty when the target is reached."""
        if self.pairs >= self.settings.target:
            return ""
        told = []
        for (name, stream), quota in self.quotas.items():
            own = self.of_source((name, stream))
            pairs, attempts = sum(c.accepted for c in own), sum(c.attempts for c in own)
            if pairs < quota:
                told.append(f"{name} ({stream}) {pairs} of {quota} from {attempts} attempts")
        cuts = ", ".join(f"{cut!r} ({count})" for cut, count in self.cuts.most_common(3))
        return (
            f"target {self.settings.target} not reached: {self.pairs} pairs from {self.attempts} attempts "
            f"({self.acceptance:.1%}); {'; '.join(told)}; most were cut as {cuts or 'nothing'} "
            "(funnel.json has examples); add seeds, raise --max-attempts or lower --target"
        )

    def funnel(self) -> Row:
        """Counts for funnel.json: sources with their categories, and what each filter let through and cut."""
        left = self.attempts
        steps = []
        for cut in (*CUTS, SURPLUS):
            step = {"filter": cut, "in": left, "cut": self.cuts[cut]}
            left -= self.cuts[cut]
            if cut in self.examples:
                row = self.examples[cut]
                step["example"] = {name: row[name] for name in ("seed_id", "question", "answer") if row.get(name)}
            steps.append(step)
        sources = []
        for (name, stream), quota in self.quotas.items():
            own = self.of_source((name, stream))
            sources.append({
                "source": name, "stream": stream, "seeds": sum(len(c.seeds) for c in own), "wanted": quota,
                "attempts": sum(c.attempts for c in own), "pairs": sum(c.accepted for c in own),
                "categories": {c.key[2]: {"attempts": c.attempts, "pairs": c.accepted} for c in own if c.key[2]},
            })  # fmt: skip
        return {
            "target": self.settings.target,
            "attempts": self.attempts,
            "pairs": self.pairs,
            "rounds": self.rounds,
            "teacher_tokens": {"prompt": self.tokens["prompt"], "completion": self.tokens["completion"]},
            "sources": sources,
            "filters": steps,
        }


def category_of(example: Example) -> str:
    return next((str(example.meta[name]) for name in CATEGORIES if example.meta.get(name)), "")


def divide(total: int, parts: int) -> list[int]:
    """As evenly as whole numbers allow; the first get what is left over."""
    each, over = divmod(total, parts) if parts else (0, 0)
    return [each + (position < over) for position in range(parts)]


def stable_number(*parts: object) -> int:
    """31 bits that depend on the parts alone, on every machine (unlike hash())."""
    digest = hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1
