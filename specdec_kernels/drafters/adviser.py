"""What trained heads say of the nodes of a growing tree, for a drafter that asks others too."""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..ops import topk_logprobs
from .base import DraftContext
from .network import DraftNetwork, Level

_BOUNDS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
"""Probabilities between two of them are not told apart when their hits are counted."""
_KEPT = 0.99
"""Of the times that calls took, with every step in which one was not worth it."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What may follow a node.

    Attributes:
        probabilities: of the likeliest tokens, the likeliest first.
    """

    probabilities: dict[int, float]

    def share(self, token: int, refuted: float) -> float:
        """The token's probability if others of the total probability `refuted` are wrong."""
        return min(1.0, self.probabilities.get(token, 0.0) / max(1.0 - refuted, 1e-6))


def level_of(probability: float) -> int:
    """0 to 10: what estimates distinguish."""
    return bisect(_BOUNDS, probability)


class Adviser:
    """A network whose nodes another drafter chooses.

    Args:
        network: for instance trained heads.
        depth: levels that it computes.
        width: most nodes of a level.
        num_tokens: candidates of a node.

    Attributes:
        start_seconds, seconds: what a call of `start` and of `extend` take of late.
    """

    start_seconds = seconds = 0.0

    def __init__(self, network: DraftNetwork, depth: int, width: int, num_tokens: int = 8) -> None:
        if min(depth, width, num_tokens) < 1:
            raise ValueError(
                "Adviser: depth, width and num_tokens must be >= 1, "
                f"got {depth}, {width} and {num_tokens}"
            )
        if network.uses_target_slots:
            raise ValueError(
                f"Adviser: {type(network).__name__} keeps its nodes in the target's cache, where "
                "a merged tree has no room for them"
            )
        self.network = network
        self.depth = min(depth, network.max_depth or depth)
        self.width = width
        self._num_tokens = num_tokens
        self._num_starts = 0

    def begin(self, batch: int) -> None:
        """See `Drafter`."""
        self.network.begin(batch, self.width * self.depth)
        offsets = self.network.offsets
        self._offsets = None if offsets is None else offsets.tolist()

    def start(self, context: DraftContext) -> list[Advice]:
        """Of the root of each row."""
        begun = time.perf_counter()
        self._num_starts += 1
        self._vocab_size = context.vocab_size
        advice = [row[0] for row in self._advice(self.network.start(context)[:, None])]
        if self._is_warm:
            self.start_seconds = _of_late(self.start_seconds, time.perf_counter() - begun)
        return advice

    def extend(self, level: Level) -> list[list[Advice]]:
        """Of the next nodes of each row, as in `DraftNetwork.extend`; padding has some, too."""
        begun = time.perf_counter()
        advice = self._advice(self.network.extend(level))
        if self._is_warm:
            self.seconds = _of_late(self.seconds, time.perf_counter() - begun)
        return advice

    def forget(self) -> None:
        """A little of how long calls took: asked too seldom, it would never learn that they take
        less now.
        """
        self.start_seconds *= _KEPT
        self.seconds *= _KEPT

    @property
    def _is_warm(self) -> bool:
        """Whether all weights have been used: the first time they are packed."""
        return self._num_starts > 1

    def _advice(self, logits: Tensor) -> list[list[Advice]]:
        logits = logits[..., : self._vocab_size]
        batch, columns, size = logits.shape
        k = min(self._num_tokens, size)
        logprobs, tokens = topk_logprobs(logits.reshape(-1, size), k)
        ids: list[list[int]] = tokens.tolist()
        if self._offsets is not None:
            ids = [[token + self._offsets[token] for token in row] for row in ids]
        rows: Sequence[Advice] = [
            Advice(dict(zip(*row, strict=True)))
            for row in zip(ids, logprobs.exp().tolist(), strict=True)
        ]
        return [list(rows[b * columns : (b + 1) * columns]) for b in range(batch)]

    _vocab_size: int
    _offsets: list[int] | None


def _of_late(before: float, now: float) -> float:
    """The least of a slowly growing bound: other processes only ever make a call longer."""
    return now if before == 0 else min(now, before * 1.05)
