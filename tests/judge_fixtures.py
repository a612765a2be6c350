"""What tests of the judge's server share: small servers that misbehave, tiny judges, and vLLM's real server.

A helper, not a conftest: import what you need. A real start takes half a minute, so share one:

    @pytest.fixture(scope="module")
    def server(tmp_path_factory):
        with start_judge_server(tmp_path_factory.mktemp("judge")) as server:
            yield server
"""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from conftest import make_model_folder
from kaja.files import read_json, write_json
from kaja.judge_server import JudgeServer, ServerSettings

# Keeps the system text, unlike llm-jp-3's.
CHAT_TEMPLATE = (
    "{{bos_token}}{% for message in messages %}[{{message['role']}}]\n{{message['content']}}"
    "{{eos_token if message['role'] == 'assistant'}}\n{% endfor %}[assistant]\n"
)
# vLLM's attention on a CPU takes heads of 32 or more, its 4-bit kernel sizes that are multiples of 32. The
# rubrics are long in this tokenizer, which knows a few words of Japanese and else bytes: 700 tokens.
JUDGE_SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 4096,
}  # fmt: skip
GROUP_SIZE = 128  # weights that share a scale and a zero point

# A server in 60 ms: SERVER PORT [FLAG ...]. It can crash at once, be deaf to SIGTERM, have a worker, be ill (500)
# or never answer; asked for them, it falls ill, recovers, or exits.
SERVER = r"""
import http.server, os, signal, subprocess, sys, time

port, flags = int(sys.argv[1]), sys.argv[2:]
print(f"served by {os.getpid()}, session {os.getsid(0)}", flush=True)
if "crash" in flags:
    raise ValueError("there is no such model")
if "deaf" in flags:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "worker" in flags:
    print("worker", subprocess.Popen(["sleep", "1000"]).pid, flush=True)
status = {"health": 500 if "ill" in flags else 200}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        order, _, argument = self.path[1:].partition("/")
        if order == "exit":
            os._exit(int(argument))
        if order == "status":
            status["health"] = int(argument)
        if order == "health" and "silent" in flags:
            time.sleep(1000)
        self.send_response(status["health"] if order == "health" else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """What `condition` gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)
    return found


def group_is_gone(group: int) -> bool:
    """Whether no process of a group is left. A zombie, which its parent or init has yet to notice, is none."""
    return all(state.startswith("Z") for state in _processes(f"{group}", "pgid"))


def process_is_gone(pid: int) -> bool:
    return all(state.startswith("Z") for state in _processes(f"{pid}", "pid"))


def _processes(number: str, column: str) -> list[str]:
    """The states of the processes with this number in a column of ps."""
    listed = subprocess.run(["ps", "-eo", f"{column}=,stat="], capture_output=True, text=True, check=True).stdout
    return [state for found, state in (line.split() for line in listed.splitlines()) if found == number]


def make_judge_folder(folder: Path, seed: int = 1, **changes: object) -> Path:
    """A random model that nearly always answers with a digit from 0 to 5, of a size that vLLM for CPU takes.

    Feature 0 is the same for all tokens and no layer changes it: the digits' rows of the head look at it. They
    look three times as much at the others as a random head does, so that prompts make a difference.
    """
    make_model_folder(folder, seed, **{**JUDGE_SIZES, **changes})
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0.0
    weights["model.embed_tokens.weight"][:, 0] = 1.0
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    digits = [vocabulary[digit] for digit in "012345"]
    weights["lm_head.weight"][digits] *= 3
    weights["lm_head.weight"][digits, 0] = 12.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": CHAT_TEMPLATE})
    return folder


def make_awq_folders(folder: Path) -> tuple[Path, Path]:
    """A judge in 4 bits as AutoAWQ writes it, and the same with the weights those 4 bits stand for, in float32."""
    plain, packed = make_judge_folder(folder / "plain"), make_judge_folder(folder / "awq")
    exact, quantized = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if "_proj" not in name:
            exact[name], quantized[name] = weight, weight.half()
            continue
        codes, zeros, scales = quantize(weight)
        stem = name.removesuffix("weight")
        quantized |= {stem + "qweight": pack(codes), stem + "qzeros": pack(zeros), stem + "scales": scales}
        spread = [tensor.repeat_interleave(GROUP_SIZE, 0) for tensor in (zeros, scales)]
        exact[name] = ((codes - spread[0]) * spread[1].float()).T.contiguous()
    save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(quantized, packed / "model.safetensors", metadata={"format": "pt"})
    write_json(packed / "config.json", {
        **read_json(packed / "config.json"), "dtype": "float16",
        "quantization_config": {
            "quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm",
        },
    })  # fmt: skip
    return packed, plain


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, in) -> codes 0-15 (in, out), and of each group of inputs the zero points and scales (groups, out)."""
    groups = weight.T.reshape(-1, GROUP_SIZE, weight.shape[0])
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / 15).clamp(min=1e-4).half()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return codes.reshape(weight.T.shape).int(), zeros.int(), scales


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Eight columns of 4 bits in one of 32, in AWQ's order."""
    columns = codes.reshape(codes.shape[0], -1, 8)
    packed = torch.zeros(columns.shape[:2], dtype=torch.int32)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        packed |= columns[:, :, column] << 4 * place
    return packed


def start_judge_server(tmp_path: Path, folder: Path | None = None, **settings: Any) -> JudgeServer:
    """vLLM's server of a tiny judge (make_judge_folder) or of `folder`, on this CPU: to be used with `with`."""
    values = {
        "folder": folder or make_judge_folder(tmp_path / "judge"), "name": "judge", "max_length": 4096,
        "log": tmp_path / "server.log", "device": "cpu", "kv_cache_memory_bytes": 64 << 20, "start_timeout": 500,
    }  # fmt: skip
    return JudgeServer(ServerSettings(**{**values, **settings}))
