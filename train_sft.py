"""Supervised fine-tuning of all parameters on question/answer pairs.

    torchrun --nproc_per_node 8 train_sft.py --model llm-jp/llm-jp-3-13b-instruct \
        --data data/sft/train.jsonl --output-dir runs/sft

What it is: plain maximum likelihood of the answers (and their EOS) given the questions, one packed
stream per micro-batch, FSDP2 over any number of ranks, the same loss for every way to split a batch.
What it is not: no padding, no (T, V) logits, no trainer class. Each step:

    1. take the step's samples                    kaja.batching.batch_indices
    2. divide them into equal streams             kaja.batching.plan_streams
    3. log-probs of the answers' tokens           kaja.model.CausalLM
    4. loss / trained tokens of the whole batch   kaja.loss.sft_loss
    5. clip, AdamW at the step's learning rate    kaja.optim.learning_rate_at

The defaults are the recipe of Team Kaja: 1 epoch, cosine 1e-5 -> 1e-7, batches of 256.
"""

import math
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from kaja.batching import batch_indices, pack, plan_streams, steps_per_epoch, without_training
from kaja.chat import Message, TokenSequence
from kaja.checkpoint import load_chat, load_model, resolve_model, resume_checkpoint, save_checkpoint, save_model
from kaja.cli import check_range, prepare_output_dir, run
from kaja.data import load_all
from kaja.distributed import Ranks, clip_gradients, reduce_stats, setup, teardown
from kaja.errors import UserError
from kaja.loss import sft_loss
from kaja.optim import learning_rate_at, parameter_groups, set_learning_rate
from kaja.tracking import Tracker


