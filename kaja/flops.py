"""How much arithmetic training needs, and how much the device could do: together the MFU.

MFU (model FLOP/s utilisation) = FLOPs that the mathematics needs / seconds / peak FLOP/s of the device. What an
implementation does twice (activation checkpointing, logits computed again in the backward, flash attention's
scores) is not counted, so such work lowers the MFU.

Causal attention is counted as half of the square: a token looks at itself and what is before it. PaLM (arXiv
2204.02311, appendix B) and llm-foundry count the whole square, which makes their MFU higher: for llm-jp-3-13b and
sequences of 4,096 tokens by 6%, for short samples by nothing.
"""

import re
import time
from collections.abc import Sequence

import torch

from kaja.model import ModelConfig

# Dense bfloat16 matrix products with float32 sums, in TFLOP/s, from NVIDIA's data sheets (which advertise twice as
# much for sparse matrices). A name matches as whole words; the first match counts, so special models come first.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250,
    "H200 NVL": 835, "H200": 989, "GH200": 989,
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800 PCIe": 756, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "A40": 149.7, "A30": 165, "A10": 125, "RTX A6000": 154.8, "RTX A5000": 111.1,
    "L40S": 362, "L40": 181, "L4": 121, "RTX 6000 Ada": 364.2,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip
MEASURE_SECONDS = 0.05


def weights_per_token(config: ModelConfig) -> int:
    """Weights of all blocks that each token is multiplied with: all matrices, but not embedding, head and norms."""
    query_size = config.num_attention_heads * config.head_dim
    key_size = config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * query_size + 2 * key_size)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp)


def train_flops(config: ModelConfig, lengths: Sequence[int], trained_tokens: int) -> float:
    """Floating-point operations of one forward and backward; a multiplication and an addition are two.

    Args:
        lengths: tokens of each sequence.
        trained_tokens: how many of them are trained on: only those go through the head. The embedding is a
            look-up and costs nothing.

    A weight costs 2 operations per token forward and 4 backward. Attention of n tokens is two products
    (scores, then values) of n^2 / 2 pairs by num_attention_heads * head_dim, in every block; grouped
    key/value heads save memory, not arithmetic.
    """
    query_size = config.num_attention_heads * config.head_dim
    pairs = sum(length * length for length in lengths) / 2
    blocks = sum(lengths) * weights_per_token(config)
    head = trained_tokens * config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * 2 * pairs * query_size
    return 6.0 * (blocks + head + attention)


def peak_flops(device: torch.device) -> float:
    """FLOP/s of the device at best: the data sheet's for a known GPU, else that of a measured matrix product."""
    if device.type == "cuda":
        known = data_sheet_flops(torch.cuda.get_device_name(device))
        return known or measured_flops(device, torch.bfloat16, size=4096)
    return measured_flops(device, torch.float32, size=1024)


def data_sheet_flops(device_name: str) -> float | None:
    """Peak of a GPU by the name that CUDA gives it, such as "NVIDIA H100 80GB HBM3"; None if it is not known."""
    for name, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return tflops * 1e12
    return None


def measured_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The fastest of the square matrix products that MEASURE_SECONDS allow."""
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    fastest, spent = float("inf"), 0.0
    left @ right  # the first call loads libraries
    while spent < MEASURE_SECONDS:
        _synchronize(device)
        started = time.perf_counter()
        left @ right
        _synchronize(device)
        seconds = time.perf_counter() - started
        fastest, spent = min(fastest, seconds), spent + seconds
    return 2.0 * size**3 / fastest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
