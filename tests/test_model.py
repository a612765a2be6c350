"""CausalLM against transformers on tiny random models of every supported family; packing; refused configs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kaja.batching import Batch
from kaja.batching import pack as pack_tokens
from kaja.batching import pack_groups
from kaja.chat import TokenSequence
from kaja.checkpoint import load_model
from kaja.errors import UserError
from kaja.loss import policy_loss, sft_loss
from kaja.model import CausalLM, ModelConfig, init_weights, packed_attention, prefix_attention

VOCABULARY = 61
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# With theta 100 and head_dim 8 the wavelengths are 6, 20, 63 and 199: against a context of 32 the first is
# kept, the second interpolated and the others stretched.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-gqa": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2}),
    "llama-mqa": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1}),
    "llama-theta": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rms_norm_eps": 1e-3},
    ),
    "llama-3": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-head-dim": (LlamaConfig, LlamaForCausalLM, {"head_dim": 12}),  # 4 x 12 = 48, not 32
    "mistral": (MistralConfig, MistralForCausalLM, {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2}),
    "qwen2-tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 16}),
}
LENGTHS = [9, 1, 40, 4]


def random_transformers_model(family: str) -> PreTrainedModel:
    """Every parameter random, biases and norms too: what is ignored or mixed up must show."""
    config_class, model_class, options = FAMILIES[family]
    model = model_class(config_class(**(TINY | options), attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, CausalLM]:
    folder = tmp_path_factory.mktemp(request.param)
    expected = random_transformers_model(request.param)
    expected.save_pretrained(folder)
    return expected, load_model(folder)


def random_sequences(lengths: list[int], seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, labels) of each sequence; the labels are random too."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(VOCABULARY, (n,), generator=generator),
            torch.randint(VOCABULARY, (n,), generator=generator),
        )
        for n in lengths
    ]


def pack(sequences: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    lengths = [len(input_ids) for input_ids, _ in sequences]
    return {
        "input_ids": torch.cat([input_ids for input_ids, _ in sequences]),
        "labels": torch.cat([labels for _, labels in sequences]),
        "positions": torch.cat([torch.arange(n) for n in lengths]),
        "cu_seqlens": F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(),
    }


def transformers_outputs(
    model: PreTrainedModel, sequences: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """log-probs and entropies from one forward a sequence, joined."""
    log_probs, entropies = [], []
    for input_ids, labels in sequences:
        every = torch.log_softmax(model(input_ids[None], use_cache=False).logits[0].float(), -1)
        log_probs.append(every.gather(1, labels[:, None])[:, 0])
        entropies.append(-(every.exp() * every).sum(-1))
    return torch.cat(log_probs), torch.cat(entropies)


# --------------------------------------------------------------------------- parity with transformers


@pytest.mark.parametrize("lengths", [[17], [1], LENGTHS])
def test_log_probs_entropy_and_gradients(
    models: tuple[PreTrainedModel, CausalLM], lengths: list[int]
) -> None:
    reference, model = models
    sequences = random_sequences(lengths)
    weights = torch.randn(2, sum(lengths), generator=torch.Generator().manual_seed(2))
    reference.zero_grad()
    model.zero_grad()
    expected, expected_entropy = transformers_outputs(reference, sequences)
    (weights[0] @ expected + weights[1] @ expected_entropy).backward()
    log_probs, entropy = model(**pack(sequences), with_entropy=True)
    (weights[0] @ log_probs + weights[1] @ entropy).backward()

    assert log_probs.dtype == torch.float32
    assert len(expected) == 1 or expected.std().item() > 0.5  # the models do prefer some tokens
    torch.testing.assert_close(log_probs, expected, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0.0, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected_gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    # A sequence of one token has no gradient in its queries and keys but rounding: hence the floor.
    largest = max(wanted.norm().item() for wanted in expected_gradients.values() if wanted is not None)
    for name, wanted in expected_gradients.items():
        actual = gradients[name]
        assert actual is not None and wanted is not None, name
        assert (actual - wanted).norm().item() <= 1e-4 * wanted.norm().item() + 1e-6 * largest, name


def test_names_are_those_of_transformers(models: tuple[PreTrainedModel, CausalLM]) -> None:
    reference, model = models
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        name: tuple(value.shape) for name, value in reference.state_dict().items()
    }
    assert model.lm_head.weight.shape == (VOCABULARY, 32)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == reference.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_hidden_times_head_gives_the_logits(models: tuple[PreTrainedModel, CausalLM]) -> None:
    reference, model = models
    ((input_ids, _),) = random_sequences([11])
    with torch.no_grad():
        hidden = model(input_ids, torch.arange(11), torch.tensor([0, 11], dtype=torch.int32))
        expected = reference(input_ids[None]).logits[0]
    assert hidden.shape == (11, 32)
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, expected, rtol=0.0, atol=1e-5)


# --------------------------------------------------------------------------- packing


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_neighbours_in_the_stream_do_not_matter(
    models: tuple[PreTrainedModel, CausalLM], dtype: torch.dtype, tolerance: float
) -> None:
    model = CausalLM(models[1].config).to(dtype)
    model.load_state_dict(models[1].state_dict())
    one, *others = random_sequences([12, 5, 1, 30])
    changed = random_sequences([5, 2], seed=9)
    with torch.no_grad():
        alone = model(**pack([one]))[0]
        for before, after in (
            ([], others),
            (others, []),
            (others[:2], others[2:]),
            (changed[:1], changed[1:]),
        ):
            stream = pack([*before, one, *after])
            start = sum(len(input_ids) for input_ids, _ in before)
            packed = model(**stream)[0][start : start + 12]
            torch.testing.assert_close(packed, alone, rtol=0.0, atol=tolerance)


def test_a_sequence_does_not_see_its_future() -> None:
    model = tiny_model()
    ((input_ids, labels),) = random_sequences([10])
    changed = input_ids.clone()
    changed[6:] = (changed[6:] + 1) % VOCABULARY
    with torch.no_grad():
        before = model(**pack([(input_ids, labels)]))[0]
        after = model(**pack([(changed, labels)]))[0]
    assert torch.equal(before[:6], after[:6])
    assert not torch.isclose(before[6:], after[6:]).any()


def test_gradients_of_a_pack_are_the_sum_of_the_sequences() -> None:
    model = tiny_model().double()
    sequences = random_sequences(LENGTHS)
    model(**pack(sequences))[0].sum().backward()
    packed = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    for sequence in sequences:
        model(**pack([sequence]))[0].sum().backward()
    assert len(packed) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, packed[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_of_a_global_batch_split_into_micro_batches(size: int) -> None:
    """SFT and GRPO through the model in float32: neither loss nor gradient depends on the split."""
    model = tiny_model()
    sequences = random_sequences([7, 3, 12, 1, 5, 9, 2, 6])
    generator = torch.Generator().manual_seed(4)
    masks = [torch.rand(len(ids), generator=generator) < 0.7 for ids, _ in sequences]
    advantages = torch.randn(8, generator=generator)
    tokens = int(sum(mask.sum() for mask in masks))

    def loss_and_gradient(order: list[int], micro_batch: int) -> tuple[float, Tensor]:
        model.zero_grad()
        total = 0.0
        for start in range(0, 8, micro_batch):
            chosen = order[start : start + micro_batch]
            stream = pack([sequences[i] for i in chosen])
            mask = torch.cat([masks[i] for i in chosen])
            ids = torch.repeat_interleave(torch.arange(len(chosen)), stream["cu_seqlens"].diff())
            log_probs, _ = model(**stream, completion_mask=mask)
            old = log_probs.detach() + 0.1 * torch.sin(stream["labels"])
            policy, _ = policy_loss(
                log_probs,
                old,
                advantages[chosen][ids],
                mask,
                ids,
                ref_log_probs=old,
                kl_coef=0.1,
                denominator=8,
            )
            loss = policy + sft_loss(log_probs, mask, tokens)
            loss.backward()
            total += loss.item()
        return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    expected_loss, expected = loss_and_gradient(list(range(8)), 8)
    loss, gradient = loss_and_gradient([5, 2, 7, 0, 3, 6, 1, 4], size)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert (gradient - expected).norm().item() <= 1e-6 * expected.norm().item()


def test_masked_positions_are_zero_and_cost_no_gradient() -> None:
    model = tiny_model()
    stream = pack(random_sequences([6, 5]))
    mask = torch.tensor([False, True, True, False, True, True, False, False, False, True, True])
    full, full_entropy = model(**stream, temperature=0.8, with_entropy=True)
    stream["labels"] = stream["labels"].where(mask, -100)  # never looked at
    log_probs, entropy = model(**stream, completion_mask=mask, temperature=0.8, with_entropy=True)
    assert log_probs[~mask].tolist() == entropy[~mask].tolist() == [0.0] * 5
    torch.testing.assert_close(log_probs[mask], full[mask], rtol=0.0, atol=1e-6)
    torch.testing.assert_close(entropy[mask], full_entropy[mask], rtol=0.0, atol=1e-6)
    head = model.lm_head.weight
    (actual,) = torch.autograd.grad(log_probs.sum(), head)
    (expected,) = torch.autograd.grad(full[mask].sum(), head)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    nothing, _ = model(**stream, completion_mask=torch.zeros(11, dtype=torch.bool))
    nothing.sum().backward()
    assert nothing.tolist() == [0.0] * 11
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


# --------------------------------------------------------------------------- prompts that completions share


def random_groups() -> list[tuple[list[int], list[list[int]]]]:
    """Prompts of 9, 1, 20 and 2 tokens with 3, 2, 1 and 2 completions."""
    generator = torch.Generator().manual_seed(5)

    def tokens(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    sizes = {9: (3, 7, 1), 1: (4, 2), 20: (5,), 2: (1, 1)}
    return [(tokens(prompt), [tokens(length) for length in lengths]) for prompt, lengths in sizes.items()]


def trained_log_probs(model: CausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the completions' tokens, in order."""
    log_probs, entropy = model(
        batch.input_ids, batch.positions, batch.cu_seqlens, batch.labels, batch.completion_mask,
        with_entropy=True, prefixes=batch.prefixes,
    )  # fmt: skip
    return log_probs[batch.completion_mask], entropy[batch.completion_mask]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_a_shared_prompt_changes_neither_log_probs_nor_gradients(
    models: tuple[PreTrainedModel, CausalLM], dtype: torch.dtype, tolerance: float
) -> None:
    model = CausalLM(models[1].config).to(dtype)
    model.load_state_dict(models[1].state_dict())
    groups = random_groups()
    plain = pack_tokens([
        TokenSequence(prompt + completion, [False] * len(prompt) + [True] * len(completion))
        for prompt, completions in groups for completion in completions
    ])  # fmt: skip
    shared = pack_groups(groups)
    assert len(shared.input_ids) == 8 + 0 + 19 + 1 + 24 and len(plain.input_ids) == 8 * 3 + 0 + 19 + 1 * 2 + 24
    weights = torch.randn(2, 24, generator=torch.Generator().manual_seed(6)).to(dtype)
    outputs, gradients = [], []
    for batch in (plain, shared):
        model.zero_grad()
        log_probs, entropy = trained_log_probs(model, batch)
        (weights[0] @ log_probs + weights[1] @ entropy).backward()
        outputs.append(torch.stack([log_probs, entropy]).detach())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.0, atol=10 * tolerance)
    largest = max(gradient.norm().item() for gradient in gradients[0].values())
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).norm().item()
        assert error <= tolerance * (10 * expected.norm().item() + largest), name


