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
    each the weights of two features.

    Args:
        weight: [U, F] bfloat16.

    Returns:
        [ceil(U / 16), ceil(F / 2), 16, 2] bfloat16, zeros behind the last output and feature.
    """
    outputs, features = weight.shape
    padded = pad(weight, (0, features % 2, 0, -outputs % PANEL_OUTPUTS))
    shape = (-(-outputs // PANEL_OUTPUTS), PANEL_OUTPUTS, (features + 1) // 2, 2)
    return padded.view(shape).transpose(1, 2).contiguous()


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
    wanted = [-(-max(0, outputs) // PANEL_OUTPUTS), (features + 1) // 2, PANEL_OUTPUTS, 2]
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
    shapes="x: R F bfloat16, panels: _ _ _ _ bfloat16, bias: _ bfloat16",
    fake=_fake,
    inputs=_inputs,
    tolerance={torch.bfloat16: 2**-8},  # the last bit of the largest value
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

    A row's result does not depend on the other rows of the call. CPUs without bfloat16 products
    widen the weights in registers, so that a step reads each of them once, as bfloat16.

    Args:
        x: [R, F] bfloat16, any strides.
        panels: of the weight [U, F], from `panels_of`.
        num_outputs: U.
        bias: [U] bfloat16, or None.

    Returns:
        [R, U] bfloat16; NaN and infinities as the products give them.

    Raises:
        ValueError: panels or bias of another size.
    """
    _check(x, panels, num_outputs, bias)
    out = x.float() @ weight_of(panels, num_outputs, x.shape[1]).float().T
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)
