"""Other libraries' attention over a tree, on a GPU: what users of one would run instead.

As everywhere, masks are made before the clock starts, though a tree has a new one at every step.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .baselines import Baseline, Inputs, dense_mask, same_attention, tree_bits


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for the shapes that come next, and for no others: a graph that fits several, or a
    fall-back past the limit of recompilation, would be slower.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def _flex_attention(inputs: Inputs) -> Callable[[], Tensor]:
    q, k, v, bits = inputs["q"], inputs["k_cache"], inputs["v_cache"], tree_bits(inputs)
    batch, nodes, slots = len(q), q.shape[2], k.shape[2]
    prefix = slots - nodes  # a full cache, as in `dense_mask`

    def is_seen(b: Tensor, _: Tensor, node: Tensor, slot: Tensor) -> Tensor:
        seen: Tensor = (slot < prefix) | bits[b, node, (slot - prefix).clamp_min(0)]
        return seen

    mask = create_block_mask(is_seen, batch, None, nodes, slots, device=q.device)
    attend = _compiled(flex_attention)

    def call() -> Tensor:
        out: Tensor = attend(q, k, v, block_mask=mask, scale=inputs["scale"], enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    return call


def _flashinfer(inputs: Inputs) -> Callable[[], Tensor]:
    """One request, its mask packed to bits beforehand."""
    flashinfer: Any = importlib.import_module("flashinfer")
    q, k, v = inputs["q"][0].transpose(0, 1), inputs["k_cache"][0], inputs["v_cache"][0]
    mask = flashinfer.quantization.packbits(dense_mask(inputs).reshape(-1), bitorder="little")

    def call() -> Tensor:
        out: Tensor = flashinfer.single_prefill_with_kv_cache(
            q, k, v, packed_custom_mask=mask, kv_layout="HND", sm_scale=inputs["scale"]
        )
        return out[None]

    return call


FLEX_ATTENTION = Baseline("compiled FlexAttention", _flex_attention, same_attention)
FLASHINFER = Baseline("FlashInfer", _flashinfer, same_attention)
GPU_BASELINES = {"tree_attention": (FLEX_ATTENTION, FLASHINFER)}


def why_absent(baseline: Baseline) -> str | None:
    """Why a baseline cannot run here; None if it can."""
    if baseline is FLASHINFER and importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    return None
