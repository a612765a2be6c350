"""The arithmetic of a training step against torch's own count, and peaks of known GPUs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kaja.dry_run import model_config_of
from kaja.flops import data_sheet_flops, peak_flops, train_flops
from kaja.loss import sft_loss
from kaja.model import CausalLM, ModelConfig

LLM_JP_13B = model_config_of("llm-jp/llm-jp-3-13b")
# Grouped key/value heads, and a head_dim that is not hidden_size / heads.
GROUPED = ModelConfig(
    vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=20, max_position_embeddings=64, rms_norm_eps=1e-5,
    rope={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip


def test_forward_and_backward_equal_torchs_count() -> None:
    lengths, trained = [24, 7], 12
    total = sum(lengths)
    model = CausalLM(GROUPED)
    ids = torch.randint(300, (total,))
    positions = torch.cat([torch.arange(length) for length in lengths])
    mask = torch.arange(total) < trained

    def addmm(total: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
        return 2 * left[0] * left[1] * right[1]

    # torch knows addmm, but not addmm_; and it does not count the CPU's fused attention, but the plain one.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm})
    with counter, sdpa_kernel(SDPBackend.MATH):
        log_probs, _ = model(ids, positions, torch.tensor([0, 24, 31], dtype=torch.int32), ids, mask)
        sft_loss(log_probs, mask, denominator=trained).backward()
    # torch counts the whole square of attention, of which the mathematics needs half; and the head's logits twice,
    # because the backward computes them again.
    other_half = 3 * 6 * (24**2 + 7**2) * 4 * 20
    logits_again = 2 * trained * 300 * 48
    assert counter.get_total_flops() == train_flops(GROUPED, lengths, trained) + other_half + logits_again


def test_short_sequences_cost_six_operations_per_weight_and_token() -> None:
    with torch.device("meta"):
        model = CausalLM(LLM_JP_13B)
    weights = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    assert train_flops(LLM_JP_13B, [2] * 500, 1000) == pytest.approx(6 * weights * 1000, rel=1e-4)


def test_only_trained_tokens_pay_for_the_head() -> None:
    difference = train_flops(LLM_JP_13B, [100], 90) - train_flops(LLM_JP_13B, [100], 30)
    assert difference == 60 * 6 * 99584 * 5120


def test_attention_grows_with_the_square_of_each_sequence() -> None:
    joined, apart = train_flops(LLM_JP_13B, [4096], 0), train_flops(LLM_JP_13B, [2048, 2048], 0)
    assert joined - apart == 40 * 6 * 5120 * 2 * 2048**2


@pytest.mark.parametrize(
    ("gpu", "length", "tokens_per_second", "published"),
    [("NVIDIA H100 80GB HBM3", 4096, 4717, 0.416), ("NVIDIA A100-SXM4-40GB", 2048, 1668, 0.439)],
)
def test_published_mfu_of_13b(gpu: str, length: int, tokens_per_second: int, published: float) -> None:
    # llm-foundry's 13B is not llm-jp's, and its count has the whole square: near, not equal.
    peak = data_sheet_flops(gpu)
    assert peak is not None
    mfu = tokens_per_second * train_flops(LLM_JP_13B, [length], length) / length / peak
    assert mfu == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10", 125),
        ("NVIDIA RTX A6000", 154.8), ("NVIDIA RTX 6000 Ada Generation", 364.2), ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)  # fmt: skip
def test_data_sheet_of(name: str, tflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == tflops * 1e12


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-16GB", "NVIDIA A10G", "NVIDIA RTX A4000", "AMD Instinct MI300X"])
def test_unknown_gpus_are_not_taken_for_others(name: str) -> None:
    assert data_sheet_flops(name) is None


def test_the_cpu_is_measured() -> None:
    assert 1e8 < peak_flops(torch.device("cpu")) < 1e14
