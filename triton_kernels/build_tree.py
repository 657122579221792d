"""Grows the best tree of N nodes, best first: one program per request.

The tree lives in registers, one lane per node. Beside each node lies the best of its children that
are still open; so the frontier is as wide as the tree, not as the tree times the candidates. A step
takes the best open child of all, hangs it in the tree unless a sibling has its token, and looks
over one row of candidates twice: for the parent's next child and for the new node's first one.

Delicate: order. Path scores are float64 sums of float32 gains, as the reference's, and compare as
such; ties go to the smaller (depth, candidate, parent), joined in one integer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.build_tree import build_tree, check_max_nodes, empty_outputs
from ..shapes import PAD
from .launch import Launch

_PAD = tl.constexpr(PAD)
_LAST = tl.constexpr(2**63 - 1)


LAUNCH = {256: Launch(1, 1), 512: Launch(2, 1), 1024: Launch(4, 1), 2048: Launch(8, 1)}
"""By lanes, from the nearest end: one warp while it can, as its maxima need no shared memory."""


@triton.jit
def _best_child(
    candidates_ptr,  # [T, K] of the request, as the other two
    logprobs_ptr,
    parents_ptr,
    depth,  # of the children of the node
    candidate,  # that the node was
    path,  # float64 path score of the node
    score,  # only children after this (score, candidate) count
    after,
    T, K,
    stride_ct, stride_ck, stride_lt, stride_lk, stride_pt, stride_pk,
    HAS_PARENTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(path score or -inf, candidate) of the best open child of a node."""
    offs_k = tl.arange(0, BLOCK_K)
    offs = offs_k.to(tl.int64)
    row = tl.minimum(depth, T - 1).to(tl.int64)
    mask = (offs_k < K) & (depth < T)
    token = tl.load(candidates_ptr + row * stride_ct + offs * stride_ck, mask=mask, other=_PAD)
    gain_ptrs = logprobs_ptr + row * stride_lt + offs * stride_lk
    gain = tl.load(gain_ptrs, mask=mask, other=-float("inf"))
    gain = tl.where(gain == gain, tl.minimum(gain, 0.0), -float("inf"))  # NaN: absent
    is_open = mask & (token != _PAD)
    if HAS_PARENTS:
        parent_ptrs = parents_ptr + row * stride_pt + offs * stride_pk
        parent = tl.load(parent_ptrs, mask=mask, other=_PAD)
        is_open = is_open & ((depth == 0) | (parent == candidate))
    sums = path + gain.to(tl.float64)
    is_open = is_open & ((sums < score) | ((sums == score) & (offs_k > after)))
    sums = tl.where(is_open, sums, -float("inf"))
    best = tl.max(sums, 0)
    return best, tl.min(tl.where(sums == best, offs_k, BLOCK_K), 0)


