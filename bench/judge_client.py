"""Judging by the client against vLLM offline: the same requests, the same tiny model, the same machine.

1. The client: kaja.server_judge, in this process, asks vLLM's server, which kaja.judge_server starts.
2. Offline: vllm.LLM.chat with the same messages and the same constraint, all requests at once, in one process.
3. Both judge 64 questions x 8 completions a round; each round has new texts, so that of the prefix cache only what
   a training step would find is found (the rubric, and what the completions of one question share).
4. The rounds alternate, and while one side works the other is idle; the figure is the median. Round 0 warms up.

    python bench/judge_client.py
    python bench/judge_client.py --reading expected --rounds 5

Target: at least 0.9 of the requests per second of offline. Client, server and engine are three processes, offline
is one: this needs two free cores. The CPU seconds, which others' work hardly changes, say what a round costs in all.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"
from kaja.data import Example  # noqa: E402
from kaja.demo_corpus import QUESTIONS, good_answer, topics  # noqa: E402
from kaja.judge_server import CPU_BATCH_TOKENS, CPU_ENVIRONMENT, JudgeServer, ServerSettings  # noqa: E402
from kaja.rubric import DIGITS, READINGS, judge_messages  # noqa: E402
from kaja.server_judge import ServerJudge  # noqa: E402

MODEL = ROOT / "kaja" / "demo_data" / "model"
MAX_LENGTH = 1024
CACHE_BYTES = 256 << 20


def requests(number: int, args: argparse.Namespace) -> tuple[list[Example], list[str]]:
    """The examples and completions of a round."""
    rng = random.Random(number)
    examples, completions = [], []
    for index in range(args.questions):
        topic = rng.choice(topics())
        question = f"({number}-{index}) " + rng.choice(QUESTIONS).format(topic.text)
        example = Example(str(index), "bench", topic.stream, question, reference=good_answer(topic, rng))
        for place in range(args.completions):
            examples.append(example)
            completions.append(f"({place}) {good_answer(topic, rng)}")
    return examples, completions


def offline(args: argparse.Namespace) -> None:
    """In a process of its own: a round for each number on stdin, its figures on stdout."""
    os.environ.update(CPU_ENVIRONMENT, VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(
        model=str(MODEL), max_model_len=MAX_LENGTH, dtype="float32", enforce_eager=True, block_size=32,
        enable_chunked_prefill=False, max_num_batched_tokens=CPU_BATCH_TOKENS, kv_cache_memory_bytes=CACHE_BYTES,
        generation_config="vllm", logprobs_mode="processed_logprobs",
    )  # fmt: skip
    if args.reading == "digit":
        constraint = StructuredOutputsParams(choice=list(DIGITS))
        parameters = SamplingParams(temperature=0, max_tokens=1, structured_outputs=constraint)
    else:
        parameters = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    print("ready", flush=True)
    for line in sys.stdin:
        examples, completions = requests(int(line), args)
        start, cpu_start = time.perf_counter(), time.process_time()
        chats = [
            judge_messages(example.stream, example.question, example.reference, completion, merge_system=True)
            for example, completion in zip(examples, completions)
        ]
        outputs = llm.chat(chats, parameters, use_tqdm=False)
        seconds = time.perf_counter() - start
        print(json.dumps({
            "seconds": seconds,
            "cpu_seconds": time.process_time() - cpu_start,
            "texts": [output.outputs[0].text for output in outputs],
            "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
            "cached_tokens": sum(output.num_cached_tokens for output in outputs),
        }), flush=True)  # fmt: skip


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def client_round(
    judge: ServerJudge, processes: list[psutil.Process], number: int, args: argparse.Namespace
) -> dict[str, Any]:
    examples, completions = requests(number, args)
    start, cpu_start = time.perf_counter(), cpu_seconds(processes)
    verdicts = judge.judge(examples, completions)
    seconds = time.perf_counter() - start
    failed = [verdict for verdict in verdicts if verdict.score is None]
    if failed and args.reading == "digit":  # the demo's model was not made to judge: freely it says no digit
        sys.exit(f"error: {len(failed)} of {len(verdicts)} verdicts failed, the first: {failed[0]}")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds(processes) - cpu_start,
        "texts": [verdict.text for verdict in verdicts],
        "prompt_tokens": sum(verdict.cost.prompt_tokens for verdict in verdicts),
        "cached_tokens": sum(verdict.cost.cached_tokens for verdict in verdicts),
    }


def report(rounds: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    count = args.questions * args.completions
    rates = {}
    for side, results in rounds.items():
        seconds = [result["seconds"] for result in results]
        tokens, cached = (sum(result[name] for result in results) for name in ("prompt_tokens", "cached_tokens"))
        rates[side] = count / statistics.median(seconds)
        print(
            f"{side:8} {rates[side]:7.1f} requests/s (median of {', '.join(f'{each:.2f}' for each in seconds)} s), "
            f"{statistics.median(result['cpu_seconds'] for result in results):.2f} CPU-s a round, "
            f"{tokens / len(results) / count:.0f} tokens a prompt, {cached / tokens:.1%} of them cached"
        )
    if args.reading == "digit":
        pairs = [pair for both in zip(*rounds.values()) for pair in zip(*(result["texts"] for result in both))]
        print(f"the same digit: {sum(one == other for one, other in pairs)} of {len(pairs)}")
    print(f"client / offline: {rates['client'] / rates['offline']:.2f} (target: 0.9)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--reading", choices=READINGS, default="digit")
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.offline:
        offline(args)
        return
    peer = subprocess.Popen(
        [sys.executable, *sys.argv, "--offline"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert peer.stdin is not None and peer.stdout is not None

    def offline_round(number: int) -> dict[str, Any]:
        print(number, file=peer.stdin, flush=True)
        return dict(json.loads(peer.stdout.readline()))

    with tempfile.TemporaryDirectory() as folder:
        settings = ServerSettings(
            MODEL, "judge", MAX_LENGTH, Path(folder) / "server.log", "cpu", kv_cache_memory_bytes=CACHE_BYTES
        )
        with JudgeServer(settings) as server, closing(
            ServerJudge(
                server.url, "judge", reading=args.reading, merge_system=True, concurrency=args.concurrency
            )
        ) as judge:
            judge.probe()
            processes = [process for process in psutil.Process().children(recursive=True) if process.pid != peer.pid]
            processes.append(psutil.Process())
            while peer.stdout.readline() != "ready\n":
                pass
            sides: dict[str, Callable[[int], dict[str, Any]]] = {
                "client": lambda number: client_round(judge, processes, number, args),
                "offline": offline_round,
            }
            rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for number in range(args.rounds + 1):
                for side, judge_all in sides.items():
                    result = judge_all(number)
                    if number:
                        rounds[side].append(result)
    peer.stdin.close()
    peer.wait()
    report(rounds, args)


if __name__ == "__main__":
    main()
