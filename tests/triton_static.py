"""Compiles what the launchers launch for GPUs that are not here, and says what came out.

Run as a program, without `TRITON_INTERPRET`; `tests/test_triton_code.py` does. Each launcher is
called on CPU tensors under a driver that only knows a target: every launch is compiled with the
very arguments that it was given and inspected, none is run. Reading a tensor on the host raises: a
launcher that does so cannot be captured in a CUDA graph.

    python tests/triton_static.py --target sm_90 --op tree_attention
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_code import Code, read_amdgcn, read_cubin
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from specdec_kernels.registry import BACKENDS, OPS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_PROCESSORS = 132  # of an H100: the number of splits depends on it

_CACHE = {"B": 1, "G": 8, "S": 4096}
_ROWS = {"R": 4, "V": 49152}
_TREE = {"B": 2, "N": 16, "V": 49152}

CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "tree_mask": ({"B": 2, "N": 64},),
    "write_kv": ({**_CACHE, "N": 16, "D": 128}, {**_CACHE, "N": 16, "D": 128, "page_size": 16}),
    "commit": (
        {**_CACHE, "N": 16, "L": 4, "D": 128, "F": 4096},
        {**_CACHE, "N": 16, "L": 4, "D": 128, "page_size": 16},
    ),
    "tree_attention": (
        *({**_CACHE, "N": 16, "H": 32, "D": D} for D in (64, 80, 96, 128, 256)),
        {**_CACHE, "N": 1, "H": 32, "D": 128},
        {**_CACHE, "N": 64, "H": 32, "D": 128},
        {**_CACHE, "N": 16, "H": 32, "D": 128, "page_size": 64},
        {**_CACHE, "N": 16, "H": 32, "D": 128, "dtype": torch.float32},
    ),
    "sample": ({**_ROWS, "greedy": True}, _ROWS, {**_ROWS, "draws": 4}),
    "verify": (
        {**_TREE, "greedy": True},
        *({**_TREE, "rule": rule} for rule in ("walk", "token", "traversal", "typical")),
    ),
    "topk_logprobs": ({**_ROWS, "k": 8}, {**_ROWS, "k": 64}),
    "build_tree": ({"B": 2, "T": 8, "K": 8, "N": 64},),
}
"""Operator -> the calls that are compiled; bfloat16 unless said otherwise."""


class _Driver:
    """Stands where Triton asks what GPU this is. Each target counts as a device of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


class NoHostReads(TorchFunctionMode):
    """Raises where a tensor's content would have to reach the host."""

    _READS = (
        "item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "masked_select", "unique",
        "__bool__", "__int__", "__float__", "__index__", "equal", "allclose",
    )  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._READS:
            raise RuntimeError(f"a launcher reads a tensor on the host: {func.__name__}")
        return func(*args, **(kwargs or {}))


def calls(op: str, is_aligned: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and arguments of each call of an operator that is compiled."""
    for sizes in CASES[op]:
        options = {"dtype": torch.bfloat16, **sizes}
        inputs = {k: _as_a_model_has_it(v) for k, v in OPS[op].inputs(**options).items()}
        if not is_aligned:
            inputs = {k: _unaligned(v) for k, v in inputs.items()}
        shown = [f"{k}{v}" for k, v in sizes.items() if k != "dtype"]
        yield "_".join([*shown, str(options["dtype"])[6:]]), inputs


def _as_a_model_has_it(value: Any) -> Any:
    """Test inputs have strange strides on purpose; a model's tensors are contiguous."""
    if isinstance(value, list):
        return [_as_a_model_has_it(item) for item in value]
    return value.contiguous() if isinstance(value, Tensor) else value


def _unaligned(value: Any) -> Any:
    """The same tensor one element further on in memory."""
    if isinstance(value, list):
        return [_unaligned(item) for item in value]
    if not isinstance(value, Tensor) or not value.numel():
        return value
    return torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)


@contextmanager
def compiling(target: str, found: list[tuple[str, Any]]) -> Iterator[None]:
    """Launches inside compile for `target` and are added to `found` as (kernel name, kernel)."""
    triton.runtime.driver.set_active(_Driver(target))
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        found.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        with NoHostReads():
            yield
    finally:
        JITFunction.run = run


