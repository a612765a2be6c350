"""Group relative policy optimisation (GRPO) with a judge as the reward.

    torchrun --nproc_per_node 8 train_grpo.py --model runs/sft/hf --data data/grpo.jsonl \
        --judge-model elyza/Llama-3-ELYZA-JP-8B-AWQ --output-dir runs/grpo

What it is: the loop of DeepSeekMath (arXiv 2402.03300) by hand. No value network: the baseline of a
completion is the mean reward of the other completions of its prompt. Each step:

    1. sample `group_size` completions of each prompt         kaja.engine (vLLM, or pure torch)
    2. let the judge score them: 0-5 points, / 5              kaja.judging, kaja.reward
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
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from kaja.cli import check_range, first_look, noticing_sigterm, run
from kaja.errors import Stopped, UserError
from kaja.options import GuardOptions, JudgeOptions


@dataclass(frozen=True)
class Algorithm:
    """What tells GRPO from its relatives; kaja.loss.policy_loss has the table. On the command line: --kl-coef, ..."""

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
    reset_reference_every: int = 0
    """Steps after which the policy becomes the reference; 0: the reference is the model at the start."""
    max_kl: float = 0.0
    """The run stops when the KL to the reference per token is above this in three steps in a row; 0: never."""
    correction: Literal["none", "token", "sequence"] = "token"
    """Truncated importance weights for what engine and trainer compute differently."""
    aggregation: Literal["sequence", "token", "constant"] = "sequence"
    """Mean over each completion and then over completions, over all tokens, or over a constant length."""

    def __post_init__(self) -> None:
        check_range(self, at_least_0=("clip_low", "clip_high", "kl_coef", "reset_reference_every", "max_kl"))
        if not self.kl_coef and (self.reset_reference_every or self.max_kl):
            raise UserError("kl_coef 0: without it there is no reference to reset and no KL to limit; raise it")


@dataclass(frozen=True)
class Config:
    model: str = "runs/sft/hf"
    """Policy to start from, usually the SFT model: a Hugging Face folder or hub id. Also the KL's reference."""
    data: tuple[str, ...] = ()
    """Files of questions with reference answers: kaja's JSONL, or SOURCE=FILE for the original formats."""
    contamination: tyro.conf.OmitArgPrefixes[GuardOptions] = GuardOptions()
    """Evaluation sets that must not be trained on."""
    output_dir: str = "runs/grpo"
    """Folder for config.json, metrics.jsonl, samples/, checkpoints/ and the trained model hf/."""
    judge: tyro.conf.OmitArgPrefixes[JudgeOptions] = JudgeOptions()
    """Who scores the completions."""
    engine: Literal["vllm", "torch"] = "vllm"
    """What samples completions, and runs --judge-model: vLLM, or kaja's own sampler in pure torch."""
    max_steps: int = 0
    """Steps to take, over as many epochs as they need; 0: one epoch."""
    prompts_per_step: int = 64
    """Questions per step, over all ranks."""
    stream_weights: tuple[str, ...] = ()
    """Share of each stream in every step, like safety=2 borderline=1 helpfulness=1; none: as the data has them."""
    group_size: int = 8
    """Completions of each question."""
    max_completion_tokens: int = 256
    """Longest completion; longer ones are cut off."""
    truncated: Literal["keep", "drop", "penalise"] = "keep"
    """Completions that were cut off: trained on as they are, left out, or the last fifth costs up to 1 (DAPO)."""
    resample: int = 0
    """Draws of fresh questions in place of groups without spread, which are then left out (DAPO); 0: they stay."""
    temperature: float = 1.0
    """Of sampling; the trainer's log-probs are taken at the same temperature."""
    top_p: float = 1.0
    """Sample from the fewest tokens that hold this probability; 1: from all."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0: from all."""
    generation_timeout: float = 0.0
    """Seconds that a step's generation may take before it is tried once more; 0: no limit."""
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
    algorithm: tyro.conf.OmitArgPrefixes[Algorithm] = Algorithm()
    """The choices that make GRPO, Dr. GRPO, DAPO, GSPO or CISPO."""
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
    dry_run: bool = False
    """Print the memory plan of these settings, and stop; needs no GPU, no weights and no data."""
    world_size: int = 8
    """Ranks that the dry run plans for."""
    gpu_memory: float = 80.0
    """Memory of a GPU in GB that the dry run plans for."""

    def __post_init__(self) -> None:
        check_range(
            self, at_least_1=(
                "prompts_per_step", "max_completion_tokens", "updates_per_step", "micro_batch_size", "world_size",
            ),
            positive=("temperature", "learning_rate", "max_grad_norm", "top_p", "gpu_memory"),
            at_least_0=(
                "max_steps", "resample", "top_k", "generation_timeout", "weight_decay", "save_every", "seed",
            ),
            at_most={"top_p": 1.0},
        )  # fmt: skip
        if self.group_size < 2:
            raise UserError(f"group_size {self.group_size}: must be at least 2: a group of one has no baseline")
        if not self.data and not self.dry_run:
            raise UserError("data: no file of questions; name at least one with --data (or plan with --dry-run)")


