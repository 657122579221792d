"""Turns parent indices into ancestor bit words and depths.

A program owns a tile of nodes and a tile of mask words of one request, and walks every node of the
tile to the root at once: set the node's bit, step to its parent, count the step. Programs share
nothing, so there is no order to keep; the price is one dependent load of a parent per level, and
each tile reads the parents of its ancestors again (from cache). A parent is clamped to [0, i) as it
is read, so the walk falls and ends whatever the data holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.tree_mask import tree_mask
from ..shapes import num_words
from .launch import INTERPRETED, Launch

LAUNCH = {"tree_mask": Launch(1, 1, {"BLOCK_N": 64 if INTERPRETED else 32})}

MAX_WORDS = 16
"""Words of a node that a program holds in registers; wider masks take several programs."""


@triton.jit(do_not_specialize=["nodes", "words", "stride_parents_b", "stride_num_nodes"])
def _tree_mask(
    parents_ptr,  # [B, N]
    num_nodes_ptr,  # [B]
    ancestors_ptr,  # [B, N, W] contiguous
    depths_ptr,  # [B, N] contiguous
    nodes, words, stride_parents_b, stride_parents_n, stride_num_nodes,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One tile of nodes and words of one request.

    Bytes per call: 4 * B * (N + 1) read from memory, B * N * (8 * W + 4) written.
    Roofline: t = B * N * (8 * W + 8) / bandwidth; the walk adds (largest depth) * (latency of a
    cached load), which is what a small tree costs.
    """
    pid_b = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    num_nodes = tl.load(num_nodes_ptr + pid_b * stride_num_nodes)
    is_node = (offs_n < nodes) & (offs_n < num_nodes)
    row_ptr = parents_ptr + pid_b * stride_parents_b

    node = tl.where(is_node, offs_n, -1)  # where the walk is; -1 when it has left the root
    depth = tl.zeros((BLOCK_N,), tl.int32)
    bits = tl.zeros((BLOCK_N, BLOCK_W), tl.int64)
    while tl.max(node, 0) >= 0:
        is_here = (node >= 0)[:, None] & ((node >> 6)[:, None] == offs_w[None, :])
        bit = tl.full((BLOCK_N,), 1, tl.int64) << (node & 63).to(tl.int64)
        bits = tl.where(is_here, bits | bit[:, None], bits)
        has_parent = node > 0
        parent = tl.load(row_ptr + node.to(tl.int64) * stride_parents_n, mask=has_parent, other=-1)
        depth += has_parent.to(tl.int32)
        node = tl.where(has_parent, tl.minimum(tl.maximum(parent, 0), node - 1), -1)

    rows = pid_b * nodes + offs_n
    mask_n = offs_n < nodes
    if tl.program_id(2) == 0:
        tl.store(depths_ptr + rows, depth, mask=mask_n)
    mask_w = mask_n[:, None] & (offs_w < words)[None, :]
    tl.store(ancestors_ptr + rows[:, None] * words + offs_w[None, :], bits, mask=mask_w)


@tree_mask.implement("triton")
def tree_mask_triton(parents: Tensor, num_nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `_tree_mask`. A bad parent counts as the nearest good one; nothing is refused."""
    batch, nodes = parents.shape
    words = num_words(nodes)
    ancestors = parents.new_empty((batch, nodes, words), dtype=torch.int64)
    depths = torch.empty_like(parents, memory_format=torch.contiguous_format)
    if ancestors.numel() == 0:
        return ancestors, depths
    block_w = min(MAX_WORDS, triton.next_power_of_2(words))
    options = LAUNCH["tree_mask"].options
    grid = (batch, triton.cdiv(nodes, options["BLOCK_N"]), triton.cdiv(words, block_w))
    _tree_mask[grid](
        parents, num_nodes, ancestors, depths,
        nodes, words, *parents.stride(), num_nodes.stride(0),
        BLOCK_W=block_w, **options,
    )  # fmt: skip
    return ancestors, depths
