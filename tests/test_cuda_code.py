"""The CUDA code inside the shipped library: its budget for every GPU, and that it waits for one."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import cuda_emulated
import pytest
import torch
from gpu_code import Code, extract_cubins, ptx_names, read_kernels

from specdec_kernels.registry import NATIVE_LIBRARY, OPS, built_with_cuda

if not built_with_cuda():
    pytest.skip("the library was built without CUDA", allow_module_level=True)

pytestmark = pytest.mark.xdist_group("cuda-code")  # disassembled once for all

ARCHITECTURES = (80, 90, 100)
OPERATORS = (
    "build_tree", "commit", "sample", "topk_logprobs", "tree_attention", "tree_mask", "verify",
    "write_kv",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a kernel may use on any architecture, and the least occupancy.

    Attributes:
        shared: bytes of shared memory, dynamic included.
        vectors: 128-bit loads that its code must hold.
        dynamic: bytes of shared memory that its launch adds.
        products: tensor core instructions that its code holds, neither more nor fewer.
        matrices: `ldmatrix` of them.
        copies: 128-bit copies to shared memory that its code must hold.
    """

    threads: int
    registers: int
    shared: int
    occupancy: float
    vectors: int = 0
    dynamic: int = 0
    products: int = 0
    matrices: int = 0
    copies: int = 0


def _attention(head_dim: int, rows: int, registers: int, occupancy: float) -> Budget:
    """Of the attention kernel on tensor cores, with as many rows as it takes. Its loop is unrolled
    once: fragments of 16 rows times the keys that pass at once times D / 16 steps of q.k and D / 8
    columns of p.v. Up to 32 rows, 4 or 2 warps share the keys of a tile; two fragments of wide
    heads take 16 of its keys at once.
    """
    is_wide = rows > 32
    fragments = 2 if rows > 128 else 1
    warps_of_keys = 1 if is_wide else 64 // rows
    tile_keys = 64 if rows == 16 else 16 if is_wide and head_dim > 128 else 32
    keys = 16 if fragments * head_dim > 192 else tile_keys // warps_of_keys
    stages = 2 if tile_keys * head_dim > 64 * 96 or rows * head_dim > 256 * 96 else 3
    pipeline = 2 * head_dim * (rows + 2 * stages * tile_keys)
    states = 0 if is_wide else 4 * warps_of_keys * rows * (head_dim + 10)
    return Budget(
        threads=2 * rows * warps_of_keys // fragments,
        registers=registers,
        shared=max(pipeline, states),
        occupancy=occupancy,
        vectors=17,
        dynamic=max(pipeline, states),
        products=fragments * head_dim * keys // 64,
        matrices=head_dim // 16 * (fragments + keys // 8),
        copies=16,
    )


_PLAIN_SHARED = 4 * (28 * (256 + 32) + 32 * (260 + 256))  # of the widest heads, on 7 warps

