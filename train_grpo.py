"""Group relative policy optimisation (GRPO) with a judge as the reward.

    torchrun --nproc_per_node 8 train_grpo.py --model runs/sft/hf --data data/grpo.jsonl \
        --judge-model elyza/Llama-3-ELYZA-JP-8B-AWQ --output-dir runs/grpo

What it is: the loop of DeepSeekMath (arXiv 2402.03300) by hand. No value network: the baseline of a
completion is the mean reward of the other completions of its prompt. Each step:

    1. sample `group_size` completions of each prompt         kaja.engine (vLLM, or pure torch)
    2. let the judge score them: 0-5 points, / 5              kaja.reward
    3. advantages: reward minus group mean, over group std    kaja.loss.group_advantages
    4. old and reference log-probs of the completions         kaja.model.CausalLM
    5. clipped policy steps with KL to the reference          kaja.loss.policy_loss
    6. give the engine the new weights, and check that        kaja.engine.check_sync

The other algorithms of the family (Dr. GRPO, DAPO, GSPO, CISPO) are choices of options: the table in
kaja.loss.policy_loss says which. The defaults are the recipe of Team Kaja: 64 prompts x 8 completions
a step (8 per device x 8 accumulated x 8 GPUs, in completions, is 64 prompts), 1 epoch, cosine from 1e-5.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from kaja.batching import batch_indices, fingerprint, steps_per_epoch
from kaja.chat import Chat
from kaja.checkpoint import load_chat, load_model, resolve_model, save_model
from kaja.cli import check_range, check_same_data, noticing_sigterm, prepare_output_dir, run
from kaja.data import Example, load_all
from kaja.demo_judge import RuleJudge
from kaja.distributed import (
    Ranks, Sharding, clip_gradients, full_tensors, gather_shares, my_share, recompute_blocks,
    reduce_stats, setup, teardown,
)  # fmt: skip
from kaja.engine import Engine, check_installed, make_engine
from kaja.errors import Stopped, UserError
from kaja.files import read_json, write_jsonl
from kaja.loss import (
    add_stats, group_advantages, groups_with_spread, kept_completions, policy_loss, summarise_stats,
)  # fmt: skip
from kaja.model import CausalLM, ModelConfig
from kaja.optim import is_due, learning_rate_at, parameter_groups, set_learning_rate
from kaja.resume import CheckpointWriter, check_room, resume_checkpoint
from kaja.reward import Judge, load_judge
from kaja.rollouts import MicroBatch, Rollout, micro_batches, rollout_metrics
from kaja.sync import check_sync
from kaja.tracking import Stopwatch, Tracker


@dataclass(frozen=True)
class Config:
    model: str
    """Policy to start from, usually the SFT model: a Hugging Face folder or hub id. Also the KL's reference."""
    data: tuple[str, ...]
    """Files of questions with reference answers: kaja's JSONL, or SOURCE=FILE for the original formats."""
    output_dir: str
    """Folder for config.json, metrics.jsonl, samples/, checkpoints/ and the trained model hf/."""
    judge_model: str = "elyza/Llama-3-ELYZA-JP-8B-AWQ"
    """Language model that scores completions, or `rule`: the demo's rules for tiny models."""
    engine: Literal["vllm", "torch"] = "vllm"
    """What samples completions: vLLM, or kaja's own sampler in pure torch."""
    max_steps: int = 0
    """Steps to take, over as many epochs as they need; 0: one epoch."""
    prompts_per_step: int = 64
    """Questions per step, over all ranks."""
    group_size: int = 8
    """Completions of each question."""
    max_completion_tokens: int = 256
    """Longest completion; longer ones are cut off and trained on as they are."""
    temperature: float = 1.0
    """Of sampling; the trainer's log-probs are taken at the same temperature."""
    updates_per_step: int = 1
    """Optimiser steps on one step's completions (mu in the paper)."""
    micro_batch_size: int = 8
    """A stream (one forward and backward) holds at most so many longest completions with their prompts."""
    learning_rate: float = 1e-5
    """Learning rate of the first step; a cosine takes it to 0."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    drop: tuple[Literal["truncated", "no-spread"], ...] = ()
    """Leave out completions that were cut off (truncated), groups whose rewards are all equal (no-spread)."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """What a reward's distance from its group's mean is divided by."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of the policy to the one that sampled, per token or per completion (GSPO)."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """Clipped surrogate (PPO), or clipped weights on the log-probs (CISPO)."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high."""
    kl_coef: float = 0.04
    """Weight of the KL to the reference; 0: no reference model is loaded."""
    kl: Literal["k1", "k2", "k3"] = "k2"
    """Estimator of the KL in the loss; kaja.loss.kl_estimate says why k2."""
    correction: Literal["none", "token", "sequence"] = "token"
    """Truncated importance weights for what engine and trainer compute differently."""
    aggregation: Literal["sequence", "token", "constant"] = "sequence"
    """Mean over each completion and then over completions, over all tokens, or over a constant length."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute each block again in the backward instead of keeping its activations; auto: on GPUs."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimiser in host memory; replaces the slides' paged 8-bit AdamW."""
    save_every: int = 0
    """Steps between checkpoints to resume from, the last two are kept; 0: none but at a SIGTERM."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest checkpoint in output_dir, if there is one."""
    seed: int = 0
    """Order of the questions and random numbers of the completions."""

    def __post_init__(self) -> None:
        check_range(
            self, at_least_1=(
                "prompts_per_step", "max_completion_tokens", "updates_per_step", "micro_batch_size",
            ),
            positive=("temperature", "learning_rate", "max_grad_norm"),
            at_least_0=("max_steps", "weight_decay", "clip_low", "clip_high", "kl_coef", "save_every", "seed"),
        )  # fmt: skip
        if self.group_size < 2:
            raise UserError(f"group_size {self.group_size}: must be at least 2: a group of one has no baseline")


