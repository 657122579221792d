"""Images and sounds in a prompt: what its pass takes besides tokens, and where the text goes on.

Only the prompt's pass reads them. Their places hold tokens of their own in the cache, so that trees
behind them are like any others; some models count an image's tokens in rows and columns, and go on
behind the larger of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BY_TOKEN = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Inputs with a value per token of the padded prompts."""


@dataclass(frozen=True, slots=True)
class Media:
    """What the pass over the prompts of a batch takes, rows packed to the left.

    Attributes:
        inputs: the model's keyword arguments.
        positions: [..., B, P]; None where they are slots.
        offsets: [..., B], position minus slot of what follows; None where both are the same.
    """

    inputs: Mapping[str, Any]
    positions: Tensor | None
    offsets: Tensor | None

    @staticmethod
    def of(
        inputs: Mapping[str, Any], position_ids: Tensor | None, prompts: Sequence[Sequence[int]]
    ) -> Media | None:
        """What `generate` gives a model; None without images and sounds.

        Args:
            inputs: besides tokens, mask and positions.
            position_ids: [..., B or 1, P] of prompts padded on the left, or None.
            prompts: without padding.
        """
        if not inputs:
            return None
        lengths = torch.tensor([len(prompt) for prompt in prompts], device="cpu")
        packed = {
            name: _pack(value, lengths) if name in BY_TOKEN else value
            for name, value in inputs.items()
        }
        if position_ids is None:
            return Media(packed, None, None)
        positions = _pack(position_ids, lengths)
        after = position_ids[..., -1] + 1 - lengths.to(position_ids.device)
        return Media(packed, positions, after if bool(after.any()) else None)


def _pack(values: Tensor, lengths: Tensor) -> Tensor:
    """[..., B or 1, P] padded on the left -> [..., B, longest], the last value repeated."""
    batch, padded = len(lengths), values.shape[-1]
    places = torch.arange(int(lengths.max()), device="cpu") + (padded - lengths)[:, None]
    places = places.clamp_max(padded - 1).to(values.device)
    values = values.expand(*values.shape[:-2], batch, padded)
    return values.gather(-1, places.expand(*values.shape[:-1], -1))
