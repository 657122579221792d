"""Norms, rotary embeddings and whole layers in fewer operators, while this package decodes."""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import rms_norm, rope
from ..shapes import FLOATS
from .attention import current_call
from .layers import WholeLayers
from .packing import lent_forwards, packed_linears, renew_panels
from .snapshot import Snapshot

_ROPE = "apply_rotary_pos_emb"
"""What the modeling files of transformers call it."""
_ROPE_PARAMETERS = ("q", "k", "cos", "sin", "unsqueeze_dim")

_lock = threading.RLock()

Rope = Callable[..., tuple[Tensor, Tensor]]


@contextmanager
def fast_layers(
    model: nn.Module, pack: bool | None = None, *, compiled: bool = False
) -> Iterator[None]:
    """Let a model on the CPU run with fewer and larger operators, and give it back. Under autocast
    it runs as it is.

    A norm, a rotary embedding or a whole layer (see `layers`) is replaced if, tried on random
    numbers of the model's dtype, it computes what the operators compute: not the same bits, since
    sums are made in another order.

    Args:
        pack: see `packed_linears`; of those who use it at once the first decides.
        compiled: `torch.compile` sees the model, and fuses by itself.
    """
    if torch.is_autocast_enabled("cpu"):  # which would cast what each layer multiplies
        yield
        return
    with _lock:
        if id(model) in _lent:
            renew_panels(model)
        else:
            _lent[id(model)] = (_lend_all(model, pack, compiled), [])
        _lent[id(model)][1].append(None)
    try:
        yield
    finally:
        with _lock:
            lent, users = _lent[id(model)]
            users.pop()
            if not users:
                del _lent[id(model)]
                lent.close()


_lent: dict[int, tuple[ExitStack, list[None]]] = {}
"""By a model's id: what gives it back, and an item for each who uses it. Threads may share a model,
and a model may draft for itself: nothing of it may change within a pass.
"""


def _lend_all(model: nn.Module, pack: bool | None, compiled: bool) -> ExitStack:
    parts = None if compiled else _parts_of(model)  # before any is lent a forward
    with ExitStack() as lent:
        lent.enter_context(packed_linears(model, pack, compiled=compiled))
        if parts is not None:
            lent.enter_context(lent_forwards(parts.norms, _norm_forward))
            lent.enter_context(_fused_rope(model))
            lent.enter_context(parts.layers.lent())
        return lent.pop_all()


@dataclass(frozen=True, slots=True)
class _Parts:
    """What can be lent a forward, in a model that is still what it was."""

    snapshot: Snapshot
    norms: list[nn.Module]
    layers: WholeLayers


_parts: weakref.WeakKeyDictionary[nn.Module, _Parts] = weakref.WeakKeyDictionary()


def _parts_of(model: nn.Module) -> _Parts:
    parts = _parts.get(model)
    if parts is None or not parts.snapshot.is_current():
        snapshot = Snapshot(model)
        norms = [module for module in model.modules() if _is_rms_norm(module)]
        parts = _parts[model] = _Parts(snapshot, norms, WholeLayers(model, set(norms)))
    return parts


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and _is_fusable(weight)
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and len(list(module.parameters())) == 1
        and not list(module.buffers())
        and not list(module.children())
        and "forward" not in module.__dict__
        and _computes_rms_norm(module)
    )


_norm_classes: weakref.WeakKeyDictionary[type, dict[torch.dtype, bool]]
_norm_classes = weakref.WeakKeyDictionary()


def _computes_rms_norm(module: Any) -> bool:
    """Whether modules of its class do in its dtype, tried once."""
    dtype = module.weight.dtype
    known = _norm_classes.setdefault(type(module), {})
    if dtype not in known:
        generator = torch.Generator().manual_seed(0)
        shape = (16, len(module.weight))
        x = torch.randn(shape, generator=generator, device="cpu").to(dtype)
        # ones would hide a formula
        weight = torch.rand(shape[1], generator=generator, device="cpu").to(dtype)
        try:
            with torch.no_grad():
                own = torch.func.functional_call(module, {"weight": weight}, (x,))
            known[dtype] = _agree(own, rms_norm(x, weight, module.variance_epsilon))
        except (RuntimeError, TypeError, ValueError):  # wants something else
            known[dtype] = False
    return known[dtype]


