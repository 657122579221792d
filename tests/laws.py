"""Whether sampled tokens follow a law."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chi_square(emitted: Tensor, law: Tensor) -> tuple[float, float]:
    """Of samples [R, num] under their joint law [V] * num, and the bound that an exact sampler
    exceeds once in a million times.
    """
    counts = torch.zeros(law.shape, dtype=torch.float64)
    counts.index_put_(tuple(emitted.T), torch.ones((), dtype=torch.float64), accumulate=True)
    expected = law * len(emitted)
    rare = expected < 5
    want = torch.cat([expected[~rare], expected[rare].sum()[None]])
    got = torch.cat([counts[~rare], counts[rare].sum()[None]])
    want, got = want[want > 0], got[want > 0]
    degrees = len(want) - 1
    spread = 2 / (9 * degrees)
    bound = degrees * (1 - spread + 4.75 * math.sqrt(spread)) ** 3  # Wilson and Hilferty, 1e-6
    return float(((got - want) ** 2 / want).sum()), bound
