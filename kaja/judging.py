"""A judge as the options say, whoever it is, and what happens when its verdicts fail.

| options                   | who judges                                                                       |
|---------------------------|----------------------------------------------------------------------------------|
| --judge-url URL           | a server that is already there and speaks OpenAI's chat interface                |
| --judge-model rule        | the demo's rules, for tiny models                                                |
| --judge-model NAME        | that model: in a vLLM server which the run starts and ends (one a node, shared   |
|                           | by its ranks), or, with --engine torch, in each process itself                   |

Whatever a model said is remembered in one SQLite file (kaja.verdict_cache), so that a resumed run asks nothing twice.
"""

import math
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kaja.checkpoint import folder_fingerprint, load_chat, resolve_model
from kaja.cli import check_range
from kaja.data import Example
from kaja.demo_judge import RuleJudge
from kaja.distributed import Ranks, gather_shares, of_node
from kaja.engine import check_installed
from kaja.engine_judge import drops_system, judge_length, load_judge
from kaja.errors import UserError
from kaja.files import write_json
from kaja.judge_server import JudgeServer, ServerSettings
from kaja.judge_watch import CanaryReport, ask_canaries, load_canaries
from kaja.reward import TRANSIENT, Judge, JudgeFailed, Verdict, count_failures, judge_identity
from kaja.server_judge import ServerJudge
from kaja.verdict_cache import CachedJudge, VerdictCache

API_KEY = "KAJA_JUDGE_API_KEY"  # environment variable: a key is no option, which config.json would keep
OWN_GPU_MEMORY = 0.9  # share of a GPU that a judge takes which has it to itself
# Seconds between one try and the next while too many verdicts fail: together longer than a server takes to come back.
PAUSES = (10.0, 30.0, 90.0, 270.0)
QUOTED = 100  # characters of what the judge said that go into a message
LOOK_UP = 5.0  # seconds of a pause after which the ranks ask each other whether to stop
# CUDA leaves out what it does not understand, and all that follows, without a word.
GPU = r"(?:\d+|(?:GPU|MIG)-[\w-]+)"
GPU_LIST = re.compile(f"(?:{GPU}(?:,{GPU})*)?")


ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@dataclass(frozen=True)
class JudgeOptions:
    """Who judges, how, and what is done when it fails. docs/JUDGE.md says how to choose."""

    judge_model: str = "elyza/Llama-3-ELYZA-JP-8B-AWQ"
    """Language model that scores completions, or `rule`: the demo's rules for tiny models."""
    judge_url: str = ""
    """A server of OpenAI's chat interface that has the judge, instead of one that the run starts."""
    judge_rubric: Literal["slides-1", "corrected-1"] = "slides-1"
    """The slides' rubrics word for word, or with two slips of the pen corrected."""
    judge_reading: Literal["digit", "expected"] = "digit"
    """The likeliest score of 0 to 5, or the mean of all six weighted by their probabilities (smoother)."""
    judge_votes: int = 1
    """Answers sampled for each verdict, of which the median counts; 1: one greedy answer."""
    judge_gpus: str = ""
    """GPUs of each node for the judge's server, like 6,7; none: all of them, beside the trainer."""
    judge_memory: float = 0.0
    """Share of each of these GPUs that the judge's server takes; 0: what the memory plan leaves it."""
    judge_concurrency: int = 128
    """Requests under way at a time, from each process."""
    judge_timeout: float = 60.0
    """Seconds that a request may take before it is tried again."""
    judge_cache: str = ""
    """SQLite file of verdicts, which runs may share; none: verdicts.sqlite in output_dir."""
    max_judge_failures: float = 0.05
    """Share of verdicts that may fail; above it the run asks again, with growing pauses, and then stops."""
    canary_every: int = 50
    """Steps between tests of the judge with answers whose scores are known; 0: never."""

    def __post_init__(self) -> None:
        check_range(
            self, at_least_1=("judge_votes", "judge_concurrency"), positive=("judge_timeout",),
            at_least_0=("judge_memory", "max_judge_failures", "canary_every"),
            at_most={"judge_memory": 1.0, "max_judge_failures": 1.0},
        )  # fmt: skip
        if self.judge_votes % 2 == 0:
            raise UserError(f"judge_votes {self.judge_votes}: must be odd, or a median could lie between two scores")
        if self.judge_votes > 1 and self.judge_reading == "expected":
            raise UserError("judge_votes: the expected score is already a mean; use --judge-reading digit, or 1 vote")
        if not GPU_LIST.fullmatch(self.judge_gpus) or len(set(self.own_gpus)) < len(self.own_gpus):
            raise UserError(f"judge_gpus {self.judge_gpus!r}: must name different GPUs by number, like 6,7")

    @property
    def is_rule(self) -> bool:
        return self.judge_model == "rule" and not self.judge_url

    @property
    def own_gpus(self) -> list[str]:
        return self.judge_gpus.split(",") if self.judge_gpus else []

    @property
    def identity(self) -> str:
        """Judge.identity of the judge that these options open; needs its model folder, where it is not behind a URL."""
        if self.is_rule:
            return RuleJudge.identity
        weights = "" if self.judge_url else folder_fingerprint(resolve_model(self.judge_model))
        return judge_identity(self.judge_model, weights, self.judge_rubric, self.judge_reading, self.judge_votes)

    def check(self, engine: str) -> None:
        """UserError for a judge that cannot be had: cheap, so that it shows before anything is loaded."""
        if self.judge_url or self.is_rule:
            return
        resolve_model(self.judge_model)
        check_installed(engine)


