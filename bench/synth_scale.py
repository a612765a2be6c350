"""What 240,000 pairs cost: rank 0's time, memory and disk measured on a small run, the teacher's on paper.

    python bench/synth_scale.py --pairs 20000

The run is synth.py's own loop (plan, filters, near duplicates, guard, rounds on disk, files and card at the end) with
a teacher that makes up Japanese of the given lengths at once. What a GPU would take follows from the numbers of
tokens; how many of calm3's texts pass the filters, how long they are and how fast it writes are assumptions: options
of this script. After a first night, put in what funnel.json says.
"""

import os
import random
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import synth  # noqa: E402
from kaja.checkpoint import load_chat  # noqa: E402
from kaja.contamination import load_guard  # noqa: E402
from kaja.data import load_all  # noqa: E402
from kaja.demo_corpus import DEMO_DATA, DEMO_MODEL  # noqa: E402
from kaja.rubric import answer_messages, question_messages  # noqa: E402
from kaja.rounds import Copies, RoundLog  # noqa: E402
from kaja.synthesis import Synthesis  # noqa: E402
from kaja.teacher import Reader, Reply, Request, requests_of  # noqa: E402

SEEDS = tuple(
    f"{name}={DEMO_DATA / 'seeds' / file}"
    for name, file in (
        ("answer_carefully", "answer_carefully.json"), ("borderline", "borderline.json"),
        ("llm_jp_instructions", "llm_jp_instructions.jsonl"),
    )
)  # fmt: skip
KANJI = (
    "日本人生活学校時間社会問題方法仕事会社電車料理自然動物植物音楽映画旅行家族友達先生子供世界歴史文化経済科学技術研究開発"
    "健康運動環境気候地図言葉文章写真絵画"
)
LINKS = ("の", "を", "は", "が", "に", "と", "で", "から", "まで", "について", "のために", "しながら、", "ですが、")


@dataclass(frozen=True)
class Options:
    pairs: int = 20_000
    """Pairs of the small run."""
    target: int = 240_000
    """Pairs of the real one."""
    bad: float = 0.15
    """Assumed share of the teacher's texts, questions and answers alike, that a filter cuts."""
    question_chars: int = 60
    """Assumed mean length of a question."""
    answer_chars: int = 300
    """Assumed mean length of an answer."""
    chars_per_token: float = 1.5
    """Assumed, for the teacher's tokenizer on Japanese."""
    tokens_per_second: float = 2500.0
    """Assumed tokens that one GPU writes a second, for a 22B model in bfloat16 and some hundred texts at a time."""
    gpus: int = 8
    """GPUs, each with a teacher of its own."""


def made_up(rng: random.Random, chars: int) -> str:
    """Words and particles, of about a length that is spread as those of real texts are."""
    wanted = chars * rng.lognormvariate(-0.08, 0.4)  # mean 1
    text = ""
    while len(text) < wanted:
        text += "".join(rng.choices(KANJI, k=2)) + rng.choice(LINKS)
    return text


def said(request: Request, options: Options) -> str:
    rng = random.Random(request.seed)
    if request.kind == "question":
        text = f"Q: {made_up(rng, options.question_chars)}教えてください。"
    elif request.stream == "safety":
        text = f"A: お答えできません。その理由は、{made_up(rng, options.answer_chars)}危険だからです。"
    else:
        text = f"A: {made_up(rng, options.answer_chars)}よいでしょう。"
    if rng.random() < options.bad:
        text = text[3:]  # without its mark
    return text


def small_run(options: Options, folder: Path) -> tuple[Synthesis, int, dict[str, float], float]:
    """The state at the end, how many answers were asked for, CPU seconds, and the peak of memory in GiB."""
    config = synth.Config("scripted", SEEDS, str(folder), target=options.pairs)
    settings, chat = synth.settings_of(config), load_chat(DEMO_MODEL, "auto")
    seeds = load_all(SEEDS)
    folder.mkdir()
    log = RoundLog(folder / "rounds", seeds)
    list(log.begin())
    reader, guard = Reader(settings, chat), load_guard(())
    desk = synth.Desk(seeds, Synthesis(seeds, settings), Copies(seeds, settings, guard), log, 0)
    seconds = {"reading": 0.0, "rounds": 0.0}
    answers = 0
    while (round_ := desk.synthesis.plan()).remains:
        requests = requests_of(round_, settings)
        texts = [said(request, options) for request in requests]
        answers += len(round_.unanswered)
        started = time.process_time()
        replies = [
            Reply(text, cut, tokens=round(len(raw) / options.chars_per_token))
            for request, raw in zip(requests, texts) for cut, text in [reader.read(request, raw, False)]
        ]  # fmt: skip
        seconds["reading"] += time.process_time() - started
        started = time.process_time()
        outcome = desk.copies.outcome(round_, replies)
        log.append(desk.synthesis.rounds, outcome)
        desk.synthesis.add(outcome)
        seconds["rounds"] += time.process_time() - started
    started = time.process_time()
    synth.write_set(desk, config, folder)
    seconds["files"] = time.process_time() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    started = time.process_time()
    again = synth.Desk(seeds, Synthesis(seeds, settings), Copies(seeds, settings, guard), log, 0)
    for outcome in log.begin():
        again.copies.remember(outcome)
        again.synthesis.add(outcome)
    seconds["resume"] = time.process_time() - started
    assert again.synthesis.funnel() == desk.synthesis.funnel()
    return desk.synthesis, answers, seconds, memory


def main(options: Options) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with tempfile.TemporaryDirectory() as folder:
        synthesis, answers, seconds, memory = small_run(options, Path(folder) / "run")
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    scale = options.target / synthesis.pairs
    print(f"{synthesis.pairs:,} pairs from {synthesis.attempts:,} attempts ({synthesis.acceptance:.1%})")
    for name, measured, unit in (
        ("all ranks together, reading and filtering", seconds["reading"] / 60, "CPU minutes"),
        ("rank 0, copies and rounds", seconds["rounds"] / 60, "CPU minutes"),
        ("rank 0, files at the end", seconds["files"] / 60, "CPU minutes"),
        ("rank 0, taking in all rounds when resumed", seconds["resume"] / 60, "CPU minutes"),
        ("memory of rank 0, above the start", memory - before, "GiB"),
        ("disk", disk / 1e9, "GB"),
    ):
        print(f"{name}: {measured:.2f} {unit}; for {options.target:,} pairs {measured * scale:.1f} {unit}")

    attempts, answered = synthesis.attempts * scale, answers * scale
    prompts = [len(make("safety", "")[0]["content"]) for make in (question_messages, answer_messages)]
    read = attempts * (prompts[0] + options.question_chars) + answered * (prompts[1] + options.question_chars)
    wrote = synthesis.tokens["completion"] * scale
    hours = wrote / options.tokens_per_second / 3600
    print(
        f"on paper: {attempts:,.0f} questions and {answered:,.0f} answers; the teacher reads "
        f"{read / options.chars_per_token / 1e6:.0f} million tokens (mostly the same prompts, from the prefix cache) "
        f"and writes {wrote / 1e6:.0f} million: at {options.tokens_per_second:,.0f} tokens/s a GPU that takes "
        f"{hours:.0f} GPU hours, {hours / options.gpus:.1f} h on {options.gpus} GPUs"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(tyro.cli(Options, description=__doc__))
