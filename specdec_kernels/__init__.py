"""Fused kernels for speculative decoding, and a thin loop that plugs them into HuggingFace
`generate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .budget import Budget, CostCurve
from .drafters import (
    AutoDrafter,
    DraftContext,
    Drafter,
    DraftNetwork,
    ModelDrafter,
    OracleDrafter,
    PromptLookupDrafter,
    RowDrafter,
    SampledTree,
    SuccessorTable,
    TokenRecyclingDrafter,
    TopKTree,
    Verified,
    load_heads,
)
from .drafting import ProposalBuilder, SamplingParams
from .forest import DraftNode
from .ops import (
    after_attention,
    before_attention,
    build_tree,
    commit,
    layer_stack,
    packed_linear,
    panels_of,
    rms_norm,
    rope,
    sample,
    topk_logprobs,
    tree_attention,
    tree_mask,
    verify,
    write_kv,
)
from .registry import available
from .static_tree import best_static_tree
from .statistics import Acceptance, DecodeStats, TotalStats
from .tree import DraftKind, Proposal, TokenTree

if TYPE_CHECKING:
    from .hf.generate import SpeculativeDecoder, generate

__version__ = "0.1.0"
__all__ = [
    "Acceptance",
    "AutoDrafter",
    "Budget",
    "CostCurve",
    "DecodeStats",
    "DraftContext",
    "DraftKind",
    "DraftNetwork",
    "DraftNode",
    "Drafter",
    "ModelDrafter",
    "OracleDrafter",
    "PromptLookupDrafter",
    "Proposal",
    "ProposalBuilder",
    "RowDrafter",
    "SampledTree",
    "SamplingParams",
    "SpeculativeDecoder",
    "SuccessorTable",
    "TokenRecyclingDrafter",
    "TokenTree",
    "TopKTree",
    "TotalStats",
    "Verified",
    "after_attention",
    "available",
    "before_attention",
    "best_static_tree",
    "build_tree",
    "commit",
    "generate",
    "layer_stack",
    "load_heads",
    "packed_linear",
    "panels_of",
    "rms_norm",
    "rope",
    "sample",
    "topk_logprobs",
    "tree_attention",
    "tree_mask",
    "verify",
    "write_kv",
]


def __getattr__(name: str) -> Any:
    if name in ("SpeculativeDecoder", "generate"):  # transformers takes seconds to import
        from . import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
