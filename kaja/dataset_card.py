"""What comes out of a synthesis: train.jsonl and validation.jsonl, their card, and a page to browse some pairs in.

DATASET_CARD.md says how many pairs there are, what the filters cut, how long the texts are, under which terms the
seeds came, and how to load the set; its head is what the Hugging Face hub and `datasets` read. Like everything here it
follows from the run's rounds alone, without a date: a run that was killed and resumed writes the same bytes.
"""

import json
import random
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from kaja.data import Example, to_record
from kaja.files import replacing
from kaja.rubric import PROMPT_VERSION
from kaja.synthesis import CONTAMINATED, Row, Settings, stable_number

SAMPLES = 100  # pairs on the page
BINS = 10  # of a length histogram
BAR = 40  # characters of its longest bar
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))

# What is known of the seeds' terms. The words of whoever publishes them decide.
TERMS = {
    "answer_carefully": (
        "AnswerCarefully (llm-jp/AnswerCarefully, gated): to be used to make language models safer and for nothing "
        "else. **What is made from it serves that purpose only**: these pairs are for training a model to be safe."
    ),
    "borderline": "Borderline (the borderline part of llm-jp/AnswerCarefully, gated): AnswerCarefully's terms.",
    "llm_jp_instructions": "llm-jp-instructions: see the licence on the hub's page of llm-jp/llm-jp-instructions.",
    "ichikara": "ichikara-instruction: under an agreement of its own; may not be redistributed.",
    "elyza_tasks_100": "ELYZA-tasks-100: CC BY-SA 4.0. It is an evaluation set: scores on it mean little afterwards.",
}
UNKNOWN_TERMS = "{}: not known to kaja; look up its terms before you pass the set on."
TEACHERS = {
    "scripted": "The teacher is the script of kaja's demo, no model: its texts are made from kaja's own templates.",
}
UNKNOWN_TEACHER = "Look up what the licence of {} says about its output and about models trained on it."

LOADING = """```python
from datasets import load_dataset

pairs = load_dataset("path/to/this/folder")
print(pairs["train"][0]["question"])
```

`train_sft.py --data train.jsonl` reads it too."""


# ---------------------------------------------------------------------------------------------------
# The pairs
# ---------------------------------------------------------------------------------------------------


def pairs_of(outcomes: Iterable[Row], accepted: Container[int], judged: bool) -> Iterator[Row]:
    """The rows of the accepted attempts, put together from the rounds that they went through."""
    open_rows: dict[int, Row] = {}
    for outcome in outcomes:
        for row in outcome["verdicts"]:
            if row["attempt"] in accepted:
                yield {**open_rows.pop(row["attempt"]), **row}
        for row in outcome["answers"]:
            if row["attempt"] in accepted:
                whole = {**open_rows.pop(row["attempt"]), **row}
                if judged:
                    open_rows[row["attempt"]] = whole
                else:
                    yield whole
        open_rows.update((row["attempt"], row) for row in outcome["questions"] if row["attempt"] in accepted)


def to_example(row: Row, teacher: str, settings: Settings, passed: Sequence[str]) -> Example:
    """A pair, with where it came from."""
    meta = {
        "seed_source": row["source"],
        "seed_id": row["seed_id"],
        "teacher": teacher,
        "prompt_version": PROMPT_VERSION,
        "temperature": settings.temperature,
        "sampling_seed": row["sampling_seed"],
        "filters": list(passed),
    }
    if "score" in row:
        meta["judge_score"] = row["score"]
    return Example(identifier(row["attempt"]), "synth", row["stream"], row["question"], row["answer"], meta=meta)


def identifier(attempt: int) -> str:
    return f"synth-{attempt:07d}"


def hold_out(accepted: Mapping[str, Sequence[int]], share: float, seed: int) -> set[int]:
    """The attempts whose pairs are for validation: the same share of every stream, drawn by the seed."""
    held: set[int] = set()
    for stream, attempts in accepted.items():
        rng = random.Random(stable_number(seed, "validation", stream))
        held.update(rng.sample(attempts, round(share * len(attempts))))
    return held


