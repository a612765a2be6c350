"""Score models on safety, over-refusal and helpfulness: what did each stage of tuning change?

    python judge.py --models base=llm-jp/llm-jp-3-13b-instruct sft=runs/sft/hf grpo=runs/grpo/hf \\
        --data data/eval.jsonl --judge-model elyza/Llama-3-ELYZA-JP-8B-AWQ \\
        --output-dir runs/eval --curves runs/sft runs/grpo

What it does:
    1. read the questions; their streams safety, borderline and helpfulness are the suites
                                                            kaja.data, kaja.evals.suites
    2. let one model after the other answer all of them, greedily              kaja.engine
    3. have the judge score every answer, 0-5 points; reward = points / 5      kaja.reward
    4. per model and suite the mean reward with its bootstrap 95% interval, between models the paired
       difference with interval and sign test; failed verdicts are counted and left out
                                                            kaja.evals.judged, kaja.evals.statistics
    5. write scores.json, scores.md and report.html, and print the table       kaja.report

Every batch of answers and of verdicts is on disk (answers.jsonl) before the next begins: after a kill,
the same command with --resume auto makes none of them twice.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from kaja.charts import Run, load_run
from kaja.checkpoint import load_model, resolve_model
from kaja.cli import check_range, prepare_output_dir, run
from kaja.data import Example, load_all
from kaja.demo_judge import RuleJudge
from kaja.distributed import setup, teardown
from kaja.engine import Engine, make_engine
from kaja.errors import UserError
from kaja.evals.answers import Answer, Answers, question_key
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
from kaja.report import write_report
from kaja.engine_judge import load_judge
from kaja.reward import Judge
from kaja.rubric import RUBRIC_VERSION

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
    judge_model: str = "elyza/Llama-3-ELYZA-JP-8B-AWQ"
    """Language model that scores answers, or `rule`: the demo's rules for tiny models."""
    engine: Literal["vllm", "torch"] = "vllm"
    """What generates answers and verdicts: vLLM, or kaja's own sampler in pure torch."""
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
    models = [
        prepare(name, resolve_model(source), examples, config.max_completion_tokens)
        for name, source in named_sources(config.models).items()
    ]
    if config.judge_model != "rule":
        resolve_model(config.judge_model)  # a wrong name shows now, not after hours of answers
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
    unjudged = [a for a in complete if a.verdict is None or a.judge != config.judge_model]
    if unjudged:
        rule = config.judge_model == "rule"
        judge: Judge = RuleJudge() if rule else load_judge(config.judge_model, config.engine, ranks.device)
        batches = judge_answers(judge, unjudged, batch_size=config.batch_size)
        save_all(answers, batches, f"{judge.name} verdicts", len(complete), len(unjudged))
        judge.close()

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
    scores = {
        "judge": config.judge_model,
        "rubric_version": RUBRIC_VERSION,
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


if __name__ == "__main__":
    sys.exit(run(main, Config))
