"""A target and a drafter over a few tokens, whose laws are tables: for tests of the loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec_kernels import DraftContext, Drafter, DraftNode, Proposal, ProposalBuilder, TokenTree


class ToyTarget:
    """Logits are a fixed function of the last two tokens. `noise` makes other tables like it."""

    pads = True

    def __init__(self, vocab_size: int, *, noise: float = 0.0, seed: int = 0) -> None:
        self.device = torch.device("cpu")
        self.vocab_size = vocab_size
        shape = (vocab_size, vocab_size, vocab_size)
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(shape, generator=generator) * 1.5
        self.table += torch.randn(shape, generator=generator) * noise
        self.cached: list[list[int]] = []

    def logits_after(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """[R, V] logits after each token list."""
        last = torch.tensor([t[-2:] for t in tokens], dtype=torch.int64).reshape(-1, 2)
        return self.table[last[:, 0], last[:, 1]]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `decoding.Target`."""
        self.cached = [list(p) for p in prompts]
        return self.logits_after(self.cached)

    def forward(self, tree: TokenTree) -> Tensor:
        """See `decoding.Target`; padding is NaN."""
        batch, nodes = tree.tokens.shape
        logits = torch.full((batch, nodes, self.vocab_size), torch.nan)
        rows = zip(
            tree.tokens.tolist(), tree.parents.tolist(), tree.num_nodes.tolist(), strict=True
        )
        for b, (tokens, parents, size) in enumerate(rows):
            before = [self.cached[b][-1], *tokens]
            pairs = [[before[parents[i] + 1], tokens[i]] for i in range(size)]
            logits[b, :size] = self.logits_after(pairs)
        self._tree = tree
        return logits

    def commit(self, path: Tensor, num_kept: Tensor) -> None:
        """See `decoding.Target`."""
        tokens = self._tree.tokens.gather(1, path.long().clamp_min(0)).tolist()
        for cached, row, kept in zip(self.cached, tokens, num_kept.tolist(), strict=True):
            cached += row[:kept]


class ToyDrafter(Drafter):
    """Draws trees from a table of its own.

    Args:
        table: its logits.
        widths: children of each node, by depth.
        num_top: how many of them are deterministic, by depth.
        draft_vocab: draft ids, as target ids; None means all.
        options: for `ProposalBuilder.sample`.
    """

    def __init__(
        self,
        table: ToyTarget,
        widths: Sequence[int],
        num_top: Sequence[int] = (),
        *,
        draft_vocab: Sequence[int] | None = None,
        **options: object,
    ) -> None:
        self.table = table
        tops = [*num_top, *[0] * len(widths)]
        self.levels = [
            {"num_children": width - top, "num_top": top}
            for width, top in zip(widths, tops, strict=False)
        ]
        self.columns = torch.arange(table.vocab_size)
        self.offsets = None
        if draft_vocab is not None:
            self.columns = torch.tensor(draft_vocab)
            self.offsets = self.columns - torch.arange(len(draft_vocab))
        self.options = options
        self.max_nodes = 1
        for width in reversed(widths):
            self.max_nodes = 1 + width * self.max_nodes

    def propose(self, context: DraftContext) -> Proposal:
        """One tree per row, cut at the depth that is still useful."""
        builder = context.builder(self.offsets)
        nodes = self.parents(builder.roots)
        for level in self.levels:
            nodes = [n for n in nodes if n.depth < context.max_depths[n.row]]
            logits = self.logits(builder, context, nodes)
            children = builder.sample(nodes, logits, **level, **self.options)
            nodes = [child for siblings in children for child in siblings]
        return builder.build()

    def parents(self, roots: list[DraftNode]) -> list[DraftNode]:
        """Rows that draft."""
        return roots

    def logits(
        self, builder: ProposalBuilder, context: DraftContext, nodes: Sequence[DraftNode]
    ) -> Tensor:
        """[R, U] of this drafter after each node."""
        after = [[*context.sequences[n.row][-2:-1], *builder.path(n)] for n in nodes]
        return self.table.logits_after(after)[:, self.columns]
