"""Does it learn? Reward curves of GRPO, Dr. GRPO, DAPO, GSPO and CISPO with a rule as the reward.

    OMP_NUM_THREADS=1 python bench/grpo_learns.py              # all methods x 5 seeds; writes docs/grpo_learns.svg
    OMP_NUM_THREADS=1 python bench/grpo_learns.py --methods GSPO --seeds 0 1 2 --svg ""

Each run is train_grpo.py itself, in this process, on the demo's model of a million parameters and its 144 harmless
questions. FormJudge's points are for the form of the answer: it wants 「はい。」 first and a reason at the end, which
the model does in 3% of its answers. A method is a row of the table in kaja.loss.policy_loss; unlike in most of their
papers the KL to the reference is on (0.04), so that all have the same task. Two updates a step: with one the ratio of
policies is always 1, so that no clip ever bites and several methods would be the same.

The start is the mean reward of the model before training, over all questions, and so is nearly free of noise; the end
is the mean of the last 5 steps. The gain is their difference, as a share of what is possible (1 - start).
`tests/test_grpo_learns.py` holds the same runs to half of it.
"""

import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_grpo  # noqa: E402
from kaja.charts import pyplot  # noqa: E402
from kaja.checkpoint import load_chat  # noqa: E402
from kaja.cli import run  # noqa: E402
from kaja.data import Example, load_all  # noqa: E402
from kaja.demo import SOURCES  # noqa: E402
from kaja.demo_corpus import DEMO_DATA, DEMO_MODEL, topic_of  # noqa: E402
from kaja.demo_judge import coverage, gives_reason, is_whole  # noqa: E402
from kaja.engine import make_engine  # noqa: E402
from kaja.errors import UserError  # noqa: E402
from kaja.reward import Verdict, reward_of  # noqa: E402

HARMLESS = [source for source in SOURCES if not source.startswith("answer_carefully=")]
HELD_OUT = [str(DEMO_DATA / "evaluation" / f"{stream}.jsonl") for stream in ("borderline", "helpfulness")]
MAX_TOKENS = 40
SETTINGS = (
    "--engine", "torch", "--judge-model", "rule", "--canary-every", "0",
    "--max-steps", "16", "--prompts-per-step", "4", "--group-size", "6",
    "--max-completion-tokens", str(MAX_TOKENS), "--micro-batch-size", "24", "--learning-rate", "3e-4",
    "--updates-per-step", "2", "--kl-coef", "0.04",
)  # fmt: skip
METHODS: dict[str, tuple[str, ...]] = {
    "GRPO": ("--kl", "k3"),
    "Dr. GRPO": ("--advantage-scale", "none", "--aggregation", "constant"),
    "DAPO": ("--clip-high", "0.28", "--aggregation", "token"),
    "GSPO": ("--ratio", "sequence", "--clip-low", "3e-4", "--clip-high", "4e-4"),
    "CISPO": ("--surrogate", "cispo", "--clip-low", "1", "--clip-high", "1", "--aggregation", "token"),
}
LAST = 5  # steps whose mean is the end


@dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods to run."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of each."""
    svg: str = str(ROOT / "docs" / "grpo_learns.svg")
    """Where to draw the curves; empty: nowhere."""
    options: str = ""
    """Further options of train_grpo.py, e.g. "--kl-coef 0"."""


class FormJudge:
    """A rule as the reward: 2 points for 「はい。」 first, 3 for a reason; 0 if off topic or unfinished."""

    name = identity = "form rule"
    concurrent = False

    def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
        return [Verdict(points(*pair)) for pair in zip(examples, completions, strict=True)]

    def close(self) -> None:
        pass


def points(example: Example, completion: str) -> float:
    text = completion.strip()
    if not is_whole(text) or coverage(topic_of(example.question) or example.question, text) < 0.8:
        return 0.0
    return 2.0 * text.startswith("はい。") + 3.0 * gives_reason(text)


@dataclass(frozen=True)
class Curve:
    """One run: its rows of metrics.jsonl, and what it came to."""

    rows: list[dict[str, Any]]
    held_out: float  # mean reward of the trained model on questions that were not trained on
    cpu_seconds: float

    @property
    def rewards(self) -> list[float]:
        return [row["reward"] for row in self.rows]

    @property
    def end(self) -> float:
        return sum(self.rewards[-LAST:]) / LAST

    @property
    def share(self) -> float:
        """Gain, of what is possible."""
        return (self.end - start()) / (1 - start())

    @property
    def steps_to_half(self) -> int | None:
        """The step whose neighbourhood (3 steps) first has half of the possible gain."""
        half, rewards = (1 + start()) / 2, self.rewards
        means = [(step, sum(rewards[step - 2:step + 1]) / 3) for step in range(2, len(rewards))]
        return next((step for step, mean in means if mean >= half), None)


