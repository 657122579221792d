"""What each Triton kernel may use, in one table: `tests/test_triton_code.py` holds them to it.

Read off `python tests/triton_static.py`; a number may fall silently, and rises only with a reason
in the commit that raises it. Names are the kernel's and those of the call in `triton_static.CASES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a kernel may use on any target, and what it must hold.

    Attributes:
        registers: per thread on NVIDIA, with aligned operands.
        unaligned_registers: the same with operands that no 128-bit access can reach.
        amd_registers: vector registers on gfx942.
        shared: bytes of shared memory per block.
        occupancy: least share of resident warps on any NVIDIA target, operands aligned.
        needs: groups of `gpu_code` that must occur (`load128` with aligned operands).
    """

    registers: int
    unaligned_registers: int
    amd_registers: int
    shared: int
    occupancy: float
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


STREAM, MATRIX = ("load128",), ("tensor", "load128")
STAGED = ("load128", "barrier")
"""All loads of a tile come before its stores: what the interpreter, one thread, cannot see."""

BUDGETS: dict[str, Budget] = {
    "_tree_mask B2_N64_bfloat16": Budget(24, 24, 16, 0, 0.5),
    "_write_kv B1_G8_S4096_N16_D128_bfloat16": Budget(32, 152, 24, 0, 1.0, STREAM),
    "_write_kv B1_G8_S4096_N16_D128_page_size16_bfloat16": Budget(32, 160, 40, 0, 1.0, STREAM),
    "_gather B1_G8_S4096_N16_L4_D128_F4096_bfloat16": Budget(24, 32, 24, 0, 1.0, STREAM),
    "_prepare B1_G8_S4096_N16_L4_D128_F4096_bfloat16": Budget(24, 24, 8, 0, 0.5),
    "_move B1_G8_S4096_N16_L4_D128_F4096_bfloat16": Budget(40, 120, 24, 0, 0.75, STAGED),
    "_prepare B1_G8_S4096_N16_L4_D128_page_size16_bfloat16": Budget(24, 24, 8, 0, 0.5),
    "_move B1_G8_S4096_N16_L4_D128_page_size16_bfloat16": Budget(40, 120, 32, 0, 0.75, STAGED),
    "_attend B1_G8_S4096_N16_H32_D64_bfloat16": Budget(168, 96, 128, 40992, 0.18, MATRIX),
    "_merge B1_G8_S4096_N16_H32_D64_bfloat16": Budget(48, 48, 40, 1024, 0.62, STREAM),
    "_attend B1_G8_S4096_N16_H32_D80_bfloat16": Budget(240, 168, 152, 51264, 0.12, MATRIX),
    "_merge B1_G8_S4096_N16_H32_D80_bfloat16": Budget(64, 64, 40, 2048, 0.5, STREAM),
    "_attend B1_G8_S4096_N16_H32_D96_bfloat16": Budget(256, 128, 176, 61504, 0.12, MATRIX),
    "_merge B1_G8_S4096_N16_H32_D96_bfloat16": Budget(64, 64, 40, 2048, 0.5, STREAM),
    "_attend B1_G8_S4096_N16_H32_D128_bfloat16": Budget(248, 88, 208, 81952, 0.12, MATRIX),
    "_merge B1_G8_S4096_N16_H32_D128_bfloat16": Budget(56, 56, 40, 2048, 0.56, STREAM),
    "_attend B1_G8_S4096_N16_H32_D256_bfloat16": Budget(232, 128, 144, 98848, 0.12, MATRIX),
    "_merge B1_G8_S4096_N16_H32_D256_bfloat16": Budget(56, 56, 48, 4096, 0.56, STREAM),
    "_attend B1_G8_S4096_N1_H32_D128_bfloat16": Budget(152, 88, 168, 71680, 0.12, MATRIX),
    "_merge B1_G8_S4096_N1_H32_D128_bfloat16": Budget(56, 56, 40, 2048, 0.56, STREAM),
    "_attend B1_G8_S4096_N64_H32_D128_bfloat16": Budget(232, 88, 168, 98848, 0.12, MATRIX),
    "_merge B1_G8_S4096_N64_H32_D128_bfloat16": Budget(56, 56, 40, 2048, 0.56, STREAM),
    "_attend B1_G8_S4096_N16_H32_D128_page_size64_bfloat16": Budget(
        232, 96, 192, 65824, 0.12, MATRIX
    ),
    "_merge B1_G8_S4096_N16_H32_D128_page_size64_bfloat16": Budget(56, 56, 40, 2048, 0.56, STREAM),
    "_attend B1_G8_S4096_N16_H32_D128_float32": Budget(120, 80, 128, 34944, 0.25, STREAM),
    "_merge B1_G8_S4096_N16_H32_D128_float32": Budget(56, 56, 40, 2048, 0.56, STREAM),
    "summarize_rows R4_V49152_greedyTrue_bfloat16": Budget(32, 32, 40, 16, 1.0, STREAM),
    "draw_rows R4_V49152_greedyTrue_bfloat16": Budget(32, 32, 16, 32, 1.0),
    "summarize_rows R4_V49152_bfloat16": Budget(72, 72, 64, 4096, 0.43, STREAM),
    "draw_rows R4_V49152_bfloat16": Budget(144, 152, 88, 8192, 0.12),
    "summarize_rows R4_V49152_draws4_bfloat16": Budget(72, 72, 64, 4096, 0.43, STREAM),
    "draw_rows R4_V49152_draws4_bfloat16": Budget(152, 168, 96, 8192, 0.12),
    "write_probs R4_V49152_draws4_bfloat16": Budget(48, 48, 40, 4096, 0.62, STREAM),
    "summarize_nodes B2_N16_V49152_greedyTrue_bfloat16": Budget(24, 32, 32, 16, 1.0, STREAM),
    "decide B2_N16_V49152_greedyTrue_bfloat16": Budget(56, 56, 24, 32, 0.5),
    "summarize_nodes B2_N16_V49152_rulewalk_bfloat16": Budget(72, 72, 64, 4096, 0.43, STREAM),
    "decide B2_N16_V49152_rulewalk_bfloat16": Budget(208, 216, 136, 8192, 0.12),
    "summarize_nodes B2_N16_V49152_ruletoken_bfloat16": Budget(24, 32, 32, 16, 1.0, STREAM),
    "decide B2_N16_V49152_ruletoken_bfloat16": Budget(224, 216, 176, 8192, 0.12, STREAM),
    "score_path B2_N16_V49152_ruletoken_bfloat16": Budget(80, 72, 32, 64, 0.37),
    "summarize_nodes B2_N16_V49152_ruletraversal_bfloat16": Budget(24, 32, 32, 16, 1.0, STREAM),
    "decide B2_N16_V49152_ruletraversal_bfloat16": Budget(224, 216, 176, 8192, 0.12, STREAM),
    "score_path B2_N16_V49152_ruletraversal_bfloat16": Budget(80, 72, 32, 64, 0.37),
    "summarize_nodes B2_N16_V49152_ruletypical_bfloat16": Budget(24, 32, 32, 16, 1.0, STREAM),
    "decide B2_N16_V49152_ruletypical_bfloat16": Budget(192, 184, 176, 8192, 0.12),
    "score_path B2_N16_V49152_ruletypical_bfloat16": Budget(80, 72, 32, 64, 0.37),
    "_summarise R4_V49152_k8_bfloat16": Budget(64, 96, 64, 256, 0.5, STREAM),
    "_select R4_V49152_k8_bfloat16": Budget(40, 48, 32, 256, 0.75),
    "_summarise R4_V49152_k64_bfloat16": Budget(64, 96, 64, 256, 0.5, STREAM),
    "_select R4_V49152_k64_bfloat16": Budget(48, 64, 40, 256, 0.62),
    "_build_tree B2_T8_K8_N64_bfloat16": Budget(64, 64, 32, 0, 0.5),
}

