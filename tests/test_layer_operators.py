"""`before_attention` and `after_attention`: by hand, beside their parts, hostile."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec_kernels import (
    after_attention,
    before_attention,
    packed_linear,
    panels_of,
    rms_norm,
    rope,
)
from specdec_kernels.registry import OPS

BACKENDS = ("reference", "cpu")
STEPS = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Dtype -> a rounding, of 32 bits several."""
of_each_dtype = pytest.mark.parametrize(
    "dtype", STEPS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def _inputs(name: str, dtype: torch.dtype, **sizes: int) -> dict[str, Any]:
    return OPS[name].inputs(**sizes, dtype=dtype)


@of_each_dtype
def test_before_attention_is_its_parts_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = _inputs("before_attention", dtype, B=3, N=5, F=96, H=4, G=2, D=16)
    q, k, v = before_attention(**inputs)
    rows = rms_norm(inputs["x"].view(15, 96), inputs["norm_weight"], inputs["epsilon"])
    heads = [
        packed_linear(rows, inputs[f"{name}_panels"], num * 16, inputs[f"{name}_bias"])
        .view(3, 5, num, 16)
        .transpose(1, 2)
        for name, num in (("q", 4), ("k", 2), ("v", 2))
    ]
    for i, name in enumerate(("q", "k")):
        flat = rms_norm(heads[i].reshape(-1, 16), inputs[f"{name}_norm_weight"], 1e-5)
        heads[i] = flat.view(heads[i].shape)
    turned = rope(heads[0], heads[1], inputs["cos"], inputs["sin"])
    assert torch.equal(q, turned[0]) and torch.equal(k, turned[1]) and torch.equal(v, heads[2])


@of_each_dtype
def test_after_attention_is_its_parts_but_for_an_exponential(dtype: torch.dtype) -> None:
    inputs = _inputs("after_attention", dtype, B=3, N=5, F=96, H=4, E=16, U=50)
    values = inputs["attended"].transpose(1, 2).reshape(15, 64)
    hidden = inputs["residual"].view(15, 96) + packed_linear(
        values, inputs["o_panels"], 96, inputs["o_bias"]
    )
    normed = rms_norm(hidden, inputs["norm_weight"], inputs["epsilon"])
    gates, up = (
        packed_linear(normed, inputs[f"{name}_panels"], 50, inputs[f"{name}_bias"])
        for name in ("gate", "up")
    )
    gated = torch.nn.functional.silu(gates) * up
    wanted = hidden + packed_linear(gated, inputs["down_panels"], 96, inputs["down_bias"])
    out = after_attention(**inputs).view(15, 96)
    if dtype != torch.float32:
        assert float((out == wanted).float().mean()) > 0.98
    torch.testing.assert_close(out, wanted, rtol=STEPS[dtype], atol=STEPS[dtype])


@of_each_dtype
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_by_hand(backend: str, dtype: torch.dtype) -> None:
    """One node, F = U = 1: silu(g) u with g = u = norm(h) = 1 or -1, from a huge h or not."""
    one = torch.ones(1, 1, 1, 1).to(dtype)

    def panels(weight: float) -> Tensor:
        return panels_of(torch.tensor([[weight]]).to(dtype))

    for residual, sign in ((4.0, 1.0), (-4.0, -1.0)):
        for gate in (0.0, 1.0, -1.0, 30.0, -30.0, 1000.0, -1000.0):
            weights = (panels(0.0), one[0, 0, 0], 0.0, panels(gate), panels(1.0), panels(1.0), 1)
            hidden = torch.tensor([[[residual]]]).to(dtype)
            out = after_attention(one, hidden, *weights, backend=backend)
            g = gate * sign
            silu = g / (1 + math.exp(-g)) if g > -700 else 0.0
            wanted = residual + silu * sign
            assert float(out) == pytest.approx(wanted, rel=STEPS[dtype], abs=1e-9)


@of_each_dtype
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_node(
    backend: str, value: float, dtype: torch.dtype
) -> None:
    inputs = _inputs("before_attention", dtype, B=1, N=3, F=33, H=2, G=1, D=6)
    inputs["x"][0, 1, 7] = value
    for out in before_attention(**inputs, backend=backend):
        assert out[:, :, [0, 2]].isfinite().all() and out[:, :, 1].isnan().all()
    inputs = _inputs("after_attention", dtype, B=1, N=3, F=33, H=2, E=6, U=9)
    inputs["attended"][0, 1, 1, 3] = value
    out = after_attention(**inputs, backend=backend)
    assert out[:, [0, 2]].isfinite().all() and not out[:, 1].isfinite().any()


@of_each_dtype
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "nodes"), [(0, 3), (2, 0)])
def test_nothing_to_do(backend: str, batch: int, nodes: int, dtype: torch.dtype) -> None:
    inputs = _inputs("before_attention", dtype, B=batch, N=nodes, F=8, H=2, G=1, D=4)
    heads = before_attention(**inputs, backend=backend)
    assert [tuple(x.shape) for x in heads] == [(batch, h, nodes, 4) for h in (2, 1, 1)]
    inputs = _inputs("after_attention", dtype, B=batch, N=nodes, F=8, H=2, E=4, U=6)
    assert after_attention(**inputs, backend=backend).shape == (batch, nodes, 8)


