"""What every launcher shares: whether kernels are interpreted, the device's size, launch tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run on the CPU, one program after another: `TRITON_INTERPRET=1` before the first import
of triton."""

_INTERPRETED_PROCESSORS = 4


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is launched; `bench/tune_triton.py` measures other values.

    Attributes:
        num_warps, num_stages: as Triton takes them.
        blocks: constexpr block sizes, by the name that the kernel gives them.
        fuses: multiplications with additions; said always, since Triton changes its default.
        measured: the GPU and date that chose these values, or "unmeasured".
    """

    num_warps: int
    num_stages: int = 3
    blocks: dict[str, int] | None = None
    fuses: bool = True
    measured: str = "unmeasured"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fuses,
            **(self.blocks or {}),
        }


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of the device; 4 where kernels are interpreted."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
