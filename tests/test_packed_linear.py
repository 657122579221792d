"""Products with weights in panels: by hand, hostile, and the same whatever else is computed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from specdec_kernels import packed_linear, panels_of
from specdec_kernels.ops.packed_linear import weight_of
from specdec_kernels.shapes import FLOATS

BACKENDS = ("reference", "cpu")
of_each_dtype = pytest.mark.parametrize(
    "dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_panels_hold_sixteen_outputs_side_by_side(dtype: torch.dtype) -> None:
    weight = torch.arange(17 * 3).view(17, 3).to(dtype)
    panels = panels_of(weight)
    assert panels.shape == (2, 3, 16, 1) and panels.dtype == dtype
    assert panels[0, 2, :, 0].tolist() == list(range(2, 48, 3))  # feature 2 of each output
    assert panels[1].flatten().tolist() == [48] + [0] * 15 + [49] + [0] * 15 + [50] + [0] * 15
    assert torch.equal(weight_of(panels, 17, 3), weight)


def test_panels_of_bfloat16_hold_two_features_of_sixteen_outputs_side_by_side() -> None:
    weight = torch.arange(17 * 3).view(17, 3).bfloat16()
    panels = panels_of(weight)
    assert panels.shape == (2, 2, 16, 2)
    assert panels[0, 0, 5].tolist() == [15, 16]  # features 0 and 1 of output 5
    assert panels[0, 1, 5].tolist() == [17, 0]
    assert panels[1, 0].flatten().tolist() == [48, 49] + [0] * 30
    assert torch.equal(weight_of(panels, 17, 3), weight)


@of_each_dtype
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_product_by_hand(backend: str, dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]]).to(dtype)
    x = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 4.0]]).to(dtype)
    bias = torch.tensor([10.0, 0.25]).to(dtype)
    out = packed_linear(x, panels_of(weight), 2, bias, backend=backend)
    assert out.tolist() == [[16.0, -0.25], [24.0, 2.25]]


narrow = pytest.mark.parametrize(("dtype", "big"), [(torch.bfloat16, 256), (torch.float16, 2048)])
"""Where two neighbours of a dtype are 2 apart."""


@narrow
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_rounded_once(backend: str, dtype: torch.dtype, big: int) -> None:
    """big + 1 + 1: rounded after each sum, it would stay as it is."""
    x = torch.tensor([[big, 1.0, 1.0]]).to(dtype)
    assert packed_linear(x, panels_of(torch.ones(1, 3).to(dtype)), 1, backend=backend) == big + 2


@narrow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_halfway_between_two_numbers_becomes_the_even_one(
    backend: str, dtype: torch.dtype, big: int
) -> None:
    x = torch.tensor([[big, 1.0], [big, 3.0], [-big, -1.0]]).to(dtype)
    out = packed_linear(x, panels_of(torch.ones(1, 2).to(dtype)), 1, backend=backend)
    assert out.flatten().tolist() == [big, big + 4, -big]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float16_sum_may_pass_what_float16_can_hold_but_not_end_there(backend: str) -> None:
    x = torch.tensor([[6e4, 6e4, -6e4], [6e4, 6e4, 6e4], [-6e4, 0.0, -6e4]]).half()
    out = packed_linear(x, panels_of(torch.ones(1, 3).half()), 1, backend=backend)
    assert out.flatten().tolist() == [6e4, math.inf, -math.inf]


@of_each_dtype
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_row_and_output(
    backend: str, value: float, dtype: torch.dtype
) -> None:
    x, weight = _random(14, 9, dtype=dtype), _random(20, 9, dtype=dtype, seed=1)
    x[3, 4], weight[7, 2] = value, value
    weight[:, 4] = weight[:, 4].abs() + 1
    out = packed_linear(x, panels_of(weight), 20, backend=backend)
    assert not out[3].isfinite().any() and not out[:, 7].isfinite().any()
    rest = out[[r for r in range(14) if r != 3]][:, [u for u in range(20) if u != 7]]
    assert rest.isfinite().all()


@of_each_dtype
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_or_no_features(backend: str, dtype: torch.dtype) -> None:
    none, few, bias = (_random(*shape, dtype=dtype) for shape in ((0, 6), (2, 0), (5,)))
    panels = panels_of(_random(5, 6, dtype=dtype))
    assert packed_linear(none, panels, 5, backend=backend).shape == (0, 5)
    no_weights = panels_of(_random(5, 0, dtype=dtype))
    empty = packed_linear(few, no_weights, 5, bias, backend=backend)
    assert torch.equal(empty, bias.expand(2, 5))


@of_each_dtype
def test_a_row_does_not_depend_on_the_others_or_on_the_threads(dtype: torch.dtype) -> None:
    x, panels = _random(40, 131, dtype=dtype), panels_of(_random(1000, 131, dtype=dtype, seed=1))
    together = packed_linear(x, panels, 1000)
    for first, rows in ((0, 1), (3, 2), (5, 7), (12, 12), (20, 13)):
        alone = packed_linear(x[first : first + rows], panels, 1000)
        assert torch.equal(alone, together[first : first + rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(packed_linear(x, panels, 1000), together)
    finally:
        torch.set_num_threads(threads)


@of_each_dtype
@pytest.mark.parametrize("backend", BACKENDS)
def test_panels_and_bias_of_another_size_are_refused(backend: str, dtype: torch.dtype) -> None:
    x, panels = _random(2, 6, dtype=dtype), panels_of(_random(5, 6, dtype=dtype))
    inner = "3, 16, 2" if dtype == torch.bfloat16 else "6, 16, 1"
    for outputs, rows in ((17, 2), (-3, 0)):
        rule = rf"packed_linear: panels of a weight \[{outputs}, 6\] must be \[{rows}, {inner}\]"
        with pytest.raises(ValueError, match=rule + rf", got \[1, {inner}\]"):
            packed_linear(x, panels, outputs, backend=backend)
    with pytest.raises(ValueError, match=r"packed_linear: bias must be \[5\], got \[4\]"):
        packed_linear(x, panels, 5, _random(4, dtype=dtype), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_panels_of_another_dtype_are_refused(backend: str) -> None:
    x, panels = torch.ones(2, 6), panels_of(torch.ones(5, 6).half())
    rule = "packed_linear: panels must be float32 like x, got float16"
    with pytest.raises(ValueError, match=rule):
        packed_linear(x, panels, 5, backend=backend)
