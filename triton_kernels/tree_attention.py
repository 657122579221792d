"""Attention of tree nodes over the committed prefix and their ancestors: split-KV flash decoding.

A program owns one request, one key/value head, a tile of BLOCK_M query rows (row = node * group +
head of the group, so the heads that share K/V share its tiles too) and a range of key tiles. Full
tiles of the prefix need no mask but the window's; the last tiles, which hold the end of the prefix
and the N x N suffix, take their bits from the ancestor words. How a request's tiles are dealt to
the splits is settled on the device, from `lengths` and `num_nodes`: surplus splits leave at once,
and a request that fits one split is finished by it, otherwise `_merge` joins the partial sums.

Delicate: keys that no node sees may hold NaN, and 0 * NaN is not 0. They are those past the last
node and those before the root's window, as every node sees itself, and are never read.

Bytes per call, with T = ceil(N * H/G / BLOCK_M) query tiles, K_b keys that request b sees, A_b >= 1
splits of it with work, w bytes an element, and N the nodes that are no padding:
    reads   sum_b T * G * K_b * (D + E) * w  +  sum_b A_b * H * N * D * w (float32 reads q once per
            key tile), 16 bytes of ancestor words a row for each tile that is not all prefix
    writes  B * H * N * E * w, and 4 * B * H * N with lse
    partial sums where A_b > 1: A_b * H * N * (E + 2) * 4 written, and (E + 3) for (E + 2) read
Roofline time = max(bytes / bandwidth, 2 * (D + E) * H * N * sum_b K_b / FLOP rate); the latter is
4 * B * H * N * S * D / FLOP rate for D = E and full caches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.tree_attention import check_sizes, empty_outputs, tree_attention
from .attention_tiles import (
    accumulate,
    base_of,
    deal_tiles,
    find_keys,
    load_parts,
    logits_of,
    seen_bits,
    store_parts,
    unpack,
    write_rows,
)
from .launch import INTERPRETED, Launch, num_processors

LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 256
MAX_SPLITS = tl.constexpr(256)
"""The merge holds the maxima of so many splits at once."""
MAX_SPLIT_KEYS = 8192
"""A longer request is split even where the requests alone would fill the device: lengths are ragged
and the longest one ends last."""
MAX_PARTIAL_BYTES = 64 << 20

# By bytes an element, head dim (up to) and query rows (BLOCK_M); more rows take several tiles. Two
# bytes: tensor cores, tiles as large as registers allow on sm_80. Four: exact float32 dot products
# have no tensor cores on NVIDIA, so small tiles. Shared memory stays within 64 KiB on gfx942 and
# 99 KiB on sm_86, sm_89 and sm_120.
LAUNCH: dict[Any, Launch] = {
    (2, 128, 16): Launch(4, 3, {"BLOCK_N": 64}),
    (2, 128, 32): Launch(4, 3, {"BLOCK_N": 64}),
    (2, 128, 64): Launch(4, 4, {"BLOCK_N": 32}),
    (2, 128, 128): Launch(8, 4, {"BLOCK_N": 32}),
    (2, 256, 16): Launch(4, 3, {"BLOCK_N": 32}),
    (2, 256, 32): Launch(4, 3, {"BLOCK_N": 32}),
    (2, 256, 64): Launch(8, 4, {"BLOCK_N": 16}),
    (4, 128, 16): Launch(4, 3, {"BLOCK_N": 16}),
    (4, 128, 32): Launch(8, 2, {"BLOCK_N": 16}),
    (4, 256, 16): Launch(4, 2, {"BLOCK_N": 16}),
    # Where elements must be loaded one by one, through registers, which hold small tiles only.
    "unaligned": Launch(8, 2, {"BLOCK_M": 16, "BLOCK_N": 16}),
    "merge": Launch(4, 2, {"BLOCK_R": 16 if INTERPRETED else 1, "BLOCK_S": 16}),
}
WARPS_PER_PROCESSOR = 8
"""Warps that a processor runs at once, bound by registers; they set the number of splits."""
MIN_TILES = 2
"""Key tiles of a split: fewer are not worth a partial result."""


_SIZES = ("num_nodes_max", "kv_heads", "capacity", "pages", "window", "num_splits", "num_tiles",
          "num_partials", "num_words", "stride_tb", "stride_tm")  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _attend(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [C, G, S, D]
    v_ptr,  # [C, G, S, E]
    ancestors_ptr,  # [B, N, W]
    depths_ptr,  # [B, N]
    lengths_ptr,  # [B]
    num_nodes_ptr,  # [B]
    table_ptr,  # [B, M]
    sinks_ptr,  # [H]
    out_ptr,  # [B, N, H, E]
    lse_ptr,  # [B, H, N]
    partials_ptr,  # [B * G, splits, N * group] x (E sums), then maxima, then weights
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kc, stride_kg, stride_ks, stride_kd,
    stride_vc, stride_vg, stride_vs, stride_ve,
    stride_tb, stride_tm,
    num_nodes_max, kv_heads, capacity, pages, window, num_splits, num_tiles, num_partials,
    num_words, inner, outer,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    D: tl.constexpr, D_0: tl.constexpr, D_1: tl.constexpr,
    E: tl.constexpr, E_0: tl.constexpr, E_1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = pid % num_tiles  # fastest, so that tiles of the same keys run together
    split = pid // num_tiles % num_splits
    pid_bg = pid // num_tiles // num_splits
    request, kv_head = (pid_bg // kv_heads).to(tl.int64), pid_bg % kv_heads
    length = tl.load(lengths_ptr + request)
    count = tl.minimum(tl.load(num_nodes_ptr + request), num_nodes_max)
    first, end, full, tiles, each, num_active = deal_tiles(
        length, count, capacity, window, num_splits, HAS_WINDOW, BLOCK_N, MIN_TILES
    )
    if split >= num_active:
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    node, head = row // GROUP, kv_head * GROUP + row % GROUP
    is_row, is_node = node < num_nodes_max, node < count
    q_rows = request * stride_qb + head.to(tl.int64) * stride_qh + node.to(tl.int64) * stride_qn
    q_0, q_1 = load_parts(q_ptr, q_rows, is_node, stride_qd, False, D, D_0, D_1)
    depths_ptr += request * num_nodes_max
    words_ptr = ancestors_ptr + request * num_nodes_max * num_words
    depth = tl.load(depths_ptr + node, mask=is_node, other=0)

    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    acc_0 = tl.zeros((BLOCK_M, E_0), tl.float32)
    acc_1 = tl.zeros((BLOCK_M, E_1 if E_1 > 0 else 1), tl.float32)
    is_float32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    last = tl.where(tile * BLOCK_M // GROUP < count, tl.minimum((split + 1) * each, tiles), 0)

    for i in range(split * each, tl.minimum(last, full)):
        slots = first + i * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = slots < end
        k_rows, v_rows = find_keys(
            slots, inside, request, kv_head, table_ptr, stride_tb, stride_tm, pages,
            stride_kc, stride_kg, stride_ks, stride_vc, stride_vg, stride_vs, PAGE_SIZE,
        )  # fmt: skip
        if is_float32:  # min(i, 0) is 0: unhoisted, or q would fill the registers
            again = q_rows + tl.minimum(i, 0) * 16
            q_0, q_1 = load_parts(q_ptr, again, is_node, stride_qd, False, D, D_0, D_1)
        k_0, k_1 = load_parts(k_ptr, k_rows, inside, stride_kd, True, D, D_0, D_1)
        logits = logits_of(q_0, q_1, k_0, k_1, inner, outer, D_1 > 0, HAS_SOFTCAP, is_float32)
        if HAS_WINDOW:
            is_near = slots[None, :] > (length - window + depth)[:, None]
            logits = tl.where(is_near, logits, -float("inf"))
        v_0, v_1 = load_parts(v_ptr, v_rows, inside, stride_ve, True, E, E_0, E_1)
        largest, weight, acc_0, acc_1 = accumulate(
            logits, v_0, v_1, largest, weight, acc_0, acc_1, E_1 > 0
        )

    for i in tl.range(tl.maximum(split * each, full), last, num_stages=1):
        slots = first + i * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = slots < end
        k_rows, v_rows = find_keys(
            slots, inside, request, kv_head, table_ptr, stride_tb, stride_tm, pages,
            stride_kc, stride_kg, stride_ks, stride_vc, stride_vg, stride_vs, PAGE_SIZE,
        )  # fmt: skip
        bits = seen_bits(words_ptr, node, is_node, first + i * BLOCK_N, length, end, num_words)
        seen = unpack(bits, BLOCK_N)
        if HAS_WINDOW:  # in positions: siblings share one
            key = slots - length
            key_depth = tl.load(depths_ptr + key, mask=inside & (key >= 0), other=0)
            key_depth = tl.where(key < 0, key, key_depth)
            seen = seen & (depth[:, None] - key_depth[None, :] < window)
        if is_float32:
            again = q_rows + tl.minimum(i, 0) * 16
            q_0, q_1 = load_parts(q_ptr, again, is_node, stride_qd, False, D, D_0, D_1)
        k_0, k_1 = load_parts(k_ptr, k_rows, inside, stride_kd, False, D, D_0, D_1)
        logits = logits_of(q_0, q_1, k_0, k_1, inner, outer, D_1 > 0, HAS_SOFTCAP, is_float32)
        logits = tl.where(seen, logits, -float("inf"))
        v_0, v_1 = load_parts(v_ptr, v_rows, inside, stride_ve, False, E, E_0, E_1)
        largest, weight, acc_0, acc_1 = accumulate(
            logits, v_0, v_1, largest, weight, acc_0, acc_1, E_1 > 0
        )

    if num_active == 1:
        write_rows(
            largest, weight, acc_0, acc_1, request, node, head, is_row, is_node,
            sinks_ptr, out_ptr, lse_ptr, num_nodes_max, kv_heads * GROUP,
            HAS_SINKS, HAS_LSE, E, E_0, E_1,
        )  # fmt: skip
    else:
        partial = (pid_bg.to(tl.int64) * num_splits + split) * (num_nodes_max * GROUP) + row
        store_parts(partials_ptr, partial * E, is_node, acc_0, acc_1, E, E_0, E_1)
        largest_ptr = partials_ptr + num_partials.to(tl.int64) * E
        tl.store(largest_ptr + partial, largest, mask=is_node)
        tl.store(largest_ptr + num_partials + partial, weight, mask=is_node)


@triton.jit(do_not_specialize=("num_nodes_max", "kv_heads", "capacity", "window", "num_splits",
                               "num_blocks", "num_partials"))  # fmt: skip
def _merge(
    partials_ptr,  # as in _attend
    lengths_ptr,  # [B]
    num_nodes_ptr,  # [B]
    sinks_ptr,  # [H]
    out_ptr,  # [B, N, H, E]
    lse_ptr,  # [B, H, N]
    num_nodes_max, kv_heads, capacity, window, num_splits, num_blocks, num_partials,
    GROUP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr,
):  # fmt: skip
    """One program joins the splits of BLOCK_R rows of a key/value head."""
    pid = tl.program_id(0)
    pid_bg = pid // num_blocks
    request, kv_head = (pid_bg // kv_heads).to(tl.int64), pid_bg % kv_heads
    count = tl.minimum(tl.load(num_nodes_ptr + request), num_nodes_max)
    num_active = deal_tiles(
        tl.load(lengths_ptr + request), count, capacity, window, num_splits, HAS_WINDOW, BLOCK_N,
        MIN_TILES,
    )[5]  # fmt: skip
    if num_active == 1:
        return
    row = pid % num_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    node, head = row // GROUP, kv_head * GROUP + row % GROUP
    is_row, is_node = node < num_nodes_max, node < count
    num_rows = num_nodes_max * GROUP
    partial = pid_bg.to(tl.int64) * num_splits * num_rows + row
    largest_ptr = partials_ptr + num_partials.to(tl.int64) * E

    splits = tl.arange(0, MAX_SPLITS)
    ptrs = largest_ptr + (partial[:, None] + splits.to(tl.int64)[None, :] * num_rows)
    mask = is_node[:, None] & (splits < num_active)[None, :]
    maxima = tl.load(ptrs, mask=mask, other=-float("inf"))
    weights = tl.load(ptrs + num_partials, mask=mask, other=0.0)
    largest = tl.max(maxima, 1)
    base = base_of(largest)
    weight = tl.sum(weights * tl.exp2(maxima - base[:, None]), 1)

    acc = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    columns = tl.arange(0, BLOCK_E)
    for i in range(0, num_active, BLOCK_S):
        some = i + tl.arange(0, BLOCK_S)
        inside = is_node[:, None] & (some < num_active)[None, :]
        at = partial[:, None] + some.to(tl.int64)[None, :] * num_rows
        part_largest = tl.load(largest_ptr + at, mask=inside, other=-float("inf"))
        share = tl.exp2(part_largest - base[:, None])
        part = tl.load(
            partials_ptr + (at * E)[:, :, None] + columns[None, None, :],
            mask=inside[:, :, None] & (columns < E)[None, None, :], other=0.0,
        )  # fmt: skip
        acc += tl.sum(share[:, :, None] * part, 1)
    write_rows(
        largest, weight, acc, acc, request, node, head, is_row, is_node,
        sinks_ptr, out_ptr, lse_ptr, num_nodes_max, kv_heads * GROUP,
        HAS_SINKS, HAS_LSE, E, BLOCK_E, 0,
    )  # fmt: skip


@tree_attention.implement("triton")
def tree_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ancestors: Tensor,
    depths: Tensor,
    lengths: Tensor,
    num_nodes: Tensor,
    page_table: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch `_attend`, and `_merge` where requests may be split.

    Never reads the device: there, slots past the cache count as absent and pages outside it as its
    first or last. Sizes are not specialised; strides are, by their divisibility by 16.

    Raises:
        ValueError: as the reference, and D or E above 256.
    """
    check_sizes(q, k_cache, ancestors, page_table, window, softcap)
    batch, heads, nodes, head_dim = q.shape
    pages, kv_heads, size, value_dim = v_cache.shape
    if max(head_dim, value_dim) > MAX_HEAD_DIM:
        raise ValueError(
            f"tree_attention: D and E must be at most {MAX_HEAD_DIM} for backend 'triton', "
            f"got {head_dim} and {value_dim}"
        )
    out, lse = empty_outputs(
        q, k_cache, v_cache, ancestors, depths, lengths, num_nodes, scale=scale,
        return_lse=return_lse,
    )  # fmt: skip
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse

    group = heads // kv_heads
    launch = launch_of(
        q.element_size(), max(head_dim, value_dim), nodes * group,
        page_table is not None, _is_aligned(k_cache) and _is_aligned(v_cache),
    )  # fmt: skip
    blocks = launch.blocks or {}
    num_tiles = triton.cdiv(nodes * group, blocks["BLOCK_M"])
    capacity = size if page_table is None else size * page_table.shape[1]
    keys = min(capacity, window + nodes) if window else capacity
    num_splits = count_splits(
        batch * kv_heads * num_tiles, keys, blocks["BLOCK_N"],
        num_processors(q.device) * WARPS_PER_PROCESSOR // launch.num_warps,
        4 * batch * heads * nodes * (value_dim + 2),
    )  # fmt: skip
    num_partials = batch * heads * nodes * num_splits
    partials = q.new_empty(
        num_partials * (value_dim + 2) if num_splits > 1 else 0, dtype=torch.float32
    )
    lengths, num_nodes = lengths.contiguous(), num_nodes.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    d_0, d_1 = _parts(head_dim)
    e_0, e_1 = _parts(value_dim)
    flags = {
        "GROUP": group,
        "HAS_WINDOW": window > 0,
        "HAS_SINKS": sinks is not None,
        "HAS_LSE": return_lse,
        "E": value_dim,
        "MIN_TILES": MIN_TILES,
    }
    _attend[(batch * kv_heads * num_tiles * num_splits,)](
        q, k_cache, v_cache, ancestors.contiguous(), depths.contiguous(), lengths, num_nodes,
        page_table, sinks, out, lse, partials,
        *_strides(q), *_strides(k_cache), *_strides(v_cache),
        *((0, 0) if page_table is None else page_table.stride()),
        nodes, kv_heads, capacity, pages, window, num_splits, num_tiles, num_partials,
        ancestors.shape[2], scale / softcap if softcap else scale * LOG2E, softcap * LOG2E,
        PAGE_SIZE=0 if page_table is None else size, HAS_SOFTCAP=softcap > 0,
        D=head_dim, D_0=d_0, D_1=d_1, E_0=e_0, E_1=e_1, **flags, **launch.options,
    )  # fmt: skip
    if num_splits > 1:
        num_blocks = triton.cdiv(nodes * group, LAUNCH["merge"].options["BLOCK_R"])
        _merge[(batch * kv_heads * num_blocks,)](
            partials, lengths, num_nodes, sinks, out, lse,
            nodes, kv_heads, capacity, window, num_splits, num_blocks, num_partials,
            BLOCK_E=triton.next_power_of_2(value_dim), BLOCK_N=blocks["BLOCK_N"],
            **flags, **LAUNCH["merge"].options,
        )  # fmt: skip
    return out, lse


