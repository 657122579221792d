"""What the general suite of operators leaves open for the Triton `tree_attention`: splits, sizes at
the edges of its tiles, memory that must not be read, and the bytes that it moves.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from attention_checks import (
    EDGES,
    assert_equals_reference,
    at_the_edge,
    hide,
    int32,
    one_tree,
    spread_out,
)

pytest.importorskip("triton", reason="triton is not installed")
from specdec_kernels.ops import tree_attention
from specdec_kernels.registry import INTERPRETS_TRITON

if not INTERPRETS_TRITON:
    pytest.skip("kernels run compiled here, not interpreted", allow_module_level=True)

import triton_checks

kernel = importlib.import_module("specdec_kernels.triton_kernels.tree_attention")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
def test_equals_the_reference_at_the_edges(case: dict[str, Any], dtype: torch.dtype) -> None:
    assert_equals_reference(at_the_edge(case, dtype), "triton")


@pytest.mark.parametrize(("D", "E"), [(48, 16), (64, 128), (192, 128)])
def test_values_may_be_narrower_or_wider_than_keys(D: int, E: int) -> None:
    inputs = one_tree(B=2, N=4, H=4, G=2, D=D, S=70)
    inputs["v_cache"] = torch.randn((2, 2, 70, E))
    assert_equals_reference(inputs, "triton")


def test_no_stride_need_be_1() -> None:
    inputs = one_tree(B=2, N=4, H=4, G=2, D=32, S=70)
    spread_out(inputs)
    assert_equals_reference(inputs, "triton")


@pytest.mark.parametrize(
    ("num_splits", "order"), [(1, "forward"), (2, "random"), (7, "reverse"), (40, "random")]
)
def test_any_number_of_splits_gives_the_same(
    num_splits: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths from 0 to many tiles: most of 40 splits are empty, and a window hides whole ones
    from some rows.
    """
    monkeypatch.setattr(kernel, "count_splits", lambda *_: num_splits)
    window = 150 if num_splits == 7 else 0
    inputs = one_tree(B=4, N=9, H=4, G=1, D=32, S=400, window=window, sinks=True)
    inputs["lengths"] = int32(0, 3, 140, 391)
    inputs["num_nodes"] = int32(9, 9, 0, 5)
    with triton_checks.in_order(order):
        assert_equals_reference(inputs, "triton")


@pytest.mark.parametrize("page_size", [0, 16])
def test_slots_that_nobody_sees_are_never_read(page_size: int) -> None:
    inputs = one_tree(B=2, N=5, H=2, G=1, D=16, S=96, window=20, page_size=page_size)
    inputs["lengths"], inputs["num_nodes"] = int32(70, 12), int32(3, 5)
    hide(inputs, page_size)
    assert_equals_reference(inputs, "triton")


