"""train_grpo.py as users launch it: ranks and kills do not matter, failed verdicts stay out, errors are one line."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import checkpoints_of, command, kill_after, make_model_folder, metrics_of, run_script
from judge_fixtures import make_judge_folder
from safetensors.torch import load_file

import train_grpo
from kaja.batching import pack
from kaja.checkpoint import folder_fingerprint
from kaja.data import Example
from kaja.demo_judge import RuleJudge
from kaja.engine import Completion, EngineFailed, TorchEngine
from kaja.errors import UserError
from kaja.reward import SERVER_GONE, Verdict

OPTIONS = (
    "--engine", "torch", "--judge-model", "rule", "--prompts-per-step", 10, "--group-size", 4,
    "--max-completion-tokens", 16, "--learning-rate", 1e-3,
)  # fmt: skip


def grpo(model: Path, data: Path, output: Path, *options: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    paths = ("--model", model, "--data", data, "--output-dir", output)
    return run_script("train_grpo.py", *paths, *OPTIONS, *options, ranks=ranks)


def samples_of(folder: Path, step: int) -> list[dict[str, object]]:
    lines = (folder / "samples" / f"step_{step:04d}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> Path:
    output = tmp_path_factory.mktemp("grpo") / "run"
    result = grpo(model_folder, data_file, output)
    assert result.returncode == 0, result.stderr
    return output


def test_the_metrics_are_those_of_the_samples(finished: Path) -> None:
    for row in metrics_of(finished):
        samples = samples_of(finished, int(row["step"]))
        assert len(samples) == 40
        scores = [sample["score"] / 5 for sample in samples]
        assert row["reward"] == pytest.approx(sum(scores) / 40)
        safety = [sample["score"] / 5 for sample in samples if sample["stream"] == "safety"]
        assert row["reward/safety"] == pytest.approx(sum(safety) / len(safety))
        assert row["completion_length"] == sum(sample["length"] for sample in samples) / 40
        assert row["truncated"] == sum(sample["finish_reason"] == "length" for sample in samples) / 40


def test_advantages_are_those_of_the_groups(finished: Path) -> None:
    samples = samples_of(finished, 1)
    spread = 0
    for start in range(0, 40, 4):
        group = samples[start:start + 4]
        assert len({sample["id"] for sample in group}) == 1
        scores = [sample["score"] / 5 for sample in group]
        mean = sum(scores) / 4
        std = math.sqrt(sum((score - mean) ** 2 for score in scores) / 3)
        expected = [(score - mean) / (std + 1e-4) if std else 0.0 for score in scores]
        assert [sample["advantage"] for sample in group] == pytest.approx(expected)
        spread += std > 0
    assert spread >= 2
    assert metrics_of(finished)[0]["groups_without_spread"] == pytest.approx(1 - spread / 10)


def test_on_policy_the_ratio_is_one_and_the_engine_in_sync(finished: Path) -> None:
    rows = metrics_of(finished)
    assert rows[0]["kl"] == 0.0  # the policy is still the reference
    assert rows[-1]["kl"] > 0.0
    for row in rows:
        assert row["ratio"] == 1.0 and row["clip_low"] == row["clip_high"] == 0.0
        assert row["correction"] == pytest.approx(1.0, abs=1e-5) and row["correction_max"] < 1.0001
        assert row["effective_sample_size"] == pytest.approx(1.0, abs=1e-5)
        assert row["sync_error"] < 1e-6
        assert 0 < row["entropy"] < math.log(400)


def test_later_updates_on_the_same_completions_move_the_ratio(
    tmp_path: Path, model_folder: Path, data_file: Path
) -> None:
    options = ("--updates-per-step", 3, "--max-steps", 2, "--temperature", 0.7, "--kl-coef", 0)
    assert grpo(model_folder, data_file, tmp_path / "run", *options).returncode == 0
    rows = metrics_of(tmp_path / "run")
    assert len(rows) == 2 and "kl" not in rows[0]
    assert rows[0]["ratio_max"] > 1.001
    assert rows[0]["correction"] == pytest.approx(1.0, abs=1e-5)  # at temperature 0.7 too


def failing_judge(fails: Callable[[int], bool], *, concurrent: bool) -> type:
    """The rule judge, but without a verdict for some places of what it is asked."""

    class Failing(RuleJudge):
        def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
            verdicts = super().judge(examples, completions)
            return [Verdict(None, cause="gone") if fails(place) else v for place, v in enumerate(verdicts)]

    Failing.concurrent = concurrent
    return Failing


def test_a_judge_that_gives_no_verdict_at_all_is_one_line(
    tmp_path: Path, model_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kaja.judging.RuleJudge", failing_judge(lambda place: True, concurrent=False))
    result = grpo(model_folder, data_file, tmp_path / "run", "--max-judge-failures", 1)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: the judge gave no verdict at all (of the first completion: gone)" in result.stderr


def test_a_resumed_run_may_have_another_limit_but_not_another_loss(
    tmp_path: Path, model_folder: Path, data_file: Path
) -> None:
    options = ("--max-steps", 2, "--save-every", 1)
    assert grpo(model_folder, data_file, tmp_path / "run", *options).returncode == 0
    again = (*options, "--resume", "auto")
    assert grpo(model_folder, data_file, tmp_path / "run", *again, "--max-kl", 9).returncode == 0
    result = grpo(model_folder, data_file, tmp_path / "run", *again, "--clip-low", 0.1)
    assert result.returncode == 2 and "config.json: clip_low was 0.2 and is now 0.1" in result.stderr


def test_a_failed_verdict_takes_no_part(
    tmp_path: Path, model_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that fails on every third completion: no advantage, no reward, and counted."""
    monkeypatch.setattr("kaja.judging.RuleJudge", failing_judge(lambda place: place % 3 == 0, concurrent=False))
    options = ("--max-steps", 1, "--max-judge-failures", 0.5)
    assert grpo(model_folder, data_file, tmp_path / "run", *options).returncode == 0
    samples = samples_of(tmp_path / "run", 1)
    assert [s["score"] is None for s in samples] == [i % 3 == 0 for i in range(40)]
    assert all(sample["advantage"] == 0.0 for sample in samples if sample["score"] is None)
    scores = [sample["score"] / 5 for sample in samples if sample["score"] is not None]
    row = metrics_of(tmp_path / "run")[0]
    assert row["reward"] == pytest.approx(sum(scores) / len(scores))
    assert row["judge_failures"] == pytest.approx(14 / 40)


