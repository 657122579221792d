"""What the general suite of operators leaves open for `tree_attention` on the CPU: few rows and
many, head dims that fill registers and that do not, memory that must not be read.
"""

from __future__ import annotations

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

from specdec_kernels import tree_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ID = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}.get
ROWS = (1, 2, 5, 6, 7, 12, 16, 17, 30)
"""Around what is computed together, and around where packing keys and values begins to pay."""


@pytest.mark.parametrize("dtype", DTYPES, ids=ID)
@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
def test_equals_the_reference_at_the_edges(case: dict[str, Any], dtype: torch.dtype) -> None:
    assert_equals_reference(at_the_edge(case, dtype), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=ID)
@pytest.mark.parametrize("nodes", ROWS)
@pytest.mark.parametrize("page_size", [0, 16, 24])
def test_any_number_of_rows_gives_the_same(nodes: int, page_size: int, dtype: torch.dtype) -> None:
    """Lengths within a tile, at its end and over several; nobody sees the NaN around."""
    inputs = one_tree(
        B=4, N=nodes, H=2, G=2, D=64, S=290, page_size=page_size, window=150, dtype=dtype
    )
    inputs["lengths"] = int32(0, 63, 128, 290 - nodes)
    hide(inputs, page_size)
    assert_equals_reference(inputs, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=ID)
@pytest.mark.parametrize("nodes", [3, 20])
@pytest.mark.parametrize(
    ("D", "E"), [(36, 36), (36, 64), (64, 36), (48, 16), (80, 80), (64, 128), (192, 128), (5, 3)]
)
def test_values_may_be_narrower_or_wider_than_keys(
    D: int, E: int, nodes: int, dtype: torch.dtype
) -> None:
    inputs = one_tree(B=2, N=nodes, H=4, G=2, D=D, S=140, dtype=dtype)
    inputs["v_cache"] = torch.randn((*inputs["k_cache"].shape[:3], E)).to(dtype)
    assert_equals_reference(inputs, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=ID)
@pytest.mark.parametrize("nodes", [3, 20])
def test_no_stride_need_be_1(nodes: int, dtype: torch.dtype) -> None:
    inputs = one_tree(B=2, N=nodes, H=4, G=2, D=32, S=140, dtype=dtype)
    spread_out(inputs)
    assert_equals_reference(inputs, "cpu")


def test_queries_of_an_odd_size_have_nothing_of_an_earlier_call_beside_them() -> None:
    """In pairs of bfloat16 the last has a zero at its side, in memory that calls share."""
    before = one_tree(B=1, N=6, H=2, G=2, D=64, S=90, dtype=torch.bfloat16)
    before["q"].fill_(torch.nan)
    inputs = one_tree(B=1, N=6, H=2, G=2, D=33, S=90, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tree_attention(**before)
        assert_equals_reference(inputs, "cpu")
    finally:
        torch.set_num_threads(threads)
