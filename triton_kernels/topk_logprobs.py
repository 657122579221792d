"""The k likeliest tokens of each row, in two phases.

`_summarise` streams the logits once: a program owns a block of one row and leaves the maximum of
every chunk of it, and the block's mass, the sum of exp(score - block maximum). `_select` owns a
row. The best k tokens lie in the k chunks that come first by (maximum, index): any other chunk has
k tokens before all of its own. So it fetches those chunks alone, picks the best, ROUND tokens at a
time, and notes what is left of each chunk for the next round: k up to V, and no sort.

Delicate: order. A score becomes an integer that compares as the score does (-0 = 0, NaN = -inf),
joined with the complement of its index: every key differs, so each pick is one maximum, and ties
fall to the lower index. The mass counts the maxima apart from the rest, which float32 would lose
beside them: log-probabilities near 0 keep their relative error.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.topk_logprobs import check_k, topk_logprobs
from .launch import INTERPRETED, Launch

LAUNCH = {
    "summarise": Launch(4, 1, {"BLOCK_V": 16384 if INTERPRETED else 4096}),
    "select": Launch(8, 1),
}

MIN_CHUNK = 128
MAX_CHUNKS = 1024
"""Chunk maxima that `_select` holds in registers; larger vocabularies get larger chunks."""
MAX_ROUND = 16

_NONE = tl.constexpr(-(2**31))  # below the order of every score
_NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def _order_of(scores):
    """int32 that compares as float32 `scores` do, with -0 = 0 and NaN = -inf."""
    scores = tl.where(scores == scores, scores, -float("inf"))
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _score_of(order):
    """The float32 that `_order_of` was given."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _join(order, index):
    """int64 that compares by order, then by lower index; below all others where order is none."""
    key = (order.to(tl.int64) << 32) | (index ^ 0x7FFFFFFF).to(tl.int64)
    return tl.where(order == _NONE, _NO_KEY, key)


