"""The attention of prompts: by `tree_attention` where it is faster, else by PyTorch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..ops import tree_attention, tree_mask
from ..registry import cpu_capability, has_matrix_tiles
from ..shapes import PAD
from .dense_attention import masked_attention, plain_attention
from .locality import Locality

_QUERY_BLOCK = 512
"""Queries per block: bounds the memory of explicit scores."""


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
    is_local = max(locality.window, locality.chunk) and key.shape[2] > 1
    is_plain = not softcap and sinks is None and not is_local and start == 0
    if query.device.type == "cpu" and not locality.chunk and _takes_chains(is_plain):
        return _attend_chain(query, key, value, locality.window, scale, softcap, sinks)
    if is_plain:
        return plain_attention(query, key, value, None, scale).transpose(1, 2).contiguous()
    keys = torch.arange(key.shape[2], device=query.device)
    blocks = []
    for first in range(0, size, _QUERY_BLOCK):
        block = query[:, :, first : first + _QUERY_BLOCK]
        positions = keys[start + first : start + first + block.shape[2]]
        seen = locality.sees(positions[:, None], keys[None])[None, None]
        blocks.append(masked_attention(block, key, value, seen, scale, softcap, sinks))
    return torch.cat(blocks, 2).transpose(1, 2).contiguous()


def _takes_chains(is_plain: bool) -> bool:
    """Whether `tree_attention` is faster here than PyTorch's own attention of a prompt: always
    where PyTorch needs explicit scores or a mask, else where it has no matrix tiles (measured 1.2
    to 1.6 times as fast with AVX2, 3 times with AVX-512's products of bfloat16).
    """
    has_kernel = cpu_capability() in ("avx2", "avx512", "avx512_bf16")
    return has_kernel and not (is_plain and has_matrix_tiles())


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
            torch.full((batch,), number, dtype=torch.int32, device="cpu")
            for number in (start + first, nodes)
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
    parents = (
        torch.arange(PAD, nodes + PAD, dtype=torch.int32, device="cpu")
        .expand(batch, -1)
        .contiguous()
    )
    sizes = torch.full((batch,), nodes, dtype=torch.int32, device="cpu")
    made: tuple[Tensor, Tensor] = tree_mask(parents, sizes)
    return made