@dataclass
class Contents:
    """What the card and the page show of the pairs, gathered as they are written."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: {"train": Counter(), "validation": Counter()})
    lengths: dict[tuple[str, str], Counter[int]] = field(default_factory=dict)  # (stream, question or answer)
    samples: list[Example] = field(default_factory=list)

    def add(self, split: str, example: Example, sampled: bool) -> None:
        self.counts[split][example.stream] += 1
        for part, text in (("question", example.question), ("answer", example.reference)):
            self.lengths.setdefault((example.stream, part), Counter())[len(text)] += 1
        if sampled:
            self.samples.append(example)


def write_pairs(folder: Path, examples: Iterable[Example], held: Container[str], sampled: Container[str]) -> Contents:
    """train.jsonl and validation.jsonl in one pass: a large set is never in memory at once."""
    contents = Contents()
    with (
        replacing(folder / "train.jsonl") as train, replacing(folder / "validation.jsonl") as validation,
        train.open("w", encoding="utf-8") as train_file, validation.open("w", encoding="utf-8") as validation_file,
    ):  # fmt: skip
        files = {"train": train_file, "validation": validation_file}
        for example in examples:
            split = "validation" if example.id in held else "train"
            files[split].write(json.dumps(to_record(example), ensure_ascii=False) + "\n")
            contents.add(split, example, example.id in sampled)
    return contents


# ---------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------


def render_card(contents: Contents, funnel: Row, teacher: str, settings: Settings) -> str:
    """DATASET_CARD.md."""
    pairs, judged = funnel["pairs"], settings.min_judge_score > 0
    sources = list(dict.fromkeys(source["source"] for source in funnel["sources"]))
    tokens = funnel["teacher_tokens"]
    parts = [
        card_head(contents),
        f"# {pairs:,} synthetic question/answer pairs in Japanese",
        f"Made by kaja's `synth.py` with the teacher `{teacher}` (temperature {settings.temperature:g}, prompts "
        f"`{PROMPT_VERSION}`, seed {settings.seed}) from the questions of {', '.join(sources)}. For each seed question "
        "the teacher wrote a new question, and then answered it; nobody has read them all. The teacher was "
        "asked to turn down the questions of the safety stream, with a reason, and to answer those of the others. "
        "Filters cut what opens with a refusal where there should be none"
        + ("" if settings.keep_bare_refusals else ", and refusals without a reason")
        + "; that every harmful question is turned down was not checked.",
        f"Of {funnel['attempts']:,} attempts in {funnel['rounds']:,} rounds {pairs:,} made a pair. The teacher read "
        f"{tokens['prompt']:,} tokens and wrote {tokens['completion']:,}.",
        "## Counts",
        counts_table(contents),
        "## Sources",
        sources_table(funnel),
        "## What the filters cut",
        compared_with(funnel["evaluation_sets"]),
        funnel_table(funnel, judged),
        "Each attempt is counted at the first filter that cut it. funnel.json has an example of every cut, "
        "failed.jsonl the prompts on which the engine failed, contaminated.jsonl what was found in evaluation sets.",
        "## Lengths in characters",
        histograms(contents),
        "## Fields",
        "`id`, `source` (always `synth`), `stream` (safety, borderline or helpfulness), `question`, `answer`, "
        "`eval_aspect` (empty), and `meta`: `seed_source` and `seed_id` of the question that it was made from, "
        "`teacher`, `prompt_version`, `temperature`, `sampling_seed` (of the question; the answer has the next), "
        "`filters` (what it passed)" + (", `judge_score` (0 to 5)." if judged else "."),
        "## Loading",
        LOADING,
        "## Licences and terms",
        "\n".join(f"- {TERMS.get(source, UNKNOWN_TERMS.format(source))}" for source in sources),
        TEACHERS.get(teacher, UNKNOWN_TEACHER.format(f"`{teacher}`")),
    ]
    return "\n\n".join(parts) + "\n"


def card_head(contents: Contents) -> str:
    """What the hub and `datasets` read: which file is which split."""
    splits = {split: sum(counts.values()) for split, counts in contents.counts.items()}
    size = next((name for limit, name in SIZES if sum(splits.values()) < limit), "n>1M")
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split, pairs in splits.items() if pairs)
    configs = f"configs:\n- config_name: default\n  data_files:\n{files}" if files else ""
    return (
        "---\nlanguage:\n- ja\nlicense: other\ntask_categories:\n- text-generation\ntags:\n- synthetic\n- safety\n"
        f"size_categories:\n- {size}\n{configs}---"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; the first column is text, the others numbers."""
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    cells = ([f"{cell:,}" if isinstance(cell, int) else in_a_cell(cell) for cell in row] for row in rows)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


