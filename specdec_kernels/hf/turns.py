"""Threads that share a decoder or a drafter take turns."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

_guard = threading.Lock()
_waiting: dict[int, tuple[threading.RLock, list[None]]] = {}
"""By id, while somebody has it or waits for it: its lock, and an item for each of them."""


@contextmanager
def turn(things: Iterable[object]) -> Iterator[None]:
    """Have all these things alone; who has them already, further up, goes on.

    They remember where their text is: two texts at once would confuse them. They are taken in one
    order, so that two threads which want the same ones cannot wait for each other.
    """
    keys = sorted(set(map(id, things)))
    with _guard:
        for key in keys:
            _waiting.setdefault(key, (threading.RLock(), []))[1].append(None)
        locks = [_waiting[key][0] for key in keys]
    try:
        with ExitStack() as held:
            for lock in locks:
                held.enter_context(lock)
            yield
    finally:
        with _guard:
            for key in keys:
                _waiting[key][1].pop()
                if not _waiting[key][1]:
                    del _waiting[key]
