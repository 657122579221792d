"""Moves kept nodes to the front of the tree's slots, keys and values of all layers in one launch.

`_prepare` writes the addresses of the caches into scratch memory and advances `lengths`, leaving
the old ones beside the addresses; the launch after it, `_move`, needs both and reads neither from
the host. So no table of pointers outlives the call, nothing is copied from the host, and no program
reads a length that another one advances.

A `_move` program owns a tile of heads of one cache for one request and goes along the path in tiles
of BLOCK_K entries. It is safe in place: entry k moves from slot path[k] down to slot k (counted
from `lengths`), path[k] >= k, so a later tile's sources lie above all that earlier tiles wrote;
within a tile a barrier stands between the last load and the first store. Columns of other heads,
requests and caches are other memory. Nothing but moved rows is read or written.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.commit import commit, empty_output
from .cache import is_page, locate_slots, slot_rows
from .launch import INTERPRETED, Launch

LAUNCH = {
    "prepare": Launch(1, 1, {"BLOCK_B": 32}),
    "move": Launch(4, 1, {"BLOCK_K": 8}),
    "gather": Launch(4, 1, {"BLOCK_F": 4096 if INTERPRETED else 2048}),
}

MOVE_COLUMNS = 512
"""Elements of a slot, over heads, that a `_move` program owns."""
MAX_POINTERS = 256
"""Caches whose addresses one launch takes as arguments: 2 KiB of the 4 that every GPU has."""

_PREPARE_SIZES = ["start", "num_caches", "batch", "nodes", "stride_lengths", "stride_kept"]
_MOVE_SIZES = [
    "num_caches", "nodes", "pages", "size", "capacity",
    "stride_path_b", "stride_kept", "stride_table_b", "stride_table_m",
]  # fmt: skip


@triton.jit
def _load_kept(num_kept_ptr, nodes):
    return tl.minimum(tl.maximum(tl.load(num_kept_ptr), 0), nodes)


@triton.jit(do_not_specialize=_PREPARE_SIZES, do_not_specialize_on_alignment=["caches"])
def _prepare(
    scratch_ptr,  # [num_caches + B] int64: addresses, then lengths before the call
    lengths_ptr,  # [B]
    num_kept_ptr,  # [B]
    start, num_caches, batch, nodes, stride_lengths, stride_kept,
    caches,
    ADVANCE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Addresses by the first program; lengths of BLOCK_B requests by each.

    Bytes per call: 8 * B read, 12 * B + 16 * L written. Roofline: t = those / bandwidth.
    """
    pid = tl.program_id(0)
    if pid == 0:
        for i in tl.static_range(len(caches)):
            tl.store(scratch_ptr + start + i, caches[i].to(tl.int64))
    if ADVANCE:
        offs_b = pid * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
        mask_b = offs_b < batch
        length = tl.load(lengths_ptr + offs_b * stride_lengths, mask=mask_b, other=0).to(tl.int64)
        kept = tl.load(num_kept_ptr + offs_b * stride_kept, mask=mask_b, other=0)
        kept = tl.minimum(tl.maximum(kept, 0), nodes)
        tl.store(scratch_ptr + num_caches + offs_b, length, mask=mask_b)
        advanced = (length + kept).to(tl.int32)
        tl.store(lengths_ptr + offs_b * stride_lengths, advanced, mask=mask_b)


