"""CUDA kernels on the emulator under AddressSanitizer, UndefinedBehaviorSanitizer and
ThreadSanitizer: clean; and kernels with a planted fault, each found by name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import cuda_emulated
import pytest
from sanitized import KERNELS, TOOLS, build_mutant, program_of, programs, run

pytestmark = pytest.mark.xdist_group("sanitizers")  # one worker builds for all

__all__ = ["programs"]  # a fixture

OPERATORS = (
    "tree_mask", "write_kv", "commit", "topk_logprobs", "build_tree", "tree_attention", "sample",
    "verify",
)  # fmt: skip

FAULTS = [
    # planted fault, tool, what is reported
    ("missing_barrier", "thread", r"data race .* in missing_barrier"),
    ("missing_warp_barrier", "thread", r"data race .* in missing_warp_barrier"),
    ("missing_wait", "thread", r"data race(?s:.)*pipeline<false, true>"),
    ("write_after_read", "thread", r"data race(?s:.)*pipeline<true, false>"),
    ("blocks_race", "thread", r"data race .* in blocks_race"),
    ("wide_store_race", "thread", r"data race .* in wide_store_race"),
    ("global_out_of_bounds", "address", r"heap-buffer-overflow .* in global_out_of_bounds"),
    ("shared_out_of_bounds", "address", r"use-after-poison .* in shared_out_of_bounds"),
    ("misaligned_pointer", "address", r"planted\.cpp:\d+:\d+: runtime error: .* misaligned"),
    ("copy_out_of_bounds", "address", r"planted\.cpp:\d+: cp\.async: reads outside"),
    ("misaligned_copy", "address", r"planted\.cpp:\d+: cp\.async: \S+ is not aligned"),
    ("misaligned_load", "address", r"planted\.cpp:\d+: global access: \S+ is not aligned"),
    ("copy_under_way_at_the_end", "address", r"thread ends with cp\.async under way"),
    ("divergent_barrier", "address", r"__syncthreads diverges: other threads wait at"),
    ("ended_before_a_barrier", "address", r"__syncthreads after 32 threads ended|others wait"),
    ("lane_outside_of_its_mask", "address", r"calling lane is not in mask 0000ffff \[block 0,0,0"),
    ("shuffle_from_outside_of_the_mask", "address", r"lane 20, which is read, is not in mask"),
    ("missing_lanes", "address", r"__shfl_xor_sync: lane \d+ of the mask has ended"),
    (
        "different_warp_operations",
        "address",
        r"__shfl_sync: .* in __any_sync|__any_sync: .* in __s",
    ),
    ("warp_waits_for_a_barrier", "address", r"deadlock: 64 threads never finish"),
    ("missing_cluster_barrier", "thread", r"data race(?s:.)*cluster_exchange<false>"),
    ("divergent_cluster_barrier", "address", r"cluster barrier diverges: other threads wait at"),
    (
        "block_ended_before_a_cluster_barrier",
        "address",
        r"cluster barrier after threads of the cluster ended|others wait in a cluster barrier",
    ),
    # of two warps: 31 turns beyond the first, and 7 in each of 4
    ("bank_conflicts_of_stores", "address", r"emulator: 62 bank conflicts"),
    ("bank_conflicts_of_copies", "address", r"emulator: 56 bank conflicts"),
    ("too_much_shared_memory", "address", r"50176 bytes of shared memory, of which 49152 are"),
]

SOUND = {
    "with_barrier": 2016,
    "with_warp_barrier": 2016,
    "pipeline": 32640,
    "last_block": 56,
    "cluster_exchange": 12,
    "padded_columns": 2016,
}
"""Kernels without a fault -> the sum of what they compute."""


def test_one_worker_has_all_tests_that_build(request: pytest.FixtureRequest) -> None:
    """Two workers would build at once, and one of them link what the other is writing."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@sanitizers")


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("tool", "order"),
    # ThreadSanitizer finds a race in any order, and takes seconds.
    [
        ("address", "forward"),
        ("address", "reverse"),
        ("address", "random:1"),
        ("thread", "random:1"),
    ],
)
def test_kernels_are_clean(tool: str, operator: str, order: str) -> None:
    status, output = run(program_of(tool), operator, order)
    assert (status, output) == (0, "done\n"), output[:4000]


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("fault", "tool", "report"), FAULTS, ids=[f[0] for f in FAULTS])
def test_a_planted_fault_is_found(fault: str, tool: str, report: str) -> None:
    status, output = run(program_of(tool), fault, "reverse")
    assert status != 0
    assert re.search(report, output), output[:4000]


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_reported_where_there_is_no_fault(name: str, tool: str) -> None:
    for order in cuda_emulated.ORDERS:
        assert run(program_of(tool), name, order) == (0, f"sum {SOUND[name]}\ndone\n")


@pytest.mark.usefixtures("programs")
def test_what_was_not_waited_for_or_written_is_poison() -> None:
    """Without a tool, a fault shows in the result: poison is -1 as an integer."""
    for name, result in (("missing_wait", -256), ("uninitialised_shared", 72)):
        assert run(program_of("address"), name, "forward") == (0, f"sum {result}\ndone\n")


BARRIERS = [
    pytest.param(operator, source, number, id=f"{source}-{number}")
    for operator, source in (
        ("build_tree", "build_tree.cu"),
        ("tree_mask", "tree_mask.cu"),
        ("topk_logprobs", "topk_logprobs.cu"),
        ("topk_logprobs", "ranked.cuh"),
        ("sample", "group.cuh"),
        ("verify", "acceptance.cuh"),
        ("verify", "node_laws.cuh"),
        ("tree_attention", "attention_mma.cuh"),
        ("tree_attention", "attention_plain.cuh"),
    )
    for number, line in enumerate((KERNELS / source).read_text("utf-8").splitlines())
    if line.strip().startswith(("__syncthreads();", "__syncwarp();"))
]


@pytest.mark.exhaustive
@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("operator", "source", "number"), BARRIERS)
def test_a_kernel_without_one_of_its_barriers_is_reported(
    operator: str, source: str, number: int, tmp_path: Path
) -> None:
    """Also that the shapes above need every barrier."""

    def remove(kernels: Path) -> None:
        lines = (kernels / source).read_text("utf-8").splitlines()
        lines[number] = ""
        (kernels / source).write_text("\n".join(lines), "utf-8")

    _, output = run(build_mutant("thread", operator, remove, tmp_path), operator, "random:1")
    assert "ThreadSanitizer: data race" in output
