"""One completion with all that is known of it, and its way into packed micro-batches."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kaja.batching import Batch, filler, pack, pack_groups, plan_streams
from kaja.chat import TokenSequence
from kaja.data import Example
from kaja.distributed import Ranks
from kaja.engine import Completion
from kaja.reward import Judge, Verdict, reward_of


@dataclass(frozen=True)
class Rollout:
    """A prompt, one completion of it, and the judge's verdict."""

    example: Example
    prompt_ids: list[int]
    completion: Completion
    text: str
    verdict: Verdict

    @property
    def reward(self) -> float:
        return reward_of(self.verdict)

    @property
    def length(self) -> int:
        return len(self.completion.token_ids)

    @property
    def positions(self) -> int:
        """That prompt and completion take of a stream: the last token only is a label."""
        return len(self.prompt_ids) + self.length - 1

    def sequence(self) -> TokenSequence:
        prompt, completion = self.prompt_ids, self.completion.token_ids
        return TokenSequence(prompt + completion, [False] * len(prompt) + [True] * len(completion))

    def record(self, advantage: float) -> dict[str, Any]:
        """What a person wants to see of it, as a row of samples/step_XXXX.jsonl."""
        return {
            "id": self.example.id, "stream": self.example.stream, "question": self.example.question,
            "completion": self.text, "score": self.verdict.score, "cause": self.verdict.cause,
            "judge_said": self.verdict.text, "advantage": advantage, "prompt_length": len(self.prompt_ids),
            "length": self.length, "finish_reason": self.completion.finish_reason,
        }  # fmt: skip


class Judging:
    """Verdicts of groups of completions, asked for while other groups are still being generated.

    Give `ask` to Engine.generate as on_group, if the judge can work meanwhile; `verdicts` waits for what is
    under way and asks for the rest at once. Each group has a thread that waits for its verdicts; how many
    requests are under way at a time is the judge's business. A context manager: an error leaves no thread behind.
    Only Ctrl-C does not wait for the threads, as a server that hangs would hold it up for minutes: they end when
    the judge is closed.
    """

    def __init__(self, judge: Judge, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]) -> None:
        self.judge, self.examples, self.decode = judge, examples, decode
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(examples)))
        self._asked: dict[int, Future[list[Verdict]]] = {}

    def ask(self, place: int, group: list[Completion]) -> None:
        texts = [self.decode(completion.token_ids) for completion in group]
        self._asked[place] = self._threads.submit(self.judge.judge, [self.examples[place]] * len(group), texts)

    def verdicts(self, groups: list[list[Completion]]) -> list[list[Verdict]]:
        """Of each completion of each example, in order."""
        waiting = [place for place in range(len(groups)) if place not in self._asked]
        asked = [self.examples[place] for place in waiting for _ in groups[place]]
        texts = [self.decode(completion.token_ids) for place in waiting for completion in groups[place]]
        rest = iter(self.judge.judge(asked, texts) if waiting else [])
        return [
            self._asked[place].result() if place in self._asked else [next(rest) for _ in group]
            for place, group in enumerate(groups)
        ]

    def __enter__(self) -> "Judging":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._threads.shutdown(wait=kind is None or issubclass(kind, Exception), cancel_futures=True)


@dataclass
class MicroBatch:
    """A packed stream of rollouts; every (T,) tensor is about labels[t]."""

    stream: Batch
    advantages: Tensor
    sampling_log_probs: Tensor
    old_log_probs: Tensor | None = None  # None: the policy has not moved since it sampled
    ref_log_probs: Tensor | None = None