@triton.jit(do_not_specialize=_MOVE_SIZES)
def _move(
    scratch_ptr,  # [num_caches + B] int64
    path_ptr,  # [B, N]
    num_kept_ptr,  # [B]
    page_table_ptr,  # [B, M]
    num_caches, nodes, pages, size, capacity,
    stride_path_b, stride_path_n, stride_kept, stride_table_b, stride_table_m,
    groups,  # of caches alike: (caches up to its last, heads, head dim, strides)
    caches,  # the caches for the interpreter, which checks addresses; () on a GPU
    ELEMENT: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_PAGED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of heads of one cache for one request.

    Bytes per call, with m rows moved and e bytes an element: 2 * L * m * G * D * e read, as many
    written, 16 + 8 * kept per program for scratch, path and page table.
    Roofline: t = 4 * L * m * G * D * e / bandwidth.
    """
    pid_b = tl.program_id(1).to(tl.int64)
    pid_c = tl.program_id(2)
    kept = _load_kept(num_kept_ptr + pid_b * stride_kept, nodes)
    heads, head_dim = groups[0][1], groups[0][2]
    stride_c, stride_g, stride_s, stride_d = groups[0][3]
    for i in tl.static_range(1, len(groups)):
        is_later = pid_c >= groups[i - 1][0]
        heads = tl.where(is_later, groups[i][1], heads)
        head_dim = tl.where(is_later, groups[i][2], head_dim)
        stride_c = tl.where(is_later, groups[i][3][0], stride_c)
        stride_g = tl.where(is_later, groups[i][3][1], stride_g)
        stride_s = tl.where(is_later, groups[i][3][2], stride_s)
        stride_d = tl.where(is_later, groups[i][3][3], stride_d)
    cache_ptr = tl.load(scratch_ptr + pid_c).to(tl.pointer_type(ELEMENT))
    if IS_ALIGNED:
        cache_ptr = tl.multiple_of(cache_ptr, 16)
    first = tl.load(scratch_ptr + num_caches + pid_b)

    offs_c = tl.arange(0, BLOCK_G * BLOCK_D)
    offs_g = tl.program_id(0) * BLOCK_G + offs_c // BLOCK_D
    offs_d = offs_c % BLOCK_D
    mask_c = ((offs_g < heads) & (offs_d < head_dim))[None, :]
    columns = (offs_g.to(tl.int64) * stride_g + offs_d.to(tl.int64) * stride_d)[None, :]
    for begin in range(0, kept, BLOCK_K):
        offs_k = begin + tl.arange(0, BLOCK_K)
        ptrs = path_ptr + pid_b * stride_path_b + offs_k.to(tl.int64) * stride_path_n
        node = tl.load(ptrs, mask=offs_k < kept, other=-1)
        source, target = first + node, first + offs_k
        moves = (node > offs_k) & (node < nodes) & (target >= 0) & (source < capacity)
        from_page, from_slot = locate_slots(
            tl.where(moves, source, 0).to(tl.int32), moves, pid_b,
            page_table_ptr, stride_table_b, stride_table_m, size, IS_PAGED,
        )  # fmt: skip
        to_page, to_slot = locate_slots(
            tl.where(moves, target, 0).to(tl.int32), moves, pid_b,
            page_table_ptr, stride_table_b, stride_table_m, size, IS_PAGED,
        )  # fmt: skip
        moves = moves & is_page(from_page, pages) & is_page(to_page, pages)
        mask = moves[:, None] & mask_c
        from_rows = slot_rows(from_page, from_slot, 0, stride_c, 0, stride_s)[:, None]
        to_rows = slot_rows(to_page, to_slot, 0, stride_c, 0, stride_s)[:, None]
        rows = tl.load(cache_ptr + from_rows + columns, mask=mask, other=0)
        tl.debug_barrier()
        tl.store(cache_ptr + to_rows + columns, rows, mask=mask)


@triton.jit(do_not_specialize=["nodes", "stride_path_b", "stride_kept"])
def _gather(
    hidden_ptr,  # [B, N, F]
    path_ptr,  # [B, N]
    num_kept_ptr,  # [B]
    out_ptr,  # [B, N, F] contiguous
    nodes, features, stride_path_b, stride_path_n, stride_kept,
    stride_hidden_b, stride_hidden_n, stride_hidden_f,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """A tile of features of one node.

    Bytes per call: kept * F * e read, B * N * F * e written, 8 per program for path and count.
    Roofline: t = (kept + B * N) * F * e / bandwidth.
    """
    pid_b = tl.program_id(1).to(tl.int64)
    pid_n = tl.program_id(0)
    offs_f = tl.program_id(2) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_kept = pid_n < _load_kept(num_kept_ptr + pid_b * stride_kept, nodes)
    ptr = path_ptr + pid_b * stride_path_b + pid_n.to(tl.int64) * stride_path_n
    node = tl.load(ptr, mask=is_kept, other=0)
    node = tl.minimum(tl.maximum(node, 0), nodes - 1).to(tl.int64)
    row_ptr = hidden_ptr + pid_b * stride_hidden_b + node * stride_hidden_n
    mask_f = offs_f < features
    ptrs = row_ptr + offs_f.to(tl.int64) * stride_hidden_f
    row = tl.load(ptrs, mask=mask_f & is_kept, other=0)
    tl.store(out_ptr + (pid_b * nodes + pid_n) * features + offs_f, row, mask=mask_f)


@commit.implement("triton")
def commit_triton(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    lengths: Tensor,
    path: Tensor,
    num_kept: Tensor,
    page_table: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Launch `_prepare` and `_move`; `_gather` where there is `hidden`.

    Nothing is refused: `num_kept` is clamped to [0, N]; an entry below its place in the path or
    beyond the tree, and a slot or page outside the cache, are not moved.
    """
    out = empty_output(k_caches, v_caches, lengths, path, num_kept, page_table, hidden)
    batch, nodes = path.shape
    if batch == 0 or nodes == 0:
        return out
    if hidden is not None and out.numel():
        features = hidden.shape[2]
        options = LAUNCH["gather"].options
        _gather[(nodes, batch, triton.cdiv(features, options["BLOCK_F"]))](
            hidden, path, num_kept, out,
            nodes, features, *path.stride(), num_kept.stride(0), *hidden.stride(), **options,
        )  # fmt: skip
    groups = _by_geometry((*k_caches, *v_caches)) if k_caches else {}
    caches = [cache for group in groups.values() for cache in group]
    scratch = lengths.new_empty(len(caches) + batch, dtype=torch.int64)
    options = LAUNCH["prepare"].options
    for start in range(0, max(1, len(caches)), MAX_POINTERS):
        _prepare[(triton.cdiv(batch, options["BLOCK_B"]) if start == 0 else 1,)](
            scratch, lengths, num_kept,
            start, len(caches), batch, nodes, lengths.stride(0), num_kept.stride(0),
            tuple(caches[start : start + MAX_POINTERS]), ADVANCE=start == 0, **options,
        )  # fmt: skip
    if caches:
        _launch_move(groups, scratch, path, num_kept, page_table)
    return out


def _by_geometry(caches: Sequence[Tensor]) -> dict[tuple[Any, Any], list[Tensor]]:
    """(shape, strides) -> the caches that have them."""
    groups: dict[tuple[Any, Any], list[Tensor]] = {}
    for cache in caches:
        groups.setdefault((cache.shape, cache.stride()), []).append(cache)
    return groups


def _launch_move(
    groups: dict[tuple[Any, Any], list[Tensor]],
    scratch: Tensor,
    path: Tensor,
    num_kept: Tensor,
    page_table: Tensor | None,
) -> None:
    batch, nodes = path.shape
    heads, dim = (max(shape[i] for shape, _ in groups) for i in (1, 3))
    if heads == 0 or dim == 0:
        return
    caches = [cache for group in groups.values() for cache in group]
    ends = accumulate(len(group) for group in groups.values())
    pages, _, size, _ = caches[0].shape
    is_paged = page_table is not None
    table = page_table if page_table is not None else path
    block_d = triton.next_power_of_2(dim)
    block_g = min(triton.next_power_of_2(heads), max(1, MOVE_COLUMNS // block_d))
    _move[(triton.cdiv(heads, block_g), batch, len(caches))](
        scratch, path, num_kept, table,
        len(caches), nodes, pages, size, size * table.shape[1] if is_paged else size,
        *path.stride(), num_kept.stride(0), *table.stride(),
        tuple(
            (end, shape[1], shape[3], strides)
            for end, (shape, strides) in zip(ends, groups, strict=True)
        ),
        tuple(caches) if INTERPRETED else (),
        ELEMENT=_ELEMENTS[caches[0].dtype],
        IS_ALIGNED=all(cache.data_ptr() % 16 == 0 for cache in caches),
        IS_PAGED=is_paged, BLOCK_G=block_g, BLOCK_D=block_d, **LAUNCH["move"].options,
    )  # fmt: skip


_ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
