"""Layouts of weights in which a product with a few rows runs at the speed of the memory.

PyTorch's own product of so few rows is far from it, in 16 bits farthest. `ops.packed_linear` takes
its place where it has the instructions; elsewhere, and for float16 where oneDNN multiplies it on
this CPU, oneDNN's blocked layout halves the time of 16 bits: the layout that `torch.compile` packs
its constants into, by the operators that it uses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from .ops import packed_linear, panels_of
from .ops.packed_linear import panels_shape
from .registry import cpu_capability
from .shapes import FLOATS

_WITH_PANELS = ("avx2", "avx512", "avx512_bf16")


class Panels:
    """`ops.packed_linear`."""

    is_tensor = True

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        return panels_of(weight)

    @staticmethod
    def num_bytes(weight: Tensor) -> int:
        """Of the packed copy."""
        outputs, features = weight.shape
        return math.prod(panels_shape(outputs, features, weight.dtype)) * weight.element_size()

    @staticmethod
    def multiply(input: Tensor, panels: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
        out: Tensor = packed_linear(input.flatten(0, -2), panels, num_outputs, bias)
        return out.view(*input.shape[:-1], num_outputs)


class OneDnn:
    """oneDNN's own layout and product."""

    is_tensor = False  # but opaque: without strides, as graphs need them

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        # Laid out for 16 rows, which serves any number as well.
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        return packed

    @staticmethod
    def multiply(input: Tensor, weight: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
        multiply = torch.ops.mkldnn._linear_pointwise.default
        product: Tensor = multiply(input, weight, bias, "none", [], "")
        return product


Layout = type[Panels] | type[OneDnn]


@functools.cache
def layout_for(dtype: torch.dtype) -> Layout | None:
    """The faster layout on this CPU; None for a dtype that is left alone."""
    has_panels = dtype in FLOATS and cpu_capability() in _WITH_PANELS
    if has_panels and dtype != torch.float16:
        return Panels
    operators = torch.ops.mkldnn
    if torch.backends.mkldnn.is_available() and hasattr(operators, "_linear_pointwise"):
        supported = {
            torch.bfloat16: operators._is_mkldnn_bf16_supported,
            torch.float16: operators._is_mkldnn_fp16_supported,
        }
        if dtype in supported and supported[dtype]():
            return OneDnn
    return Panels if has_panels else None


def layout_of(weight: Tensor) -> Layout | None:
    """The layout that this weight is worth packing into, if there is one."""
    is_here = weight.device.type == "cpu" and weight.numel() > 0
    return layout_for(weight.dtype) if is_here else None


class PackedWeights:
    """Packed copies of weights on the CPU, each made when its weight is first multiplied."""

    def __init__(self) -> None:
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}  # the weight, and its copy

    def linear(self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """input [..., F] weight^T + bias [..., U]; the weight of a name must not be edited in
        place.
        """
        layout = layout_of(weight)
        is_plain = input.dtype == weight.dtype and input.dim() > 1 and input.numel() > 0
        if layout is None or not is_plain or torch.is_grad_enabled():
            return linear(input, weight, bias)
        return layout.multiply(input, self._copy(name, weight, layout), bias, len(weight))

    def panels(self, weights: Mapping[str, Tensor]) -> list[Tensor] | None:
        """Those of each weight; None if one is worth another layout, or none."""
        if not all(layout_of(weight) is Panels for weight in weights.values()):
            return None
        return [self._copy(name, weight, Panels) for name, weight in weights.items()]

    def _copy(self, name: str, weight: Tensor, layout: Layout) -> Tensor:
        known = self._copies.get(name)
        if known is None or known[0] is not weight:
            known = self._copies[name] = (weight, layout.pack(weight))
        return known[1]
