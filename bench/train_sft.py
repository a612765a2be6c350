"""CPU seconds of train_sft.py on one rank, for this checkout and others: does an option, or a change, cost anything?

    OMP_NUM_THREADS=1 python bench/train_sft.py                          # the options of train_sft.py
    git worktree add /tmp/before COMMIT
    OMP_NUM_THREADS=1 python bench/train_sft.py --checkout /tmp/before   # another commit against this one

The work is model A of docs/LAB_NOTES.md (V 8,192, width 256, FFN 768, 6 layers, 8 heads, 4 kv heads, float32) on 64
rows of log-normal lengths from 32 to 1,024 tokens, a quarter of each the question; micro batch 4, global batch 32,
AdamW at 1e-5. Start-up is taken out: each figure is (CPU seconds of 3 epochs - CPU seconds of 1 epoch) / 2, the median
of `rounds` rounds, in which the variants take turns. Needs a quiet machine.
"""

import random
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from kaja.files import write_json, write_jsonl  # noqa: E402
from kaja.model import CausalLM, ModelConfig, init_weights  # noqa: E402

MODEL_A = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "--save-every 2": ("--save-every", "2"),
    "--reduce-every step": ("--reduce-every", "step"),
    "--cpu-offload": ("--cpu-offload",),
}


@dataclass(frozen=True)
class Config:
    checkout: Path | None = None
    """Measure this checkout's train_sft.py against ours, instead of our options."""
    rows: int = 64
    """Samples."""
    rounds: int = 3
    """Runs of each variant."""


def make_model(folder: Path) -> None:
    folder.mkdir()
    write_json(folder / "config.json", MODEL_A)
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(8189))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    model = CausalLM(ModelConfig.from_hf(MODEL_A))
    init_weights(model, seed=0)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def make_data(path: Path, rows: int) -> None:
    generator = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{generator.randrange(8189)}" for _ in range(count))

    lengths = [min(1000, max(32, round(generator.lognormvariate(5.2, 0.9)))) for _ in range(rows)]
    write_jsonl(path, (
        {"id": str(number), "source": "bench", "stream": "helpfulness",
         "question": words(length // 4), "answer": words(length - length // 4)}
        for number, length in enumerate(lengths)
    ))  # fmt: skip


def cpu_seconds(checkout: Path, folder: Path, epochs: int, options: tuple[str, ...]) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = [
            sys.executable, str(checkout / "train_sft.py"), "--model", str(folder / "model"), "--template", "llm-jp-3",
            "--data", str(folder / "data.jsonl"), "--output-dir", f"{output}/run", "--global-batch-size", "32",
            "--max-length", "1024", "--epochs", str(epochs), *options,
        ]  # fmt: skip
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, cwd=checkout, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(config: Config) -> None:
    runs = {name: (ROOT, options) for name, options in VARIANTS.items()}
    if config.checkout is not None:
        runs = {str(config.checkout): (config.checkout, ()), "ours": (ROOT, ())}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model")
        make_data(folder / "data.jsonl", config.rows)
        for _ in range(config.rounds):
            for name, (checkout, options) in runs.items():
                one, three = (cpu_seconds(checkout, folder, epochs, options) for epochs in (1, 3))
                seconds[name].append((three - one) / 2)
    first = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"{min(values):.2f}-{max(values):.2f}"
        print(f"{name:40} {median:7.2f} CPU-s an epoch ({spread})  {median / first:6.3f} of the first")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
