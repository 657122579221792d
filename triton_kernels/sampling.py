"""The target's law on one row of logits, on the device: what specdec_kernels/sampling.py defines.

A row is summarised first: of each block of BLOCK_V tokens the largest biased logit, and a best
token with the value that it wins with. The three filters keep exactly the tokens whose score
reaches one edge, found by search on the order of floats; blocks whose largest score does not reach
what a step looks for are not read again. Nothing of a row's width is written, nothing is sorted.

Delicate: scores are `logits / temperature` in one IEEE division and noise has the reference's bits,
so draws agree bit for bit. Masses are sums in float64 in another order than the reference's: a
token may fall on the other side of top-p only where the cumulative mass is within about 1e-13 of
the edge.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, Launch
from .philox import LARGEST_NOISE, block_words, gumbel, gumbel_bound

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the edge that keeps every finite score
NO_TOKEN = tl.constexpr(2**31 - 1)
PIVOTS = tl.constexpr(64 if INTERPRETED else 8)  # scores that one pass of a search weighs
BELOW_ALL = tl.constexpr(-(2**31))  # orders below every float
BLOCKS_AT_ONCE = tl.constexpr(256)  # block summaries that are reduced together


class Row(NamedTuple):
    """Where the logits of a request lie; `bias` and `mask` may be None, with their own offsets."""

    logits: tl.tensor
    stride: tl.tensor
    bias: tl.tensor | None
    first_bias: tl.tensor
    stride_bias: tl.tensor
    mask: tl.tensor | None  # of uint8
    first_mask: tl.tensor
    stride_mask: tl.tensor
    vocab: tl.tensor
    temperature: tl.tensor  # 1 for a greedy request


class Scores(NamedTuple):
    """A summarised row."""

    row: Row
    first: tl.tensor  # int64 offset of its token 0
    maxima: tl.tensor  # of each block's biased logits
    largest: tl.tensor  # score; 0 if `is_infinite`
    is_infinite: tl.tensor  # the row has +inf scores, and is uniform over them


class Noise(NamedTuple):
    """The Gumbel noise of one row."""

    seed: tl.tensor
    position: tl.tensor
    counter: tl.tensor  # where the row's stream begins
    domain: tl.tensor


@triton.jit
def read_temperature(temperature_ptr, request):
    """(whether the request is sampled, its temperature or 1)."""
    temperature = tl.full((), 0.0, tl.float32)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + request)
    is_sampled = temperature > 0.0
    return is_sampled, tl.where(is_sampled, temperature, 1.0)


@triton.jit
def read_filters(top_k_ptr, top_p_ptr, min_p_ptr, request):
    """(top_k, top_p, min_p) of the request, off where not given."""
    top_k = tl.full((), 0, tl.int32)
    top_p = tl.full((), 1.0, tl.float32)
    min_p = tl.full((), 0.0, tl.float32)
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr + request)
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + request)
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + request)
    return top_k, top_p, min_p


@triton.jit
def biased_logits(row, first, offs, mask):
    """Logits as the filters see them, NaN as -inf, -inf outside `mask`; of any shape."""
    places = tl.cast(offs, tl.int64)
    logits = tl.load(row.logits + first + places * row.stride, mask=mask, other=-float("inf"))
    logits = logits.to(tl.float32)
    if row.bias is not None:
        biases = row.bias + row.first_bias
        logits += tl.load(biases + places * row.stride_bias, mask=mask, other=0.0)
    logits = tl.where(logits == logits, logits, -float("inf"))
    if row.mask is not None:
        allowed = row.mask + row.first_mask
        is_allowed = tl.load(allowed + places * row.stride_mask, mask=mask, other=0) != 0
        logits = tl.where(is_allowed, logits, -float("inf"))
    return logits


@triton.jit
def block_scores(scores, block, BLOCK_V: tl.constexpr):
    """(tokens [BLOCK_V], their scores) of a block; -inf beyond the vocabulary."""
    offs = block * BLOCK_V + tl.arange(0, BLOCK_V)
    row = scores.row
    logits = biased_logits(row, scores.first, offs, offs < row.vocab)
    return offs, to_scores(logits, row.temperature, scores.is_infinite)


@triton.jit
def to_scores(logits, temperature, is_infinite):
    """Biased logits over temperature; where there are +inf, 0 there and -inf elsewhere."""
    divided = tl.div_rn(logits, temperature)
    return tl.where(is_infinite, tl.where(divided == float("inf"), 0.0, -float("inf")), divided)


@triton.jit
def block_largest(scores, block):
    """The largest score of a block: division rounds monotonically."""
    return to_scores(tl.load(scores.maxima + block), scores.row.temperature, scores.is_infinite)


@triton.jit
def weights(values, edge, largest):
    """exp(score - largest) in float64, 0 below the edge."""
    distances = values.to(tl.float64) - tl.cast(largest, tl.float64)
    return tl.where(values >= edge, tl.exp(distances), 0.0)


@triton.jit
def best_of(values, offs):
    """(the largest value, its lowest token)."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, offs, NO_TOKEN), 0)


