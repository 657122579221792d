"""What the CUDA kernels move and multiply, counted on the emulator, against the least there is.

`python tests/traffic.py` prints the table: bytes and matrix FLOPs of each call beside their floor,
and the time that they take at best on GPUs whose rates are published. A kernel that does more than
its stated multiple of the floor fails `test_traffic.py`.

Counted is what passes through `load_global`, `store_global` and `cp_async16`, cached or not, and
`mma`; scalars that steer (lengths, pages, paths) pass beside them, as they are left out of the
floor. FLOPs beside the tensor cores are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import cuda_emulated
import torch

from specdec_kernels.bench.cases import CASES, BenchCase, copy_to
from specdec_kernels.bench.roofline import GPUS, Work, roofline_us
from specdec_kernels.registry import OPS


@dataclass(frozen=True, slots=True)
class Row:
    """A call, and the most that its kernels may do.

    Attributes:
        num_bytes: most bytes moved, as a multiple of the least.
        num_flops: most FLOPs of the tensor cores, likewise; 0 where there is no product.
        why: of more than the least.
        options: arguments that the bench's inputs do not have.
    """

    op: str
    sizes: dict[str, Any]
    num_bytes: float
    num_flops: float = 0.0
    why: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> BenchCase:
        """The bench's case of these sizes."""
        return replace(next(c for c in CASES if c.op == self.op), sizes=self.sizes)


class Count(NamedTuple):
    """Counted work of one call, and the least."""

    done: Work
    least: Work

    @property
    def num_bytes(self) -> float:
        """Bytes moved as a multiple of the least."""
        return self.done.num_bytes / self.least.num_bytes

    @property
    def num_flops(self) -> float:
        """FLOPs of the tensor cores, likewise; 0 where there is none."""
        return self.done.num_flops / max(1, self.least.num_flops)


ROWS = (
    Row("tree_mask", {"B": 1, "N": 64}, 1.0),
    Row("tree_mask", {"B": 3, "N": 300}, 1.23, why="6 blocks of a request each read its parents"),
    Row("write_kv", {"B": 1, "N": 16, "G": 8, "D": 128, "S": 64}, 1.0),
    Row("write_kv", {"B": 3, "N": 9, "G": 3, "D": 40, "S": 64, "page_size": 16}, 1.0),
    Row("commit", {"B": 1, "N": 16, "L": 4, "G": 8, "D": 128, "S": 64}, 1.0),
    Row("commit", {"B": 3, "N": 12, "L": 2, "G": 2, "D": 64, "S": 64, "F": 96}, 1.0),
    Row("topk_logprobs", {"R": 1, "V": 32000, "k": 8}, 1.02, why="the best k of each segment"),
    Row("topk_logprobs", {"R": 3, "V": 20000, "k": 64}, 1.08, why="the best k of each segment"),
    Row(
        "topk_logprobs",
        {"R": 1, "V": 9000, "k": 100},
        12.0,
        why="k > 64: ten sweeps, of which the cache serves nine, and a sort in global memory",
    ),
    Row("build_tree", {"B": 1, "T": 5, "K": 10, "N": 60, "beams": True}, 1.0),
    Row("build_tree", {"B": 2, "T": 8, "K": 8, "N": 64}, 1.0),
    Row(
        "tree_attention",
        {"B": 1, "N": 1, "H": 32, "G": 8, "D": 128, "S": 1024},
        1.02,
        4.0,
        why="partial results of splits; four query heads in a product of 16 rows",
    ),
    Row(
        "tree_attention",
        {"B": 1, "N": 16, "H": 9, "G": 3, "D": 64, "S": 1024},
        1.56,
        1.02,
        why="partial results of splits, as many as fill the GPU",
    ),
    Row(
        "tree_attention",
        {"B": 1, "N": 64, "H": 4, "G": 1, "D": 128, "S": 512},
        1.0,
        1.14,
        why="nodes that a row does not see",
    ),
    Row(
        "tree_attention",
        {"B": 1, "N": 64, "H": 4, "G": 1, "D": 128, "S": 1024},
        1.92,
        1.07,
        why="queries and partial results of two splits, each as large as its keys and values",
    ),
    Row(
        "tree_attention",
        {"B": 3, "N": 12, "H": 4, "G": 2, "D": 80, "S": 200, "window": 24, "page_size": 32},
        1.0,
        2.82,
        why="a window is smaller than a tile",
    ),
    Row("sample", {"R": 3, "V": 9000, "greedy": True}, 1.05, why="results of blocks"),
    Row("sample", {"R": 1, "V": 32000}, 7.0, why="sweeps of the search, which a cache serves"),
    Row("verify", {"B": 1, "N": 16, "V": 32000, "greedy": True}, 3.0, why="all rows, not the path"),
    Row("verify", {"B": 1, "N": 16, "V": 32000}, 9.0, why="all rows, sweeps of the search"),
)
"""Rows of an operator count once it has a CUDA kernel."""


def present() -> list[Row]:
    """Rows whose operator has a CUDA kernel."""
    return [row for row in ROWS if OPS[row.op].why_absent(cuda_emulated.BACKEND) is None]


def call(row: Row, inputs: dict[str, Any]) -> Any:
    """The row's call on the emulated GPU."""
    return OPS[row.op](**inputs, backend=cuda_emulated.BACKEND)


def count(row: Row, run: Callable[[Row, dict[str, Any]], Any] = call) -> Count:
    """Count a call, and compute the least for it."""
    inputs = {**row.case.inputs(), **row.options}
    least = row.case.work(inputs, OPS[row.op].reference(**copy_to(inputs, "cpu")))
    cuda_emulated.emulated.take_counters()
    run(row, inputs)
    counters = cuda_emulated.emulated.take_counters()
    moved = sum(counters[name] for name in ("loaded_bytes", "stored_bytes", "copied_bytes"))
    return Count(Work(moved, counters["matrix_flops"]), least)


def check(row: Row, counted: Count) -> None:
    """Raise where a call did more than its multiple of the least, or less than the least.

    Raises:
        RuntimeError: with the figures; less than the least means an access that is not counted.
    """
    for name, limit in (("num_bytes", row.num_bytes), ("num_flops", row.num_flops)):
        multiple = getattr(counted, name)
        is_enough = multiple >= 1 or limit == 0
        if not is_enough or multiple > limit + 1e-9:
            raise RuntimeError(
                f"{row.op} {row.case.name}: {name} must be in [{min(1, limit):g}, {limit:g}] of "
                f"{getattr(counted.least, name)}, got {multiple:.3f}"
            )


def describe(row: Row, counted: Count) -> str:
    """One line of the table."""
    times = (roofline_us(counted.done, g.bandwidth_gbs, g.bf16_gflops) for g in GPUS)
    return " ".join(
        (
            f"{row.op + ' ' + row.case.name:<44}",
            f"{counted.least.num_bytes / 1e3:>9.1f} kB {counted.num_bytes:>7.3f}x",
            f"({math.ceil(1000 * row.num_bytes) / 1000:g})",
            f"{counted.least.num_flops / 1e6:>8.1f} MFLOP {counted.num_flops:>6.2f}x",
            f"({row.num_flops:g})",
            *(f"{time:>8.2g}" for time in times),
        )
    )


def main() -> None:
    """Print the table."""
    cuda_emulated.install()
    torch.manual_seed(0)
    print("least bytes, multiple moved (limit); least FLOPs, multiple of the tensor cores (limit);")
    print("µs at best: " + ", ".join(gpu.name.removeprefix("NVIDIA ") for gpu in GPUS))
    for row in present():
        print(describe(row, count(row)))


if __name__ == "__main__":
    main()
