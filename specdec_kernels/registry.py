"""Operators and their backends: one declaration per operator, one table of who can run it.

A function decorated with `@op` is at once the PyTorch reference, the schema (its annotations), the
documentation and the public entry point. Other backends attach to it by name.
`torch.ops.specdec_kernels.<op>` is the same operator inside the PyTorch dispatcher: native code
where it was built, the reference elsewhere, with a fake for `torch.compile`.

Backend choice: the `backend=` argument, then the `SPECDEC_BACKEND` variable, then the device of the
tensors. An explicit choice that cannot run raises; the automatic choice never changes because
something failed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from .shapes import check, parse

P = ParamSpec("P")
R = TypeVar("R")

NAMESPACE = "specdec_kernels"
OPS: dict[str, Op[Any, Any]] = {}
INTERPRETS_TRITON = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
"""Triton kernels run in Triton's interpreter, on CPU tensors: for tests, not for speed."""

BACKENDS: dict[str, str] = {
    "reference": "any",
    "cpu": "cpu",
    "triton": "cpu" if INTERPRETS_TRITON else "cuda",
    "cuda": "cuda",
}
"""Backend name -> device type of the tensors it runs on ("any": all)."""

NATIVE_LIBRARY = Path(__file__).with_name("_C.so")
# Where os.environ keeps its variables: asked for an absent one, os.environ itself raises and
# catches, which is 2 of the 14 us of a call.
_ENVIRONMENT: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
_VARIABLE = (
    os.environ.encodekey("SPECDEC_BACKEND") if _ENVIRONMENT is not os.environ else "SPECDEC_BACKEND"
)
_library = torch.library.Library(NAMESPACE, "DEF")


