"""pytest-benchmark over the table of `specdec bench ops`: operator x backend or baseline x case."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import pytest

from specdec_kernels.bench.cases import CASES, BenchCase
from specdec_kernels.bench.ops import check_case, cold_copies, prepare_op, present
from specdec_kernels.registry import BACKENDS, OPS


def _contenders() -> list[Any]:
    rows = []
    for case in CASES:
        for backend in BACKENDS:
            if BACKENDS[backend] in ("any", "cpu") and OPS[case.op].why_absent(backend) is None:
                prepare = partial(prepare_op, OPS[case.op], backend)
                rows.append(_row(case, backend, backend, prepare))
        for baseline in present(case.baselines):
            rows.append(_row(case, baseline.name.replace(" ", "_"), None, baseline.prepare))
    return rows


def _row(case: BenchCase, contender: str, backend: str | None, prepare: Callable[..., Any]) -> Any:
    return pytest.param(case, backend, prepare, id=f"{case.op}-{contender}-{case.name}")


@pytest.mark.parametrize(("case", "backend", "prepare"), _contenders())
def test_speed(benchmark: Any, case: BenchCase, backend: str | None, prepare: Any) -> None:
    reference = check_case(case, backend)
    benchmark.group = f"{case.op} {case.name}"
    inputs = case.inputs()
    copies = cycle(cold_copies(inputs, case.work(inputs, reference.outputs)))

    def setup() -> tuple[tuple[Callable[[], Any]], dict[str, Any]]:
        held = next(copies)
        if "lengths" in held:
            held["lengths"].copy_(inputs["lengths"])  # `commit` advances them
        return (prepare(held),), {}

    benchmark.pedantic(lambda call: call(), setup=setup, rounds=20, warmup_rounds=1)
