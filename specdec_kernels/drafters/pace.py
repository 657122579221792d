"""How long a network takes to draft."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_KEPT = 0.99
"""Of the times that calls took, with every step in which one was not worth it."""


class Pace:
    """Attributes:
    start_seconds, seconds: what `DraftNetwork.start` and `extend` take of late, with all that is
        done for what they give; 0 until it is known.
    """

    def __init__(self) -> None:
        self.start_seconds = self.seconds = 0.0
        self._num_starts = 0

    @contextmanager
    def of_start(self) -> Iterator[None]:
        """Entered around a call of `start`."""
        self._num_starts += 1
        begun = time.perf_counter()
        yield
        self.start_seconds = self._of_late(self.start_seconds, begun)

    @contextmanager
    def of_level(self) -> Iterator[None]:
        """Entered around a call of `extend`."""
        begun = time.perf_counter()
        yield
        self.seconds = self._of_late(self.seconds, begun)

    def forget(self) -> None:
        """A little of how long calls took: asked too seldom, one would never learn that they take
        less now.
        """
        self.start_seconds *= _KEPT
        self.seconds *= _KEPT

    def _of_late(self, before: float, begun: float) -> float:
        """The least of a slowly growing bound: other processes only ever make a call longer. Not
        of the first step, in which weights are packed.
        """
        if self._num_starts < 2:
            return before
        seconds = time.perf_counter() - begun
        return seconds if before == 0 else min(seconds, before * 1.05)
