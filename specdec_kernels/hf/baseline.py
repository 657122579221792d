"""What transformers itself does at the seams this package replaces, for benches to compare with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import (
    CompileConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import _speculative_sampling
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

__all__ = [
    "LlamaRMSNorm",
    "apply_rotary_pos_emb",
    "compiled_static_cache",
    "growing_layer",
    "sdpa_attention",
    "speculative_sampling",
    "warpers",
]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The stock attention function on one layer, with a 4D mask as assisted decoding passes it.

    Args:
        q: [B, H, N, D] float.
        k, v: [B, G, S, D] float.
        mask: [B, 1, N, S] bool, True where a node sees a slot.
        scale: factor on q.k.

    Returns:
        [B, N, H, D] float, contiguous.
    """
    layer: Any = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
    return sdpa_attention_forward(layer, q, k, v, mask, scaling=scale)[0]


def growing_layer(k: Tensor, v: Tensor) -> DynamicLayer:
    """A layer of the default cache that holds k, v [B, G, S, D]; each update concatenates."""
    layer = DynamicLayer()
    layer.lazy_initialization(k, v)
    layer.keys, layer.values = k, v
    return layer


def warpers(*, temperature: float, top_k: int, top_p: float, min_p: float) -> LogitsProcessorList:
    """The sampling filters in the order in which `generate` applies them."""
    return LogitsProcessorList(
        [
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ]
    )


def speculative_sampling(tokens: Tensor, draft_logits: Tensor, logits: Tensor) -> Any:
    """The acceptance of assisted decoding, after the filters.

    Args:
        tokens: [1, N - 1] int64, drafted chain.
        draft_logits: [1, N - 1, V] float32, what each was drawn from.
        logits: [1, N, V] float32, filtered target logits.

    Returns:
        Accepted tokens and the next one, and how many were accepted.
    """
    return _speculative_sampling(tokens, draft_logits, tokens.shape[1], logits)


def compiled_static_cache(backend: bool | str) -> dict[str, Any]:
    """Arguments of `generate` for a static cache whose steps are compiled on any device; by itself
    transformers does so on accelerators only.

    Args:
        backend: of `torch.compile`; a bool is the default one.
    """
    config = CompileConfig()
    if isinstance(backend, str):
        config.backend = backend
    config._compile_all_devices = True  # type: ignore[assignment]
    return {"cache_implementation": "static", "compile_config": config}