BUDGETS = {
    "attend_merge_kernel<Bfloat16>": Budget(128, 40, 0, 0.75),
    "attend_merge_kernel<Half>": Budget(128, 40, 0, 0.75),
    "attend_merge_kernel<float>": Budget(128, 40, 0, 0.75),
    **{
        f"attend_mma_kernel<{element}, {head_dim}, {rows}>": _attention(head_dim, rows, *limits)
        for element in ("Bfloat16", "Half")
        for head_dim, rows, *limits in (
            (64, 16, 128, 0.18),
            (64, 64, 144, 0.12),
            (64, 256, 200, 0.12),
            (80, 16, 144, 0.12),
            (80, 64, 152, 0.12),
            (80, 256, 216, 0.12),
            (96, 16, 152, 0.12),
            (96, 64, 160, 0.12),
            (96, 256, 240, 0.12),
            (128, 16, 160, 0.12),
            (128, 64, 176, 0.12),
            (128, 256, 255, 0.12),
            (256, 32, 240, 0.12),
            (256, 128, 232, 0.12),
        )
    },
    "attend_plain_kernel<Bfloat16>": Budget(224, 136, _PLAIN_SHARED, 0.1, dynamic=_PLAIN_SHARED),
    "attend_plain_kernel<Half>": Budget(224, 136, _PLAIN_SHARED, 0.1, dynamic=_PLAIN_SHARED),
    "attend_plain_kernel<float>": Budget(
        224, 136, _PLAIN_SHARED, 0.1, vectors=16, dynamic=_PLAIN_SHARED, copies=16
    ),
    "build_tree_kernel": Budget(32, 64, 0, 0.5),
    "clear_ids_kernel": Budget(256, 16, 0, 1.0),
    "commit_finish_kernel<uint16_t>": Budget(128, 48, 0, 0.62),
    "commit_finish_kernel<uint2>": Budget(128, 48, 0, 0.62),
    "commit_finish_kernel<uint32_t>": Budget(128, 48, 0, 0.62),
    "commit_finish_kernel<uint4>": Budget(128, 56, 0, 0.56, vectors=1),
    "commit_move_kernel<uint16_t>": Budget(128, 80, 0, 0.37),
    "commit_move_kernel<uint2>": Budget(128, 88, 0, 0.31),
    "commit_move_kernel<uint32_t>": Budget(128, 80, 0, 0.37),
    "commit_move_kernel<uint4>": Budget(128, 104, 0, 0.25, vectors=8),
    "draw_kernel<float>": Budget(256, 208, 16708, 0.12, vectors=8),
    "draw_kernel<uint16_t>": Budget(256, 208, 16708, 0.12, vectors=4),
    "map_ids_kernel": Budget(256, 16, 0, 1.0),
    "score_path_kernel<float>": Budget(256, 64, 256, 0.5, vectors=4),
    "score_path_kernel<uint16_t>": Budget(256, 64, 256, 0.5, vectors=2),
    "summarize_kernel<float>": Budget(64, 56, 0, 0.56, vectors=4),
    "summarize_kernel<uint16_t>": Budget(64, 56, 0, 0.56, vectors=2),
    "test_kernel<float>": Budget(256, 248, 16708, 0.12, vectors=8),
    "test_kernel<uint16_t>": Budget(256, 248, 16708, 0.12, vectors=4),
    "topk_large_kernel<Bfloat16>": Budget(256, 56, 1128, 0.5),
    "topk_large_kernel<Half>": Budget(256, 56, 1128, 0.5),
    "topk_large_kernel<float>": Budget(256, 56, 1128, 0.5),
    "topk_merge_kernel": Budget(256, 40, 16480, 0.75),
    "topk_segment_kernel<Bfloat16>": Budget(256, 88, 18532, 0.25, vectors=4),
    "topk_segment_kernel<Half>": Budget(256, 88, 18532, 0.25, vectors=4),
    "topk_segment_kernel<float>": Budget(256, 80, 18532, 0.37, vectors=8),
    "tree_mask_kernel": Budget(256, 32, 16384, 1.0),
    "typical_kernel<float>": Budget(256, 248, 16708, 0.12, vectors=8),
    "typical_kernel<uint16_t>": Budget(256, 248, 16708, 0.12, vectors=4),
    "walk_kernel<float>": Budget(256, 216, 16708, 0.12, vectors=8),
    "walk_kernel<uint16_t>": Budget(256, 216, 16708, 0.12, vectors=4),
    "write_kv_kernel<uint16_t>": Budget(256, 40, 0, 0.75),
    "write_kv_kernel<uint2>": Budget(256, 40, 0, 0.75),
    "write_kv_kernel<uint32_t>": Budget(256, 40, 0, 0.75),
    "write_kv_kernel<uint4>": Budget(256, 40, 0, 0.75, vectors=1),
    "write_law_kernel<float>": Budget(256, 80, 0, 0.37, vectors=1),
    "write_law_kernel<uint16_t>": Budget(256, 104, 0, 0.25, vectors=1),
    "write_probs_kernel<float>": Budget(256, 40, 0, 0.75, vectors=1),
    "write_probs_kernel<uint16_t>": Budget(256, 56, 0, 0.5, vectors=1),
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
            for name, code in read_kernels(path, architecture, _threads, _dynamic).items()
        }
        for architecture, paths in cubins.items()
    }


def _threads(kernel: str) -> int:
    return BUDGETS[kernel].threads if kernel in BUDGETS else 256


def _dynamic(kernel: str) -> int:
    return BUDGETS[kernel].dynamic if kernel in BUDGETS else 0


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
    assert code.counts["tensor"] == budget.products
    assert code.counts["matrix_load"] == budget.matrices
    assert code.counts["copy128"] >= budget.copies


@pytest.mark.parametrize("element", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("head_dim", "rows"), [(64, 16), (96, 64), (128, 16), (128, 256), (256, 32), (256, 128)]
)
def test_launches_add_the_shared_memory_of_their_budget(
    element: str, head_dim: int, rows: int
) -> None:
    kernel = f"attend_mma_kernel<Bfloat16, {head_dim}, {rows}>"
    if element == "float32":
        head_dim, rows, kernel = 256, 28, "attend_plain_kernel<float>"
    call = OPS["tree_attention"].inputs(
        B=1, N=rows // 4, H=4, G=1, D=head_dim, S=rows, dtype=getattr(torch, element)
    )
    cuda_emulated.emulated.take_counters()
    OPS["tree_attention"](**call, backend=cuda_emulated.BACKEND)
    added = cuda_emulated.emulated.take_counters()["dynamic_shared"]
    assert added == BUDGETS[kernel].dynamic == BUDGETS[kernel].shared


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
