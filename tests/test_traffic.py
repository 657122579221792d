"""The CUDA kernels move and multiply no more than a stated multiple of the least; and what the
roofline says of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import traffic
from traffic import ROWS, Row

from specdec_kernels.bench.roofline import GPUS, Work, least_work, published, roofline_us
from specdec_kernels.registry import OPS

KERNELS = Path(__file__).parent.parent / "csrc" / "cuda"


def _id(row: Row) -> str:
    return f"{row.op}-{row.case.name}"


def test_every_cuda_kernel_has_a_row() -> None:
    written = {path.stem for path in KERNELS.glob("*.cu")} & OPS.keys()
    assert written == {row.op for row in traffic.present()}
    assert all(row.why for row in ROWS if max(row.num_bytes, row.num_flops) > 1)


@pytest.mark.parametrize("row", traffic.present(), ids=_id)
def test_kernels_move_and_multiply_little_more_than_they_must(row: Row, report: Any) -> None:
    counted = traffic.count(row)
    report(traffic.describe(row, counted))
    traffic.check(row, counted)


def test_a_kernel_that_reads_its_inputs_twice_is_found() -> None:
    def twice(row: Row, inputs: dict[str, Any]) -> None:
        for _ in range(2):
            traffic.call(row, inputs)

    row = next(row for row in ROWS if row.op == "build_tree")
    with pytest.raises(RuntimeError, match=r"build_tree B1\S*: num_bytes must be in \[1, 1\] of"):
        traffic.check(row, traffic.count(row, twice))


def test_a_kernel_whose_accesses_are_not_counted_is_found() -> None:
    def beside_the_counters(row: Row, inputs: dict[str, Any]) -> None:
        OPS[row.op](**inputs, backend="reference")

    with pytest.raises(RuntimeError, match=r"got 0\.000"):
        traffic.check(ROWS[0], traffic.count(ROWS[0], beside_the_counters))


def test_products_beyond_the_limit_are_found() -> None:
    row = Row("tree_attention", {"B": 1, "N": 1, "H": 2, "G": 1, "D": 64, "S": 9}, 1.0, 2.0)
    for flops, complaint in ((900, r"num_flops must be in \[1, 2\]"), (2001, r"got 2\.001")):
        with pytest.raises(RuntimeError, match=complaint):
            traffic.check(row, traffic.Count(Work(5, flops), Work(5, 1000)))
    traffic.check(row, traffic.Count(Work(5, 2000), Work(5, 1000)))


def test_the_roofline_is_the_longer_of_traffic_and_arithmetic() -> None:
    h100 = published("NVIDIA H100 80GB HBM3")
    assert h100 is not None and published("NVIDIA H100 PCIe") is None
    rates = h100.bandwidth_gbs, h100.bf16_gflops
    assert roofline_us(Work(3_350_000), *rates) == pytest.approx(1.0)
    assert roofline_us(Work(3_350_000, 989_500_000), *rates) == pytest.approx(1.0)
    assert roofline_us(Work(3_350_000, 9_895_000_000), *rates) == pytest.approx(10.0)
    assert len({gpu.name for gpu in GPUS}) == len(GPUS) and all(gpu.source for gpu in GPUS)


def _seen_pairs(inputs: dict[str, Any]) -> tuple[int, int]:
    """(pairs of a real node and a slot that it sees, slots that some node sees), one by one."""
    pairs, slots = 0, set()
    for b, size in enumerate(inputs["num_nodes"].tolist()):
        length = int(inputs["lengths"][b])
        for i in range(size):
            position = length + int(inputs["depths"][b, i])
            for slot in range(length + size):
                j = slot - length
                seen_at = slot
                if j >= 0:
                    if not int(inputs["ancestors"][b, i, j // 64]) >> (j % 64) & 1:
                        continue
                    seen_at = length + int(inputs["depths"][b, j])
                if inputs["window"] and position - seen_at >= inputs["window"]:
                    continue
                pairs += 1
                slots.add((b, slot))
    return pairs, len(slots)


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"window": 1}, {"page_size": 16}], ids=str)
def test_the_least_work_of_attention_counts_what_is_seen(options: dict[str, int]) -> None:
    sizes = {"B": 3, "N": 12, "H": 4, "G": 2, "D": 8, "S": 40}
    inputs = OPS["tree_attention"].inputs(**sizes, **options, dtype=torch.bfloat16)
    outputs = OPS["tree_attention"].reference(**inputs)
    work = least_work("tree_attention", inputs, outputs)
    pairs, slots = _seen_pairs(inputs)
    assert work.num_flops == 2 * 4 * pairs * (8 + 8)
    real = int(inputs["num_nodes"].sum())
    cache = slots * 2 * (8 + 8) * 2
    assert work.num_bytes == real * 4 * 8 * 2 + cache + sum(out.nbytes for out in outputs)


def test_the_least_work_of_commit_is_what_changes_place() -> None:
    cache = torch.zeros(2, 3, 9, 4)
    path = torch.tensor([[0, 2, 3, 9], [0, 1, 2, -1]], dtype=torch.int32)
    inputs = {
        "k_caches": [cache], "v_caches": [cache], "path": path,
        "num_kept": torch.tensor([3, 3], dtype=torch.int32), "hidden": None,
    }  # fmt: skip
    slot = 3 * 4 * 4
    assert least_work("commit", inputs, None) == Work(2 * 2 * 2 * slot)  # K and V of nodes 2, 3
    inputs["hidden"] = torch.zeros(2, 4, 5)
    hidden = (6 + 8) * 5 * 4
    assert least_work("commit", inputs, None).num_bytes == 2 * 2 * 2 * slot + hidden


def test_the_least_work_of_a_linear_layer_reads_each_weight_once() -> None:
    inputs = OPS["packed_linear"].inputs(R=3, U=32, F=10)
    out = OPS["packed_linear"].reference(**inputs)
    read = 3 * 10 + 32 * 10 + 32  # rows, weights, bias
    assert least_work("packed_linear", inputs, out) == Work(2 * (read + 3 * 32), 2 * 3 * 32 * 10)


def test_the_least_work_of_norms_and_rotations_is_every_tensor_once() -> None:
    inputs = OPS["rms_norm"].inputs(R=3, F=10)
    out = OPS["rms_norm"].reference(**inputs)
    assert least_work("rms_norm", inputs, out) == Work(4 * (30 + 10 + 30))
    inputs = OPS["rope"].inputs(B=2, H=3, G=1, N=5, D=4)
    out = OPS["rope"].reference(**inputs)
    assert least_work("rope", inputs, out) == Work(4 * 2 * 5 * 4 * (2 * (3 + 1) + 2))
