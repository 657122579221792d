"""Memory in large pages, where the system gives them: what streams through it waits for fewer
translations of addresses.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

_ALIGNMENT = 64


def aligned(num_bytes: int) -> int:
    """What a tensor of so many bytes takes of `LargePages`."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class LargePages:
    """Room for tensors side by side; it is freed when none of them is left.

    Args:
        sizes: bytes of each tensor that will come.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        num_bytes = max(_ALIGNMENT, sum(map(aligned, sizes)))
        # private: shared memory, the default, has large pages by another setting
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # not every system has them
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a contiguous tensor, here."""
        room = self._memory[self._used : self._used + tensor.nbytes]
        self._used += aligned(tensor.nbytes)
        return room.view(tensor.dtype).view(tensor.shape).copy_(tensor)