class Op(Generic[P, R]):
    """One operator: its reference, its contract, and its backends."""

    def __init__(
        self,
        reference: Callable[P, R],
        *,
        shapes: str,
        fake: Callable[P, R],
        inputs: Callable[..., dict[str, Any]],
        cases: tuple[dict[str, Any], ...],
        mutates: tuple[str, ...] = (),
        tolerance: Mapping[torch.dtype, float] | None = None,
    ) -> None:
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self.shapes = parse(shapes)
        self.inputs = inputs
        self.cases = cases
        self.mutates = mutates
        self.tolerance = tolerance  # None: bit for bit
        self.signature = inspect.signature(reference)
        self.backends: dict[str, Callable[..., Any]] = {"reference": self._checked(reference)}
        self._define(fake)

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.dispatch(*args, **kwargs)
        if backend is not None or _VARIABLE in _ENVIRONMENT:
            backend = backend or os.environ.get("SPECDEC_BACKEND")
            if backend is not None:
                return self._explicit(backend, args, kwargs)(*args, **kwargs)
        try:
            return self.dispatch(*args, **kwargs)
        except RuntimeError as error:
            raise _as_value_error(error) from None

    def implement(self, backend: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorator: attach an implementation with the same signature as the reference.

        What it returns checks shapes and the device first, as every entry point does: a Triton
        launch on CPU tensors does nothing, silently.
        """

        def attach(function: Callable[P, R]) -> Callable[P, R]:
            checked = self._checked(function)

            @functools.wraps(function)
            def call(*args: P.args, **kwargs: P.kwargs) -> R:
                self._check_device(backend, args, kwargs)
                answer: R = checked(*args, **kwargs)
                return answer

            self.backends[backend] = call
            return call

        return attach

    def why_absent(self, backend: str) -> str | None:
        """Why `backend` cannot run this operator here; None if it can."""
        if backend not in BACKENDS:
            return f"unknown; known: {', '.join(BACKENDS)}"
        if backend == "triton":
            reason = _why_no_triton(self.name)
        elif backend in self.backends:
            reason = None
        elif backend in ("cpu", "cuda") and not NATIVE_LIBRARY.exists():
            reason = "native library not built"
        elif backend == "cuda" and not built_with_cuda():
            reason = "native library built without CUDA"
        else:
            reason = "not written yet"
        if reason is None and BACKENDS[backend] == "cuda" and not torch.cuda.is_available():
            reason = "no CUDA device"
        return reason

    def _explicit(
        self, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        reason = self.why_absent(backend)
        if reason is not None:
            self._refuse(backend, reason)
        self._check_device(backend, args, kwargs)
        if backend == "triton":
            return self._triton
        return self.backends[backend]

    def _check_device(self, backend: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        device = _device_of((*args, *kwargs.values()))
        if device is not None and BACKENDS[backend] not in ("any", device):
            self._refuse(backend, f"runs on {BACKENDS[backend]} tensors, got {device}")

    def _refuse(self, backend: str, reason: str) -> NoReturn:
        usable = [b for b in BACKENDS if self.why_absent(b) is None]
        raise ValueError(
            f"{self.name}: backend {backend!r} cannot run: {reason}; "
            f"usable here: {', '.join(usable)}"
        )

    @functools.cached_property
    def _triton(self) -> Callable[..., Any]:
        """The Triton implementation; its module, and Triton itself, are imported now."""
        importlib.import_module(_triton_module(self.name))
        return self.backends["triton"]

    @functools.cached_property
    def _without_cuda_kernel(self) -> Callable[..., Any]:
        """What runs on CUDA tensors where the native library has no kernel for them."""
        return self.backends["reference"] if self.why_absent("triton") else self._triton

    def _on_cuda(self, *args: Any, **kwargs: Any) -> Any:
        return self._without_cuda_kernel(*args, **kwargs)

    def _checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = self.signature.bind(*args, **kwargs)
            check(self.name, self.shapes, bound.arguments)
            return function(*args, **kwargs)

        return call

    def _define(self, fake: Callable[..., Any]) -> None:
        schema = torch.library.infer_schema(self.reference, mutates_args=self.mutates)
        _library.define(f"{self.name}{schema}")
        self.dispatch = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self._checked(fake))
        for backend, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            if _has_kernel(self.name, key):
                _declare(self.name, ", ".join(map(str, self.shapes)))
                self.backends[backend] = self._native
            else:
                fallback = {"CPU": self.backends["reference"], "CUDA": self._on_cuda}
                _library.impl(self.name, fallback[key], key)

    def _native(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.dispatch(*args, **kwargs)
        except RuntimeError as error:
            raise _as_value_error(error) from None


def op(**declaration: Any) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare an operator; the decorated function is its PyTorch reference.

    Args:
        shapes: the shape table of its tensors (grammar in `shapes.py`).
        fake: same signature, returns empty outputs of the right shape, dtype and strides.
        inputs: `inputs(**sizes, dtype=, seed=)` -> keyword arguments of one valid call.
        cases: the sizes that tests and benches iterate over.
        mutates: names of the arguments written in place.
        tolerance: largest error per dtype, as a fraction of the reference's largest value; None
            means bit for bit.
    """

    def declare(reference: Callable[P, R]) -> Op[P, R]:
        OPS[reference.__name__] = operator = Op(reference, **declaration)
        return operator

    return declare


def available() -> dict[str, dict[str, str | None]]:
    """Operator -> backend -> None if it runs here, else the reason why not."""
    return {name: {b: o.why_absent(b) for b in BACKENDS} for name, o in sorted(OPS.items())}


def built_with_cuda() -> bool:
    """Whether the native library holds CUDA kernels."""
    return NATIVE_LIBRARY.exists() and bool(native_op("built_with_cuda")())


def cpu_capability() -> str:
    """The instruction set that the native CPU kernels chose: "avx512_bf16", "avx512", "avx2" or
    "default"; "none" if not built.
    """
    return str(native_op("cpu_capability")()) if NATIVE_LIBRARY.exists() else "none"


def multiply_registers(rounds: int) -> int:
    """Multiply registers with registers on each thread of the CPU, as the kernels here multiply
    bfloat16 or float32, whichever is faster; up to 2^23 rounds.

    Returns:
        The operations that this was, two for each product; 0 if the library is not built.
    """
    return int(native_op("multiply_registers")(rounds)) if NATIVE_LIBRARY.exists() else 0


def has_matrix_tiles() -> bool:
    """Whether the CPU multiplies tiles of bfloat16 (AMX): by these oneDNN, but no kernel here,
    makes several times as many products of many rows in the same time.
    """
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return ask is not None and bool(ask())


def native_op(name: str) -> Callable[..., Any]:
    """A function of the native library that is no operator of this package."""
    operator: Callable[..., Any] = getattr(getattr(torch.ops, f"{NAMESPACE}_native"), name).default
    return operator


def _declare(name: str, table: str) -> None:
    native_op("declare")(name, table)


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def _triton_module(name: str) -> str:
    return f"{__package__}.triton_kernels.{name}"


def _why_no_triton(name: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton not installed"
    return None if importlib.util.find_spec(_triton_module(name)) else "not written yet"


def _device_of(values: tuple[Any, ...]) -> str | None:
    return next((tensor.device.type for tensor in _tensors(values)), None)


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(tuple(value))


def _as_value_error(error: RuntimeError) -> Exception:
    """Errors of native code carry a C++ trace; a caller's mistake is one line that starts with
    the operator.
    """
    mistake = re.search(rf"\b({'|'.join(OPS)}): .*", str(error))
    return error if mistake is None else ValueError(mistake[0])


# The library must register its kernels before the schemas are defined: a mismatch is then a Python
# exception.
if NATIVE_LIBRARY.exists():
    torch.ops.load_library(str(NATIVE_LIBRARY))
