"""A key/value cache for token trees: preallocated, ragged, edited in place."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..ops import commit, write_kv

CACHE_KEYWORDS = ("cache", "past_key_values")
"""How transformers calls a model's cache: since 5.24, and before."""


def cache_keyword(model: PreTrainedModel) -> str:
    """The name of the cache among the arguments of the model."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_KEYWORDS if name in parameters), CACHE_KEYWORDS[-1])


class TreeCache(Cache):
    """Per-layer buffers [B, G, S, D] with a committed length per row.

    While `num_nodes` is None the cache is prefilling: new tokens go to slots 0.. of every row,
    right padding included. After `start`, each forward writes node i of row b to slot `lengths[b] +
    i`, or `starts[b] + i` where that is given.

    Attributes:
        lengths: [B] int32, committed slots of each row.
        num_nodes: [B] int32 of the tree being scored, or None.
        starts: [B] int32, or None.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.lengths: Tensor | None = None
        self.num_nodes: Tensor | None = None
        self.starts: Tensor | None = None
        self.tree_layers = [TreeCacheLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self.tree_layers))

    def start(self, lengths: Tensor) -> None:
        """End the prefill with `lengths` [B] int32 committed slots per row."""
        self.lengths = lengths

    def commit(self, path: Tensor, num_kept: Tensor) -> None:
        """Keep path nodes in every layer; see `ops.commit`."""
        # Models that share keys and values between layers leave some layers empty.
        filled = [layer for layer in self.tree_layers if layer.is_initialized]
        keys, values = [layer.keys for layer in filled], [layer.values for layer in filled]
        commit(keys, values, self.lengths, path, num_kept)


class TreeCacheLayer(CacheLayerMixin):
    """One layer's buffers. Sliding layers keep every slot too: their window is applied in
    positions, by the attention.
    """

    keys: Tensor
    values: Tensor
    is_sliding = False
    is_croppable = False
    is_compileable = False

    def __init__(self, cache: TreeCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate on the first write, when sizes, dtype and device are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self.keys, self.values = (
            torch.empty(
                (batch, heads, self.cache.capacity, x.shape[3]), dtype=x.dtype, device=x.device
            )
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens; the keys and values that the attention will read, without
        copying them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        if cache.num_nodes is None:
            new = key_states.shape[2]
            self.keys[:, :, :new] = key_states
            self.values[:, :, :new] = value_states
            return key_states, value_states
        starts = cache.lengths if cache.starts is None else cache.starts
        write_kv(key_states, value_states, self.keys, self.values, starts, cache.num_nodes)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key/value length, offset) for the masks of the prefill."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: position ids are always passed, rows have no common length."""
        return 0

    def get_max_length(self) -> int:
        """Slots of each row."""
        return self.cache.capacity
