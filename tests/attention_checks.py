"""Inputs at the edges of `tree_attention`, and the comparison that every kernel must pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec_kernels.ops import tree_attention

EDGES = {
    "one node": {"N": 1, "H": 8, "G": 1, "D": 64, "S": 150},
    "no prefix": {"N": 5, "H": 6, "G": 2, "D": 80, "S": 5, "sinks": True},
    "window inside the tree": {"N": 16, "H": 8, "G": 2, "D": 96, "S": 60, "window": 2},
    "a whole word": {"N": 64, "H": 1, "G": 1, "D": 64, "S": 190, "softcap": 30.0},
    "a word and a bit": {"N": 65, "H": 3, "G": 1, "D": 64, "S": 97, "page_size": 16},
    "three words": {"N": 130, "H": 1, "G": 1, "D": 16, "S": 170, "window": 40, "sinks": True},
    "pages of no power of two": {
        "N": 9, "H": 4, "G": 4, "D": 128, "S": 99, "page_size": 11, "window": 50, "softcap": 5.0,
    },
    "wide heads": {"N": 3, "H": 2, "G": 1, "D": 256, "S": 140, "page_size": 128},
    "many rows of wide heads": {"N": 33, "H": 4, "G": 1, "D": 192, "S": 50, "sinks": True},
    "more rows than a block has": {
        "N": 70, "H": 4, "G": 1, "D": 128, "S": 99, "window": 40, "softcap": 8.0,
    },
    "narrow heads": {"N": 3, "H": 2, "G": 2, "D": 4, "S": 40},
}  # fmt: skip
"""Name -> sizes of one request."""


def int32(*values: int) -> Tensor:
    """A vector."""
    return torch.tensor(values, dtype=torch.int32)


def one_tree(**sizes: Any) -> dict[str, Any]:
    """As the operator's, but every request has the first one's tree, which has all N nodes."""
    inputs = tree_attention.inputs(**sizes)
    for name in ("ancestors", "depths", "num_nodes"):
        inputs[name] = inputs[name][:1].expand_as(inputs[name]).clone()
    return inputs


def at_the_edge(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Three requests of one of `EDGES`: half a tree without prefix, nothing, and a full cache."""
    inputs = one_tree(B=3, **case, dtype=dtype, seed=1)
    inputs["lengths"] = int32(0, 0, case["S"] - case["N"])
    inputs["num_nodes"] = int32((case["N"] + 1) // 2, 0, case["N"])
    return inputs


def spread_out(inputs: dict[str, Any]) -> None:
    """Give every tensor a last stride other than 1, with NaN or nonsense between the elements."""
    for name in ("q", "k_cache", "v_cache"):
        spread = torch.full((*inputs[name].shape, 3), torch.nan).to(inputs[name].dtype)
        spread[..., 1] = inputs[name]
        inputs[name] = spread[..., 1]
    for name in ("ancestors", "depths", "lengths", "num_nodes"):
        inputs[name] = torch.stack([inputs[name], inputs[name] * 0 - 7], -1)[..., 0]


def hide(inputs: dict[str, Any], page_size: int) -> None:
    """Put NaN into all slots that nobody sees, and pages without sense behind the last one seen."""
    size, window = inputs["k_cache"].shape[2], inputs["window"]
    if page_size:
        size = inputs["page_table"].shape[1] * page_size
    for b, (length, nodes) in enumerate(zip(inputs["lengths"], inputs["num_nodes"], strict=True)):
        first, end = max(int(length) - window + 1, 0), int(length + nodes)
        for slot in (*range(first), *range(end, size)):
            page, at = (b, slot) if not page_size else divmod(slot, page_size)
            if page_size:
                page = int(inputs["page_table"][b, page])
            inputs["k_cache"][page, :, at] = torch.nan
            inputs["v_cache"][page, :, at] = torch.nan
        if page_size:
            inputs["page_table"][b, -(-end // page_size) :] = 2**31 - 1


def assert_equals_reference(inputs: dict[str, Any], backend: str) -> None:
    """Outputs are those of the reference, within the operator's tolerance."""
    got = tree_attention(**inputs, backend=backend)
    want = tree_attention(**inputs, backend="reference")
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        finite = w.isfinite()
        torch.testing.assert_close(g[~finite], w[~finite], rtol=0, atol=0, equal_nan=True)
        if finite.any():
            limit = tree_attention.tolerance[inputs["q"].dtype] * float(w[finite].abs().max())
            assert float((g[finite].double() - w[finite].double()).abs().max()) <= limit
