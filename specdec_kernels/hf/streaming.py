"""Streamers that are ended whatever happens."""

from __future__ import annotations

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class EndedOnce(BaseStreamer):
    """Hands tokens on to a streamer, and its end only the first time.

    Args:
        streamer: who gets them.
    """

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._is_ended = False

    def put(self, value: Tensor) -> None:
        """New tokens."""
        self._streamer.put(value)

    def end(self) -> None:
        """No more tokens."""
        if not self._is_ended:
            self._is_ended = True
            self._streamer.end()