def test_lengths_and_pages_beyond_the_cache_reach_no_other_memory() -> None:
    """Contents that the reference refuses on the host: bounds are what is checked here."""
    inputs = one_tree(B=3, N=5, H=2, G=1, D=16, S=96, page_size=16, window=50)
    inputs["lengths"] = int32(94, 2**31 - 10, -3)
    inputs["num_nodes"] = int32(5, 7, -1)
    inputs["page_table"][0, 4:] = int32(-5, 10**6)
    out, lse = tree_attention(**inputs, backend="triton")
    assert bool((out[2] == 0).all()) and bool((lse[2] == -torch.inf).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("num_splits", [1, 4])
def test_logits_that_are_not_finite_end_as_in_the_reference(
    value: float, num_splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "count_splits", lambda *_: num_splits)
    inputs = one_tree(B=2, N=3, H=2, G=1, D=16, S=200)
    inputs["q"] = inputs["q"].abs()
    inputs["lengths"], inputs["num_nodes"] = int32(197, 150), int32(3, 3)
    inputs["k_cache"][0, 0, 40] = value
    inputs["k_cache"][1, 0, 152] = value  # the last node, which it alone sees
    inputs["ancestors"][1, :2] &= 3
    assert_equals_reference(inputs, "triton")


def test_a_cache_may_reach_beyond_32_bit_offsets() -> None:
    """Two requests and heads far apart, in memory of which only touched pages exist."""
    far = 2**31 + 64
    inputs = one_tree(B=2, N=2, H=2, G=1, D=16, S=6, dtype=torch.float16)
    storage = torch.empty(far + 6 * 16, dtype=torch.float16)
    k_cache = storage.as_strided((2, 1, 6, 16), (far, 16 * 6, 16, 1))
    inputs["k_cache"] = k_cache.copy_(inputs["k_cache"])
    assert_equals_reference(inputs, "triton")


@pytest.mark.parametrize(("rows", "tiles"), [(8, 1), (200, 4)])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_moves_the_bytes_that_it_says(
    rows: int, tiles: int, num_splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each element of K and V once per head and query tile, partial sums once or not at all."""
    monkeypatch.setattr(kernel, "count_splits", lambda *_: num_splits)
    heads, kv_heads, window, D, E, N = 8, 2, 180, 256, 128, rows // 4
    inputs = one_tree(
        B=2, N=N, H=heads, G=kv_heads, D=D, S=400, window=window, dtype=torch.bfloat16
    )
    inputs["v_cache"] = torch.randn((2, kv_heads, 400, E)).to(torch.bfloat16)
    inputs["lengths"], inputs["num_nodes"] = int32(30, 340), int32(N, N)
    with triton_checks.counted() as traffic:
        tree_attention(**inputs, backend="triton")
    keys = 30 + N + window - 1 + N
    assert traffic["k_ptr"].loaded == tiles * kv_heads * keys * D * 2
    assert traffic["v_ptr"].loaded == tiles * kv_heads * keys * E * 2
    assert traffic["out_ptr"].stored == 2 * heads * N * E * 2
    assert traffic["lse_ptr"].stored == 2 * heads * N * 4
    active = 2 if num_splits > 1 else 0  # splits of the second request; the first is one split's
    assert traffic["q_ptr"].loaded == (1 + max(active, 1)) * heads * N * D * 2
    assert traffic["partials_ptr"].stored == active * heads * N * (E + 2) * 4
    assert traffic["partials_ptr"].loaded == active * heads * N * (E + 3) * 4


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_launches_are_bounded(rows: int) -> None:
    """However many processors: the merge's width, useful splits, and scratch memory."""
    assert kernel.count_splits(10**6, 4096, 64, 264, 4 * rows) == 1
    assert kernel.count_splits(1, 4096, 64, 264, 4 * rows) == 32  # two tiles each
    assert kernel.count_splits(1, 10**7, 64, 10**4, 4 * rows) == kernel.MAX_SPLITS.value
    assert kernel.count_splits(8, 65536, 64, 264, 4 * rows) == 33
    assert kernel.count_splits(512, 65536, 64, 264, 4 * rows) == 8  # 8192 keys each
    assert kernel.count_splits(8, 65536, 64, 264, kernel.MAX_PARTIAL_BYTES // 5) == 5


def test_head_dims_are_covered_without_waste() -> None:
    parts = {D: kernel._parts(D) for D in (4, 16, 40, 64, 80, 96, 112, 128, 192, 256)}
    assert parts == {
        4: (16, 0), 16: (16, 0), 40: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32),
        112: (128, 0), 128: (128, 0), 192: (128, 64), 256: (256, 0),
    }  # fmt: skip


def test_head_dims_above_256_are_refused() -> None:
    inputs = tree_attention.inputs(B=1, N=1, H=1, G=1, D=257, S=4)
    with pytest.raises(ValueError, match=r"D and E must be at most 256 for backend 'triton', got"):
        tree_attention(**inputs, backend="triton")
