"""Root mean square norm, one call for what eager PyTorch does in eight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import op


def _fake(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _inputs(R: int, F: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((R, F + 3), generator=generator).to(dtype)[:, :F] * 3  # strided rows
    weight = torch.rand(F, generator=generator).to(dtype) + 0.5
    return {"x": x, "weight": weight, "epsilon": 1e-5}


@op(
    shapes="x: R F float, weight: F float",
    fake=_fake,
    inputs=_inputs,
    tolerance={torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7},
    cases=(
        {"R": 1, "F": 64},
        {"R": 3, "F": 7},
        {"R": 9, "F": 576},
        {"R": 5, "F": 301},
    ),
)
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon), in float32 and rounded to x's dtype, times weight.

    Args:
        x: [R, F] float, any strides.
        weight: [F].
        epsilon: added to the mean square.

    Returns:
        [R, F]; NaN and infinities as the formula gives them.

    Raises:
        ValueError: a weight of another size.

    Source: Zhang and Sennrich, 1910.07467; rounded between the two products as transformers'
        `LlamaRMSNorm` does.
    """
    values = x.float()
    normed = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon)
    return (weight * normed.to(x.dtype)).contiguous()
