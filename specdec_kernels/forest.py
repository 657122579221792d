"""Token trees that grow node by node, one per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .shapes import PAD
from .tree import DraftKind, TokenTree


@dataclass(frozen=True, slots=True)
class DraftNode:
    """A node of a growing tree; its index stays what it is when other nodes are pruned."""

    row: int
    index: int
    token: int
    depth: int


@dataclass(slots=True)
class Entry:
    """What a forest knows of a node.

    Attributes:
        node: its handle.
        parent: index of its parent, PAD at the root.
        kind: how its token came to be.
        law: number, in its row, of the law of its sampled children; PAD without such.
        is_drawn_from: whether its children were asked of a draft law.
        is_pruned: whether it is gone.
    """

    node: DraftNode
    parent: int
    kind: DraftKind
    law: int = PAD
    is_drawn_from: bool = False
    is_pruned: bool = False


class Forest:
    """One growing tree per active row.

    Args:
        sequences: committed tokens of each row; the last one is its root.
        vocab_size: V of the target.
        active: rows that get a tree; None means all.

    Attributes:
        roots: the root of every active row.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        active: Sequence[bool] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self._is_finished = False
        self._entries: list[list[Entry]] = [[] for _ in sequences]
        self.roots = [
            self._append(DraftNode(row, PAD, PAD, -1), sequence[-1], DraftKind.ONEHOT)
            for row, sequence in enumerate(sequences)
            if active is None or active[row]
        ]

    def path(self, node: DraftNode) -> list[int]:
        """Tokens from the root to the node, both included."""
        entry = self._find(node)
        tokens = [entry.node.token]
        while entry.parent != PAD:
            entry = self._entries[node.row][entry.parent]
            tokens.append(entry.node.token)
        return tokens[::-1]

    def add(self, parent: DraftNode, token: int) -> DraftNode:
        """Add a deterministic child.

        Raises:
            ValueError: an unknown parent, a token outside the target's vocabulary.
        """
        self._find(parent)
        return self._append(parent, token, DraftKind.ONEHOT)

    def prune(self, nodes: Sequence[DraftNode]) -> None:
        """Remove deterministic nodes, each with all below it.

        Raises:
            ValueError: an unknown node, a root, a sampled node or one with sampled nodes below it.
        """
        doomed: list[Entry] = []
        for node in nodes:
            self._find(node)
            if node.index == 0:
                raise ValueError(f"proposal: row {node.row}: the root cannot be pruned")
            doomed += self._subtree(node)
        for entry in doomed:
            if entry.kind != DraftKind.ONEHOT:
                raise ValueError(
                    f"proposal: row {entry.node.row}: node {entry.node.index} was sampled and "
                    "cannot be pruned: whether a sampled token is verified may not depend on it; "
                    "decide before drawing"
                )
        for entry in doomed:
            entry.is_pruned = True

    def _kept(self) -> list[list[Entry]]:
        """The nodes of each row that were not pruned."""
        return [[entry for entry in row if not entry.is_pruned] for row in self._entries]

    def _tree(self, kept: Sequence[Sequence[Entry]], device: torch.device) -> TokenTree:
        rows = []
        for entries in kept:
            index = {entry.node.index: i for i, entry in enumerate(entries)} | {PAD: PAD}
            parents = [index[entry.parent] for entry in entries]
            rows.append(([entry.node.token for entry in entries], parents))
        return TokenTree.from_rows(rows, device)

    def _append(self, parent: DraftNode, token: int, kind: DraftKind) -> DraftNode:
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"proposal: row {parent.row}: a token must be in [0, V) = [0, {self.vocab_size}), "
                f"got {token}"
            )
        entries = self._entries[parent.row]
        node = DraftNode(parent.row, len(entries), token, parent.depth + 1)
        entries.append(Entry(node, parent.index, kind))
        return node

    def _find(self, node: DraftNode) -> Entry:
        if self._is_finished:
            raise ValueError("proposal: it is built; make a new builder for the next step")
        row, index = node.row, node.index
        if 0 <= row < len(self._entries) and 0 <= index < len(self._entries[row]):
            entry = self._entries[row][index]
            if entry.node == node and not entry.is_pruned:
                return entry
        raise ValueError(f"proposal: row {row} has no such node {index}")

    def _subtree(self, node: DraftNode) -> list[Entry]:
        """The node and all below it; parents come before their children."""
        inside = {node.index}
        below = []
        for entry in self._entries[node.row][node.index :]:
            if not entry.is_pruned and inside & {entry.node.index, entry.parent}:
                inside.add(entry.node.index)
                below.append(entry)
        return below
