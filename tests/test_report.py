"""The report: every number is in it, every text is text, nothing is loaded; in a real browser it works."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest

from kaja.charts import Run
from kaja.data import Example
from kaja.evals.answers import Answer, Answers
from kaja.evals.judged import tabulate
from kaja.files import write_json
from kaja.report import embed_json, render, signed, write_report
from kaja.reward import Verdict

NASTY = (
    "</script><script>document.title='hacked'</script></textarea>"
    "<img src=x onerror=\"document.title='hacked'\"> {{title}} &amp;"
)
MODELS = ["base", "sft", "grpo"]
RUN = Run(
    "grpo-run",
    {n: {"reward": n / 10, "reward/safety": n / 20, "reward/helpfulness": 0.3, "kl": 0.01} for n in range(1, 6)},
)


def made(count: int = 3, text: str = "はい") -> list[Answer]:
    """Question i: base scores 1, sft i % 6, grpo 5; answer texts differ by model."""
    answers = []
    for model in MODELS:
        for number in range(count):
            score = {"base": 1.0, "sft": float(number % 6), "grpo": 5.0}[model]
            example = Example(f"{number:05d}", "test", "safety", f"質問{number}番", "正解", meta={"held_out": "topic"})
            verdict = Verdict(score, text=f"{score:.0f}")
            answers.append(Answer(model, "w", example, 64, f"{text} {model}", 10, "stop", "rule", verdict))
    return answers


def scores_of(answers: list[Answer], models: list[str] = MODELS) -> dict:
    return {
        "judge": "rule",
        "rubric_version": "slides-1",
        "max_completion_tokens": 64,
        "models": [{"name": model} for model in models],
        "suites": tabulate(answers, models),
    }


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


class Page(HTMLParser):
    """Which elements a page opens and closes, and what attributes they have."""

    VOID = ("meta", "input", "br", "img", "link", "line", "circle", "rect", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()


def test_elements_are_closed_in_order() -> None:
    page = Page(render(scores_of(made()), made(), [RUN]))
    assert page.open == []
    assert page.tags.count("svg") == 1 + 3 + 2  # interval plot, histograms, charts


def test_numbers_are_on_the_page() -> None:
    answers = made(3)
    text = re.sub(r"<[^>]+>", " ", render(scores_of(answers), answers, [RUN]))
    text = " ".join(html.unescape(text).split())
    assert "Evaluation: base → sft → grpo" in text
    assert "rule (rules, not a language model)" in text
    # base 0.20, sft (0 + 1 + 2) / 15 = 0.20, grpo 1.00; grpo wins 3 of 3: p = 2 / 8.
    assert "grpo 1.00 [1.00, 1.00] +0.80 [+0.80, +0.80] 3 / 0 / 0 0.250" in text
    assert "sft 0.20 [0.00, 0.40] +0.00" in text
    assert "Safety, unseen topic 3 0.20 [0.20, 0.20] 0.20 [0.00, 0.40] 1.00 [1.00, 1.00]" in text
    assert "all 0.1 → 0.5" in text and "safety 0.05 → 0.25" in text and "kl 0.01 → 0.01" in text


def test_failed_verdicts_show_as_such() -> None:
    answers = made(2)
    answers[0] = Answer(
        "base", "w", answers[0].example, 64, "え", 64, "length", "rule", Verdict(None, "no clear score", "うーん")
    )
    page = render(scores_of(answers), answers)
    assert "1 no clear score" in page and "1 of 6" in page
    shown = embedded(page)["questions"][0]["answers"][0]
    assert shown == {
        "text": "え", "score": None, "cause": "no clear score", "judge": "うーん", "tokens": 64, "cut": True,
    }  # fmt: skip


def test_a_suite_without_any_verdict() -> None:
    example = Example("1", "test", "safety", "質問")
    answers = [Answer("base", "w", example, 64, "", 1, "stop", "rule", Verdict(None, "empty"))]
    page = render(scores_of(answers, ["base"]), answers)
    assert "no verdict" in page and "NaN" not in page.split("<script>")[0]


def test_text_of_models_and_data_is_only_text() -> None:
    example = Example(NASTY, NASTY, "safety", NASTY, NASTY, NASTY, {"held_out": NASTY})
    name = "<b>x</b>{{data}}"
    answers = [Answer(name, "w", example, 64, NASTY, 1, "stop", "rule", Verdict(None, NASTY, NASTY))]
    scores = scores_of(answers, [name]) | {"judge": NASTY}
    page = render(scores, answers, [Run(NASTY, RUN.rows)])
    plain = Page(render(scores_of(made(1, "a")[:1], ["base"]), made(1, "a")[:1], [RUN]))
    parsed = Page(page)
    # The same elements as on a harmless page, but the row and the heading of the held-out split.
    assert parsed.tags.count("script") == plain.tags.count("script") == 2
    assert "img" not in parsed.tags and "textarea" not in parsed.tags
    assert not [attribute for attribute, _ in parsed.attributes if attribute.startswith("on")]
    entry = embedded(page)["questions"][0]
    assert entry["question"] == entry["id"] == entry["reference"] == entry["aspect"] == entry["heldOut"] == NASTY
    assert entry["answers"][0]["text"] == entry["answers"][0]["cause"] == entry["answers"][0]["judge"] == NASTY
    assert embedded(page)["models"] == [name]


def test_embedded_json_cannot_end_its_element() -> None:
    value = {"a": "</script><!--<script>&\u2028\u2029", "日本": ["語", None, 1.5]}
    text = embed_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value
    with pytest.raises(ValueError):
        embed_json(float("nan"))


def test_nothing_is_loaded() -> None:
    page = render(scores_of(made()), made(), [RUN])
    assert not re.search(r"https?:|//[a-z]", page.replace("http-equiv", "").split("</style>")[0])
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
    parsed = Page(page)
    assert not {"link", "iframe", "object", "embed", "img", "base"} & set(parsed.tags)
    assert "src" not in dict(parsed.attributes)
    assert all(value.startswith("#") for name, value in parsed.attributes if name in ("href", "action"))
    assert ("lang", "ja") in parsed.attributes
    policy = dict(parsed.attributes)["content"]
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_write_report_reads_what_judge_wrote(tmp_path: Path) -> None:
    answers = made(2)
    Answers(tmp_path / "answers.jsonl").save(answers)
    write_json(tmp_path / "scores.json", scores_of(answers))
    path = write_report(tmp_path, [RUN])
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render(scores_of(answers), answers, [RUN])


def test_signs() -> None:
    assert [signed(0.25), signed(-0.25), signed(0.0), signed(None)] == ["+0.25", "−0.25", "+0.00", "–"]


# ---- in a browser ---------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)"),
]


def dom(path: Path, view: str = "") -> str:
    """The page as headless Chromium has it after its script ran."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent}/profile"]
    options += ["--virtual-time-budget=4000", "--window-size=1280,900", "--dump-dom"]
    address = path.resolve().as_uri() + (f"#answers?{view}" if view else "")
    done = subprocess.run([CHROMIUM, *options, address], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def drawn_questions(text: str) -> list[str]:
    return re.findall(r'<h3 class="question">(.*?)</h3>', text)


@pytest.fixture(scope="module")
def big_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "報告 report.html"
    answers = made(3400, NASTY)
    path.write_text(render(scores_of(answers), answers, [RUN]), encoding="utf-8")
    return path


class TestInBrowser:
    pytestmark = in_browser

    def test_rows_are_drawn_lazily_and_scripts_show_as_text(self, big_page: Path) -> None:
        text = dom(big_page)
        assert "<title>Evaluation: base → sft → grpo</title>" in text  # no script of a completion ran
        assert 30 <= len(drawn_questions(text)) <= 120  # of 3,400
        assert drawn_questions(text)[:3] == ["質問0番", "質問1番", "質問2番"]
        assert re.search(r'id="count"[^>]*>3,400 of 3,400 questions, \d+ drawn so far<', text)
        first = re.search(r'<p class="text">(.*?)</p>', text)[1]
        assert html.unescape(first) == f"{NASTY} base"
        assert "<img" not in text and "<textarea" not in text

    def test_filter_and_sort_by_address(self, big_page: Path) -> None:
        # sft against base: i % 6 - 1; the largest gain is 4, for i = 5, 11, ...
        gains = dom(big_page, "from=0&to=1&sort=gain&show=better")
        assert drawn_questions(gains)[:3] == ["質問5番", "質問11番", "質問17番"]
        assert "base → sft: +4" in gains
        better = sum(number % 6 > 1 for number in range(3400))
        assert f"{better:,} of 3,400 questions" in gains
        losses = dom(big_page, "from=0&to=1&sort=loss")
        assert drawn_questions(losses)[:3] == ["質問0番", "質問6番", "質問12番"]
        assert "base → sft: −1" in losses

    def test_search_finds_full_width_and_marks(self, big_page: Path) -> None:
        text = dom(big_page, "text=" + quote("質問３３９９"))  # full-width digits
        assert [re.sub("<[^>]+>", "", question) for question in drawn_questions(text)] == ["質問3399番"]
        assert "1 of 3,400 questions" in text and "<mark>質問3399</mark>" in text