@triton.jit(do_not_specialize=["max_nodes", "stride_roots", "stride_budgets", "T"])
def _build_tree(
    roots_ptr,  # [B]
    candidates_ptr,  # [B, T, K]
    logprobs_ptr,  # [B, T, K]
    budgets_ptr,  # [B]
    parents_ptr,  # [B, T, K]; unused unless HAS_PARENTS
    tokens_ptr,  # [B, N], as the other results contiguous
    tree_ptr,  # [B, N]
    num_nodes_ptr,  # [B]
    scores_ptr,  # [B, N]
    max_nodes, T, K, stride_roots, stride_budgets,
    stride_cb, stride_ct, stride_ck,
    stride_lb, stride_lt, stride_lk,
    stride_pb, stride_pt, stride_pk,
    HAS_PARENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One request.

    Bytes per call: B * T * K * 12 (16 with parents) + 12 * B read from memory, B * (16 * N + 4)
    written. Roofline: t = those / bandwidth; in fact N dependent steps of about ten reductions,
    with rows of candidates from cache.
    """
    pid_b = tl.program_id(0).to(tl.int64)
    candidates_ptr += pid_b * stride_cb
    logprobs_ptr += pid_b * stride_lb
    parents_ptr += pid_b * stride_pb
    budget = tl.load(budgets_ptr + pid_b * stride_budgets)
    budget = tl.minimum(tl.maximum(budget, 0), max_nodes)
    root = tl.load(roots_ptr + pid_b * stride_roots)

    offs_n = tl.arange(0, BLOCK_N)
    token = tl.where(offs_n == 0, root, 0)
    tree = tl.full((BLOCK_N,), _PAD, tl.int32)
    path = tl.where(offs_n == 0, 0.0, -float("inf")).to(tl.float64)
    own = tl.full((BLOCK_N,), _PAD, tl.int32)  # candidate that became the node
    depth = tl.zeros((BLOCK_N,), tl.int32)  # of its children

    zero = budget * 0
    best, child = _best_child(
        candidates_ptr, logprobs_ptr, parents_ptr, zero, _PAD, 0.0, float("inf"), _PAD, T, K,
        stride_ct, stride_ck, stride_lt, stride_lk, stride_pt, stride_pk, HAS_PARENTS, BLOCK_K,
    )  # fmt: skip
    open_score = tl.where(offs_n == 0, best, -float("inf"))
    open_child = tl.where(offs_n == 0, child, 0)
    size = tl.minimum(budget, 1)
    top = tl.max(open_score, 0)
    while (size < budget) & (top > -float("inf")):
        rank = (depth.to(tl.int64) * K + open_child) * BLOCK_N + offs_n
        rank = tl.min(tl.where(open_score == top, rank, _LAST), 0)
        node = (rank % BLOCK_N).to(tl.int32)
        k = (rank // BLOCK_N % K).to(tl.int32)
        t = (rank // BLOCK_N // K).to(tl.int32)
        new_token = tl.load(
            candidates_ptr + t.to(tl.int64) * stride_ct + k.to(tl.int64) * stride_ck
        )
        is_twin = (tree == node) & (token == new_token) & (offs_n < size)
        is_new = tl.max(is_twin.to(tl.int32), 0) == 0

        is_parent = offs_n == node
        parent_path = tl.sum(tl.where(is_parent, path, 0.0), 0)
        parent_own = tl.max(tl.where(is_parent, own, _PAD), 0)
        next_score, next_child = _best_child(
            candidates_ptr, logprobs_ptr, parents_ptr, t, parent_own, parent_path, top, k, T, K,
            stride_ct, stride_ck, stride_lt, stride_lk, stride_pt, stride_pk, HAS_PARENTS, BLOCK_K,
        )  # fmt: skip
        first_score, first_child = _best_child(
            candidates_ptr, logprobs_ptr, parents_ptr, t + 1, k, top, float("inf"), _PAD, T, K,
            stride_ct, stride_ck, stride_lt, stride_lk, stride_pt, stride_pk, HAS_PARENTS, BLOCK_K,
        )  # fmt: skip
        open_score = tl.where(is_parent, next_score, open_score)
        open_child = tl.where(is_parent, next_child, open_child)

        is_node = (offs_n == size) & is_new
        token = tl.where(is_node, new_token, token)
        tree = tl.where(is_node, node, tree)
        path = tl.where(is_node, top, path)
        own = tl.where(is_node, k, own)
        depth = tl.where(is_node, t + 1, depth)
        open_score = tl.where(is_node, first_score, open_score)
        open_child = tl.where(is_node, first_child, open_child)
        size += is_new.to(tl.int32)
        top = tl.max(open_score, 0)

    mask_n = offs_n < max_nodes
    is_node = offs_n < size
    rows = pid_b * max_nodes + offs_n
    tl.store(tokens_ptr + rows, tl.where(is_node, token, 0), mask=mask_n)
    tl.store(tree_ptr + rows, tree, mask=mask_n)
    score = tl.where(is_node, path, -float("inf")).to(tl.float32)
    tl.store(scores_ptr + rows, score, mask=mask_n)
    tl.store(num_nodes_ptr + pid_b, size)


@build_tree.implement("triton")
def build_tree_triton(
    roots: Tensor,
    candidates: Tensor,
    logprobs: Tensor,
    budgets: Tensor,
    candidate_parents: Tensor | None = None,
    *,
    max_nodes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `_build_tree`."""
    check_max_nodes(max_nodes)
    outputs = empty_outputs(
        roots, candidates, logprobs, budgets, candidate_parents, max_nodes=max_nodes
    )
    batch, depths, width = candidates.shape
    if batch == 0:
        return outputs
    has_parents = candidate_parents is not None
    parents = candidate_parents if candidate_parents is not None else candidates
    block_n, block_k = (triton.next_power_of_2(max(1, size)) for size in (max_nodes, width))
    tokens, tree, num_nodes, scores = outputs
    _build_tree[(batch,)](
        roots, candidates, logprobs, budgets, parents, tokens, tree, num_nodes, scores,
        max_nodes, depths, width, roots.stride(0), budgets.stride(0),
        *candidates.stride(), *logprobs.stride(), *parents.stride(),
        HAS_PARENTS=has_parents, BLOCK_N=block_n, BLOCK_K=block_k,
        **LAUNCH[min(max(block_n, block_k, min(LAUNCH)), max(LAUNCH))].options,
    )  # fmt: skip
    return outputs
