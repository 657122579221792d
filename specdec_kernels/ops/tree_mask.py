"""Ancestor bits and depths of token trees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import op
from ..shapes import num_words
from ..tree import random_trees


def _fake(parents: Tensor, num_nodes: Tensor) -> tuple[Tensor, Tensor]:
    batch, nodes = parents.shape
    words = parents.new_empty((batch, nodes, num_words(nodes)), dtype=torch.int64)
    return words, torch.empty_like(parents, memory_format=torch.contiguous_format)


def _inputs(B: int, N: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    tree = random_trees(B, N, 64, torch.Generator().manual_seed(seed))
    return {"parents": tree.parents, "num_nodes": tree.num_nodes}


@op(
    shapes="parents: B N int32, num_nodes: B int32",
    fake=_fake,
    inputs=_inputs,
    cases=({"B": 1, "N": 1}, {"B": 3, "N": 7}, {"B": 4, "N": 64}, {"B": 3, "N": 150}),
)
def tree_mask(parents: Tensor, num_nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Turn parent indices into ancestor bit words and depths.

    Args:
        parents: [B, N] int32; -1 at the root, else `parents[b, i] < i`. Entries from `num_nodes[b]`
            on are not read.
        num_nodes: [B] int32 in [0, N].

    Returns:
        ancestors [B, N, W] int64: bit j of row i (bit j % 64 of word j // 64) says that j is i or
        an ancestor of i; depths [B, N] int32, edges from the root. Padding nodes get no bits and
        depth 0.

    Raises:
        ValueError: a wrong topology (host tensors; on a device it counts as the nearest good one).
    """
    batch, nodes = parents.shape
    index = torch.arange(nodes, device=parents.device)
    is_node = index < num_nodes[:, None]
    if parents.device.type == "cpu":
        _check_topology(parents, num_nodes)
    own = torch.zeros((nodes, num_words(nodes)), dtype=torch.int64, device=parents.device)
    own[index, index // 64] = 1 << index % 64
    ancestors = own.repeat(batch, 1, 1) * is_node[:, :, None]
    depths = torch.zeros((batch, nodes), dtype=torch.int32, device=parents.device)
    rows = torch.arange(batch, device=parents.device)
    for i in range(1, nodes):
        parent = parents[:, i].long().clamp(0, i - 1)
        ancestors[:, i] |= ancestors[rows, parent] * is_node[:, i, None]
        depths[:, i] = (depths[rows, parent] + 1) * is_node[:, i]
    return ancestors, depths


def _check_topology(parents: Tensor, num_nodes: Tensor) -> None:
    nodes = parents.shape[1]
    for b, size in enumerate(num_nodes.tolist()):
        if not 0 <= size <= nodes:
            raise ValueError(f"tree_mask: num_nodes[{b}] must be in [0, {nodes}], got {size}")
        for i, parent in enumerate(parents[b, :size].tolist()):
            if (parent != -1) if i == 0 else not 0 <= parent < i:
                rule = "-1 (the root)" if i == 0 else f"in [0, {i})"
                raise ValueError(f"tree_mask: parents[{b}, {i}] must be {rule}, got {parent}")
