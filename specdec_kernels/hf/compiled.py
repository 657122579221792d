"""Tree steps under `torch.compile`: one graph, trees padded to a few sizes."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..ops import tree_mask
from ..shapes import PAD
from ..tree import TokenTree
from .attention import TreeCall
from .cache import TreeCache, cache_keyword, positions_of

Backend = bool | str | Callable[..., Any]
_LEAST_NODES = 8
_SLOTS = 256


def bucket(num_nodes: int) -> int:
    """The padded size of a tree: a power of two."""
    return max(_LEAST_NODES, 1 << (num_nodes - 1).bit_length())


def compiled_capacity(max_length: int, max_nodes: int) -> int:
    """Cache slots for padded trees, rounded up so that most texts share a graph."""
    needed = max_length + bucket(max_nodes)
    return -(-needed // _SLOTS) * _SLOTS


def pad_tree(tree: TokenTree) -> TokenTree:
    """The same trees with as many nodes as their bucket has; padding nodes are not scored."""
    missing = bucket(tree.tokens.shape[1]) - tree.tokens.shape[1]
    pad = torch.nn.functional.pad
    return TokenTree(
        pad(tree.tokens, (0, missing)), pad(tree.parents, (0, missing), value=PAD), tree.num_nodes
    )


class CompiledStep:
    """The forward pass of a tree as one compiled graph per batch, bucket and capacity.

    Lengths are a tensor that is edited in place, so neither steps nor texts compile again. The
    prompt is not compiled.

    Args:
        model: whose layers hand keyword arguments on to their attention.
        backend: True for the default one of `torch.compile`, or one that it takes.
    """

    def __init__(self, model: PreTrainedModel, backend: Backend) -> None:
        self._model = weakref.ref(model)
        self._keyword = cache_keyword(model)
        self._backend: Any = "inductor" if backend is True else backend
        self._graphs: dict[tuple[int, ...], Any] = {}  # by batch, bucket and capacity

    @classmethod
    def of(cls, model: PreTrainedModel, backend: Backend) -> CompiledStep:
        """The step of that model, kept as long as the model."""
        steps = _made.setdefault(model, {})
        if backend not in steps:
            steps[backend] = cls(model, backend)
        return steps[backend]

    def __call__(self, cache: TreeCache, tree: TokenTree) -> Tensor:
        """Logits [B, N, V] of a padded tree."""
        key = (*tree.tokens.shape, cache.capacity)
        if key not in self._graphs:
            self._graphs[key] = torch.compile(
                _with_own_code(_forward), fullgraph=True, dynamic=False, backend=self._backend
            )
        tensors = (tree.tokens, tree.parents, tree.num_nodes, cache.lengths, cache.offsets)
        logits: Tensor = self._graphs[key](self._model(), self._keyword, cache, *tensors)
        return logits


def _forward(
    model: Any,
    keyword: str,
    cache: TreeCache,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    lengths: Tensor,
    offsets: Tensor | None,
) -> Tensor:
    ancestors, depths = tree_mask(parents, num_nodes)
    call = TreeCall(ancestors, depths, lengths, num_nodes, cache.localities)
    no_mask = torch.empty((len(tokens), 1, 1, 0), dtype=torch.bool, device=tokens.device)
    out = model(
        input_ids=tokens,
        attention_mask=no_mask,
        position_ids=positions_of(lengths, depths, offsets),
        use_cache=True,
        specdec=call,
        **{keyword: cache},
    )
    logits: Tensor = out.logits
    return logits


def _with_own_code(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A copy of a function: torch counts what it compiles by code object, and gives up after a few,
    which many models and batch sizes would reach.
    """
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__)


_made: weakref.WeakKeyDictionary[PreTrainedModel, dict[Backend, CompiledStep]] = (
    weakref.WeakKeyDictionary()
)
