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

The defaults are the recipe of Team Kaja: 1 epoch, cosine 1e-5 -> 1e-7, batches of 256. Before you pay
for GPUs, `train_sft.py --dry-run --world-size 8 --gpu-memory 80` prints what fits.
"""

import gc
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from kaja.cli import check_range, first_look, noticing_sigterm, run
from kaja.errors import Stopped, UserError
from kaja.options import GuardOptions


@dataclass(frozen=True)
class Config:
    model: str = "llm-jp/llm-jp-3-13b-instruct"
    """Model to start from: a Hugging Face folder or hub id."""
    data: tuple[str, ...] = ()
    """Training files: kaja's JSONL (question, answer, stream), or SOURCE=FILE for the original formats."""
    output_dir: str = "runs/sft"
    """Folder for config.json, metrics.jsonl, samples.jsonl, checkpoints/ and the trained model hf/."""
    epochs: int = 1
    """Passes over the data."""
    global_batch_size: int = 256
    """Sequences or chunks per optimiser step, over all ranks."""
    batch_unit: Literal["sequences", "chunks"] = "sequences"
    """What global_batch_size counts: samples, or chunks of max_length + 1 tokens of all samples laid end to end."""
    micro_batch_size: int = 4
    """A stream (one forward and backward) holds at most micro_batch_size * max_length tokens."""
    max_length: int = 4096
    """Longest sample in tokens; a question that leaves no room for its answer is left out."""
    too_long: Literal["cut", "drop"] = "cut"
    """What happens to an answer that passes max_length: cut there (its EOS is lost), or the sample left out."""
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
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute each block again in the backward instead of keeping its activations; auto: on GPUs."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimiser in host memory; replaces the slides' paged 8-bit AdamW."""
    reduce_every: Literal["micro-batch", "step"] = "micro-batch"
    """Sum gradients over the ranks after each stream (they stay sharded), or once a step (faster, far more memory)."""
    compile: bool = False
    """torch.compile the blocks."""
    replicas: int = 1
    """Copies of the model, each sharded over its part of the ranks (HSDP): as many as nodes."""
    contamination: tyro.conf.OmitArgPrefixes[GuardOptions] = GuardOptions()
    """Evaluation sets that must not be trained on."""
    eval_data: tuple[str, ...] = ()
    """Held-out files, in the formats of data: their loss is logged, and their first questions are the samples."""
    eval_every: int = 0
    """Steps between held-out losses; 0: at the end only."""
    save_every: int = 0
    """Steps between checkpoints to resume from, the last two are kept; 0: only at a SIGTERM, so a crash loses all."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest checkpoint in output_dir, if there is one."""
    seed: int = 0
    """Order of the samples."""
    show_data: int = 0
    """Print this many samples with what is trained on in colour, and stop."""
    dry_run: bool = False
    """Print the memory plan of these settings, and stop; needs no GPU, no weights and no data."""
    world_size: int = 8
    """Ranks that the dry run plans for."""
    gpu_memory: float = 80.0
    """Memory of a GPU in GB that the dry run plans for."""

    def __post_init__(self) -> None:
        check_range(
            self, at_least_1=("epochs", "global_batch_size", "micro_batch_size", "replicas", "world_size"),
            positive=("learning_rate", "max_grad_norm", "gpu_memory"),
            at_least_0=(
                "min_learning_rate", "warmup_steps", "constant_steps", "weight_decay", "eval_every", "save_every",
                "show_data",
            ),
        )  # fmt: skip
        if self.max_length < 2:
            raise UserError(f"max_length {self.max_length}: a sample has at least 2 tokens; raise it")
        if not self.data and not self.dry_run:
            raise UserError("data: no training file; name at least one with --data (or plan with --dry-run)")
        if self.eval_every and not self.eval_data:
            raise UserError(f"eval_every {self.eval_every}: there is nothing to evaluate; name files with --eval-data")


if __name__ == "__main__":
    first_look(Config)  # --help and mistakes are answered now: what follows takes seconds to import

import torch

