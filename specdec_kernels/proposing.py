"""A drafter at work: its failures are noted, and the steps that they hit are decoded plainly."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

from .budget import Budget
from .drafters.base import DraftContext, Drafter, Verified
from .shapes import PAD
from .statistics import DecodeStats, DraftFailure
from .tree import Proposal


class Proposer:
    """Asks a drafter for trees, and keeps the loop going when it fails.

    Args:
        drafter: None proposes nothing: every tree is its root.
        stats: where failures and seconds are noted.
        budget: None lets every step draft.
    """

    def __init__(self, drafter: Drafter | None, stats: DecodeStats, budget: Budget | None) -> None:
        self._drafter = drafter
        self._stats = stats
        self._budget = budget
        self._step = 0
        self._seconds = 0.0  # of this step

    @property
    def name(self) -> str:
        """For messages."""
        return type(self._drafter).__name__

    def begin(self, batch: int) -> None:
        """A new batch starts."""
        if self._drafter is not None:
            drafter = self._drafter
            self._guard(lambda: drafter.begin(batch))

    def propose(self, context: DraftContext) -> Proposal:
        """The drafter's trees, or roots alone if it has none, rests or fails."""
        drafter = self._drafter
        self._step += 1
        self._seconds = 0.0
        if drafter is None or (self._budget is not None and self._budget.rests()):
            return plain(context)

        def checked() -> Proposal:
            proposal = drafter.propose(context)
            check_proposal(drafter, proposal, context)
            return proposal

        return self._guard(checked) or plain(context)

    def observe(self, verified: Verified) -> None:
        """Show the drafter what the target made of a step."""
        if self._drafter is not None:
            drafter = self._drafter
            self._guard(lambda: drafter.observe(verified))

    def record(
        self, proposal: Proposal, num_accepted: int, forward_seconds: float, *, pads: bool
    ) -> None:
        """Tell the budget what the step did and cost; `pads` as in `DraftContext`."""
        if self._budget is not None and self._drafter is not None:
            tree = proposal.tree
            sizes = tree.sizes()
            running = sum(size > 0 for size in sizes)
            self._budget.record(
                running=running,
                computed=tree.tokens.numel() if pads else sum(sizes),
                plain=len(sizes) if pads else running,
                num_accepted=num_accepted,
                forward_seconds=forward_seconds,
                draft_seconds=self._seconds,
            )

    def end(self, sequences: Sequence[Sequence[int]], num_prompt: Sequence[int]) -> None:
        """The batch is finished."""
        if self._drafter is not None:
            drafter = self._drafter
            self._guard(lambda: drafter.end(sequences, num_prompt))

    def _guard(self, call: Callable[[], Proposal | None]) -> Proposal | None:
        start = time.perf_counter()
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - whatever a drafter does, the target goes on
            message = f"{type(error).__name__}: {error}"
            self._stats.fail(DraftFailure(self._step, self.name, message))
            if self._stats.num_failures == 1:
                warnings.warn(
                    f"{self.name} failed at step {self._step}, which is decoded plainly: {message}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return None
        finally:
            seconds = time.perf_counter() - start
            self._seconds += seconds
            self._stats.draft_seconds += seconds


def plain(context: DraftContext) -> Proposal:
    """Trees of one node: plain decoding."""
    rows = zip(context.sequences, context.active, strict=True)
    return Proposal.onehot([([s[-1]], [PAD]) if on else ([], []) for s, on in rows], context.device)


def check_proposal(drafter: Drafter, proposal: Proposal, context: DraftContext) -> None:
    """Raise TypeError or ValueError for what is no batch of trees over the vocabulary."""
    if not isinstance(proposal, Proposal):
        raise TypeError(f"propose must return a Proposal, got {type(proposal).__name__}")
    tree = proposal.tree
    batch, nodes = tree.tokens.shape
    if batch != len(context.sequences) or nodes > drafter.max_nodes:
        raise ValueError(
            f"tree.tokens must be [B, N] with B = {len(context.sequences)} and "
            f"N <= max_nodes = {drafter.max_nodes}, got {[batch, nodes]}"
        )
    for b, (tokens, parents) in enumerate(tree.read()):
        size = len(tokens)
        if not context.active[b]:
            expected, rule = size == 0, "num_nodes must be 0 in a finished row"
        else:
            root = context.sequences[b][-1]
            expected = 1 <= size <= nodes and tokens[0] == root
            rule = f"node 0 must be the last committed token {root}"
        if not expected:
            raise ValueError(f"row {b}: {rule}, got {size} nodes {tokens[:4]}")
        _check_nodes(b, tokens, parents, context.vocab_size)


def _check_nodes(b: int, tokens: Sequence[int], parents: Sequence[int], vocab_size: int) -> None:
    for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"row {b}: tokens[{i}] must be in [0, V) = [0, {vocab_size}), got {token}"
            )
        if (parent != PAD) if i == 0 else not 0 <= parent < i:
            rule = "-1 (the root)" if i == 0 else f"in [0, {i})"
            raise ValueError(f"row {b}: parents[{i}] must be {rule}, got {parent}")
