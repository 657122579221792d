"""Rotary position embeddings, as Llama's and its descendants' configurations describe them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint

_TYPES = ("default", "linear", "llama3")


class Rotary:
    """Turns pairs of query and key features by angles that grow with the position.

    Args:
        checkpoint: its config has `rope_theta` and `rope_scaling`, or both as `rope_parameters`.
        head_dim: D.

    Raises:
        ValueError: a scaling other than linear and Llama 3's.

    Source: Su et al., 2104.09864, section 3.2; Llama 3's scaling as in its published code.
    """

    def __init__(self, checkpoint: Checkpoint, head_dim: int) -> None:
        config = checkpoint.config
        scaling: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in _TYPES:
            raise checkpoint.refuse("rope type", kind, f"one of {', '.join(_TYPES)}")
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
        rates = theta**-exponents  # radians per position
        if kind == "linear":
            rates = rates / float(scaling["factor"])
        if kind == "llama3":
            rates = _llama3(rates, scaling)
        self._rates = rates.float()

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [..., D] at positions [...], as `ops.rope` takes them."""
        angles = self._angles(positions)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def __call__(self, values: Tensor, positions: Tensor) -> Tensor:
        """values [B, H, M, D] at positions [B, M]."""
        angles = self._angles(positions)[:, None]
        cos, sin = angles.cos(), angles.sin()
        first, second = values.float().chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.to(values.dtype)

    def _angles(self, positions: Tensor) -> Tensor:
        """[..., D / 2] at positions [...]."""
        self._rates = self._rates.to(positions.device)
        return positions[..., None].float() * self._rates


def _llama3(rates: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Slow rates are divided by the factor, fast ones stay, those between are blended."""
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = rates * float(scaling["original_max_position_embeddings"]) / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return rates / float(scaling["factor"]) * (1 - share) + rates * share
