"""The strict interpreter finds planted faults, each by name, and lets correct kernels pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
from specdec_kernels.registry import INTERPRETS_TRITON  # noqa: E402

if not INTERPRETS_TRITON:
    pytest.skip("kernels run compiled here, not interpreted", allow_module_level=True)

import triton.language as tl  # noqa: E402
import triton_checks  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402


@triton.jit
def _scale(x_ptr, out_ptr, num, factor, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < num, other=0.0)
    tl.store(out_ptr + offs, x * factor, mask=offs < num)


@triton.jit
def _strided(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs * stride))


@triton.jit
def _reinterpreted(x_ptr, out_ptr, offset):
    wide = (x_ptr + offset).to(tl.pointer_type(tl.int64))
    tl.store(out_ptr, tl.load(wide))


@triton.jit
def _store_same(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def _read_neighbour(x_ptr, out_ptr):
    pid = tl.program_id(0)
    tl.store(x_ptr + pid, 1)
    tl.store(out_ptr + pid, tl.load(x_ptr + (pid + 1) % 4))


@triton.jit
def _count_then_read(x_ptr, out_ptr):
    tl.atomic_add(x_ptr, 1)
    tl.store(out_ptr + tl.program_id(0), tl.load(x_ptr))


@triton.jit
def _count(x_ptr, out_ptr):
    tl.atomic_add(x_ptr, 1)
    tl.store(out_ptr + tl.program_id(0), 7)


@triton.jit
def _read_same(x_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.load(x_ptr))


@triton.jit
def _overflow(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) * 3)


@triton.jit
def _asserts(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.device_assert(x > 0, "x must be positive")
    tl.store(out_ptr, x)


@triton.jit
def _address(address, out_ptr):
    tl.store(out_ptr, tl.load(address.to(tl.pointer_type(tl.int32))))


@triton.jit
def _visit(counter_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


def _ints(num: int, value: int = 0) -> torch.Tensor:
    return torch.full((num,), value, dtype=torch.int32)


FAULTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "load-past-the-end": (
        r"out of bounds: load .* of x_ptr, which has 100",
        lambda: _scale[(2,)](torch.ones(100), torch.empty(128), 128, 2.0, 64),
    ),
    "store-past-the-end": (
        r"out of bounds: store .* of out_ptr, which has 100",
        lambda: _scale[(2,)](torch.ones(128), torch.empty(100), 128, 2.0, 64),
    ),
    "load-in-a-gap": (
        r"out of bounds: load",
        lambda: _strided[(1,)](torch.ones(64)[::4], torch.empty(16), 2, 16),
    ),
    "misaligned": (
        r"misaligned load of 8 bytes",
        lambda: _reinterpreted[(1,)](_ints(8), torch.empty(1, dtype=torch.int64), 1),
    ),
    "store-store-race": (r"race: store", lambda: _store_same[(4,)](_ints(1))),
    "load-store-race": (r"race: ", lambda: _read_neighbour[(4,)](_ints(4), _ints(4))),
    "race-through-an-alias": (
        r"race: ",
        lambda: (lambda x: _read_same[(4,)](x, x))(_ints(4)),
    ),
    "update-load-race": (r"race: ", lambda: _count_then_read[(4,)](_ints(1), _ints(4))),
    "int32-overflow": (r"overflow", lambda: _overflow[(1,)](_ints(1, 2**30), _ints(1))),
    "device-assert": (r"x must be positive", lambda: _asserts[(1,)](_ints(1), _ints(1))),
    "bare-address": (
        r"out of bounds: load",
        lambda: (lambda x: _address[(1,)](x.data_ptr(), _ints(1)))(_ints(1)),
    ),
}


@pytest.mark.parametrize("order", triton_checks.ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, order: str) -> None:
    message, launch = FAULTS[fault]
    with triton_checks.in_order(order), pytest.raises(InterpreterError, match=message):
        launch()


def test_correct_kernels_pass_and_are_counted() -> None:
    x, out = torch.arange(100.0), torch.empty(100)
    with triton_checks.counted() as traffic:
        _scale[(2,)](x, out, 100, 2.0, 64)
    assert torch.equal(out, 2 * x)
    assert traffic["x_ptr"] == triton_checks.Traffic(loaded=400)
    assert traffic["out_ptr"] == triton_checks.Traffic(stored=400)
    counter, out = _ints(1), _ints(4)
    _count[(4,)](counter, out)
    _read_same[(4,)](_ints(1, 3), out)
    assert int(counter) == 4 and out.tolist() == [3] * 4
    with triton_checks.allowed(table=counter):
        _address[(1,)](counter.data_ptr(), out)
    assert int(out[0]) == 4


def test_programs_run_in_the_order_asked_for() -> None:
    visits = {}
    for order in triton_checks.ORDERS:
        out = _ints(8)
        with triton_checks.in_order(order):
            _visit[(8,)](_ints(1), out)
        visits[order] = out.tolist()
    assert visits["forward"] == list(range(8)) == visits["reverse"][::-1]
    assert sorted(visits["random"]) == list(range(8)) != visits["random"]


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=generator)
    x[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    for source in (x, x.bfloat16()):
        out = torch.empty(4096, dtype=torch.bfloat16)
        _scale[(4,)](source, out, 4096, 1.7, 1024)
        factor = torch.tensor(1.7) if source is x else torch.tensor(1.7).bfloat16()
        want = (source * factor).bfloat16()
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
