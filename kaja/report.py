"""An evaluation as one page: score table, training curves, histograms, answers side by side.

The page is a single file that loads nothing, so it works from file:// and from a mail. Numbers and
pictures are written by Python as HTML and SVG; the answers lie in it as JSON and are drawn as they
scroll into view, so that 10,000 of them stay usable. Whatever a model or a data file says is text:
`html.escape` in HTML, `embed_json` in the script element, `textContent` in the page's own script.
"""

import json
import re
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from kaja.charts import Run, chart_figure, fixed, histogram, interval_plot
from kaja.evals.answers import Answer, Answers
from kaja.evals.judged import held_out
from kaja.evals.suites import SUITES
from kaja.files import read_json, write_text


def write_report(folder: Path | str, runs: Sequence[Run] = ()) -> Path:
    """Make report.html from scores.json and answers.jsonl in `folder`."""
    folder = Path(folder)
    scores = read_json(folder / "scores.json")
    answers = list(Answers(folder / "answers.jsonl").found.values())
    write_text(folder / "report.html", render(scores, answers, runs))
    return folder / "report.html"


def render(scores: dict[str, Any], answers: Sequence[Answer], runs: Sequence[Run] = ()) -> str:
    """The whole page. Each {{name}} of the template is filled once; what fills it is not looked at again."""
    models = [model["name"] for model in scores["models"]]
    suites = scores["suites"]
    parts = {
        "title": escape("Evaluation: " + " → ".join(models)),
        "facts": facts(scores),
        "cards": "\n".join(suite_card(name, suite, models) for name, suite in suites.items()),
        "first": escape(models[0]),
        "table": score_rows(suites, models),
        "splits": split_table(suites, models),
        "model_heads": "".join(f'<th scope="col">{escape(model)}</th>' for model in models),
        "histograms": "\n".join(histogram_row(name, s["scores"], models) for name, s in suites.items()),
        "curves": "\n".join(chart_figure(run.name, *chart) for run in runs for chart in run.charts())
        or '<p class="empty">No training run was given, or none has logged steps.</p>',
        "data": embed_json(answer_data(scores, answers, models)),
    }
    template = (resources.files("kaja") / "report_template.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def embed_json(value: Any) -> str:
    """JSON for a <script type="application/json"> element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def answer_data(scores: dict[str, Any], answers: Sequence[Answer], models: Sequence[str]) -> dict[str, Any]:
    """What the page's script draws: one entry per question, its answers in the order of the models."""
    questions: dict[tuple[str, str], dict[str, Any]] = {}
    for answer in answers:
        example = answer.example
        entry = questions.setdefault(
            (example.source, example.id),
            {
                "suite": example.stream,
                "id": example.id,
                "source": example.source,
                "heldOut": held_out(answer),
                "question": example.question,
                "reference": example.reference,
                "aspect": example.eval_aspect,
                "answers": [None] * len(models),
            },
        )
        verdict = answer.verdict
        entry["answers"][models.index(answer.model)] = {
            "text": answer.completion,
            "score": verdict.score if verdict else None,
            "cause": verdict.cause if verdict else "not judged",
            "judge": verdict.text if verdict else "",
            "tokens": answer.num_tokens,
            "cut": answer.finish_reason == "length",
        }
    return {
        "models": list(models),
        "suites": {name: SUITES[name].title for name in scores["suites"]},
        "questions": list(questions.values()),
    }


def facts(scores: dict[str, Any]) -> str:
    """The line under the title: judge, size, failures, limits."""
    suites = scores["suites"].values()
    summaries = [summary for suite in suites for summary in suite["scores"].values()]
    failed = sum(sum(summary["failures"].values()) for summary in summaries)
    questions = sum(max(summary["questions"] for summary in suite["scores"].values()) for suite in suites)
    judge = scores["judge"]
    items = [
        ("Judge", f"{judge} (rules, not a language model)" if judge == "rule" else judge),
        ("Rubric", scores["rubric_version"]),
        ("Questions", f"{questions:,}"),
        ("Failed verdicts", f"{failed:,} of {sum(summary['questions'] for summary in summaries):,}"),
        ("Decoding", f"greedy, at most {scores['max_completion_tokens']:,} tokens"),
    ]
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in items if v)