def in_a_cell(value: object) -> str:
    return " ".join(escape(str(value), quote=False).replace("|", "\\|").split())


def counts_table(contents: Contents) -> str:
    splits = contents.counts
    streams = dict.fromkeys(stream for counts in splits.values() for stream in counts)
    numbers = {stream: [counts[stream] for counts in splits.values()] for stream in streams}
    numbers["all"] = [sum(counts.values()) for counts in splits.values()]
    return table(["stream", *splits, "both"], [[stream, *row, sum(row)] for stream, row in numbers.items()])


def sources_table(funnel: Row) -> str:
    rows: list[Sequence[object]] = []
    for source in funnel["sources"]:
        rows.append([
            f"{source['source']} ({source['stream']})", source["seeds"], source["wanted"], source["attempts"],
            source["pairs"], share(source["pairs"], source["attempts"]),
        ])  # fmt: skip
        for name, category in source["categories"].items() if len(source["categories"]) > 1 else ():
            rows.append([
                f"— {name}", "", "", category["attempts"], category["pairs"],
                share(category["pairs"], category["attempts"]),
            ])  # fmt: skip
    return table(["source", "seeds", "wanted", "attempts", "pairs", "accepted"], rows)


def compared_with(sets: Mapping[str, int]) -> str:
    if not sets:
        return "The texts were compared with no evaluation set."
    names = ", ".join(f"{in_a_cell(name)} ({count:,} examples)" for name, count in sets.items())
    return (
        f"The texts were compared with these evaluation sets, and with no others: {names}. Copies and slightly changed "
        "ones are found, paraphrases and translations are not."
    )


def funnel_table(funnel: Row, judged: bool) -> str:
    """Filters that were not asked are left out."""
    compared = bool(funnel["evaluation_sets"])
    steps = [
        step for step in funnel["filters"]
        if (judged or not step["filter"].startswith("judge")) and (compared or CONTAMINATED not in step["filter"])
    ]  # fmt: skip
    rows = [[step["filter"], step["in"], step["cut"], share(step["cut"], step["in"])] for step in steps]
    return table(["filter", "in", "cut", "share"], rows)


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def histograms(contents: Contents) -> str:
    parts = []
    for (stream, part), lengths in contents.lengths.items():
        count = sum(lengths.values())
        mean = sum(length * number for length, number in lengths.items()) / count
        title = f"{stream}, {part}s (mean {mean:.0f}, median {median(lengths)}, longest {max(lengths)})"
        parts.append(f"```text\n{title}\n{histogram(lengths)}\n```")
    return "\n\n".join(parts)


def median(lengths: Counter[int]) -> int:
    """The lower one of an even number."""
    left = (sum(lengths.values()) + 1) // 2
    for length in sorted(lengths):
        left -= lengths[length]
        if left <= 0:
            return length
    raise ValueError("no lengths")