def train(options: Sequence[str], seed: int, judge: type = FormJudge) -> Curve:
    """Run train_grpo.py with FormJudge in the place of the demo's rules."""
    with tempfile.TemporaryDirectory() as temporary, mock.patch("kaja.judging.RuleJudge", judge):
        output, said, before = Path(temporary) / "run", io.StringIO(), time.process_time()
        paths = ("--model", str(DEMO_MODEL), "--data", *HARMLESS, "--output-dir", str(output))
        with redirect_stderr(said):
            code = run(train_grpo.main, train_grpo.Config, [*paths, *SETTINGS, "--seed", str(seed), *options])
        if code != 0:
            raise RuntimeError(said.getvalue())
        seconds = time.process_time() - before
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return Curve([json.loads(line) for line in lines], mean_reward(output / "hf", HELD_OUT), seconds)


def mean_reward(model: Path, data: Sequence[str], samples: int = 1) -> float:
    """Mean of FormJudge's reward over sampled completions of all questions, at temperature 1."""
    chat, examples = load_chat(model), load_all(data)
    prompts = [chat.encode_prompt([{"role": "user", "content": example.question}]) for example in examples]
    engine = make_engine(
        "torch", model, stop_token_ids=chat.stop_token_ids, max_length=max(map(len, prompts)) + MAX_TOKENS
    )
    groups = engine.generate(prompts, group_size=samples, max_tokens=MAX_TOKENS, seeds=list(range(len(prompts))))
    asked = [example for example in examples for _ in range(samples)]
    texts = [chat.decode(completion.token_ids) for group in groups for completion in group]
    return sum(map(reward_of, FormJudge().judge(asked, texts))) / len(asked)


@cache
def start() -> float:
    """Mean reward before training, on the questions that are trained on."""
    return mean_reward(DEMO_MODEL, HARMLESS, samples=4)


def main(config: Config) -> None:
    unknown = set(config.methods) - set(METHODS)
    if unknown:
        raise UserError(f"no such method: {sorted(unknown)}; there are {list(METHODS)}")
    print(f"start {start():.3f}, held out {mean_reward(DEMO_MODEL, HELD_OUT, samples=4):.3f}\n")
    print("| method | seed | end | share of the gain | held out | KL | steps to half | CPU-s |")
    print("|---|---|---|---|---|---|---|---|")
    curves: dict[str, list[Curve]] = {}
    for method in config.methods:
        for seed in config.seeds:
            curve = train((*METHODS[method], *config.options.split()), seed)
            curves.setdefault(method, []).append(curve)
            kl = curve.rows[-1].get("kl", float("nan"))
            print(
                f"| {method} | {seed} | {curve.end:.2f} | {curve.share:.2f} | {curve.held_out:.2f} | {kl:.2f} "
                f"| {curve.steps_to_half} | {curve.cpu_seconds:.0f} |", flush=True,
            )  # fmt: skip
    if config.svg:
        draw(curves, Path(config.svg))


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """One panel a method: a thin line a seed, their mean, and what half of the possible gain is."""
    plt = pyplot()
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kaja", "font.family": "sans-serif", "font.size": 9})
    figure, axes = plt.subplots(1, len(curves), figsize=(2.1 * len(curves), 2.3), sharey=True, squeeze=False)
    for axis, (method, runs) in zip(axes.flat, curves.items(), strict=True):
        steps = range(1, len(runs[0].rows) + 1)
        axis.axhline(start(), color="#888888", linewidth=0.8)
        axis.axhline((1 + start()) / 2, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
        for curve in runs:
            axis.plot(steps, curve.rewards, color="#3b6fb6", alpha=0.35, linewidth=0.9)
        means = [sum(rewards) / len(runs) for rewards in zip(*(curve.rewards for curve in runs), strict=True)]
        axis.plot(steps, means, color="#1f4e8c", linewidth=2)
        axis.set(title=method, xlabel="step", ylim=(0, 1.02))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("reward")
    axes[0, 0].text(len(steps), start() - 0.02, "start", ha="right", va="top", color="#666666", fontsize=8)
    axes[0, 0].text(len(steps), (1 + start()) / 2 - 0.02, "half of the gain", ha="right", va="top",
                    color="#666666", fontsize=8)  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run(main, Config))
