"""The drafter that tests use: the true continuation, hidden among wrong branches."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .base import RowDrafter, check_max_nodes


class OracleDrafter(RowDrafter):
    """Hides the next tokens of known sequences at random nodes among random distractor branches.

    Paths are then long and scattered over the tree, so that wrong masks, positions or cache edits
    change the output; natural drafts often leave such mistakes unnoticed. Deterministic: trees
    depend on `seed`, the row's length and its tokens.

    Args:
        sequences: full token sequences (prompt and true continuation); a row uses the one that it
            is a prefix of, and gets distractors only if there is none.
        vocab_size: distractors are drawn below it.
        max_nodes: nodes of each tree, root included.
        max_hidden: most true tokens in a tree.
        seed: of the trees' shapes and distractors.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        vocab_size: int,
        *,
        max_nodes: int = 16,
        max_hidden: int = 6,
        seed: int = 0,
    ) -> None:
        check_max_nodes("OracleDrafter", max_nodes)
        self.sequences = [list(s) for s in sequences]
        self.vocab_size = vocab_size
        self.max_nodes = max_nodes
        self.max_hidden = max_hidden
        self.seed = seed

    def propose_row(
        self, row: int, sequence: Sequence[int], max_depth: int
    ) -> tuple[list[int], list[int]]:
        """See `RowDrafter`."""
        rng = random.Random(f"{self.seed}/{len(sequence)}/{sequence[-1]}")
        hidden = self._continuation(list(sequence))[: rng.randint(0, self.max_hidden)][:max_depth]
        tokens: list[int] = [sequence[-1]]
        parents: list[int] = [-1]
        depths = [0]
        tip = 0  # deepest node of the true path so far
        while len(tokens) < self.max_nodes and max_depth > 0:
            room = self.max_nodes - len(tokens)
            if hidden and (room <= len(hidden) or rng.random() < 0.4):
                parent, token = tip, hidden.pop(0)
                tip = len(tokens)
            else:
                parent, token = rng.randrange(len(tokens)), rng.randrange(self.vocab_size)
                true_child = parent == tip and hidden and token == hidden[0]
                if (
                    true_child
                    or depths[parent] >= max_depth
                    or _has_child(tokens, parents, parent, token)
                ):
                    continue
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
        return tokens[1:], parents[1:]

    def _continuation(self, sequence: list[int]) -> list[int]:
        for known in self.sequences:
            if known[: len(sequence)] == sequence:
                return known[len(sequence) :]
        return []


def _has_child(tokens: list[int], parents: list[int], parent: int, token: int) -> bool:
    return any(p == parent and t == token for p, t in zip(parents, tokens, strict=True))