def launch_of(
    dtype_bytes: int, head_dim: int, rows: int, is_paged: bool, is_aligned: bool
) -> Launch:
    """The launch for the query rows of a key/value head, BLOCK_M among its blocks."""
    if not is_aligned:
        return LAUNCH["unaligned"]
    bucket = 128 if head_dim <= 128 else 256
    largest = max(key[2] for key in LAUNCH if key[:2] == (dtype_bytes, bucket))
    block_m = min(max(16, triton.next_power_of_2(rows)), largest)
    launch = LAUNCH[dtype_bytes, bucket, block_m]
    blocks = {**(launch.blocks or {}), "BLOCK_M": block_m}
    if INTERPRETED and bucket == 256:
        blocks["BLOCK_N"] = 64  # time there is by operations, not by elements
    # A page is looked up one stage before its keys are loaded.
    return replace(launch, num_stages=launch.num_stages + is_paged, blocks=blocks)


def _is_aligned(cache: Tensor) -> bool:
    """Whether Triton loads 128 bits at a time: it looks for strides in multiples of 16."""
    *strides, last = _strides(cache)
    return cache.data_ptr() % 16 == 0 and last == 1 and not any(s % 16 for s in strides)


def count_splits(programs: int, keys: int, block_n: int, resident: int, partial_bytes: int) -> int:
    """Splits of each request: as many as the device runs at once, and none with more than
    MAX_SPLIT_KEYS keys.

    Args:
        programs: programs of one split.
        keys: most keys that a request may see.
        block_n: keys of a tile.
        resident: programs that the device runs at once.
        partial_bytes: of the partial results of one split.
    """
    wanted = max(resident // programs, triton.cdiv(keys, MAX_SPLIT_KEYS))
    useful = triton.cdiv(triton.cdiv(keys, block_n), MIN_TILES)
    return max(1, min(wanted, useful, MAX_SPLITS.value, MAX_PARTIAL_BYTES // partial_bytes))


def _parts(size: int) -> tuple[int, int]:
    """Powers of two that cover a head dim, the second one 0 where one does: 80 = 64 + 16."""
    first = 1 << (max(size, 16).bit_length() - 1)
    rest = size - first
    if rest <= 0:
        return first, 0
    second = max(16, triton.next_power_of_2(rest))
    return (first, second) if second < first else (2 * first, 0)


def _strides(x: Tensor) -> list[int]:
    """Strides, 0 for sizes of 1: what a tensor says there is arbitrary, and would only choose a
    kernel with narrower loads.
    """
    return [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
