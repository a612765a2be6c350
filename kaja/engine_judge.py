"""A language model as judge inside this process, for machines without vLLM: TorchEngine reads the rubric."""

from collections.abc import Sequence
from typing import Any

import torch

from kaja.chat import Chat
from kaja.checkpoint import load_chat, resolve_model
from kaja.data import Example
from kaja.engine import Engine, make_engine
from kaja.files import read_json
from kaja.reward import Verdict, read_verdict
from kaja.rubric import RUBRIC_VERSION, judge_messages

MAX_JUDGE_LENGTH = 4096  # tokens of a judge's prompt and answer; more would only take memory
JUDGE_TOKENS = 32  # the rubrics ask for a digit alone; the rest is for judges that say 「採点：4点」


class EngineJudge:
    """A language model that reads the rubric, the question, the reference answer and the completion.

    Greedy, so that the same completion always gets the same verdict; equal prompts (in a GRPO group
    completions repeat) are therefore asked once.
    """

    concurrent = False  # its engine computes where the policy's does

    def __init__(self, engine: Engine, chat: Chat, *, name: str, max_length: int) -> None:
        self.engine = engine
        self.chat = chat
        self.name = self.identity = name
        self.rubric_version = RUBRIC_VERSION
        self.max_prompt_length = max_length - JUDGE_TOKENS

    def judge(self, examples: Sequence[Example], completions: Sequence[str]) -> list[Verdict]:
        prompts = [
            tuple(
                self.chat.encode_prompt(
                    judge_messages(
                        example.stream,
                        example.question,
                        example.reference,
                        completion,
                        eval_aspect=example.eval_aspect,
                    )
                )
            )
            for example, completion in zip(examples, completions, strict=True)
        ]
        # dict, not set: the order must not depend on hashes.
        asked = list(dict.fromkeys(prompt for prompt in prompts if len(prompt) <= self.max_prompt_length))
        batch = [list(prompt) for prompt in asked]
        groups = self.engine.generate(batch, max_tokens=JUDGE_TOKENS, temperature=0.0, seeds=[0] * len(batch))
        texts = {
            prompt: self.chat.decode(group[0].token_ids) for prompt, group in zip(asked, groups, strict=True)
        }
        return [read_verdict(texts.get(prompt)) for prompt in prompts]

    def close(self) -> None:
        self.engine.close()


def load_judge(
    model: str, engine_kind: str, device: torch.device, template: str = "auto", **engine_options: Any
) -> EngineJudge:
    """The judge in a model folder or on the hub, in an engine of its own (options: see make_engine)."""
    folder = resolve_model(model)
    chat = load_chat(folder, template)
    max_length = min(read_json(folder / "config.json").get("max_position_embeddings", 2048), MAX_JUDGE_LENGTH)
    engine = make_engine(
        engine_kind, folder, stop_token_ids=chat.stop_token_ids, max_length=max_length, device=device,
        **engine_options,
    )  # fmt: skip
    return EngineJudge(engine, chat, name=model, max_length=max_length)
