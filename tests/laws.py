"""Whether sampled tokens follow a law."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specdec_kernels.testing import exact_law, random_speculation, target_law

SMALL_LAWS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, float]]] = {
    "walk": ("walk", (-1, 0, 0), (0, 0, 0), {}),
    "token-mixed": ("token", (-1, 0, 0), (0, 1, 0), {}),
    "token-without-replacement": ("token", (-1, 0, 0), (0, 2, 2), {}),
    "token-filtered": ("token", (-1, 0, 0), (0, 1, 1), {"temperature": 1.5, "top_k": 2}),
    "block": ("block", (-1, 0, 1), (0, 1, 1), {}),
    "traversal": ("traversal", (-1, 0, 0), (0, 2, 2), {}),
    "traversal-top-p": ("traversal", (-1, 0, 1), (0, 1, 1), {"top_p": 0.7}),
    "gd_traversal": ("gd_traversal", (-1, 0, 0), (0, 2, 0), {"min_p": 0.1}),
}
"""Name -> rule, parents, kinds and filters: few enough calls for slow backends."""


def assert_law_is_exact(name: str, backend: str) -> None:
    """What a rule of `SMALL_LAWS` emits, by the backend's own thresholds, is the target's law."""
    rule, parents, kinds, filters = SMALL_LAWS[name]
    case = random_speculation(parents, kinds, 3, 2, has_zeros=False, **filters)
    got = exact_law(case, rule=rule, backend=backend)
    want = target_law(case, rule=rule, backend="reference")
    assert float((got - want).abs().max()) < 1e-12


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
