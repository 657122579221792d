"""Drafts that are nothing but the target's earlier candidates, on a tree of fixed shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..static_tree import best_static_tree
from .base import RowDrafter, Verified, check_max_nodes
from .memory import SuccessorTable, keep_successors

_ACCEPTANCE = (0.40, 0.11, 0.05, 0.03, 0.02, 0.015, 0.01, 0.01)
"""By rank, about what SmolLM2-135M shows on chat prompts; sets the shape of the default tree."""


class TokenRecyclingDrafter(RowDrafter):
    """Hangs the target's last candidates after each token on a fixed tree.

    Args:
        max_nodes: most nodes of a tree, root included.
        parents: shape of the tree, the root's parent is -1; the order of siblings is their rank.
            None is the best one of `max_nodes` for typical acceptance, see `best_static_tree`.
        successors: a table to start from; it outlives requests.

    Source: Luo et al., 2408.08696; the shape by Sequoia, 2402.12374.
    """

    def __init__(
        self,
        max_nodes: int = 32,
        *,
        parents: Sequence[int] | None = None,
        successors: SuccessorTable | Path | None = None,
    ) -> None:
        check_max_nodes("TokenRecyclingDrafter", max_nodes)
        if parents is None:
            parents = best_static_tree(_ACCEPTANCE, max_nodes, max_depth=6)
        if isinstance(successors, Path):
            successors = SuccessorTable.load(successors)
        self.successors = SuccessorTable() if successors is None else successors
        self.max_nodes = len(parents)
        self._nodes = _ranks(parents)

    def propose_row(
        self, row: int, sequence: Sequence[int], max_depth: int
    ) -> tuple[list[int], list[int]]:
        """See `RowDrafter`."""
        tokens, parents = [sequence[-1]], [-1]
        place = {0: (0, 0)}  # node of the shape -> (node of the tree, depth)
        for node, (parent, rank) in enumerate(self._nodes, 1):
            if parent not in place or place[parent][1] >= max_depth:
                continue
            hangs_on, depth = place[parent]
            successors, _ = self.successors.after(tokens[hangs_on])
            if rank >= len(successors):
                continue
            place[node] = (len(tokens), depth + 1)
            tokens.append(successors[rank])
            parents.append(hangs_on)
        return tokens[1:], parents[1:]

    def observe(self, verified: Verified) -> None:
        """Keep the target's candidates after every node."""
        keep_successors(self.successors, verified)


def _ranks(parents: Sequence[int]) -> list[tuple[int, int]]:
    """(parent, rank among its siblings) of every node but the root."""
    if not parents or parents[0] != -1:
        raise ValueError(f"TokenRecyclingDrafter: parents must start with -1, got {list(parents)}")
    counts = [0] * len(parents)
    nodes = []
    for node, parent in enumerate(parents[1:], 1):
        if not 0 <= parent < node:
            raise ValueError(
                f"TokenRecyclingDrafter: parents[{node}] must be in [0, {node}), got {parent}"
            )
        nodes.append((parent, counts[parent]))
        counts[parent] += 1
    return nodes
