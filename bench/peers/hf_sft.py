"""Contestants: the plain Trainer of transformers, and TRL's SFTTrainer, padded or packed.

The same tokens in the same order, the same AdamW, learning rates and norm as kaja's. Both trainers' defaults are kept
where they do not change the work; not kept are bfloat16 and activation checkpointing (TRL's defaults), which a CPU
pays dearly for, and shuffling.
"""

import json
from pathlib import Path
from typing import Any

from measure import Window, read_job, report

job = read_job()
import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

window = Window()


class Timer(TrainerCallback):
    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        window.__enter__()

    def on_train_end(self, *arguments: Any, **options: Any) -> None:
        window.__exit__()


def common() -> dict[str, Any]:
    return {
        "output_dir": job["output_dir"], "per_device_train_batch_size": job["micro_batch"], "num_train_epochs": 1,
        "learning_rate": job["learning_rate"], "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": job["min_learning_rate"]}, "warmup_steps": 0, "weight_decay": 0.0,
        "optim": "adamw_torch_fused", "adam_beta1": job["beta1"], "adam_beta2": 0.98, "adam_epsilon": 1e-8,
        "max_grad_norm": job["max_grad_norm"], "bf16": False, "gradient_checkpointing": False, "use_cpu": True,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 0,
    }  # fmt: skip


def plain_trainer(rows: list[dict[str, Any]], tokenizer: Any) -> Trainer:
    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        padding = [longest - len(row["input_ids"]) for row in batch]
        labels = [
            [token if trained else -100 for token, trained in zip(row["input_ids"], row["completion_mask"])]
            for row in batch
        ]
        return {
            "input_ids": torch.tensor([row["input_ids"] + [job["pad"]] * n for row, n in zip(batch, padding)]),
            "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in padding]),
            "labels": torch.tensor([row + [-100] * n for row, n in zip(labels, padding)]),
        }

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    arguments = TrainingArguments(
        **common(), gradient_accumulation_steps=job["batch"] // job["micro_batch"], remove_unused_columns=False
    )
    return Trainer(model, arguments, collate, Dataset.from_list(rows), processing_class=tokenizer)


def trl_trainer(rows: list[dict[str, Any]], tokenizer: Any) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    packing = job["variant"] == "packing"
    accumulation = job["batch"] // job["micro_batch"]
    if packing:  # the same number of optimiser steps; how many packs there are is known after packing
        packs = number_of_packs(rows)
        accumulation = -(-packs // (job["steps"] * job["micro_batch"]))
    arguments = SFTConfig(
        **common(), gradient_accumulation_steps=accumulation, packing=packing, packing_strategy="bfd",
        max_length=job["max_length"], completion_only_loss=True, model_init_kwargs={"dtype": "float32"},
        shuffle_dataset=False,
    )  # fmt: skip
    return SFTTrainer(job["model"], args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def number_of_packs(rows: list[dict[str, Any]]) -> int:
    from trl import pack_dataset

    return len(pack_dataset(Dataset.from_list(rows), job["max_length"], "bfd"))


def main() -> None:
    with Path(job["tokens"]).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    trainer = (plain_trainer if job["variant"] == "hf" else trl_trainer)(rows, tokenizer)
    trainer.add_callback(Timer())
    trainer.train()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    report(
        job, window, losses=[row["loss"] for row in trainer.state.log_history if "loss" in row],
        tokens=sum(len(row["input_ids"]) - 1 for row in rows),
        trained_tokens=sum(sum(row["completion_mask"]) for row in rows), **versions,
    )  # fmt: skip


if __name__ == "__main__":
    main()
