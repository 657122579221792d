"""All decoder layers of a model in one operator, or in one for each segment between hooks, once a
pass has shown that each takes what the one before it gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..ops import layer_stack
from ..ops.layer_stack import MOST_JOINED
from .attention import TreeCall, is_ragged
from .cache import CACHE_KEYWORDS, TreeCache

if TYPE_CHECKING:
    from .layers import Halves

_SHARED = ("position_embeddings", *CACHE_KEYWORDS)
"""Keywords that every layer must be given the same of."""


def _shared(kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(kwargs.get(name) for name in _SHARED)


@dataclass(slots=True)
class Run:
    """A pass through the layers of a stack.

    Attributes:
        stack, call: whose, and over which tree.
        shared: the keywords that all layers are given the same of.
        out: what the layers up to `end` gave, or those called so far.
        next: the layer to be called next.
        end: the first layer that is not computed yet; 0 in a pass layer by layer.
    """

    stack: Stack
    call: TreeCall
    shared: tuple[Any, ...]
    out: Tensor
    next: int
    end: int = 0

    def follows(self, index: int, hidden: Tensor, kwargs: Mapping[str, Any]) -> bool:
        """Whether a layer is called as the next one in a chain is. One that begins a segment may be
        given anything: its hooks may have changed it.
        """
        is_next = self.next == index and (self.out is hidden or self.end == index)
        return is_next and all(map(is_, map(kwargs.get, _SHARED), self.shared))

    def go_on(self, index: int, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """What a layer behind the first gives, in a pass in segments.

        Raises:
            ValueError: it was called otherwise than in the pass that was watched.
        """
        if not self.follows(index, hidden, kwargs):
            raise ValueError(
                f"decoder layer {index} was given other hidden states, rotary embeddings or "
                f"another cache than layer {index - 1} before it, but not so in the first pass: "
                "decode with pack=False"
            )
        if index == self.end:
            self.out, self.end = self.stack.segment(self.call, index, hidden, self.shared)
        self.next += 1
        return self.out

    def finish(self) -> None:
        """The pass is over.

        Raises:
            ValueError: not all layers were called, as they were in the pass that was watched.
        """
        if self.end and self.next != len(self.stack):
            raise ValueError(
                f"only {self.next} of {len(self.stack)} decoder layers were called, but all in "
                "the first pass: decode with pack=False"
            )


class Stack:
    """Decoder layers of one list, in order.

    The first pass over a tree runs layer by layer and is watched; after it the first layer computes
    all of them up to one that has hooks, that one the next ones, and so on, and the others only see
    to it that they are called as they were.

    Args:
        layers: the layers.
        halves: what they compute with.
        options: what each gives its attention: scale and softcap.
    """

    def __init__(
        self, layers: Sequence[Any], halves: Sequence[Halves], options: Sequence[dict[str, Any]]
    ) -> None:
        self._indices = [layer.self_attn.layer_idx for layer in layers]
        self._options = options[0]
        self._sizes = halves[0].sizes
        self._is_uniform = all(
            half.sizes == self._sizes
            and len(half.norms) == len(halves[0].norms)
            and option == self._options
            for half, option in zip(halves, options, strict=True)
        )
        self._is_chain = False
        # hooks that see what passes between two layers
        self._between = [
            (layer._forward_pre_hooks, before._forward_hooks) for before, layer in pairwise(layers)
        ]
        parts = [part for layer in layers for part in layer.modules() if part is not layer]
        self._hooks = [hooks for p in parts for hooks in (p._forward_hooks, p._forward_pre_hooks)]
        none = halves[0].norms[0].new_empty(0)
        has_biases = any(bias is not None for half in halves for bias in half.biases)
        self._joined: dict[tuple[int, int], tuple[list[Tensor], ...]] = {}
        self._weights = [
            (
                half.norms[:2],
                half.panels,
                [none if bias is None else bias for bias in half.biases] if has_biases else [],
                half.norms[2:],
            )
            for half in halves
        ]

    def __len__(self) -> int:
        return len(self._indices)

    def begin(self, call: TreeCall, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The first segment, for the first layer; None if it is not known that they are a chain, or
        if this pass wants something else of them.
        """
        shared = _shared(kwargs)
        if not self._is_chain or not self._fits(call, shared):
            return None
        if call.run is not None:
            call.run.finish()
        out, end = self.segment(call, 0, hidden, shared)
        call.run = Run(self, call, shared, out, 1, end)
        return out

    def watch(
        self, call: TreeCall, index: int, hidden: Tensor, kwargs: Mapping[str, Any], out: Tensor
    ) -> None:
        """Learn from what a layer was given, and gave, whether the layers are a chain."""
        if self._is_chain or not self._is_uniform or not call.is_whole:
            return
        run = call.run
        if index and (
            run is None or run.stack is not self or not run.follows(index, hidden, kwargs)
        ):
            call.run = None
            return
        call.run = Run(self, call, _shared(kwargs), out, index + 1)
        self._is_chain = index + 1 == len(self._indices)

    def _fits(self, call: TreeCall, shared: tuple[Any, ...]) -> bool:
        """Whether one operator can make this pass."""
        caches = [cache for cache in shared[1:] if cache is not None]
        is_wide = is_ragged() and call.ancestors.shape[1] > MOST_JOINED
        if not call.is_whole or is_wide or any(self._hooks) or len(caches) != 1:
            return False
        cache, localities = caches[0], call.localities.by_layer
        return (
            isinstance(cache, TreeCache)
            and cache.is_in_use
            and cache.starts is None
            and cache.lengths is call.lengths
            and cache.num_nodes is call.num_nodes
            and all(cache.tree_layers[i].is_initialized for i in self._indices)
            and not any(localities[i].chunk for i in self._indices)
        )

    def segment(
        self, call: TreeCall, first: int, hidden: Tensor, shared: tuple[Any, ...]
    ) -> tuple[Tensor, int]:
        """What the layers from the first one up to the next with hooks give; that one's index."""
        embeddings, *caches = shared
        cache = next(cache for cache in caches if cache is not None)
        end = first + 1
        while end < len(self) and not any(self._between[end - 1]):
            end += 1
        indices = self._indices[first:end]
        layers = [cache.tree_layers[i] for i in indices]
        localities = call.localities.by_layer
        heads, _, _, num_hidden, epsilon = self._sizes
        cos, sin = (e.expand(len(hidden), -1, -1) for e in embeddings)
        out: Tensor = layer_stack(
            hidden,
            cos,
            sin,
            [layer.keys for layer in layers],
            [layer.values for layer in layers],
            call.ancestors,
            call.depths,
            call.lengths,
            call.num_nodes,
            *self._weights_of(first, end),
            [localities[i].window for i in indices],
            heads,
            num_hidden,
            epsilon,
            **self._options,
        )
        call.num_layers += len(layers)
        return out, end

    def _weights_of(self, first: int, end: int) -> tuple[list[Tensor], ...]:
        """Norms, panels, biases and norms of heads of some layers, as the operator takes them."""
        known = self._joined.get((first, end))
        if known is None:
            kinds = zip(*self._weights[first:end], strict=True)
            known = tuple([tensor for own in kind for tensor in own] for kind in kinds)
            self._joined[first, end] = known
        return known
