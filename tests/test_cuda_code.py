"""The CUDA code inside the shipped library: its budget for every GPU, and that it waits for one."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from gpu_code import Code, extract_cubins, ptx_names, read_kernels

from specdec_kernels.registry import NATIVE_LIBRARY, OPS, built_with_cuda

if not built_with_cuda():
    pytest.skip("the library was built without CUDA", allow_module_level=True)

pytestmark = pytest.mark.xdist_group("cuda-code")  # disassembled once for all

ARCHITECTURES = (80, 90, 100)
OPERATORS = ("build_tree", "commit", "topk_logprobs", "tree_mask", "write_kv")


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a kernel may use on any architecture, and the least occupancy.

    Attributes:
        vectors: 128-bit loads that its code must hold.
    """

    threads: int
    registers: int
    shared: int
    occupancy: float
    vectors: int = 0


BUDGETS = {
    "build_tree_kernel": Budget(32, 64, 0, 0.5),
    "commit_finish_kernel<uint16_t>": Budget(128, 48, 0, 0.62),
    "commit_finish_kernel<uint2>": Budget(128, 48, 0, 0.62),
    "commit_finish_kernel<uint32_t>": Budget(128, 48, 0, 0.62),
    "commit_finish_kernel<uint4>": Budget(128, 56, 0, 0.56, vectors=1),
    "commit_move_kernel<uint16_t>": Budget(128, 80, 0, 0.37),
    "commit_move_kernel<uint2>": Budget(128, 88, 0, 0.31),
    "commit_move_kernel<uint32_t>": Budget(128, 80, 0, 0.37),
    "commit_move_kernel<uint4>": Budget(128, 104, 0, 0.25, vectors=8),
    "topk_large_kernel<Bfloat16>": Budget(256, 56, 1128, 0.5),
    "topk_large_kernel<Half>": Budget(256, 56, 1128, 0.5),
    "topk_large_kernel<float>": Budget(256, 56, 1128, 0.5),
    "topk_merge_kernel": Budget(256, 40, 16480, 0.75),
    "topk_segment_kernel<Bfloat16>": Budget(256, 88, 18532, 0.25, vectors=4),
    "topk_segment_kernel<Half>": Budget(256, 88, 18532, 0.25, vectors=4),
    "topk_segment_kernel<float>": Budget(256, 80, 18532, 0.37, vectors=8),
    "tree_mask_kernel": Budget(256, 32, 16384, 1.0),
    "write_kv_kernel<uint16_t>": Budget(256, 40, 0, 0.75),
    "write_kv_kernel<uint2>": Budget(256, 40, 0, 0.75),
    "write_kv_kernel<uint32_t>": Budget(256, 40, 0, 0.75),
    "write_kv_kernel<uint4>": Budget(256, 40, 0, 0.75, vectors=1),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Code]]:
    """Architecture -> kernel -> its code."""
    try:
        cubins = extract_cubins(NATIVE_LIBRARY, tmp_path_factory.mktemp("cubins"))
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    return {
        architecture: {
            name: code
            for path in paths
            for name, code in read_kernels(path, architecture, _threads).items()
        }
        for architecture, paths in cubins.items()
    }


def _threads(kernel: str) -> int:
    return BUDGETS[kernel].threads if kernel in BUDGETS else 256


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_has_a_budget(kernels: dict[int, dict[str, Code]], architecture: int) -> None:
    assert set(kernels[architecture]) == set(BUDGETS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", BUDGETS)
def test_kernels_keep_their_budget(
    kernels: dict[int, dict[str, Code]], kernel: str, architecture: int
) -> None:
    code, budget = kernels[architecture][kernel], BUDGETS[kernel]
    assert code.spills == 0 and code.counts["local"] == 0
    assert code.registers <= budget.registers
    assert code.shared <= budget.shared
    assert code.occupancy >= budget.occupancy
    assert code.counts["load128"] >= budget.vectors


def test_the_library_holds_ptx_for_later_gpus(kernels: dict[int, dict[str, Code]]) -> None:
    assert {f"{name}.sm_100" for name in OPERATORS} <= set(ptx_names(NATIVE_LIBRARY))


def test_the_stream_is_looked_up_weakly() -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", NATIVE_LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    assert " w aoti_torch_get_current_cuda_stream" in symbols
    assert "libcudart" not in symbols and " U cuda" not in symbols  # the runtime is inside


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operator_has_a_cuda_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"specdec_kernels::{name}", "CUDA")
    assert Path(__file__).parent.parent.joinpath("csrc", "cuda", f"{name}.cu").exists()
    if not torch.cuda.is_available():
        assert OPS[name].why_absent("cuda") == "no CUDA device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_driver_the_error_is_that_of_torch() -> None:
    with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
        OPS["tree_mask"](torch.ones((1, 1), dtype=torch.int32, device="cuda"), None)