def test_a_sync_that_does_not_arrive_stops_the_run(
    tmp_path: Path, model_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kaja.engine.TorchEngine.load_weights", lambda self, tensors: [None for _ in tensors])
    result = grpo(model_folder, data_file, tmp_path / "run")
    assert result.returncode == 2
    assert "the engine does not hold the trainer's weights" in result.stderr


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_judge_that_is_gone_ends_the_run_with_a_checkpoint_to_go_on_from(
    tmp_path: Path, model_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch, concurrent: bool
) -> None:
    """Asked again after each pause; the resumed run, with the judge back, ends like one that was never interrupted."""
    options = ("--max-steps", 4, "--canary-every", 0)
    assert grpo(model_folder, data_file, tmp_path / "whole", *options).returncode == 0
    asked = []

    class Gone(RuleJudge):
        def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
            asked.append(len(examples))
            verdicts = super().judge(examples, completions)
            # The third step's 40 completions come after 80; of them every other one has no verdict, ever again.
            return [
                Verdict(None, SERVER_GONE) if sum(asked) > 80 and len(text) % 2 else verdict
                for text, verdict in zip(completions, verdicts, strict=True)
            ]

    Gone.concurrent = concurrent
    with monkeypatch.context() as patched:
        patched.setattr("kaja.judging.RuleJudge", Gone)
        patched.setattr("kaja.judging.PAUSES", (0.01, 0.02))
        result = grpo(model_folder, data_file, tmp_path / "run", *options)
    assert result.returncode == 2, result.stderr
    told = r"warning: judge: (\d+) of 40 verdicts failed \(server gone \1\), above 5%; asking again in ([\d.]+) s"
    pauses = re.findall(told, result.stderr)
    assert [seconds for _, seconds in pauses] == ["0.01", "0.02"]
    failed = int(pauses[0][0])
    assert f"error: step 3: judge: {failed} of 40 verdicts failed (server gone {failed}), above 5%" in result.stderr
    assert "saved before it; go on with --resume auto" in result.stderr
    assert sum(asked) == 120 + 2 * failed  # what had a verdict was not asked again
    assert checkpoints_of(tmp_path / "run") == ["step_000002"]

    again = grpo(model_folder, data_file, tmp_path / "run", *options, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    mine, theirs = (load_file(tmp_path / run / "hf/model.safetensors") for run in ("run", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_sigterm_ends_the_pause_for_a_judge_that_is_gone_and_the_run_saves(
    tmp_path: Path, model_folder: Path, data_file: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Gone(RuleJudge):
        concurrent = False

        def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
            asked.append(len(examples))
            if len(asked) < 3:  # the first step's completions and the canaries
                return super().judge(examples, completions)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            return [Verdict(None, SERVER_GONE) for _ in examples]

    with monkeypatch.context() as patched:
        patched.setattr("kaja.judging.RuleJudge", Gone)
        patched.setattr("kaja.judging.PAUSES", (30.0,))
        result = grpo(model_folder, data_file, tmp_path / "run")
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert "asking again in 30 s" in result.stderr and "SIGTERM: saved after step 1 of 5" in result.stderr
    assert grpo(model_folder, data_file, tmp_path / "run", "--resume", "auto").returncode == 0
    assert metrics_of(tmp_path / "run") == metrics_of(finished)


def test_a_cache_that_cannot_be_used_ends_the_run_with_a_checkpoint(
    tmp_path: Path, model_folder: Path, data_file: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Full(RuleJudge):
        concurrent = True

        def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
            asked.append(len(examples))
            if len(asked) == 15:  # 10 groups of the first step, the canaries, and one of the second step's
                raise UserError("verdicts.sqlite: no room on its disk")
            return super().judge(examples, completions)

    with monkeypatch.context() as patched:
        patched.setattr("kaja.judging.RuleJudge", Full)
        result = grpo(model_folder, data_file, tmp_path / "run")
    assert result.returncode == 2
    assert "error: step 2: rank 0: verdicts.sqlite: no room on its disk; saved before it; go on" in result.stderr
    assert grpo(model_folder, data_file, tmp_path / "run", "--resume", "auto").returncode == 0
    assert metrics_of(tmp_path / "run") == metrics_of(finished)


def test_questions_without_a_reference_answer_are_trained_on_with_a_warning(
    tmp_path: Path, model_folder: Path, data_file: Path
) -> None:
    lines = data_file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([json.dumps(rows[0] | {"answer": ""}), *lines[1:]]), encoding="utf-8")
    result = grpo(model_folder, data, tmp_path / "run", "--max-steps", 1, "--canary-every", 0)
    assert result.returncode == 0, result.stderr
    assert f"warning: 1 of 50 questions have no reference answer, and the rubric will show the judge an empty one: " \
        f"{rows[0]['source']} {rows[0]['id']}\n" in result.stderr


def test_canaries_are_asked_every_so_many_steps(tmp_path: Path, model_folder: Path, data_file: Path) -> None:
    options = ("--max-steps", 3, "--canary-every", 2)
    assert grpo(model_folder, data_file, tmp_path / "run", *options).returncode == 0
    rows = metrics_of(tmp_path / "run")
    assert [row.get("canary/agreement") for row in rows] == [1.0, None, 1.0]
    assert sorted(path.name for path in (tmp_path / "run/samples").glob("canaries*")) == [
        "canaries_0001.json", "canaries_0003.json"
    ]  # fmt: skip
    assert rows[0]["judge/share_at_5"] == rows[0]["judge/score_5"]
    assert sum(rows[0][f"judge/score_{points}"] for points in range(6)) == pytest.approx(1.0)


@pytest.mark.parametrize("case", ["plain", "truncated dropped", "failed verdicts", "resample"])
def test_a_prompt_computed_once_trains_like_one_for_each_completion(
    tmp_path: Path, model_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Reference, old and new log-probs of whole groups and of what is left of them, against streams of one each."""
    options: tuple[object, ...] = ("--max-steps", 1, "--updates-per-step", 2)
    if case == "truncated dropped":
        options += ("--max-completion-tokens", 60, "--truncated", "drop")
    if case == "failed verdicts":
        monkeypatch.setattr("kaja.judging.RuleJudge", failing_judge(lambda place: place % 3 == 0, concurrent=False))
        options += ("--max-judge-failures", 0.5)
    if case == "resample":
        options += ("--resample", 3)
    assert grpo(model_folder, data_file, tmp_path / "shared", *options).returncode == 0

    def one_by_one(kept: list[tuple[train_grpo.Rollout, float]], *rest: object) -> list[train_grpo.MicroBatch]:
        made = []
        for rollout, advantage in kept:
            stream = pack([rollout.sequence()])
            sampled = torch.tensor([0.0] * (len(rollout.prompt_ids) - 1) + rollout.completion.log_probs)
            made.append(train_grpo.MicroBatch(stream, torch.full((len(stream.labels),), advantage), sampled))
        return made

    monkeypatch.setattr(train_grpo, "micro_batches", one_by_one)
    assert grpo(model_folder, data_file, tmp_path / "alone", *options).returncode == 0
    (shared,), (alone,) = (metrics_of(tmp_path / run) for run in ("shared", "alone"))
    assert shared["ratio_max"] > 1.0001  # the second update's
    for metrics in (shared, alone):
        metrics.pop("sync_error")
    assert shared == pytest.approx(alone, rel=1e-5, abs=1e-6)
    mine, theirs = (load_file(tmp_path / run / "hf/model.safetensors") for run in ("shared", "alone"))
    for name, tensor in theirs.items():  # a hundredth of Adam's first step, 1e-3 for each number
        assert (mine[name] - tensor).norm() < 1e-5 * tensor.numel() ** 0.5, name


@pytest.mark.gloo
@pytest.mark.slow
def test_two_ranks_sample_and_learn_the_same(
    tmp_path: Path, model_folder: Path, data_file: Path, finished: Path
) -> None:
    result = grpo(model_folder, data_file, tmp_path / "run", "--max-steps", 2, ranks=2)
    assert result.returncode == 0, result.stderr
    assert samples_of(tmp_path / "run", 1) == samples_of(finished, 1)
    one, two = metrics_of(finished)[0], metrics_of(tmp_path / "run")[0]
    for name in ("reward", "entropy", "grad_norm", "completion_length"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.gloo)])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, model_folder: Path, data_file: Path, ranks: int
) -> None:
    options = ("--max-steps", 15, "--save-every", 2)
    assert grpo(model_folder, data_file, tmp_path / "whole", *options, ranks=ranks).returncode == 0
    paths = ("--model", model_folder, "--data", data_file, "--output-dir", tmp_path / "killed")
    kill_after(tmp_path / "killed", 7, command("train_grpo.py", *paths, *OPTIONS, *options, ranks=ranks))
    assert checkpoints_of(tmp_path / "killed")  # there is one to go on from
    again = grpo(model_folder, data_file, tmp_path / "killed", *options, "--resume", "auto", ranks=ranks)
    assert again.returncode == 0, again.stderr
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    mine, theirs = (load_file(tmp_path / run / "hf/model.safetensors") for run in ("killed", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert samples_of(tmp_path / "killed", 15) == samples_of(tmp_path / "whole", 15)


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["digit", "expected"])
def test_a_language_model_judges(tmp_path: Path, model_folder: Path, data_file: Path, reading: str) -> None:
    """The recipe's kind of judge, but a random model in this process. What it said is remembered."""
    judge = make_model_folder(tmp_path / "judge", seed=3, max_position_embeddings=2048)
    options = ("--judge-model", judge, "--judge-reading", reading, "--max-steps", 1, "--canary-every", 0)
    shared = ("--judge-cache", tmp_path / "verdicts.sqlite")
    for run in ("first", "second"):
        result = grpo(model_folder, data_file, tmp_path / run, *options, *shared)
        assert result.returncode == 0, result.stderr
        assert ("judge_reading expected with advantage_scale group" in result.stderr) == (reading == "expected")
    samples = samples_of(tmp_path / "first", 1)
    assert all(sample["judge"].startswith(f"{judge} ") for sample in samples)
    assert all(sample["judge"].endswith(f" slides-1 {reading} votes1") for sample in samples)
    scores = [sample["score"] for sample in samples]
    assert all(score in range(6) for score in scores) == (reading == "digit")
    first, second = metrics_of(tmp_path / "first")[0], metrics_of(tmp_path / "second")[0]
    assert first["judge_failures"] == 0 and first["judge/remembered"] < 0.5
    assert second["judge/remembered"] == 1 and "judge/tries" not in second
    assert samples == samples_of(tmp_path / "second", 1)
    (digest,) = {sample["judge"].split()[1] for sample in samples}
    assert digest == folder_fingerprint(judge)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--group-size", "1"), "group_size 1: must be at least 2"),
        (("--temperature", "0"), "temperature 0.0: must be above 0"),
        (("--judge-model", "/none"), "error: /none: no such model folder"),
        (("--max-completion-tokens", "500"), "remove the 50 questions that are too long: test 0, test 1, test 2,"),
        (("--aggregation", "mean"), "mean"),
        (("--clip-low", "-1"), "clip_low -1.0: must be at least 0"),
        (("--kl-coef", "0", "--max-kl", "1"), "kl_coef 0: without it there is no reference"),
        (("--top-p", "1.5"), "top_p 1.5: must be at most 1.0"),
        (("--stream-weights", "safety"), "stream_weights safety: not NAME=NUMBER"),
        (("--stream-weights", "safety=0"), "stream_weights safety=0: a weight must be above 0"),
        (("--stream-weights", "borderline=1"), "stream_weights borderline=1: the data has no question of this stream"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, model_folder: Path, data_file: Path, options: tuple[str, ...], expected: str
) -> None:
    result = grpo(model_folder, data_file, tmp_path / "run", *options)
    assert result.returncode == 2
    assert expected in result.stderr and "Traceback" not in result.stderr


def test_the_policy_can_become_the_reference_and_a_resumed_run_knows_it(
    tmp_path: Path, model_folder: Path, data_file: Path, finished: Path
) -> None:
    options = ("--reset-reference-every", 2, "--max-steps", 5, "--save-every", 1)
    assert grpo(model_folder, data_file, tmp_path / "run", *options).returncode == 0
    rows = metrics_of(tmp_path / "run")
    # Just reset (and at the start), the reference is the policy.
    assert [row["kl"] == 0.0 for row in rows] == [True, False, True, False, True]
    shutil.rmtree(tmp_path / "run/checkpoints/step_000005")  # the reference of step 4 is the policy after step 2
    assert grpo(model_folder, data_file, tmp_path / "run", *options, "--resume", "auto").returncode == 0
    assert metrics_of(tmp_path / "run") == rows


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[train_grpo.Rollout]:
    """The rollouts that enter the loss."""
    seen: list[train_grpo.Rollout] = []
    original = train_grpo.micro_batches

    def spy(pairs: list[tuple[train_grpo.Rollout, float]], *rest: object) -> list[train_grpo.MicroBatch]:
        seen.extend(rollout for rollout, _ in pairs)
        return original(pairs, *rest)

    monkeypatch.setattr(train_grpo, "micro_batches", spy)
    return seen


def groups_of(samples: list[dict[str, object]]) -> list[list[dict[str, object]]]:
    return [samples[start:start + 4] for start in range(0, len(samples), 4)]


def has_spread(group: list[dict[str, object]]) -> bool:
    return len({sample["score"] for sample in group}) > 1


def test_truncated_completions_can_be_dropped(
    tmp_path: Path, model_folder: Path, data_file: Path, trained_on: list[train_grpo.Rollout]
) -> None:
    options = ("--max-steps", 1, "--max-completion-tokens", 60, "--truncated", "drop")
    assert grpo(model_folder, data_file, tmp_path / "run", *options).returncode == 0
    stopped = [sample for sample in samples_of(tmp_path / "run", 1) if sample["finish_reason"] == "stop"]
    assert 0 < len(trained_on) == len(stopped) < 40


def test_long_completions_can_be_made_to_pay(tmp_path: Path, model_folder: Path, data_file: Path) -> None:
    """DAPO, eq. 13, with 60 tokens of which the last 12 are the buffer: a cut completion loses 1."""
    options = ("--max-steps", 1, "--max-completion-tokens", 60, "--truncated", "penalise")
    assert grpo(model_folder, data_file, tmp_path / "run", *options).returncode == 0
    samples = samples_of(tmp_path / "run", 1)
    assert metrics_of(tmp_path / "run")[0]["reward"] == pytest.approx(sum(s["score"] / 5 for s in samples) / 40)
    paid = 0
    for group in groups_of(samples):
        rewards = [s["score"] / 5 - min(1.0, max(0.0, (s["length"] - 48) / 12)) for s in group]
        mean = sum(rewards) / 4
        std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 3)
        expected = [(reward - mean) / (std + 1e-4) if std > 1e-6 else 0.0 for reward in rewards]
        assert [s["advantage"] for s in group] == pytest.approx(expected, abs=1e-5)
        paid += any(s["length"] > 48 for s in group)
    assert paid


def test_groups_without_spread_give_way_to_fresh_questions(
    tmp_path: Path, model_folder: Path, data_file: Path, finished: Path, trained_on: list[train_grpo.Rollout]
) -> None:
    assert grpo(model_folder, data_file, tmp_path / "run", "--max-steps", 1, "--resample", 3).returncode == 0
    before, after = groups_of(samples_of(finished, 1)), groups_of(samples_of(tmp_path / "run", 1))
    first, row = metrics_of(finished)[0], metrics_of(tmp_path / "run")[0]
    assert 0 < sum(map(has_spread, before)) < 10
    for old, new in zip(before, after, strict=True):
        assert old == new or not has_spread(old) and has_spread(new)
    assert sum(map(has_spread, after)) > sum(map(has_spread, before))
    assert len({group[0]["id"] for group in after}) == 10
    assert len(trained_on) == 4 * sum(map(has_spread, after))
    # What is reported is about the questions that the step began with.
    assert row["reward"] == first["reward"] and row["groups_without_spread"] == first["groups_without_spread"]
    assert row["groups_without_spread_after_resampling"] == pytest.approx(1 - sum(map(has_spread, after)) / 10)


def test_failures_of_a_few_fresh_questions_are_measured_by_the_whole_step(
    tmp_path: Path, model_folder: Path, data_file: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may last, so a run that stopped because of them would stop there again each time it is resumed."""
    drawn: list[int] = []

    class Unclear(failing_judge(lambda place: drawn != [], concurrent=False)):  # type: ignore[misc]
        def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
            verdicts = super().judge(examples, completions)
            drawn.append(len(examples))
            return verdicts

    monkeypatch.setattr("kaja.judging.RuleJudge", Unclear)
    options = ("--max-steps", 1, "--resample", 1, "--canary-every", 0, "--max-judge-failures", 0.9)
    result = grpo(model_folder, data_file, tmp_path / "run", *options)
    assert result.returncode == 0, result.stderr
    assert drawn[0] == 40 and 0 < drawn[1] < 36  # so few that all of them may fail
    assert samples_of(tmp_path / "run", 1) == samples_of(finished, 1)  # nothing could take a place


def test_streams_are_mixed_by_weight(tmp_path: Path, model_folder: Path, data_file: Path) -> None:
    options = ("--max-steps", 3, "--stream-weights", "safety=4", "helpfulness=1")
    assert grpo(model_folder, data_file, tmp_path / "run", *options).returncode == 0
    ids = []
    for step in (1, 2, 3):
        groups = groups_of(samples_of(tmp_path / "run", step))
        assert sum(group[0]["stream"] == "safety" for group in groups) == 8
        ids += [group[0]["id"] for group in groups if group[0]["stream"] == "safety"]
    assert len(set(ids)) == 24  # of 25: no question comes again before all have come


def test_an_engine_that_fails_leaves_a_checkpoint_to_go_on_from(
    tmp_path: Path, model_folder: Path, data_file: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = TorchEngine.generate, []

    def failing(self: TorchEngine, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise EngineFailed("no answer within 5 s")
        return generate(self, *arguments, **options)

    monkeypatch.setattr(TorchEngine, "generate", failing)
    result = grpo(model_folder, data_file, tmp_path / "run")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "step 3: rank 0: no answer within 5 s; saved before it; go on with --resume auto" in result.stderr
    assert grpo(model_folder, data_file, tmp_path / "run", "--resume", "auto").returncode == 0
    assert metrics_of(tmp_path / "run") == metrics_of(finished)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
def test_real_vllm_samples_and_takes_over_the_weights(tmp_path: Path, data_file: Path) -> None:
    folder = make_model_folder(tmp_path / "model", head_dim=32)  # the smallest that vLLM's CPU kernels know
    options = ("--engine", "vllm", "--max-steps", 3, "--temperature", 0.7, "--learning-rate", 1e-2)
    result = grpo(folder, data_file, tmp_path / "run", *options)
    assert result.returncode == 0, result.stderr
    rows = metrics_of(tmp_path / "run")
    assert rows[-1]["kl"] > 1e-3  # the policy has moved far, and the engine with it
    for row in rows:
        assert row["sync_error"] < 1e-5
        assert row["correction"] == pytest.approx(1.0, abs=1e-3)
        assert row["effective_sample_size"] > 0.999
    samples = samples_of(tmp_path / "run", 1)
    assert len({sample["completion"] for sample in samples}) > 30


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
def test_real_vllm_on_two_ranks_goes_on_with_the_same_prompts_and_seeds(tmp_path: Path, data_file: Path) -> None:
    """What is sampled does not depend on the number of ranks, nor on an interruption."""
    folder = make_model_folder(tmp_path / "model", head_dim=32)
    options = ("--engine", "vllm", "--max-steps", 3, "--save-every", 1)
    for name, ranks in (("one", 1), ("two", 2)):
        result = grpo(folder, data_file, tmp_path / name, *options, ranks=ranks)
        assert result.returncode == 0, result.stderr
    assert samples_of(tmp_path / "one", 1) == samples_of(tmp_path / "two", 1)
    assert all(row["sync_error"] < 1e-5 for row in metrics_of(tmp_path / "two"))
    whole = samples_of(tmp_path / "one", 3)
    shutil.rmtree(tmp_path / "one/checkpoints/step_000003")
    assert grpo(folder, data_file, tmp_path / "one", *options, "--resume", "auto").returncode == 0
    assert [sample["id"] for sample in samples_of(tmp_path / "one", 3)] == [sample["id"] for sample in whole]
    assert [sample["completion"] for sample in samples_of(tmp_path / "one", 3)] == [s["completion"] for s in whole]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.gloo
@pytest.mark.xdist_group("vllm")
def test_two_ranks_share_a_judge_whose_server_the_run_starts_and_ends(tmp_path: Path, data_file: Path) -> None:
    policy, judge = make_model_folder(tmp_path / "model", head_dim=32), make_judge_folder(tmp_path / "judge")
    options = ("--engine", "vllm", "--judge-model", judge, "--max-steps", 2)
    result = grpo(policy, data_file, tmp_path / "run", *options, ranks=2)
    assert result.returncode == 0, result.stderr
    samples = samples_of(tmp_path / "run", 1)
    assert all(sample["score"] in range(6) and sample["judge_said"] in tuple("012345") for sample in samples)
    identity = f"{judge} {folder_fingerprint(judge)} slides-1 digit votes1"
    assert {sample["judge"] for sample in samples} == {identity}
    first, second = metrics_of(tmp_path / "run")
    assert first["judge_failures"] == second["judge_failures"] == 0
    asked = len({(sample["id"], sample["completion"]) for sample in samples})
    assert first["judge/remembered"] == pytest.approx(1 - asked / len(samples))
    assert first["judge/prompt_tokens"] > 500 * asked and first["judge/prefix_cached"] > 0.5
    assert first["canary/failures"] == 0 and "canary/agreement" not in second
    # One server, asked by both ranks, and nothing of it is left.
    log = (tmp_path / "run/judge_server.log").read_text(encoding="utf-8")
    assert log.count(": life ") == 1 and "ended, as it was told to" in log
    assert subprocess.run(["pgrep", "-f", f"api_server.*{judge}"], capture_output=True).returncode == 1


def test_without_vllm_the_run_ends_before_weights_are_loaded(
    tmp_path: Path, model_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kaja.engine.find_spec", lambda name: None)
    monkeypatch.delattr(train_grpo, "load_model")
    result = grpo(model_folder, data_file, tmp_path / "run", "--engine", "vllm")
    assert result.returncode == 2
    assert "engine 'vllm' needs vLLM" in result.stderr and "make vllm" in result.stderr


def test_a_step_that_keeps_nothing_falls_back_on_a_judged_completion() -> None:
    example = Example("1", "test", "safety", "質問")
    completion = Completion([5], [-1.0], "length")
    failed, judged = (
        train_grpo.Rollout(example, [1], completion, "", verdict)
        for verdict in (Verdict(None, cause="gone"), Verdict(3.0))
    )
    config = train_grpo.Config("m", ("d",), "o", truncated="drop")
    rewards = torch.tensor([[failed.reward, judged.reward]])
    assert train_grpo.keep([failed, judged], rewards, [0.0, 0.0], config) == [(judged, 0.0)]
