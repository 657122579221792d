"""The second half of a decoder layer in one call: projection, norm, gated MLP, residuals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..registry import op
from .packed_linear import check_panels, packed_linear, panels_of
from .rms_norm import rms_norm


def _check(
    attended: Tensor,
    residual: Tensor,
    panels: tuple[Tensor, Tensor, Tensor, Tensor],
    num_hidden: int,
    biases: tuple[Tensor | None, ...],
) -> None:
    features, width = residual.shape[2], attended.shape[1] * attended.shape[3]
    weights = (
        (features, width),
        (num_hidden, features),
        (num_hidden, features),
        (features, num_hidden),
    )
    names = ("o_", "gate_", "up_", "down_")
    for name, packed, weight, bias in zip(names, panels, weights, biases, strict=True):
        check_panels("after_attention", name, packed, weight, bias)


def _fake(
    attended: Tensor,
    residual: Tensor,
    o_panels: Tensor,
    norm_weight: Tensor,
    epsilon: float,
    gate_panels: Tensor,
    up_panels: Tensor,
    down_panels: Tensor,
    num_hidden: int,
    o_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    panels = (o_panels, gate_panels, up_panels, down_panels)
    _check(attended, residual, panels, num_hidden, (o_bias, gate_bias, up_bias, down_bias))
    return residual.new_empty(residual.shape)


def _inputs(
    B: int,
    N: int,
    F: int,
    H: int,
    E: int,
    U: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    def panels(outputs: int, features: int) -> Tensor:
        return panels_of(random(outputs, features, size=features**-0.5))

    outputs = {"o": F, "gate": U, "up": U, "down": F}
    biases = {f"{name}_bias": random(count) for name, count in outputs.items()}
    return {
        "attended": random(B, H, N, E + 1)[..., :E],  # strided
        "residual": random(B, N, F) * 3,
        "o_panels": panels(F, H * E),
        "norm_weight": random(F) + 1,
        "epsilon": 1e-5,
        "gate_panels": panels(U, F),
        "up_panels": panels(U, F),
        "down_panels": panels(F, U),
        "num_hidden": U,
        **(biases if B % 2 else {}),
    }


@op(
    shapes="attended: B H N E float, residual: B N F float, o_panels: _ _ _ _ float, "
    "norm_weight: F float, gate_panels: _ _ _ _ float, up_panels: _ _ _ _ float, "
    "down_panels: _ _ _ _ float, o_bias: _ float, gate_bias: _ float, up_bias: _ float, "
    "down_bias: _ float",
    fake=_fake,
    inputs=_inputs,
    tolerance={torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-7},
    cases=(
        {"B": 1, "N": 1, "F": 64, "H": 2, "E": 16, "U": 96},
        {"B": 2, "N": 3, "F": 33, "H": 3, "E": 5, "U": 47},
        {"B": 3, "N": 7, "F": 576, "H": 9, "E": 64, "U": 1536},
        {"B": 1, "N": 40, "F": 128, "H": 4, "E": 32, "U": 200},
    ),
)
def after_attention(
    attended: Tensor,
    residual: Tensor,
    o_panels: Tensor,
    norm_weight: Tensor,
    epsilon: float,
    gate_panels: Tensor,
    up_panels: Tensor,
    down_panels: Tensor,
    num_hidden: int,
    o_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """What a pre-norm decoder layer makes of its attention's values:
    h = residual + o(attended), then h + down(silu(gate(norm(h))) up(norm(h))), of `rms_norm` and
    `packed_linear`, each step rounded to their dtype.

    Args:
        attended: [B, H, N, E] float, any strides.
        residual: [B, N, F], the hidden states that entered the layer.
        o_panels: `panels_of` the weight [F, H E].
        norm_weight: [F], with `epsilon` as in `rms_norm`.
        gate_panels, up_panels, down_panels: of the weights [U, F], [U, F], [F, U].
        num_hidden: U.
        o_bias, gate_bias, up_bias, down_bias: [F], [U], [U], [F], or None.

    Returns:
        [B, N, F], contiguous; NaN and infinities as the formulas give them.

    Raises:
        ValueError: panels or a bias of another size.

    Source: Touvron et al., "LLaMA", 2302.13971, section 2.2; Shazeer, "GLU Variants Improve
        Transformer", 2002.05202, SwiGLU.
    """
    panels = (o_panels, gate_panels, up_panels, down_panels)
    _check(attended, residual, panels, num_hidden, (o_bias, gate_bias, up_bias, down_bias))
    features = residual.shape[2]
    linear = packed_linear.reference
    values = attended.transpose(1, 2).reshape(-1, attended.shape[1] * attended.shape[3])
    hidden = residual.reshape(-1, features) + linear(values, o_panels, features, o_bias)
    normed = rms_norm.reference(hidden, norm_weight, epsilon)
    gates = silu(linear(normed, gate_panels, num_hidden, gate_bias))
    gated = gates * linear(normed, up_panels, num_hidden, up_bias)
    out = hidden + linear(gated, down_panels, features, down_bias)
    return out.view(residual.shape)