def micro_batches(
    judged: Sequence[tuple[Rollout, float]], max_tokens: int, width: int, ranks: Ranks
) -> list[MicroBatch]:
    """This rank's share of a step's (rollout, advantage) pairs, in streams with room for `max_tokens`.

    The prompt of neighbours is computed once for all of them (pack_groups), but takes its room for each: all of them
    keep its keys. So no stream needs more memory than without sharing. Neighbours are in one stream, unless they have
    more than a stream's room or a rank's share of all: few groups are cut, rather than that ranks have nothing to do.
    """
    share = -(-sum(rollout.positions for rollout, _ in judged) // ranks.world_size)
    groups = same_prompt(judged, min(max_tokens, share))
    lengths = [sum(rollout.positions for rollout, _ in group) for group in groups]
    computed = [
        length - (len(group) - 1) * (len(group[0][0].prompt_ids) - 1) for length, group in zip(lengths, groups)
    ]
    plan = plan_streams(lengths, ranks.world_size, max_tokens, width, computed)
    made = []
    for places in plan[ranks.rank]:
        chosen = [groups[place] for place in places]
        if chosen:
            stream = pack_groups([
                (group[0][0].prompt_ids, [rollout.completion.token_ids for rollout, _ in group]) for group in chosen
            ])  # fmt: skip
        else:
            stream = pack([filler([rollout.sequence() for rollout, _ in judged])])
        stream = stream.to(ranks.device)
        pairs = [pair for group in chosen for pair in group]
        advantages = [advantage for rollout, advantage in pairs for _ in range(rollout.length)]
        sampled = [value for rollout, _ in pairs for value in rollout.completion.log_probs]
        made.append(MicroBatch(stream, of_trained(stream, advantages), of_trained(stream, sampled)))
    return made


def same_prompt(judged: Sequence[tuple[Rollout, float]], max_tokens: int) -> list[list[tuple[Rollout, float]]]:
    """Runs of pairs with the same prompt, of at most `max_tokens` (or one pair) with the prompt counted for each."""
    runs = []
    for _, neighbours in itertools.groupby(judged, key=lambda pair: pair[0].prompt_ids):
        run: list[tuple[Rollout, float]] = []
        for pair in neighbours:
            if run and sum(rollout.positions for rollout, _ in [*run, pair]) > max_tokens:
                runs.append(run)
                run = []
            run.append(pair)
        runs.append(run)
    return runs


def of_trained(stream: Batch, values: Sequence[float]) -> Tensor:
    """A value for each trained position, in order -> (T,), 0 elsewhere."""
    spread = torch.zeros(len(stream.labels), device=stream.labels.device)
    spread[stream.completion_mask] = torch.tensor(values, device=spread.device)
    return spread


def throughput(rollouts: Sequence[Rollout], seconds: dict[str, float]) -> dict[str, float]:
    """Tokens per second of the phases, all ranks together: new ones in generation, whole sequences elsewhere.

    A prompt counts for each of its completions, though log_probs and update compute it less often (micro_batches).
    """
    new = sum(rollout.length for rollout in rollouts)
    whole = new + sum(len(rollout.prompt_ids) for rollout in rollouts)
    tokens = {"generate": new, "log_probs": whole, "update": whole}
    phases = {phase: seconds.get(f"seconds/{phase}", 0.0) for phase in tokens}
    return {f"tokens_per_second/{phase}": tokens[phase] / phases[phase] for phase in tokens if phases[phase] > 0}


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over a step's completions; rewards also per stream of questions. Failed verdicts are left out."""
    rewards = {"reward": [rollout.reward for rollout in rollouts]}
    for rollout in rollouts:
        rewards.setdefault(f"reward/{rollout.example.stream}", []).append(rollout.reward)
    means = {name: torch.tensor(values, dtype=torch.float64).nanmean().item() for name, values in rewards.items()}
    count = len(rollouts)
    return {
        **{name: mean for name, mean in means.items() if mean == mean},  # a stream may have no verdict at all
        "completion_length": sum(rollout.length for rollout in rollouts) / count,
        "truncated": sum(rollout.completion.finish_reason == "length" for rollout in rollouts) / count,
        "judge_failures": sum(rollout.verdict.score is None for rollout in rollouts) / count,
    }
