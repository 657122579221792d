"""Whether memory holds what it held, whoever wrote there and however."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import NATIVE_LIBRARY, native_op

_HALF = 0xFFFFFFFF
_KEYS = 0x9E3779B1
"""Between the keys of neighbours."""


def fingerprint(values: Tensor) -> int:
    """64 bits that tell contents of one size apart: a change goes unseen once in about 2^32.

    A tensor's version counts no edits through its `data`, and in inference mode none at all; all
    values are read, at the speed of the memory.

    Args:
        values: on the CPU, of any dtype and strides.
    """
    if NATIVE_LIBRARY.exists():
        return int(native_op("fingerprint")(values))
    return reference(values)


def reference(values: Tensor) -> int:
    """The same in PyTorch: the sum of (a + k) (b + k') modulo 2^64 over all neighbours a, b of 32
    bits, zeros behind the last, with sums of 32 bits and keys k, k' by place.

    Source: NH, Black et al., "UMAC: fast and secure message authentication", CRYPTO 1999.
    """
    data = values.detach().contiguous().flatten().view(torch.uint8)
    padded = torch.nn.functional.pad(data, (0, 8 - data.numel() % 8))
    halves = padded.view(torch.int32).long()
    keys = torch.arange(1, len(halves) + 1, device=halves.device) * _KEYS
    first, second = (halves + keys & _HALF).view(-1, 2).unbind(1)
    return int((first * second).sum())
