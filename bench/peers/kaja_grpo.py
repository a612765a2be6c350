"""Contestant: train_grpo.py of this checkout (or of another: the job's "checkout"), its loop timed from outside."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import Window, read_job, report
from reward import even_share

job = read_job()
sys.path.insert(0, job["checkout"])
import torch  # noqa: E402
import train_grpo  # noqa: E402
from kaja.files import read_jsonl  # noqa: E402
from kaja.options import JudgeOptions  # noqa: E402
from kaja.reward import Verdict  # noqa: E402
from kaja.tracking import complete_rows  # noqa: E402

window, train = Window(), train_grpo.train
# What the peers call by these names; all else (sync, update, log) is "update".
PHASES = {"generate": "generate", "log_probs": "log_probs"}


class Rule:
    name = identity = "even words"
    concurrent = False

    def judge(self, examples: Sequence[Any], completions: Sequence[str]) -> list[Verdict]:
        return [Verdict(5 * even_share(text)) for text in completions]

    def close(self) -> None:
        pass


@contextmanager
def open_rule(*arguments: Any, **options: Any) -> Iterator[Rule]:
    yield Rule()


class Watch(train_grpo.Stopwatch):
    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with super().__call__(phase), window.phase(PHASES.get(phase, "rest")):
            yield


def timed_train(policy: Any, reference: Any, optimizer: Any, sampler: Any, max_length: int, config: Any,
                output_dir: Path, ranks: Any) -> None:  # fmt: skip
    with window:
        train(policy, reference, optimizer, sampler, max_length, config, output_dir, ranks)
    rows = complete_rows(output_dir / "metrics.jsonl", config.max_steps)
    samples = [row for path in sorted((output_dir / "samples").glob("step_*.jsonl")) for _, row in read_jsonl(path)]
    window.phases.pop("rest", None)
    window.phases["update"] = window.measured["cpu_seconds"] - sum(window.phases.values())
    if ranks.is_main:
        report(
            job, window, losses=[row["loss"] for row in rows], phases=window.phases, torch=torch.__version__,
            completion_tokens=sum(row["length"] for row in samples),
            prompt_tokens=sum(row["prompt_length"] for row in samples), rewards=[row["reward"] for row in rows],
        )  # fmt: skip
    raise SystemExit  # what follows, saving, belongs to nobody's measurement


train_grpo.train, train_grpo.open_judge, train_grpo.Stopwatch = timed_train, open_rule, Watch
train_grpo.main(train_grpo.Config(
    model=job["model"], data=(job["questions"],), output_dir=job["output_dir"], engine=job["engine"],
    judge=JudgeOptions(judge_model="rule", canary_every=0), max_steps=job["steps"], prompts_per_step=job["batch"],
    group_size=job["group_size"], max_completion_tokens=job["max_completion_tokens"], temperature=1.0,
    micro_batch_size=job["micro_batch"], learning_rate=job["learning_rate"], weight_decay=0.0,
    max_grad_norm=job["max_grad_norm"], algorithm=train_grpo.Algorithm(kl_coef=0.04, kl="k3", correction="none"),
))  # fmt: skip
