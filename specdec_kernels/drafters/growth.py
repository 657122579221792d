"""Draft trees that a network computes level by level, behind the committed slots of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shapes import PAD, num_words
from ..tree import at_once, pad_rows


@dataclass(frozen=True, slots=True)
class Block:
    """Some nodes of growing trees, computed together: M of at most N nodes in each row.

    Attributes:
        tokens: [B, M] int64; padding holds 0.
        firsts: [B] int32, the number of each row's first one; they are consecutive.
        counts: [B] int32, how many of them each row has.
        places: [B, M] int64, their numbers; padding holds some node's.
        sources: [B, N] int64, node -> its column among the M, or any column for other nodes.
        num_nodes: [B] int32, nodes of each tree so far.
        ancestors: [B, N, W] int64 and depths [B, N] int32, as from `ops.tree_mask`, but a node
            without parent hangs on the committed tokens themselves.
    """

    tokens: Tensor
    firsts: Tensor
    counts: Tensor
    places: Tensor
    sources: Tensor
    num_nodes: Tensor
    ancestors: Tensor
    depths: Tensor


class Growth:
    """The nodes of each row, numbered in the order in which they were computed.

    Their parents come before them; a node without parent (PAD) continues the committed tokens.

    Args:
        batch: B.
        device: of the tensors of its blocks.
    """

    def __init__(self, batch: int, device: torch.device | str = "cpu") -> None:
        self._device = device
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.parents: list[list[int]] = [[] for _ in range(batch)]
        self._depths: list[list[int]] = [[] for _ in range(batch)]
        self._ancestors: list[list[int]] = [[] for _ in range(batch)]

    def add(self, rows: Sequence[Sequence[tuple[int, int]]]) -> Block:
        """Append (token, parent) nodes to each row."""
        firsts = [len(tokens) for tokens in self.tokens]
        for b, row in enumerate(rows):
            for token, parent in row:
                node = len(self.tokens[b])
                above = 0 if parent == PAD else self._ancestors[b][parent]
                self._ancestors[b].append(above | 1 << node)
                self._depths[b].append(0 if parent == PAD else self._depths[b][parent] + 1)
                self.tokens[b].append(token)
                self.parents[b].append(parent)
        return self._block(firsts, [[token for token, _ in row] for row in rows])

    def walk(self, row: int, tokens: Sequence[int]) -> list[int]:
        """The nodes along these tokens from the committed ones on, as far as there are any."""
        path: list[int] = []
        at = PAD
        for token in tokens:
            found = [
                node
                for node, parent in enumerate(self.parents[row])
                if parent == at and self.tokens[row][node] == token
            ]
            if not found:
                break
            at = found[0]
            path.append(at)
        return path

    def _block(self, firsts: list[int], tokens: list[list[int]]) -> Block:
        sizes, counts = [len(row) for row in self.tokens], [len(row) for row in tokens]
        nodes, width = max(sizes, default=0), max(counts, default=0)
        words, last = num_words(nodes), max(nodes - 1, 0)
        none = [0] * words
        bits = [
            [[_signed(mask >> 64 * w) for w in range(words)] for mask in row]
            + [none] * (nodes - len(row))
            for row in self._ancestors
        ]
        places = [[min(first + i, last) for i in range(width)] for first in firsts]
        sources = [[min(max(i - first, 0), width - 1) for i in range(nodes)] for first in firsts]
        batch = len(sizes)
        of_rows, own, at, of, ancestors, depths = at_once(
            self._device,
            torch.tensor([firsts, counts, sizes], dtype=torch.int32, device="cpu"),
            pad_rows(tokens, torch.int64),
            torch.tensor(places, dtype=torch.int64, device="cpu").view(batch, width),
            torch.tensor(sources, dtype=torch.int64, device="cpu").view(batch, nodes),
            torch.tensor(bits, dtype=torch.int64, device="cpu").view(batch, nodes, words),
            pad_rows(self._depths, torch.int32),
        )
        first, count, num_nodes = of_rows.unbind()
        return Block(own, first, count, at, of, num_nodes, ancestors, depths)


def chain(rows: Sequence[Sequence[int]], device: torch.device | str) -> Block:
    """Tokens of each row one after another."""
    return Growth(len(rows), device).add(
        [[(token, i - 1 if i else PAD) for i, token in enumerate(row)] for row in rows]
    )


def _signed(word: int) -> int:
    """The low 64 bits as a signed number."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word
