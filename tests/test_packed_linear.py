"""Products with weights in panels: by hand, hostile, and the same whatever else is computed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from specdec_kernels import packed_linear, panels_of
from specdec_kernels.ops.packed_linear import weight_of

BACKENDS = ("reference", "cpu")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_panels_hold_sixteen_outputs_and_two_features_side_by_side() -> None:
    weight = torch.arange(17 * 3).view(17, 3).bfloat16()
    panels = panels_of(weight)
    assert panels.shape == (2, 2, 16, 2)
    assert panels[0, 0, 5].tolist() == [15, 16]  # features 0 and 1 of output 5
    assert panels[0, 1, 5].tolist() == [17, 0]
    assert panels[1, 0].flatten().tolist() == [48, 49] + [0] * 30
    assert torch.equal(weight_of(panels, 17, 3), weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_product_by_hand(backend: str) -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]]).bfloat16()
    x = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 4.0]]).bfloat16()
    bias = torch.tensor([10.0, 0.25]).bfloat16()
    out = packed_linear(x, panels_of(weight), 2, bias, backend=backend)
    assert out.tolist() == [[16.0, -0.25], [24.0, 2.25]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_rounded_once(backend: str) -> None:
    """256 + 1 + 1: rounded after each sum, bfloat16 would stay at 256."""
    x = torch.tensor([[256.0, 1.0, 1.0]]).bfloat16()
    assert packed_linear(x, panels_of(torch.ones(1, 3).bfloat16()), 1, backend=backend) == 258


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_halfway_between_two_numbers_becomes_the_even_one(backend: str) -> None:
    x = torch.tensor([[256.0, 1.0], [256.0, 3.0], [-256.0, -1.0]]).bfloat16()
    out = packed_linear(x, panels_of(torch.ones(1, 2).bfloat16()), 1, backend=backend)
    assert out.flatten().tolist() == [256, 260, -256]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_row_and_output(backend: str, value: float) -> None:
    x, weight = _random(14, 9), _random(20, 9, seed=1)
    x[3, 4], weight[7, 2] = value, value
    weight[:, 4] = weight[:, 4].abs() + 1
    out = packed_linear(x, panels_of(weight), 20, backend=backend)
    assert not out[3].isfinite().any() and not out[:, 7].isfinite().any()
    rest = out[[r for r in range(14) if r != 3]][:, [u for u in range(20) if u != 7]]
    assert rest.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_or_no_features(backend: str) -> None:
    panels = panels_of(_random(5, 6))
    assert packed_linear(_random(0, 6), panels, 5, backend=backend).shape == (0, 5)
    bias = _random(5)
    empty = packed_linear(_random(2, 0), panels_of(_random(5, 0)), 5, bias, backend=backend)
    assert torch.equal(empty, bias.expand(2, 5))


def test_a_row_does_not_depend_on_the_others_or_on_the_threads() -> None:
    x, panels = _random(40, 130), panels_of(_random(1000, 130, seed=1))
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_panels_and_bias_of_another_size_are_refused(backend: str) -> None:
    x, panels = _random(2, 6), panels_of(_random(5, 6))
    for outputs, rows in ((17, 2), (-3, 0)):
        rule = rf"packed_linear: panels of a weight \[{outputs}, 6\] must be \[{rows}, 3, 16, 2\]"
        with pytest.raises(ValueError, match=rule + r", got \[1, 3, 16, 2\]"):
            packed_linear(x, panels, outputs, backend=backend)
    with pytest.raises(ValueError, match=r"packed_linear: bias must be \[5\], got \[4\]"):
        packed_linear(x, panels, 5, _random(4), backend=backend)
