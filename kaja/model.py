"""The Llama family on packed token streams, with Hugging Face parameter names.

A batch is one stream of T tokens: sequences end to end, no padding, `cu_seqlens` marking the borders.
Everything except attention is position-wise, so only attention needs to know where a sequence ends.
That knowledge sits in one function, `attend`, handed down through the layers: packed causal attention
for training and scoring (below), a KV cache for generation (kaja/engine.py).

Supported: Llama 1-3 (llm-jp-3, calm3, ELYZA), Mistral without sliding window, Qwen2, Qwen3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaja.errors import UserError
from kaja.loss import token_log_probs

# (layer, queries (T, H, d), keys (T, K, d), values (T, K, d)) -> (T, H, d)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, in the names of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: dict[str, Any]  # rope_type, rope_theta and the scaling's own keys
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """From the dictionary of a config.json; UserError names a key that this model cannot honour."""
        _check_supported(config)
        heads = config["num_attention_heads"]
        # transformers 5 writes rope_parameters; before, rope_theta stood beside rope_scaling.
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope.setdefault("rope_type", rope.pop("type", "default"))
        rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=rope,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            qkv_bias=config["model_type"] == "qwen2",
            qk_norm=config["model_type"] == "qwen3",
        )


def _check_supported(config: dict[str, Any]) -> None:
    def refuse(key: str, value: Any, rule: str) -> None:
        raise UserError(f"config.json: {key} is {value!r}; {rule}; use a model of a supported kind")

    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(config.get(key), int):
            refuse(key, config.get(key), "it must be a whole number")
    if config.get("model_type") not in MODEL_TYPES:
        refuse("model_type", config.get("model_type"), f"kaja knows {', '.join(MODEL_TYPES)}")
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", config["hidden_act"], "only 'silu' is supported")
    for key in ("mlp_bias", "attention_bias"):
        if config.get(key):
            refuse(key, config[key], "only false is supported (Qwen2's qkv bias is built in)")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        refuse(key, rope_type, f"the rope types known are {', '.join(ROPE_TYPES)}")
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        refuse("partial_rotary_factor", partial, "only 1.0 is supported")
    window, context = config.get("sliding_window"), config.get("max_position_embeddings", 2048)
    uses_window = config.get("use_sliding_window", config["model_type"] == "mistral")
    if uses_window and window is not None and window < context:
        refuse("sliding_window", window, f"it must be null or at least max_position_embeddings ({context})")


# ---------------------------------------------------------------------------------------------------
# Attention over a packed stream
# ---------------------------------------------------------------------------------------------------


def packed_attention(cu_seqlens: Tensor) -> Attend:
    """Causal attention inside each sequence of a packed stream, none across.

    Args:
        cu_seqlens: (B + 1,) int32, 0 and then the end of each sequence; the last is T.

    On CUDA: torch's variable-length flash attention. On CPU: SDPA, sequence by sequence.
    """
    lengths = cu_seqlens.diff()
    if cu_seqlens.is_cuda:
        longest = int(lengths.max())

        def attend_cuda(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return flash_attention(queries, keys, values, cu_seqlens, cu_seqlens, longest, longest)

        return attend_cuda

    sizes = lengths.tolist()

    def attend_cpu(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        grouped = queries.shape[1] != keys.shape[1]
        # (T, heads, d) -> (1, heads, T, d): without the batch dimension SDPA takes a kernel of quadratic memory.
        queries, keys, values = (x.transpose(0, 1)[None] for x in (queries, keys, values))
        outputs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            for q, k, v in zip(queries.split(sizes, 2), keys.split(sizes, 2), values.split(sizes, 2))
        ]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)

    return attend_cpu


def prefix_attention(cu_seqlens: Tensor, prefixes: Tensor) -> Attend:
    """packed_attention where a sequence may go on from another one, its prefix, and sees all of that too.

    So it has more keys than queries: its prefix's and its own, of which its last position sees all.

    Args:
        cu_seqlens: (B + 1,) int32, as in packed_attention.
        prefixes: (B,) int64, the sequence that each one goes on from, -1: none. A prefix goes on from none itself.
    """
    sizes, sources = cu_seqlens.diff().tolist(), prefixes.tolist()
    if cu_seqlens.is_cuda:
        places = torch.arange(sum(sizes), device=cu_seqlens.device).split(sizes)
        seen = [own if source < 0 else torch.cat([places[source], own]) for source, own in zip(sources, places)]
        key_sizes = [len(indices) for indices in seen]
        indices, cu_keys = torch.cat(seen), F.pad(torch.tensor(key_sizes).cumsum(0), (1, 0)).to(cu_seqlens)

        def attend_cuda(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return flash_attention(
                queries, keys[indices], values[indices], cu_seqlens, cu_keys, max(sizes), max(key_sizes)
            )

        return attend_cuda

    masks = [  # (queries, keys), True = seen; None: as in packed_attention
        None if source < 0 else torch.ones(size, sizes[source] + size, dtype=torch.bool).tril(sizes[source])
        for size, source in zip(sizes, sources)
    ]

    def attend_cpu(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        grouped = queries.shape[1] != keys.shape[1]
        # split, not slices: the gradient of a slice is as long as the stream.
        q, k, v = (x.transpose(0, 1)[None].split(sizes, 2) for x in (queries, keys, values))
        outputs = []
        for own, (source, mask) in enumerate(zip(sources, masks)):
            its_keys = k[own] if mask is None else torch.cat([k[source], k[own]], dim=2)
            its_values = v[own] if mask is None else torch.cat([v[source], v[own]], dim=2)
            outputs.append(F.scaled_dot_product_attention(
                q[own], its_keys, its_values, mask, is_causal=mask is None, enable_gqa=grouped
            ))  # fmt: skip
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)

    return attend_cpu


def flash_attention(
    queries: Tensor, keys: Tensor, values: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int
) -> Tensor:
    """torch's variable-length flash attention, on CUDA only; causal: a sequence's last query sees its last key."""
    from torch.nn.attention.varlen import varlen_attn  # its import brings torch's compiler: 0.6 s

    output = varlen_attn(
        queries, keys, values, cu_queries, cu_keys, max_queries, max_keys,
        window_size=(-1, 0), enable_gqa=queries.shape[1] != keys.shape[1],
    )  # fmt: skip
    return cast(Tensor, output)  # a tuple only when more is asked for


# ---------------------------------------------------------------------------------------------------
# Rotary position embedding
# ---------------------------------------------------------------------------------------------------


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """(head_dim / 2,) float32 radians per position (RoFormer, arXiv 2104.09864), scaled as the config says."""
    rope = config.rope
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
        wavelengths = 2 * torch.pi / frequencies
        context = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((context / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / rope["factor"]
    return frequencies


def rotary_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (T,) -> cos and sin, each (T, 1, head_dim); computed in float32."""
    angles = positions[:, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (T, heads, head_dim) by its positions' angles; pairs are (i, i + head_dim/2) as in HF."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# ---------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return self.o_proj(attend(self.layer, *self.project(x, cos, sin)).flatten(1))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) -> queries (T, H, d) and keys (T, K, d), turned by their positions, and values (T, K, d)."""
        queries = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        keys = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        values = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if hasattr(self, "q_norm"):
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return rotate(queries, cos, sin), rotate(keys, cos, sin), values


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return self.add_mlp(x + self.self_attn(self.input_layernorm(x), cos, sin, attend))

    def add_mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(T,) ids and positions -> (T, D) hidden states after the final norm."""
        x = self.embed_tokens(input_ids)
        # Made here, not kept as a buffer: cheap, and safe when the model is born on the meta device.
        frequencies = rotary_frequencies(self.config).to(x.device)
        cos, sin = rotary_angles(positions, frequencies, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        return self.norm(x)


class CausalLM(nn.Module):
    """Decoder and output head. Parameter names equal those of transformers' *ForCausalLM."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        labels: Tensor | None = None,
        completion_mask: Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
        top_p: float = 1.0,
        top_k: int = 0,
        equal_gradients: bool = False,
        prefixes: Tensor | None = None,
    ) -> Any:
        """One packed stream through the model.

        Args:
            input_ids, positions: (T,) int64; positions start at 0 in each sequence that goes on from none.
            cu_seqlens: (B + 1,) int32 borders of the sequences.
            labels: (T,) the token after each position; None asks for hidden states.
            completion_mask: (T,) bool; where False no log-prob is computed (all are, if None).
            temperature, with_entropy, top_p, top_k, equal_gradients: see kaja.loss.token_log_probs.
            prefixes: (B,) the sequence that each one goes on from; None: none does. See prefix_attention.

        Returns:
            hidden (T, D) without labels; else (log_probs (T,), entropy (T,) or None), 0 where the mask is
            False. The head is applied here, inside forward, because only there FSDP has its weight whole.
        """
        attend = packed_attention(cu_seqlens) if prefixes is None else prefix_attention(cu_seqlens, prefixes)
        hidden = self.model(input_ids, positions, attend)
        if labels is None:
            return hidden
        options = (temperature, with_entropy, top_p, top_k, equal_gradients)
        if completion_mask is None:
            return token_log_probs(hidden, self.lm_head.weight, labels, *options)
        chosen = completion_mask.nonzero().squeeze(1)
        log_probs, entropy = token_log_probs(hidden[chosen], self.lm_head.weight, labels[chosen], *options)
        log_probs = _spread(log_probs, chosen, len(labels))
        return log_probs, None if entropy is None else _spread(entropy, chosen, len(labels))


def _spread(values: Tensor, positions: Tensor, length: int) -> Tensor:
    """(N,) values at N of T positions -> (T,), 0 elsewhere."""
    return values.new_zeros(length).index_put((positions,), values)


@torch.no_grad()
def init_weights(model: CausalLM, seed: int, std: float = 0.02) -> None:
    """Fresh weights: normal with `std`, projections into the residual stream smaller (GPT-2), norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    residual_std = std / (2 * model.config.num_hidden_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight",)):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(0.0, residual_std if is_residual else std, generator=generator)
