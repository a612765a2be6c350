"""Score models on safety, over-refusal and helpfulness: what did each stage of tuning change?

    python judge.py --models base=llm-jp/llm-jp-3-13b-instruct sft=runs/sft/hf grpo=runs/grpo/hf \\
        --data data/eval.jsonl --judge-model elyza/Llama-3-ELYZA-JP-8B-AWQ \\
        --output-dir runs/eval --curves runs/sft runs/grpo

What it does:
    1. read the questions; their streams safety, borderline and helpfulness are the suites
                                                            kaja.data, kaja.evals.suites
    2. let one model after the other answer all of them, greedily              kaja.engine
    3. have the judge score every answer, 0-5 points; reward = points / 5      kaja.judging, kaja.reward
    4. per model and suite the mean reward with its bootstrap 95% interval, between models the paired
       difference with interval and sign test; failed verdicts are counted and left out
                                                            kaja.evals.judged, kaja.evals.statistics
    5. write scores.json, scores.md and report.html, and print the table       kaja.report

Every batch of answers and of verdicts is on disk (answers.jsonl) before the next begins: after a kill,
the same command with --resume auto makes none of them twice.

Whether a judge can be trusted is measured against ratings of people (or of a stronger judge):

    python judge.py calibrate --data kaja/demo_data/rated.jsonl --judge-model elyza/Llama-3-ELYZA-JP-8B-AWQ \\
        --output-dir runs/calibration

It scores the rated completions and writes agreement, kappa, rank correlation and bias with their
intervals, per stream, as calibration.json, .md and .html (kaja.evals.calibration).
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from kaja.charts import Run, load_run
from kaja.checkpoint import load_model, resolve_model
from kaja.cli import check_range, prepare_output_dir, run
from kaja.data import Example, load_all
from kaja.distributed import Ranks, setup, teardown
from kaja.engine import Engine, make_engine
from kaja.errors import UserError
from kaja.evals.answers import Answer, Answers, question_key
from kaja.evals.calibration import calibration, calibration_table, judge_rated, load_rated
from kaja.evals.calibration_page import write_calibration
from kaja.evals.judged import (
    Model,
    answer_questions,
    check_examples,
    judge_answers,
    prepare,
    score_table,
    tabulate,
)
from kaja.files import read_json, write_json, write_jsonl, write_text
from kaja.judge_watch import cost_line
from kaja.judging import JudgeOptions, look_at_canaries, open_judge, tell_of_missing_references
from kaja.report import write_report
from kaja.reward import SAID, JudgeFailed, Verdict

VERDICTS_AHEAD = 4  # batches of verdicts are so many times what the judge works on at a time: it is rarely idle
GPU_MEMORY = 0.85  # share that vLLM takes: the models come one at a time, with no trainer beside them
# What may differ in config.json between the stages of one model.
NOT_ARCHITECTURE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map")


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...]
    """Models to compare, as NAME=FOLDER or NAME=HUB_ID, stage by stage; the first is the baseline."""
    data: tuple[str, ...]
    """Files of questions with reference answers: kaja's JSONL, or SOURCE=FILE for the original formats."""
    output_dir: str
    """Folder for config.json, answers.jsonl, scores.json, scores.md and report.html."""
    judge: tyro.conf.OmitArgPrefixes[JudgeOptions] = JudgeOptions()
    """Who scores the answers."""
    engine: Literal["vllm", "torch"] = "vllm"
    """What generates answers, and runs --judge-model: vLLM, or kaja's own sampler in pure torch."""
    curves: tuple[str, ...] = ()
    """Training runs (folders with metrics.jsonl) whose curves the report shows."""
    max_completion_tokens: int = 512
    """Longest answer; longer ones are cut off, and the report says how many were."""
    batch_size: int = 64
    """Questions given to the engine at a time."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on with what output_dir holds."""
    seed: int = 0
    """Of the bootstrap; answers and verdicts are greedy."""

    def __post_init__(self) -> None:
        check_range(self, at_least_1=("max_completion_tokens", "batch_size"), at_least_0=("seed",))
        named_sources(self.models)


def main(config: Config) -> None:
    ranks = setup()
    if ranks.world_size > 1:
        raise UserError("judge.py is one process and torchrun started several; launch it with plain python")
    examples = load_all(config.data)
    check_examples(examples)
    tell_of_missing_references(examples)
    models = [
        prepare(name, resolve_model(source), examples, config.max_completion_tokens)
        for name, source in named_sources(config.models).items()
    ]
    config.judge.check(config.engine)  # a wrong name shows now, not after hours of answers
    runs = [load_run(folder) for folder in config.curves]
    output_dir = prepare_output_dir(config.output_dir, config, resume=config.resume == "auto", ranks=ranks)
    answers = Answers(output_dir / "answers.jsonl")

    # Answers: one engine serves one model after the other.
    for model, engine in engines(config, models, examples, answers, ranks.device):
        todo = missing(config, model, examples, answers)
        batches = answer_questions(
            engine,
            model,
            examples,
            todo,
            max_tokens=config.max_completion_tokens,
            batch_size=config.batch_size,
        )
        save_all(answers, batches, f"{model.name} answers", len(examples), len(todo))

    # Verdicts: the models are gone, the judge has the memory to itself.
    complete = [answers.found[model.name, question_key(example)] for model in models for example in examples]
    identity = config.judge.identity
    unjudged = [answer for answer in complete if not is_judged(answer, identity)]
    judged = [answer.verdict for answer in complete if answer.verdict and is_judged(answer, identity)]
    if unjudged:
        judge_all(config, unjudged, judged, answers, output_dir, ranks)

    complete = [answers.found[model.name, question_key(example)] for model in models for example in examples]
    publish(config, models, complete, runs, output_dir)
    teardown()


