"""Score models on safety, over-refusal, helpfulness and ability: what did each stage of tuning change?

    python judge.py --models base=llm-jp/llm-jp-3-13b-instruct sft=runs/sft/hf grpo=runs/grpo/hf \\
        --data answer_carefully=test/answer_carefully.json --mt-bench mt_bench_ja --llm-jp-eval llm_jp_eval_test \\
        --judge-model elyza/Llama-3-ELYZA-JP-8B-AWQ --output-dir runs/eval --curves runs/sft runs/grpo

What it does:
    1. read the questions of the suites                     kaja.evals.loading
         safety, borderline, helpfulness: --data            kaja.evals.rubric_suites, .llm_jp_judge
         mt_bench: Japanese MT-Bench                        kaja.evals.mt_bench
         llm_jp_eval: tasks with known answers              kaja.evals.llm_jp_eval
    2. let one model after the other answer all of them     kaja.evals.answering, kaja.engine
    3. have the judge grade the answers                     kaja.evals.grading, kaja.judging
    4. per model the means with their bootstrap 95% intervals, between models the paired differences with interval
       and sign test; failed verdicts are counted and left out
                                                            kaja.evals.measures, kaja.evals.statistics
    5. write scores.json, scores.md and report.html, and print the table
                                                            kaja.evals.table, kaja.report

Every batch of answers and of grades is on disk (answers.jsonl) before the next begins: after a kill, the same command
with --resume auto makes none of them twice. `torchrun --nproc_per_node 8 judge.py ...` shares both over 8 GPUs.

Whether a judge can be trusted is measured against ratings of people (or of a stronger judge):

    python judge.py calibrate --data kaja/demo_data/rated.jsonl --judge-model elyza/Llama-3-ELYZA-JP-8B-AWQ \\
        --output-dir runs/calibration

It scores the rated completions and writes agreement, kappa, rank correlation and bias with their
intervals, per stream, as calibration.json, .md and .html (kaja.evals.calibration).

    python judge.py compete --model runs/grpo/hf --input-path questions.jsonl --output-path responses.jsonl

answers a contest's questions: {"text"} in, the same with "response" out (kaja.evals.competition).
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from kaja.cli import check_range, first_look, run
from kaja.errors import UserError
from kaja.options import JudgeOptions

SuiteName = Literal["safety", "borderline", "helpfulness", "mt_bench", "llm_jp_eval"]


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...]
    """Models to compare, stage by stage, each a FOLDER or hub id, or NAME=one; the first is the baseline."""
    output_dir: str
    """Folder for config.json, answers.jsonl, scores.json, scores.md and report.html."""
    suites: tuple[SuiteName, ...] = ()
    """Suites to run; none: all that have questions."""
    data: tuple[str, ...] = ()
    """Questions with reference answers for safety, borderline and helpfulness: kaja's JSONL, or SOURCE=FILE."""
    mt_bench: str = ""
    """Questions of MT-Bench: question.jsonl, or the folder that holds it and its reference answers."""
    llm_jp_eval: str = ""
    """A folder of llm-jp-eval's datasets (*.json), or of its prompts (*.eval-prompt.json)."""
    scales: tuple[Literal["slides", "llm-jp-judge"], ...] = ("slides",)
    """How --data's suites are graded: the slides' rubrics, and the scales of llm-jp-judge v2."""
    judge: tyro.conf.OmitArgPrefixes[JudgeOptions] = JudgeOptions()
    """Who grades the answers."""
    engine: Literal["vllm", "torch"] = "vllm"
    """What generates answers, and runs --judge-model: vLLM, or kaja's own sampler in pure torch."""
    curves: tuple[str, ...] = ()
    """Training runs (folders with metrics.jsonl): the report shows their curves, and what of the questions they saw."""
    max_completion_tokens: int = 1024
    """Longest answer; longer ones are cut off, and the report says how many were. llm-jp-eval has its own limits."""
    temperature: float = 0.0
    """Of the answers to --data; 0 is greedy. MT-Bench and llm-jp-eval have their own."""
    samples: int = 1
    """Answers to a question that is not answered greedily, each with a seed of its own; their scores are averaged."""
    batch_size: int = 64
    """Questions given to each rank's engine at a time."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on with what output_dir holds."""
    seed: int = 0
    """Of sampled answers and of the bootstrap."""

    def __post_init__(self) -> None:
        check_range(
            self, at_least_1=("max_completion_tokens", "samples", "batch_size"), at_least_0=("temperature", "seed")
        )
        named_sources(self.models)
        if not self.scales:
            raise UserError("scales: none; name slides, llm-jp-judge or both")
        if self.samples > 1 and not self.temperature and not self.mt_bench:
            raise UserError(f"samples {self.samples}: greedy answers are all the same; set --temperature too")


