"""Token trees and proposals: what a drafter hands to the decoding loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .shapes import PAD


class DraftKind(IntEnum):
    """How a draft token came to be; it decides which law the acceptance rule tests it against."""

    ONEHOT = 0
    """Chosen deterministically: its draft law puts all mass on the token."""
    SAMPLED = 1
    """Drawn from a recorded fp32 law, which travels with the proposal."""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A batch of token trees.

    Node 0 is the root: the last committed token, whose K/V is not in the cache yet.

    Attributes:
        tokens: [B, N] int64; padding nodes hold 0.
        parents: [B, N] int32; the root and padding nodes hold -1, otherwise `parents[b, i] < i`.
        num_nodes: [B] int32; 0 marks an idle row.
    """

    tokens: Tensor
    parents: Tensor
    num_nodes: Tensor

    @staticmethod
    def from_rows(
        rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu"
    ) -> TokenTree:
        """Pad per-request (tokens, parents) lists into one batch.

        Raises:
            ValueError: a wrong topology, naming the row and the node.
        """
        width = max((len(tokens) for tokens, _ in rows), default=0)
        for b, (tokens, parents) in enumerate(rows):
            _check_topology(b, tokens, parents)
        pad_tokens = [[*tokens, *[0] * (width - len(tokens))] for tokens, _ in rows]
        pad_parents = [[*parents, *[PAD] * (width - len(parents))] for _, parents in rows]
        return TokenTree(
            torch.tensor(pad_tokens, dtype=torch.int64, device=device).reshape(len(rows), width),
            torch.tensor(pad_parents, dtype=torch.int32, device=device).reshape(len(rows), width),
            torch.tensor([len(tokens) for tokens, _ in rows], dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class Proposal:
    """A token tree together with the laws its tokens were drawn from.

    Built by `Proposal.onehot` (deterministic drafts). The tree and its draft laws are made in one
    place, so a law other than the one that was sampled cannot be tested.

    Attributes:
        tree: the drafted trees.
        kinds: [B, N] int8 of `DraftKind`.
    """

    tree: TokenTree
    kinds: Tensor

    @staticmethod
    def onehot(
        rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu"
    ) -> Proposal:
        """A proposal of deterministic drafts from per-request (tokens, parents) lists."""
        tree = TokenTree.from_rows(rows, device)
        return Proposal(tree, torch.zeros_like(tree.tokens, dtype=torch.int8))


def _check_topology(b: int, tokens: Sequence[int], parents: Sequence[int]) -> None:
    if len(tokens) != len(parents):
        raise ValueError(
            f"tree: row {b} must have one parent per token, "
            f"got {len(tokens)} tokens and {len(parents)} parents"
        )
    for i, parent in enumerate(parents):
        if (parent != PAD) if i == 0 else not 0 <= parent < i:
            rule = "-1 (the root)" if i == 0 else f"in [0, {i})"
            raise ValueError(f"tree: row {b}: parents[{i}] must be {rule}, got {parent}")


def random_trees(
    batch: int, nodes: int, vocab: int, generator: torch.Generator, *, chain: bool = False
) -> TokenTree:
    """Random ragged trees with distinct siblings, for tests and benches.

    The first row has all `nodes` nodes; the last one is idle if there are more than two rows.
    """

    def randint(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows = []
    for b in range(batch):
        size = nodes if b == 0 else 0 if 0 < b == batch - 1 > 1 else randint(1, nodes + 1)
        parents = [PAD, *(i - 1 if chain else randint(0, i) for i in range(1, nodes))][:size]
        tokens: list[int] = []
        for i, parent in enumerate(parents):
            siblings = {tokens[j] for j in range(i) if parents[j] == parent}
            free = [t for t in range(min(vocab, nodes + 1)) if t not in siblings]
            tokens.append(free[randint(0, len(free))])
        rows.append((tokens, parents))
    return TokenTree.from_rows(rows)