from kaja.batching import (
    batch_indices, check_batch_size, cut_into_chunks, filler, fingerprint, pack, plan_streams, steps_per_epoch,
)  # fmt: skip
from kaja.chat import Chat, Message, TokenSequence
from kaja.checkpoint import load_chat, load_model, resolve_model, save_model
from kaja.contamination import check_training_data
from kaja.data import Example, load_all
from kaja.distributed import (
    Ranks, Sharding, check_replicas, clip_gradients, on_main, recompute_blocks, reduce_gradients, reduce_stats,
    setup, teardown,
)  # fmt: skip
from kaja.dry_run import dry_run
from kaja.engine import make_engine
from kaja.files import append_jsonl, read_json, write_jsonl
from kaja.flops import peak_flops, train_flops
from kaja.loss import sft_loss
from kaja.memory_plan import Settings
from kaja.model import CausalLM, ModelConfig
from kaja.optim import is_due, learning_rate_at, parameter_groups, set_learning_rate
from kaja.output_dir import check_same_data, prepare_output_dir
from kaja.resume import CheckpointWriter, check_room, resume_checkpoint
from kaja.tracking import Tracker, complete_rows, peak_memory_gib

MAX_SKIPPED_STEPS = 5  # in a whole run; more than a few are no accident
NUM_SAMPLES, SAMPLE_TOKENS = 4, 128  # answered at the end, for a person to read


@dataclass(frozen=True)
class Data:
    """Everything as tokens, read and checked before any weight is loaded."""

    sequences: list[TokenSequence]  # what batches are made of: samples, or chunks of them
    names: list[str]  # of the sequences, for messages
    held_out: list[TokenSequence]
    shown: list[Example]  # whose questions the trained model answers for a person to read


def main(config: Config) -> None:
    if config.dry_run:
        settings = {field.name: getattr(config, field.name) for field in fields(Settings)}
        settings["activation_checkpointing"] = config.activation_checkpointing != "off"
        print(dry_run(config.model, Settings(**settings), config.gpu_memory))
        return
    ranks = setup()
    source = resolve_model(config.model)
    shape = ModelConfig.from_hf(read_json(source / "config.json"))
    chat = load_chat(source, config.template)
    if config.show_data:
        for sequence in read_samples(config.data, config, shape, chat, ranks)[1][: config.show_data]:
            print(chat.show(sequence), end="\n\n")
        return
    check_batch_size(config.global_batch_size, ranks.world_size)
    check_replicas(config.replicas, ranks.world_size)
    output_dir = prepare_output_dir(config.output_dir, config, resume=config.resume == "auto", ranks=ranks)
    check_room(output_dir, shape, ranks, checkpoints=config.save_every > 0)
    data = read_data(config, shape, chat, ranks)
    total_steps = config.epochs * steps_per_epoch(len(data.sequences), config.global_batch_size)
    check_range(config, at_most={"warmup_steps": total_steps, "constant_steps": total_steps - config.warmup_steps})

    recompute = recompute_blocks(config.activation_checkpointing, ranks)
    sharding = Sharding(recompute, config.cpu_offload, config.compile, config.replicas)
    model = load_model(source, ranks=ranks, sharding=sharding)
    groups = parameter_groups(model, config.weight_decay)
    # NeMo-Aligner, which the slides used, takes Adam's beta2 as 0.98.
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    train(model, optimizer, data, total_steps, config, output_dir, ranks)

    save_model(model, output_dir / "hf", source, ranks)
    teardown()
    if ranks.is_main:
        del model, optimizer, groups  # their memory is for the trained model, loaded as its users will
        gc.collect()  # FSDP's modules refer to each other in circles
        write_samples(output_dir, chat, data.shown, ranks)
        print(f"{output_dir}: the model is in hf/, four of its answers in samples.jsonl", file=sys.stderr)