@of_each_dtype
def test_a_node_does_not_depend_on_the_others_or_on_the_threads(dtype: torch.dtype) -> None:
    sizes = {"before_attention": {"F": 130, "H": 6, "G": 2, "D": 64}}
    sizes["after_attention"] = {"F": 130, "H": 6, "E": 64, "U": 1000}
    for name, size in sizes.items():
        inputs = _inputs(name, dtype, B=1, N=40, **size)
        along = [n for n in ("x", "residual", "cos", "sin") if n in inputs]
        together = OPS[name](**inputs)
        alone = dict(inputs)
        for n in along:
            alone[n] = inputs[n][:, 5:12]
        if "attended" in inputs:
            alone["attended"] = inputs["attended"][:, :, 5:12]
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            few = OPS[name](**alone)
        finally:
            torch.set_num_threads(threads)
        if name == "after_attention":
            assert torch.equal(few, together[:, 5:12])
        else:
            for part, all_of_it in zip(few, together, strict=True):
                assert torch.equal(part, all_of_it[:, :, 5:12])


@of_each_dtype
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_refused(backend: str, dtype: torch.dtype) -> None:
    inner = "4, 16, 2" if dtype == torch.bfloat16 else "8, 16, 1"
    inputs = _inputs("before_attention", dtype, B=1, N=2, F=8, H=2, G=1, D=4)
    rule = rf"before_attention: q_panels of a weight \[20, 8\] must be \[2, {inner}\], got \[1, "
    with pytest.raises(ValueError, match=rule):
        before_attention(**{**inputs, "num_heads": 5}, backend=backend)
    with pytest.raises(ValueError, match=r"before_attention: v_bias must be \[4\], got \[3\]"):
        before_attention(**{**inputs, "v_bias": inputs["v_bias"][:3]}, backend=backend)
    odd = {name: inputs[name][..., :3] for name in ("cos", "sin")}
    with pytest.raises(ValueError, match="before_attention: D must be even, got 3"):
        before_attention(**{**inputs, **odd}, backend=backend)
    with pytest.raises(ValueError, match=r"before_attention: norm_weight must be \[F\] = \[8\]"):
        before_attention(**{**inputs, "norm_weight": torch.ones(9).to(dtype)}, backend=backend)
    inputs = _inputs("after_attention", dtype, B=1, N=2, F=8, H=2, E=4, U=6)
    rule = rf"after_attention: gate_panels of a weight \[17, 8\] must be \[2, {inner}\], got \[1, "
    with pytest.raises(ValueError, match=rule):
        after_attention(**{**inputs, "num_hidden": 17}, backend=backend)
    with pytest.raises(ValueError, match=r"after_attention: o_panels of a weight \[8, 4\]"):
        after_attention(**{**inputs, "attended": inputs["attended"][:, :1]}, backend=backend)
