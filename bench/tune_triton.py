"""Try other launch parameters of the Triton kernels on the GPU at hand, and print the best.

    python bench/tune_triton.py --op tree_attention

For every bench case of the operator, each row of the kernel file's LAUNCH table that the case uses
is varied, one parameter at a time, as long as that helps. A result that differs from the
reference's, or a kernel that does not fit the GPU, drops out. What comes out is text to put into
the table, with the GPU and the date as its `measured`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from importlib import import_module
from typing import Any

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from specdec_kernels.bench.cases import CASES, BenchCase
from specdec_kernels.bench.ops import check_case, prepare_op
from specdec_kernels.registry import OPS
from specdec_kernels.triton_kernels.launch import Launch

WARPS, STAGES = (1, 2, 4, 8, 16), (1, 2, 3, 4, 5)
LEAST_BLOCK = 16
LEAST_GAIN = 0.02
"""A change must save this share of the time: less is noise."""

Table = dict[Any, Launch]
Timer = Callable[[BenchCase], float]
"""Milliseconds of a case, infinite where it is wrong or cannot run."""


class UsedRows(Table):
    """A launch table that notes which of its rows are read."""

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self.keys_read: list[Any] = []

    def __getitem__(self, key: Any) -> Launch:
        if key not in self.keys_read:
            self.keys_read.append(key)
        return super().__getitem__(key)


def neighbours(launch: Launch) -> Iterator[Launch]:
    """Launches that differ in one parameter by one step."""
    for name, values in (("num_warps", WARPS), ("num_stages", STAGES)):
        place = values.index(getattr(launch, name))
        for value in values[max(0, place - 1) : place + 2]:
            if value != getattr(launch, name):
                yield replace(launch, **{name: value})
    for block, size in (launch.blocks or {}).items():
        for other in (size // 2, size * 2):
            if other >= LEAST_BLOCK:
                yield replace(launch, blocks={**(launch.blocks or {}), block: other})


def tune(module: Any, case: BenchCase, timer: Timer) -> Table:
    """The rows of `module.LAUNCH` that a case uses, as fast as steps to neighbours make them.

    The table is left as it was found.
    """
    original = module.LAUNCH
    module.LAUNCH = table = UsedRows(original)
    try:
        best_time = timer(case)
        for key in list(table.keys_read):
            is_better = True
            while is_better:
                is_better = False
                launch = table[key]
                for other in neighbours(launch):
                    table[key] = other
                    time = timer(case)
                    if time < best_time * (1 - LEAST_GAIN):
                        launch, best_time, is_better = other, time, True
                table[key] = launch
        return {key: table[key] for key in table.keys_read}
    finally:
        module.LAUNCH = original


def time_on_gpu(case: BenchCase) -> float:
    """Median milliseconds of a case by the Triton backend, once it is known to be right."""
    try:
        check_case(case, "triton", "cuda")
    except (RuntimeError, OutOfResources):
        return float("inf")
    time = do_bench(prepare_op(OPS[case.op], "triton", case.inputs("cuda")), return_mode="median")
    return float(time)


def main() -> None:
    """Tune every bench case of the operators named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, action="append", help="default: all")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_triton: no CUDA device")
    measured = f"{torch.cuda.get_device_name()}, {date.today()}"
    for case in CASES:
        if case.op in (options.op or OPS):
            module = import_module(f"specdec_kernels.triton_kernels.{case.op}")
            for key, launch in tune(module, case, time_on_gpu).items():
                print(f"{case.op} {case.name} {key}: {replace(launch, measured=measured)}")


if __name__ == "__main__":
    main()