if __name__ == "__main__":
    first_look(Config)  # --help and mistakes are answered now: what follows takes seconds to import

import torch

from kaja.batching import batch_indices, fingerprint, fresh_indices, mixed_indices, steps_per_epoch, stream_quotas
from kaja.chat import Chat
from kaja.checkpoint import load_chat, load_model, resolve_model, save_model
from kaja.contamination import check_training_data
from kaja.data import Example, load_all
from kaja.distributed import (
    Ranks, Sharding, clip_gradients, copy_weights, from_main, full_tensors, gather_shares, my_share, on_main,
    recompute_blocks, reduce_stats, reshard, setup, teardown,
)  # fmt: skip
from kaja.dry_run import dry_run_grpo, judge_config_of, recommendation_grpo
from kaja.engine import Completion, Engine, EngineFailed, check_installed, make_engine
from kaja.files import read_json, write_json, write_jsonl
from kaja.grpo_plan import GRPOSettings, plan_grpo
from kaja.health import Health, HealthLimits, health_metrics
from kaja.judge_watch import judge_metrics
from kaja.judging import (
    canary_report, check_apart, check_judge, judge_again, open_judge, settle, tell_of_missing_references,
)  # fmt: skip
from kaja.loss import (
    add_stats, group_advantages, groups_with_spread, kept_completions, overlong_penalty, policy_loss, summarise_stats,
)  # fmt: skip
from kaja.memory_plan import GIB, USABLE
from kaja.model import CausalLM, ModelConfig
from kaja.optim import is_due, learning_rate_at, parameter_groups, set_learning_rate
from kaja.output_dir import check_same_data, prepare_output_dir
from kaja.resume import CheckpointWriter, check_room, resume_checkpoint
from kaja.reward import Judge, JudgeFailed, Verdict
from kaja.rollouts import Judging, MicroBatch, Rollout, micro_batches, rollout_metrics, throughput
from kaja.sync import check_sync
from kaja.tracking import Stopwatch, Tracker, complete_rows


@dataclass(frozen=True)
class Sampler:
    """What it takes to get judged completions."""

    chat: Chat
    examples: list[Example]
    prompts: list[list[int]]
    quotas: dict[str, int]  # questions of each stream in a step; empty: as they come
    engine: Engine
    judge: Judge
    sigterm: threading.Event = field(default_factory=threading.Event)


PLANNED_PROMPT = 512  # tokens of the longest prompt, where there is no data to tell
OVERLONG_PART = 5  # of max_completion_tokens is DAPO's buffer, as in its paper (4,096 of 20,480)
EXPECTED_AND_GROUP = (
    "warning: judge_reading expected with advantage_scale group: hardly a group is without spread, and the division "
    "makes as much of 4.96 against 4.98 as of 1 against 5; consider --advantage-scale batch"
)
# Fields of Algorithm that are policy_loss's arguments of the same name.
LOSS_OPTIONS = ("ratio", "surrogate", "clip_low", "clip_high", "kl_coef", "kl", "correction", "aggregation")


