"""The first half of a decoder layer in one call: norm, projections, rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import op
from .packed_linear import check_panels, packed_linear, panels_of
from .rms_norm import rms_norm
from .rope import rope


def _check(
    x: Tensor,
    panels: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, ...],
    cos: Tensor,
    num_heads: int,
    num_groups: int,
) -> None:
    name, head_dim = "before_attention", cos.shape[2]
    if head_dim % 2:
        raise ValueError(f"{name}: D must be even, got {head_dim}")
    counts = (num_heads, num_groups, num_groups)
    for layer, packed, count, bias in zip(("q_", "k_", "v_"), panels, counts, biases, strict=True):
        check_panels(name, layer, packed, (count * head_dim, x.shape[2]), bias)


def _fake(
    x: Tensor,
    norm_weight: Tensor | None,
    epsilon: float,
    q_panels: Tensor,
    k_panels: Tensor,
    v_panels: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_groups: int,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    panels, biases = (q_panels, k_panels, v_panels), (q_bias, k_bias, v_bias)
    _check(x, panels, biases, cos, num_heads, num_groups)
    batch, nodes, _ = x.shape
    return (
        x.new_empty((batch, num_heads, nodes, cos.shape[2])),
        x.new_empty((batch, num_groups, nodes, cos.shape[2])),
        x.new_empty((batch, nodes, num_groups, cos.shape[2])).transpose(1, 2),
    )


def _inputs(
    B: int,
    N: int,
    F: int,
    H: int,
    G: int,
    D: int,
    norm: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    def panels(outputs: int) -> Tensor:
        return panels_of(random(outputs, F, size=F**-0.5))

    angles = torch.rand((1, N, D // 2), generator=generator) * 6.0
    angles = torch.cat([angles, angles], -1).expand(B, N, D)
    biases = {f"{name}_bias": random(heads * D) for name, heads in (("q", H), ("k", G), ("v", G))}
    norms = {f"{name}_norm_weight": random(D) + 1 for name in ("q", "k")}
    return {
        "x": random(B, N, F) * 3,
        "norm_weight": random(F) + 1 if norm else None,
        "epsilon": 1e-5,
        "q_panels": panels(H * D),
        "k_panels": panels(G * D),
        "v_panels": panels(G * D),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "num_heads": H,
        "num_groups": G,
        **(biases if B % 2 else {}),
        **(norms if N % 2 else {}),
    }


@op(
    shapes="x: B N F float, norm_weight: F float, q_panels: _ _ _ _ float, "
    "k_panels: _ _ _ _ float, v_panels: _ _ _ _ float, cos: B N D float, sin: B N D float, "
    "q_bias: _ float, k_bias: _ float, v_bias: _ float, q_norm_weight: D float, "
    "k_norm_weight: D float",
    fake=_fake,
    inputs=_inputs,
    tolerance={torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-7},
    cases=(
        {"B": 1, "N": 1, "F": 64, "H": 2, "G": 1, "D": 16},
        {"B": 2, "N": 3, "F": 33, "H": 3, "G": 3, "D": 10},
        {"B": 3, "N": 7, "F": 576, "H": 9, "G": 3, "D": 64},
        {"B": 1, "N": 40, "F": 128, "H": 4, "G": 2, "D": 32},
        {"B": 2, "N": 5, "F": 70, "H": 4, "G": 1, "D": 16, "norm": False},
    ),
)
def before_attention(
    x: Tensor,
    norm_weight: Tensor | None,
    epsilon: float,
    q_panels: Tensor,
    k_panels: Tensor,
    v_panels: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_groups: int,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a pre-norm decoder layer gives its attention: `rms_norm`, three times `packed_linear`,
    where wanted `rms_norm` of every head of queries and keys, and their `rope`, each rounded as
    there.

    Args:
        x: [B, N, F] float, the hidden states, any strides.
        norm_weight: [F], with `epsilon` as in `rms_norm`, which serves all norms; None takes x as
            it is.
        q_panels, k_panels, v_panels: `panels_of` the weights [H D, F], [G D, F], [G D, F].
        cos, sin: [B, N, D], as in `rope`.
        num_heads, num_groups: H and G.
        q_bias, k_bias, v_bias: [H D], [G D], [G D], or None.
        q_norm_weight, k_norm_weight: [D], of the norms of heads, or None.

    Returns:
        q [B, H, N, D] and k [B, G, N, D], turned, contiguous; v [B, G, N, D], contiguous as
        [B, N, G, D]. NaN and infinities as the formulas give them.

    Raises:
        ValueError: panels or a bias of another size, an odd D.

    Source: Touvron et al., "LLaMA", 2302.13971, section 2.2; Ainslie et al., "GQA", 2305.13245;
        norms of heads: Yang et al., "Qwen3", 2505.09388, section 2.
    """
    panels, biases = (q_panels, k_panels, v_panels), (q_bias, k_bias, v_bias)
    _check(x, panels, biases, cos, num_heads, num_groups)
    batch, nodes, features = x.shape
    rows = x.reshape(-1, features)
    if norm_weight is not None:
        rows = rms_norm.reference(rows, norm_weight, epsilon)
    counts = (num_heads, num_groups, num_groups)
    q, k, v = (
        packed_linear.reference(rows, packed, count * cos.shape[2], bias)
        .view(batch, nodes, count, cos.shape[2])
        .transpose(1, 2)
        for packed, count, bias in zip(panels, counts, biases, strict=True)
    )
    if q_norm_weight is not None:
        q = rms_norm.reference(q.reshape(-1, q.shape[3]), q_norm_weight, epsilon).view(q.shape)
    if k_norm_weight is not None:
        k = rms_norm.reference(k.reshape(-1, k.shape[3]), k_norm_weight, epsilon).view(k.shape)
    return *rope.reference(q, k, cos, sin), v