def _norm_forward(norm: Any) -> Callable[[Tensor], Tensor]:
    weight, epsilon, own = norm.weight, norm.variance_epsilon, type(norm).forward
    size, dtype = len(weight), weight.dtype

    def forward(hidden_states: Tensor) -> Tensor:
        fits = hidden_states.dtype == dtype and hidden_states.shape[-1] == size
        if not fits or torch.is_grad_enabled():
            whole: Tensor = own(norm, hidden_states)
            return whole
        rows = hidden_states.reshape(-1, size)
        normed: Tensor = rms_norm(rows, weight, epsilon)
        return normed.view(hidden_states.shape)

    return forward


@contextmanager
def _fused_rope(model: nn.Module) -> Iterator[None]:
    some = next(model.parameters(), None)
    if some is None or not _is_fusable(some):
        yield
        return
    names = {type(module).__module__ for module in model.modules()}
    loaded = (sys.modules[name] for name in names if name in sys.modules)
    files = [file for file in loaded if _has_rope(file, some.dtype)]
    try:
        for file in files:
            _lend(file, some.dtype)
        yield
    finally:
        for file in files:
            _give_back(file, some.dtype)


def _has_rope(file: Any, dtype: torch.dtype) -> bool:
    with _lock:
        own = _loans[file][0] if file in _loans else getattr(file, _ROPE, None)
    return inspect.isfunction(own) and _computes_rope(own, dtype)


_rope_functions: weakref.WeakKeyDictionary[Any, dict[torch.dtype, bool]]
_rope_functions = weakref.WeakKeyDictionary()


def _computes_rope(function: Rope, dtype: torch.dtype) -> bool:
    """Whether it is the operator in this dtype, tried once."""
    known = _rope_functions.setdefault(function, {})
    if dtype not in known:
        generator = torch.Generator().manual_seed(0)
        q, k, cos, sin = (
            torch.randn(shape, generator=generator, device="cpu").to(dtype)
            for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
        )
        is_one = tuple(inspect.signature(function).parameters) == _ROPE_PARAMETERS
        try:
            pairs = zip(function(q, k, cos, sin), rope(q, k, cos, sin), strict=True)
            known[dtype] = is_one and all(_agree(*pair) for pair in pairs)
        except (RuntimeError, TypeError, ValueError):
            known[dtype] = False
    return known[dtype]


_loans: dict[Any, tuple[Rope, list[torch.dtype]]] = {}
"""Modeling file -> its own function, and for each who uses the other one the dtype of the model.
Threads may share a file.
"""


def _lend(file: Any, dtype: torch.dtype) -> None:
    with _lock:
        own, users = _loans.setdefault(file, (getattr(file, _ROPE), []))
        users.append(dtype)
        if len(users) == 1:
            setattr(file, _ROPE, _rope_of(own, users))


def _give_back(file: Any, dtype: torch.dtype) -> None:
    with _lock:
        own, users = _loans[file]
        users.remove(dtype)
        if not users:
            setattr(file, _ROPE, own)
            del _loans[file]


def _rope_of(own: Rope, dtypes: Sequence[torch.dtype]) -> Rope:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        fits = (
            current_call() is not None  # others may use the file, too
            and unsqueeze_dim == 1
            and q.device.type == "cpu"
            and q.dtype in dtypes
            and q.dtype == k.dtype == cos.dtype == sin.dtype
            and q.dim() == k.dim() == 4
            and cos.shape[1:] == sin.shape[1:] == (q.shape[2], q.shape[3])
            and not torch.is_grad_enabled()
        )
        if not fits:
            return own(q, k, cos, sin, unsqueeze_dim)
        batch = (len(q), -1, -1)
        turned: tuple[Tensor, Tensor] = rope(q, k, cos.expand(batch), sin.expand(batch))
        return turned

    return apply_rotary_pos_emb


def _is_fusable(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATS and tensor.device.type == "cpu"


def _agree(own: Any, other: Tensor) -> bool:
    """But for the order of sums: in 16 bits it moves a last bit here and there, in 32 many."""
    if not isinstance(own, Tensor) or own.shape != other.shape or own.dtype != other.dtype:
        return False
    if own.dtype == torch.float32:
        return torch.allclose(own, other, rtol=2e-6, atol=2e-6)
    error = (own.float() - other.float()).abs()
    last_bit = torch.finfo(own.dtype).eps * own.float().abs()
    return bool((error <= last_bit).all()) and float((error == 0).float().mean()) > 0.98