@dataclass(frozen=True)
class Config:
    model: str
    """Model to start from: a Hugging Face folder or hub id."""
    data: tuple[str, ...]
    """Training files: kaja's JSONL (question, answer, stream), or SOURCE=FILE for the original formats."""
    output_dir: str
    """Folder for config.json, metrics.jsonl, checkpoints/ and the trained model hf/."""
    epochs: int = 1
    """Passes over the data."""
    global_batch_size: int = 256
    """Samples per optimiser step, over all ranks."""
    micro_batch_size: int = 4
    """A stream (one forward and backward) holds at most micro_batch_size * max_length tokens."""
    max_length: int = 4096
    """Longest sample in tokens; a longer answer is cut, a question that leaves no room for one is left out."""
    learning_rate: float = 1e-5
    """Learning rate of the first step (after warmup)."""
    min_learning_rate: float = 1e-7
    """Where the cosine ends."""
    warmup_steps: int = 0
    """Steps of linear warmup."""
    constant_steps: int = 0
    """Steps at min_learning_rate at the end."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices; 0 makes it the Adam of the slides."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    template: str = "auto"
    """Chat template: llm-jp-3, chatml, llama-3, or auto (recognised, else the tokenizer's own)."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward instead of keeping its activations."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimiser in host memory; replaces the slides' paged 8-bit AdamW."""
    save_every: int = 0
    """Steps between checkpoints to resume from; 0: none."""
    keep_checkpoints: int = 2
    """How many of them are kept."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest checkpoint in output_dir, if there is one."""
    seed: int = 0
    """Order of the samples."""
    show_data: int = 0
    """Print this many samples with what is trained on in colour, and stop."""

    def __post_init__(self) -> None:
        check_range(
            self, at_least_1=("epochs", "global_batch_size", "micro_batch_size", "keep_checkpoints"),
            positive=("learning_rate", "max_grad_norm"),
            at_least_0=("min_learning_rate", "warmup_steps", "constant_steps", "weight_decay", "save_every"),
        )  # fmt: skip
        if self.max_length < 2:
            raise UserError(f"max_length {self.max_length}: a sample has at least 2 tokens; raise it")


def main(config: Config) -> None:
    ranks = setup()
    source = resolve_model(config.model)
    if config.show_data:
        encode_data(config, ranks)
        return
    output_dir = prepare_output_dir(config.output_dir, config, resume=config.resume == "auto", ranks=ranks)
    sequences = encode_data(config, ranks)
    total_steps = config.epochs * steps_per_epoch(len(sequences), config.global_batch_size)
    check_range(config, at_most={"warmup_steps": total_steps, "constant_steps": total_steps - config.warmup_steps})

    model = load_model(
        source, ranks=ranks,
        activation_checkpointing=config.activation_checkpointing, cpu_offload=config.cpu_offload,
    )  # fmt: skip
    # NeMo-Aligner, which the slides used, takes Adam's beta2 as 0.98.
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    first_step = resume_checkpoint(output_dir, model, optimizer, ranks)

    with Tracker(output_dir, total=total_steps, initial=first_step, enabled=ranks.is_main) as tracker:
        for step in range(first_step, total_steps):
            started = time.perf_counter()
            indices = batch_indices(step, len(sequences), config.global_batch_size, config.seed)
            batch = [sequences[index] for index in indices]
            num_tokens = sum(sequence.num_trained for sequence in batch)  # over all ranks: each sees the whole batch

            loss_sum = torch.zeros((), device=ranks.device)
            for stream in my_streams(batch, config, model.config.hidden_size, ranks):
                packed = pack(stream).to(ranks.device)
                log_probs, _ = model(
                    packed.input_ids, packed.positions, packed.cu_seqlens, packed.labels, packed.completion_mask
                )
                loss = sft_loss(log_probs, packed.completion_mask, denominator=num_tokens)
                loss.backward()  # gradients of streams and ranks add up to that of the whole batch
                loss_sum += loss.detach()

            learning_rate = set_learning_rate(
                optimizer,
                learning_rate_at(
                    step, max_steps=total_steps, learning_rate=config.learning_rate,
                    min_learning_rate=config.min_learning_rate,
                    warmup_steps=config.warmup_steps, constant_steps=config.constant_steps,
                ),
            )  # fmt: skip
            grad_norm = clip_gradients(model, config.max_grad_norm)
            if not math.isfinite(grad_norm):
                raise RuntimeError(f"step {step + 1}: the gradient's norm is {grad_norm}; samples {indices}")
            optimizer.step()
            optimizer.zero_grad()

            seconds = time.perf_counter() - started
            tokens = sum(len(sequence.input_ids) - 1 for sequence in batch)
            tracker.log(step + 1, {
                **reduce_stats({"loss": loss_sum}, ranks),
                "learning_rate": learning_rate, "grad_norm": grad_norm,
                "tokens": tokens, "trained_tokens": num_tokens, "tokens_per_second": tokens / seconds,
            })  # fmt: skip
            if config.save_every and (step + 1) % config.save_every == 0:
                save_checkpoint(output_dir, step + 1, model, optimizer, ranks, keep=config.keep_checkpoints)

    save_model(model, output_dir / "hf", source, ranks)
    teardown()


def encode_data(config: Config, ranks: Ranks) -> list[TokenSequence]:
    """All samples as tokens; what does not fit max_length is counted and reported."""
    chat = load_chat(resolve_model(config.model), config.template)
    sequences = []
    for example in load_all(config.data):
        if not example.reference:
            raise UserError(f"{example.source} {example.id}: no answer; SFT trains on answers; add one or remove it")
        messages = [Message(role="user", content=example.question)]
        messages.append(Message(role="assistant", content=example.reference))
        sequences.append(chat.encode(messages, config.max_length))
    kept = [sequence for sequence in sequences if sequence.num_trained]
    if not kept:
        raise UserError(f"max_length {config.max_length}: leaves no sample an answer; raise it")
    if ranks.is_main:
        for sequence in kept[: config.show_data]:
            print(chat.show(sequence), end="\n\n")
        cut = sum(sequence.truncated for sequence in kept)
        print(
            f"{len(kept)} samples, {cut} with their answer cut at {config.max_length} tokens, "
            f"{len(sequences) - len(kept)} left out", file=sys.stderr,
        )  # fmt: skip
    return kept


def my_streams(batch: list[TokenSequence], config: Config, width: int, ranks: Ranks) -> list[list[TokenSequence]]:
    """This rank's streams of a global batch; a rank without a sequence gets one that trains nothing."""
    lengths = [len(sequence.input_ids) - 1 for sequence in batch]
    plan = plan_streams(lengths, ranks.world_size, config.micro_batch_size * config.max_length, width)
    streams = [[batch[index] for index in stream] for stream in plan[ranks.rank]]
    return [stream or [without_training(batch[0])] for stream in streams]


if __name__ == "__main__":
    sys.exit(run(main, Config))
