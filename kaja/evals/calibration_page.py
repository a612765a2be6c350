"""calibration.html: the agreement of a judge with ratings as one self-contained page, tables and SVG.

Whatever a model or a data file says goes through `html.escape`; the page has no script and loads nothing.
"""

import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from kaja.evals.calibration import (
    CATEGORIES,
    HOW_TO_READ,
    MEASURES,
    OVERALL,
    calibration_table,
    cell,
    failures,
    notes,
    title,
)
from kaja.files import write_json, write_text

# The drawing area of both pictures: a column for each score 0 to 5.
LEFT, TOP, SIZE = 52, 8, 40
RIGHT = LEFT + SIZE * CATEGORIES
MOST = 5  # points that a judge can be off


def write_calibration(folder: Path, result: dict[str, Any]) -> Path:
    """Write calibration.json, calibration.md and calibration.html; the path of the last."""
    write_json(folder / "calibration.json", result)
    write_text(folder / "calibration.md", calibration_table(result))
    write_text(folder / "calibration.html", render(result))
    return folder / "calibration.html"


def render(result: dict[str, Any]) -> str:
    """The whole page. Each {{name}} of the template is filled once; what fills it is not looked at again."""
    groups = result["groups"]
    parts = {
        "title": escape(f"Calibration: {result['judge']}"),
        "facts": facts(result),
        "heads": "".join(f'<th scope="col">{escape(name)}</th>' for name in MEASURES.values()),
        "rows": "\n".join(row(name, group) for name, group in groups.items()),
        "notes": "\n".join(f'<p class="note">{escape(line)}</p>' for line in [*notes(result), HOW_TO_READ]),
        "pictures": "\n".join(pictures(name, group) for name, group in groups.items()),
        "disagreements": "\n".join(map(disagreement, result["disagreements"]))
        or '<p class="note">None: every score is the rating.</p>',
    }
    template = (resources.files("kaja") / "calibration_template.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def facts(result: dict[str, Any]) -> str:
    """The line under the title: who judged, who rated, what failed."""
    judge = result["judge"]
    items = [
        ("Judge", f"{judge} (rules, not a language model)" if judge == "rule" else judge),
        ("Asked as", result["judge_identity"] if result["judge_identity"] != judge else ""),
        ("Rated by", ", ".join(result["raters"])),
        ("Completions", f"{result['groups'][OVERALL]['rated']:,}"),
        ("Failed verdicts", failures(result["groups"][OVERALL])),
    ]
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in items if v)


def row(name: str, group: dict[str, Any]) -> str:
    cells = [f"{group['n']:,}"]
    for measure in MEASURES:
        # "0.61 [0.42, 0.77]": the interval is the fine print.
        value, _, interval = cell(measure, group["measures"][measure]).partition(" ")
        cells.append(f"<b>{value}</b> <small>{interval}</small>")
    cells.append(escape(failures(group)))
    head = f'<th scope="row"><i class="key s-{name}"></i>{escape(title(name))}</th>'
    return f"<tr>{head}" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def pictures(name: str, group: dict[str, Any]) -> str:
    """The card of a stream: confusion matrix above, bias below."""
    if not group["n"]:
        return f'<section class="card"><h3>{escape(title(name))}</h3><p class="note">no verdict</p></section>'
    return (
        f'<section class="card s-{name}"><h3>{escape(title(name))}</h3>'
        f"{confusion_plot(title(name), group['confusion'])}{bias_plot(title(name), group['bias'])}</section>"
    )


