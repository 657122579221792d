"""Tree steps under `torch.compile`: one graph, trees padded to a few sizes."""

from __future__ import annotations

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
from .cache import TreeCache, cache_keyword

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
        chosen: Any = "inductor" if backend is True else backend
        self._compiled: Any = torch.compile(
            self._forward, fullgraph=True, dynamic=False, backend=chosen
        )

    @classmethod
    def of(cls, model: PreTrainedModel, backend: Backend) -> CompiledStep:
        """The step of that model, kept as long as the model."""
        steps = _made.setdefault(model, {})
        if backend not in steps:
            steps[backend] = cls(model, backend)
        return steps[backend]

    def __call__(self, cache: TreeCache, tree: TokenTree) -> Tensor:
        """Logits [B, N, V] of a padded tree."""
        tensors = (tree.tokens, tree.parents, tree.num_nodes, cache.lengths)
        logits: Tensor = self._compiled(cache, *tensors)
        return logits

    def _forward(
        self, cache: TreeCache, tokens: Tensor, parents: Tensor, num_nodes: Tensor, lengths: Tensor
    ) -> Tensor:
        model: Any = self._model()
        ancestors, depths = tree_mask(parents, num_nodes)
        call = TreeCall(ancestors, depths, lengths, num_nodes, cache.localities)
        no_mask = torch.empty((len(tokens), 1, 1, 0), dtype=torch.bool, device=tokens.device)
        out = model(
            input_ids=tokens,
            attention_mask=no_mask,
            position_ids=(lengths[:, None] + depths).long(),
            use_cache=True,
            specdec=call,
            **{self._keyword: cache},
        )
        logits: Tensor = out.logits
        return logits


_made: weakref.WeakKeyDictionary[PreTrainedModel, dict[Backend, CompiledStep]] = (
    weakref.WeakKeyDictionary()
)
