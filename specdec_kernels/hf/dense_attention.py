"""Attention by PyTorch: of prompts, and of trees that `tree_attention` cannot take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .locality import Locality

if TYPE_CHECKING:
    from .attention import TreeCall


def attend_densely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: TreeCall,
    locality: Locality,
    *,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Tree attention with an explicit mask, for what `tree_attention` has no argument for."""
    slots = key.shape[2]
    seen = visible_slots(call, slots, locality)[:, None]
    ends = (call.lengths + call.num_nodes)[:, None]
    is_empty = (torch.arange(slots, device=ends.device) >= ends)[:, None, :, None]
    # Behind a tree slots may hold anything, and 0 times NaN is NaN: padding nodes see some of them.
    key, value = key.masked_fill(is_empty, 0.0), value.masked_fill(is_empty, 0.0)
    return (
        masked_attention(query, key, value, seen, scale, softcap, sinks)
        .transpose(1, 2)
        .contiguous()
    )


def visible_slots(call: TreeCall, capacity: int, locality: Locality) -> Tensor:
    """[B, N, S] bool: which slots each node sees. Padding nodes see themselves: no row is empty."""
    nodes = call.depths.shape[1]
    slots = torch.arange(capacity, device=call.depths.device)
    node = slots - call.lengths[:, None]  # tree node of a slot; negative in the prefix
    index = node.clamp(0, nodes - 1).long()
    words = call.ancestors.gather(2, (index // 64)[:, None].expand(-1, nodes, -1))
    is_ancestor = (words >> (index % 64)[:, None] & 1).bool()
    in_tree = (node >= 0) & (node < call.num_nodes[:, None])
    seen = (is_ancestor & in_tree[:, None]) | (node < 0)[:, None]
    in_prefix = slots.expand_as(node)
    positions = torch.where(
        node < 0, in_prefix, call.lengths[:, None] + call.depths.gather(1, index)
    )
    queries = (call.lengths[:, None] + call.depths)[:, :, None]
    own = node[:, None] == torch.arange(nodes, device=slots.device)[:, None]
    return seen & locality.sees(queries, positions[:, None]) | own


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """[B, H, N, E], causal where there is no mask."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, is_causal=mask is None
    )


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """[B, H, N, E] with an explicit mask [B or 1, 1, N, S], softcap and sinks."""
    if not softcap and sinks is None:
        return plain_attention(query, key, value, seen, scale)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(len(query), -1, query.shape[2], 1)
        scores = torch.cat([scores, column], -1)
    probs = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return probs @ value
