"""Stores the keys and values of tree nodes in the cache: one launch for both.

A program owns a tile of nodes of one head of one request. It reads the request's length and node
count on the device, locates the tile's slots once for keys and values, and copies rows: all loads
are issued before the first store. A node without a slot in the cache is masked out, so nothing is
written out of bounds. The rows are copied as they are: no conversion, NaN bits included.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.write_kv import write_kv
from .cache import is_page, locate_slots, slot_rows
from .launch import INTERPRETED, Launch

LAUNCH = {"write_kv": Launch(4, 1)}

TILE_ELEMENTS = 4096 if INTERPRETED else 2048
"""Elements of K (and of V) that a program copies: in 16 bits, an access of 128 bits for every
thread of four AMD warps, two for NVIDIA's."""

_SIZES = ["nodes", "heads", "pages", "size", "capacity", "stride_table_b", "stride_table_m"]


@triton.jit(do_not_specialize=_SIZES)
def _write_kv(
    k_ptr,  # [B, G, N, D]
    v_ptr,  # [B, G, N, E]
    k_cache_ptr,  # [C, G, S, D]
    v_cache_ptr,  # [C, G, S, E]
    lengths_ptr,  # [B]
    num_nodes_ptr,  # [B]
    page_table_ptr,  # [B, M]
    nodes, heads, pages, size, capacity,
    stride_kb, stride_kg, stride_kn, stride_kd,
    stride_vb, stride_vg, stride_vn, stride_vd,
    stride_kc_c, stride_kc_g, stride_kc_s, stride_kc_d,
    stride_vc_c, stride_vc_g, stride_vc_s, stride_vc_d,
    stride_lengths, stride_num_nodes, stride_table_b, stride_table_m,
    HEAD_DIM_K: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    IS_PAGED: tl.constexpr,
):  # fmt: skip
    """One tile of nodes of one head of one request.

    Bytes per call, with n the nodes written and e bytes an element: n * G * (D + E) * e read, as
    many written, 8 B for the ragged sizes, 4 per node and head for the page table.
    Roofline: t = 2 * n * G * (D + E) * e / bandwidth.
    """
    pid_b = (tl.program_id(0) // heads).to(tl.int64)
    pid_g = (tl.program_id(0) % heads).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(lengths_ptr + pid_b * stride_lengths).to(tl.int64)
    num_nodes = tl.load(num_nodes_ptr + pid_b * stride_num_nodes)
    slots = first + offs_n
    mask_n = (offs_n < nodes) & (offs_n < num_nodes) & (slots >= 0) & (slots < capacity)
    slots = tl.where(mask_n, slots, 0).to(tl.int32)
    page, slot = locate_slots(
        slots, mask_n, pid_b, page_table_ptr, stride_table_b, stride_table_m, size, IS_PAGED
    )
    mask_n = mask_n & is_page(page, pages)

    offs_n = offs_n.to(tl.int64)
    k_rows = pid_b * stride_kb + pid_g * stride_kg + offs_n * stride_kn
    v_rows = pid_b * stride_vb + pid_g * stride_vg + offs_n * stride_vn
    k_cache_rows = slot_rows(page, slot, pid_g, stride_kc_c, stride_kc_g, stride_kc_s)
    v_cache_rows = slot_rows(page, slot, pid_g, stride_vc_c, stride_vc_g, stride_vc_s)
    offs_k = tl.arange(0, BLOCK_DK).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_DV).to(tl.int64)
    mask_k = mask_n[:, None] & (offs_k < HEAD_DIM_K)[None, :]
    mask_v = mask_n[:, None] & (offs_v < HEAD_DIM_V)[None, :]
    k = tl.load(k_ptr + k_rows[:, None] + offs_k[None, :] * stride_kd, mask=mask_k, other=0)
    v = tl.load(v_ptr + v_rows[:, None] + offs_v[None, :] * stride_vd, mask=mask_v, other=0)
    k_ptrs = k_cache_ptr + k_cache_rows[:, None] + offs_k[None, :] * stride_kc_d
    v_ptrs = v_cache_ptr + v_cache_rows[:, None] + offs_v[None, :] * stride_vc_d
    tl.store(k_ptrs, k, mask=mask_k)
    tl.store(v_ptrs, v, mask=mask_v)


@write_kv.implement("triton")
def write_kv_triton(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_nodes: Tensor,
    page_table: Tensor | None = None,
) -> None:
    """Launch `_write_kv`. A node without a slot, or on a page outside the cache, is dropped."""
    batch, heads, nodes, dim_k = k.shape
    dim_v = v.shape[3]
    if k.numel() + v.numel() == 0:
        return
    pages, _, size, _ = k_cache.shape
    is_paged = page_table is not None
    table = page_table if page_table is not None else lengths[None]
    block_k, block_v = (max(1, triton.next_power_of_2(dim)) for dim in (dim_k, dim_v))
    block_n = max(1, TILE_ELEMENTS // max(block_k, block_v))
    _write_kv[(batch * heads, triton.cdiv(nodes, block_n))](
        k, v, k_cache, v_cache, lengths, num_nodes, table,
        nodes, heads, pages, size, size * table.shape[1] if is_paged else size,
        *k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(),
        lengths.stride(0), num_nodes.stride(0), *table.stride(),
        HEAD_DIM_K=dim_k, HEAD_DIM_V=dim_v,
        BLOCK_N=block_n, BLOCK_DK=block_k, BLOCK_DV=block_v,
        IS_PAGED=is_paged, **LAUNCH["write_kv"].options,
    )  # fmt: skip
