"""What the generic suite does not show of the CUDA `tree_attention`: splits, head dims, alignments,
memory that must not be read, the bytes that it moves, and that its faults are found.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import cuda_emulated
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
from sanitized import build_mutant, programs, replace_once, run

from specdec_kernels.ops import tree_attention

BACKEND = cuda_emulated.BACKEND
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
ID = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}.get

__all__ = ["programs"]  # a fixture


def _counters(inputs: dict[str, Any]) -> dict[str, int]:
    cuda_emulated.emulated.take_counters()
    tree_attention(**inputs, backend=BACKEND)
    counters: dict[str, int] = cuda_emulated.emulated.take_counters()
    return counters


@pytest.mark.parametrize("dtype", DTYPES, ids=ID)
@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
def test_equals_the_reference_at_the_edges(case: dict[str, Any], dtype: torch.dtype) -> None:
    assert_equals_reference(at_the_edge(case, dtype), BACKEND)


@pytest.mark.parametrize("dtype", DTYPES, ids=ID)
@pytest.mark.parametrize(
    ("D", "E", "page_size"),
    [(48, 16, 16), (64, 128, 128), (192, 128, 0), (96, 80, 64), (12, 20, 32)],
)
def test_values_may_be_narrower_or_wider_than_keys(
    D: int, E: int, page_size: int, dtype: torch.dtype
) -> None:
    inputs = one_tree(B=2, N=4, H=4, G=2, D=D, S=140, page_size=page_size, dtype=dtype)
    inputs["v_cache"] = torch.randn((*inputs["k_cache"].shape[:3], E)).to(dtype)
    assert_equals_reference(inputs, BACKEND)


@pytest.mark.parametrize("dtype", DTYPES, ids=ID)
def test_no_stride_need_be_1(dtype: torch.dtype) -> None:
    inputs = one_tree(B=2, N=4, H=4, G=2, D=32, S=70, dtype=dtype)
    spread_out(inputs)
    assert_equals_reference(inputs, BACKEND)


@pytest.mark.parametrize("dtype", DTYPES, ids=ID)
@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_rows_need_not_be_aligned(name: str, dtype: torch.dtype) -> None:
    """One tensor starts an element late. Keys are copied 16 bytes at once if only q does."""
    inputs = one_tree(B=2, N=3, H=4, G=2, D=32, S=70, dtype=dtype)
    shape = inputs[name].shape
    late = torch.zeros(inputs[name].numel() + 1, dtype=dtype)[1:].view(shape)
    inputs[name] = late.copy_(inputs[name])
    copied = _counters(inputs)["copied_bytes"]
    assert (copied > 0) == (name == "q")
    assert_equals_reference(inputs, BACKEND)


@pytest.mark.parametrize(
    ("processors", "order"), [(1, "forward"), (24, "random:1"), (36, "reverse"), (999, "random:2")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ID)
@pytest.mark.parametrize("nodes", [9, 30])
def test_any_number_of_splits_gives_the_same(
    processors: int, order: str, nodes: int, dtype: torch.dtype
) -> None:
    """Lengths from 0 to many tiles: most splits are empty, and a window hides whole ones from some
    rows.
    """
    window = 300 if processors == 36 else 0
    inputs = one_tree(B=4, N=nodes, H=4, G=1, D=32, S=600, window=window, sinks=True, dtype=dtype)
    inputs["lengths"] = int32(0, 3, 140, 600 - nodes)
    inputs["num_nodes"] = int32(nodes, nodes, 0, nodes // 2)
    with cuda_emulated.in_order(order), cuda_emulated.on_processors(processors):
        assert _counters(inputs)["launches"] == (1 if processors == 1 else 2)
        assert_equals_reference(inputs, BACKEND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ID)
@pytest.mark.parametrize("page_size", [0, 16])
def test_slots_that_nobody_sees_are_never_read(page_size: int, dtype: torch.dtype) -> None:
    inputs = one_tree(B=2, N=5, H=2, G=1, D=16, S=96, window=20, page_size=page_size, dtype=dtype)
    inputs["lengths"], inputs["num_nodes"] = int32(70, 12), int32(3, 5)
    hide(inputs, page_size)
    assert_equals_reference(inputs, BACKEND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ID)
def test_lengths_and_pages_beyond_the_cache_reach_no_other_memory(dtype: torch.dtype) -> None:
    """Contents that the reference refuses on the host; memory is watched in test_sanitizers.py."""
    inputs = one_tree(B=3, N=5, H=2, G=1, D=16, S=96, page_size=16, window=50, dtype=dtype)
    inputs["lengths"] = int32(94, 2**31 - 10, -3)
    inputs["num_nodes"] = int32(5, 7, -1)
    inputs["page_table"][0, 4:] = int32(-5, 10**6)
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].nan_to_num()
    out, lse = tree_attention(**inputs, backend=BACKEND)
    assert bool((out[1:] == 0).all()) and bool((lse[1:] == -torch.inf).all())
    assert bool(out[0].isfinite().all()) and bool(lse[0].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ID)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("processors", [1, 16])
def test_logits_that_are_not_finite_end_as_in_the_reference(
    value: float, processors: int, dtype: torch.dtype
) -> None:
    inputs = one_tree(B=2, N=3, H=2, G=1, D=16, S=300, dtype=dtype)
    inputs["q"] = inputs["q"].abs()
    inputs["lengths"], inputs["num_nodes"] = int32(297, 150), int32(3, 3)
    inputs["k_cache"][0, 0, 40] = value
    inputs["k_cache"][1, 0, 152] = value  # the last node, which it alone sees
    inputs["ancestors"][1, :2] &= 3
    with cuda_emulated.on_processors(processors):
        assert_equals_reference(inputs, BACKEND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ID)
def test_a_cache_may_reach_beyond_32_bit_offsets(dtype: torch.dtype) -> None:
    """Two requests far apart, in memory of which only touched pages exist."""
    far = 2**31 + 64
    inputs = one_tree(B=2, N=2, H=2, G=1, D=16, S=6, dtype=dtype)
    storage = torch.empty(far + 6 * 16, dtype=dtype)
    k_cache = storage.as_strided((2, 1, 6, 16), (far, 16 * 6, 16, 1))
    inputs["k_cache"] = k_cache.copy_(inputs["k_cache"])
    assert_equals_reference(inputs, BACKEND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ID)
@pytest.mark.parametrize("nodes", [2, 50])
@pytest.mark.parametrize("processors", [1, 32])
def test_moves_the_bytes_that_it_says(nodes: int, processors: int, dtype: torch.dtype) -> None:
    """Each element of K and V once per head, row tile and call; partial sums once or not at all."""
    heads, kv_heads, window, D, E, size = 8, 2, 800, 64, 32, dtype.itemsize
    inputs = one_tree(B=2, N=nodes, H=heads, G=kv_heads, D=D, S=1000, window=window, dtype=dtype)
    inputs["v_cache"] = torch.randn((2, kv_heads, 1000, E)).to(dtype)
    inputs["lengths"], inputs["num_nodes"] = int32(3, 940), int32(nodes, nodes)
    with cuda_emulated.on_processors(processors):
        counters = _counters(inputs)
    tiles, rows, tile_keys, blocks_per_processor = {
        (4, 2): (1, 16, 32, 2),
        (4, 50): (5, 40, 32, 1),
        (2, 2): (1, 16, 64, 2),
        (2, 50): (1, 224, 32, 1),
    }[size, nodes]
    keys = [3 + nodes, window - 1 + nodes]
    assert counters["copied_bytes"] == tiles * kv_heads * sum(keys) * (D + E) * size
    min_tiles = max(2, 2 * rows // tile_keys)
    blocks = 2 * kv_heads * tiles
    useful = math.ceil(math.ceil((window + nodes) / tile_keys) / min_tiles)
    splits = max(1, min(blocks_per_processor * processors // blocks, useful))
    active = []
    for seen in keys:
        num = math.ceil(seen / tile_keys)
        each = max(math.ceil(num / splits), min_tiles)
        active.append(max(math.ceil(num / each), 1))
    assert (splits > 1) == (processors > 1 and tiles == 1)
    partial = sum(a for a in active if a > 1) * heads * nodes
    assert counters["loaded_bytes"] == (
        sum(active) * heads * nodes * D * size + partial * (E + 3) * 4
    )
    assert counters["stored_bytes"] == (2 * heads * nodes * (E * size + 4) + partial * (E + 2) * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ID)
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
def test_keys_and_values_are_read_once_for_all_rows_that_fit(D: int, dtype: torch.dtype) -> None:
    """A row is a node and one of four heads; one node more needs a second tile of rows."""
    most = (28 if D == 256 else 48) if dtype == torch.float32 else 128 if D == 256 else 256
    for nodes, reads in ((most // 4, 1), (most // 4 + 1, 2)):
        inputs = one_tree(B=1, N=nodes, H=4, G=1, D=D, S=nodes + 9, dtype=dtype)
        inputs["lengths"] = int32(9)
        counters = _counters(inputs)
        assert counters["copied_bytes"] == reads * 2 * (9 + nodes) * D * dtype.itemsize


@pytest.mark.parametrize("nodes", [1, 20, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=ID)
@pytest.mark.parametrize("D", [16, 64, 80, 96, 112, 128, 256])
def test_shared_memory_has_no_bank_conflicts(D: int, nodes: int, dtype: torch.dtype) -> None:
    """In the loop by ldmatrix, cp.async, loads and stores, and where a warp writes its own rows."""
    counters = _counters(one_tree(B=1, N=nodes, H=2, G=1, D=D, S=150, dtype=dtype))
    assert (counters["matrix_loads"] > 0) == (dtype != torch.float32)
    assert counters["shared_accesses"] > 0 and counters["bank_conflicts"] == 0


def test_a_tile_takes_one_barrier() -> None:
    barriers = []
    for tiles in (2, 3):
        inputs = one_tree(B=2, N=1, H=2, G=1, D=64, S=64 * tiles, dtype=torch.bfloat16)
        inputs["lengths"] = int32(64 * tiles - 1, 0)
        with cuda_emulated.on_processors(1):
            barriers.append(_counters(inputs)["barriers"])
    assert barriers[1] - barriers[0] == 1


def test_head_dims_above_256_are_refused() -> None:
    inputs = tree_attention.inputs(B=1, N=1, H=1, G=1, D=257, S=4)
    with pytest.raises(ValueError, match=r"D and E must be at most 256 for backend 'cuda', got"):
        tree_attention(**inputs, backend=BACKEND)


@pytest.mark.parametrize("sizes", [{"B": 0, "N": 3, "S": 9}, {"B": 2, "N": 0, "S": 9}])
def test_empty_calls_launch_nothing(sizes: dict[str, int]) -> None:
    inputs = {**tree_attention.inputs(B=2, N=3, H=2, G=1, D=16, S=9)}
    batch, nodes = sizes["B"], sizes["N"]
    for name in ("q", "k_cache", "v_cache", "ancestors", "depths", "lengths", "num_nodes"):
        inputs[name] = inputs[name][:batch]
    inputs["q"] = inputs["q"][:, :, :nodes]
    inputs["ancestors"] = inputs["ancestors"][:, :nodes, : (nodes + 63) // 64]
    inputs["depths"] = inputs["depths"][:, :nodes]
    inputs["num_nodes"] = inputs["num_nodes"].clamp(max=nodes)
    inputs["lengths"] = inputs["lengths"] * 0
    assert _counters(inputs)["launches"] == 0


def test_mistakes_are_named_as_the_reference_does() -> None:
    inputs = tree_attention.inputs(B=2, N=3, H=4, G=2, D=16, S=9)
    mistakes: list[dict[str, Any]] = [
        {"window": -1},
        {"softcap": -2.5},
        {"q": inputs["q"][:, :3], "sinks": None},
        {"ancestors": torch.zeros((2, 3, 2), dtype=torch.int64)},
        {"k_cache": inputs["k_cache"][:1], "v_cache": inputs["v_cache"][:1]},
    ]
    for mistake in mistakes:
        messages = []
        for backend in (BACKEND, "reference"):
            with pytest.raises(ValueError, match="tree_attention: ") as caught:
                tree_attention(**{**inputs, **mistake}, backend=backend)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


FAULTS = {
    # fault: (source, what stands there, what takes its place, tool, what is reported)
    "missing_barrier": (
        "attention_mma.cuh",
        "- 2>();\n    __syncthreads();",
        "- 2>();",
        "thread",
        r"data race(?s:.)*attend_mma_kernel",
    ),
    "missing_wait": (
        "attention_mma.cuh",
        "cp_async_wait<Tile::kStages - 2>();",
        "",
        "thread",
        r"data race(?s:.)*load_matrices(?s:.)*attend_mma_kernel",
    ),
    "write_after_read": (
        "attention_mma.cuh",
        "fetch(tile + Tile::kStages - 1);",
        "fetch(tile + Tile::kStages);",
        "thread",
        r"data race(?s:.)*async_copy16(?s:.)*attend_mma_kernel",
    ),
    "rows_over_queries": (  # whose lanes read what they later write, or what another one does
        "attention_mma.cuh",
        "__syncwarp();  // all lanes have read q",
        "",
        "thread",
        r"data race(?s:.)*write_own_rows(?s:.)*load_matrices",
    ),
    "missing_wait_without_tensor_cores": (
        "attention_plain.cuh",
        "cp_async_wait<1>();  // the keys are here, the values may not be",
        "",
        "thread",
        r"data race(?s:.)*add_key(?s:.)*attend_plain_kernel",
    ),
    "write_after_read_without_tensor_cores": (
        "attention_plain.cuh",
        "    __syncthreads();\n    if (tile + 1 < last) fetch_values(tile + 1);",
        "    if (tile + 1 < last) fetch_values(tile + 1);",
        "thread",
        r"data race(?s:.)*attend_plain_kernel",
    ),
    "out_of_bounds": (
        "attention_mma_tile.cuh",
        "is_inside = slot < end;",
        "is_inside = slot < end + 3;",
        "address",
        r"attention_mma_tile\.cuh:\d+: cp\.async: reads outside of allocated memory",
    ),
    "misaligned": (
        "tree_attention.cu",
        "params.has_wide_kv =\n      ",
        "params.has_wide_kv = true ||\n      ",
        "address",
        r"attention_mma_tile\.cuh:\d+: cp\.async: \S+ is not aligned to 16 bytes",
    ),
    "no_swizzle": (
        "attention_mma_tile.cuh",
        "(chunk ^ row / (8 / kSpread) % kSpread)",
        "(chunk ^ row / (8 / kSpread) % kSpread * 0)",
        "address",
        r"emulator: \d+ bank conflicts",
    ),
    "even_stride_without_tensor_cores": (
        "attention_plain.cuh",
        "k_stride((dims / 4 | 1) * 4)",
        "k_stride(dims)",
        "address",
        r"emulator: \d+ bank conflicts",
    ),
}


@pytest.mark.xdist_group("sanitizers")
@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=[pytest.mark.exhaustive] * fault.endswith("without_tensor_cores"))
        for fault in FAULTS
    ],
)
def test_a_fault_planted_in_the_kernel_is_found(fault: str, tmp_path: Path) -> None:
    source, before, after, tool, report = FAULTS[fault]

    def edit(kernels: Path) -> None:
        kernel = kernels / "tree_attention.cu"
        few = re.sub(r".*dim <= (?:80|96|128)\).*\n", "", kernel.read_text("utf-8"))
        kernel.write_text(few, "utf-8")  # of which wider heads take the widest: compiled sooner
        replace_once(kernels / source, before, after)

    program = build_mutant(tool, "tree_attention", edit, tmp_path)
    status, output = run(program, "tree_attention", "reverse", until_race=True)
    assert status != 0
    assert re.search(report, output), output[:4000]
