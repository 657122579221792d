"""Tiles of attention: which keys, where they lie, who sees them, the online softmax.

Device functions of `tree_attention`. Head dims come in two blocks of columns, powers of two whose
sum covers them (80 = 64 + 16): tensor cores then multiply no padding, and one block of 128 would
be a third zeros.

Logits are in base 2. Exponents are taken from a finite base, so that no inf - inf arises: a row
that sees no key keeps maximum -inf and sum 0, and a logit of +inf or NaN ends as the reference's,
output 0 and log-sum-exp inf or NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import locate_slots, slot_rows

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_ALL_BITS = tl.constexpr((1 << 64) - 1)


@triton.jit
def deal_tiles(
    length,
    count,  # nodes of the request
    capacity,
    window,
    num_splits,
    HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """(first slot, end slot, unmasked tiles, all tiles, tiles of a split, splits with work)."""
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window + 1, 0)  # the root looks back furthest
    end = tl.minimum(length + count, capacity)
    full = tl.maximum(tl.minimum(length, capacity) - first, 0) // BLOCK_N
    tiles = tl.where(count > 0, tl.cdiv(tl.maximum(end - first, 0), BLOCK_N), 0)
    each = tl.maximum(tl.cdiv(tiles, num_splits), MIN_TILES)
    return first, end, tl.minimum(full, tiles), tiles, each, tl.maximum(tl.cdiv(tiles, each), 1)


@triton.jit
def find_keys(
    slots,  # [BLOCK_N]
    inside,
    request,
    kv_head,
    table_ptr,  # [B, M]
    stride_tb, stride_tm,
    pages,
    stride_kc, stride_kg, stride_ks,
    stride_vc, stride_vg, stride_vs,
    PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Element offsets of the keys and of the values of slots, int64; PAGE_SIZE 0: contiguous."""
    page, slot = locate_slots(
        slots, inside, request, table_ptr, stride_tb, stride_tm, PAGE_SIZE, PAGE_SIZE > 0
    )
    if PAGE_SIZE > 0:  # the table is data, and may name pages that are not
        page = tl.minimum(tl.maximum(page, 0), pages - 1)
    k_rows = slot_rows(page, slot, kv_head, stride_kc, stride_kg, stride_ks)
    return k_rows, slot_rows(page, slot, kv_head, stride_vc, stride_vg, stride_vs)


@triton.jit
def _load_columns(ptr, rows, inside, stride, IS_FULL: tl.constexpr, START: tl.constexpr,
                  BLOCK: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    columns = START + tl.arange(0, BLOCK)
    ptrs = ptr + rows[:, None] + (columns.to(tl.int64) * stride)[None, :]
    if IS_FULL and START + BLOCK <= SIZE:
        values = tl.load(ptrs)
    elif IS_FULL:
        values = tl.load(ptrs, mask=(columns < SIZE)[None, :], other=0.0)
    else:
        values = tl.load(ptrs, mask=(columns < SIZE)[None, :] & inside[:, None], other=0.0)
    return values


@triton.jit
def load_parts(
    ptr,
    rows,  # int64 element offsets
    inside,  # bool, rows; not looked at if IS_FULL
    stride,
    IS_FULL: tl.constexpr,
    SIZE: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
):
    """Rows in two blocks of columns, 0 outside; the second is the first again if PART_1 is 0."""
    part_0 = _load_columns(ptr, rows, inside, stride, IS_FULL, 0, PART_0, SIZE)
    part_1 = part_0
    if PART_1 > 0:
        part_1 = _load_columns(ptr, rows, inside, stride, IS_FULL, PART_0, PART_1, SIZE)
    return part_0, part_1


@triton.jit
def _store_columns(ptr, rows, mask, values, START: tl.constexpr, SIZE: tl.constexpr):
    columns = START + tl.arange(0, values.shape[1])
    ptrs = ptr + rows[:, None] + columns[None, :]
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=mask[:, None] & (columns < SIZE)[None, :])


@triton.jit
def store_parts(ptr, rows, mask, part_0, part_1, SIZE: tl.constexpr, PART_0: tl.constexpr,
                PART_1: tl.constexpr):  # fmt: skip
    """Write what `load_parts` reads, to contiguous columns."""
    _store_columns(ptr, rows, mask, part_0, 0, SIZE)
    if PART_1 > 0:
        _store_columns(ptr, rows, mask, part_1, PART_0, SIZE)


