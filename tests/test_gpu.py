"""What only a GPU can show: operators captured in CUDA graphs, and replayed on other data.

On a GPU, `tests/test_ops.py` runs every case of the GPU backends as well, with the same mark.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specdec_kernels.registry import BACKENDS, OPS, Op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GPU_BACKENDS = ["triton", "cuda"]


def _on_gpu(value: Any) -> Any:
    if isinstance(value, list):
        return [_on_gpu(item) for item in value]
    return value.cuda() if isinstance(value, Tensor) else value


def _overwrite(target: Any, source: Any) -> None:
    if isinstance(target, list):
        for one, other in zip(target, source, strict=True):
            _overwrite(one, other)
    elif isinstance(target, Tensor):
        target.copy_(source)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values.cpu()]
    return [t for v in values for t in _tensors(v)] if isinstance(values, (list, tuple)) else []


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("operator", OPS.values(), ids=list(OPS))
def test_a_captured_graph_replays_on_other_data(operator: Op, backend: str) -> None:
    if BACKENDS[backend] != "cuda" or operator.why_absent(backend) is not None:
        pytest.skip(f"{backend}: {operator.why_absent(backend) or 'interpreted here'}")
    case = operator.cases[1]
    inputs = _on_gpu(operator.inputs(**case, seed=0))
    operator(**inputs, backend=backend)  # compiles, allocates
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = operator(**inputs, backend=backend)
    fresh = operator.inputs(**case, seed=1)
    for name, value in inputs.items():
        _overwrite(value, fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    expected = operator(**fresh, backend="reference")
    for got, want in zip(_tensors(outputs), _tensors(expected), strict=True):
        tolerance = (operator.tolerance or {}).get(torch.float32, 0.0)
        atol = tolerance * float(want.double().nan_to_num(0, 0, 0).abs().max()) if tolerance else 0
        torch.testing.assert_close(got, want, rtol=0, atol=atol, equal_nan=True)
    for name in operator.mutates:
        for got, want in zip(_tensors(inputs[name]), _tensors(fresh[name]), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
