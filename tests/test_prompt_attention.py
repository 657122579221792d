"""The attention of prompts: by `tree_attention` and by PyTorch's, the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specdec_kernels.hf import prompt_attention
from specdec_kernels.hf.locality import FULL, Locality
from specdec_kernels.hf.prompt_attention import attend_prompt
from specdec_kernels.ops import tree_attention

CASES = {
    "one token": {"size": 1},
    "one block": {"size": 200},
    "two blocks and a bit": {"size": 1030},
    "behind other keys": {"size": 600, "start": 37},
    "a window": {"size": 700, "locality": Locality(window=90)},
    "a window within a tile": {"size": 130, "start": 5, "locality": Locality(window=7)},
    "softcap": {"size": 70, "softcap": 3.0},
    "sinks and a window": {"size": 520, "sinks": True, "locality": Locality(window=33)},
    "a chunk": {"size": 150, "locality": Locality(chunk=64)},
}


def _attend(case: dict[str, Any], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size, start = case["size"], case.get("start", 0)
    q = torch.randn((2, size, 6, 24), generator=generator).to(dtype).transpose(1, 2)
    k, v = (
        torch.randn((2, start + size, 2, dim), generator=generator).to(dtype).transpose(1, 2)
        for dim in (24, 16)
    )
    sinks = torch.randn(6, generator=generator) if case.get("sinks") else None
    softcap = case.get("softcap", 0.0)
    return attend_prompt(
        q, k, v, case.get("locality", FULL), scale=0.3, softcap=softcap, sinks=sinks
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=["float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_ways_give_the_same(
    case: dict[str, Any], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        prompt_attention,
        "tree_attention",
        lambda *a, **k: calls.append(1) or tree_attention(*a, **k),
    )
    monkeypatch.setattr(prompt_attention, "_takes_chains", lambda is_plain: True)
    by_trees = _attend(case, dtype)
    assert len(calls) == (
        0 if "locality" in case and case["locality"].chunk else -(-case["size"] // 512)
    )
    monkeypatch.setattr(prompt_attention, "_takes_chains", lambda is_plain: False)
    by_torch = _attend(case, dtype)
    assert by_trees.shape == by_torch.shape == (2, case["size"], 6, 16)
    assert by_trees.is_contiguous()
    error = (by_trees.float() - by_torch.float()).abs().max()
    assert float(error) <= tolerance * float(by_torch.float().abs().max())


@pytest.mark.parametrize(
    ("capability", "has_tiles", "is_plain", "takes"),
    [
        ("default", False, True, False),
        ("default", False, False, False),
        ("avx2", False, True, True),
        ("avx512", False, False, True),
        ("avx512_bf16", False, True, True),
        ("avx512_bf16", True, True, False),
        ("avx512_bf16", True, False, True),
        ("none", False, False, False),
    ],
)
def test_who_takes_chains(
    capability: str, has_tiles: bool, is_plain: bool, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_attention, "cpu_capability", lambda: capability)
    monkeypatch.setattr(prompt_attention, "has_matrix_tiles", lambda: has_tiles)
    assert prompt_attention._takes_chains(is_plain) == takes
