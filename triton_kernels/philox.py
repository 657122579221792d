"""Counter-based randomness on the device: the bits of specdec_kernels/philox.py.

Kernels that call these are launched with `Launch(fuses=False)`: each arithmetic step is one
rounded float32 operation, and a multiplication contracted with an addition would change the bits.
Cost per token: 10 rounds of Philox shared by 4 tokens, then 3 IEEE divisions.
"""

from __future__ import annotations

import triton
import triton.language as tl

ACCEPT = tl.constexpr(1)  # of philox.Domain; a test compares them
RESIDUAL = tl.constexpr(2)
TARGET = tl.constexpr(3)

LARGEST_NOISE = tl.constexpr(22.9)  # gumbel of word 0 is 22.87


@triton.jit
def random_words(seed, position, counter, domain):
    """The four words of each counter.

    Args:
        seed, position: int64 scalars.
        counter: uint32, any shape.
        domain: a `philox.Domain`.
    """
    second = counter * 0 + tl.cast(domain, tl.uint32)
    third = counter * 0 + (position & 0xFFFFFFFF).to(tl.uint32)
    fourth = counter * 0 + (position >> 32 & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, counter, second, third, fourth)


@triton.jit
def stream_counter(stream, vocab):
    """uint32, the first counter of a stream of a position."""
    per_stream = (tl.cast(vocab, tl.int64) + 3) // 4
    return (tl.cast(stream, tl.int64) * per_stream & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def block_words(seed, position, counter, block, domain, BLOCK_V: tl.constexpr):
    """[BLOCK_V] words of the tokens from `block * BLOCK_V` on; a stream begins at `counter`."""
    offs = tl.cast(block, tl.uint32) * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4).to(tl.uint32)
    a, b, c, d = random_words(seed, position, counter + offs, domain)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def uniform(seed, position, index, domain):
    """Number `index` of `philox.uniforms`: a float64 scalar in [0, 1) with 53 bits."""
    a, b, c, d = random_words(seed, position, tl.cast(index // 2, tl.uint32), domain)
    is_even = index % 2 == 0
    high = tl.where(is_even, a, c).to(tl.int64)
    low = tl.where(is_even, b, d).to(tl.int64)
    return ((high >> 5 << 26) + (low >> 6)).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def gumbel(words):
    """Standard Gumbel noise -log(-log(1 - v)) with v = (words + 1/2) / 2^32, in float32."""
    v = tl.minimum(
        (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08
    )
    series = _atanh_series(tl.div_rn(v, 2.0 - v), 6)
    exponential = tl.where(v < 0.5, series, -_log(1.0 - v))
    return -_log(exponential)


@triton.jit
def gumbel_bound(words):
    """A bound on `gumbel(words)` from the exponent of the words alone.

    Noise is at most -log(v), and v is at least its power of two; the margin exceeds its rounding.
    """
    exponent = ((words.to(tl.float32) + 0.5).to(tl.int32, bitcast=True) >> 23) - 127
    return (32 - exponent).to(tl.float32) * 0.6931472 + 1e-3


@triton.jit
def _log(x):
    """Natural logarithm of positive normal float32, in a fixed sequence of rounded operations."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # mantissa in [sqrt(1/2), sqrt(2))
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    t = tl.div_rn(mantissa - 1.0, mantissa + 1.0)
    return exponent.to(tl.float32) * 0.6931471805599453 + _atanh_series(t, 4)


@triton.jit
def _atanh_series(t, TERMS: tl.constexpr):
    """2 atanh(t) = 2t (1 + t^2/3 + ... + t^(2 TERMS)/(2 TERMS + 1)), by Horner's rule."""
    square = t * t
    total = tl.zeros_like(t) + 1.0 / (2 * TERMS + 1)
    for k in tl.static_range(TERMS - 1, -1, -1):
        total = total * square + 1.0 / (2 * k + 1)
    return (t + t) * total