def named_sources(specs: tuple[str, ...]) -> dict[str, str]:
    """("base=FOLDER", ...) -> {"base": "FOLDER", ...}, in the given order."""
    sources: dict[str, str] = {}
    for spec in specs:
        name, _, source = spec.partition("=")
        if not name or not source or name in sources:
            raise UserError(
                f"models {spec!r}: every model needs a name of its own for the tables; "
                f"write NAME=FOLDER, for example base=models/llm-jp-3-13b-instruct"
            )
        sources[name] = source
    return sources


def missing(config: Config, model: Model, examples: list[Example], answers: Answers) -> list[int]:
    """Which examples this model has not answered yet."""
    limit = config.max_completion_tokens
    return [i for i, e in enumerate(examples) if not answers.get(model.name, model.weights, e, limit)]


def engines(
    config: Config, models: list[Model], examples: list[Example], answers: Answers, device: torch.device
) -> Iterator[tuple[Model, Engine]]:
    """Each model that has answers to make, with an engine that holds its weights.

    Where the next model differs in its weights alone, they are loaded into the engine that is there.
    Any other model gets a new engine, after the old one is closed.
    """
    engine: Engine | None = None
    served: Model | None = None
    max_length = max(model.max_length for model in models)
    for model in models:
        if not missing(config, model, examples, answers):
            continue
        if engine is not None and served is not None and weights_fit(model, served):
            engine.load_weights(load_model(model.folder).state_dict().items())
        else:
            if engine is not None:
                engine.close()
            engine = make_engine(
                config.engine,
                model.folder,
                stop_token_ids=model.chat.stop_token_ids,
                max_length=max_length,
                device=device,
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


def is_judged(answer: Answer, judge: str) -> bool:
    """Whether this judge has said what it has to say; a failure that is not its own word is asked again."""
    verdict = answer.verdict
    return verdict is not None and answer.judge == judge and (verdict.score is not None or verdict.cause in SAID)


def judge_all(
    config: Config, unjudged: list[Answer], judged: list[Verdict], answers: Answers, output_dir: Path, ranks: Ranks
) -> None:
    """The verdicts, each batch on disk before the next begins."""
    with open_judge(
        config.judge, config.engine, output_dir, ranks, {"gpu_memory_utilization": GPU_MEMORY}
    ) as judge:
        look_at_canaries(judge, config.judge, output_dir)
        batch_size = max(config.batch_size, VERDICTS_AHEAD * config.judge.judge_concurrency)
        batches = judge_answers(
            judge, unjudged, batch_size=batch_size, limit=config.judge.max_judge_failures, judged=judged
        )
        started = time.perf_counter()
        try:
            save_all(answers, batches, f"{judge.name} verdicts", len(judged) + len(unjudged), len(unjudged))
        except JudgeFailed as error:
            raise UserError(f"{error}; answers and verdicts so far are kept, go on with --resume auto") from None
    made = (answers.found[answer.model, question_key(answer.example)].verdict for answer in unjudged)
    tell_cost([verdict for verdict in made if verdict], time.perf_counter() - started)


def tell_cost(verdicts: list[Verdict], seconds: float) -> None:
    if line := cost_line(verdicts, seconds):
        print(line, file=sys.stderr)


def save_all(answers: Answers, batches: Iterable[list[Answer]], what: str, total: int, todo: int) -> None:
    """Write each batch as soon as it is made."""
    with tqdm(desc=what, total=total, initial=total - todo, dynamic_ncols=True) as bar:
        for batch in batches:
            answers.save(batch)
            bar.update(len(batch))


def publish(
    config: Config, models: list[Model], complete: list[Answer], runs: list[Run], output_dir: Path
) -> None:
    """Write the numbers, the table and the page, and print the table."""
    canaries = output_dir / "canaries.json"
    scores = {
        "judge": config.judge.judge_model,
        "judge_identity": config.judge.identity,
        "rubric_version": config.judge.judge_rubric,
        "canaries": read_json(canaries) if canaries.exists() else None,
        "max_completion_tokens": config.max_completion_tokens,
        "seed": config.seed,
        "models": [{"name": m.name, "folder": str(m.folder), "weights": m.weights} for m in models],
        "suites": tabulate(complete, [model.name for model in models], seed=config.seed),
    }
    write_jsonl(output_dir / "answers.jsonl", (answer.row() for answer in complete))
    write_json(output_dir / "scores.json", scores)
    write_text(output_dir / "scores.md", score_table(scores))
    report = write_report(output_dir, runs)
    print(f"\n{score_table(scores)}\n{report}")


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


def calibrate(config: CalibrateConfig) -> None:
    """`judge.py calibrate`: how a judge's scores compare with ratings of the same completions."""
    ranks = setup()
    if ranks.world_size > 1:
        raise UserError("judge.py is one process and torchrun started several; launch it with plain python")
    rated = load_rated(config.data)
    tell_of_missing_references([one.example for one in rated])
    config.judge.check(config.engine)
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
        tell_cost(verdicts, time.perf_counter() - started)
        result = calibration(judge, rated, verdicts, seed=config.seed)
    page = write_calibration(output_dir, result)
    print(f"\n{calibration_table(result)}\n{page}")
    teardown()


def command(argv: Sequence[str]) -> int:
    """The exit code of a command line: `calibrate` as its first word picks the other task."""
    if argv[:1] == ["calibrate"]:
        return run(calibrate, CalibrateConfig, argv[1:])
    return run(main, Config, argv)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
