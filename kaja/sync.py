"""Weights from the trainer into an engine: the stream is checked, and so is the result.

`WeightCheck` stops a sync that is not the whole state dict. `check_sync` is the canary after it: engine
and trainer must give a fixed probe the same log-probs, whatever may have gone wrong in between.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kaja.errors import UserError
from kaja.model import CausalLM, ModelConfig
from kaja.sampling import PACK_TOKENS, pack, packed_stream

NamedTensors = Iterable[tuple[str, Tensor]]


class Scorer(Protocol):
    """The part of an Engine that the canary needs."""

    def score(self, sequences: list[list[int]]) -> list[list[float]]: ...


class WeightCheck:
    """Lets a stream of (name, tensor) through if it is exactly the model's state dict."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"):
            self.expected = {name: tensor.shape for name, tensor in CausalLM(config).state_dict().items()}
        self.tied = config.tie_word_embeddings
        self.failure = ""  # why the weights are a mixture, if they are

    @contextmanager
    def loading(self, named_tensors: NamedTensors) -> Iterator[NamedTensors]:
        """The checked stream; a stream that fails or stops early leaves `failure` set and raises."""
        seen: set[str] = set()
        self.failure = "the last weight sync did not finish"
        try:
            yield self._checked(named_tensors, seen)
            missing = sorted(self.expected.keys() - seen)
            if missing:
                raise UserError(
                    f"weight sync: {len(missing)} of {len(self.expected)} tensors are missing, the first is "
                    f"{missing[0]}; the engine needs the whole state dict; stream model.state_dict()"
                )
        except UserError as error:
            self.failure = str(error)
            raise
        self.failure = ""

    def _checked(self, named_tensors: NamedTensors, seen: set[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_tensors:
            if name not in self.expected:
                raise UserError(
                    f"weight sync: the engine's model has no {name}; sync a model of the same config.json"
                )
            if tensor.shape != self.expected[name]:
                raise UserError(
                    f"weight sync: {name} is {tuple(tensor.shape)}, the engine's model has "
                    f"{tuple(self.expected[name])}; sync a model of the same config.json"
                )
            if name in seen:
                continue  # lm_head.weight of tied embeddings, sent below
            seen.add(name)
            yield name, tensor
            if self.tied and name == "model.embed_tokens.weight":
                # vLLM keeps a packed copy of a tied head, which goes stale unless it is sent too.
                seen.add("lm_head.weight")
                yield "lm_head.weight", tensor

    def require(self) -> None:
        if self.failure:
            raise RuntimeError(
                f"the engine's weights are incomplete ({self.failure}); sync the whole model first"
            )


@torch.no_grad()
def sequence_log_probs(
    model: CausalLM, sequences: Sequence[Sequence[int]], device: torch.device | str | None = None
) -> list[list[float]]:
    """The trainer's own log-prob of each token after the first, at temperature 1."""
    device = torch.device(device or model.lm_head.weight.device)
    lengths = [len(sequence) - 1 for sequence in sequences]
    scores: list[list[float]] = []
    for run in pack(lengths, PACK_TOKENS):
        chosen = [sequences[index] for index in run if lengths[index]]
        flat: list[float] = []
        if chosen:
            stream = packed_stream([sequence[:-1] for sequence in chosen], device)
            labels = torch.tensor([token for sequence in chosen for token in sequence[1:]], device=device)
            flat = model(*stream, labels=labels)[0].tolist()
        for index in run:
            scores.append(flat[: lengths[index]])
            flat = flat[lengths[index] :]
    return scores


def sync_error(
    engine: Scorer, model: CausalLM, probe: list[list[int]], device: torch.device | str | None = None
) -> float:
    """Mean |log-prob difference| between trainer and engine on the probe.

    In float32 about 2e-7 when in sync, 1e-2 and more after one skipped sync.
    On several ranks every rank must call it with the same probe: a sharded model's forward is collective.
    """
    trainer = np.concatenate(sequence_log_probs(model, probe, device))
    return float(np.abs(trainer - np.concatenate(engine.score(probe))).mean())


def check_sync(
    engine: Scorer,
    model: CausalLM,
    probe: list[list[int]],
    tolerance: float,
    device: torch.device | str | None = None,
) -> float:
    """The canary: UserError unless trainer and engine agree on the probe; returns the difference."""
    error = sync_error(engine, model, probe, device)
    if not error <= tolerance:  # also catches NaN
        raise UserError(
            f"the engine does not hold the trainer's weights: log-probs of the probe differ by {error:.2e} "
            f"on average, at most {tolerance:.2e} is allowed; the weight sync is broken (or the tolerance "
            f"too small for the dtype)"
        )
    return error
