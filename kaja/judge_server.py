"""Starts vLLM's OpenAI-compatible server for a judge on this machine, and ends it with the run.

One process starts it (rank 0); all ranks ask it by its URL (kaja.server_judge). It listens on 127.0.0.1 alone.
kaja.supervisor guards it: restarted once if it dies, never left behind, whatever ends the run.
"""

import os
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from kaja import supervisor
from kaja.errors import UserError
from kaja.files import read_json

# vLLM 0.32 on a CPU: of its three processes the engine's and the worker's become one, which saves a third of
# the start and 0.6 GB; the first log-probs would otherwise compile for 4 to 24 s; more threads make it slower.
CPU_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
CPU_CACHE_BYTES = 1 << 30  # of keys and values; left to itself vLLM takes nine tenths of the memory
CPU_BATCH_TOKENS = 8192  # of one step

# What torchrun tells its workers: the server would take itself for one of them.
TORCHRUN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
# What kaja.engine sets for the engine in its own process, and what would change the server behind our back:
# a cache size, a key that all would have to know, routes through which anyone may change its weights.
NOT_FOR_THE_SERVER = (
    "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_CPU_KVCACHE_SPACE", "VLLM_API_KEY",
    "VLLM_SERVER_DEV_MODE",
)  # fmt: skip

_LOG_PREFIX = re.compile(r"^(\([^)]*\) )*((INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
_ERROR_LINE = re.compile(r"^([A-Za-z_][\w.]*(Error|Exception|Exit)|Value error|[\w.]+: error)[:,] .")


@dataclass(frozen=True)
class ServerSettings:
    """Which judge, and where it runs."""

    folder: Path
    """Of the model; safetensors, AWQ 4-bit too."""
    name: str
    """By which requests name the model."""
    max_length: int
    """Tokens of a prompt and its answer."""
    log: Path
    """File to which all that the server prints is appended."""
    device: str
    """cpu or cuda."""
    gpus: str = ""
    """CUDA_VISIBLE_DEVICES of the server, e.g. "7"; empty: those of this process."""
    data_parallel: int = 1
    """Copies of the model, one a GPU, behind the one URL."""
    gpu_memory_utilization: float | None = None
    """Share of each GPU's memory; None: vLLM's 0.92, for a GPU that nobody else uses."""
    kv_cache_memory_bytes: int | None = None
    """Keys and values of each copy, instead of what the share leaves for them; None on a CPU: CPU_CACHE_BYTES."""
    start_timeout: float = 900
    """Seconds until it must be healthy; 8B in 4 bits from a slow disk takes some minutes."""


def server_command(settings: ServerSettings, port: int) -> list[str]:
    """What starts vLLM's server. Not `vllm serve`, which fails with vllm-cpu (it looks for a package named vllm)."""
    options: dict[str, object] = {
        "model": settings.folder,
        "served-model-name": settings.name,
        "host": "127.0.0.1",
        "port": port,
        "max-model-len": settings.max_length,
        "load-format": "safetensors",  # never a pickled .bin
        "generation-config": "vllm",  # not the folder's: a request says all that it wants
        "logprobs-mode": "processed_logprobs",  # of the digits alone, where only digits are allowed
        "max-logprobs": 20,
    }
    flags = ["enable-prefix-caching", "enable-prompt-tokens-details", "disable-uvicorn-access-log"]
    cache_bytes = settings.kv_cache_memory_bytes
    if settings.device == "cpu":
        options["dtype"] = _cpu_dtype(settings.folder)
        options["block-size"] = 32
        options["max-num-batched-tokens"] = max(settings.max_length, CPU_BATCH_TOKENS)
        # A prompt in pieces, of a request with a seed, raises there.
        flags += ["enforce-eager", "no-enable-chunked-prefill"]
        cache_bytes = cache_bytes or CPU_CACHE_BYTES
    if settings.gpu_memory_utilization is not None:
        options["gpu-memory-utilization"] = settings.gpu_memory_utilization
    if cache_bytes is not None:
        options["kv-cache-memory-bytes"] = cache_bytes
    if settings.data_parallel > 1:
        options["data-parallel-size"] = settings.data_parallel
    valued = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *valued, *(f"--{flag}" for flag in flags)]


