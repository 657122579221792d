"""Rotary position embedding of queries and keys, one call for what eager PyTorch does in twelve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import op


def _check(q: Tensor) -> None:
    if q.shape[3] % 2:
        raise ValueError(f"rope: D must be even, got {q.shape[3]}")


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    _check(q)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _inputs(
    B: int, H: int, G: int, N: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def heads(num: int) -> Tensor:
        rows = torch.randn((B, N, num, D), generator=generator).to(dtype)
        return rows.transpose(1, 2)  # as a model has them

    angles = torch.rand((1, N, D // 2), generator=generator) * 6.0
    angles = torch.cat([angles, angles], -1).expand(B, N, D)
    return {
        "q": heads(H),
        "k": heads(G),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
    }


@op(
    shapes="q: B H N D float, k: B G N D float, cos: B N D float, sin: B N D float",
    fake=_fake,
    inputs=_inputs,
    tolerance={torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0},
    cases=(
        {"B": 1, "H": 1, "G": 1, "N": 1, "D": 64},
        {"B": 3, "H": 9, "G": 3, "N": 7, "D": 64},
        {"B": 2, "H": 4, "G": 2, "N": 5, "D": 22},
        {"B": 1, "H": 2, "G": 1, "N": 70, "D": 128},
    ),
)
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x cos + turn(x) sin of queries and keys, where turn([a, b]) = [-b, a] of the two halves of a
    head. Both products are rounded to the dtype before they are added.

    Args:
        q, k: [B, H, N, D], [B, G, N, D] float, any strides; D even.
        cos, sin: [B, N, D], of the angle of each position and dimension; may be expanded.

    Returns:
        the turned q and k, contiguous; NaN and infinities as the formula gives them.

    Raises:
        ValueError: an odd D.

    Source: Su et al., "RoFormer", 2104.09864, section 3.4.2, in the order of halves that
        transformers' `apply_rotary_pos_emb` has.
    """
    _check(q)
    cos, sin = cos[:, None], sin[:, None]

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat([-second, first], -1) * sin).contiguous()

    return turned(q), turned(k)
