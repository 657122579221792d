"""What a GPU must show of the operators, written for any device: the CPU runs it too, with calls of
its own in place of graphs and streams, so that nothing but these is new on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.registry import Op

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Machine:
    """A device, and how its work is recorded and queued.

    Attributes:
        capture: runs a call, or records it; its outputs, and what fills them anew.
        side_stream: a queue of work other than the default one, while the context lives.
        delay: work that keeps the current queue busy for a while.
    """

    device: str
    capture: Callable[[Call], tuple[Any, Call]]
    side_stream: Callable[[], AbstractContextManager[Any]]
    delay: Call
    synchronize: Call


def _capture_graph(call: Call) -> tuple[Any, Call]:
    call()  # compiles, allocates
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return outputs, graph.replay


def _record_call(call: Call) -> tuple[Any, Call]:
    outputs = call()
    return outputs, lambda: overwrite(outputs, call())


GPU = Machine(
    "cuda",
    _capture_graph,
    lambda: torch.cuda.stream(torch.cuda.Stream()),
    partial(torch.cuda._sleep, 10**8),
    torch.cuda.synchronize,
)
HOST = Machine("cpu", _record_call, nullcontext, lambda: None, lambda: None)


def copied(value: Any, device: str) -> Any:
    """Tensors, also those in lists, as copies on the device."""
    if isinstance(value, list):
        return [copied(item, device) for item in value]
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def overwrite(target: Any, source: Any) -> None:
    """Give tensors, also those in lists, the values of others."""
    if isinstance(target, (list, tuple)):
        for one, other in zip(target, source, strict=True):
            overwrite(one, other)
    elif isinstance(target, Tensor):
        target.copy_(source)


def replays_on_other_data(operator: Op, backend: str, machine: Machine) -> None:
    """A captured call, replayed after its inputs have changed, gives what the reference does."""
    case = operator.cases[1]
    inputs = {k: copied(v, machine.device) for k, v in operator.inputs(**case, seed=0).items()}
    outputs, replay = machine.capture(lambda: operator(**inputs, backend=backend))
    fresh = operator.inputs(**case, seed=1)
    for name, value in inputs.items():
        overwrite(value, fresh[name])
    replay()
    machine.synchronize()
    _compare(operator, outputs, inputs, fresh)


def waits_for_its_own_stream(operator: Op, backend: str, machine: Machine) -> None:
    """A call on another stream sees what that stream wrote before it, however late."""
    case = operator.cases[1]
    inputs = {k: copied(v, machine.device) for k, v in operator.inputs(**case, seed=0).items()}
    operator(**inputs, backend=backend)  # compiles
    fresh = operator.inputs(**case, seed=1)
    late = {k: copied(v, machine.device) for k, v in fresh.items()}
    machine.synchronize()
    with machine.side_stream():
        machine.delay()
        for name, value in inputs.items():
            overwrite(value, late[name])
        outputs = operator(**inputs, backend=backend)
    machine.synchronize()
    _compare(operator, outputs, inputs, fresh)


def runs_on_an_empty_batch(operator: Op, backend: str, machine: Machine) -> None:
    """No rows, no error, and results of the right shapes."""
    inputs = operator.inputs(**operator.cases[0])  # in whose shapes the batch, if any, comes first
    letters = {spec.name: spec.dims[0] for spec in operator.shapes}
    for name, value in inputs.items():
        if letters.get(name) in ("B", "R", "C") and value is not None:
            inputs[name] = [v[:0] for v in value] if isinstance(value, list) else value[:0]
    mine = {k: copied(v, machine.device) for k, v in inputs.items()}
    got, want = operator(**mine, backend=backend), operator(**inputs, backend="reference")
    machine.synchronize()
    assert [t.shape for t in _tensors(got)] == [t.shape for t in _tensors(want)]


def _compare(operator: Op, outputs: Any, inputs: dict[str, Any], fresh: dict[str, Any]) -> None:
    """Outputs, and arguments written in place, are those of the reference on `fresh`."""
    expected = operator(**fresh, backend="reference")
    pairs = [(outputs, expected), *((inputs[name], fresh[name]) for name in operator.mutates)]
    tolerance = (operator.tolerance or {}).get(torch.float32, 0.0)
    for ours, theirs in pairs:
        for got, want in zip(_tensors(ours), _tensors(theirs), strict=True):
            largest = float(want.double().nan_to_num(0, 0, 0).abs().max()) if want.numel() else 0.0
            atol = tolerance * largest if want.is_floating_point() else 0.0
            torch.testing.assert_close(got, want, rtol=0, atol=atol, equal_nan=True)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values.cpu()]
    return [t for v in values for t in _tensors(v)] if isinstance(values, (list, tuple)) else []
