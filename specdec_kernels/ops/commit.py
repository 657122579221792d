"""Keep the accepted path in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..registry import op
from ..tree import random_trees
from .cache_slots import cache_inputs, physical


def empty_output(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    lengths: Tensor,
    path: Tensor,
    num_kept: Tensor,
    page_table: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Output of the right shape, dtype and strides."""
    if hidden is None:
        return lengths.new_empty((0, 0, 0), dtype=torch.float32)
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _inputs(
    B: int,
    N: int,
    L: int,
    G: int,
    D: int,
    S: int,
    page_size: int = 0,
    F: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    layers = [cache_inputs(B, N, G, D, S, page_size, dtype, generator) for _ in range(L)]
    tree = random_trees(B, N, 64, generator)
    path = torch.full((B, N), -1, dtype=torch.int32)
    num_kept = torch.zeros(B, dtype=torch.int32)
    for b in range(B):  # the path to the last node, sometimes cut short
        nodes: list[int] = []
        node = int(tree.num_nodes[b]) - 1
        while node >= 0:
            nodes, node = [node, *nodes], int(tree.parents[b, node])
        path[b, : len(nodes)] = torch.tensor(nodes, dtype=torch.int32)
        cut = int(torch.randint(0, 2, (), generator=generator)) if len(nodes) > 2 else 0
        num_kept[b] = len(nodes) - cut
    hidden = torch.randn((B, N, F), generator=generator).to(dtype) if F else None
    return {
        "k_caches": [layer["k_cache"] for layer in layers],
        "v_caches": [layer["v_cache"] for layer in layers],
        "lengths": layers[0]["lengths"],
        "path": path,
        "num_kept": num_kept,
        "page_table": layers[0]["page_table"],
        "hidden": hidden,
    }


@op(
    shapes="k_caches: [C _ S _] float, v_caches: [C _ S _] float, lengths: B int32, "
    "path: B N int32, num_kept: B int32, page_table: B M int32, hidden: B N F float",
    fake=empty_output,
    inputs=_inputs,
    mutates=("k_caches", "v_caches", "lengths"),
    cases=(
        {"B": 1, "N": 1, "L": 1, "G": 1, "D": 64, "S": 9},
        {"B": 4, "N": 12, "L": 3, "G": 2, "D": 40, "S": 50, "F": 24},
        {"B": 3, "N": 70, "L": 2, "G": 2, "D": 64, "S": 160, "page_size": 16},
    ),
)
def commit(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    lengths: Tensor,
    path: Tensor,
    num_kept: Tensor,
    page_table: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Move kept nodes of every layer to the front of the tree's slots; advance `lengths`.

    Slot `lengths[b] + path[b, j]` moves to `lengths[b] + j` for j < `num_kept[b]`; then `lengths[b]
    += num_kept[b]`. Source and destination may overlap. Positions stay valid: a node's depth is its
    final offset.

    Args:
        k_caches, v_caches: one [B, G, S, D] float per layer, any strides; with `page_table`, pages
            [C, G, S, D].
        lengths: [B] int32, updated in place.
        path: [B, N] int32 from `verify`, strictly increasing over the kept entries.
        num_kept: [B] int32, path nodes to keep, root included; 0 leaves a row as it was.
        page_table: [B, M] int32.
        hidden: [B, N, F] float, per-node features of the same dtype as the caches.

    Returns:
        the rows of `hidden` along the path, [B, N, F] with zeros after the kept ones; [0, 0, 0]
        float32 without `hidden`.

    Raises:
        ValueError: a path entry or num_kept out of range, or a slot outside the cache (host
            tensors).
    """
    batch, nodes = path.shape
    column = torch.arange(nodes, device=path.device)
    kept = column < num_kept[:, None]
    if path.device.type == "cpu":
        _check_path(path, num_kept)
    if k_caches:
        rows, columns = kept.nonzero(as_tuple=True)
        first = lengths.long()[:, None]
        source, target = (
            _gather_slots(k_caches[0], first + offset, rows, columns, page_table)
            for offset in (path.long().clamp_min(0), column.expand(batch, -1))
        )
        for cache in (*k_caches, *v_caches):
            cache[target[0], :, target[1]] = cache[source[0], :, source[1]]
    lengths += num_kept
    if hidden is None:
        return lengths.new_empty((0, 0, 0), dtype=torch.float32)
    index = path.long().clamp_min(0)[:, :, None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, index).masked_fill(~kept[:, :, None], 0)


def _gather_slots(
    cache: Tensor, slots: Tensor, rows: Tensor, columns: Tensor, page_table: Tensor | None
) -> tuple[Tensor, Tensor]:
    size = cache.shape[2]
    capacity = size if page_table is None else size * page_table.shape[1]
    page, slot = (x[rows, columns] for x in physical(slots, size, page_table))
    wanted = slots[rows, columns]
    if cache.device.type == "cpu" and wanted.numel():
        low, high = int(wanted.min()), int(wanted.max())
        if low < 0 or high >= capacity or int(page.min()) < 0 or int(page.max()) >= cache.shape[0]:
            raise ValueError(
                f"commit: slots must be in [0, {capacity}) on one of {cache.shape[0]} pages, "
                f"got slots {low} to {high} on pages {int(page.min())} to {int(page.max())}"
            )
    return page, slot


def _check_path(path: Tensor, num_kept: Tensor) -> None:
    nodes = path.shape[1]
    for b, size in enumerate(num_kept.tolist()):
        if not 0 <= size <= nodes:
            raise ValueError(f"commit: num_kept[{b}] must be in [0, {nodes}], got {size}")
        entries = path[b, :size].tolist()
        for j, node in enumerate(entries):
            low = entries[j - 1] + 1 if j else 0
            if not low <= node < nodes:
                raise ValueError(f"commit: path[{b}, {j}] must be in [{low}, {nodes}), got {node}")