@triton.jit
def summarize_block(
    row, first, noise, is_noisy, block, maxima_ptr, best_ptr, token_ptr, BLOCK_V: tl.constexpr
):
    """Write a block's largest biased logit, and its best value and token: with noise, or that."""
    offs = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = biased_logits(row, first, offs, offs < row.vocab)
    best, token = best_of(logits, offs)
    tl.store(maxima_ptr + block, best)
    if noise is not None and is_noisy:
        is_infinite = tl.div_rn(best, row.temperature) == float("inf")
        words = block_words(noise.seed, noise.position, noise.counter, block, noise.domain, BLOCK_V)
        values = to_scores(logits, row.temperature, is_infinite) + gumbel(words)
        best, token = best_of(values, offs)
    tl.store(best_ptr + block, best)
    tl.store(token_ptr + block, token)


@triton.jit
def summarize_row(row, first, maxima_ptr, best_ptr, token_ptr, BLOCK_V: tl.constexpr):
    """Write the summaries of all blocks, without noise, for the same program to read."""
    for block in range(tl.cdiv(row.vocab, BLOCK_V)):
        summarize_block(row, first, None, False, block, maxima_ptr, best_ptr, token_ptr, BLOCK_V)
    tl.debug_barrier()  # what one thread wrote, all will read


@triton.jit
def best_of_block(
    scores, noise, is_noisy, edge, block, after_value, after_token, BLOCK_V: tl.constexpr
):
    """(value, token) that comes next after the given one in falling order of noisy score."""
    offs, values = block_scores(scores, block, BLOCK_V)
    values = tl.where(values >= edge, values, -float("inf"))
    if noise is not None and is_noisy:
        words = block_words(noise.seed, noise.position, noise.counter, block, noise.domain, BLOCK_V)
        values += gumbel(words)
    is_left = (values < after_value) | ((values == after_value) & (offs > after_token))
    return best_of(tl.where(is_left, values, -float("inf")), offs)


@triton.jit
def draw_noisy(scores, noise, edge, BLOCK_V: tl.constexpr):
    """(value, token): the argmax of score + noise among the scores that reach the edge.

    Blocks that cannot win are not read, and noise is computed only where a bound on it could win.
    """
    best = tl.full((), -float("inf"), tl.float32)
    token = tl.full((), NO_TOKEN, tl.int32)
    for block in range(tl.cdiv(scores.row.vocab, BLOCK_V)):
        largest = block_largest(scores, block)
        if (largest >= edge) & (largest + LARGEST_NOISE > best):
            offs, values = block_scores(scores, block, BLOCK_V)
            values = tl.where(values >= edge, values, -float("inf"))
            words = block_words(
                noise.seed, noise.position, noise.counter, block, noise.domain, BLOCK_V
            )
            if tl.max(values + gumbel_bound(words), 0) > best:
                value, here = best_of(values + gumbel(words), offs)
                if value > best:
                    best = value
                    token = here
    return best, token


@triton.jit
def largest_logit(maxima_ptr, blocks):
    """The largest of the blocks' maxima."""
    best = tl.full((), -float("inf"), tl.float32)
    for first in range(0, blocks, BLOCKS_AT_ONCE):
        offs = first + tl.arange(0, BLOCKS_AT_ONCE)
        values = tl.load(maxima_ptr + offs, mask=offs < blocks, other=-float("inf"))
        best = tl.maximum(best, tl.max(values, 0))
    return best


@triton.jit
def best_block(scores, best_ptr, token_ptr, BLOCK_V: tl.constexpr):
    """(value, token): the best of the blocks' best, of equals the lowest token.

    Blocks were summarised one by one: where the row has +inf scores, those without any are void.
    """
    best = tl.full((), -float("inf"), tl.float32)
    token = tl.full((), NO_TOKEN, tl.int32)
    blocks = tl.cdiv(scores.row.vocab, BLOCK_V)
    for first in range(0, blocks, BLOCKS_AT_ONCE):
        offs = first + tl.arange(0, BLOCKS_AT_ONCE)
        mask = offs < blocks
        values = tl.load(best_ptr + offs, mask=mask, other=-float("inf"))
        logits = tl.load(scores.maxima + offs, mask=mask, other=-float("inf"))
        is_void = to_scores(logits, scores.row.temperature, scores.is_infinite) == -float("inf")
        values = tl.where(is_void, -float("inf"), values)
        tokens = tl.load(token_ptr + offs, mask=mask, other=NO_TOKEN)
        value, here = best_of(values, tokens)
        if value > best:
            best = value
            token = here
    return best, token


