"""Makes Triton's interpreter strict: repairs what it computes wrongly, raises where it lets pass.

The interpreter runs one program after another on NumPy arrays. As of Triton 3.8 it treats bfloat16
as integers, reads and writes any address, and has no notion of programs that run at the same time.
After `install()`:

- bfloat16 is computed in float32 and rounded to nearest even;
- an access outside the tensors that were passed, or in the gaps of a strided one, raises
  `Violation`, as does an address that is not a multiple of its element;
- so does an element that one program writes and another one reads or writes, unless by atomics
  alone: the order of programs is undefined;
- `tl.device_assert` and overflow of 32-bit integers raise;
- programs run in the order of `in_order`.

Importing it needs `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

ORDERS = ("forward", "reverse", "random")

# Who touched an element so far: nobody, several programs, or program number - 1.
_NOBODY, _SEVERAL = 0, -1


class Violation(Exception):
    """A kernel did what would be undefined on a GPU."""


@dataclass(slots=True)
class Traffic:
    """Bytes that a kernel argument's memory was asked for, lane by lane."""

    loaded: int = 0
    stored: int = 0


@dataclass(slots=True)
class _View:
    """One tensor that a kernel was given."""

    name: str
    begin: int
    end: int
    itemsize: int
    members: np.ndarray | None  # of the elements between begin and end, where some are not its own
    memory: _Memory


@dataclass(slots=True)
class _Memory:
    """Who reads, writes and updates each granule of one storage during one launch."""

    begin: int
    granule: int
    readers: np.ndarray
    writers: np.ndarray
    updaters: np.ndarray


@dataclass(slots=True)
class _State:
    order: str = ORDERS[0]
    launches: int = 0
    program: int = 0
    programs: Sequence[int] = ()
    views: list[_View] = field(default_factory=list)
    allowed: list[tuple[str, Tensor]] = field(default_factory=list)
    traffic: dict[str, Traffic] | None = None
    patched: set[frozenset[int]] = field(default_factory=set)


_state = _State()


@contextmanager
def in_order(order: str) -> Iterator[None]:
    """Run programs "forward", in "reverse" or at "random" (another order in every launch)."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    before, _state.order = _state.order, order
    try:
        yield
    finally:
        _state.order = before


@contextmanager
def counted() -> Iterator[dict[str, Traffic]]:
    """Count the traffic of all launches inside, by kernel argument."""
    before, _state.traffic = _state.traffic, defaultdict(Traffic)
    try:
        yield _state.traffic
    finally:
        _state.traffic = before


@contextmanager
def allowed(**tensors: Tensor) -> Iterator[None]:
    """Let kernels reach tensors that they know by address alone."""
    before, _state.allowed = _state.allowed, [*_state.allowed, *tensors.items()]
    try:
        yield
    finally:
        _state.allowed = before


def install() -> None:
    """Patch the interpreter of this process; a second call would patch the patches."""
    options = interpreter.interpreter_builder.options
    object.__setattr__(options, "debug", True)  # frozen; asserts and overflow checks hang on it
    _repair_bfloat16()
    _watch_memory()
    _watch_launches()


# bfloat16


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widened(value: TensorHandle) -> np.ndarray:
    if not _is_bfloat16(value):
        return value.data
    return (value.data.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> TensorHandle:
    """Nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
    return TensorHandle(rounded.reshape(np.shape(values)), tl.bfloat16)


_COMPARISONS = (
    np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal
)  # fmt: skip