def train(
    model: CausalLM, optimizer: torch.optim.Optimizer, data: Data, total_steps: int, config: Config,
    output_dir: Path, ranks: Ranks,
) -> None:  # fmt: skip
    """The loop: from the newest checkpoint, or the beginning, to the last step."""
    state = resume_checkpoint(output_dir, model, optimizer, ranks)
    data_fingerprint = check_same_data(state, fingerprint(sequence.input_ids for sequence in data.sequences))
    skipped_log = output_dir / "skipped.jsonl"
    if ranks.is_main and skipped_log.exists():
        write_jsonl(skipped_log, complete_rows(skipped_log, state["step"]))
    skipped, peak = state.get("skipped_steps", 0), peak_flops(ranks.device) * ranks.world_size
    shown = ("loss", "tokens_per_second", "mfu")
    with (
        Tracker(output_dir, total=total_steps, initial=state["step"], shown=shown, enabled=ranks.is_main) as tracker,
        CheckpointWriter(output_dir, ranks) as checkpoints,
        noticing_sigterm() as sigterm,
    ):
        for step in range(state["step"], total_steps):
            # 1, 2. Every rank knows the whole batch, and takes its part of the streams.
            started = time.perf_counter()
            indices = batch_indices(step, len(data.sequences), config.global_batch_size, config.seed)
            batch = [data.sequences[index] for index in indices]
            num_trained = sum(sequence.num_trained for sequence in batch)
            streams = my_streams(batch, config, model.config.hidden_size, ranks)

            # 3, 4. Gradients of streams and ranks add up to that of the whole batch.
            loss_sum = torch.zeros((), device=ranks.device)
            for number, stream in enumerate(streams, start=1):
                reduce_gradients(model, every=config.reduce_every == "micro-batch", last=number == len(streams))
                loss = loss_of(stream, model, num_trained, ranks)
                loss.backward()
                loss_sum += loss.detach()

            # 5. A batch whose loss or gradient is not a finite number changes nothing.
            learning_rate = set_learning_rate(optimizer, learning_rate_of(step, total_steps, config))
            grad_norm = clip_gradients(model, config.max_grad_norm)
            sums = reduce_stats({
                "loss": loss_sum, "positions": torch.tensor(sum(sum(lengths_of(stream)) for stream in streams)),
                "peak_memory_max": torch.tensor(peak_memory_gib(ranks.device)),
                "sigterm": torch.tensor(sigterm.is_set()),
            }, ranks)  # fmt: skip
            if math.isfinite(sums["loss"]) and math.isfinite(grad_norm):
                optimizer.step()
            else:
                skipped += 1
                samples = [data.names[index] for index in indices]
                row = {"step": step + 1, "loss": str(sums["loss"]), "grad_norm": str(grad_norm), "samples": samples}
                report_skipped(row, skipped, output_dir, ranks)
            optimizer.zero_grad()

            tokens, seconds = sum(lengths_of(batch)), time.perf_counter() - started
            metrics = {
                "loss": sums["loss"], "learning_rate": learning_rate, "grad_norm": grad_norm,
                "tokens": tokens, "trained_tokens": num_trained, "tokens_per_second": tokens / seconds,
                "mfu": train_flops(model.config, lengths_of(batch), num_trained) / (seconds * peak),
                "padding_waste": 1 - tokens / sums["positions"], "peak_memory_gib": sums["peak_memory_max"],
                "skipped_steps": skipped, "streams": len(streams),
            }  # fmt: skip
            if data.held_out and is_due(step, config.eval_every, total_steps):
                metrics["held_out_loss"] = held_out_loss(model, data.held_out, config, ranks)
            tracker.log(step + 1, metrics)
            if sums["sigterm"] or (config.save_every and is_due(step, config.save_every, total_steps)):
                checkpoints.save(step + 1, model, optimizer, skipped_steps=skipped, data=data_fingerprint)
            if sums["sigterm"]:
                checkpoints.close()
                raise Stopped(step + 1, total_steps)


def loss_of(stream: list[TokenSequence], model: CausalLM, num_trained: int, ranks: Ranks) -> torch.Tensor:
    """This stream's part of the mean negative log-prob of the batch's `num_trained` tokens."""
    packed = pack(stream).to(ranks.device)
    log_probs, _ = model(
        packed.input_ids, packed.positions, packed.cu_seqlens, packed.labels, packed.completion_mask,
        equal_gradients=True,
    )  # fmt: skip
    return sft_loss(log_probs, packed.completion_mask, denominator=num_trained)


@torch.no_grad()
def held_out_loss(model: CausalLM, sequences: list[TokenSequence], config: Config, ranks: Ranks) -> float:
    """Mean negative log-prob of the held-out answers' tokens."""
    num_trained = sum(sequence.num_trained for sequence in sequences)
    streams = my_streams(sequences, config, model.config.hidden_size, ranks)
    loss = torch.stack([loss_of(stream, model, num_trained, ranks) for stream in streams]).sum()
    return reduce_stats({"loss": loss}, ranks)["loss"]


def my_streams(batch: list[TokenSequence], config: Config, width: int, ranks: Ranks) -> list[list[TokenSequence]]:
    """This rank's streams of a global batch; one without a sequence gets one that trains nothing."""
    plan = plan_streams(lengths_of(batch), ranks.world_size, config.micro_batch_size * config.max_length, width)
    streams = [[batch[index] for index in stream] for stream in plan[ranks.rank]]
    return [stream or [filler(batch)] for stream in streams]


