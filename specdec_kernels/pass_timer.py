"""How long a forward pass takes, on a device that may still work when the call has come back."""

from __future__ import annotations

import time

import torch


class PassTimer:
    """Times one pass after another: `start`, `stop`, and `seconds` once its results were read.

    On an accelerator two events in its stream tell. The clock around the call would tell how long
    it takes to launch the pass, which is the same for one token and for a hundred.

    Args:
        device: where the passes run.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.Event, torch.Event] | None = None
        if device.type != "cpu":
            begun, ended = (torch.Event(device, enable_timing=True) for _ in range(2))
            self._events = begun, ended
        self._begun = self._ended = 0.0

    def start(self) -> None:
        """The pass is about to be launched."""
        if self._events is None:
            self._begun = time.perf_counter()
        else:
            self._events[0].record()

    def stop(self) -> None:
        """All of it is launched."""
        if self._events is None:
            self._ended = time.perf_counter()
        else:
            self._events[1].record()

    def seconds(self) -> float:
        """Of the last pass; waits for its end."""
        if self._events is None:
            return self._ended - self._begun
        begun, ended = self._events
        ended.synchronize()
        return 1e-3 * begun.elapsed_time(ended)
