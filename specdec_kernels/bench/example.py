"""One real step to look at: a draft tree, and which of its tokens the target kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..drafters.base import DraftContext, Drafter, Verified
from ..hf.generate import SpeculativeDecoder
from ..hf.text import TextModel
from ..tree import Proposal

_FEWEST_REJECTED = 4
"""Nodes, of an interesting tree."""


class _Witness(Drafter):
    """Another drafter, and the step of which the target kept the most."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.max_nodes = drafter.max_nodes
        self.wants_budget = drafter.wants_budget
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.path: list[int] = []

    def attach(self, target: object) -> AbstractContextManager[object]:
        return self._drafter.attach(target)

    def begin(self, batch: int) -> None:
        self._drafter.begin(batch)

    def propose(self, context: DraftContext) -> Proposal:
        return self._drafter.propose(context)

    def observe(self, verified: Verified) -> None:
        path, size = list(verified.paths[0]), int(verified.tree.num_nodes[0])
        # a tree with something to choose, and the smaller of equals: it is easier to draw
        if _interest(len(path), size) > _interest(len(self.path), len(self.tokens)):
            self.path = path
            self.tokens = verified.tree.tokens[0, :size].tolist()
            self.parents = verified.tree.parents[0, :size].tolist()
        self._drafter.observe(verified)

    def end(self, sequences: Sequence[Sequence[int]], num_prompt: Sequence[int]) -> None:
        self._drafter.end(sequences, num_prompt)


def _interest(kept: int, size: int) -> tuple[bool, int, int]:
    return size >= kept + _FEWEST_REJECTED, kept, -size


def example_step(
    subject: TextModel, prompt: Tensor, drafter: Drafter, max_new_tokens: int
) -> dict[str, Any]:
    """The best step after a prompt [1, P].

    Returns:
        {"tokens": text of each node, the root first, "parents", "path": the nodes kept}.
    """
    witness = _Witness(drafter)
    decoder = SpeculativeDecoder(witness)
    subject.generate(
        prompt, do_sample=False, max_new_tokens=max_new_tokens, custom_generate=decoder
    )
    texts = [subject.decode([token]) for token in witness.tokens]
    return {"tokens": texts, "parents": witness.parents, "path": witness.path}
