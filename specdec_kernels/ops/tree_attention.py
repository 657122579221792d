"""Attention of tree nodes over the committed prefix and their ancestors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import op
from ..tree import random_trees
from .cache_slots import cache_inputs, physical
from .tree_mask import tree_mask


def empty_outputs(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ancestors: Tensor,
    depths: Tensor,
    lengths: Tensor,
    num_nodes: Tensor,
    page_table: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs of the right shapes, dtypes and strides."""
    batch, heads, nodes, _ = q.shape
    out = q.new_empty((batch, nodes, heads, v_cache.shape[3])).transpose(1, 2)
    lse_shape = (batch, heads, nodes) if return_lse else (0, 0, 0)
    return out, q.new_empty(lse_shape, dtype=torch.float32)


def _inputs(
    B: int,
    N: int,
    H: int,
    G: int,
    D: int,
    S: int,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    page_size: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    cache = cache_inputs(B, N, G, D, S, page_size, dtype, generator)
    tree = random_trees(B, N, 64, generator)
    ancestors, depths = tree_mask(tree.parents, tree.num_nodes, backend="reference")
    q = torch.randn((B, N, H, D), generator=generator).to(dtype).transpose(1, 2)
    return {
        **cache,
        "q": q,
        "ancestors": ancestors,
        "depths": depths,
        "num_nodes": tree.num_nodes,
        "sinks": torch.randn(H, generator=generator) if sinks else None,
        "scale": D**-0.5,
        "window": window,
        "softcap": softcap,
        "return_lse": True,
    }


@op(
    shapes="q: B H N D float, k_cache: C G S D float, v_cache: C G S E float, "
    "ancestors: B N W int64, depths: B N int32, lengths: B int32, num_nodes: B int32, "
    "page_table: B M int32, sinks: H float32",
    fake=empty_outputs,
    inputs=_inputs,
    tolerance={torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    cases=(
        {"B": 1, "N": 1, "H": 2, "G": 1, "D": 64, "S": 9},
        {"B": 3, "N": 7, "H": 9, "G": 3, "D": 64, "S": 300},
        {"B": 2, "N": 70, "H": 4, "G": 4, "D": 80, "S": 200, "window": 24},
        {"B": 3, "N": 12, "H": 4, "G": 2, "D": 40, "S": 90, "softcap": 2.0, "sinks": True},
        {"B": 3, "N": 16, "H": 8, "G": 2, "D": 128, "S": 250, "page_size": 32},
        {"B": 1, "N": 130, "H": 2, "G": 2, "D": 256, "S": 1100},
    ),
)
def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ancestors: Tensor,
    depths: Tensor,
    lengths: Tensor,
    num_nodes: Tensor,
    page_table: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend from every tree node to the committed prefix, its ancestors and itself.

    The keys and values of the nodes must be in the cache already, node i in slot `lengths[b] + i`
    (`write_kv`). Accumulates in float32. Query head h reads key/value head `h // (H / G)`.

    Args:
        q: [B, H, N, D] float, any strides.
        k_cache, v_cache: [B, G, S, D], [B, G, S, E] float, any strides; with `page_table`, pages
            [C, G, S, D] of S slots.
        ancestors: [B, N, W] int64 and depths [B, N] int32, from `tree_mask`.
        lengths: [B] int32, committed slots, which are also positions.
        num_nodes: [B] int32; 0 marks an idle row.
        page_table: [B, M] int32.
        sinks: [H] float32, logits that join each softmax without a value.
        scale: factor on q.k.
        window: a key is seen if query position - key position < window, with positions `lengths +
            depth` in the tree; 0 is off.
        softcap: logits become softcap * tanh(logit / softcap); 0 is off.
        return_lse: also return the log-sum-exp of the logits, sinks included.

    Returns:
        out [B, H, N, E] in q's dtype, stored so that `out.transpose(1, 2)` is contiguous, and lse
        [B, H, N] float32 ([0, 0, 0] unless asked for). Padding nodes: out 0, lse -inf.

    Raises:
        ValueError: H not a multiple of G, W not ceil(N/64), a cache too short, window or softcap
            negative.

    Source: tree attention, Miao et al., "SpecInfer", 2305.09781, section 4.
    """
    batch, heads, nodes, _ = q.shape
    check_sizes(q, k_cache, ancestors, page_table, window, softcap)
    size = k_cache.shape[2]
    capacity = size if page_table is None else size * page_table.shape[1]
    _check_lengths(lengths, num_nodes, capacity)
    slots = torch.arange(capacity, device=q.device).expand(batch, -1)
    page, slot = physical(slots, size, page_table)
    seen = _visible(ancestors, depths, lengths, num_nodes, slots, window)  # [B, N, S]
    used = seen.any(1)[:, None, :, None]
    group = heads // k_cache.shape[1]
    k, v = (
        c[page.clamp(0, c.shape[0] - 1), :, slot].transpose(1, 2).double().masked_fill(~used, 0.0)
        for c in (k_cache, v_cache)
    )  # [B, G, S, D]; slots that nobody sees may hold anything
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q.double() @ k.transpose(2, 3) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(batch, -1, nodes, 1)
        logits = torch.cat([logits, column], -1)
    is_node = torch.arange(nodes, device=q.device) < num_nodes[:, None]
    lse = logits.logsumexp(-1).masked_fill(~is_node[:, None], -torch.inf)
    probs = (logits - lse[..., None]).exp().nan_to_num(0.0, 0.0, 0.0)[..., :capacity]
    probs = probs.masked_fill(~is_node[:, None, :, None], 0.0)
    out = (probs @ v).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return out, lse.float() if return_lse else lse.new_empty((0, 0, 0), dtype=torch.float32)


def _visible(
    ancestors: Tensor,
    depths: Tensor,
    lengths: Tensor,
    num_nodes: Tensor,
    slots: Tensor,
    window: int,
) -> Tensor:
    """[B, N, S] bool: which slots each node sees."""
    nodes = depths.shape[1]
    node = slots - lengths[:, None]  # tree node of a slot; negative in the prefix
    in_tree = (node >= 0) & (node < num_nodes[:, None])
    index = node.clamp(0, nodes - 1).long()
    words = ancestors.gather(2, (index // 64)[:, None].expand(-1, nodes, -1))
    seen = (words >> (index % 64)[:, None] & 1).bool() & in_tree[:, None] | (node < 0)[:, None]
    if window:
        key_position = torch.where(node < 0, slots, lengths[:, None] + depths.gather(1, index))
        query_position = (lengths[:, None] + depths)[:, :, None]
        seen = seen & (query_position - key_position[:, None] < window)
    return seen & (torch.arange(nodes, device=slots.device) < num_nodes[:, None])[:, :, None]


def check_sizes(
    q: Tensor,
    k_cache: Tensor,
    ancestors: Tensor,
    page_table: Tensor | None,
    window: int,
    softcap: float,
) -> None:
    """Raise for sizes and options that no call may have; the shape table does the rest."""
    batch, heads, nodes, _ = q.shape
    rows, groups, _, _ = k_cache.shape
    words = (nodes + 63) // 64
    if groups == 0 or heads % groups:
        raise ValueError(
            f"tree_attention: query heads must be a multiple of key/value heads, "
            f"got {heads} and {groups}"
        )
    if ancestors.shape[2] != words:
        raise ValueError(
            f"tree_attention: ancestors must be [B, N, W] with W = ceil(N/64) = {words}, "
            f"got {list(ancestors.shape)}"
        )
    if page_table is None and rows != batch:
        raise ValueError(
            f"tree_attention: k_cache must be [B, G, S, D] with B = {batch}, "
            f"got {list(k_cache.shape)}"
        )
    if window < 0 or softcap < 0:
        raise ValueError(
            f"tree_attention: window and softcap must be >= 0, got {window} and {softcap}"
        )


def _check_lengths(lengths: Tensor, num_nodes: Tensor, capacity: int) -> None:
    """Raise for slots outside the cache, on host tensors."""
    if lengths.device.type == "cpu" and lengths.shape[0]:
        last = int((lengths + num_nodes).max())
        if last > capacity or int(lengths.min()) < 0:
            raise ValueError(
                f"tree_attention: lengths + num_nodes must be in [0, {capacity}], got {last}"
            )