def main(config: Config) -> None:
    if config.dry_run:
        settings = plan_settings(config, PLANNED_PROMPT + config.max_completion_tokens, config.world_size)
        name, apart = config.judge.judge_model, judge_beside(config) is None
        print(dry_run_grpo(config.model, name, settings, config.gpu_memory, judge_apart=apart))
        return
    ranks = setup()
    source = resolve_model(config.model)
    shape = ModelConfig.from_hf(read_json(source / "config.json"))
    chat = load_chat(source)
    output_dir = prepare_output_dir(config.output_dir, config, resume=config.resume == "auto", ranks=ranks)
    check_room(output_dir, shape, ranks, checkpoints=config.save_every > 0)
    examples, prompts, max_length = read_prompts(config, shape, chat, ranks)
    engine_options, judge_options = gpu_shares(config, shape, max_length, ranks)
    if ranks.is_main and config.judge.judge_reading == "expected" and config.algorithm.advantage_scale == "group":
        print(EXPECTED_AND_GROUP, file=sys.stderr)

    # The judge comes first: its server, if it needs one, takes its memory before anybody else does.
    with open_judge(config.judge, config.engine, output_dir, ranks, judge_options) as judge:
        sharding = Sharding(recompute_blocks(config.activation_checkpointing, ranks), config.cpu_offload)
        policy = load_model(source, ranks=ranks, sharding=sharding)
        reference = None
        if config.algorithm.kl_coef:
            reference = load_model(source, ranks=ranks, sharding=Sharding(cpu_offload=config.cpu_offload))
            reference.requires_grad_(False)
        groups = parameter_groups(policy, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        engine = make_engine(
            config.engine, source, stop_token_ids=chat.stop_token_ids, max_length=max_length, device=ranks.device,
            **engine_options,
        )  # fmt: skip
        sampler = Sampler(chat, examples, prompts, read_quotas(config, examples), engine, judge)
        train(policy, reference, optimizer, sampler, max_length, config, output_dir, ranks)
        save_model(policy, output_dir / "hf", source, ranks)
        engine.close()
    teardown()


def train(
    policy: CausalLM, reference: CausalLM | None, optimizer: torch.optim.Optimizer, sampler: Sampler,
    max_length: int, config: Config, output_dir: Path, ranks: Ranks,
) -> None:  # fmt: skip
    """The loop: from the newest checkpoint, or the beginning, to the last step."""
    engine, prompts = sampler.engine, sampler.prompts
    total_steps = config.max_steps or steps_per_epoch(len(prompts), config.prompts_per_step)
    moving_reference = reference if config.algorithm.reset_reference_every else None
    state = resume_checkpoint(output_dir, policy, optimizer, ranks, moving_reference)
    tokens = ([*prompt, *example.reference.encode()] for prompt, example in zip(prompts, sampler.examples))
    data = check_same_data(state, fingerprint(tokens))
    sync(engine, policy, prompts[0], ranks)
    health = Health(HealthLimits(max_kl=config.algorithm.max_kl))
    if state["step"]:
        health.replay(complete_rows(output_dir / "metrics.jsonl", state["step"]))

    shown = ("reward", "kl", "entropy")
    with (
        Tracker(output_dir, total=total_steps, initial=state["step"], shown=shown, enabled=ranks.is_main) as tracker,
        CheckpointWriter(output_dir, ranks) as checkpoints,
        noticing_sigterm() as sigterm,
    ):
        sampler = replace(sampler, sigterm=sigterm)
        for step in range(state["step"], total_steps):
            watch = Stopwatch()
            # 1, 2. Completions and verdicts: each rank works on its share of the prompts, then all know all.
            try:
                rollouts, metrics = roll_out(sampler, step, config, ranks, watch)
                metrics |= watch_judge(sampler.judge, step, config, output_dir, ranks)
            except (EngineFailed, JudgeFailed) as error:
                checkpoints.save(step, policy, optimizer, moving_reference, data=data)
                checkpoints.close()
                if any_set(sigterm, ranks):
                    raise Stopped(step, total_steps) from None
                raise UserError(f"step {step + 1}: {error}; saved before it; go on with --resume auto") from None

            # 3. Advantages. A failed verdict is NaN: it takes no part in its group, and is not kept.
            rewards = rewards_of(rollouts, config)
            advantages = group_advantages(rewards, config.algorithm.advantage_scale).flatten().tolist()
            kept = keep(rollouts, rewards, advantages, config)
            batches = micro_batches(kept, config.micro_batch_size * max_length, policy.config.hidden_size, ranks)

            # 4. Log-probs before the update. With one update the policy's are those of the update itself.
            engine.sleep()  # on a GPU the trainer needs its memory; the next sync wakes it
            whole = replace(config, top_p=1.0, top_k=0)  # the reference may give any token what it likes
            with watch("log_probs"), torch.no_grad():
                for batch in batches:
                    if reference is not None:
                        batch.ref_log_probs, _ = log_probs_of(reference, batch, whole)
                    if config.updates_per_step > 1:
                        batch.old_log_probs, _ = log_probs_of(policy, batch, config)
            if reference is not None:
                reshard(reference)

            # 5. Policy steps.
            learning_rate = learning_rate_at(step, max_steps=total_steps, learning_rate=config.learning_rate)
            set_learning_rate(optimizer, learning_rate)
            with watch("update"):
                for _ in range(config.updates_per_step):
                    losses = update_policy(policy, optimizer, batches, denominator(kept, config), config, ranks)

            if moving_reference is not None and (step + 1) % config.algorithm.reset_reference_every == 0:
                copy_weights(policy, moving_reference)

            # 6. The engine samples the next step's completions from the new weights.
            with watch("sync"):
                sync_error = sync(engine, policy, prompts[0], ranks)

            metrics |= {
                **losses, "learning_rate": learning_rate, "sync_error": sync_error,
                **watch.seconds, **throughput(rollouts, watch.seconds),
            }  # fmt: skip
            tracker.log(step + 1, metrics)
            tracker.warn(health.check(step + 1, metrics))  # all ranks see the same and stop after the same step
            unhealthy = health.reason_to_stop()
            if ranks.is_main:
                judge = {"judge": sampler.judge.identity}
                records = (rollout.record(advantage) | judge for rollout, advantage in zip(rollouts, advantages))
                write_jsonl(output_dir / "samples" / f"step_{step + 1:04d}.jsonl", records)
            asked_to_stop = any_set(sigterm, ranks)
            if asked_to_stop or unhealthy or (config.save_every and is_due(step, config.save_every, total_steps)):
                checkpoints.save(step + 1, policy, optimizer, moving_reference, data=data)
            if unhealthy:
                checkpoints.close()
                raise UserError(f"step {step + 1}: {unhealthy}; saved after it")
            if asked_to_stop:
                checkpoints.close()
                raise Stopped(step + 1, total_steps)


def any_set(sigterm: threading.Event, ranks: Ranks) -> bool:
    return reduce_stats({"sigterm": torch.tensor(sigterm.is_set())}, ranks)["sigterm"] > 0


def plan_settings(config: Config, max_length: int, world_size: int) -> GRPOSettings:
    return GRPOSettings(
        world_size=world_size, max_length=max_length, kl_coef=config.algorithm.kl_coef,
        activation_checkpointing=config.activation_checkpointing != "off", judge_memory=config.judge.judge_memory,
        **{name: getattr(config, name) for name in (
            "prompts_per_step", "group_size", "max_completion_tokens", "micro_batch_size", "updates_per_step",
            "cpu_offload",
        )},
    )  # fmt: skip


def gpu_shares(
    config: Config, shape: ModelConfig, max_length: int, ranks: Ranks
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for the policy's engine and the judge's server: the room that the memory plan leaves them on a GPU."""
    if ranks.device.type != "cuda" or config.engine != "vllm":
        return {}, {}
    check_apart(config.judge, ranks)
    judge = judge_beside(config)
    memory = torch.cuda.get_device_properties(ranks.device).total_memory / GIB / USABLE
    settings = plan_settings(config, max_length, ranks.world_size)
    plan = plan_grpo(shape, judge, settings, memory)
    if not plan.fits:
        raise UserError(f"GPU memory: {recommendation_grpo(shape, judge, settings, memory)}")
    return plan.policy.options(plan.usable), plan.judge.options(plan.usable) if plan.judge else {}


def judge_beside(config: Config) -> dict[str, Any] | None:
    """config.json of a judge that shares the trainer's GPUs; None where it has its own, is behind a URL, or a rule."""
    apart = config.judge.judge_url or config.judge.judge_gpus or config.judge.is_rule
    return None if apart else judge_config_of(config.judge.judge_model)


def update_policy(
    policy: CausalLM, optimizer: torch.optim.Optimizer, batches: list[MicroBatch], denominator: int,
    config: Config, ranks: Ranks,
) -> dict[str, float]:  # fmt: skip
    """One optimiser step on all micro-batches; the loss and its statistics over all ranks."""
    options = {name: getattr(config.algorithm, name) for name in LOSS_OPTIONS}
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
        raise UserError(
            f"the gradient's norm is {grad_norm}, and nothing was updated; lower --learning-rate, or look at what the "
            f"engine's log-probs were; --resume auto goes on from the last checkpoint"
        )
    optimizer.step()
    optimizer.zero_grad()
    sums = reduce_stats(total, ranks)
    return {"loss": sums.pop("loss"), **summarise_stats(sums), "grad_norm": grad_norm}


def read_prompts(
    config: Config, shape: ModelConfig, chat: Chat, ranks: Ranks
) -> tuple[list[Example], list[list[int]], int]:
    """The questions, their prompts as tokens, and the length that prompt and completion need together.

    All that can be wrong with the input is found here, before any weight is loaded.
    """
    examples = load_all(config.data)
    on_main(lambda: check_training_data(examples, config.contamination), ranks)
    prompts = [chat.encode_prompt([{"role": "user", "content": example.question}]) for example in examples]
    max_length = max(map(len, prompts)) + config.max_completion_tokens
    if max_length > shape.max_position_embeddings:
        room = shape.max_position_embeddings - config.max_completion_tokens
        ids = [f"{example.source} {example.id}" for example, prompt in zip(examples, prompts) if len(prompt) > room]
        raise UserError(
            f"max_completion_tokens {config.max_completion_tokens}: with the longest prompt that is {max_length} "
            f"tokens, but the model's context is {shape.max_position_embeddings}; lower it or remove the {len(ids)} "
            f"questions that are too long: {', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''}"
        )
    if ranks.is_main:
        repeated = len(prompts) - len(set(map(tuple, prompts)))
        print(f"{len(prompts)} questions, {repeated} of them the same as another", file=sys.stderr)
        tell_of_missing_references(examples)
    check_installed(config.engine)
    check_judge(config.judge, config.engine)
    return examples, prompts, max_length


def read_quotas(config: Config, examples: list[Example]) -> dict[str, int]:
    """stream_weights as questions of each stream in a step; {} without them."""
    weights: dict[str, float] = {}
    for text in config.stream_weights:
        name, _, weight = text.partition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise UserError(f"stream_weights {text}: not NAME=NUMBER; write for example safety=2") from None
        if weights[name] <= 0:
            raise UserError(f"stream_weights {text}: a weight must be above 0; leave the stream out instead")
        if name not in {example.stream for example in examples}:
            raise UserError(f"stream_weights {text}: the data has no question of this stream; check --data")
    return stream_quotas(weights, config.prompts_per_step) if weights else {}


def rewards_of(rollouts: list[Rollout], config: Config) -> torch.Tensor:
    """(P, G) rewards; NaN where the judge failed. Long completions pay for their length if the options say so."""
    rewards = torch.tensor([rollout.reward for rollout in rollouts])
    if config.truncated == "penalise":
        lengths = torch.tensor([rollout.length for rollout in rollouts])
        limit = config.max_completion_tokens
        rewards = rewards + overlong_penalty(lengths, limit, buffer=max(1, limit // OVERLONG_PART))
    return rewards.view(-1, config.group_size)


def keep(
    rollouts: list[Rollout], rewards: torch.Tensor, advantages: list[float], config: Config
) -> list[tuple[Rollout, float]]:
    """The (rollout, advantage) pairs that enter the loss."""
    truncated = torch.tensor([rollout.completion.finish_reason == "length" for rollout in rollouts])
    kept = kept_completions(
        rewards, truncated.view_as(rewards) if config.truncated == "drop" else None,
        drop_groups_without_spread=config.resample > 0,
    )  # fmt: skip
    chosen = [(rollouts[index], advantages[index]) for index in kept.flatten().nonzero().flatten().tolist()]
    # A step that keeps nothing still has to run on every rank: one judged completion with advantage 0.
    return chosen or [(next(rollout for rollout in rollouts if not math.isnan(rollout.reward)), 0.0)]


def denominator(kept: list[tuple[Rollout, float]], config: Config) -> int:
    """What the aggregation divides by. Every rank knows all rollouts, so these are the global counts."""
    if config.algorithm.aggregation == "token":
        return sum(rollout.length for rollout, _ in kept)
    return len(kept) * (config.max_completion_tokens if config.algorithm.aggregation == "constant" else 1)


def roll_out(
    sampler: Sampler, step: int, config: Config, ranks: Ranks, watch: Stopwatch
) -> tuple[list[Rollout], dict[str, float]]:
    """A step's judged completions, prompt by prompt, all of them on every rank; and the metrics of its own questions.

    With `resample`, a group without spread gives its place to that of a fresh question, if that one has
    spread: it is what is trained on. The metrics are about the questions that the step began with, since
    those that are left over after a selection say little about the policy.
    """
    indices = step_indices(sampler, step, config)
    rollouts = sample_and_judge(sampler, indices, step, 0, config, ranks, watch)
    if all(rollout.verdict.score is None for rollout in rollouts):
        raise UserError(
            f"the judge gave no verdict at all (of the first completion: {rollouts[0].verdict.cause}); mend it, "
            f"--resume auto goes on from the last checkpoint"
        )
    spread = groups_with_spread(rewards_of(rollouts, config))
    groups = split(rollouts, config.group_size)
    seconds = watch.seconds["seconds/generate"] + watch.seconds["seconds/judge"]  # both go on at the same time
    verdicts = [[rollout.verdict for rollout in group] for group in groups]
    metrics = {**rollout_metrics(rollouts), **health_metrics(rollouts), **judge_metrics(verdicts, seconds)}
    metrics["groups_without_spread"] = 1 - spread.float().mean().item()
    used = set(indices)
    for draw in range(1, config.resample + 1):
        wanted = (~spread).nonzero().flatten().tolist()
        fresh = fresh_indices(step, draw, len(sampler.examples), len(wanted), used, config.seed)
        if not fresh:
            break
        used.update(fresh)
        drawn = sample_and_judge(sampler, fresh, step, draw, config, ranks, watch)
        useful = groups_with_spread(rewards_of(drawn, config)).tolist()
        for place, group, is_useful in zip(wanted, split(drawn, config.group_size), useful):
            if is_useful:
                groups[place], spread[place] = group, True
    if config.resample:
        metrics["groups_without_spread_after_resampling"] = 1 - spread.float().mean().item()
    return [rollout for group in groups for rollout in group], metrics


def step_indices(sampler: Sampler, step: int, config: Config) -> list[int]:
    """The questions of a step: the next ones of the epoch's permutation, or each stream's share."""
    if not sampler.quotas:
        return batch_indices(step, len(sampler.examples), config.prompts_per_step, config.seed)
    members = {
        name: [index for index, example in enumerate(sampler.examples) if example.stream == name]
        for name in sampler.quotas
    }
    return mixed_indices(step, members, sampler.quotas, config.seed)


def sample_and_judge(
    sampler: Sampler, indices: list[int], step: int, draw: int, config: Config, ranks: Ranks, watch: Stopwatch
) -> list[Rollout]:
    """Completions and verdicts of some questions: each rank works on its share of them.

    Every prompt has a seed of its own, made from (seed, step, draw, place): what is sampled depends
    neither on the number of ranks nor on an interruption.
    """
    first = (config.seed * 1_000_003 + step) * 1_000_003 + draw * 10_007
    seeds, mine = list(range(first, first + len(indices))), my_share(indices, ranks)
    asked, prompts = [sampler.examples[index] for index in mine], [sampler.prompts[index] for index in mine]
    groups: list[list[Completion]] = []
    verdicts: list[list[Verdict]] = []
    failure = ""
    with Judging(sampler.judge, asked, sampler.chat.decode) as judging:
        try:
            with watch("generate"):
                groups = sampler.engine.generate(
                    prompts, seeds=my_share(seeds, ranks), group_size=config.group_size,
                    max_tokens=config.max_completion_tokens, temperature=config.temperature,
                    top_p=config.top_p, top_k=config.top_k, timeout=config.generation_timeout or None,
                    on_group=judging.ask if sampler.judge.concurrent else None,
                )  # fmt: skip
            with watch("judge"):
                verdicts = judging.verdicts(groups)
        # UserError: the cache's file. The other ranks must hear of it, or they would wait for this one.
        except (EngineFailed, UserError) as error:
            failure = f"rank {ranks.rank}: {error}"
    rollouts = [
        Rollout(example, prompt, completion, sampler.chat.decode(completion.token_ids), verdict)
        for example, prompt, group, group_verdicts in zip(asked, prompts, groups, verdicts)
        for completion, verdict in zip(group, group_verdicts, strict=True)
    ]
    with watch("idle"):  # until the slowest rank is done
        failures = [text for text in gather_shares([failure], ranks) if text]
    if failures:
        raise EngineFailed(failures[0])
    with watch("judge"):
        rollouts = with_verdicts(rollouts, sampler, config, ranks)
    everybodys = gather_shares(split(rollouts, config.group_size), ranks)
    return [rollout for group in everybodys for rollout in group]


def with_verdicts(rollouts: list[Rollout], sampler: Sampler, config: Config, ranks: Ranks) -> list[Rollout]:
    """The same rollouts, failed verdicts asked for again while too many of a step's failed; JudgeFailed if that
    does not help."""
    examples, texts, verdicts = (
        [getattr(rollout, name) for rollout in rollouts] for name in ("example", "text", "verdict")
    )
    settled = settle(
        judge_again(sampler.judge, examples, texts), verdicts, config.judge.max_judge_failures, ranks,
        out_of=config.prompts_per_step * config.group_size, stop=sampler.sigterm,
    )  # fmt: skip
    return [replace(rollout, verdict=verdict) for rollout, verdict in zip(rollouts, settled, strict=True)]


def watch_judge(judge: Judge, step: int, config: Config, output_dir: Path, ranks: Ranks) -> dict[str, float]:
    """Every so many steps, how well the judge still tells known answers apart; rank 0 asks, all ranks know."""
    if not config.judge.canary_every or step % config.judge.canary_every:
        return {}
    report = from_main(canary_report(judge, config.judge) if ranks.is_main else None, ranks)
    assert report is not None  # rank 0's
    if ranks.is_main:
        write_json(output_dir / "samples" / f"canaries_{step + 1:04d}.json", report.record(step + 1))
    return report.metrics()


def split(rollouts: list[Rollout], group_size: int) -> list[list[Rollout]]:
    return [rollouts[start:start + group_size] for start in range(0, len(rollouts), group_size)]


def log_probs_of(
    model: CausalLM, batch: MicroBatch, config: Config, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs of a micro-batch's completion tokens under the distribution that was sampled from."""
    stream = batch.stream
    return model(
        stream.input_ids, stream.positions, stream.cu_seqlens, stream.labels, stream.completion_mask,
        temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, with_entropy=with_entropy,
        prefixes=stream.prefixes,
    )  # fmt: skip


def sync(engine: Engine, policy: CausalLM, probe: list[int], ranks: Ranks) -> float:
    """Give the engine the policy's weights and compare log-probs of one prompt; see check_sync."""
    tolerance = 1e-5 if ranks.device.type == "cpu" else 5e-2  # float32, bfloat16
    try:
        engine.load_weights(full_tensors(policy))
        error = check_sync(engine, policy, [probe], tolerance, ranks.device)
        reshard(policy)
        return error
    except EngineFailed as error:
        raise UserError(f"{error}; with --save-every there is one, and --resume auto goes on from it") from None


if __name__ == "__main__":
    sys.exit(run(main, Config))