def test_a_completion_does_not_see_the_others_of_its_prompt() -> None:
    model, groups = tiny_model(), random_groups()
    with torch.no_grad():
        before, _ = trained_log_probs(model, pack_groups(groups))
        groups[0][1][1][2] = (groups[0][1][1][2] + 1) % VOCABULARY  # of the second completion, tokens 3 to 9 of all
        after, _ = trained_log_probs(model, pack_groups(groups))
        changed = (before - after).abs() > 1e-6
        assert changed.nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
        groups[0][0][4] = (groups[0][0][4] + 1) % VOCABULARY
        after, _ = trained_log_probs(model, pack_groups(groups))
        assert ((before - after).abs() > 1e-6).nonzero().flatten().tolist() == list(range(11))  # all of this prompt


def varlen_attn_as_documented(
    queries: Tensor, keys: Tensor, values: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int,
    max_keys: int, *, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """Flash attention's contract: query i of n sees the keys up to i + m - n of m, where the window is (-1, 0)."""
    assert window_size == (-1, 0) and enable_gqa == (queries.shape[1] != keys.shape[1])
    assert cu_queries.dtype == cu_keys.dtype == torch.int32 and len(cu_queries) == len(cu_keys)
    assert (cu_queries.diff().max(), cu_keys.diff().max()) == (max_queries, max_keys)
    outputs = []
    for number in range(len(cu_queries) - 1):
        of_queries, of_keys = (slice(*cu[number : number + 2].tolist()) for cu in (cu_queries, cu_keys))
        q, k, v = queries[of_queries], keys[of_keys], values[of_keys]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        last_seen = torch.arange(len(q)) + len(k) - len(q)
        hidden = torch.arange(len(k)) > last_seen[:, None]
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def test_the_gpus_way_to_share_prompts_gives_flash_attention_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack_groups(random_groups())
    assert batch.prefixes is not None
    inputs = torch.randn(len(batch.input_ids), 8, 8, dtype=torch.float64).split([4, 2, 2], dim=1)
    expected = prefix_attention(batch.cu_seqlens, batch.prefixes)(0, *inputs)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn_as_documented)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "is_cuda", True)
        attend = prefix_attention(batch.cu_seqlens, batch.prefixes)
    torch.testing.assert_close(attend(0, *inputs), expected, rtol=0.0, atol=1e-13)
    assert attend.__name__ == "attend_cuda"