# Fields of Config that are policy_loss's arguments of the same name.
LOSS_OPTIONS = ("ratio", "surrogate", "clip_low", "clip_high", "kl_coef", "kl", "correction", "aggregation")


def main(config: Config) -> None:
    ranks = setup()
    source = resolve_model(config.model)
    shape = ModelConfig.from_hf(read_json(source / "config.json"))
    chat = load_chat(source)
    output_dir = prepare_output_dir(config.output_dir, config, resume=config.resume == "auto", ranks=ranks)
    check_room(output_dir, shape, ranks, checkpoints=config.save_every > 0)
    examples, prompts, max_length = read_prompts(config, shape, chat)
    total_steps = config.max_steps or steps_per_epoch(len(examples), config.prompts_per_step)

    sharding = Sharding(recompute_blocks(config.activation_checkpointing, ranks), config.cpu_offload)
    policy = load_model(source, ranks=ranks, sharding=sharding)
    reference = None
    if config.kl_coef:
        reference = load_model(source, ranks=ranks, sharding=Sharding(cpu_offload=config.cpu_offload))
        reference.requires_grad_(False)
    groups = parameter_groups(policy, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    engine = make_engine(
        config.engine, source, stop_token_ids=chat.stop_token_ids, max_length=max_length, device=ranks.device
    )
    rule = config.judge_model == "rule"
    judge = RuleJudge() if rule else load_judge(config.judge_model, config.engine, ranks.device)
    sampler = Sampler(chat, examples, prompts, engine, judge)
    state = resume_checkpoint(output_dir, policy, optimizer, ranks)
    data = check_same_data(state, fingerprint(prompts))
    sync(engine, policy, prompts[0], ranks)

    shown = ("reward", "kl", "entropy")
    with (
        Tracker(output_dir, total=total_steps, initial=state["step"], shown=shown, enabled=ranks.is_main) as tracker,
        CheckpointWriter(output_dir, ranks) as checkpoints,
        noticing_sigterm() as sigterm,
    ):
        for step in range(state["step"], total_steps):
            watch = Stopwatch()
            # 1, 2. Completions and verdicts: each rank works on its share of the prompts, then all know all.
            rollouts = roll_out(sampler, step, config, ranks, watch)

            # 3. Advantages. A failed verdict is NaN: it takes no part in its group, and is not kept.
            rewards = torch.tensor([rollout.reward for rollout in rollouts]).view(-1, config.group_size)  # (P, G)
            advantages = group_advantages(rewards, config.advantage_scale).flatten().tolist()
            kept = keep(rollouts, rewards, advantages, config)
            batches = micro_batches(kept, config.micro_batch_size * max_length, policy.config.hidden_size, ranks)

            # 4. Log-probs before the update. With one update the policy's are those of the update itself.
            with watch("log_probs"), torch.no_grad():
                for batch in batches:
                    if reference is not None:
                        batch.ref_log_probs, _ = log_probs_of(reference, batch, config)
                    if config.updates_per_step > 1:
                        batch.old_log_probs, _ = log_probs_of(policy, batch, config)

            # 5. Policy steps.
            learning_rate = learning_rate_at(step, max_steps=total_steps, learning_rate=config.learning_rate)
            set_learning_rate(optimizer, learning_rate)
            with watch("update"):
                for _ in range(config.updates_per_step):
                    losses = update_policy(policy, optimizer, batches, denominator(kept, config), config, ranks)

            # 6. The engine samples the next step's completions from the new weights.
            with watch("sync"):
                sync_error = sync(engine, policy, prompts[0], ranks)

            tracker.log(step + 1, {
                **rollout_metrics(rollouts), **losses, "learning_rate": learning_rate, "sync_error": sync_error,
                "groups_without_spread": 1 - groups_with_spread(rewards).float().mean().item(), **watch.seconds,
            })  # fmt: skip
            if ranks.is_main:
                records = (rollout.record(advantage) for rollout, advantage in zip(rollouts, advantages))
                write_jsonl(output_dir / "samples" / f"step_{step + 1:04d}.jsonl", records)
            asked_to_stop = reduce_stats({"sigterm": torch.tensor(sigterm.is_set())}, ranks)["sigterm"] > 0
            if asked_to_stop or (config.save_every and is_due(step, config.save_every, total_steps)):
                checkpoints.save(step + 1, policy, optimizer, data=data)
            if asked_to_stop:
                checkpoints.close()
                raise Stopped(step + 1, total_steps)

    save_model(policy, output_dir / "hf", source, ranks)
    judge.close()
    engine.close()
    teardown()


def update_policy(
    policy: CausalLM, optimizer: torch.optim.Optimizer, batches: list[MicroBatch], denominator: int,
    config: Config, ranks: Ranks,
) -> dict[str, float]:  # fmt: skip
    """One optimiser step on all micro-batches; the loss and its statistics over all ranks."""
    options = {name: getattr(config, name) for name in LOSS_OPTIONS}
    total: dict[str, torch.Tensor] = {}
    for batch in batches:
        log_probs, entropy = log_probs_of(policy, batch, config, with_entropy=True)
        old_log_probs = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
        loss, stats = policy_loss(
            log_probs, old_log_probs, batch.advantages, batch.stream.completion_mask, batch.stream.sequence_ids,
            ref_log_probs=batch.ref_log_probs, sampling_log_probs=batch.sampling_log_probs, entropy=entropy,
            denominator=denominator, **options,
        )  # fmt: skip
        loss.backward()  # gradients of micro-batches and ranks add up to that of the whole step
        total = add_stats(total, {"loss": loss.detach(), **stats})
    grad_norm = clip_gradients(policy, config.max_grad_norm)
    if not math.isfinite(grad_norm):
        raise RuntimeError(f"the gradient's norm is {grad_norm}: nothing was updated; look at the samples of this step")
    optimizer.step()
    optimizer.zero_grad()
    sums = reduce_stats(total, ranks)
    return {"loss": sums.pop("loss"), **summarise_stats(sums), "grad_norm": grad_norm}


def read_prompts(config: Config, shape: ModelConfig, chat: Chat) -> tuple[list[Example], list[list[int]], int]:
    """The questions, their prompts as tokens, and the length that prompt and completion need together.

    All that can be wrong with the input is found here, before any weight is loaded.
    """
    examples = load_all(config.data)
    prompts = [chat.encode_prompt([{"role": "user", "content": example.question}]) for example in examples]
    max_length = max(map(len, prompts)) + config.max_completion_tokens
    if max_length > shape.max_position_embeddings:
        raise UserError(
            f"max_completion_tokens {config.max_completion_tokens}: with the longest prompt that is {max_length} "
            f"tokens, but the model's context is {shape.max_position_embeddings}; lower it or remove long questions"
        )
    check_installed(config.engine)
    if config.judge_model != "rule":
        resolve_model(config.judge_model)
    return examples, prompts, max_length


def keep(
    rollouts: list[Rollout], rewards: torch.Tensor, advantages: list[float], config: Config
) -> list[tuple[Rollout, float]]:
    """The (rollout, advantage) pairs that enter the loss."""
    truncated = torch.tensor([rollout.completion.finish_reason == "length" for rollout in rollouts])
    kept = kept_completions(
        rewards, truncated.view_as(rewards) if "truncated" in config.drop else None,
        drop_groups_without_spread="no-spread" in config.drop,
    )  # fmt: skip
    if rewards.isnan().all():
        raise RuntimeError(f"the judge gave no verdict at all; the first completion's: {rollouts[0].verdict}")
    chosen = [(rollouts[index], advantages[index]) for index in kept.flatten().nonzero().flatten().tolist()]
    # A step that keeps nothing still has to run on every rank: one judged completion with advantage 0.
    return chosen or [(next(rollout for rollout in rollouts if not math.isnan(rollout.reward)), 0.0)]


def denominator(kept: list[tuple[Rollout, float]], config: Config) -> int:
    """What the aggregation divides by. Every rank knows all rollouts, so these are the global counts."""
    if config.aggregation == "token":
        return sum(rollout.length for rollout, _ in kept)
    return len(kept) * (config.max_completion_tokens if config.aggregation == "constant" else 1)


@dataclass(frozen=True)
class Sampler:
    """What it takes to get judged completions."""

    chat: Chat
    examples: list[Example]
    prompts: list[list[int]]
    engine: Engine
    judge: Judge


def roll_out(sampler: Sampler, step: int, config: Config, ranks: Ranks, watch: Stopwatch) -> list[Rollout]:
    """Sample and judge the completions of a step's prompts; all of them, prompt by prompt, on every rank.

    Every prompt has a seed of its own, made from (seed, step, place in the step): what is sampled
    depends neither on the number of ranks nor on an interruption.
    """
    indices = batch_indices(step, len(sampler.examples), config.prompts_per_step, config.seed)
    seeds = [(config.seed * 1_000_003 + step) * 1_000_003 + place for place in range(len(indices))]
    mine = my_share(indices, ranks)
    with watch("generate"):
        groups = sampler.engine.generate(
            [sampler.prompts[index] for index in mine], seeds=my_share(seeds, ranks), group_size=config.group_size,
            max_tokens=config.max_completion_tokens, temperature=config.temperature,
        )  # fmt: skip
    asked = [sampler.examples[index] for index in mine for _ in range(config.group_size)]
    prompts = [sampler.prompts[index] for index in mine for _ in range(config.group_size)]
    completions = [completion for group in groups for completion in group]
    texts = [sampler.chat.decode(completion.token_ids) for completion in completions]
    with watch("judge"):
        verdicts = sampler.judge.judge(asked, texts)
    rollouts = [Rollout(*parts) for parts in zip(asked, prompts, completions, texts, verdicts, strict=True)]
    by_prompt = [rollouts[start:start + config.group_size] for start in range(0, len(rollouts), config.group_size)]
    return [rollout for group in gather_shares(by_prompt, ranks) for rollout in group]


def log_probs_of(
    model: CausalLM, batch: MicroBatch, config: Config, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs of a micro-batch's completion tokens under the distribution that was sampled from."""
    stream = batch.stream
    return model(
        stream.input_ids, stream.positions, stream.cu_seqlens, stream.labels, stream.completion_mask,
        temperature=config.temperature, with_entropy=with_entropy,
    )  # fmt: skip


def sync(engine: Engine, policy: CausalLM, probe: list[int], ranks: Ranks) -> float:
    """Give the engine the policy's weights and compare log-probs of one prompt; see check_sync."""
    engine.load_weights(full_tensors(policy))
    tolerance = 1e-5 if ranks.device.type == "cpu" else 5e-2  # float32, bfloat16
    return check_sync(engine, policy, [probe], tolerance, ranks.device)


if __name__ == "__main__":
    sys.exit(run(main, Config))
