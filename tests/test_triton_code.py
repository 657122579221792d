"""Triton kernels compiled for GPUs that are not here: each keeps its budget of registers, shared
memory and occupancy, spills nothing, and holds the instructions that make it fast.

Compiling needs processes without `TRITON_INTERPRET`: `triton_static.py` and `triton_planted.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from triton_budgets import BUDGETS, SINCE_TRITON_3_9, VARIANTS, Budget, budget_of

from specdec_kernels.registry import OPS

CPU_ONLY = (
    "packed_linear", "rms_norm", "rope", "before_attention", "after_attention", "layer_stack",
)  # fmt: skip
"""What PyTorch does well on GPUs, or compiled."""

TESTS = Path(__file__).resolve().parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Bytes of shared memory that a block can have; for sm_80 that of its smaller sisters, sm_86 on."""

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.xdist_group("triton-code"),  # compiled once for all
]


def _run(*command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *command],
        env=environment, capture_output=True, text=True, cwd=TESTS, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "FP_FUSION" not in result.stderr, "Triton 3.9 warns of launches that leave it open"
    return result.stdout


def _static(*arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _run("triton_static.py", *arguments).splitlines()]


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """One per kernel, call, target and alignment."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        parts = pool.map(lambda target: _static("--json", "--target", target), TARGETS)
        return [record for part in parts for record in part]


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    """What `triton_static` says of kernels with known faults."""
    found: dict[str, Any] = json.loads(_run("triton_planted.py"))
    return found


def _named(record: dict[str, Any]) -> str:
    return f"{record['kernel']} {record['call']}"


def test_nothing_spills_on_any_target(records: list[dict[str, Any]]) -> None:
    assert {record["target"] for record in records} == set(TARGETS)
    assert {record["op"] for record in records} == set(OPS) - {*CPU_ONLY}
    spilling = [r for r in records if r["spills"] or r["counts"]["local"]]
    assert [(_named(r), r["target"], r["is_aligned"], r["spills"]) for r in spilling] == []


def test_shared_memory_fits_every_device(records: list[dict[str, Any]]) -> None:
    large = [r for r in records if r["shared"] > SHARED[r["target"]]]
    assert [(_named(r), r["target"], r["shared"]) for r in large] == []


def test_draws_are_not_contracted(records: list[dict[str, Any]]) -> None:
    """A multiplication fused with an addition would change the bits of scores and noise."""
    nvidia = [r for r in records if r["target"].startswith("sm_")]
    fused = {r["op"]: 0 for r in nvidia}
    for record in nvidia:
        fused[record["op"]] += record["contracted"]
    assert fused["sample"] == fused["verify"] == 0 < fused["tree_attention"]


def test_every_kernel_has_a_budget_and_every_budget_a_kernel(
    records: list[dict[str, Any]],
) -> None:
    assert {_named(record) for record in records} == set(BUDGETS) >= set(SINCE_TRITON_3_9)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_kernel_keeps_its_budget(name: str, records: list[dict[str, Any]]) -> None:
    mine = [record for record in records if _named(record) == name]
    assert {record["target"] for record in mine} == set(TARGETS)
    for record in mine:
        problems = list(_problems(record, budget_of(name)))
        assert not problems, f"{record['target']} {record['is_aligned']=}: {'; '.join(problems)}"


def _problems(record: dict[str, Any], budget: Budget) -> list[str]:
    registers = budget.registers if record["is_aligned"] else budget.unaligned_registers
    if record["target"].startswith("gfx"):
        registers = budget.amd_registers
    found = []
    if record["registers"] > registers:
        found.append(f"{record['registers']} registers, {registers} allowed")
    if record["shared"] > budget.shared:
        found.append(f"{record['shared']} bytes of shared memory, {budget.shared} allowed")
    is_nvidia = record["target"].startswith("sm_")
    if is_nvidia and record["is_aligned"] and record["occupancy"] < budget.occupancy:
        found.append(f"occupancy {record['occupancy']:.2f}, at least {budget.occupancy} wanted")
    found += [
        f"no {group} instruction"
        for group in budget.needs
        if not record["counts"][group] and (record["is_aligned"] or group != "load128")
    ]
    return found


def test_sizes_that_change_from_step_to_step_do_not_recompile() -> None:
    found = {row["op"]: row["variants"] for row in _static("--variants")}
    assert found == VARIANTS


def test_the_inspection_sees_planted_faults(planted: dict[str, Any]) -> None:
    for target, found in planted["records"].items():
        assert found["aligned"]["counts"]["load128"] > 0, target
        assert found["unaligned"]["counts"]["load128"] == 0 < found["unaligned"]["counts"]["load"]
        assert found["matrix"]["counts"]["tensor"] > 0 == found["aligned"]["counts"]["tensor"]
        assert found["spilling"]["spills"] > 0 < found["spilling"]["counts"]["local"]
    for read, answer in planted["reads"].items():
        assert "a launcher reads a tensor on the host" in answer, read


def test_no_launch_on_cpu_tensors_passes_in_silence() -> None:
    _run("-c", _REFUSALS, *CPU_ONLY)


_REFUSALS = """
import sys
from importlib import import_module
from specdec_kernels.registry import OPS
for name, operator in OPS.items():
    if name in sys.argv[1:]:
        continue
    inputs = operator.inputs(**operator.cases[1])
    module = import_module(f"specdec_kernels.triton_kernels.{name}")
    for launch in (operator.backends["triton"], getattr(module, f"{name}_triton")):
        try:
            launch(**inputs)
        except ValueError as error:
            assert "runs on cuda tensors, got cpu" in str(error), error
        else:
            raise SystemExit(f"{name}: a launch on CPU tensors passed")
"""