# --------------------------------------------------------------------------- other attention strategies


def tiny_model(seed: int = 0) -> CausalLM:
    model = CausalLM(ModelConfig.from_hf(LlamaConfig(**(TINY | {"num_key_value_heads": 2})).to_dict()))
    init_weights(model, seed, std=0.2)
    return model


def test_dense_attention_as_a_strategy() -> None:
    """The same stream through one dense block-diagonal causal mask, written out with softmax."""
    model = tiny_model()
    stream = pack(random_sequences(LENGTHS))
    total = len(stream["input_ids"])
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    allowed = (owner[:, None] == owner[None, :]) & torch.ones(total, total, dtype=torch.bool).tril()
    layers = []

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        layers.append(layer)
        assert queries.shape == (total, 4, 8) and keys.shape == values.shape == (total, 2, 8)
        keys, values = keys.repeat_interleave(2, dim=1), values.repeat_interleave(2, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / 8**0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), values)

    with torch.no_grad():
        dense = model.model(stream["input_ids"], stream["positions"], attend)
        packed = model(stream["input_ids"], stream["positions"], stream["cu_seqlens"])
    assert layers == [0, 1]
    torch.testing.assert_close(dense, packed, rtol=0.0, atol=1e-5)


def test_decoding_with_a_cache() -> None:
    """Token by token with cached keys and values, as a generation engine does."""
    model = tiny_model()
    ((input_ids, _),) = random_sequences([13])
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if layer in cache:
            keys, values = torch.cat([cache[layer][0], keys]), torch.cat([cache[layer][1], values])
        cache[layer] = keys, values
        return F.scaled_dot_product_attention(
            queries.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), enable_gqa=True
        ).transpose(0, 1)

    with torch.no_grad():
        steps = [model.model(input_ids[t : t + 1], torch.tensor([t]), attend) for t in range(13)]
        whole = model(input_ids, torch.arange(13), torch.tensor([0, 13], dtype=torch.int32))
    torch.testing.assert_close(torch.cat(steps), whole, rtol=0.0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
def test_flash_attention_equals_sdpa() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (
        torch.randn(54, heads, 64, generator=generator).bfloat16() for heads in (4, 2, 2)
    )
    cu_seqlens = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    expected = packed_attention(cu_seqlens)(0, queries.float(), keys.float(), values.float())
    actual = packed_attention(cu_seqlens.cuda())(0, queries.cuda(), keys.cuda(), values.cuda())
    torch.testing.assert_close(actual.float().cpu(), expected, rtol=0.02, atol=0.02)
    prefixes = torch.tensor([-1, -1, 0, 0])
    expected = prefix_attention(cu_seqlens, prefixes)(0, queries.float(), keys.float(), values.float())
    actual = prefix_attention(cu_seqlens.cuda(), prefixes.cuda())(0, queries.cuda(), keys.cuda(), values.cuda())
    torch.testing.assert_close(actual.float().cpu(), expected, rtol=0.02, atol=0.02)


# --------------------------------------------------------------------------- configurations


def hub_config(**changes: Any) -> dict[str, Any]:
    """A config.json as before transformers 5, like those on the hub: rope_theta beside rope_scaling."""
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
    } | changes


