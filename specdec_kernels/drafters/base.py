"""What a drafter sees and what it must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..drafting import ProposalBuilder, SamplingParams
from ..shapes import PAD
from ..tree import Proposal, TokenTree

if TYPE_CHECKING:
    from ..budget import Budget


@dataclass(frozen=True, slots=True)
class DraftContext:
    """One decoding step, before the forward pass.

    Attributes:
        sequences: committed tokens of each row, prompt included; the last one is the root of the
            row's tree.
        active: whether a row still runs; a finished row gets a tree of 0 nodes.
        max_depths: deepest useful node of each row: later ones would pass the length limit.
        device: where the proposal's tensors belong.
        vocab_size: V of the target.
        sampling: the target's seeds and sampling parameters.
        budget: chooses the size of trees whose nodes have estimated probabilities; None leaves it
            to the drafter.
        pads: whether the pass pays for every tree as for the largest.
    """

    sequences: Sequence[Sequence[int]]
    active: Sequence[bool]
    max_depths: Sequence[int]
    device: torch.device
    vocab_size: int
    sampling: SamplingParams
    budget: Budget | None = None
    pads: bool = True

    def least_score(self) -> float:
        """Probability of acceptance below which no draft node is worth its place; 0 without a
        budget.
        """
        if self.budget is None:
            return 0.0
        running = sum(self.active)
        finished = len(self.active) - running
        return self.budget.least_score(running, finished=finished, pads=self.pads)

    def is_full(self) -> Callable[[int, float, float], bool] | None:
        """See `Budget`; None without one, and where rows share it."""
        return None if self.budget is None or len(self.active) > 1 else self.budget.is_full()

    def sizes(self, scores: Sequence[Sequence[float]]) -> list[int]:
        """Nodes of each row's tree, root included, by the budget: all that there are without one,
        and 0 in a finished row.

        Args:
            scores: for each row, the probability of acceptance of its draft nodes, sorted so that
                every prefix is a tree.
        """
        sizes = [1 + len(row) if on else 0 for row, on in zip(scores, self.active, strict=True)]
        if self.budget is not None:
            running = [b for b, active in enumerate(self.active) if active]
            chosen = self.budget.choose(
                [scores[b] for b in running], finished=len(scores) - len(running), pads=self.pads
            )
            for b, size in zip(running, chosen, strict=True):
                sizes[b] = size
        return sizes

    def builder(self, offsets: Tensor | None = None) -> ProposalBuilder:
        """A new builder, whose draws use the target's seeds, temperature and filters.

        Args:
            offsets: [U] int64, as in `ProposalBuilder`.
        """
        return ProposalBuilder(
            self.sequences,
            vocab_size=self.vocab_size,
            sampling=self.sampling,
            active=self.active,
            device=self.device,
            offsets=offsets,
        )


@dataclass(frozen=True, slots=True)
class Verified:
    """What the target made of a step. The prefill counts as a step over the last prompt tokens.

    Attributes:
        tree: the trees that it scored.
        logits: [B, N, V], after each node; undefined at padding nodes. Valid during the call.
        paths: nodes of each row that were kept, the root first; [] in an idle row.
        sequences: committed tokens of each row, those of this step included.
    """

    tree: TokenTree
    logits: Tensor
    paths: Sequence[Sequence[int]]
    sequences: Sequence[Sequence[int]]


class Drafter(ABC):
    """Guesses continuations; the output stays the target's, it can only be slow or fast.

    Attributes:
        max_nodes: most nodes of a tree, the root included.
        wants_budget: whether decoders give it a `Budget` unless told otherwise: not where drafts
            are sampled, as the wall clock would then decide which draws are made.
        num_parameters: of the network that drafts; 0 without one.
    """

    max_nodes: int
    wants_budget: bool = False
    num_parameters: int = 0

    def __str__(self) -> str:
        return type(self).__name__

    def attach(self, target: object) -> AbstractContextManager[object]:
        """Entered around a call of `decode`, for drafters that look into the target; `target` is a
        `network.TargetView`.
        """
        return nullcontext()

    def begin(self, batch: int) -> None:  # noqa: B027 - drafters without state have nothing to reset
        """A new batch of `batch` rows starts: forget the rows of the last one."""

    @abstractmethod
    def propose(self, context: DraftContext) -> Proposal:
        """One tree per row."""

    def observe(self, verified: Verified) -> None:  # noqa: B027 - as above
        """Learn from a step, before the next one."""

    def end(self, sequences: Sequence[Sequence[int]], num_prompt: Sequence[int]) -> None:  # noqa: B027 - as above
        """The batch is finished: its sequences, and how many tokens of each are the prompt."""


class RowDrafter(Drafter):
    """A drafter that looks at one row at a time and draws nothing at random: its drafts are
    one-hot.
    """

    def propose(self, context: DraftContext) -> Proposal:
        """One tree per row, from `propose_row`."""
        rows: list[tuple[list[int], list[int]]] = []
        for b, sequence in enumerate(context.sequences):
            if not context.active[b]:
                rows.append(([], []))
                continue
            tokens, parents = self.propose_row(b, sequence, context.max_depths[b])
            rows.append(([sequence[-1], *tokens], [PAD, *parents]))
        return Proposal.onehot(rows, context.device)

    @abstractmethod
    def propose_row(
        self, row: int, sequence: Sequence[int], max_depth: int
    ) -> tuple[list[int], list[int]]:
        """Draft tokens and their parents as node indices: 0 is the root, draft token i is
        node i + 1.
        """


def check_max_nodes(name: str, max_nodes: int) -> None:
    """Raise ValueError unless a tree can hold its root."""
    if max_nodes < 1:
        raise ValueError(f"{name}: max_nodes must be >= 1 (the root), got {max_nodes}")
