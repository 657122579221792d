"""Time the operators beside what a HuggingFace user runs instead, and the machine's own limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from ..registry import BACKENDS, INTERPRETS_TRITON, OPS, Op
from .baselines import Baseline, Inputs, Run
from .cases import CASES, BenchCase, copy_to
from .machine import describe_machine, measure_rates, synchronize
from .roofline import Work, num_bytes, roofline_us

# A decoder streams its weights between two calls: no operand stays in a cache.
_COLD_BYTES = 128 * 2**20
_MOST_BYTES = 2**30
_MAX_COPIES = 2048
_MIN_ROUNDS = 5
# Calls of one contender in a row: one alone would be timed on the caches that the others leave, its
# code gone from them.
_BURST, _BURST_SECONDS = 8, 0.02
_SECONDS, _QUICK_SECONDS = 1.0, 0.1

Prepare = Callable[[Inputs], Callable[[], Any]]


def run_ops(
    ops: Sequence[str] | None = None,
    *,
    backend: str | None = None,
    quick: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Check and time each bench case of some operators.

    Per case: the result is compared with the reference's (so is the baseline's, where it draws no
    random numbers), then operator and baselines are timed in turn, a few calls each, on operands
    that no cache holds.

    Args:
        ops: operator names; None means all.
        backend: as in a call of an operator; None is the automatic choice.
        quick: small sizes and short repeats.
        progress: called with each row as soon as it is measured.

    Returns:
        {"machine": see `describe_machine`, its rates the best of those measured before and after
        each operator, "rows": [one dict per case and baseline], "absent": {baseline: why it could
        not run}}. A row holds
        op, case, backend, us (median), spread (interquartile range / median), floor_us (least
        traffic / measured bandwidth, or operations / measured rate where larger), num_bytes and
        num_flops (that traffic and these operations), baseline,
        baseline_us, baseline_spread, and ratio = baseline_us / us. Times are µs per call.

    Raises:
        ValueError: an unknown operator, or a backend that cannot run one of them.
        RuntimeError: a result that differs from the reference's; nothing is timed then.
    """
    chosen = _select(ops, backend)
    device = "cuda" if BACKENDS.get(backend or "") == "cuda" else "cpu"
    machine = describe_machine(device)
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    cases = [case for case in CASES if case.op in chosen and (case.is_quick or not quick)]
    seconds = _QUICK_SECONDS if quick else _SECONDS
    for _, cases_of_op in groupby(cases, key=lambda case: case.op):
        for case in cases_of_op:
            reasons = {baseline.name: baseline.why_absent() for baseline in case.baselines}
            absent |= {name: reason for name, reason in reasons.items() if reason is not None}
            for row in _measure(case, backend, device, seconds):
                rows.append(row)
                if progress is not None:
                    progress(row)
        _raise_rates(machine, device)
    for row in rows:
        work = Work(row["num_bytes"], row["num_flops"])
        floor = roofline_us(work, machine["bandwidth_gbs"], machine["bf16_gflops"])
        row["floor_us"] = round(floor, 2)
    return {"machine": machine, "rows": rows, "absent": absent}


def _raise_rates(machine: dict[str, Any], device: str) -> None:
    """On a shared machine both rates halve and double within minutes, and a floor is what the best
    of them allows.
    """
    for name, rate in measure_rates(device).items():
        machine[name] = max(machine[name], rate)


def check_case(case: BenchCase, backend: str | None, device: str = "cpu") -> Run:
    """Run a case once by the operator, the reference and the baselines; the reference's run.

    Raises:
        RuntimeError: one of them did something else than the reference.
    """
    inputs = case.inputs(device)
    reference = run_reference(case, inputs, device)
    if not operator_agrees(case, backend, inputs, reference, device):
        raise RuntimeError(f"{case.op} {case.name}: the result differs from the reference's")
    for baseline in present(case.baselines):
        if not baseline_agrees(baseline, inputs, reference, device):
            raise RuntimeError(f"{case.op} {case.name}: {baseline.name} differs from the reference")
    return reference


def present(baselines: Sequence[Baseline]) -> list[Baseline]:
    """Those that can run here."""
    return [baseline for baseline in baselines if baseline.why_absent() is None]


def run_reference(case: BenchCase, inputs: Inputs, device: str) -> Run:
    """The reference on a copy of the inputs."""
    return _run(partial(prepare_op, OPS[case.op], "reference"), inputs, device)


def operator_agrees(
    case: BenchCase, backend: str | None, inputs: Inputs, reference: Run, device: str
) -> bool:
    """Whether a backend does what the reference did, within the operator's tolerance."""
    operator = OPS[case.op]
    return _same(operator, _run(partial(prepare_op, operator, backend), inputs, device), reference)


def baseline_agrees(baseline: Baseline, inputs: Inputs, reference: Run, device: str) -> bool:
    """Whether a baseline does what the reference did; true where it draws its own numbers."""
    run = _run(baseline.prepare, inputs, device)
    return baseline.agrees is None or baseline.agrees(run, reference)


def prepare_op(operator: Op[Any, Any], backend: str | None, inputs: Inputs) -> Callable[[], Any]:
    """The call to time: the public entry point."""
    return partial(operator, **inputs, backend=backend)


