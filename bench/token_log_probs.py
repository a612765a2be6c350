"""Time and memory of kaja.loss.token_log_probs against the full-logits way, forward and backward.

1. Every measurement is a fresh process, so that no variant inherits the other's memory.
2. Peak memory is the highest resident size above that before the forward, without the gradients of the inputs
   (both variants must make those).
3. Time is the median of the rounds; the variants alternate, so that a busy machine slows both alike.

    OMP_NUM_THREADS=1 python bench/token_log_probs.py
    python bench/token_log_probs.py --columns 512 2048 8192 --entropy --rounds 5

Targets (float32, D 512, T 2,048, V 99,584): memory below 1/5 of the full-logits way, time at most 1.10 times.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kaja.loss import token_log_probs  # noqa: E402

FULL, EQUAL = "full logits", "equal gradients"  # the latter is what SFT takes on a CPU
MIB = 2**20


def full_logits_way(
    hidden: Tensor, weight: Tensor, labels: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """What one writes without thinking of memory: (T, V) logits, their log_softmax, and a gather."""
    log_probs = torch.log_softmax(hidden @ weight.T, dim=-1)
    entropies = -(log_probs.exp() * log_probs).sum(-1) if entropy else None
    return log_probs.gather(-1, labels[:, None]).squeeze(-1), entropies


def forward_backward(
    hidden: Tensor, weight: Tensor, labels: Tensor, variant: str, entropy: bool
) -> None:
    if variant == FULL:
        log_probs, entropies = full_logits_way(hidden, weight, labels, entropy)
    else:
        sizes = {} if variant == EQUAL else {"num_columns": int(variant.split()[0])}
        log_probs, entropies = token_log_probs(
            hidden, weight, labels, with_entropy=entropy, equal_gradients=variant == EQUAL, **sizes
        )
    loss = -log_probs.mean() if entropies is None else -(log_probs + 0.01 * entropies).mean()
    loss.backward()


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, as Linux reports them."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert match is not None, f"/proc/self/status has no {field}: this benchmark needs Linux"
    return int(match.group(1)) * 1024


def measure(args: argparse.Namespace, variant: str) -> dict[str, float]:
    """In a fresh process: the time of one forward and backward, and its peak memory in MiB."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.tokens, args.width, generator=generator)
    weight = torch.randn(args.vocabulary, args.width, generator=generator) * args.width**-0.5
    labels = torch.randint(args.vocabulary, (args.tokens,), generator=generator)
    for name in ("warm-up", "measured"):  # the warm-up loads the libraries, on a few rows of the vocabulary
        rows = 64 if name == "warm-up" else args.vocabulary
        inputs = hidden.clone().requires_grad_(), weight[:rows].clone().requires_grad_()
        start_bytes = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
        start = time.perf_counter()
        forward_backward(*inputs, labels.clamp(max=rows - 1), variant, args.entropy)
        seconds = time.perf_counter() - start
    gradients = sum(tensor.grad.nbytes for tensor in inputs if tensor.grad is not None)
    peak = resident_bytes("VmHWM") - start_bytes - gradients
    return {"seconds": seconds, "mebibytes": peak / MIB}


def run_in_subprocess(variant: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
    finished = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    result: dict[str, float] = json.loads(finished.stdout)
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=99584)
    parser.add_argument("--columns", type=int, nargs="+", default=[2048], help="num_columns to try")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant")
    parser.add_argument("--entropy", action="store_true", help="ask for the entropy as well")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # set for the child processes
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.variant is not None:
        print(json.dumps(measure(args, args.variant)))
        return
    variants = [FULL, *(f"{size} columns" for size in args.columns)]
    if not args.entropy:
        variants.append(EQUAL)
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant in variants:
            results[variant].append(run_in_subprocess(variant))
    print(
        f"T {args.tokens:,}  D {args.width:,}  V {args.vocabulary:,}  float32, "
        f"{torch.get_num_threads()} threads, {'with' if args.entropy else 'without'} entropy, "
        f"median of {args.rounds}\n"
    )
    print(f"{'':18}{'seconds':>10}{'(range)':>18}{'MiB':>10}{'time ratio':>14}{'memory ratio':>14}")
    medians = {}
    for variant in variants:
        seconds = [result["seconds"] for result in results[variant]]
        medians[variant] = statistics.median(seconds), max(result["mebibytes"] for result in results[variant])
        time_ratio, memory_ratio = (mine / full for mine, full in zip(medians[variant], medians[FULL]))
        spread = f"({min(seconds):.2f}-{max(seconds):.2f})"
        print(
            f"{variant:18}{medians[variant][0]:>10.2f}{spread:>18}{medians[variant][1]:>10.0f}"
            f"{time_ratio:>14.2f}{memory_ratio:>14.3f}"
        )
    print("\ntargets: time ratio at most 1.10, memory ratio below 0.200")


if __name__ == "__main__":
    main()