def _repair_bfloat16() -> None:
    builder = interpreter.InterpreterBuilder
    binary, unary, cast = builder.binary_op, builder.unary_op, builder.cast_impl
    dot, fma, convert = builder.create_dot, builder.create_fma, builder.create_fp_to_fp
    total = interpreter.ReduceOps.sum

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if not _is_bfloat16(lhs):
            return binary(self, lhs, rhs, op)
        result = op(_widened(lhs), _widened(rhs))
        return TensorHandle(result, tl.int1) if op in _COMPARISONS else _rounded(result)

    def unary_op(self: Any, value: TensorHandle, op: Any) -> TensorHandle:
        return _rounded(op(_widened(value))) if _is_bfloat16(value) else unary(self, value, op)

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_bfloat16(x):
            return fma(self, x, y, z)
        return _rounded(_widened(x) * _widened(y) + _widened(z))

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        if _is_bfloat16(a):
            a, b = (TensorHandle(_widened(value), tl.float32) for value in (a, b))
        return dot(self, a, b, *rest)

    def cast_impl(self: Any, value: TensorHandle, target: Any) -> TensorHandle:
        if target.scalar == tl.bfloat16:
            return _rounded(_widened(value).astype(np.float32))
        if _is_bfloat16(value):
            return cast(self, TensorHandle(_widened(value), tl.float32), target)
        return cast(self, value, target)

    def create_fp_to_fp(self: Any, value: TensorHandle, target: Any, mode: Any) -> TensorHandle:
        is_bfloat16 = target.scalar == tl.bfloat16 or _is_bfloat16(value)
        return cast_impl(self, value, target) if is_bfloat16 else convert(self, value, target, mode)

    def sum_of(self: Any, value: Any) -> Any:
        if value.dtype.scalar != tl.bfloat16:
            return total(self, value)
        result = np.sum(_widened(value.handle), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(_rounded(result).data, tl.bfloat16)

    builder.binary_op, builder.unary_op, builder.cast_impl = binary_op, unary_op, cast_impl
    builder.create_fma, builder.create_dot = create_fma, create_dot
    builder.create_fp_to_fp = create_fp_to_fp
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, value, target: self.cast_impl(value, target))
    builder.get_bf16 = lambda self, value: _rounded(np.array([value], dtype=np.float32))
    interpreter.ReduceOps.sum = sum_of


# memory


def _watch_memory() -> None:
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    update, swap = builder.create_atomic_rmw, builder.create_atomic_cas

    def create_masked_load(self: Any, pointers: TensorHandle, mask: Any, *rest: Any) -> Any:
        mask = _narrowed(mask)
        _check("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def create_masked_store(
        self: Any, pointers: TensorHandle, value: Any, mask: Any, *rest: Any
    ) -> Any:
        mask = _narrowed(mask)
        _check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(
        self: Any, op: Any, pointers: TensorHandle, value: Any, mask: Any, *rest: Any
    ) -> Any:
        mask = _narrowed(mask)
        _check("update", pointers, mask)
        return update(self, op, pointers, value, mask, *rest)

    def create_atomic_cas(self: Any, pointers: TensorHandle, *rest: Any) -> Any:
        _check("update", pointers, None)
        return swap(self, pointers, *rest)

    builder.create_masked_load, builder.create_masked_store = (
        create_masked_load, create_masked_store
    )  # fmt: skip
    builder.create_atomic_rmw, builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas


def _narrowed(mask: TensorHandle | None) -> TensorHandle | None:
    """The interpreter keeps some masks in wider integers, which that of Triton 3.9 then refuses."""
    return None if mask is None else TensorHandle(np.asarray(mask.data).astype(bool), tl.int1)


