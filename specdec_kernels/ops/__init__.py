"""The operators, one file each: contract, PyTorch reference, fake, input maker."""

from .after_attention import after_attention
from .before_attention import before_attention
from .build_tree import build_tree
from .commit import commit
from .layer_stack import layer_stack
from .packed_linear import packed_linear, panels_of
from .rms_norm import rms_norm
from .rope import rope
from .sample import sample
from .topk_logprobs import topk_logprobs
from .tree_attention import tree_attention
from .tree_mask import tree_mask
from .verify import verify
from .write_kv import write_kv

__all__ = [
    "after_attention",
    "before_attention",
    "build_tree",
    "commit",
    "layer_stack",
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