@triton.jit
def total_weight(scores, edge, BLOCK_V: tl.constexpr):
    """The sum of exp(score - largest) over the scores that reach the edge, in float64."""
    totals = tl.zeros((BLOCK_V,), tl.float64)
    for block in range(tl.cdiv(scores.row.vocab, BLOCK_V)):
        if block_largest(scores, block) >= edge:
            _, values = block_scores(scores, block, BLOCK_V)
            totals += weights(values, edge, scores.largest)
    return tl.sum(totals, 0)


@triton.jit
def find_edge(scores, top_k, top_p, min_p, BLOCK_V: tl.constexpr):
    """The score that a token must reach to pass top-k, top-p and min-p.

    Top-k and top-p keep x unless the tokens above x already weigh as much as their target: k
    tokens, or top_p of the mass that top-k left.
    """
    highest = to_order(scores.largest)
    edge = to_order(tl.full((), LOWEST, tl.float32))
    for step in range(2):
        is_mass = step == 1
        if (is_mass & (top_p < 1.0)) | ((not is_mass) & (top_k > 0)):
            target = tl.cast(top_k, tl.float64)
            if is_mass:
                left = total_weight(scores, from_order(edge), BLOCK_V)
                target = tl.maximum(tl.cast(top_p, tl.float64) * left, 1e-300)
            edge = _search(scores, target, is_mass, edge, highest, BLOCK_V)
    if min_p > 0.0:
        least = tl.cast(scores.largest, tl.float64) + tl.log(tl.cast(min_p, tl.float64))
        rounded = least.to(tl.float32)
        reached = to_order(rounded) + tl.where(rounded.to(tl.float64) < least, 1, 0)
        edge = tl.maximum(edge, reached)
    return from_order(edge)


@triton.jit
def _search(scores, target, is_mass, edge, highest, BLOCK_V: tl.constexpr):
    """The lowest x >= edge, in order, such that the tokens above x weigh less than the target.

    Each pass weighs PIVOTS places between a lower one that is too heavy and an upper one that is
    not: at most ceil(32 / log2(PIVOTS + 1)) passes, 11 for 8.
    """
    low = tl.cast(edge, tl.int64) - 1
    high = tl.cast(highest, tl.int64)
    while high - low > 1:
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        pivots = tl.minimum(low + (tl.arange(0, PIVOTS) + 1) * step, high)
        above = tl.zeros((PIVOTS,), tl.float64)
        for block in range(tl.cdiv(scores.row.vocab, BLOCK_V)):
            if to_order(block_largest(scores, block)) > low:
                _, values = block_scores(scores, block, BLOCK_V)
                weight = tl.full((BLOCK_V,), 1.0, tl.float64)
                if is_mass:
                    weight = weights(values, LOWEST, scores.largest)
                is_above = to_order(values)[:, None] > pivots.to(tl.int32)[None, :]
                above += tl.sum(tl.where(is_above, weight[:, None], 0.0), 0)
        is_light = above < target
        high = tl.min(tl.where(is_light, pivots, high), 0)
        low = tl.max(tl.where(is_light, low, pivots), 0)
    return high.to(tl.int32)


@triton.jit
def to_order(values):
    """int32 in the order of the floats; -0 is 0."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order(order):
    """The float of `to_order`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


def vocab_block(vocab: int) -> int:
    """BLOCK_V of a vocabulary; unmeasured. Interpreted, blocks cost more than tokens."""
    if INTERPRETED:
        return 512 if vocab <= 4096 else 16384
    return 1024


def row_options(launch: Launch) -> dict[str, object]:
    """Launch options of one program per row or request, which has a processor for itself.

    Without the limit named, ptxas keeps to 128 registers for a second program, and spills.
    """
    return {**launch.options, **({"maxnreg": 255} if _backend() == "cuda" else {})}


def stream_options(launch: Launch) -> dict[str, object]:
    """Launch options of one program per block: as many threads on every GPU, so that each loads
    128 bits of 16-bit logits.
    """
    is_wide = _backend() == "hip"  # warps of 64 threads
    return {**launch.options, "num_warps": launch.num_warps // (2 if is_wide else 1)}


def _backend() -> str:
    if INTERPRETED:
        return "interpreter"
    return str(triton.runtime.driver.active.get_current_target().backend)


def block_summaries(rows: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Scratch for the summaries of `rows` rows: maxima, best values, best tokens."""
    shape = (rows, -(-vocab // vocab_block(vocab)))
    maxima, best = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    return maxima, best, torch.empty(shape, dtype=torch.int32, device=device)


def row_arguments(logits: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[object, ...]:
    """logits, bias and mask as kernels take them, each with its strides."""
    bytes_of_mask = None if mask is None else mask.view(torch.uint8)
    strides = [(0, 0) if t is None else t.stride() for t in (bias, mask)]
    return logits, *logits.stride(), bias, *strides[0], bytes_of_mask, *strides[1]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps: a copy only if it has some."""
    return None if tensor is None else tensor.contiguous()