def suite_card(name: str, suite: dict[str, Any], models: Sequence[str]) -> str:
    """One suite at a glance: interval plot, and the change from the first model to the last."""
    ends = (models[0], models[-1])
    last = next((d for d in suite["differences"] if (d["before"], d["after"]) == ends), None)
    change = ""
    if last and last["n"]:
        change = (
            f'<p class="change"><b>{signed(last["difference"])}</b> from {escape(models[0])} to '
            f'{escape(models[-1])} <span>{span(last["interval"], signed)}</span></p>'
        )
    return (
        f'<article class="card"><h3>{escape(SUITES[name].title)}</h3><p class="note">'
        f"{escape(SUITES[name].asks)}</p>{interval_plot(suite['scores'], models)}{change}</article>"
    )


def histogram_row(name: str, by_model: dict[str, Any], models: Sequence[str]) -> str:
    """Of each model, the share of its verdicts at 0, 1, ... 5 points."""
    cells = "".join(f"<td>{histogram(by_model[m]['histogram'], i)}</td>" for i, m in enumerate(models))
    return f'<tr><th scope="row">{escape(SUITES[name].title)}</th>{cells}</tr>'


def score_rows(suites: dict[str, Any], models: Sequence[str]) -> str:
    """The body of the table: a block of rows per suite."""
    blocks = []
    for name, suite in suites.items():
        changes = {d["after"]: d for d in suite["differences"] if d["before"] == models[0]}
        blocks.append(table_block(SUITES[name].title, suite["scores"], models, changes))
    return "\n".join(blocks)


def split_table(suites: dict[str, Any], models: Sequence[str]) -> str:
    """Reward and interval by what was held out from training; nothing where the data does not say."""
    rows = []
    for name, suite in suites.items():
        for split, by_model in suite["splits"].items():
            n = max(by_model[model]["n"] for model in models)
            shown = [(by_model[model]["reward"], by_model[model]["interval"]) for model in models]
            cells = "".join(f"<td><b>{fixed(mean)}</b> {span(ends, fixed)}</td>" for mean, ends in shown)
            title = f"{SUITES[name].title}, unseen {split}"
            rows.append(f'<tr><th scope="row">{escape(title)}</th><td>{n:,}</td>{cells}</tr>')
    if not rows:
        return ""
    heads = "".join(f'<th scope="col">{escape(model)}</th>' for model in models)
    return (
        '<h3>By what training never saw</h3><div class="scroll"><table class="scores splits"><thead><tr>'
        f'<th scope="col">Questions</th><th scope="col">n</th>{heads}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div>'
    )


def table_block(title: str, by_model: dict[str, Any], models: Sequence[str], changes: dict[str, Any]) -> str:
    rows = []
    for index, model in enumerate(models):
        summary = by_model[model]
        failures = ", ".join(f"{count} {cause}" for cause, count in summary["failures"].items())
        cells = [
            f"<b>{fixed(summary['reward'])}</b>",
            span(summary["interval"], fixed),
            *change_cells(changes.get(model)),
            percent(summary["refusal_rate"]),
            fixed(summary["mean_tokens"], 0),
            percent(summary["cut_off_rate"]),
            f"{summary['n']:,}",
            escape(failures) or "0",
        ]
        head = f'<th scope="rowgroup" rowspan="{len(models)}">{escape(title)}</th>' if index == 0 else ""
        name = f'<th scope="row"><i class="key m{index % 6}"></i>{escape(model)}</th>'
        rows.append(f"<tr>{head}{name}" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<tbody>" + "".join(rows) + "</tbody>"


def change_cells(change: dict[str, Any] | None) -> list[str]:
    if change is None or not change["n"]:
        return ["", "", ""]
    p = change["p_value"]
    return [
        f"{signed(change['difference'])} <small>{span(change['interval'], signed)}</small>",
        f"{change['wins']:,} / {change['losses']:,} / {change['ties']:,}",
        "&lt; 0.001" if p < 0.001 else f"{p:.3f}",
    ]


def signed(value: float | None) -> str:
    # A true minus sign, as wide as the plus.
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def span(interval: Sequence[float | None], show: Callable[[float | None], str]) -> str:
    return f"[{show(interval[0])}, {show(interval[1])}]"