def named_sources(specs: tuple[str, ...]) -> dict[str, str]:
    """("base=FOLDER", "runs/sft/hf", ...) -> {"base": "FOLDER", "sft": "runs/sft/hf", ...}, in the given order."""
    sources: dict[str, str] = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not equals:
            source, path = spec, Path(spec)
            name = path.parent.name if path.name == "hf" else path.name  # train_*.py leave the model in hf/
        if not name or not source or name in sources:
            raise UserError(
                f"models {spec!r}: every model needs a name of its own for the tables; "
                f"write NAME=FOLDER, for example base=models/llm-jp-3-13b-instruct"
            )
        sources[name] = source
    return sources


@dataclass(frozen=True)
class CalibrateConfig:
    data: tuple[str, ...]
    """Files of rated completions: kaja's JSONL with `completion`, `rating` (0 to 5) and, maybe, `rater`."""
    output_dir: str
    """Folder for config.json, verdicts.sqlite and calibration.json, .md and .html."""
    judge: tyro.conf.OmitArgPrefixes[JudgeOptions] = JudgeOptions()
    """Who is compared with the ratings."""
    engine: Literal["vllm", "torch"] = "vllm"
    """What runs --judge-model: vLLM, or kaja's own sampler in pure torch."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on with what output_dir holds; no verdict in it is asked for again."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        check_range(self, at_least_0=("seed",))


if __name__ == "__main__" and sys.argv[1:2] not in (["calibrate"], ["compete"]):
    first_look(Config)  # --help and mistakes are answered now: what follows takes seconds to import

from tqdm import tqdm

from kaja.charts import Run, load_run
from kaja.checkpoint import read_weights, resolve_model
from kaja.distributed import Ranks, barrier, from_main, on_main, setup, teardown
from kaja.engine import Engine, make_engine
from kaja.evals.answering import Model, answer_questions, prepare
from kaja.evals.answers import Answer, Answers
from kaja.evals.calibration import calibration, calibration_table, judge_rated, load_rated
from kaja.evals.calibration_page import write_calibration
from kaja.evals.competition import CompeteConfig, compete
from kaja.evals.grading import Grading, PromptGrading
from kaja.evals.judged import is_graded, judge_answers, tabulate
from kaja.evals.llm_jp_eval_files import prompt_files, write_generated
from kaja.evals.loading import LoadedSuite, Sources, load_suites
from kaja.evals.notes import contamination_notes
from kaja.evals.questions import Question
from kaja.evals.suites import SUITES
from kaja.evals.table import headline_table, score_table
from kaja.files import read_json, write_json, write_jsonl, write_text
from kaja.judge_watch import cost_line
from kaja.judging import check_judge, identity_of, look_at_canaries, open_judge, tell_of_missing_references
from kaja.output_dir import prepare_output_dir
from kaja.report import write_report
from kaja.reward import Cost, Judge, JudgeFailed, Verdict
from kaja.rubric import STREAMS

VERDICTS_AHEAD = 4  # batches of verdicts are so many times what the judge works on at a time: it is rarely idle
GPU_MEMORY = 0.85  # share that vLLM takes: the models come one at a time, with no trainer beside them
# What may differ in config.json between the stages of one model.
NOT_ARCHITECTURE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map")


@dataclass(frozen=True)
class Evaluation:
    """What all steps share."""

    config: Config
    ranks: Ranks
    output_dir: Path
    suites: list[LoadedSuite]
    gradings: list[Grading]
    models: list[Model]
    max_length: int
    """Longest prompt and completion of any model."""
    answers: Answers

    @property
    def questions(self) -> list[Question]:
        return [question for suite in self.suites for question in suite.questions]


def main(config: Config) -> None:
    ranks = setup()
    suites = load_suites(
        config.suites,
        Sources(
            config.data, config.mt_bench, config.llm_jp_eval, config.scales, config.max_completion_tokens,
            config.temperature, config.samples,
        ),
    )  # fmt: skip
    gradings = check_gradings(config, suites)
    questions = [question for suite in suites for question in suite.questions]
    if ranks.is_main:
        tell_of_missing_references([q.example for q in questions if q.suite in STREAMS and not q.sample])
    folders = {name: resolve_model(source) for name, source in named_sources(config.models).items()}
    prepared = [prepare(name, folder, questions) for name, folder in folders.items()]
    runs = [load_run(folder) for folder in config.curves]
    output_dir = prepare_output_dir(config.output_dir, config, resume=config.resume == "auto", ranks=ranks)
    models, lengths = [model for model, _ in prepared], [length for _, length in prepared]
    answers = open_answers(output_dir, ranks)
    work = Evaluation(config, ranks, output_dir, suites, gradings, models, max(lengths), answers)

    # Answers: one engine serves one model after the other.
    for model, engine in engines(work):
        todo = missing(model, work)
        batches = answer_questions(
            engine, model, todo, answers, ranks, max_length=work.max_length, batch_size=config.batch_size,
            seed=config.seed,
        )  # fmt: skip
        save_all(work, batches, f"{model.name} answers", len(questions), len(todo))

    # Grades: when the last rank's engine is gone, the judge has the memory to itself.
    barrier()
    if any(ungraded(grading, work) for grading in gradings):
        judge_all(work)

    on_main(lambda: publish(work, runs), ranks)
    teardown()


def check_gradings(config: Config, suites: list[LoadedSuite]) -> list[Grading]:
    """All gradings of the suites, each once, after a look at who is to give them: a wrong name shows now."""
    gradings = list({grading.name: grading for suite in suites for grading in suite.gradings}.values())
    if gradings:
        check_judge(config.judge, config.engine)
    written = [grading.name for grading in gradings if isinstance(grading, PromptGrading)]
    if written and config.judge.is_rule:
        raise UserError(
            f"judge_model rule: its rules score on the slides' scale only, and {', '.join(written)} must be written "
            f"by a language model; name one, or leave out --mt-bench and --scales llm-jp-judge"
        )
    return gradings


def open_answers(output_dir: Path, ranks: Ranks) -> Answers:
    """What an earlier run left, the same on every rank."""
    kept: list[Answers] = []
    on_main(lambda: kept.append(Answers(output_dir / "answers.jsonl")), ranks)
    answers = kept[0] if ranks.is_main else Answers(None)
    answers.found = from_main(answers.found, ranks)
    return answers


def missing(model: Model, work: Evaluation) -> list[Question]:
    """What this model has not answered yet; a turn is asked again with the one before it."""
    found: dict[str, Question] = {}
    for question in work.questions:
        if question.previous in found or not work.answers.get(model.name, model.weights, question):
            found[question.key] = question
    return list(found.values())


def engines(work: Evaluation) -> Iterator[tuple[Model, Engine]]:
    """Each model that has answers to make, with an engine that holds its weights.

    Where the next model differs in its weights alone, they are loaded into the engine that is there.
    Any other model gets a new engine, after the old one is closed.
    """
    engine: Engine | None = None
    served: Model | None = None
    for model in work.models:
        if not missing(model, work):
            continue
        if engine is not None and served is not None and weights_fit(model, served):
            engine.load_weights(read_weights(model.folder))
        else:
            if engine is not None:
                engine.close()
            engine = make_engine(
                work.config.engine,
                model.folder,
                stop_token_ids=model.chat.stop_token_ids,
                max_length=work.max_length,
                device=work.ranks.device,
                gpu_memory_utilization=GPU_MEMORY,
            )
            served = model
        yield model, engine
    if engine is not None:
        engine.close()


def weights_fit(model: Model, served: Model) -> bool:
    """Whether two models have the same architecture and stop tokens; their tokenizers have no part in it."""
    configs = (read_json(either.folder / "config.json") for either in (model, served))
    config, other = ({k: v for k, v in c.items() if k not in NOT_ARCHITECTURE} for c in configs)
    return (
        config == other
        and "quantization_config" not in config
        and model.chat.stop_token_ids == served.chat.stop_token_ids
    )


def answers_for(grading: Grading, work: Evaluation) -> list[Answer]:
    """All answers that this grading is for, graded or not."""
    asked = [question for question in work.questions if grading.applies(question)]
    return [work.answers.found[model.name, question.key] for model in work.models for question in asked]


def ungraded(grading: Grading, work: Evaluation) -> list[Answer]:
    identity = identity_of(work.config.judge)
    return [answer for answer in answers_for(grading, work) if not is_graded(answer, grading, identity)]


def judge_all(work: Evaluation) -> None:
    """The grades, grading by grading, each batch on disk before the next begins."""
    options, server_options = work.config.judge, {"gpu_memory_utilization": GPU_MEMORY}
    longest = max((grading.max_tokens for grading in work.gradings if isinstance(grading, PromptGrading)), default=0)
    with open_judge(
        options, work.config.engine, work.output_dir, work.ranks, server_options, max_reply=longest
    ) as judge:
        on_main(lambda: look_at_canaries(judge, options, work.output_dir), work.ranks)
        for grading in work.gradings:
            grade_all(judge, grading, work)


def grade_all(judge: Judge, grading: Grading, work: Evaluation) -> None:
    options, every, todo = work.config.judge, answers_for(grading, work), ungraded(grading, work)
    missing_grade = {(answer.model, answer.question.key) for answer in todo}
    graded = [
        answer.grades[grading.name] for answer in every if (answer.model, answer.question.key) not in missing_grade
    ]
    batch_size = max(work.config.batch_size, VERDICTS_AHEAD * options.judge_concurrency) * work.ranks.world_size
    batches = judge_answers(
        judge, grading, todo, work.answers, work.ranks, batch_size=batch_size, limit=options.max_judge_failures,
        graded=graded,
    )  # fmt: skip
    started = time.perf_counter()
    try:
        save_all(work, batches, f"{judge.name} {grading.name}", len(every), len(todo))
    except JudgeFailed as error:
        raise UserError(f"{error}; answers and grades so far are kept, go on with --resume auto") from None
    if work.ranks.is_main:
        made = [work.answers.found[answer.model, answer.question.key].grades[grading.name] for answer in todo]
        tell_cost([grade.cost for grade in made], time.perf_counter() - started)


def tell_cost(costs: list[Cost], seconds: float) -> None:
    if line := cost_line(costs, seconds):
        print(line, file=sys.stderr)


def save_all(work: Evaluation, batches: Iterable[list[Answer]], what: str, total: int, todo: int) -> None:
    """Keep each batch as soon as it is made: on every rank, and rank 0 on disk."""
    quiet = not work.ranks.is_main
    with tqdm(desc=what, total=total, initial=total - todo, dynamic_ncols=True, disable=quiet) as bar:
        for batch in batches:
            work.answers.save(batch)
            bar.update(len(batch))


def publish(work: Evaluation, runs: list[Run]) -> None:
    """Write the numbers, the table, the page and what llm-jp-eval can score, and print the table."""
    config, output_dir = work.config, work.output_dir
    of_model = {
        model.name: [work.answers.found[model.name, question.key] for question in work.questions]
        for model in work.models
    }
    shown = {(answer.model, answer.question.key): answer for answers in of_model.values() for answer in answers}
    # What an earlier command asked for, of other models or suites, stays behind it.
    kept = shown | {key: answer for key, answer in work.answers.found.items() if key not in shown}
    scores = all_scores(work, of_model)
    write_jsonl(output_dir / "answers.jsonl", (answer.row() for answer in kept.values()))
    write_json(output_dir / "scores.json", scores)
    write_text(output_dir / "scores.md", score_table(scores))
    if "llm_jp_eval" in scores["suites"] and (files := prompt_files(config.llm_jp_eval)):
        for name, answers in of_model.items():
            write_generated(output_dir / "llm_jp_eval", name, files, answers)
    report = write_report(output_dir, scores, list(shown.values()), runs)
    print(f"\n{headline_table(scores)}\n{report}")


def all_scores(work: Evaluation, of_model: dict[str, list[Answer]]) -> dict[str, Any]:
    """What scores.json holds."""
    config, canaries = work.config, work.output_dir / "canaries.json"
    tables = {}
    for suite in work.suites:
        by_model = {
            name: [answer for answer in answers if answer.question.suite == suite.name]
            for name, answers in of_model.items()
        }
        every = [answer for answers in by_model.values() for answer in answers]
        tables[suite.name] = tabulate(by_model, suite.tables(every), seed=config.seed)
    judged = bool(work.gradings)
    return {
        "judge": config.judge.judge_model if judged else "",
        "judge_identity": identity_of(config.judge) if judged else "",
        "rubric_version": config.judge.judge_rubric if judged else "",
        "canaries": read_json(canaries) if canaries.exists() else None,
        "decoding": decoding(work.suites),
        "max_completion_tokens": config.max_completion_tokens,
        "seed": config.seed,
        "models": [{"name": m.name, "folder": str(m.folder), "weights": m.weights} for m in work.models],
        "notes": contamination_notes(work.questions, [Path(folder) for folder in config.curves]),
        "suites": tables,
    }


def decoding(suites: list[LoadedSuite]) -> str:
    """How the answers were drawn; MT-Bench and llm-jp-eval have temperatures of their own, so suites can differ."""
    titles: dict[str, list[str]] = {}
    for suite in suites:
        temperatures = sorted({question.temperature for question in suite.questions})
        samples = 1 + max(question.sample for question in suite.questions)
        how = f"temperature {' to '.join(f'{t:g}' for t in dict.fromkeys((temperatures[0], temperatures[-1])))}"
        how += f", {samples} sample{'s' if samples > 1 else ''}"
        titles.setdefault(how if temperatures[-1] else "greedy", []).append(SUITES[suite.name].title)
    if len(titles) == 1:
        return next(iter(titles))
    return ", ".join(f"{how} ({', '.join(names)})" for how, names in titles.items())


def calibrate(config: CalibrateConfig) -> None:
    """`judge.py calibrate`: how a judge's scores compare with ratings of the same completions."""
    ranks = setup()
    if ranks.world_size > 1:
        raise UserError("judge.py is one process and torchrun started several; launch it with plain python")
    rated = load_rated(config.data)
    tell_of_missing_references([one.example for one in rated])
    check_judge(config.judge, config.engine)
    output_dir = prepare_output_dir(config.output_dir, config, resume=config.resume == "auto", ranks=ranks)
    server_options = {"gpu_memory_utilization": GPU_MEMORY}
    with open_judge(config.judge, config.engine, output_dir, ranks, server_options) as judge:
        look_at_canaries(judge, config.judge, output_dir)
        # Each batch of verdicts is in verdicts.sqlite before the next begins.
        batch_size = VERDICTS_AHEAD * config.judge.judge_concurrency
        batches = judge_rated(judge, rated, batch_size=batch_size, limit=config.judge.max_judge_failures)
        verdicts: list[Verdict] = []
        started = time.perf_counter()
        try:
            with tqdm(desc=f"{judge.name} verdicts", total=len(rated), dynamic_ncols=True) as bar:
                for batch in batches:
                    verdicts += batch
                    bar.update(len(batch))
        except JudgeFailed as error:
            raise UserError(f"{error}; the verdicts so far are kept, go on with --resume auto") from None
        tell_cost([verdict.cost for verdict in verdicts], time.perf_counter() - started)
        result = calibration(judge, rated, verdicts, seed=config.seed)
    page = write_calibration(output_dir, result)
    print(f"\n{calibration_table(result)}\n{page}")
    teardown()


def command(argv: Sequence[str]) -> int:
    """The exit code of a command line: `calibrate` or `compete` as its first word picks another task."""
    if argv[:1] == ["calibrate"]:
        return run(calibrate, CalibrateConfig, argv[1:])
    if argv[:1] == ["compete"]:
        return run(compete, CompeteConfig, argv[1:])
    return run(main, Config, argv)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