@triton.jit
def seen_bits(
    words_ptr,  # [N, W] ancestors of the request
    node,  # [BLOCK_M]
    is_node,
    slot,  # first of the tile, at most 64 slots
    length,
    end,
    num_words,
):
    """[BLOCK_M] uint64: bit j tells whether the row's node sees slot + j, windows aside."""
    first = slot - length  # node of the slot; negative in the prefix
    word, shift = tl.maximum(first, 0) // 64, tl.maximum(first, 0) % 64
    num_left = tl.where(is_node, num_words - word, 0)
    ptrs = words_ptr + node.to(tl.int64) * num_words + word
    low = tl.load(ptrs, mask=num_left > 0, other=0).to(tl.uint64, bitcast=True)
    high = tl.load(ptrs + 1, mask=num_left > 1, other=0).to(tl.uint64, bitcast=True)
    bits = (low >> shift.to(tl.uint64)) | ((high << 1) << (63 - shift).to(tl.uint64))
    ahead = tl.minimum(tl.maximum(-first, 0), 64)  # prefix slots, which all see
    if ahead > 0:
        bits = (bits << (ahead - 1).to(tl.uint64)) << 1
        bits |= _ALL_BITS >> (64 - ahead).to(tl.uint64)
    return bits & (_ALL_BITS >> (64 - tl.minimum(end - slot, 64)).to(tl.uint64))


@triton.jit
def unpack(bits, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] bool of [BLOCK_M] words."""
    offs_n = tl.arange(0, BLOCK_N)
    halves = bits.to(tl.int32)[:, None]
    if BLOCK_N > 32:
        halves = tl.where((offs_n < 32)[None, :], halves, (bits >> 32).to(tl.int32)[:, None])
    return ((halves >> (offs_n % 32)[None, :]) & 1) != 0


@triton.jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _tanh(x, IS_ACCURATE: tl.constexpr):
    """tanh, with an error of about 2^-23 of it if IS_ACCURATE, else of 1."""
    result = 1.0 - 2.0 / (tl.exp2(x * (2 * _LOG2E)) + 1.0)
    if IS_ACCURATE:
        square = x * x
        total = -0.005905857 * square + 0.020805374
        total = total * square - 0.05378668
        total = total * square + 0.13331959
        total = total * square - 0.333333
        result = tl.where(square < 0.36, total * square * x + x, result)
    return result


@triton.jit
def logits_of(q_0, q_1, k_0, k_1, inner, outer, HAS_1: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
              IS_ACCURATE: tl.constexpr):  # fmt: skip
    """[BLOCK_M, BLOCK_N] logits: q.k * inner, or tanh(q.k * inner) * outer."""
    dots = _dot(q_0, tl.trans(k_0), tl.zeros((q_0.shape[0], k_0.shape[0]), tl.float32))
    if HAS_1:
        dots = _dot(q_1, tl.trans(k_1), dots)
    logits = dots * inner
    if HAS_SOFTCAP:
        logits = _tanh(logits, IS_ACCURATE) * outer
    return logits


@triton.jit
def base_of(largest):
    """What exponents are taken from: the maximum, or 0 where it is infinite."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit
def accumulate(logits, v_0, v_1, largest, weight, acc_0, acc_1, HAS_1: tl.constexpr):
    """The states of the online softmax after one more tile."""
    new_largest = tl.maximum(largest, tl.max(logits, 1))
    base = base_of(new_largest)
    keep = tl.exp2(largest - base)
    probs = tl.exp2(logits - base[:, None])
    weight = weight * keep + tl.sum(probs, 1)
    probs = probs.to(v_0.dtype)
    acc_0 = _dot(probs, v_0, acc_0 * keep[:, None])
    if HAS_1:
        acc_1 = _dot(probs, v_1, acc_1 * keep[:, None])
    return new_largest, weight, acc_0, acc_1


@triton.jit
def write_rows(
    largest, weight, acc_0, acc_1,
    request, node, head,
    is_row, is_node,  # padding nodes are rows too: out 0, lse -inf
    sinks_ptr,  # [H]
    out_ptr,  # [B, N, H, E]
    lse_ptr,  # [B, H, N]
    num_nodes_max, heads,
    HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
    E: tl.constexpr, E_0: tl.constexpr, E_1: tl.constexpr,
):  # fmt: skip
    """Outputs of finished states; a sink joins the weight and has no value."""
    factor = tl.full(largest.shape, 1.0, tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32) * _LOG2E
        largest_key = largest
        largest = tl.maximum(largest_key, sink)
        base = base_of(largest)
        factor = tl.exp2(largest_key - base)
        weight = weight * factor + tl.exp2(sink - base)
    has_law = is_node & (weight > 0.0) & (weight < float("inf"))
    factor = factor / tl.where(has_law, weight, 1.0)
    acc_0 = tl.where(has_law[:, None], acc_0 * factor[:, None], 0.0)
    if E_1 > 0:
        acc_1 = tl.where(has_law[:, None], acc_1 * factor[:, None], 0.0)
    out_rows = ((request * num_nodes_max + node) * heads + head) * E
    store_parts(out_ptr, out_rows, is_row, acc_0, acc_1, E, E_0, E_1)
    if HAS_LSE:
        lse = (largest + tl.log2(tl.where(weight == 0.0, 1.0, weight))) * _LN2
        lse_rows = (request * heads + head) * num_nodes_max + node
        tl.store(lse_ptr + lse_rows, tl.where(is_node, lse, -float("inf")), mask=is_row)
