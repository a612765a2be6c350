"""Make question/answer pairs for SFT out of seed questions, with a teacher model.

    python synth.py --teacher cyberagent/calm3-22b-chat --template chatml --engine vllm --target 240000 \\
        --seeds answer_carefully=seeds/ac.json borderline=seeds/border.json llm_jp_instructions=seeds/llm_jp.json \\
        --output-dir data/sft

What it does (kaja/synthesis.py), batch by batch until the target is reached:
  1. plans which seeds to use, so that every source gives the same number of pairs;
  2. asks the teacher for a question like the seed's, with the slides' question_prompt, and reads what follows "Q:";
  3. cuts questions without or with several marks, cut off, empty, too short or long, copied or seen before;
  4. asks the teacher for an answer, with the slides' answer_prompt, and reads what follows "A:";
  5. cuts answers in the same way, and ones that break off;
  6. appends the batch to batches.jsonl.

Then it writes train.jsonl, validation.jsonl (held out) and funnel.json: what each filter cut, with an example.

Killed or stopped? The same command with --resume auto goes on behind the last finished batch and ends with the
pairs of an uninterrupted run. `--teacher scripted` plays the teacher of the demo without a model.
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from kaja.chat import Chat
from kaja.checkpoint import load_chat, resolve_model
from kaja.cli import check_range, prepare_output_dir, run
from kaja.data import load_all, to_record
from kaja.demo_corpus import DEMO_MODEL
from kaja.demo_teacher import ScriptedTeacher
from kaja.distributed import setup, teardown
from kaja.engine import Engine, make_engine
from kaja.errors import UserError
from kaja.files import append_jsonl, write_json, write_jsonl
from kaja.synthesis import Settings, Synthesis, finished_batches, hold_out, run_batch, to_examples, usable_seeds

GPU_MEMORY = 0.9  # share that vLLM takes: the teacher is alone


@dataclass(frozen=True)
class Config:
    teacher: str
    """Model that writes questions and answers: a Hugging Face folder or hub id, or "scripted" (the demo's)."""
    seeds: tuple[str, ...]
    """Seed files: SOURCE=FILE for answer_carefully, borderline, llm_jp_instructions, ...; or kaja's JSONL."""
    output_dir: str
    """Folder for train.jsonl, validation.jsonl, funnel.json, config.json and batches.jsonl."""
    target: int = 240_000
    """Pairs to make, divided evenly over the sources."""
    engine: Literal["torch", "vllm"] = "vllm"
    """What generates: vLLM, or plain torch for tiny models. The scripted teacher needs neither."""
    template: str = "auto"
    """Chat template of the teacher: llm-jp-3, chatml (calm3), llama-3, or auto."""
    temperature: float = 0.5
    """Sampling temperature of questions and answers; 0.5 is what calm3 recommends."""
    max_question_tokens: int = 256
    """Longest question in tokens; longer ones are cut off and thrown away."""
    max_answer_tokens: int = 1024
    """Longest answer in tokens; longer ones are cut off and thrown away."""
    max_question_chars: int = 400
    """Longest question that is kept, in characters."""
    max_answer_chars: int = 2000
    """Longest answer that is kept, in characters."""
    max_length: int = 4096
    """Room for prompt and completion in the teacher, in tokens."""
    max_attempts: int = 10
    """A source that of late needs more attempts than this for a pair is given up."""
    validation_share: float = 0.02
    """Share of the pairs that goes to validation.jsonl instead of train.jsonl."""
    batch_size: int = 512
    """Attempts in a batch: what a kill can cost, and what the engine gets at a time."""
    seed: int = 0
    """Order of the seed questions, sampling, and choice of the validation pairs."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on behind the batches that output_dir holds, if there are any."""

    def __post_init__(self) -> None:
        check_range(
            self,
            at_least_1=(
                "target", "batch_size", "max_question_tokens", "max_answer_tokens", "max_question_chars",
                "max_answer_chars", "max_attempts",
            ),
            at_least_0=("temperature", "validation_share", "seed"),
            at_most={"validation_share": 0.5},
        )  # fmt: skip
        longest = max(self.max_question_tokens, self.max_answer_tokens)
        if self.max_length <= longest:
            raise UserError(
                f"max_length {self.max_length}: prompt and completion must fit, and completions may have {longest} "
                "tokens; raise --max-length, within the teacher's context"
            )


def main(config: Config) -> None:
    ranks = setup()
    if ranks.world_size > 1:
        raise UserError("synth.py: runs in one process; start it with python instead of torchrun")
    seeds = load_all(config.seeds)
    folder = DEMO_MODEL if config.teacher == "scripted" else resolve_model(config.teacher)
    chat = load_chat(folder, config.template)
    settings = Settings(**{name: getattr(config, name) for name in Settings.__dataclass_fields__})
    usable = usable_seeds(seeds, chat, settings)
    output_dir = prepare_output_dir(config.output_dir, config, resume=config.resume == "auto", ranks=ranks)

    batches = output_dir / "batches.jsonl"
    synthesis = Synthesis(usable, settings)
    for rows in finished_batches(batches, usable):
        synthesis.add(rows)
    if synthesis.plan():
        with closing(make_teacher(config, folder, chat, ranks.device)) as teacher:
            make_pairs(synthesis, teacher, chat, batches)

    train, validation = hold_out(to_examples(synthesis, config.teacher), config.validation_share, config.seed)
    write_jsonl(output_dir / "train.jsonl", map(to_record, train))
    write_jsonl(output_dir / "validation.jsonl", map(to_record, validation))
    funnel = {**synthesis.funnel(), "seeds_too_long": len(seeds) - len(usable)}
    write_json(output_dir / "funnel.json", funnel)
    teardown()
    if why := synthesis.why_not_reached():
        raise UserError(why)
    print(
        f"{len(synthesis.pairs)} pairs from {funnel['attempts']} attempts: "
        f"{len(train)} to {output_dir / 'train.jsonl'}, {len(validation)} to {output_dir / 'validation.jsonl'}"
    )


def make_pairs(synthesis: Synthesis, teacher: Engine, chat: Chat, batches: Path) -> None:
    """Batch after batch, each on disk before the next begins."""
    target, done = synthesis.settings.target, len(synthesis.pairs)
    with tqdm(total=target, initial=done, unit="pair", dynamic_ncols=True) as bar:
        while batch := synthesis.plan():
            rows = run_batch(synthesis, batch, teacher, chat)
            append_jsonl(batches, [{"rows": rows}])
            synthesis.add(rows)
            bar.set_postfix_str(f"{sum(synthesis.attempts.values())} attempts", refresh=False)
            bar.update(len(synthesis.pairs) - bar.n)


def make_teacher(config: Config, folder: Path, chat: Chat, device: torch.device) -> Engine:
    if config.teacher == "scripted":
        return ScriptedTeacher(chat)
    return make_engine(
        config.engine, folder, stop_token_ids=chat.stop_token_ids, max_length=config.max_length,
        device=device, seed=config.seed, gpu_memory_utilization=GPU_MEMORY,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(main, Config))
