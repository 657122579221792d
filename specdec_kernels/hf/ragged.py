"""Trees of different sizes, one behind the other: a pass then computes no padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WORTH = 0.75
"""Of the padded tokens. SmolLM2 on two cores: eight rows of one node take 41 ms, as long as five of
them with the copies; three take 30, and one row of two beside seven of one 53 instead of 63."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """The T nodes of B trees of at most N.

    Attributes:
        nodes: [T] int64, the place of each among the B x N.
        places: [B, N] int64, and back; padding holds some node's.
    """

    nodes: Tensor
    places: Tensor

    @staticmethod
    def of(num_nodes: Tensor, width: int) -> Ragged | None:
        """Of trees with so many nodes [B] each, in rows of `width`; None if too little is padding
        to be worth the copies.
        """
        is_node = torch.arange(width, device=num_nodes.device) < num_nodes[:, None]
        nodes = is_node.flatten().nonzero()[:, 0]
        if len(nodes) > _WORTH * is_node.numel():
            return None
        places = (is_node.flatten().cumsum(0) - 1).clamp_min(0)
        return Ragged(nodes, places.view_as(is_node))

    def join(self, rows: Tensor) -> Tensor:
        """[B, N, ...] -> [1, T, ...]."""
        return rows.flatten(0, 1).index_select(0, self.nodes)[None]

    def split(self, joined: Tensor) -> Tensor:
        """[1, T, ...] -> [B, N, ...]; padding holds some node's values."""
        split = joined[0].index_select(0, self.places.flatten())
        return split.view(*self.places.shape, *split.shape[1:])