def _check(kind: str, pointers: TensorHandle, mask: TensorHandle | None) -> None:
    """Raise if this access is not one that a GPU program may make."""
    addresses = np.asarray(pointers.data).ravel().astype(np.int64)
    if mask is not None:
        lanes = np.asarray(mask.data)
        addresses = addresses[np.broadcast_to(lanes, np.shape(pointers.data)).ravel()]
    if not addresses.size:
        return
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    if (addresses % size).any():
        raise Violation(f"misaligned {kind} of {size} bytes by program {_state.program}")
    is_left = np.ones(addresses.shape, dtype=bool)
    for view in _state.views:
        here = is_left & (addresses >= view.begin) & (addresses + size <= view.end)
        if here.any() and view.members is not None:
            here[here] = view.members[(addresses[here] - view.begin) // view.itemsize]
        if not here.any():
            continue
        is_left &= ~here
        _record(kind, view, addresses[here], size)
        if _state.traffic is not None:
            moved = int(here.sum()) * size
            _state.traffic[view.name].loaded += moved * (kind != "store")
            _state.traffic[view.name].stored += moved * (kind != "load")
        if not is_left.any():
            return
    _refuse(kind, addresses[is_left])


def _refuse(kind: str, addresses: np.ndarray) -> None:
    address = int(addresses[0])
    near = min(_state.views, key=lambda v: min(abs(address - v.begin), abs(address - v.end)))
    raise Violation(
        f"out of bounds: {kind} of {len(addresses)} elements by program {_state.program}, one of "
        f"them element {(address - near.begin) // near.itemsize} of {near.name}, which has "
        f"{(near.end - near.begin) // near.itemsize}"
    )


def _record(kind: str, view: _View, addresses: np.ndarray, size: int) -> None:
    """Note who touches what, and raise where another program's order would matter."""
    memory = view.memory
    first = (addresses - memory.begin) // memory.granule
    cells = (first[:, None] + np.arange(max(1, size // memory.granule))).ravel()
    me = _state.program + 1
    own = {
        "load": memory.readers, "store": memory.writers, "update": memory.updaters
    }[kind]  # fmt: skip
    conflicting = {
        "load": (memory.writers, memory.updaters),
        "store": (memory.readers, memory.writers, memory.updaters),
        "update": (memory.readers, memory.writers),
    }[kind]
    for table in conflicting:
        theirs = table[cells]
        others = (theirs != _NOBODY) & (theirs != me)
        if others.any():
            element = int(addresses[np.argmax(others) // max(1, size // memory.granule)])
            raise Violation(
                f"race: {kind} by program {_state.program} of {view.name}"
                f"[{(element - view.begin) // view.itemsize}], also touched by another program"
            )
    before = own[cells]
    own[cells] = np.where((before == _NOBODY) | (before == me), me, _SEVERAL)


# launches


def _watch_launches() -> None:
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    start, place = executor._init_args_hst, builder.set_grid_idx

    def init_args(self: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        on_host, named = start(self, args, kwargs)
        _state.views = list(_views([*zip(self.arg_names, on_host, strict=False), *named.items()]))
        _state.programs = ()
        _state.launches += 1
        _state.patched.clear()
        return on_host, named

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, ny, nz = self.grid_dim
        if not _state.programs:
            _state.programs = _permutation(self.grid_dim[0] * ny * nz)
        number = _state.programs[(x * ny + y) * nz + z]
        _state.program = number
        place(self, number // (ny * nz), number // nz % ny, number % nz)

    executor._init_args_hst, builder.set_grid_idx = init_args, set_grid_idx
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)


def _once_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The interpreter patches all of triton.language at every call of a device function, which can
    take longer than the function; patched for a launch, it stays so until the launch ends.
    """
    seen: dict[Any, frozenset[int]] = {}

    def patch_language(function: Any) -> Any:
        if function not in seen:
            values = function.__globals__.values()
            seen[function] = frozenset(id(v) for v in values if v is tl or v is tl.core)
        if seen[function] in _state.patched:
            return None
        _state.patched.add(seen[function])
        return patch(function)

    return patch_language


def _permutation(num: int) -> Sequence[int]:
    programs = list(range(num))
    if _state.order == "reverse":
        programs.reverse()
    elif _state.order == "random":
        random.Random(_state.launches).shuffle(programs)
    return programs


def _views(arguments: Sequence[tuple[str, Any]]) -> Iterator[_View]:
    tensors = list(_tensors([*arguments, *_state.allowed]))
    granules: dict[int, int] = {}
    for _, tensor in tensors:
        storage = tensor.untyped_storage().data_ptr()
        granules[storage] = min(tensor.element_size(), granules.get(storage, 16))
    memories: dict[int, _Memory] = {}
    for name, tensor in tensors:
        storage = tensor.untyped_storage()
        begin = storage.data_ptr()
        if begin not in memories:
            cells = -(-storage.nbytes() // granules[begin])
            tables = (np.zeros(cells, dtype=np.int32) for _ in range(3))  # untouched pages are free
            memories[begin] = _Memory(begin, granules[begin], *tables)
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        yield _View(
            name,
            tensor.data_ptr(),
            tensor.data_ptr() + span * tensor.element_size(),
            tensor.element_size(),
            _members(tensor, span),
            memories[begin],
        )


def _members(tensor: Tensor, span: int) -> np.ndarray | None:
    if span <= tensor.numel():
        return None
    members = np.zeros(span, dtype=bool)
    torch.from_numpy(members).as_strided(tensor.shape, tensor.stride()).fill_(True)
    return members


def _tensors(arguments: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments:
        if isinstance(value, tuple):
            yield from _tensors([(f"{name}[{i}]", item) for i, item in enumerate(value)])
        elif isinstance(value, Tensor) and value.numel():
            yield name, value
