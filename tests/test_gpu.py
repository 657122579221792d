"""What only a GPU can show: operators captured in CUDA graphs and replayed on other data, on other
streams and devices, on tensors larger than 32 bits count; and the bench, where nothing may differ.

The same checks run on the CPU, where graphs and streams are plain calls. On a GPU,
`tests/test_ops.py` runs every case of the GPU backends as well, with the same mark.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_emulated
import pytest
import torch
from gpu_checks import (
    GPU,
    HOST,
    Machine,
    copied,
    replays_on_other_data,
    runs_on_an_empty_batch,
    waits_for_its_own_stream,
)

from specdec_kernels.bench.gpu import run_gpu
from specdec_kernels.registry import BACKENDS, OPS, Op

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU_BACKENDS = ["triton", "cuda"]
MACHINES = [
    *(pytest.param(GPU, backend, id=f"gpu-{backend}", marks=ON_GPU) for backend in GPU_BACKENDS),
    *(pytest.param(HOST, b, id=f"host-{b}") for b in ("cpu", cuda_emulated.BACKEND)),
]
CHECKS = [replays_on_other_data, waits_for_its_own_stream, runs_on_an_empty_batch]


def _present(backend: str, device: str) -> list[Op]:
    """Operators that the backend runs on this kind of device here."""
    is_there = BACKENDS[backend] == device
    return [op for op in OPS.values() if is_there and op.why_absent(backend) is None]


def _runs() -> list[Any]:
    return [
        pytest.param(op, *row.values, id=f"{op.name}-{row.id}", marks=row.marks)
        for row in MACHINES
        for op in _present(row.values[1], row.values[0].device)
    ]


@pytest.mark.parametrize(("operator", "machine", "backend"), _runs())
@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_operators_on_a_device(
    check: Callable[[Op, str, Machine], None], operator: Op, machine: Machine, backend: str
) -> None:
    check(operator, backend, machine)


@pytest.mark.parametrize("check", CHECKS[:2], ids=[check.__name__ for check in CHECKS[:2]])
def test_the_checks_see_results_of_other_data(
    check: Callable[[Op, str, Machine], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a kernel on the wrong stream: it has read the inputs before they changed."""
    operator = OPS["tree_mask"]
    stale = operator.reference(**operator.inputs(**operator.cases[1], seed=0))
    monkeypatch.setitem(operator.backends, "cpu", lambda **_: stale)
    with pytest.raises(AssertionError):
        check(operator, "cpu", HOST)


@pytest.mark.parametrize(("machine", "backend"), MACHINES)
def test_a_mistake_is_an_exception_and_the_next_call_works(machine: Machine, backend: str) -> None:
    for name, wrong, rule in (
        ("topk_logprobs", {"k": 0}, r"topk_logprobs: k must be in \[1, V\]"),
        ("build_tree", {"max_nodes": 0}, r"build_tree: max_nodes must be >= 1, got 0"),
        ("tree_mask", {"num_nodes": torch.zeros(9, dtype=torch.int32)}, r"tree_mask: num_nodes"),
    ):
        operator = OPS[name]
        inputs = operator.inputs(**operator.cases[1])
        mine: dict[str, Any] = {k: copied(v, machine.device) for k, v in inputs.items()}
        with pytest.raises(ValueError, match=rule):
            operator(**{**mine, **copied_values(wrong, machine)}, backend=backend)
        operator(**mine, backend=backend)
        machine.synchronize()


def copied_values(values: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """Tensors on the machine's device."""
    return {name: copied(value, machine.device) for name, value in values.items()}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="less than two CUDA devices")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_tensors_of_another_device_than_the_current_one(backend: str) -> None:
    other = Machine("cuda:1", _call_twice, *_rest_of(GPU))
    for operator in _present(backend, "cuda"):
        replays_on_other_data(operator, backend, other)


def _call_twice(call: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
    return HOST.capture(call)


def _rest_of(machine: Machine) -> tuple[Any, Any, Any]:
    return machine.side_stream, machine.delay, machine.synchronize


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_rows_beyond_32_bit_offsets(backend: str) -> None:
    operator = OPS["topk_logprobs"]
    memory = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    logits = memory.as_strided((2, 1000), (2**31, 1))
    logits[1] = torch.randn(1000, device="cuda").bfloat16()
    tokens = operator(logits, 5, backend=backend)[1]
    assert tokens[0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(tokens[1].cpu(), operator(logits[1:].cpu(), 5, backend="reference")[1][0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_bench_finds_nothing_wrong() -> None:
    record = run_gpu(["tree_mask", "build_tree", "write_kv"], quick=True)
    assert not record["failures"]
    assert {"triton", "cuda"} <= {row["contender"] for row in record["rows"]}
    assert all(0 < row["us"] < 1e6 and 0 < row["roofline"] < 1.1 for row in record["rows"])