def test_llm_jp_3_13b() -> None:
    config = ModelConfig.from_hf(
        hub_config(
            vocab_size=99584,
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
        )
    )
    assert (config.head_dim, config.num_key_value_heads, config.rms_norm_eps) == (128, 40, 1e-5)
    with torch.device("meta"):
        model = CausalLM(config)
    # 2 x 99,584 x 5,120 + 40 x (4 x 5,120^2 + 3 x 5,120 x 13,824 + 2 x 5,120) + 5,120
    assert sum(parameter.numel() for parameter in model.parameters()) == 13_707_924_480
    assert not config.tie_word_embeddings


def test_llm_jp_3_980m_has_wide_heads() -> None:
    config = ModelConfig.from_hf(hub_config(hidden_size=1536, num_attention_heads=8, head_dim=192))
    assert config.head_dim == 192 and config.num_key_value_heads == 8


@pytest.mark.parametrize("family", ["llama-3", "llama-theta"])
def test_old_and_new_config_files_mean_the_same(family: str) -> None:
    new = random_transformers_model(family).config.to_dict()
    rope = dict(new["rope_parameters"])
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    assert ModelConfig.from_hf(json.loads(json.dumps(old))) == ModelConfig.from_hf(
        json.loads(json.dumps(new))
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 4096},  # not shorter than the context
        {"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False},  # written, but not used
        {"model_type": "qwen3", "sliding_window": None, "use_sliding_window": False},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},  # the oldest spelling
    ],
)
def test_accepted_configs(changes: dict[str, Any]) -> None:
    assert ModelConfig.from_hf(hub_config(**changes)).hidden_size == 32