def confusion_plot(name: str, matrix: Sequence[Sequence[int]]) -> str:
    """A square per pair of scores, stronger where there are more: judge's score to the right, rating upwards."""
    most = max(map(max, matrix))
    bottom = TOP + SIZE * CATEGORIES
    parts = []
    for rating, counts in enumerate(matrix):
        y = bottom - SIZE * (rating + 1)
        parts.append(f'<text class="tick y" x="{LEFT - 8}" y="{y + SIZE / 2 + 4}">{rating}</text>')
        for score, count in enumerate(counts):
            x = LEFT + SIZE * score
            if count:
                parts.append(
                    f'<g><title>rated {rating}, judge {score}: {count}</title>'
                    f'<rect class="cell" x="{x + 1}" y="{y + 1}" width="{SIZE - 2}" height="{SIZE - 2}" rx="2" '
                    f'fill-opacity="{0.15 + 0.85 * count / most:.2f}"/>'
                    f'<text class="count" x="{x + SIZE / 2}" y="{y + SIZE / 2 + 5}">{count}</text></g>'
                )
            if score == rating:
                parts.append(
                    f'<rect class="same" x="{x + 1}" y="{y + 1}" width="{SIZE - 2}" height="{SIZE - 2}" rx="2"/>'
                )
    agreed = sum(matrix[score][score] for score in range(CATEGORIES))
    total = sum(map(sum, matrix))
    label = f"{name}: rating against judge's score, {agreed} of {total} equal"
    return (
        f'<svg viewBox="0 0 {RIGHT + 8} {bottom + 38}" role="img" aria-label="{escape(label)}">{"".join(parts)}'
        f'{score_axis(bottom, "judge")}{upright("rating", (TOP + bottom) / 2)}</svg>'
    )


def bias_plot(name: str, bias: Sequence[dict[str, Any]]) -> str:
    """Mean of judge minus rating, with its interval, for each rating that occurs."""
    height = 150
    bottom = TOP + height

    def y(points: float) -> float:
        return round(TOP + height * (MOST - points) / (2 * MOST), 1)

    parts = []
    for points in (-4, -2, 0, 2, 4):
        kind = "grid" if points else "axis"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{RIGHT}" y1="{y(points)}" y2="{y(points)}"/>')
        shown = f"{points:+d}".replace("-", "−") if points else "0"
        parts.append(f'<text class="tick y" x="{LEFT - 8}" y="{y(points) + 4}">{shown}</text>')
    for at in bias:
        x, (low, high) = LEFT + SIZE * (at["rating"] + 0.5), at["interval"]
        parts.append(
            f"<g><title>rated {at['rating']}: {at['mean']:+.2f} [{low:+.2f}, {high:+.2f}], n = {at['n']}</title>"
            f'<line class="whisker" x1="{x}" x2="{x}" y1="{y(low)}" y2="{y(high)}"/>'
            f'<circle cx="{x}" cy="{y(at["mean"])}" r="4.5"/></g>'
        )
    label = f"{name}: judge minus rating. " + ", ".join(f"rated {at['rating']}: {at['mean']:+.2f}" for at in bias)
    return (
        f'<svg viewBox="0 0 {RIGHT + 8} {bottom + 38}" role="img" aria-label="{escape(label)}">{"".join(parts)}'
        f'{score_axis(bottom, "rating")}{upright("judge − rating", (TOP + bottom) / 2)}</svg>'
    )


def score_axis(bottom: float, name: str) -> str:
    """0 to 5 below a picture, and what they are."""
    ticks = "".join(
        f'<text class="tick" x="{LEFT + SIZE * (score + 0.5)}" y="{bottom + 16}">{score}</text>'
        for score in range(CATEGORIES)
    )
    return f'{ticks}<text x="{(LEFT + RIGHT) / 2}" y="{bottom + 33}">{name}</text>'


def upright(name: str, middle: float) -> str:
    """The name of the vertical axis."""
    return f'<text transform="translate(14 {middle}) rotate(-90)">{name}</text>'


def disagreement(found: dict[str, Any]) -> str:
    """One question with its completion, its rating and what the judge said."""
    about = [
        f"<span>{escape(title(found['stream']))} {escape(found['id'])}</span>",
        f"<span>rated <b>{found['rating']:g}</b>{escape(' by ' + found['rater'] if found['rater'] else '')}</span>",
        f"<span>judge <b>{found['score']:.3g}</b></span>",
    ]
    texts = [("", "question", found["question"]), ("Completion", "", found["completion"])]
    texts += [("Reference answer", "", found["reference"]), ("The judge said", "", found["judge_said"])]
    shown = "".join(
        (f"<h4>{name}</h4>" if name else "") + f'<p class="text {kind}" lang="ja">{escape(text)}</p>'
        for name, kind, text in texts
        if text or name == "Completion"
    )
    return f'<article><div class="about">{"".join(about)}</div>{shown}</article>'
