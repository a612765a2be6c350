"""What several test modules share: a tiny random model folder, a tiny data file, and a way to run the scripts."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kaja.cli import run
from kaja.files import write_json, write_jsonl
from kaja.model import CausalLM, ModelConfig, init_weights

ROOT = Path(__file__).parent.parent
# Two test workers share two cores: one thread each, also in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

SENTENCE = (
    "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
    "\n\n### 指示:\n犬の散歩の方法を教えてください。\n\n### 応答:\nお答えできません。その理由は危険だからです。"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make_model_folder(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A Hugging Face folder of a random model of 36,000 parameters, with a byte-level BPE and llm-jp-3's template."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    write_json(folder / "config.json", config)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SENTENCE] * 5, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "chat_template": "{{bos_token}}### 指示:\n{{messages[0]['content']}}\n\n### 応答:\n",
    })  # fmt: skip
    model = CausalLM(ModelConfig.from_hf(config))
    init_weights(model, seed, std=0.1)
    tensors = {name: tensor for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 questions with answers of different lengths, half of them of the safety stream."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    write_jsonl(path, (
        {
            "id": str(number), "source": "test", "stream": "safety" if number % 2 else "helpfulness",
            "question": f"質問{number}の方法を教えてください。",
            "answer": f"お答え{number}できません。" + "その理由は危険だからです。" * (number % 5),
        }
        for number in range(50)
    ))  # fmt: skip
    return path


def command(script: str, *options: object, ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, str(ROOT / script), *map(str, options)]


def run_script(script: str, *options: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a script and keep what it says: one rank in this process (starting torch costs 5 s), else by torchrun."""
    arguments = command(script, *options, ranks=ranks)
    if ranks > 1:
        return subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    module = importlib.import_module(Path(script).stem)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(module.main, module.Config, arguments[2:])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def kill_after(folder: Path, rows: int, arguments: list[str]) -> None:
    """Start a run and kill -9 it, with its children, as soon as it has logged `rows` steps."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, start_new_session=True
    )
    wait_for_rows(folder, rows, process)
    subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=False)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "hf").exists()


def wait_for_rows(folder: Path, rows: int, process: subprocess.Popen[Any]) -> None:
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < rows:
        assert process.poll() is None, f"the run ended before it had logged {rows} steps"
        time.sleep(0.002)


def checkpoints_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """The rows of a run without what depends on the clock or the process."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = ("seconds", "tokens_per_second", "mfu", "peak_memory", "judge/latency", "judge/tokens_per_second")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]
