"""Operators on a GPU: each result checked first, then timed on the device itself, beside the least
time that the work takes there and beside what else would do it.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ..registry import INTERPRETS_TRITON, OPS
from .baselines import Inputs, Run
from .cases import CASES, BenchCase, copy_to
from .gpu_baselines import GPU_BASELINES
from .machine import describe_machine
from .ops import baseline_agrees, middle, operator_agrees, prepare_op, run_reference
from .roofline import Work, published, roofline_us

BACKENDS = ("cuda", "triton")

# Filled before each call, a few times.
_FILLED_BYTES, _FILLS = 256 * 2**20, 8
_MIN_ROUNDS, _WARM_ROUNDS = 10, 3
_SECONDS, _QUICK_SECONDS = 0.5, 0.1

Clock = Callable[[Callable[[], Any]], float]
"""Runs a call; µs that it took."""


class DeviceClock:
    """Times a call by events of the device.

    Before it, a buffer larger than any cache of a GPU is filled a few times: no operand stays in a
    cache, and the device is busy while the host queues the call, so that the time is the device's
    alone. A call that waits for the device pays for that.

    Args:
        device: where the buffer lies.
        event: makes what times as a `torch.cuda.Event(enable_timing=True)` does; None makes these.
        num_bytes: of the buffer.
    """

    def __init__(
        self,
        device: str = "cuda",
        event: Callable[[], Any] | None = None,
        num_bytes: int = _FILLED_BYTES,
    ) -> None:
        self._event = event or partial(torch.cuda.Event, enable_timing=True)
        self._buffer = torch.empty(num_bytes, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        start, end = self._event(), self._event()
        for _ in range(_FILLS):
            self._buffer.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3


class Contender(NamedTuple):
    """A backend or a baseline at a case."""

    name: str
    prepare: Callable[[Inputs], Callable[[], Any]]
    agrees: Callable[[Inputs, Run, str], bool]


def run_gpu(
    ops: Sequence[str] | None = None,
    *,
    quick: bool = False,
    device: str = "cuda",
    backends: Sequence[str] = BACKENDS,
    clock: Clock | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Check and time the bench cases of some operators on a GPU.

    Args:
        ops: operator names; None means all.
        quick: small sizes and short repeats.
        device: where the tensors lie.
        backends: those of them that an operator has are timed.
        clock: None is a `DeviceClock`.
        progress: called with the name of each case when it is done.

    Returns:
        {"machine": see `describe_machine`, "rates", "rows", "failures", "absent"}. A row holds op,
        case, contender (a backend or a baseline), us (median), spread (interquartile range /
        median), gbs (least bytes / time, in 10^9 per second), roofline (least time / time) and
        against (time / time of each backend timed at the case). The least time is at `rates`, the
        published ones of this GPU where they are known, else measured ones. `failures` holds what
        was wrong or raised, and was not timed: op, case, contender, error. `absent` says what could
        not run, and why.

    Raises:
        ValueError: an unknown operator, no CUDA device, Triton interpreted.
    """
    _check(ops, device, backends)
    machine = describe_machine(device)
    record: dict[str, Any] = {"machine": machine, "rates": _rates(machine)}
    record |= {"rows": [], "failures": [], "absent": _absent(ops, backends)}
    clock = clock or DeviceClock(device)
    failures: tuple[type[Exception], ...] = (RuntimeError, ValueError, *_triton_errors())
    for case in gpu_cases(ops, quick):
        reference = run_reference(case, inputs := case.inputs(device), device)
        work = case.work(case.inputs(device), reference.outputs)
        timed: list[tuple[str, list[float]]] = []
        for contender in _contenders(case, backends):
            try:
                if not contender.agrees(inputs, reference, device):
                    raise RuntimeError("the result differs from the reference's")
                seconds = _QUICK_SECONDS if quick else _SECONDS
                timed.append((contender.name, _samples(contender, inputs, device, clock, seconds)))
            except failures as error:
                where = {"op": case.op, "case": case.name, "contender": contender.name}
                record["failures"].append({**where, "error": _first_line(error)})
        record["rows"] += _rows(case, work, timed, record["rates"], backends)
        if progress is not None:
            progress(f"{case.op} {case.name}")
    return record