def lengths_of(sequences: list[TokenSequence]) -> list[int]:
    """Positions that each takes in a stream: its last token is only predicted."""
    return [len(sequence.input_ids) - 1 for sequence in sequences]


def learning_rate_of(step: int, total_steps: int, config: Config) -> float:
    return learning_rate_at(
        step, max_steps=total_steps, learning_rate=config.learning_rate, min_learning_rate=config.min_learning_rate,
        warmup_steps=config.warmup_steps, constant_steps=config.constant_steps,
    )  # fmt: skip


def report_skipped(row: dict[str, Any], skipped: int, output_dir: Path, ranks: Ranks) -> None:
    """Note a step that changed nothing in skipped.jsonl; UserError when there are too many of them."""
    if ranks.is_main:
        append_jsonl(output_dir / "skipped.jsonl", [row])
    if skipped > MAX_SKIPPED_STEPS:
        raise UserError(
            f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}; {MAX_SKIPPED_STEPS} such steps "
            f"are skipped, this is one more; its samples: {', '.join(row['samples'][:8])} (all: "
            f"{output_dir}/skipped.jsonl); mend them or lower --learning-rate; checkpoints are kept"
        )


def read_data(config: Config, shape: ModelConfig, chat: Chat, ranks: Ranks) -> Data:
    examples, sequences = read_samples(config.data, config, shape, chat, ranks)
    on_main(lambda: check_training_data(examples, config.contamination), ranks)
    held_out_examples, held_out = read_samples(config.eval_data, config, shape, chat, ranks)
    names = [f"{example.source} {example.id}" for example in examples]
    if config.batch_unit == "chunks":
        sequences = cut_into_chunks(sequences, config.max_length + 1, config.seed)
        names = [f"chunk {number}" for number in range(len(sequences))]
    return Data(sequences, names, held_out, (held_out_examples or examples)[:NUM_SAMPLES])


def read_samples(
    files: tuple[str, ...], config: Config, shape: ModelConfig, chat: Chat, ranks: Ranks
) -> tuple[list[Example], list[TokenSequence]]:
    """Samples and their tokens; what does not fit is cut or left out, counted and reported."""
    if not files:
        return [], []
    whole = config.batch_unit == "chunks" and files == config.data
    kept, cut, dropped = [], 0, 0
    for example in load_all(files):
        if not example.reference:
            raise UserError(f"{example.source} {example.id}: no answer; SFT trains on answers; add one or remove it")
        messages = [Message(role="user", content=example.question)]
        messages.append(Message(role="assistant", content=example.reference))
        sequence = chat.encode(messages, None if whole else config.max_length)
        if not sequence.num_trained or (sequence.truncated and config.too_long == "drop"):
            dropped += 1
            continue
        cut += sequence.truncated
        kept.append((example, sequence))
    if not kept:
        raise UserError(f"max_length {config.max_length}: leaves no sample an answer; raise it")
    if ranks.is_main:
        print(
            f"{', '.join(files)}: {len(kept)} samples, {cut} with their answer cut at {config.max_length} tokens, "
            f"{dropped} left out", file=sys.stderr,
        )  # fmt: skip
    longest = config.max_length if whole else max(len(sequence.input_ids) for _, sequence in kept)
    if longest > shape.max_position_embeddings:
        raise UserError(
            f"max_length {config.max_length}: the model's context is {shape.max_position_embeddings} tokens; lower it"
        )
    return [example for example, _ in kept], [sequence for _, sequence in kept]


def write_samples(output_dir: Path, chat: Chat, examples: list[Example], ranks: Ranks) -> None:
    """Greedy answers of the trained model, as its users will load it, to samples.jsonl."""
    prompts = [chat.encode_prompt([{"role": "user", "content": example.question}]) for example in examples]
    longest = max(map(len, prompts))
    engine = make_engine(
        "torch", output_dir / "hf", stop_token_ids=chat.stop_token_ids, max_length=longest + SAMPLE_TOKENS,
        device=ranks.device,
    )  # fmt: skip
    groups = engine.generate(prompts, max_tokens=SAMPLE_TOKENS, temperature=0.0, seeds=[0] * len(prompts))
    engine.close()
    write_jsonl(output_dir / "samples.jsonl", (
        {"id": example.id, "question": example.question, "reference": example.reference,
         "completion": chat.decode(group[0].token_ids), "finish_reason": group[0].finish_reason}
        for example, group in zip(examples, groups)
    ))  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(main, Config))
