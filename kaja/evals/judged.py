"""What the suites share: answer the questions greedily, have the answers judged, summarise."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from kaja.chat import Chat
from kaja.checkpoint import folder_fingerprint, load_chat
from kaja.data import Example
from kaja.engine import Engine
from kaja.errors import UserError
from kaja.evals.answers import Answer, question_key
from kaja.evals.statistics import bootstrap_mean, paired_difference
from kaja.evals.suites import SUITES
from kaja.files import read_json
from kaja.health import opens_with_refusal
from kaja.judging import settle
from kaja.reward import Judge, Verdict, count_failures, reward_of, rewards


@dataclass(frozen=True)
class Model:
    """A model with its prompts, made before the first answer: what does not fit shows at once."""

    name: str
    folder: Path
    weights: str  # folder_fingerprint
    chat: Chat
    prompts: list[list[int]]  # one per example
    max_length: int  # longest prompt and completion together


def prepare(name: str, folder: Path, examples: Sequence[Example], max_tokens: int) -> Model:
    """Encode all questions; UserError for one that does not fit, as none is ever cut."""
    chat = load_chat(folder)
    context = read_json(folder / "config.json").get("max_position_embeddings", 2048)
    prompts = [chat.encode_prompt([{"role": "user", "content": example.question}]) for example in examples]
    for example, prompt in zip(examples, prompts, strict=True):
        if len(prompt) + max_tokens > context:
            raise UserError(
                f"question {question_key(example)!r}: {len(prompt)} tokens for model {name}, with "
                f"{max_tokens} of an answer {len(prompt) + max_tokens}; both must fit into the model's "
                f"context of {context}; remove the question or lower --max-completion-tokens"
            )
    return Model(name, folder, folder_fingerprint(folder), chat, prompts, max(map(len, prompts)) + max_tokens)


def check_examples(examples: Sequence[Example]) -> None:
    """Answers are told apart by source and id: both together must be unique."""
    seen: set[str] = set()
    for example in examples:
        if question_key(example) in seen:
            raise UserError(
                f"question {question_key(example)!r} is in the data twice; every question has its own source "
                f"and id; name each file once, or give the records different ids"
            )
        seen.add(question_key(example))


def answer_questions(
    engine: Engine,
    model: Model,
    examples: Sequence[Example],
    indices: Sequence[int],
    *,
    max_tokens: int,
    batch_size: int,
) -> Iterator[list[Answer]]:
    """The model's greedy answers to the examples at `indices`, batch by batch."""
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        prompts = [model.prompts[i] for i in batch]
        groups = engine.generate(prompts, max_tokens=max_tokens, temperature=0.0, seeds=[0] * len(batch))
        yield [
            Answer(
                model.name,
                model.weights,
                examples[i],
                max_tokens,
                completion=model.chat.decode(sampled.token_ids),
                num_tokens=len(sampled.token_ids),
                finish_reason=sampled.finish_reason,
            )
            for i, (sampled,) in zip(batch, groups, strict=True)
        ]


def judge_answers(
    judge: Judge, answers: Sequence[Answer], *, batch_size: int, limit: float = 1.0, judged: Sequence[Verdict] = ()
) -> Iterator[list[Answer]]:
    """The same answers with their verdicts, batch by batch.

    Raises JudgeFailed as soon as more than `limit` of all verdicts have failed, with those that were `judged` before.
    """
    total, before = len(judged) + len(answers), list(judged)
    for start in range(0, len(answers), batch_size):
        batch = answers[start : start + batch_size]
        examples, completions = [answer.example for answer in batch], [answer.completion for answer in batch]
        verdicts = judge.judge(examples, completions)
        verdicts = settle(judge, examples, completions, verdicts, limit, out_of=total, before=before)
        before += verdicts
        yield [replace(a, judge=judge.identity, verdict=v) for a, v in zip(batch, verdicts, strict=True)]


def summarise(answers: Sequence[Answer], *, seed: int = 0) -> dict[str, Any]:
    """One cell of the score table. Failed verdicts leave the mean and are counted; lengths are of all."""
    verdicts = [answer.verdict for answer in answers if answer.verdict is not None]
    estimate = bootstrap_mean(rewards(verdicts), seed=seed)
    total = len(answers)
    return {
        "questions": total,
        "n": estimate.n,
        "reward": number(estimate.mean),
        "interval": [number(estimate.low), number(estimate.high)],
        "failures": count_failures(verdicts),
        "refusal_rate": number(share(sum(opens_with_refusal(answer.completion) for answer in answers), total)),
        "mean_tokens": number(share(sum(answer.num_tokens for answer in answers), total)),
        "cut_off_rate": number(share(sum(answer.finish_reason == "length" for answer in answers), total)),
        "histogram": histogram(verdicts),
    }


