"""The work that all contestants do: models, data and optimiser, made from numbers, the same on every machine.

Model A: V 8,192, width 256, 6 layers, 8 heads, 4 kv heads. Model B: V 99,584 (as llm-jp-3), width 256, 4 layers: the
logits dominate. Model C: width 512, 8 layers: matrix products dominate. Weights are random. Texts are words w0, w1, ...
of a tokenizer that has one token for each word, so that everybody sees the same tokens.

A model's folder and the files of a work lie in one folder:

    model/          config.json, tokenizer files, model.safetensors
    questions.jsonl what kaja reads: question, answer, stream
    tokens.jsonl    (SFT) the same as tokens, in the order in which kaja takes them: {"input_ids", "completion_mask"}
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from kaja.batching import batch_indices, steps_per_epoch
from kaja.chat import Message, TokenSequence
from kaja.checkpoint import load_chat
from kaja.files import write_json, write_jsonl
from kaja.model import CausalLM, ModelConfig, init_weights

CONTROL = ("<unk>", "<s>", "</s>", "<pad>")
BOS, EOS, PAD = 1, 2, 3
# Trims nothing: BOS, the question, the answer and EOS are all that there is.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
SHAPES: dict[str, dict[str, int]] = {
    "A": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
          "num_attention_heads": 8, "num_key_value_heads": 4},
    "B": {"vocab_size": 99584, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
          "num_attention_heads": 8, "num_key_value_heads": 4},
    "C": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
          "num_attention_heads": 8, "num_key_value_heads": 8},
}  # fmt: skip
SHORTEST, LONGEST = 32, 1000  # words of a pair; with the control tokens at most 1,024
MEAN_COMPLETION = 40  # tokens after which a random model of make_model ends on average, were there no limit
OPTIMISER = {"learning_rate": 1e-5, "min_learning_rate": 1e-7, "beta1": 0.9, "max_grad_norm": 1.0}


@dataclass(frozen=True)
class Work:
    """Something to train. Rows are pairs (SFT) or prompts (GRPO); a step takes `batch` of them."""

    name: str
    title: str
    kind: Literal["sft", "grpo"]
    model: str  # of SHAPES
    steps: int
    batch: int
    micro_batch: int = 4  # streams of micro_batch * max_length tokens; GRPO: of micro_batch longest completions
    max_length: int = 1024
    length: int = 0  # every pair has so many tokens; 0: log-normal lengths
    vocab_size: int = 0  # instead of the model's own
    group_size: int = 8
    max_completion_tokens: int = 64

    @property
    def rows(self) -> int:
        return self.steps * self.batch


def config_of(work: Work) -> dict[str, Any]:
    shape = SHAPES[work.model] | ({"vocab_size": work.vocab_size} if work.vocab_size else {})
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32", **shape,
        "max_position_embeddings": max(1024, work.max_length), "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip


def prepare(work: Work, folder: Path) -> None:
    """Write the files of a work."""
    make_model(folder / "model", config_of(work), ends=work.kind == "grpo")
    vocab_size = config_of(work)["vocab_size"]
    pairs = questions(work.rows, vocab_size) if work.kind == "grpo" else make_pairs(work, vocab_size)
    write_jsonl(folder / "questions.jsonl", (
        {"id": str(number), "source": "bench", "stream": "helpfulness", "question": question, "answer": answer}
        for number, (question, answer) in enumerate(pairs)
    ))  # fmt: skip
    if work.kind == "sft":
        write_jsonl(folder / "tokens.jsonl", (
            {"input_ids": sequence.input_ids, "completion_mask": [int(trained) for trained in sequence.completion_mask]}
            for sequence in in_order(tokens_of(pairs, folder / "model"), work.batch)
        ))  # fmt: skip


def tokens_of(pairs: Sequence[tuple[str, str]], model: Path) -> list[TokenSequence]:
    chat = load_chat(model)
    return [
        chat.encode([Message(role="user", content=question), Message(role="assistant", content=answer)])
        for question, answer in pairs
    ]


def in_order(sequences: Sequence[TokenSequence], batch: int, seed: int = 0) -> list[TokenSequence]:
    """The sequences in the order of kaja's first epoch."""
    steps = range(steps_per_epoch(len(sequences), batch))
    return [sequences[index] for step in steps for index in batch_indices(step, len(sequences), batch, seed)]


def make_pairs(work: Work, vocab_size: int) -> list[tuple[str, str]]:
    """Question and answer of each row: a quarter of the words is the question."""
    generator = random.Random(0)
    if work.length:  # BOS, one word, and all else is trained on
        sizes = [(1, work.length - 3)] * work.rows
    else:
        lengths = log_normal_lengths(work.rows, generator)
        sizes = [(length // 4, length - length // 4) for length in lengths]
    return [(words(first, vocab_size, generator), words(second, vocab_size, generator)) for first, second in sizes]


def questions(count: int, vocab_size: int) -> list[tuple[str, str]]:
    """Questions of 16 to 128 words, and answers that nobody looks at."""
    generator = random.Random(0)
    return [(words(generator.randint(16, 128), vocab_size, generator), "w0") for _ in range(count)]


def log_normal_lengths(count: int, generator: random.Random) -> list[int]:
    return [min(LONGEST, max(SHORTEST, round(generator.lognormvariate(5.2, 0.9)))) for _ in range(count)]


def words(count: int, vocab_size: int, generator: random.Random) -> str:
    return " ".join(f"w{generator.randrange(vocab_size - len(CONTROL))}" for _ in range(count))


def make_model(folder: Path, config: dict[str, Any], *, ends: bool) -> None:
    """A random model and its tokenizer.

    Args:
        ends: it samples EOS after MEAN_COMPLETION tokens on average. Random models never would.
    """
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    make_tokenizer(folder, config["vocab_size"])
    model = CausalLM(ModelConfig.from_hf(config))
    init_weights(model, seed=0)
    if ends:
        let_it_end(model)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def let_it_end(model: CausalLM) -> None:
    """Give EOS the probability 1 / MEAN_COMPLETION at every position.

    One channel of the residual stream is made constant and read by the EOS row of the head alone.
    """
    size = model.config.vocab_size
    model.model.embed_tokens.weight[:, 0] = 0.5
    model.lm_head.weight[:, 0] = 0.0
    tokens = torch.arange(len(CONTROL), min(size, 512))
    hidden = model(tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32))
    others = torch.logsumexp(hidden @ model.lm_head.weight.T, dim=-1).mean().item()
    model.lm_head.weight[EOS] = 0.0
    model.lm_head.weight[EOS, 0] = (others - math.log(MEAN_COMPLETION - 1)) / hidden[:, 0].mean()


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    names = [*CONTROL, *(f"w{number}" for number in range(vocab_size - len(CONTROL)))]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(CONTROL))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": "<pad>", "chat_template": TEMPLATE, "model_max_length": 8192,
    })  # fmt: skip
