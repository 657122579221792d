"""Where a slot of a request lies in a contiguous or paged cache: device functions.

A contiguous cache [B, G, S, D] gives request b its row b; pages [C, G, S, D] are found through
`page_table` [B, M]. A caller locates its slots once, then addresses keys and values with their own
strides:

    page, slot = locate_slots(offs_s, mask, b, table_ptr, stride_b, stride_m, size, IS_PAGED)
    k_ptrs = k_ptr + slot_rows(page, slot, g, stride_kc, stride_kg, stride_ks)

Both are int64, so every offset is. `size` is S: slots per request, or per page. The pages of a
table are data: `is_page` tells whether one lies in the cache, for callers that must not trust it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate_slots(
    slots,  # int32, any shape
    mask,  # where slots is in [0, capacity); nothing is read elsewhere
    request,
    page_table_ptr,  # [B, M] int32; unused unless IS_PAGED
    stride_table_b,
    stride_table_m,
    size,
    IS_PAGED: tl.constexpr,
):
    """(page or cache row, slot in it) of logical slots of one request, int64."""
    page = tl.cast(slots, tl.int64) * 0 + request
    slot = tl.cast(slots, tl.int64)
    if IS_PAGED:
        row_ptr = page_table_ptr + tl.cast(request, tl.int64) * stride_table_b
        column = (slots // size).to(tl.int64)
        page = tl.load(row_ptr + column * stride_table_m, mask=mask, other=0).to(tl.int64)
        slot = (slots % size).to(tl.int64)
    return page, slot


@triton.jit
def slot_rows(page, slot, head, stride_c, stride_g, stride_s):
    """Element offset of the head's row in each located slot, int64."""
    return page * stride_c + tl.cast(head, tl.int64) * stride_g + slot * stride_s


@triton.jit
def is_page(page, pages):
    """Whether a located page lies in a cache of `pages` pages."""
    return (page >= 0) & (page < pages)