SINCE_TRITON_3_9: dict[str, dict[str, Any]] = {
    "_attend B1_G8_S4096_N16_H32_D64_bfloat16": {"unaligned_registers": 112},
    "draw_rows R4_V49152_bfloat16": {"amd_registers": 96},
    "draw_rows R4_V49152_draws4_bfloat16": {"registers": 160, "amd_registers": 104},
    # no load of 128 bits on gfx942
    "decide B2_N16_V49152_ruletoken_bfloat16": {"needs": ()},
    "decide B2_N16_V49152_ruletraversal_bfloat16": {"needs": ()},
    "score_path B2_N16_V49152_ruletoken_bfloat16": {"unaligned_registers": 80},
    "score_path B2_N16_V49152_ruletraversal_bfloat16": {"unaligned_registers": 80},
    "score_path B2_N16_V49152_ruletypical_bfloat16": {"unaligned_registers": 80},
    # with 64 registers it would spill
    "_summarise R4_V49152_k8_bfloat16": {"registers": 80, "occupancy": 0.37},
    "_summarise R4_V49152_k64_bfloat16": {"registers": 80, "occupancy": 0.37},
    "_select R4_V49152_k8_bfloat16": {"unaligned_registers": 64},
    "_select R4_V49152_k64_bfloat16": {
        "registers": 56, "unaligned_registers": 80, "occupancy": 0.5,
    },
}  # fmt: skip
"""What newer compilers make of the same source, where it is more than the table says."""


def budget_of(name: str) -> Budget:
    """For the Triton that is here."""
    is_newer = tuple(map(int, metadata.version("triton").split(".")[:2])) >= (3, 9)
    return replace(BUDGETS[name], **(SINCE_TRITON_3_9.get(name, {}) if is_newer else {}))


VARIANTS: dict[str, dict[str, int]] = {
    "tree_mask": {"_tree_mask": 1},
    "write_kv": {"_write_kv": 1},
    "commit": {"_prepare": 1, "_move": 1},
    "tree_attention": {"_attend": 1, "_merge": 1},
    "sample": {"summarize_rows": 1, "draw_rows": 1},
    "verify": {"summarize_nodes": 1, "decide": 1},
    "topk_logprobs": {"_summarise": 1, "_select": 1},
    "build_tree": {"_build_tree": 1},
}
"""Operator -> kernel -> compilations over the sizes of `triton_static.SWEEPS`."""
