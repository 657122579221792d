"""What each Triton kernel may use, in one table: `tests/test_triton_code.py` holds them to it.

Read off `python tests/triton_static.py`; a number may fall silently, and rises only with a reason
in the commit that raises it. Names are the kernel's and those of the call in `triton_static.CASES`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a kernel may use on any target, and what it must and must not hold.

    Attributes:
        registers: per thread on NVIDIA, with aligned operands.
        unaligned_registers: the same with operands that no 128-bit access can reach.
        amd_registers: vector registers on gfx942.
        shared: bytes of shared memory per block.
        occupancy: least share of resident warps on any NVIDIA target, operands aligned.
        needs: groups of instructions of `gpu_code` that must occur (`tensor` also unaligned).
        lacks: groups that must not.
    """

    registers: int
    unaligned_registers: int
    amd_registers: int
    shared: int
    occupancy: float
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


BUDGETS: dict[str, Budget] = {}

VARIANTS: dict[str, dict[str, int]] = {}
"""Operator -> kernel -> compilations over the sizes of `triton_static.SWEEPS`."""
