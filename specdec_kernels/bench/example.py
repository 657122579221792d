"""One real step to look at: a draft tree, and which of its tokens the target kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ..drafters.base import DraftContext, Drafter, Verified
from ..tree import Proposal

_FEWEST_REJECTED, _FEWEST_SIBLINGS, _MOST_DRAWN = 2, 2, 16
"""Nodes of an interesting tree that were not kept, that are not the first of their parent, and all
that there is room for in a picture.
"""


class Witness(Drafter):
    """Another drafter, and the step of the first row of which the target kept the most."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.max_nodes = drafter.max_nodes
        self.wants_budget = drafter.wants_budget
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._path: list[int] = []

    def __str__(self) -> str:
        return str(self._drafter)

    def attach(self, target: object) -> AbstractContextManager[object]:
        return self._drafter.attach(target)

    def begin(self, batch: int) -> None:
        self._drafter.begin(batch)

    def propose(self, context: DraftContext) -> Proposal:
        return self._drafter.propose(context)

    def observe(self, verified: Verified) -> None:
        path, size = list(verified.paths[0]), int(verified.tree.num_nodes[0])
        parents = verified.tree.parents[0, :size].tolist()
        if _interest(path, parents) > _interest(self._path, self._parents):
            self._path, self._parents = path, parents
            self._tokens = verified.tree.tokens[0, :size].tolist()
        self._drafter.observe(verified)

    def end(self, sequences: Sequence[Sequence[int]], num_prompt: Sequence[int]) -> None:
        self._drafter.end(sequences, num_prompt)

    def example(self, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
        """{"tokens": text of each node, the root first, "parents", "path": the nodes kept}."""
        texts = [decode([token]) for token in self._tokens]
        return {"tokens": texts, "parents": self._parents, "path": self._path}


def _interest(path: Sequence[int], parents: Sequence[int]) -> tuple[bool, bool, int, int]:
    """Of a tree that can be drawn, with something to choose; then of the kept path, and the smaller
    of equals.
    """
    kept, size = len(path), len(parents)
    num_siblings = size - len(set(parents))  # that are not the first
    is_tree = num_siblings >= _FEWEST_SIBLINGS and size <= _MOST_DRAWN
    return is_tree, size >= kept + _FEWEST_REJECTED, kept, -size
