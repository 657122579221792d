"""Other libraries' attention over a tree, on a GPU: what users of one would run instead.

As everywhere, masks are made before the clock starts, though a tree has a new one at every step.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .baselines import FLEX_ATTENTION, Baseline, Inputs, dense_mask, same_attention


def _flashinfer(inputs: Inputs) -> Callable[[], Tensor]:
    """One request, its mask packed to bits beforehand."""
    flashinfer: Any = importlib.import_module("flashinfer")
    q, k, v = inputs["q"][0].transpose(0, 1), inputs["k_cache"][0], inputs["v_cache"][0]
    mask = flashinfer.quantization.packbits(dense_mask(inputs).reshape(-1), bitorder="little")

    def call() -> Tensor:
        out: Tensor = flashinfer.single_prefill_with_kv_cache(
            q, k, v, packed_custom_mask=mask, kv_layout="HND", sm_scale=inputs["scale"]
        )
        return out[None]

    return call


def _why_no_flashinfer() -> str | None:
    is_there = importlib.util.find_spec("flashinfer") is not None
    return None if is_there else "flashinfer is not installed"


FLASHINFER = Baseline("FlashInfer", _flashinfer, same_attention, _why_no_flashinfer)
GPU_BASELINES = {"tree_attention": (FLEX_ATTENTION, FLASHINFER)}
