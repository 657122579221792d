"""Store the keys and values of tree nodes in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import op
from .cache_slots import cache_inputs, locate


def _fake(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_nodes: Tensor,
    page_table: Tensor | None = None,
) -> None:
    return None


def _inputs(
    B: int,
    N: int,
    G: int,
    D: int,
    S: int,
    page_size: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    cache = cache_inputs(B, N, G, D, S, page_size, dtype, generator)
    new = torch.randn((2, B, N, G, D), generator=generator).to(dtype).transpose(2, 3)
    return {"k": new[0], "v": new[1], **cache}


@op(
    shapes="k: B G N D float, v: B G N E float, k_cache: C G S D float, v_cache: C G S E float, "
    "lengths: B int32, num_nodes: B int32, page_table: B M int32",
    fake=_fake,
    inputs=_inputs,
    mutates=("k_cache", "v_cache"),
    cases=(
        {"B": 1, "N": 1, "G": 1, "D": 64, "S": 8},
        {"B": 3, "N": 7, "G": 2, "D": 40, "S": 33},
        {"B": 3, "N": 70, "G": 2, "D": 64, "S": 160, "page_size": 16},
    ),
)
def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_nodes: Tensor,
    page_table: Tensor | None = None,
) -> None:
    """Write node i of request b into cache slot `lengths[b] + i`, in place, but no padding nodes.

    Args:
        k, v: [B, G, N, D], [B, G, N, E] float, any strides.
        k_cache, v_cache: [B, G, S, D], [B, G, S, E] float, any strides; with `page_table`, pages
            [C, G, S, D] of S slots.
        lengths: [B] int32, committed slots.
        num_nodes: [B] int32.
        page_table: [B, M] int32, page of slots m*S .. m*S + S-1 of each request.

    Raises:
        ValueError: a node without a slot, or a page id outside the cache (host tensors; on a device
            the write is dropped).
    """
    row, node, page, slot = locate("write_kv", k_cache, lengths, num_nodes, k.shape[2], page_table)
    k_cache[page, :, slot] = k[row, :, node]
    v_cache[page, :, slot] = v[row, :, node]
