"""Linear layers with packed copies of their weights, while this package runs the model."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from ..fingerprint import fingerprint
from ..layouts import Layout, Panels, layout_of
from ..registry import has_matrix_tiles
from .large_pages import LargePages

_MOST_OF_FREE = 0.5
"""Unasked, packed copies take at most this share of the free memory."""
_TILE_ROWS = 64
"""From so many rows on matrix tiles, where the CPU has them, are worth the layer's own weight."""
_Module = TypeVar("_Module", bound=nn.Module)
_CGROUP = Path("/sys/fs/cgroup")
_packed: weakref.WeakKeyDictionary[nn.Linear, tuple[Any, Tensor]] = weakref.WeakKeyDictionary()


@contextmanager
def packed_linears(
    model: nn.Module, pack: bool | None = None, *, compiled: bool = False
) -> Iterator[None]:
    """Let the model's linear layers multiply by packed copies of their weights, and give them back.

    Layers that differ from a plain `nn.Linear` are left alone: other classes, forwards of their
    own, weights that are not on the CPU or of a type that no layout here makes faster. The copies
    stay with the model for later calls, and are made anew when a weight has changed.

    Args:
        pack: True packs; False does not; None packs where the copies fit well into free memory.
        compiled: only in a layout that `torch.compile` can hold in a graph.
    """
    linears = [] if pack is False else list(_packable_in(model, compiled))
    missing = [linear for linear in linears if not _is_packed(linear)]
    if pack is None and not _fits(missing):
        linears = missing = []
    _pack(missing)
    with lent_forwards(linears, _forward):
        yield


@contextmanager
def lent_forwards(
    modules: Sequence[_Module], forward_of: Callable[[_Module], Callable[..., Tensor]]
) -> Iterator[None]:
    """Run these modules by other forwards, and give their own back."""
    try:
        for module in modules:
            module.__dict__["forward"] = forward_of(module)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def renew_panels(model: nn.Module) -> None:
    """Pack weights that were edited since, where the panels lie: some other text is using them."""
    for linear in model.modules():
        if isinstance(linear, nn.Linear) and panels_in_use(linear) is not None:
            state, panels = _state(linear.weight), _packed[linear][1]
            before = _packed[linear][0]
            is_edited = state != before and state[:2] == before[:2]
            if is_edited and _layout_of(linear) is Panels:
                panels.copy_(Panels.pack(linear.weight.detach()))
                _packed[linear] = (state, panels)


def takes_panels(linear: nn.Module) -> bool:
    """Whether `packed_linears` would pack its weight as `ops.panels_of`."""
    return _is_packable(linear) and _layout_of(linear) is Panels


def panels_in_use(linear: nn.Linear) -> Tensor | None:
    """The panels by which a layer that takes them runs now."""
    return _packed[linear][1] if "forward" in linear.__dict__ and linear in _packed else None


def most_rows(dtype: torch.dtype) -> int:
    """Rows up to which panels are the faster ones."""
    return _TILE_ROWS - 1 if dtype == torch.bfloat16 and has_matrix_tiles() else sys.maxsize


def _packable_in(model: nn.Module, compiled: bool) -> Iterator[nn.Linear]:
    for module in model.modules():
        if _is_packable(module) and (not compiled or _layout_of(module).is_tensor):
            yield module


def _is_packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    return type(weight.data) is Tensor and layout_of(weight) is not None


def _layout_of(linear: nn.Linear) -> Layout:
    """Of a layer that is packable."""
    layout = layout_of(linear.weight)
    assert layout is not None
    return layout


def _forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The layer's product, from the packed copy."""
    layout = _layout_of(linear)
    weight, multiply = _packed[linear][1], layout.multiply
    dtype, width, bias = linear.weight.dtype, linear.in_features, linear.bias
    most = most_rows(dtype) if layout is Panels else sys.maxsize
    num_outputs = linear.out_features

    def forward(input: Tensor) -> Tensor:
        fits = input.dtype == dtype and input.dim() > 1 and input.shape[-1] == width
        # The product itself checks nothing.
        if not fits or not 0 < input.numel() <= most * width or torch.is_grad_enabled():
            return nn.functional.linear(input, linear.weight, bias)
        return multiply(input, weight, bias, num_outputs)

    return forward


def _pack(linears: Sequence[nn.Linear]) -> None:
    """Make the copies; those in panels in large pages, from which they stream faster."""
    pages = LargePages(Panels.num_bytes(m.weight) for m in linears if _layout_of(m) is Panels)
    for linear in linears:
        layout = _layout_of(linear)
        copy = layout.pack(linear.weight.detach())
        kept = pages.copy(copy) if layout is Panels else copy
        _packed[linear] = (_state(linear.weight), kept)


def _is_packed(linear: nn.Linear) -> bool:
    return linear in _packed and _packed[linear][0] == _state(linear.weight)


def _state(weight: Tensor) -> Any:
    """Changes when the weight is replaced, or edited in place, through `weight.data` as well."""
    return weight.shape, weight.dtype, fingerprint(weight)


def _fits(linears: list[nn.Linear]) -> bool:
    needed = sum(linear.weight.nbytes for linear in linears)
    return needed == 0 or needed <= _MOST_OF_FREE * _free_bytes()


def _free_bytes() -> int:
    """Memory that this process may still take, by the system and by its control group."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        free += [int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")]
        limit, used = ((_CGROUP / f"memory.{n}").read_text("ascii") for n in ("max", "current"))
        free += [int(limit) - int(used)] if limit.strip() != "max" else []
    except (OSError, ValueError):
        pass
    return min(free, default=0)
