"""Contestant: TRL's GRPOTrainer, generating with transformers or with vLLM in the same process.

The same loss as kaja's with kl k3: mean over each completion and then over completions, KL 0.04, one update a step.
TRL's defaults bfloat16 and activation checkpointing are off: on a CPU they cost more than they give.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Window, read_job, report
from reward import even_share

job = read_job()
if job["engine"] == "vllm":  # what vLLM on a CPU wants before it is imported
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }  # fmt: skip
import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402

window = Window()
lengths: list[int] = []
prompt_lengths: list[int] = []


class Timer(TrainerCallback):
    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        window.__enter__()

    def on_train_end(self, *arguments: Any, **options: Any) -> None:
        window.__exit__()


def reward(completions: list[str], prompt_ids: list[list[int]] = [], completion_ids: list[list[int]] = [],
           **others: Any) -> list[float]:  # fmt: skip
    lengths.extend(map(len, completion_ids))
    return [even_share(text) for text in completions]


def for_a_cpu(make_engine: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's engine as TRL makes it, with what it needs on a CPU: eager, and little memory for keys and values."""

    def make(**options: Any) -> Any:
        ours = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "block_size": 32, "dtype": "float32"}
        return make_engine(**options | ours | {"enable_chunked_prefill": False})

    return make


def reload_weights(generation: Any) -> None:
    """TRL's own sync dies with vLLM 0.32 on a CPU; vLLM's call for the purpose does the same work."""
    state = generation.model.state_dict()
    generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(state.items())})
    assert generation.llm.reset_prefix_cache()


def main() -> None:
    with Path(job["questions"]).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    prompts = [f"<s>{row['question']}\n" for row in rows]  # what the model's chat template makes of it
    prompt_lengths.extend(len(tokenizer(prompt)["input_ids"]) * job["group_size"] for prompt in prompts)
    completions = job["batch"] * job["group_size"]
    in_process = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.05}
    vllm = in_process if job["engine"] == "vllm" else {}
    arguments = GRPOConfig(
        output_dir=job["output_dir"], per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=completions // job["micro_batch"], num_generations=job["group_size"],
        max_completion_length=job["max_completion_tokens"], max_steps=job["steps"], temperature=1.0, top_k=0, top_p=1.0,
        beta=0.04, loss_type="grpo", num_iterations=1, use_bias_correction_kl=False, shuffle_dataset=False,
        learning_rate=job["learning_rate"], lr_scheduler_type="cosine", warmup_steps=0, weight_decay=0.0,
        optim="adamw_torch_fused", max_grad_norm=job["max_grad_norm"], bf16=False, gradient_checkpointing=False,
        use_cpu=True, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, seed=0,
        dataloader_pin_memory=False, model_init_kwargs={"dtype": "float32"}, **vllm,
    )  # fmt: skip
    if job["engine"] == "vllm":
        vllm_generation.LLM = for_a_cpu(vllm_generation.LLM)
    trainer = GRPOTrainer(
        job["model"], reward, arguments, Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    if job["engine"] == "vllm":
        generation = trainer.vllm_generation
        generation.sync_weights = lambda: reload_weights(generation)
    trainer.add_callback(Timer())
    trainer._generate = window.timed("generate", trainer._generate)
    trainer._generate_and_score_completions = window.timed("rollout", trainer._generate_and_score_completions)
    trainer.train()
    phases = window.phases
    phases["log_probs"] = phases.pop("rollout") - phases["generate"]  # and the reward, which costs nothing
    phases["update"] = window.measured["cpu_seconds"] - phases["generate"] - phases["log_probs"]
    history = trainer.state.log_history
    report(
        job, window, losses=[row["loss"] for row in history if "loss" in row], phases=phases,
        completion_tokens=sum(lengths), prompt_tokens=sum(prompt_lengths),
        rewards=[row["reward"] for row in history if "reward" in row],
        torch=torch.__version__, transformers=transformers.__version__,
    )  # fmt: skip


if __name__ == "__main__":
    main()
