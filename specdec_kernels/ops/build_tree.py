"""The best tree of N nodes from per-depth candidates."""

from __future__ import annotations

import heapq
from typing import Any

import torch
from torch import Tensor

from ..registry import op
from ..shapes import PAD


def empty_outputs(
    roots: Tensor,
    candidates: Tensor,
    logprobs: Tensor,
    budgets: Tensor,
    candidate_parents: Tensor | None = None,
    *,
    max_nodes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the right shapes, dtypes and strides."""
    shape = (roots.shape[0], max_nodes)
    return (
        roots.new_empty(shape),
        roots.new_empty(shape, dtype=torch.int32),
        torch.empty_like(budgets),
        logprobs.new_empty(shape),
    )


def _inputs(
    B: int,
    T: int,
    K: int,
    N: int,
    beams: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((B, T, 4 * K), generator=generator) * 3
    logprobs, candidates = logits.log_softmax(-1).topk(K)
    candidates[:, -1, -1] = PAD
    parents = torch.randint(0, K, (B, T, K), generator=generator, dtype=torch.int32)
    budgets = torch.randint(0, N + 1, (B,), generator=generator, dtype=torch.int32)
    budgets[0] = N
    return {
        "roots": torch.arange(B),
        "candidates": candidates,
        "logprobs": logprobs,
        "budgets": budgets,
        "candidate_parents": parents if beams else None,
        "max_nodes": N,
    }


@op(
    shapes="roots: B int64, candidates: B T K int64, logprobs: B T K float32, budgets: B int32, "
    "candidate_parents: B T K int32",
    fake=empty_outputs,
    inputs=_inputs,
    tolerance={torch.float32: 1e-6},
    cases=(
        {"B": 1, "T": 1, "K": 1, "N": 2},
        {"B": 3, "T": 4, "K": 5, "N": 16},
        {"B": 3, "T": 5, "K": 6, "N": 24, "beams": True},
        {"B": 2, "T": 8, "K": 8, "N": 70},
    ),
)
def build_tree(
    roots: Tensor,
    candidates: Tensor,
    logprobs: Tensor,
    budgets: Tensor,
    candidate_parents: Tensor | None = None,
    *,
    max_nodes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Grow each tree best first: the next node is the open candidate with the likeliest path.

    Without `candidate_parents`, depth t's candidates are marginals: children of every node at depth
    t - 1 (DDTree). With them, candidate (t, k) has one parent, candidate `candidate_parents[b, t,
    k]` of depth t - 1 (EAGLE-2's rerank); those of the first depth hang on the root.

    Args:
        roots: [B] int64, last committed tokens.
        candidates: [B, T, K] int64; PAD marks an absent one.
        logprobs: [B, T, K] float32, natural logarithm of the draft's conditional probability; above
            0 counts as 0, NaN as absent.
        budgets: [B] int32, most nodes of each tree, root included; clamped to [0, max_nodes].
        candidate_parents: [B, T, K] int32; out of range means absent.
        max_nodes: N of the result.

    Returns:
        tokens [B, N] int64 (padding 0), parents [B, N] int32 (root and padding -1), num_nodes [B]
        int32, and scores [B, N] float32, log-probability of each path (root 0, padding -inf). Nodes
        are in the order of growth, so every prefix is the best tree of its size; ties go to the
        smaller (depth, candidate, parent). A sibling that repeats a token is dropped.

    Raises:
        ValueError: max_nodes < 1.

    Source: EAGLE-2, 2406.16858, section 4.2 (rerank); DDTree, 2604.12989 (marginals).
    """
    check_max_nodes(max_nodes)
    rows = []
    for b in range(roots.shape[0]):
        parents = None if candidate_parents is None else candidate_parents[b].tolist()
        budget = min(max(int(budgets[b]), 0), max_nodes)
        rows.append(_grow(int(roots[b]), candidates[b].tolist(), logprobs[b], parents, budget))
    shape = (len(rows), max_nodes)
    tokens = torch.zeros(shape, dtype=torch.int64, device="cpu")
    tree_parents = torch.full(shape, PAD, dtype=torch.int32, device="cpu")
    scores = torch.full(shape, -torch.inf, dtype=torch.float32, device="cpu")
    for b, row in enumerate(rows):
        for i, (token, parent, score) in enumerate(row):
            tokens[b, i], tree_parents[b, i], scores[b, i] = token, parent, score
    sizes = torch.tensor([len(row) for row in rows], dtype=torch.int32, device="cpu")
    device = roots.device
    return tokens.to(device), tree_parents.to(device), sizes.to(device), scores.to(device)


def check_max_nodes(max_nodes: int) -> None:
    """Raise if a tree has no room for its root."""
    if max_nodes < 1:
        raise ValueError(f"build_tree: max_nodes must be >= 1, got {max_nodes}")


def _grow(
    root: int,
    candidates: list[list[int]],
    logprobs: Tensor,
    parents: list[list[int]] | None,
    budget: int,
) -> list[tuple[int, int, float]]:
    """(token, parent node, path log-probability) of each node, in order of growth."""
    gains = logprobs.double().clamp_max(0).tolist()
    tree: list[tuple[int, int, float]] = [(root, PAD, 0.0)][:budget]
    siblings: set[tuple[int, int]] = set()
    heap: list[tuple[float, int, int, int]] = []  # -score, depth, candidate, parent node

    def open_children(node: int, depth: int, candidate: int) -> None:
        if depth == len(candidates):
            return
        for k, token in enumerate(candidates[depth]):
            hangs = parents is None or depth == 0 or parents[depth][k] == candidate
            score = tree[node][2] + gains[depth][k]
            if hangs and token != PAD and score > -torch.inf:
                heapq.heappush(heap, (-score, depth, k, node))

    if tree:
        open_children(0, 0, PAD)
    while heap and len(tree) < budget:
        negative, depth, k, node = heapq.heappop(heap)
        token = candidates[depth][k]
        if (node, token) in siblings:
            continue
        siblings.add((node, token))
        tree.append((token, node, -negative))
        open_children(len(tree) - 1, depth + 1, k)
    return tree