def gpu_cases(ops: Sequence[str] | None, quick: bool) -> Iterator[BenchCase]:
    """The bench's cases, with the baselines that are for a GPU."""
    for case in CASES:
        if (ops is None or case.op in ops) and (case.is_quick or not quick):
            others = [
                other
                for other in GPU_BASELINES.get(case.op, ())
                if other not in case.baselines and other.why_absent() is None
            ]
            yield replace(case, baselines=(*case.baselines, *others))


def _check(ops: Sequence[str] | None, device: str, backends: Sequence[str]) -> None:
    if unknown := sorted(set(ops or ()) - OPS.keys()):
        raise ValueError(f"bench: unknown operator {unknown[0]!r}; known: {', '.join(OPS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: no CUDA device; on a CPU: specdec bench ops")
    if "triton" in backends and INTERPRETS_TRITON:
        raise ValueError("bench: interpreted kernels are not timed; unset TRITON_INTERPRET")


def _rates(machine: dict[str, Any]) -> dict[str, Any]:
    gpu = published(machine["gpu"] or "")
    if gpu is None:
        return {name: machine[name] for name in ("bandwidth_gbs", "bf16_gflops")} | {
            "source": "measured here: a reduction, a matrix product"
        }
    return {
        "bandwidth_gbs": gpu.bandwidth_gbs,
        "bf16_gflops": gpu.bf16_gflops,
        "source": gpu.source,
    }


def _absent(ops: Sequence[str] | None, backends: Sequence[str]) -> dict[str, str]:
    """Contender -> why it cannot run."""
    chosen = [op for op in OPS.values() if ops is None or op.name in ops]
    reasons = {f"{op.name} {b}": op.why_absent(b) for op in chosen for b in backends}
    for op in chosen:
        reasons |= {b.name: b.why_absent() for b in GPU_BASELINES.get(op.name, ())}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _contenders(case: BenchCase, backends: Sequence[str]) -> Iterator[Contender]:
    operator = OPS[case.op]
    for backend in backends:
        if operator.why_absent(backend) is None:
            prepare = partial(prepare_op, operator, backend)
            yield Contender(backend, prepare, partial(operator_agrees, case, backend))
    for baseline in case.baselines:
        yield Contender(baseline.name, baseline.prepare, partial(baseline_agrees, baseline))


def _samples(
    contender: Contender, inputs: Inputs, device: str, clock: Clock, seconds: float
) -> list[float]:
    """µs of each call, after some that are not counted."""
    held = copy_to(inputs, device)
    call = contender.prepare(held)
    samples: list[float] = []
    end = float("inf")
    while len(samples) < _WARM_ROUNDS + _MIN_ROUNDS or time.perf_counter() < end:
        if "lengths" in held:
            held["lengths"].copy_(inputs["lengths"])  # `commit` advances them
        samples.append(clock(call))
        if len(samples) == _WARM_ROUNDS:
            end = time.perf_counter() + seconds
    return samples[_WARM_ROUNDS:]


def _rows(
    case: BenchCase,
    work: Work,
    timed: Sequence[tuple[str, list[float]]],
    rates: dict[str, Any],
    backends: Sequence[str],
) -> Iterator[dict[str, Any]]:
    least_us = roofline_us(work, rates["bandwidth_gbs"], rates["bf16_gflops"])
    medians = {name: middle(samples) for name, samples in timed}
    for name, (us, spread) in medians.items():
        yield {
            "op": case.op,
            "case": case.name,
            "contender": name,
            "us": round(us, 2),
            "spread": spread,
            "gbs": round(work.num_bytes / us / 1e3, 2),
            "roofline": round(least_us / us, 4),
            "against": {b: round(us / medians[b][0], 2) for b in backends if b in medians},
        }


def _triton_errors() -> tuple[type[Exception], ...]:
    """What a kernel raises that does not fit the GPU; no RuntimeError."""
    if importlib.util.find_spec("triton") is None:
        return ()
    return (importlib.import_module("triton.runtime.errors").TritonError,)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
