"""An accelerator without one: tensors that say they are on CUDA, while the CPU computes.

As on a GPU, what is computed together must lie together, and what goes to the host or comes from it
is a transfer; these are counted. Whole models run so, the operators of this package included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
_MOVES = {aten._to_copy.default, aten.copy_.default}
_INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
}


class Transfers:
    """How often the host waited for values of the device, and gave it some."""

    def __init__(self) -> None:
        self.reads = self.writes = 0


transfers = Transfers()


class OnDevice(Tensor):
    """A tensor of the device; the host must not see `values_on_device` without a transfer."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=DEVICE,
        )  # fmt: skip
        made.values_on_device = values
        return made

    def __repr__(self) -> str:
        return f"OnDevice({self.values_on_device!r})"

    def tolist(self) -> Any:
        """What PyTorch does not give for subclasses."""
        transfers.reads += 1
        return self.values_on_device.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    values_on_device: Tensor


class _Creation(TorchDispatchMode):
    """Makes new tensors there that are asked for there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretending() -> Iterator[Transfers]:
    """While entered the device exists; what was transferred since."""
    transfers.reads = transfers.writes = 0
    driver: AbstractContextManager[object] = nullcontext()
    if not torch.cuda.is_available():  # a real one must be woken up all the same
        torch._C._ensureCUDADeviceGuardSet()
        driver = mock.patch.object(torch.cuda, "_lazy_init")
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with driver, _Creation(), torch.no_grad():
            yield transfers
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def moved(module: nn.Module) -> Any:
    """A copy of the module on the device."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(OnDevice(weight.detach()), False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []

    def values(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor.values_on_device if isinstance(tensor, OnDevice) else tensor

    args = _each(args, values)
    kwargs = {name: _each(value, values) for name, value in kwargs.items()}
    ours = {id(t.values_on_device): t for t in tensors if isinstance(t, OnDevice)}
    asked = kwargs.get("device")
    goes_there = bool(ours) if asked is None else torch.device(asked).type == "cuda"
    if func is aten.copy_.default:
        goes_there = isinstance(tensors[0], OnDevice)
    if func in _MOVES:
        transfers.reads += bool(ours) and not goes_there
        transfers.writes += goes_there and len(ours) < len(tensors)
    elif ours:
        _check(func, tensors)
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    answer = func(*args, **kwargs)
    if not goes_there:
        return answer

    def given_back(tensor: Tensor) -> Tensor:
        return ours[id(tensor)] if id(tensor) in ours else OnDevice(tensor)

    return _each(answer, given_back)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with all tensors in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_each(part, change) for part in value])
    return value


def _check(func: Any, tensors: list[Tensor]) -> None:
    """Count what waits, and raise where a GPU would."""
    others = [t for t in tensors if not isinstance(t, OnDevice)]
    transfers.reads += func in _WAITS
    if func in _INDEXES and isinstance(tensors[0], OnDevice):
        transfers.reads += any(t.dtype == torch.bool for t in tensors[1:])  # how many there are
        transfers.writes += bool(others)
        return
    if any(other.dim() > 0 or func.namespace != "aten" for other in others):
        found = ", ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in tensors)
        raise RuntimeError(f"{func}: expected all tensors on one device, got {found}")
