"""Where a slot of a request lies in a contiguous or paged cache (reference), and caches for tests
and benches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def physical(slots: Tensor, page_size: int, page_table: Tensor | None) -> tuple[Tensor, Tensor]:
    """(first index, slot index) into a cache [C, G, S, D] for logical slots [B, X]."""
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None].expand_as(slots)
    if page_table is None:
        return rows, slots
    column = (slots // page_size).clamp(0, page_table.shape[1] - 1)
    return page_table[rows, column].long(), slots % page_size


def locate(
    op: str,
    cache: Tensor,
    lengths: Tensor,
    num_nodes: Tensor,
    nodes: int,
    page_table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat (row, node, first index, slot index) of every tree node that has a slot.

    Raises:
        ValueError: a node without a slot or a page outside the cache, on host tensors.
    """
    pages, _, size, _ = cache.shape
    capacity = size if page_table is None else size * page_table.shape[1]
    node = torch.arange(nodes, device=cache.device).expand(lengths.shape[0], -1)
    slots = lengths[:, None].long() + node
    wanted = node < num_nodes[:, None]
    page, slot = physical(slots, size, page_table)
    inside = (slots >= 0) & (slots < capacity) & (page >= 0) & (page < pages)
    if cache.device.type == "cpu" and bool((wanted & ~inside).any()):
        b, i = (wanted & ~inside).nonzero()[0].tolist()
        raise ValueError(
            f"{op}: slot lengths + node must be in [0, {capacity}) on one of {pages} pages, "
            f"got slot {int(slots[b, i])} on page {int(page[b, i])} for row {b}"
        )
    row, column = (wanted & inside).nonzero(as_tuple=True)
    return row, column, page[row, column], slot[row, column]


def cache_inputs(
    B: int,
    N: int,
    G: int,
    D: int,
    S: int,
    page_size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, Any]:
    """A cache in [B, S, G, D] memory order (so its strides are not standard), ragged lengths,
    spare pages poisoned.
    """
    num_nodes = torch.randint(1, N + 1, (B,), generator=generator, dtype=torch.int32)
    num_nodes[0] = N
    lengths = torch.randint(0, S - N + 1, (B,), generator=generator, dtype=torch.int32)
    lengths[-1] = S - N
    size, pages, page_table = S, B, None
    if page_size:
        size, columns = page_size, (S + page_size - 1) // page_size
        pages = B * columns + 1
        page_table = torch.randperm(pages - 1, generator=generator).int().reshape(B, columns)
    kv = torch.randn((2, pages, size, G, D), generator=generator).to(dtype).transpose(2, 3)
    kv[:, B if page_table is None else pages - 1 :] = torch.nan
    return {
        "k_cache": kv[0],
        "v_cache": kv[1],
        "lengths": lengths,
        "num_nodes": num_nodes,
        "page_table": page_table,
    }
