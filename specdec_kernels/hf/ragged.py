"""Rows of different sizes, one behind the other: a pass then computes no padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WORTH = 0.85
"""Of the padded tokens. SmolLM2 on two cores: 13 tokens of four trees of at most 4 nodes take 15.4
instead of 16.3 ms, 15 as long as with the padding."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """The T tokens of B prompts or trees of at most N.

    Attributes:
        sizes: tokens of each row.
        tokens: [T] int64, the place of each among the B x N.
        places: [B, N] int64, and back; padding holds some token's.
    """

    sizes: list[int]
    tokens: Tensor
    places: Tensor

    @staticmethod
    def of(sizes: Tensor, width: int) -> Ragged | None:
        """Of rows with so many tokens [B] each, padded to `width`; None if too little is padding to
        be worth the copies.
        """
        if len(sizes) == 1:  # as wide as it is
            return None
        is_token = torch.arange(width, device=sizes.device) < sizes[:, None]
        tokens = is_token.flatten().nonzero()[:, 0]
        if len(tokens) > _WORTH * is_token.numel():
            return None
        places = (is_token.flatten().cumsum(0) - 1).clamp_min(0)
        return Ragged(sizes.tolist(), tokens, places.view_as(is_token))

    def join(self, rows: Tensor) -> Tensor:
        """[B, N, ...] -> [1, T, ...]."""
        return rows.flatten(0, 1).index_select(0, self.tokens)[None]

    def join_last(self, numbers: Tensor) -> Tensor:
        """[..., B, N] -> [..., 1, T]."""
        return numbers.flatten(-2).index_select(-1, self.tokens).unsqueeze(-2)

    def split(self, joined: Tensor) -> Tensor:
        """[1, T, ...] -> [B, N, ...]; padding holds some token's values."""
        split = joined[0].index_select(0, self.places.flatten())
        return split.view(*self.places.shape, *split.shape[1:])