def cold_copies(inputs: Inputs, work: Work, device: str = "cpu") -> list[Inputs]:
    """Enough copies of one call's inputs that using them in turn finds none of them in a cache, as
    far as `_MOST_BYTES` and `_MAX_COPIES` allow: calls that touch little of their inputs get less.

    What counts is what a call reads and writes: of a tree's logits, only the rows on the path.
    """
    wanted = 2 + _COLD_BYTES // max(1, work.num_bytes)
    fitting = 2 + _MOST_BYTES // max(1, num_bytes(*inputs.values()))
    return [copy_to(inputs, device) for _ in range(min(_MAX_COPIES, wanted, fitting))]


def _select(ops: Sequence[str] | None, backend: str | None) -> set[str]:
    chosen = set(OPS) if ops is None else set(ops)
    if unknown := sorted(chosen - OPS.keys()):
        raise ValueError(f"bench: unknown operator {unknown[0]!r}; known: {', '.join(OPS)}")
    if backend == "triton" and INTERPRETS_TRITON:
        raise ValueError("bench: interpreted kernels are not timed; unset TRITON_INTERPRET")
    for name in sorted(chosen):
        if backend is not None and (reason := OPS[name].why_absent(backend)) is not None:
            raise ValueError(f"bench: backend {backend!r} cannot run {name}: {reason}")
    return chosen


def _measure(
    case: BenchCase, backend: str | None, device: str, seconds: float
) -> list[dict[str, Any]]:
    reference = check_case(case, backend, device)
    inputs = case.inputs(device)
    baselines = present(case.baselines)
    prepares: list[Prepare] = [
        partial(prepare_op, OPS[case.op], backend),
        *(baseline.prepare for baseline in baselines),
    ]
    work = case.work(inputs, reference.outputs)
    copies = cold_copies(inputs, work, device)
    own, *others = _time_in_turn(prepares, copies, device, seconds)
    us, spread = middle(own)
    return [
        {
            "op": case.op,
            "case": case.name,
            "backend": _backend_name(OPS[case.op], backend),
            "us": round(us, 2),
            "spread": spread,
            "num_bytes": work.num_bytes,
            "num_flops": work.num_flops,
            "baseline": baseline.name,
            "baseline_us": round(other_us, 2),
            "baseline_spread": other_spread,
            "ratio": round(other_us / us, 2),
        }
        for baseline, (other_us, other_spread) in zip(baselines, map(middle, others), strict=True)
    ]


def middle(samples: Sequence[float]) -> tuple[float, float]:
    """Median, and interquartile range / median."""
    low, middle, high = quantiles(samples, n=4)
    return middle, round((high - low) / middle, 3)


def _time_in_turn(
    prepares: Sequence[Prepare], copies: Sequence[Inputs], device: str, seconds: float
) -> list[list[float]]:
    """µs of each call, for each contender; the contenders take turns, a burst of calls each, and
    every call has the next copy.
    """
    samples: list[list[float]] = [[] for _ in prepares]
    lengths = copies[0]["lengths"].clone() if "lengths" in copies[0] else None
    turn, end = 0, time.perf_counter() + seconds
    while len(samples[-1]) < _MIN_ROUNDS or time.perf_counter() < end:
        for prepare, sample in zip(prepares, samples, strict=True):
            burst_end = time.perf_counter() + _BURST_SECONDS
            for _ in range(_BURST):
                inputs = copies[turn % len(copies)]
                turn += 1
                if lengths is not None:
                    inputs["lengths"].copy_(lengths)  # `commit` advances them
                call = prepare(inputs)
                synchronize(device)
                start = time.perf_counter_ns()
                call()
                synchronize(device)
                sample.append((time.perf_counter_ns() - start) / 1e3)
                if time.perf_counter() > burst_end:
                    break
    return samples


def _backend_name(operator: Op[Any, Any], backend: str | None) -> str:
    """The backend that a call on CPU tensors takes."""
    automatic = "cpu" if operator.why_absent("cpu") is None else "reference"
    return backend or os.environ.get("SPECDEC_BACKEND") or automatic


def _run(prepare: Prepare, inputs: Inputs, device: str) -> Run:
    own: Inputs = copy_to(inputs, device)
    return Run(prepare(own)(), own)


def _same(operator: Op[Any, Any], own: Run, reference: Run) -> bool:
    """Outputs and arguments written in place, within the operator's tolerance."""
    tolerance = operator.tolerance or {}
    fraction = tolerance.get(torch.bfloat16, tolerance.get(torch.float32, 0.0))
    results = [
        _tensors([run.outputs, *(run.inputs[name] for name in operator.mutates)])
        for run in (own, reference)
    ]
    return all(_close(mine, theirs, fraction) for mine, theirs in zip(*results, strict=True))


def _close(own: Tensor, reference: Tensor, fraction: float) -> bool:
    """Equal where the reference is not finite; elsewhere within a fraction of its largest value."""
    finite = reference.isfinite()
    if own.shape != reference.shape or not torch.equal(own[~finite], reference[~finite]):
        return False
    expected = reference[finite].double()
    error = (own[finite].double() - expected).abs()
    return not error.numel() or bool(error.max() <= fraction * expected.abs().max())


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _tensors(value)]
    return []
