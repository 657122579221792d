"""Token trees and proposals: what a drafter hands to the decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.functional import pad

from .shapes import PAD


class DraftKind(IntEnum):
    """How a draft token came to be; it decides which law the acceptance rule tests it against."""

    ONEHOT = 0
    """Chosen deterministically: its draft law puts all mass on the token."""
    SAMPLED = 1
    """Drawn from its parent's recorded fp32 law, independently of its siblings."""
    SAMPLED_WITHOUT_REPLACEMENT = 2
    """Drawn from that law without the tokens of its earlier siblings of this kind."""


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
    _rows: list[tuple[list[int], list[int]]] | None = field(default=None, init=False, repr=False)

    @staticmethod
    def from_rows(
        rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu"
    ) -> TokenTree:
        """Pad per-request (tokens, parents) lists into one batch.

        Raises:
            ValueError: a wrong topology, naming the row and the node.
        """
        for b, (tokens, parents) in enumerate(rows):
            _check_topology(b, tokens, parents)
        tree = TokenTree(
            *at_once(
                device,
                pad_rows([tokens for tokens, _ in rows], torch.int64),
                pad_rows([parents for _, parents in rows], torch.int32, value=PAD),
                torch.tensor([len(tokens) for tokens, _ in rows], dtype=torch.int32, device="cpu"),
            )
        )
        tree._keep([(list(tokens), list(parents)) for tokens, parents in rows])
        return tree

    def rows(self) -> list[tuple[list[int], list[int]]]:
        """(tokens, parents) of each row without padding, not to be changed: what the tree was made
        of, or was when it was `read`.
        """
        return self.read() if self._rows is None else self._rows

    def read(self) -> list[tuple[list[int], list[int]]]:
        """The same from the tensors, at once: somebody may have written into them.

        Raises:
            ValueError: sizes that no row can have.
        """
        nodes = self.tokens.shape[1]
        rows = []
        parts = (self.num_nodes[:, None], self.tokens, self.parents)
        for b, (size, *row) in enumerate(torch.cat(parts, 1).tolist()):
            if not 0 <= size <= nodes:
                raise ValueError(f"tree: row {b}: num_nodes must be in [0, {nodes}], got {size}")
            rows.append((row[:size], row[nodes : nodes + size]))
        self._keep(rows)
        return rows

    def sizes(self) -> list[int]:
        """`num_nodes` on the host."""
        return [len(tokens) for tokens, _ in self.rows()]

    def _keep(self, rows: list[tuple[list[int], list[int]]]) -> None:
        object.__setattr__(self, "_rows", rows)


@dataclass(frozen=True, slots=True, init=False, eq=False)
class Proposal:
    """A batch of draft trees, with the laws that their sampled tokens were drawn from.

    Made by `Proposal.onehot` (deterministic drafts) or by `drafting.ProposalBuilder`, which draws
    the tokens itself: there is no other constructor, so a law that was not sampled cannot be
    tested.

    Attributes:
        tree: the drafted trees.
        kinds: [B, N] int8 of `DraftKind`.
        draft_rows: [B, N] int32, node -> row of the law of its sampled children, else PAD; None if
            no node of the batch was sampled, and then there are no laws either.
        draft_probs: [B, Q, U] float32, those laws, over draft ids.
        draft_offsets: [U] int64, draft id u is target id `u + draft_offsets[u]`; None if
            the vocabularies agree.
    """

    tree: TokenTree
    kinds: Tensor
    draft_rows: Tensor | None
    draft_probs: Tensor | None
    draft_offsets: Tensor | None

    def __init__(self, *_: object, **__: object) -> None:
        raise TypeError(
            "Proposal cannot be constructed from tensors: use Proposal.onehot(rows) for "
            "deterministic drafts, or a ProposalBuilder, which draws the tokens and records the "
            "law that it drew from"
        )

    @staticmethod
    def onehot(
        rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu"
    ) -> Proposal:
        """A proposal of deterministic drafts from per-request (tokens, parents) lists.

        Raises:
            ValueError: a wrong topology, naming the row and the node.
        """
        tree = TokenTree.from_rows(rows, device)
        return _seal(tree, torch.zeros_like(tree.tokens, dtype=torch.int8), None, None, None)


def agreed(
    proposal: Proposal, agree: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
) -> Proposal:
    """The trees that all processes of a distributed target score; see `decoding.Agree`.

    A process that drafted other trees knows no laws for these. It needs none: how they are tested
    is agreed on, too.
    """
    own = proposal.tree
    (shape,) = agree((torch.tensor(own.tokens.shape, device=own.tokens.device),))
    missing = int(shape[1]) - own.tokens.shape[1]
    tree = TokenTree(
        *agree(
            (
                pad(own.tokens, (0, missing)),
                pad(own.parents, (0, missing), value=PAD),
                own.num_nodes,
            )
        )
    )
    pairs = (
        (tree.tokens, own.tokens),
        (tree.parents, own.parents),
        (tree.num_nodes, own.num_nodes),
    )
    if all(torch.equal(ours, theirs) for ours, theirs in pairs):
        return proposal
    return _seal(tree, torch.zeros_like(tree.tokens, dtype=torch.int8), None, None, None)


def _seal(
    tree: TokenTree,
    kinds: Tensor,
    draft_rows: Tensor | None,
    draft_probs: Tensor | None,
    draft_offsets: Tensor | None,
) -> Proposal:
    """The constructor of `Proposal`, for code that has itself drawn the tokens from these laws."""
    proposal = object.__new__(Proposal)
    values = (tree, kinds, draft_rows, draft_probs, draft_offsets)
    for name, value in zip(Proposal.__slots__, values, strict=True):
        object.__setattr__(proposal, name, value)
    return proposal


def at_once(device: torch.device | str, *values: Tensor) -> Sequence[Tensor]:
    """Integer tensors of the host on a device, by one transfer: the host waits for each."""
    if torch.device(device).type == "cpu":
        return values
    # aligned to 16 bytes, by which kernels are chosen
    padded = [pad(v.flatten().long(), (0, v.numel() % 2)) for v in values]
    parts = torch.cat(padded).to(device).split([len(v) for v in padded])
    return [
        part[: v.numel()].view(v.shape).to(v.dtype) for part, v in zip(parts, values, strict=True)
    ]


def pad_rows(
    rows: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    value: int = 0,
) -> Tensor:
    """[len(rows), longest row], padded on the right with `value`."""
    width = max((len(row) for row in rows), default=0)
    padded = [[*row, *[value] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=dtype, device=device).reshape(len(rows), width)


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
        return int(torch.randint(low, high, (), generator=generator, device="cpu"))

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
