"""The logits and scores that `output_logits` and `output_scores` ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..drafting import SamplingParams
from ..sampling import filtered_scores


class ScoreRecord:
    """Collects what each emitted token was chosen from.

    A row that has ended has no logits any more: its entries are 0 from there on.

    Args:
        sampling: filters that `verify` applied itself.
        batch: rows.
        keeps_logits, keeps_scores: what to collect.
    """

    def __init__(
        self, sampling: SamplingParams, batch: int, *, keeps_logits: bool, keeps_scores: bool
    ) -> None:
        self._sampling = sampling
        self._logits: list[list[Tensor]] | None = (
            [[] for _ in range(batch)] if keeps_logits else None
        )
        self._scores: list[list[Tensor]] | None = (
            [[] for _ in range(batch)] if keeps_scores else None
        )

    def __bool__(self) -> bool:
        return self._logits is not None or self._scores is not None

    def __call__(self, row: int, logits: Tensor, processed: Tensor) -> None:
        """See `decoding.Recorder`."""
        if self._logits is not None:
            self._logits[row] += logits.float().clone()
        if self._scores is not None:
            self._scores[row] += self._filtered(row, processed)

    def logits(self, counts: Sequence[int]) -> tuple[Tensor, ...] | None:
        """[B, V] float32 for each new token, `counts` [B] of them: the model's own."""
        return None if self._logits is None else _by_step(self._logits, counts)

    def scores(self, counts: Sequence[int]) -> tuple[Tensor, ...] | None:
        """[B, V] float32 for each new token, `counts` [B] of them: after processors and filters."""
        return None if self._scores is None else _by_step(self._scores, counts)

    def scores_of(self, row: int, count: int) -> tuple[Tensor, ...] | None:
        """[1, V] float32 for each of the first `count` new tokens of a row."""
        return None if self._scores is None else tuple(s[None] for s in self._scores[row][:count])

    def _filtered(self, row: int, processed: Tensor) -> Tensor:
        params = self._sampling
        names = ("temperature", "top_k", "top_p", "min_p", "bias")
        values = [getattr(params, name) for name in names]
        count = len(processed)
        rows = [None if v is None else v[row : row + 1].expand(count, *v.shape[1:]) for v in values]
        return filtered_scores(processed, *rows)


def _by_step(rows: list[list[Tensor]], counts: Sequence[int]) -> tuple[Tensor, ...]:
    absent = torch.zeros_like(rows[0][0])
    steps = max(counts)
    padded = [
        [*row[:count], *[absent] * (steps - count)] for row, count in zip(rows, counts, strict=True)
    ]
    return tuple(torch.stack(step) for step in zip(*padded, strict=True))