@pytest.mark.parametrize(
    "changes,key,supported",
    [
        ({"model_type": "gpt_neox"}, "model_type", "qwen3"),
        ({"model_type": None}, "model_type", "llama"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope", "llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope", "llama3"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope", "llama3"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
            "1.0",
        ),
        ({"hidden_act": "gelu"}, "hidden_act", "silu"),
        ({"attention_bias": True}, "attention_bias", "false"),
        ({"mlp_bias": True}, "mlp_bias", "false"),
        ({"model_type": "mistral", "sliding_window": 1024}, "sliding_window", "4096"),
        (
            {"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": True},
            "sliding_window",
            "4096",
        ),
        ({"hidden_size": None}, "hidden_size", "number"),
    ],
)
def test_refused_configs(changes: dict[str, Any], key: str, supported: str) -> None:
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf(hub_config(**changes))
    message = str(error.value)
    assert key in message and supported in message and "\n" not in message


def test_a_refused_folder(tmp_path: Path) -> None:
    reference = random_transformers_model("llama")
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "mamba"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="model_type"):
        load_model(tmp_path)


# --------------------------------------------------------------------------- fresh weights


def test_init_weights() -> None:
    config = ModelConfig.from_hf(
        Qwen2Config(**(TINY | {"hidden_size": 128, "num_hidden_layers": 8})).to_dict()
    )
    state = torch.get_rng_state()
    one, same, other = CausalLM(config), CausalLM(config), CausalLM(config)
    torch.set_rng_state(state)
    for model, seed in ((one, 0), (same, 0), (other, 1)):
        init_weights(model, seed)
    assert torch.equal(torch.get_rng_state(), state)  # its own generator
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters()):
        assert torch.equal(a, b), name
        if name.endswith("norm.weight"):
            assert bool((a == 1).all()), name
        elif name.endswith("bias"):
            assert not a.any(), name
        else:
            assert not torch.equal(a, c), name
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert a.std().item() == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.1), name