SWEEPS: dict[str, tuple[dict[str, Any], ...]] = {
    "tree_mask": tuple({"B": B, "N": N} for B in (1, 3) for N in (5, 16, 17, 31)),
    "write_kv": tuple(
        {"B": B, "N": N, "G": 2, "D": 64, "S": 64 + N} for B in (1, 3) for N in (5, 16, 17, 31)
    ),
    "commit": tuple(
        {"B": B, "N": N, "L": 2, "G": 2, "D": 64, "S": 64 + N}
        for B in (1, 3)
        for N in (5, 16, 17, 31)
    ),
    "tree_attention": tuple(
        {"B": B, "N": N, "H": 4, "G": 2, "D": 64, "S": S}
        for B in (1, 3)
        for N in (9, 10, 15, 16)
        for S in (200, 333, 4096)
    ),
    "sample": tuple({"R": R, "V": V} for R in (1, 3, 16) for V in (32000, 32016)),
    "verify": tuple({"B": B, "N": N, "V": 1024} for B in (1, 3) for N in (9, 10, 15, 16)),
    "topk_logprobs": tuple({"R": R, "V": 32000, "k": 8} for R in (1, 3, 16, 17)),
    "build_tree": tuple({"B": B, "T": 4, "K": 8, "N": N} for B in (1, 3) for N in (9, 12, 16)),
}
"""Operator -> calls that differ only in sizes that change from step to step."""


def variants(op: str) -> dict[str, int]:
    """Kernel -> how many times a GPU would compile it over the sweep of its operator."""
    keys: dict[str, set[str]] = {}
    compile_one = JITFunction._do_compile

    def only_count(self: Any, key: str, *args: Any, **kwargs: Any) -> None:
        keys.setdefault(self.fn.__name__, set()).add(str(key))

    JITFunction._do_compile = only_count
    try:
        for sizes in SWEEPS[op]:
            inputs = OPS[op].inputs(**sizes, dtype=torch.bfloat16)
            with compiling("sm_90", []):
                OPS[op](**{k: _as_a_model_has_it(v) for k, v in inputs.items()}, backend="triton")
    finally:
        JITFunction._do_compile = compile_one
    return {name: len(found) for name, found in keys.items()}


def inspect(kernel: Any) -> Code:
    """What the compiled kernel is made of."""
    target = kernel.metadata.target
    if target.backend == "hip":
        return read_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared)
    threads = 32 * kernel.metadata.num_warps
    return _inspect_cubin(kernel.asm["cubin"], target.arch, threads, kernel.metadata.shared)


@cache  # a disassembler takes longer to start than to read a kernel, and calls share kernels
def _inspect_cubin(cubin: bytes, architecture: int, threads: int, shared: int) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return read_cubin(path, architecture, threads, shared)


def report(target: str, op: str) -> Iterator[dict[str, Any]]:
    """One record per kernel, call and alignment."""
    for is_aligned in (True, False):
        for name, inputs in calls(op, is_aligned):
            found: list[tuple[str, Any]] = []
            with compiling(target, found):
                OPS[op](**inputs, backend="triton")
            for kernel_name, kernel in found:
                yield {
                    "op": op,
                    "call": name,
                    "kernel": kernel_name,
                    "target": target,
                    "is_aligned": is_aligned,
                    "warps": kernel.metadata.num_warps,
                    "contracted": len(re.findall(r"fma\.rn\S*\.f32", kernel.asm.get("ptx", ""))),
                    **asdict(inspect(kernel)),
                }


def main() -> None:
    """Print a line of JSON per record, or a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--op", choices=CASES, action="append", help="default: all")
    parser.add_argument("--json", action="store_true", help="a line of JSON per kernel")
    parser.add_argument("--variants", action="store_true", help="count compilations over sizes")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("triton_static: unset TRITON_INTERPRET; an interpreted kernel cannot be compiled")
    pretend_to_have_a_gpu()
    if options.variants:
        for op in options.op or CASES:
            print(json.dumps({"op": op, "variants": variants(op)}), flush=True)
        return
    for target in options.target or TARGETS:
        for op in options.op or CASES:
            for record in report(target, op):
                print(json.dumps(record) if options.json else _line(record), flush=True)


def pretend_to_have_a_gpu() -> None:
    """Let launchers take CPU tensors in this process, and size them for an H100."""
    from specdec_kernels.triton_kernels import launch

    BACKENDS["triton"] = "cpu"
    launch._INTERPRETED_PROCESSORS = _PROCESSORS


def _line(record: dict[str, Any]) -> str:
    counts = " ".join(f"{name} {count}" for name, count in record["counts"].items() if count)
    alignment = "aligned" if record["is_aligned"] else "unaligned"
    return (
        f"{record['target']:7}{record['op']} {record['call']} {record['kernel']} {alignment}: "
        f"registers {record['registers']}, spills {record['spills']}, shared {record['shared']}, "
        f"warps {record['warps']}, occupancy {record['occupancy']:.2f}, {counts}"
    )


if __name__ == "__main__":
    main()
