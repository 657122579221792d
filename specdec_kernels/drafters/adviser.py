"""What trained heads say of the nodes of a growing tree, for a drafter that asks others too."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..ops import topk_logprobs
from .base import DraftContext
from .network import DraftNetwork, Level
from .pace import Pace

_BOUNDS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
"""Probabilities between two of them are not told apart when their hits are counted."""


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
        pace: what its calls take.
    """

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
        self.pace = Pace()

    def begin(self, batch: int) -> None:
        """See `Drafter`."""
        self.network.begin(batch, self.width * self.depth)
        offsets = self.network.offsets
        self._offsets = None if offsets is None else offsets.tolist()

    def start(self, context: DraftContext) -> list[Advice]:
        """Of the root of each row."""
        self._vocab_size = context.vocab_size
        with self.pace.of_start():
            return [row[0] for row in self._advice(self.network.start(context)[:, None])]

    def extend(self, level: Level) -> list[list[Advice]]:
        """Of the next nodes of each row, as in `DraftNetwork.extend`; padding has some, too."""
        with self.pace.of_level():
            return self._advice(self.network.extend(level))

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