def tell_of_missing_references(examples: Sequence[Example]) -> None:
    """A line on stderr where questions have no reference answer: they can be judged, but not as the rubric means it."""
    without = [f"{example.source} {example.id}" for example in examples if not example.reference.strip()]
    if without:
        print(
            f"warning: {len(without)} of {len(examples)} questions have no reference answer, and the rubric will show "
            f"the judge an empty one: {', '.join(without[:5])}{', ...' if len(without) > 5 else ''}", file=sys.stderr,
        )  # fmt: skip


@contextmanager
def open_judge(
    options: JudgeOptions, engine: str, output_dir: Path, ranks: Ranks, server_options: dict[str, Any] | None = None
) -> Iterator[Judge]:
    """The judge, ready to be asked. Every rank must call it; what it started ends with the block, also by an error.

    Args:
        engine: "vllm" or "torch": what runs --judge-model.
        server_options: gpu_memory_utilization and kv_cache_memory_bytes of a server that shares its GPUs.
    """
    with ExitStack() as stack:
        if options.is_rule:
            yield RuleJudge()
            return
        if options.judge_url:
            judge: Judge = connect(options, options.judge_url, ranks)
        elif engine == "torch":
            judge = load_judge(
                options.judge_model, ranks.device, rubric=options.judge_rubric, reading=options.judge_reading,
                votes=options.judge_votes,
            )  # fmt: skip
        else:
            copies = copies_of(options, ranks)
            url = stack.enter_context(launched(options, output_dir, ranks, copies, server_options or {}))
            judge = connect(options, url, ranks, copies)
        stack.callback(judge.close)
        cache = VerdictCache(options.judge_cache or output_dir / "verdicts.sqlite")
        stack.callback(cache.close)
        yield CachedJudge(judge, cache)


def connect(options: JudgeOptions, url: str, ranks: Ranks, copies: int = 1) -> ServerJudge:
    """A judge behind a URL, after one question that shows what its server can do."""
    # Of a server that is ours the model folder is here, and its template can be looked at.
    merge_system = not options.judge_url and drops_system(load_chat(resolve_model(options.judge_model)))
    judge = ServerJudge(
        url, options.judge_model, rubric=options.judge_rubric, reading=options.judge_reading,
        votes=options.judge_votes, concurrency=options.judge_concurrency, timeout=options.judge_timeout,
        merge_system=merge_system, copies=copies, api_key=os.environ.get(API_KEY, ""),
        identity=options.identity,
    )  # fmt: skip
    try:
        judge.probe(warn=ranks.is_main)
    except BaseException:
        judge.close()
        raise
    return judge


def canary_report(judge: Judge, options: JudgeOptions) -> CanaryReport:
    """How well this judge tells answers apart whose order is known, asked anew: what is remembered never changes."""
    asked = judge.inner if isinstance(judge, CachedJudge) else judge
    return ask_canaries(asked, load_canaries(with_knowledge=not options.is_rule))  # rules know no right and wrong


def look_at_canaries(judge: Judge, options: JudgeOptions, output_dir: Path) -> None:
    """Print the report, and write it to canaries.json; nothing with --canary-every 0."""
    if options.canary_every:
        report = canary_report(judge, options)
        print("\n".join(report.lines()), file=sys.stderr)
        write_json(output_dir / "canaries.json", report.record(step=0))


def copies_of(options: JudgeOptions, ranks: Ranks) -> int:
    """Copies of the judge behind its server: one on each GPU that it may use."""
    if ranks.device.type != "cuda":
        return 1
    return len(options.own_gpus) or torch.cuda.device_count()