def _cpu_dtype(folder: Path) -> str:
    """float32, which a CPU does best. 4-bit weights work with 16 bits alone: float16 is 10 times closer to exact
    than bfloat16 (a digit's probability within 1e-3), and what they get on GPUs."""
    return "float16" if "quantization_config" in read_json(folder / "config.json") else "float32"


def server_environment(settings: ServerSettings, environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` of a trainer, made fit for the server; what the user set for CUDA, NCCL or Python stays."""
    dropped = {*TORCHRUN, *NOT_FOR_THE_SERVER}
    kept = {
        name: value
        for name, value in environ.items()
        if name not in dropped and not name.startswith("TORCHELASTIC_")
    }
    kept |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}  # the model is a folder: nothing to ask the hub
    if settings.gpus:
        kept["CUDA_VISIBLE_DEVICES"] = settings.gpus
    if settings.device == "cpu":
        kept = {"OMP_NUM_THREADS": "1", **kept, **CPU_ENVIRONMENT}
    return kept


class JudgeServer:
    """The server as a context manager: healthy inside, gone after. `start` and `wait_until_healthy` apart let
    other work go on while it starts (half a minute and more); then `close` must be called."""

    def __init__(
        self, settings: ServerSettings, command: Callable[[ServerSettings, int], list[str]] = server_command
    ) -> None:
        """command: what serves /health and the judge on 127.0.0.1 and the given port."""
        self.settings = settings
        self._command = command
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._healthy = False
        # Bound, never listened on: the system gives the port to nobody else, and the server may still take it
        # (SO_REUSEADDR on both), in its second life too.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.port: int = self._reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the supervisor, and with it the server; returns at once."""
        settings = self.settings
        settings.log.parent.mkdir(parents=True, exist_ok=True)
        settings.log.touch()
        self._log_start = settings.log.stat().st_size  # a resumed run appends
        self._started = time.monotonic()
        self._supervisor = subprocess.Popen(
            [
                sys.executable, "-P", supervisor.__file__,  # -P: nothing in kaja/ hides a module of Python's
                "--port", str(self.port), "--log", str(settings.log),
                "--start-timeout", str(settings.start_timeout), "--", *self._command(settings, self.port),
            ],
            # Its end of stdin closes with this process, however it ends: Python gives ours to no other child.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=server_environment(settings, os.environ),
            start_new_session=True,  # Ctrl-C ends the run, and the run the server
        )  # fmt: skip
        _say(f"starting a server for {settings.name}; its log: {settings.log}")

    def wait_until_healthy(self) -> None:
        """UserError with what the log says if the server ends, or start_timeout passes, before it is healthy."""
        if self._healthy:
            return
        assert self._supervisor is not None and self._supervisor.stdout is not None, "start() comes first"
        while not select.select([self._supervisor.stdout], [], [], 60)[0]:
            _say(f"{self.settings.name} is still starting after {self._elapsed():.0f} s")
        if not self._supervisor.stdout.read(100):  # the supervisor has ended
            self.close()
            with self.settings.log.open("rb") as log:
                log.seek(self._log_start)
                said = telling_lines(log.read().decode(errors="replace"))
            raise UserError(
                f"judge {self.settings.name}: its server did not come up ({said}); {self.settings.log} has the "
                f"rest; mend what it names, or choose another --judge-model"
            )
        self._healthy = True
        _say(f"{self.settings.name} answers at {self.url} after {self._elapsed():.0f} s")

    def close(self) -> None:
        """End the server and all its processes, and wait for it: at most the supervisor's grace, 10 s, and 5."""
        if self._supervisor is not None:
            assert self._supervisor.stdin is not None and self._supervisor.stdout is not None
            self._supervisor.stdin.close()
            self._supervisor.wait()
            self._supervisor.stdout.close()
            self._supervisor = None
        self._reserved.close()

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def __enter__(self) -> "JudgeServer":
        try:
            self.start()
            self.wait_until_healthy()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def telling_lines(log: str, limit: int = 3) -> str:
    """What a log says went wrong, on one line: its first errors (a cause comes before its effects), else its end."""
    lines = [_LOG_PREFIX.sub("", line).strip() for line in log.splitlines()]
    errors = list(dict.fromkeys(line for line in lines if _ERROR_LINE.match(line)))
    return "; ".join(errors[:limit] or [line for line in lines if line][-limit:])


def _say(text: str) -> None:
    print(f"judge: {text}", file=sys.stderr, flush=True)
