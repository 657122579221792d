"""A linear layer for the few rows of a step, with its weights in panels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..registry import op

PANEL_OUTPUTS = 16


def panels_of(weight: Tensor) -> Tensor:
    """The weight of a linear layer as `packed_linear` reads it: 16 outputs side by side, and of
    each the weight of one feature, or of bfloat16 those of two, which some CPUs multiply as pairs.

    Args:
        weight: [U, F] float.

    Returns:
        [ceil(U / 16), ceil(F / k), 16, k] with k = 2 of bfloat16, else 1; zeros behind the last
        output and feature.
    """
    outputs, features = weight.shape
    count, slices, rows, width = panels_shape(outputs, features, weight.dtype)
    padded = pad(weight, (0, slices * width - features, 0, count * rows - outputs))
    return padded.view(count, rows, slices, width).transpose(1, 2).contiguous()


def panels_shape(outputs: int, features: int, dtype: torch.dtype) -> list[int]:
    """Of the panels of a weight."""
    width = 2 if dtype == torch.bfloat16 else 1
    return [-(-max(0, outputs) // PANEL_OUTPUTS), -(-features // width), PANEL_OUTPUTS, width]


def weight_of(panels: Tensor, num_outputs: int, num_features: int) -> Tensor:
    """The weight [U, F] whose `panels_of` these are."""
    rows = panels.transpose(1, 2).flatten(2).flatten(0, 1)
    return rows[:num_outputs, :num_features]


def check_panels(
    op: str, name: str, panels: Tensor, weight: tuple[int, int], bias: Tensor | None
) -> None:
    """Refuse panels that are not of a weight of this size, or a bias that is not.

    Args:
        name: of the layer, before "panels" and "bias" in the error.
        weight: its outputs and features.
    """
    outputs, features = weight
    wanted = panels_shape(outputs, features, panels.dtype)
    if list(panels.shape) != wanted:
        raise ValueError(
            f"{op}: {name}panels of a weight [{outputs}, {features}] must be {wanted}, "
            f"got {list(panels.shape)}"
        )
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"{op}: {name}bias must be [{outputs}], got {list(bias.shape)}")


def _check(x: Tensor, panels: Tensor, num_outputs: int, bias: Tensor | None) -> None:
    check_panels("packed_linear", "", panels, (num_outputs, x.shape[1]), bias)


def _fake(x: Tensor, panels: Tensor, num_outputs: int, bias: Tensor | None = None) -> Tensor:
    _check(x, panels, num_outputs, bias)
    return x.new_empty((x.shape[0], num_outputs))


def _inputs(
    R: int, U: int, F: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((R, F + 3), generator=generator).to(dtype)[:, :F]  # strided rows
    weight = torch.randn((U, F), generator=generator).to(dtype)
    bias = torch.randn(U, generator=generator).to(dtype) if R % 2 else None
    return {"x": x, "panels": panels_of(weight), "num_outputs": U, "bias": bias}


@op(
    shapes="x: R F float, panels: _ _ _ _ float, bias: _ float",
    fake=_fake,
    inputs=_inputs,
    # of 16 bits the last one of the largest value
    tolerance={torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8},
    cases=(
        {"R": 1, "U": 16, "F": 2},
        {"R": 3, "U": 5, "F": 7},
        {"R": 8, "U": 576, "F": 192},
        {"R": 13, "U": 49, "F": 301},
        {"R": 40, "U": 200, "F": 64},
        {"R": 301, "U": 49, "F": 301},  # more rows than a cache holds
    ),
)
def packed_linear(
    x: Tensor, panels: Tensor, num_outputs: int, bias: Tensor | None = None
) -> Tensor:
    """x W^T + bias for a few rows, summed in float32 and rounded once.

    A row's result does not depend on the other rows of the call. CPUs without products of the
    dtype widen the weights in registers, so that a step reads each of them once, as it is.

    Args:
        x: [R, F] float, any strides.
        panels: of the weight [U, F], from `panels_of`.
        num_outputs: U.
        bias: [U], or None.

    Returns:
        [R, U]; NaN and infinities as the products give them.

    Raises:
        ValueError: panels or bias of another size.
    """
    _check(x, panels, num_outputs, bias)
    out = x.float() @ weight_of(panels, num_outputs, x.shape[1]).float().T
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)