def check_apart(options: JudgeOptions, ranks: Ranks) -> None:
    """UserError on all ranks if one of them trains on a GPU that --judge-gpus gives to the judge alone."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    own = visible[ranks.local_rank] if ranks.local_rank < len(visible) and visible[0] else str(ranks.local_rank)
    for rank, gpu in enumerate(gather_shares([own.strip()], ranks)):
        if gpu in options.own_gpus:
            raise UserError(
                f"judge_gpus {options.judge_gpus}: rank {rank} trains on GPU {gpu}; give the judge others, or start "
                f"torchrun with so few processes a node that they stay free"
            )


@contextmanager
def launched(
    options: JudgeOptions, output_dir: Path, ranks: Ranks, copies: int, server_options: dict[str, Any]
) -> Iterator[str]:
    """The URL of a vLLM server with the judge: each node's first rank starts it, all ranks of the node share it."""
    folder = resolve_model(options.judge_model)
    memory = options.judge_memory or (OWN_GPU_MEMORY if options.judge_gpus else 0.0)
    settings = ServerSettings(
        folder=folder, name=options.judge_model, max_length=judge_length(folder), device=ranks.device.type,
        log=output_dir / f"judge_server{f'_{ranks.rank}' if ranks.rank else ''}.log",
        gpus=options.judge_gpus, data_parallel=copies,
        **({"gpu_memory_utilization": memory} if memory else server_options),
    )  # fmt: skip
    with ExitStack() as stack:
        url = failure = ""
        if ranks.local_rank == 0:
            try:
                url = stack.enter_context(JudgeServer(settings)).url  # healthy now
            except UserError as error:  # the other ranks must hear of it, or they would wait for this one
                failure = str(error)
        url, failure = of_node((url, failure), ranks)
        if failure:
            raise UserError(failure)
        yield url


def settle(
    judge: Judge, examples: Sequence[Example], completions: Sequence[str], verdicts: list[Verdict],
    limit: float, ranks: Ranks = ALONE, *, out_of: int = 0, before: Sequence[Verdict] = (),
    stop: threading.Event | None = None,
) -> list[Verdict]:  # fmt: skip
    """The verdicts, with failed ones asked again while too many failed, over all ranks together.

    Only failures that can pass are asked again (a timeout, a server that is gone). Every rank must call
    it, with its own verdicts; all of them see the same share and do the same.

    Args:
        limit: share of failed verdicts that is let be.
        out_of: of how many verdicts, over all ranks, where these are only some of them: a few questions of a step,
            or the last batch of an evaluation, in which a single failure would be above any limit.
        before: verdicts that count too, and are not asked for again: those of earlier batches.
        stop: ends a pause when it is set, on any rank.

    Raises:
        JudgeFailed: on all ranks, when no try is left, when the failures that cannot pass are too many alone, or
            when it would pause and is to stop.
    """
    waits = iter(PAUSES)
    stop = stop or threading.Event()
    earlier = Counter(count_failures(before))
    while True:
        total, failed = len(before), earlier.copy()
        words = next((verdict.text for verdict in verdicts if verdict.score is None and verdict.text), "")
        said = ""
        for count, causes, words in gather_shares([(len(verdicts), count_failures(verdicts), words)], ranks):
            total += count
            failed.update(causes)
            said = said or words
        total = max(total, out_of)
        if sum(failed.values()) <= limit * total:
            return verdicts
        lasting = sum(count if cause not in TRANSIENT else earlier[cause] for cause, count in failed.items())
        told = ", ".join(f"{cause} {count}" for cause, count in failed.most_common())
        state = f"{sum(failed.values())} of {total} verdicts failed ({told}), above {limit:.0%}"
        state += f"; one said {' '.join(said.split())[:QUOTED]!r}" if said else ""
        pause = next(waits, None)
        if pause is None or lasting > limit * total:
            advice = "mend the judge (its log may tell more), or raise --max-judge-failures"
            raise JudgeFailed(f"judge: {state}; {advice}")
        if ranks.is_main:
            print(f"\nwarning: judge: {state}; asking again in {pause:g} s", file=sys.stderr)
        if passed(pause, stop, ranks):
            raise JudgeFailed(f"judge: {state}; not asked again, as the run was asked to stop")
        places = [place for place, verdict in enumerate(verdicts) if verdict.cause in TRANSIENT]
        again, failure = [verdicts[place] for place in places], ""
        try:
            again = judge.judge([examples[place] for place in places], [completions[place] for place in places])
        except UserError as error:  # the other ranks must hear of it, or they would wait for this one
            failure = str(error)
        if failures := [text for text in gather_shares([failure], ranks) if text]:
            raise JudgeFailed(failures[0])
        verdicts = list(verdicts)
        for place, verdict in zip(places, again, strict=True):
            verdicts[place] = verdict


def passed(seconds: float, stop: threading.Event, ranks: Ranks) -> bool:
    """Wait so long, or until `stop` is set on any rank: True then, on all of them."""
    parts = math.ceil(seconds / LOOK_UP)
    return any(any(gather_shares([stop.wait(seconds / parts)], ranks)) for _ in range(parts))
