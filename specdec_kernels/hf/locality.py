"""Local attention: sliding windows and chunks, in positions, and the attention of the prompt.

A model says by the masks that it makes which keys a layer sees. Here no mask is made: the mask
function of the registered attention returns an empty tensor whose shape says the same, and the
attention of the layer that receives it learns its window or chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import tree_attention, tree_mask
from ..registry import cpu_capability
from ..shapes import PAD

if TYPE_CHECKING:
    from .attention import TreeCall

_KINDS = ("full", "window", "chunk", "other")
_QUERY_BLOCK = 512
"""Queries per block where a prompt needs explicit scores: bounds their memory."""


@dataclass(frozen=True, slots=True)
class Locality:
    """Which earlier positions a layer sees; 0 is off.

    Attributes:
        window: a key is seen if query position - key position < window.
        chunk: a key is seen if it is in the query's chunk of so many positions.
    """

    window: int = 0
    chunk: int = 0


FULL = Locality()


def mark_locality(
    *,
    mask_function: Callable[..., Tensor],
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Mask function of transformers: an empty [1, kind, size, 0] bool instead of a mask."""
    size = local_size or 0

    def sees(query: int, key: int) -> bool:
        index = torch.tensor([0, 0, query, key], device=device)
        return bool(mask_function(*index))

    kind = 3
    is_masked = attention_mask is not None and not bool(attention_mask.all())
    if use_vmap or is_masked or local_size == 0:
        pass  # some models make masks that no layer uses: an error only where one arrives
    elif not size:
        kind = 0 if sees(4, 0) and not sees(0, 4) else 3
    elif sees(2 * size, 2 * size):
        # just across a chunk's edge: a window of two or more sees it, a chunk does not
        kind = 1 if size == 1 or sees(size, size - 1) else 2
        too_old = size if kind == 1 else 2 * size - 1
        kind = 3 if sees(2 * size, too_old) else kind
    return torch.empty((1, kind, size, 0), dtype=torch.bool, device=device)


def locality_of(name: str, mask: Tensor | None, sliding_window: int | None) -> Locality:
    """What the mask of a layer says.

    Raises:
        ValueError: a mask that `mark_locality` did not make, or a layer that contradicts it.
    """
    if mask is None or mask.dim() != 4 or mask.shape[3] != 0:
        raise ValueError(f"{name} makes its own attention masks, which token trees do not support")
    kind, size = _KINDS[mask.shape[1]], mask.shape[2]
    if kind == "other":
        raise ValueError(f"{name} attends neither causally nor by windows or chunks of that")
    window, chunk = size * (kind == "window"), size * (kind == "chunk")
    if sliding_window and chunk:
        raise ValueError(f"{name} has both a sliding window and chunks")
    return Locality(min(filter(None, (window, sliding_window or 0)), default=0), chunk)


def attend_prompt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    locality: Locality,
    *,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of prompts packed to the left: q [B, H, P, D], k/v [B, G, S, D] with
    S >= P, the queries being the last P -> [B, P, H, E].
    """
    size, start = query.shape[2], key.shape[2] - query.shape[2]
    keys = torch.arange(key.shape[2], device=query.device)
    is_local = max(locality.window, locality.chunk) and key.shape[2] > 1
    is_plain = not softcap and sinks is None and not is_local and start == 0
    if query.device.type == "cpu" and not locality.chunk and _takes_chains(is_plain):
        return _attend_chain(query, key, value, locality.window, scale, softcap, sinks)
    if is_plain:
        return _sdpa(query, key, value, None, scale).transpose(1, 2).contiguous()
    blocks = []
    for first in range(0, size, _QUERY_BLOCK):
        block = query[:, :, first : first + _QUERY_BLOCK]
        positions = keys[start + first : start + first + block.shape[2]]
        seen = _near(positions[:, None], keys[None], locality)[None, None]
        blocks.append(_masked(block, key, value, seen, scale, softcap, sinks))
    return torch.cat(blocks, 2).transpose(1, 2).contiguous()


def _takes_chains(is_plain: bool) -> bool:
    """Whether `tree_attention` is faster here than PyTorch's own attention of a prompt: always
    where PyTorch needs explicit scores or a mask, else where the CPU has no products of bfloat16
    (measured 1.2 to 1.6 times as fast with AVX2).
    """
    capability = cpu_capability()
    return capability in ("avx2", "avx512") or (capability == "avx512_bf16" and not is_plain)


def _attend_chain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """`attend_prompt` by `tree_attention`: blocks of queries are chains behind all that is before
    them.
    """
    batch, _, size, _ = query.shape
    start = key.shape[2] - size
    blocks = []
    for first in range(0, size, _QUERY_BLOCK):
        block = query[:, :, first : first + _QUERY_BLOCK]
        nodes = block.shape[2]
        ancestors, depths = _chain(batch, nodes)
        lengths, sizes = (
            torch.full((batch,), number, dtype=torch.int32) for number in (start + first, nodes)
        )
        out, _ = tree_attention(
            block, key, value, ancestors, depths, lengths, sizes,
            sinks=sinks, scale=scale, window=window, softcap=softcap,
        )  # fmt: skip
        blocks.append(out.transpose(1, 2))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


@lru_cache(maxsize=8)
def _chain(batch: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Ancestors and depths of chains."""
    parents = torch.arange(PAD, nodes + PAD, dtype=torch.int32).expand(batch, -1).contiguous()
    sizes = torch.full((batch,), nodes, dtype=torch.int32)
    made: tuple[Tensor, Tensor] = tree_mask(parents, sizes)
    return made


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
    seen = visible_slots(call, key.shape[2], locality)[:, None]
    used = seen.any(2)[..., None]  # [B, 1, S, 1]; other slots may hold anything
    key, value = key.masked_fill(~used, 0.0), value.masked_fill(~used, 0.0)
    return _masked(query, key, value, seen, scale, softcap, sinks).transpose(1, 2).contiguous()


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
    return seen & _near(queries, positions[:, None], locality) | own


def _near(queries: Tensor, keys: Tensor, locality: Locality) -> Tensor:
    seen = keys <= queries
    if locality.window:
        seen = seen & (queries - keys < locality.window)
    if locality.chunk:
        seen = seen & (queries // locality.chunk == keys // locality.chunk)
    return seen


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, is_causal=mask is None
    )


def _masked(
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
        return _sdpa(query, key, value, seen, scale)
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