def histogram(verdicts: Sequence[Verdict]) -> list[int]:
    """How many verdicts have 0, 1, ... 5 points; a fraction counts at the nearest, halves upwards."""
    counts = [0] * 6
    for verdict in verdicts:
        if verdict.score is not None:
            counts[math.floor(verdict.score + 0.5)] += 1
    return counts


def compare(before: Sequence[Answer], after: Sequence[Answer], *, seed: int = 0) -> dict[str, Any]:
    """Paired difference of two models on the questions that both answered and got a score for."""
    old, new = (
        {question_key(a.example): reward_of(a.verdict) for a in answers if a.verdict is not None}
        for answers in (before, after)
    )
    shared = [key for key in old if key in new]
    difference = paired_difference([old[key] for key in shared], [new[key] for key in shared], seed=seed)
    return {
        "n": difference.n,
        "difference": number(difference.mean),
        "interval": [number(difference.low), number(difference.high)],
        "wins": difference.wins,
        "losses": difference.losses,
        "ties": difference.ties,
        "p_value": difference.p_value,
    }


def tabulate(answers: Sequence[Answer], models: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """Per suite: `scores` by model, `differences` of every pair, and the same scores per held-out split."""
    suites: dict[str, Any] = {}
    for name in SUITES:
        by_model = {m: [a for a in answers if a.model == m and a.example.stream == name] for m in models}
        if not any(by_model.values()):
            continue
        splits = sorted({split for a in by_model[models[0]] if (split := held_out(a))})
        suites[name] = {
            "scores": {model: summarise(of_model, seed=seed) for model, of_model in by_model.items()},
            "differences": [
                {"before": before, "after": after, **compare(by_model[before], by_model[after], seed=seed)}
                for before, after in combinations(models, 2)
            ],
            "splits": {
                split: {
                    model: summarise([a for a in of_model if held_out(a) == split], seed=seed)
                    for model, of_model in by_model.items()
                }
                for split in splits
            },
        }
    return suites


def held_out(answer: Answer) -> str:
    """What of this question training never saw ("topic", "template"), where the data says so."""
    return str(answer.example.meta.get("held_out", ""))


def score_table(scores: dict[str, Any]) -> str:
    """scores.json as a Markdown table: one row per suite, one column per model."""
    models = [model["name"] for model in scores["models"]]
    lines = ["| suite | n | " + " | ".join(models) + " |", "|---|---|" + "---|" * len(models)]
    for name, suite in scores["suites"].items():
        rows = [(SUITES[name].title, suite["scores"])]
        rows += [(f"– held-out {split}", by_model) for split, by_model in suite["splits"].items()]
        for title, by_model in rows:
            ns = sorted({by_model[model]["n"] for model in models})
            n = str(ns[0]) if len(ns) == 1 else f"{ns[0]}–{ns[-1]}"
            lines.append(f"| {title} | {n} | " + " | ".join(cell(by_model[model]) for model in models) + " |")
    summaries = [suite["scores"][model] for suite in scores["suites"].values() for model in models]
    failures = sum(sum(summary["failures"].values()) for summary in summaries)
    lines += [
        "",
        f"Mean reward (score / 5) with bootstrap 95% interval; judge: {scores['judge']}; "
        f"{failures} failed verdicts, left out.",
        "",
    ]
    if scores.get("canaries"):
        held = [check["holds"] for check in scores["canaries"]["checks"]]
        lines += [f"Of {len(held)} canaries (answers whose order is known) this judge gets {sum(held)} right.", ""]
    for name, suite in scores["suites"].items():
        for pair in suite["differences"]:
            if pair["before"] == models[0] and pair["n"]:
                low, high = pair["interval"]
                title = f"{SUITES[name].title}, {pair['before']} to {pair['after']}"
                counts = f"{pair['wins']}/{pair['losses']}/{pair['ties']}"
                lines.append(
                    f"- {title}: {pair['difference']:+.2f} [{low:+.2f}, {high:+.2f}]; "
                    f"better/worse/equal {counts}, sign test p = {pair['p_value']:.2g}."
                )
    return "\n".join(lines) + "\n"


def cell(summary: dict[str, Any]) -> str:
    if summary["n"] == 0:
        return "no verdict"
    low, high = summary["interval"]
    return f"{summary['reward']:.2f} [{low:.2f}, {high:.2f}]"


def share(part: float, total: int) -> float:
    return part / total if total else math.nan


def number(value: float) -> float | None:
    """JSON has no NaN: what could not be computed is null."""
    return None if math.isnan(value) else value
