"""One real step to look at: a draft tree, and which of its tokens the target kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ..drafters.base import DraftContext, Drafter, Verified
from ..tree import Proposal

_FEWEST_REJECTED = 2
"""Nodes, of an interesting tree."""


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
        # a tree with something to choose, and the smaller of equals: it is easier to draw
        if _interest(len(path), size) > _interest(len(self._path), len(self._tokens)):
            self._path = path
            self._tokens = verified.tree.tokens[0, :size].tolist()
            self._parents = verified.tree.parents[0, :size].tolist()
        self._drafter.observe(verified)

    def end(self, sequences: Sequence[Sequence[int]], num_prompt: Sequence[int]) -> None:
        self._drafter.end(sequences, num_prompt)

    def example(self, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
        """{"tokens": text of each node, the root first, "parents", "path": the nodes kept}."""
        texts = [decode([token]) for token in self._tokens]
        return {"tokens": texts, "parents": self._parents, "path": self._path}


def _interest(kept: int, size: int) -> tuple[bool, int, int]:
    return size >= kept + _FEWEST_REJECTED, kept, -size
