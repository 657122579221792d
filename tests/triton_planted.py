"""Kernels and launchers with one fault each, for `tests/test_triton_code.py`: proof that
`triton_static` sees what it is there to see. Prints a JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl
from triton_static import compiling, inspect


@triton.jit
def _copy(x_ptr, out_ptr, num, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < num, other=0.0), mask=offs < num)


@triton.jit
def _matmul(x_ptr, out_ptr, num, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = tl.load(x_ptr + offs[:, None] * BLOCK + offs[None, :])
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(num):
        total = tl.dot(tile, tile, total)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], total)


def _first(kernel: Any, target: str, *args: Any, **options: Any) -> dict[str, Any]:
    found: list[tuple[str, Any]] = []
    with compiling(target, found):
        kernel[(1,)](*args, enable_fp_fusion=True, **options)
    return asdict(inspect(found[0][1]))


def _reads_the_host(read: Callable[[torch.Tensor], Any]) -> str:
    try:
        with compiling("sm_90", []):
            read(torch.ones(1))
    except RuntimeError as error:
        return str(error)
    return "not seen"


def main() -> None:
    """One record per kernel and target, and what host reads are answered with."""
    x = torch.zeros(16384, dtype=torch.bfloat16)
    out = torch.zeros(16384)
    records = {}
    for target in ("sm_90", "gfx942"):
        tight = {"BLOCK": 128, "num_warps": 1}
        records[target] = {
            "aligned": _first(_copy, target, x, x.clone(), 4096, BLOCK=4096),
            "unaligned": _first(_copy, target, x[1:], x.clone(), 4096, BLOCK=4096),
            "matrix": _first(_matmul, target, x, out, 8, BLOCK=64),
            "spilling": _first(_matmul, target, x, out, 8, **tight),
        }
    reads = {
        "item": _reads_the_host(lambda x: x.item()),
        "tolist": _reads_the_host(lambda x: x.tolist()),
        "bool": _reads_the_host(lambda x: 1 if x.any() else 0),
        "int": _reads_the_host(int),
        "index": _reads_the_host(lambda x: [0, 1][x.long()]),
        "to-host": _reads_the_host(lambda x: x.cpu()),
    }
    print(json.dumps({"records": records, "reads": reads}))


if __name__ == "__main__":
    main()
