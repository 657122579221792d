"""What decoding did: steps, tokens, acceptance by depth and by rank, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

_MAX_FAILURES = 16
"""Failures kept with their text; all are counted."""


@dataclass(slots=True)
class Acceptance:
    """How often draft tokens were right, where the target got as far as testing them.

    A depth is tested when its parent was kept and had children; a rank when the parent was kept and
    had so many children. Index 0 is depth 1, and the first child.

    Attributes:
        tested_by_depth, accepted_by_depth: steps.
        tested_by_rank, accepted_by_rank: nodes.
    """

    tested_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    tested_by_rank: list[int] = field(default_factory=list)
    accepted_by_rank: list[int] = field(default_factory=list)

    def count(self, parents: Sequence[int], path: Sequence[int]) -> None:
        """Add one tree, of which the nodes `path` were kept, the root first."""
        children: dict[int, list[int]] = {node: [] for node in path}
        for node in range(1, len(parents)):
            if parents[node] in children:
                children[parents[node]].append(node)
        for depth, node in enumerate(path):
            siblings = children[node]
            following = path[depth + 1] if depth + 1 < len(path) else None
            if siblings:
                _add(self.tested_by_depth, depth, 1)
                _add(self.accepted_by_depth, depth, following is not None)
            for rank, child in enumerate(siblings):
                _add(self.tested_by_rank, rank, 1)
                _add(self.accepted_by_rank, rank, child == following)

    def add(self, other: Acceptance) -> None:
        """Add what another one counted."""
        for f in fields(self):
            mine = getattr(self, f.name)
            for index, value in enumerate(getattr(other, f.name)):
                _add(mine, index, value)

    def by_depth(self) -> list[float]:
        """Fraction of tested depths that were accepted."""
        return _ratios(self.accepted_by_depth, self.tested_by_depth)

    def by_rank(self) -> list[float]:
        """Fraction of tested children of each rank that were accepted: what
        `trees.best_static_tree` takes.
        """
        return _ratios(self.accepted_by_rank, self.tested_by_rank)


@dataclass(frozen=True, slots=True)
class DraftFailure:
    """A step that was decoded plainly, because the drafter raised or proposed no tree."""

    step: int
    drafter: str
    error: str


@dataclass(slots=True)
class DecodeStats:
    """What one call of `decode` did.

    Attributes:
        num_steps: verify steps of each row (forward passes while the row was active).
        num_tokens: tokens that each row got from verify steps (the first token comes from the
            prefill).
        num_drafted, num_accepted: draft tokens proposed and kept, per row.
        acceptance: by depth and by rank, over all rows.
        failures: the first ones; num_failures counts all.
        prefill_seconds, forward_seconds, verify_seconds, draft_seconds, total_seconds: wall time of
            the batch: forward is the target's, verify is acceptance and the edit of the cache,
            draft is proposing and learning, total includes the prefill.
    """

    num_steps: list[int]
    num_tokens: list[int]
    num_drafted: list[int]
    num_accepted: list[int]
    acceptance: Acceptance = field(default_factory=Acceptance)
    failures: list[DraftFailure] = field(default_factory=list)
    num_failures: int = 0
    prefill_seconds: float = 0.0
    forward_seconds: float = 0.0
    verify_seconds: float = 0.0
    draft_seconds: float = 0.0
    total_seconds: float = 0.0

    @staticmethod
    def start(batch: int) -> DecodeStats:
        """Zeros for a batch."""
        return DecodeStats([0] * batch, [0] * batch, [0] * batch, [0] * batch)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens per row and verify step; 1.0 is plain decoding."""
        return sum(self.num_tokens) / max(1, sum(self.num_steps))

    def fail(self, failure: DraftFailure) -> None:
        """Note a failure of the drafter."""
        self.num_failures += 1
        if len(self.failures) < _MAX_FAILURES:
            self.failures.append(failure)


@dataclass(slots=True)
class TotalStats:
    """Sums over many calls; its size does not grow with them.

    Attributes:
        num_calls, num_rows: batches, and the rows in them.
        others: as in `DecodeStats`, over all rows.
    """

    num_calls: int = 0
    num_rows: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_failures: int = 0
    prefill_seconds: float = 0.0
    forward_seconds: float = 0.0
    verify_seconds: float = 0.0
    draft_seconds: float = 0.0
    total_seconds: float = 0.0
    acceptance: Acceptance = field(default_factory=Acceptance)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens per row and verify step; 1.0 is plain decoding."""
        return self.num_tokens / max(1, self.num_steps)

    def add(self, stats: DecodeStats) -> None:
        """Add one call."""
        self.num_calls += 1
        self.num_rows += len(stats.num_steps)
        for name in ("num_steps", "num_tokens", "num_drafted", "num_accepted"):
            setattr(self, name, getattr(self, name) + sum(getattr(stats, name)))
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(stats, name))
        self.acceptance.add(stats.acceptance)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the ratios."""
        return {
            **asdict(self),
            "tokens_per_step": self.tokens_per_step,
            "acceptance_by_depth": self.acceptance.by_depth(),
            "acceptance_by_rank": self.acceptance.by_rank(),
        }


_SUMMED = ("num_failures", *(f.name for f in fields(DecodeStats) if f.name.endswith("_seconds")))


def _add(counts: list[int], index: int, value: int) -> None:
    if index >= len(counts):
        counts.extend([0] * (index + 1 - len(counts)))
    counts[index] += value


def _ratios(hits: Sequence[int], trials: Sequence[int]) -> list[float]:
    return [hit / trial if trial else 0.0 for hit, trial in zip(hits, trials, strict=True)]
