"""Counter-based randomness: a draw is a function of (seed, absolute position, index, domain).

The generator is Philox4x32-10 with key = seed and counter = (index // 4, domain, position), lane =
index % 4, so a draw depends neither on batch size and order nor on the backend.
`csrc/core/philox.hpp` holds the same rules for C++ and CUDA; each arithmetic step here is one
rounded float32 operation, so that the bits agree.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Domain(IntEnum):
    """Disjoint streams: one per reason to draw."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    TARGET = 3
    """Draws from the target's own law: plain sampling, `walk`, and the bonus token."""


def random_bits(
    seeds: Tensor, positions: Tensor, num: int, domain: int, streams: Tensor | None = None
) -> Tensor:
    """32 random bits for each row and index.

    Args:
        seeds: [R] int64, one key per row.
        positions: [R] int64, absolute token position of the draw.
        num: how many indices (the vocabulary size, for Gumbel noise over tokens).
        domain: a `Domain`.
        streams: [R] int64 in [0, 2^32 / ceil(num/4)); stream s starts at index 4 s ceil(num/4).

    Returns:
        [R, num] int64 in [0, 2^32).
    """
    per_stream = (num + 3) // 4
    blocks = torch.arange(per_stream, device=seeds.device)
    if streams is not None:
        blocks = blocks + (streams[:, None] * per_stream & _MASK)
    seeds, positions = seeds[:, None], positions[:, None]
    ctr = [blocks, torch.full_like(blocks, int(domain)), positions & _MASK, positions >> 32 & _MASK]
    key = [seeds & _MASK, seeds >> 32 & _MASK]
    for _ in range(_ROUNDS):
        low = [_multiply_low(ctr[2 * i], _MULTIPLIERS[i]) for i in range(2)]
        high = [_multiply_high(ctr[2 * i], _MULTIPLIERS[i]) for i in range(2)]
        ctr = [high[1] ^ ctr[1] ^ key[0], low[1], high[0] ^ ctr[3] ^ key[1], low[0]]
        key = [key[i] + _WEYL[i] & _MASK for i in range(2)]
    rows = torch.broadcast_shapes(*(c.shape for c in ctr))
    return torch.stack([c.expand(rows) for c in ctr], -1).flatten(1)[:, :num]


def uniforms(seeds: Tensor, positions: Tensor, num: int, domain: int) -> Tensor:
    """Uniform float64 numbers in [0, 1), 53 bits each: number i from indices 2i and 2i + 1.

    Args:
        seeds, positions, domain: as in `random_bits`.
        num: numbers per row.

    Returns:
        [R, num] float64.
    """
    bits = random_bits(seeds, positions, 2 * num, domain)
    return ((bits[:, 0::2] >> 5 << 26) + (bits[:, 1::2] >> 6)).double() * 2.0**-53


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log(1 - v)) with v = (bits + 1/2) / 2^32, in float32.

    Small v, which decide an argmax over a vocabulary, keep their full relative precision.
    """
    v = ((bits.float() + 0.5) * 2.0**-32).clamp_max(1.0 - 2.0**-24)
    t = v / (2.0 - v)
    exponential = torch.where(v < 0.5, _atanh_series(t, 6), -_log(1.0 - v))
    return -_log(exponential)


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32, in a fixed sequence of rounded operations."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # mantissa in [sqrt(1/2), sqrt(2))
    mantissa = (bits - (exponent << 23)).view(torch.float32)
    t = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent.float() * 0.6931471805599453 + _atanh_series(t, 4)


def _atanh_series(t: Tensor, terms: int) -> Tensor:
    """2 atanh(t) = 2t (1 + t^2/3 + ... + t^(2 terms)/(2 terms + 1)), by Horner's rule."""
    square = t * t
    total = torch.full_like(t, 1.0 / (2 * terms + 1))
    for k in range(terms - 1, -1, -1):
        total = total * square + 1.0 / (2 * k + 1)
    return (t + t) * total


def _multiply_low(a: Tensor, b: int) -> Tensor:
    return a * b & _MASK


def _multiply_high(a: Tensor, b: int) -> Tensor:
    return (
        a * b >> 32 & _MASK
    )  # the product wraps in int64, its bits are those of the unsigned product