def histogram(lengths: Counter[int]) -> str:
    """Bars of text, BINS of them or fewer, each as wide as the others."""
    width = max(1, -(-(max(lengths) + 1) // BINS))
    bins = [0] * (max(lengths) // width + 1)
    for length, number in lengths.items():
        bins[length // width] += number
    places = len(str(max(lengths)))
    ends = [(place * width, (place + 1) * width - 1) for place in range(len(bins))]
    return "\n".join(
        f"{first:>{places}} - {last:<{places}} {'█' * round(BAR * number / max(bins))} {number:,}"
        for (first, last), number in zip(ends, bins)
    )


# ---------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------

STYLE = """
:root { --paper: #fbfaf8; --sheet: #fff; --ink: #1d1f23; --soft: #5c626b; --line: #dedbd5;
  --safety: #b8325f; --borderline: #8a6b00; --helpfulness: #15836b; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --sheet: #1e2125; --ink: #e6e5e1; --soft: #a0a6ae;
  --line: #363b42; --safety: #f2799f; --borderline: #dcb53f; --helpfulness: #54c6a6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 980px; background: var(--paper); color: var(--ink); font-size: 15px;
  line-height: 1.7; font-family: system-ui, -apple-system, "Hiragino Sans", "Noto Sans JP", "Yu Gothic", Meiryo,
  sans-serif; }
h1 { font-size: 22px; }
p.note { color: var(--soft); font-size: 13px; }
article { background: var(--sheet); border: 1px solid var(--line); border-radius: 8px; padding: 12px 18px;
  margin: 14px 0; }
header { color: var(--soft); font-size: 12px; }
header b { text-transform: uppercase; letter-spacing: .04em; }
.safety b { color: var(--safety); }
.borderline b { color: var(--borderline); }
.helpfulness b { color: var(--helpfulness); }
dl { margin: 6px 0 0; display: grid; grid-template-columns: 6em 1fr; gap: 4px 12px; }
dt { color: var(--soft); font-size: 12px; padding-top: 3px; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
dd.seed { color: var(--soft); }
@media (max-width: 600px) { dl { grid-template-columns: 1fr; } }
"""


def render_samples(samples: Sequence[Example], seeds: Sequence[Example], pairs: int) -> str:
    """samples.html: some pairs with the seed question of each; one file that loads nothing and has no script."""
    asked = {(seed.source, seed.id): seed.question for seed in seeds}
    articles = []
    for example in samples:
        meta = example.meta
        rows = [
            ("seed", asked.get((meta["seed_source"], meta["seed_id"]), ""), ' class="seed"'),
            ("question", example.question, ""),
            ("answer", example.reference, ""),
        ]
        body = "".join(f"<dt>{name}</dt><dd{style}>{escape(text)}</dd>" for name, text, style in rows)
        facts = [example.id, f"{meta['seed_source']} {meta['seed_id']}"]
        if "judge_score" in meta:
            facts.append(f"judge {meta['judge_score']:g}")
        articles.append(
            f'<article><header class="{escape(example.stream)}"><b>{escape(example.stream)}</b> '
            f"{escape(' · '.join(facts))}</header><dl>{body}</dl></article>"
        )
    return (
        '<!DOCTYPE html>\n<html lang="ja">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{len(samples)} of {pairs:,} synthetic pairs</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{len(samples)} of {pairs:,} synthetic pairs</h1>\n"
        '<p class="note">Drawn at random, with the seed question that each was made from. The safety stream names '
        "harmful requests; they are there to be refused.</p>\n" + "\n".join(articles) + "\n</body>\n</html>\n"
    )


def choose_samples(accepted: Mapping[str, Sequence[int]], seed: int) -> set[int]:
    """About SAMPLES attempts, the streams in proportion to what they have."""
    everything = sorted(attempt for attempts in accepted.values() for attempt in attempts)
    return set(random.Random(stable_number(seed, "samples")).sample(everything, min(SAMPLES, len(everything))))
