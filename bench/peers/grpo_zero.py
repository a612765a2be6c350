"""Contestant: GRPO-Zero (policy-gradient/GRPO-Zero), of a clone of it: the job's "peer".

Lesser work than kaja's: no KL, no reference, no log-probs of the sampler. Its model is its own Qwen2; with biases of
zero that is the Llama of the others. It recomputes activations in the backward. One mean over all tokens of a step, EOS
included; "loss" is of the last micro-batch alone. It samples all rows in one batch, unpadded on the left: rows with
short prompts may grow beyond the longest completion, up to where the longest prompt's ends.
"""

import json
import sys
from pathlib import Path
from typing import Any

from measure import Window, read_job, report
from reward import even_share

job = read_job()
sys.path.insert(0, job["peer"])
import torch  # noqa: E402
import torch.utils.checkpoint  # noqa: E402
from data_types import MiniBatch  # noqa: E402
from grpo import rollout, update_policy  # noqa: E402
from optimizer import MemoryEfficientAdamW  # noqa: E402
from qwen2_model import Qwen2Config, Transformer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

CPU = torch.device("cpu")


def load_llama(folder: Path) -> Transformer:
    """GRPO-Zero's model with the weights of a Llama."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = {name: value for name, value in config.items() if name in Qwen2Config.__annotations__}
    model = Transformer(Qwen2Config(**known), CPU)
    weights = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    biases = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items() if name.endswith(".bias")}
    model.load_state_dict(weights | biases)
    return model


def reward(response: str, end_token: str, **others: Any) -> dict[str, Any]:
    return {"reward": even_share(response.removesuffix(end_token)), "reward_info": {}}


def batch_of(tokenizer: Tokenizer, questions: list[str]) -> MiniBatch:
    prompts = [f"<s>{question}\n" for question in questions]  # what the model's chat template makes of it
    encoded = [tokenizer.tokenize(prompt) for prompt in prompts]
    nothing: list[Any] = [None] * len(prompts)  # numbers and target belong to its own task
    return MiniBatch(prompts, [one.tokens for one in encoded], [one.ids for one in encoded], nothing, nothing)


def main() -> None:
    folder = Path(job["model"])
    with Path(job["questions"]).open(encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file]
    torch.manual_seed(0)
    tokenizer, model = Tokenizer(str(folder / "tokenizer.json")), load_llama(folder)
    optimizer = MemoryEfficientAdamW(model.parameters(), lr=job["learning_rate"], weight_decay=0.0, enabled=False)
    window, losses, rewards, lengths, prompt_lengths = Window(), [], [], [], []
    with window:
        for start in range(0, len(questions), job["batch"]):
            batch = batch_of(tokenizer, questions[start : start + job["batch"]])
            with window.phase("generate"):
                episodes = rollout(
                    model, batch, tokenizer, job["max_completion_tokens"], job["group_size"], reward, CPU, torch.float32
                )
            results = update_policy(
                model, optimizer, episodes, job["micro_batch"], tokenizer.pad_token_id, job["max_grad_norm"], CPU,
                torch.float32,
            )  # fmt: skip
            losses.append(results["loss"])
            rewards.append(sum(episode.reward for episode in episodes) / len(episodes))
            lengths.extend(len(episode.generated_token_ids) for episode in episodes)
            prompt_lengths.extend(len(episode.prefix_token_ids) for episode in episodes)
    phases = window.phases | {"log_probs": 0.0}
    phases["update"] = window.measured["cpu_seconds"] - phases["generate"]
    report(
        job, window, losses=losses, phases=phases, completion_tokens=sum(lengths), prompt_tokens=sum(prompt_lengths),
        rewards=rewards, longest=max(lengths), torch=torch.__version__,
    )  # fmt: skip


if __name__ == "__main__":
    main()