@triton.jit
def _index_of(key):
    return (key & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF


@triton.jit(do_not_specialize=["chunks", "blocks"])
def _summarise(
    logits_ptr,  # [R, V]
    orders_ptr,  # [R, chunks] int32, order of each chunk's maximum
    maxima_ptr,  # [R, blocks] float32
    masses_ptr,  # [R, blocks] float64
    vocab, chunks, blocks, stride_row, stride_vocab,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One block of one row.

    Bytes per call: R * V * e read, R * V * (4 / CHUNK + 12 / BLOCK_V) written.
    Roofline: t = R * V * e / bandwidth.
    """
    pid_r = tl.program_id(0).to(tl.int64)
    pid_v = tl.program_id(1)
    offs_c = pid_v * (BLOCK_V // CHUNK) + tl.arange(0, BLOCK_V // CHUNK)
    offs_v = offs_c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    ptrs = logits_ptr + pid_r * stride_row + offs_v.to(tl.int64) * stride_vocab
    scores = tl.load(ptrs, mask=offs_v < vocab, other=-float("inf")).to(tl.float32)
    scores = tl.where(scores == scores, scores, -float("inf"))
    best = tl.max(scores, 1)
    tl.store(orders_ptr + pid_r * chunks + offs_c, _order_of(best), mask=offs_c < chunks)

    top = tl.max(best, 0)
    is_finite = (top > -float("inf")) & (top < float("inf"))
    base = tl.where(is_finite, top, 0.0)
    is_top = scores == base
    num_top = tl.sum(tl.sum(is_top.to(tl.int32), 1), 0)
    below = tl.where(is_top, -float("inf"), scores - base)
    rest = tl.sum(tl.sum(tl.exp(below), 1), 0)
    mass = num_top.to(tl.float64) + rest.to(tl.float64)
    tl.store(maxima_ptr + pid_r * blocks + pid_v, top)
    tl.store(masses_ptr + pid_r * blocks + pid_v, tl.where(is_finite, mass, 0.0))


@triton.jit
def _log_total(maxima_ptr, masses_ptr, blocks, BLOCKS: tl.constexpr):
    """(log of the summed exponentials in float64, whether it is finite) from a row's blocks."""
    offs_b = tl.arange(0, BLOCKS)
    mask_b = offs_b < blocks
    maxima = tl.load(maxima_ptr + offs_b, mask=mask_b, other=-float("inf"))
    masses = tl.load(masses_ptr + offs_b, mask=mask_b, other=0.0)
    top = tl.max(maxima, 0)
    is_finite = (top > -float("inf")) & (top < float("inf"))
    base = tl.where(is_finite, top, 0.0)
    weights = tl.exp(tl.where(is_finite, maxima - base, 0.0)).to(tl.float64)
    mass = tl.where(is_finite, tl.sum(weights * masses, 0), 1.0)
    return base.to(tl.float64) + tl.log(mass), is_finite


@triton.jit(do_not_specialize=["k", "chunks", "blocks"])
def _select(
    logits_ptr,  # [R, V]
    orders_ptr,  # [R, chunks] int32
    maxima_ptr,  # [R, blocks] float32
    masses_ptr,  # [R, blocks] float64
    logprobs_ptr,  # [R, k]
    tokens_ptr,  # [R, k]
    k, vocab, chunks, blocks, stride_row, stride_vocab,
    ROUND: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """One row.

    Bytes per call: R * ceil(k / ROUND) * (ROUND * CHUNK * e + 4 * chunks) + 12 * R * blocks read,
    mostly from cache, R * k * 12 written.
    Roofline: t = those / bandwidth; in fact k dependent maxima of CHUNKS and of ROUND * CHUNK keys.
    """
    pid_r = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + pid_r * stride_row
    orders_ptr += pid_r * chunks
    total, is_finite = _log_total(
        maxima_ptr + pid_r * blocks, masses_ptr + pid_r * blocks, blocks, BLOCKS
    )
    offs_c = tl.arange(0, CHUNKS)
    offs_j = tl.arange(0, ROUND)
    last = tl.full((), 2**63 - 1, tl.int64)
    for done in range(0, k, ROUND):
        orders = tl.load(orders_ptr + offs_c, mask=offs_c < chunks, other=_NONE)
        open_chunks = _join(orders, offs_c)
        chosen = tl.full((ROUND,), _NO_KEY, tl.int64)
        for j in range(ROUND):
            key = tl.max(open_chunks, 0)
            open_chunks = tl.where(open_chunks == key, _NO_KEY, open_chunks)
            chosen = tl.where(offs_j == j, key, chosen)
        is_chunk = chosen != _NO_KEY
        chunk = tl.where(is_chunk, _index_of(chosen), 0)
        offs_v = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask_v = is_chunk[:, None] & (offs_v < vocab)
        ptrs = row_ptr + offs_v.to(tl.int64) * stride_vocab
        scores = tl.load(ptrs, mask=mask_v, other=0.0).to(tl.float32)
        keys = _join(tl.where(mask_v, _order_of(scores), _NONE), offs_v)
        keys = tl.where(keys < last, keys, _NO_KEY)  # the others were picked before
        picked = tl.full((ROUND,), _NO_KEY, tl.int64)
        for j in range(ROUND):
            last = tl.max(tl.max(keys, 1), 0)
            keys = tl.where(keys == last, _NO_KEY, keys)
            picked = tl.where(offs_j == j, last, picked)
        score = _score_of((picked >> 32).to(tl.int32)).to(tl.float64)
        logprob = tl.where(is_finite, score - total, -float("inf")).to(tl.float32)
        mask_j = offs_j < k - done
        outs = pid_r * k + done + offs_j
        tl.store(logprobs_ptr + outs, logprob, mask=mask_j)
        tl.store(tokens_ptr + outs, _index_of(picked).to(tl.int64), mask=mask_j)
        # All have read the orders of this round, and all see the new ones in the next.
        tl.debug_barrier()
        left = (tl.max(keys, 1) >> 32).to(tl.int32)
        tl.store(orders_ptr + chunk, left, mask=is_chunk)
        tl.debug_barrier()


@topk_logprobs.implement("triton")
def topk_logprobs_triton(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Launch `_summarise`, then `_select`."""
    rows, vocab = logits.shape
    check_k(k, vocab)
    logprobs = logits.new_empty((rows, k), dtype=torch.float32)
    tokens = logits.new_empty((rows, k), dtype=torch.int64)
    if rows == 0:
        return logprobs, tokens
    stride_vocab = logits.stride(1)
    stride_row = logits.stride(0) if rows > 1 else vocab * stride_vocab  # of one row: anything
    chunk = max(MIN_CHUNK, triton.next_power_of_2(triton.cdiv(vocab, MAX_CHUNKS)))
    summarise = LAUNCH["summarise"].options
    block_v = max(chunk, summarise["BLOCK_V"])
    chunks, blocks = triton.cdiv(vocab, chunk), triton.cdiv(vocab, block_v)
    orders = logits.new_empty((rows, chunks), dtype=torch.int32)
    maxima = logits.new_empty((rows, blocks), dtype=torch.float32)
    masses = logits.new_empty((rows, blocks), dtype=torch.float64)
    _summarise[(rows, blocks)](
        logits, orders, maxima, masses, vocab, chunks, blocks, stride_row, stride_vocab,
        CHUNK=chunk, **{**summarise, "BLOCK_V": block_v},
    )  # fmt: skip
    _select[(rows,)](
        logits, orders, maxima, masses, logprobs, tokens,
        k, vocab, chunks, blocks, stride_row, stride_vocab,
        ROUND=min(MAX_ROUND, triton.next_power_of_2(k)), CHUNK=chunk,
        CHUNKS=triton.next_power_of_2(chunks), BLOCKS=triton.next_power_of_2(blocks),
        **LAUNCH["select"].options,
    )  # fmt: skip
    return logprobs, tokens
