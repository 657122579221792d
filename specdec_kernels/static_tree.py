"""The best fixed shape of a draft tree, from how often children of each rank are accepted."""

from __future__ import annotations

from collections.abc import Sequence

from .budget import CostCurve
from .shapes import PAD


def best_static_tree(
    acceptance: Sequence[float],
    max_nodes: int,
    *,
    max_depth: int = 8,
    cost: CostCurve | None = None,
    draft_cost: float = 0.0,
) -> list[int]:
    """Parents of the tree with the most expected tokens, or the most per unit of time.

    Assumes that a child of rank k is accepted with probability `acceptance[k]` if its parent is,
    wherever it stands. Exact for that model: dynamic programming over (nodes, depth, children).

    Args:
        acceptance: probability by rank, as `Acceptance.by_rank` measures it; sums to at most 1.
        max_nodes: most nodes, the root included.
        max_depth: deepest node.
        cost: T(n) of the target; None counts every step alike, and then the tree has `max_nodes`
            nodes if acceptance allows.
        draft_cost: time of drafting one more depth, in the unit of `cost`.

    Returns:
        parents [n], PAD at the root, in depth-first order; the order of siblings is their rank.

    Raises:
        ValueError: no probabilities, or sizes below 1.

    Source: Sequoia, Chen et al., 2402.12374, section 3.1.
    """
    if max_nodes < 1 or max_depth < 0:
        raise ValueError(
            "best_static_tree: max_nodes must be >= 1 and max_depth >= 0, "
            f"got {max_nodes} and {max_depth}"
        )
    if any(not 0 <= p <= 1 for p in acceptance) or sum(acceptance) > 1 + 1e-6:
        raise ValueError(
            "best_static_tree: acceptance must be probabilities that sum to at most 1, "
            f"got {list(acceptance)}"
        )
    levels = [_Level.leaves(max_nodes)]
    for _ in range(max_depth):
        levels.append(levels[-1].above(acceptance))
    best, choice = 0.0, (1, 0)
    for depth, level in enumerate(levels):
        for size in range(1, max_nodes + 1):
            value = level.value[size]
            if cost is not None:
                value /= cost(size) + depth * draft_cost
            if value > best + 1e-12:
                best, choice = value, (size, depth)
    parents: list[int] = []
    _grow(levels, choice[1], choice[0], PAD, parents)
    return parents


class _Level:
    """Trees of at most some depth.

    Attributes:
        value: [n] most expected tokens of a tree of at most n nodes, its root included (surely
            accepted).
        splits: [n][rank] nodes given to the child of that rank and its subtree, when n nodes are
            left for it and the later ones; 0 ends the siblings.
    """

    def __init__(self, value: list[float], splits: list[list[int]]) -> None:
        self.value, self.splits = value, splits

    @staticmethod
    def leaves(max_nodes: int) -> _Level:
        return _Level([0.0] + [1.0] * max_nodes, [[] for _ in range(max_nodes)])

    def above(self, acceptance: Sequence[float]) -> _Level:
        """Trees one deeper, whose subtrees are of this level."""
        most = len(self.value) - 1
        later = [0.0] * most  # [n] best use of n nodes by children of the ranks after this one
        splits: list[list[int]] = [[] for _ in range(most)]
        for share in reversed(acceptance):
            best = [0.0] * most
            for n in range(most):
                take = max(
                    range(n + 1),
                    key=lambda m: share * self.value[m] + later[n - m] if m else 0.0,
                )
                best[n] = share * self.value[take] + later[n - take] if take else 0.0
                splits[n].insert(0, take)
            later = best
        return _Level([0.0] + [1.0 + later[n] for n in range(most)], splits)


def _grow(levels: list[_Level], depth: int, size: int, parent: int, parents: list[int]) -> None:
    node = len(parents)
    parents.append(parent)
    left = size - 1
    if depth == 0:
        return
    level, rank = levels[depth], 0
    while left > 0 and rank < len(level.splits[left]):
        take = level.splits[left][rank]
        if take == 0:
            return
        _grow(levels, depth - 1, take, node, parents)
        left -= take
        rank += 1
