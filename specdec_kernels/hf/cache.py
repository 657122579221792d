"""A key/value cache for token trees: preallocated, ragged, edited in place."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..ops import commit, write_kv
from .attention import Localities, heads_by_rows
from .media import Media

CACHE_KEYWORDS = ("cache", "past_key_values")
"""How transformers calls a model's cache: since 5.24, and before."""


def cache_keyword(model: PreTrainedModel) -> str:
    """The name of the cache among the arguments of the model."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_KEYWORDS if name in parameters), CACHE_KEYWORDS[-1])


def positions_of(lengths: Tensor, depths: Tensor, offsets: Tensor | None) -> Tensor:
    """Positions [..., B, N] of nodes at depths [B, N] behind so many slots [B]."""
    slots = (lengths[:, None] + depths).long()
    return slots if offsets is None else slots + offsets[..., None]


class TreeCache(Cache):
    """Per-layer buffers [B, G, S, D] with a committed length per row.

    While `num_nodes` is None the cache is prefilling: new tokens go to slots 0.. of every row,
    right padding included. After `start`, each forward writes node i of row b to slot `lengths[b] +
    i`, or `starts[b] + i` where that is given.

    A cache that comes back with an output can be given to the next call: rows keep the slots whose
    tokens the new prompts begin with.

    Args:
        model: whose keys and values these are.
        batch: B.

    Attributes:
        capacity: slots of each row, S; grown only by `reserve`.
        lengths: [B] int32, committed slots of each row; None before the prefill.
        num_nodes: [B] int32 of the tree being scored, or None.
        starts: [B] int32, or None.
        offsets: [..., B], position minus slot of what follows the prompts; None where both are the
            same.
        has_media: whether it holds images or sounds.
        tokens: what the committed slots of each row hold.
        localities: which keys each layer sees.
        is_in_use: whether tokens may be written; not while the caller holds the cache.
    """

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        self.capacity = 0
        self.batch = batch
        self.lengths: Tensor | None = None
        self.num_nodes: Tensor | None = None
        self.starts: Tensor | None = None
        self.offsets: Tensor | None = None
        self.has_media = False
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.localities = Localities()
        self.is_in_use = True
        self._model = weakref.ref(model)
        config = model.config.get_text_config(decoder=True)
        self.tree_layers = [TreeCacheLayer(self) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(self.tree_layers))

    def __deepcopy__(self, memo: dict[int, Any]) -> TreeCache:
        copied = TreeCache.__new__(TreeCache)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for layer in copied.tree_layers:
            layer.cache = copied
        return copied

    @staticmethod
    def adopt(
        given: Sequence[Cache], model: PreTrainedModel, batch: int, *, has_media: bool = False
    ) -> TreeCache:
        """The cache that the caller passed, if it can be used, or a new one.

        Args:
            has_media: whether the prompts come with images or sounds.

        Raises:
            ValueError: a filled cache of another kind, model or batch, or with images or sounds
                that do not come again.
        """
        for cache in given:
            if isinstance(cache, TreeCache):
                if cache._model() is not model or cache.batch != batch:
                    raise ValueError(
                        f"the cache is of {cache.batch} rows and its own model; pass it with the "
                        f"same model and as many rows, got {batch}"
                    )
                if cache.has_media and not has_media:
                    raise ValueError(
                        "the cache holds images or sounds, whose tokens alone say nothing of them: "
                        "pass them again with the whole conversation, or no cache"
                    )
                return cache
            if cache.get_seq_length() > 0:
                raise ValueError(
                    f"a {type(cache).__name__} that holds tokens cannot be continued with token "
                    "trees; pass the cache of an earlier speculative output, or none"
                )
        return TreeCache(model, batch)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots per row; kept slots move to the larger buffers."""
        if capacity <= self.capacity:
            return
        grown = []
        for layer in self.tree_layers:
            if layer.is_initialized:
                grown.append((layer, *layer.grown(capacity)))
        for layer, keys, values in grown:  # only when all could be allocated
            layer.keys, layer.values = keys, values
        self.capacity = capacity

    def rewind(self, prompts: Sequence[Sequence[int]], media: Media | None = None) -> list[int]:
        """Keep what the cache shares with the prompts, but for each prompt's last token; nothing of
        prompts with images or sounds, whose tokens do not tell them apart.

        Returns:
            the slots kept in each row.
        """
        if media is not None:
            self.tokens = [[] for _ in prompts]
        self.has_media = media is not None
        self.offsets = None if media is None else media.offsets
        shared = []
        for held, prompt in zip(self.tokens, prompts, strict=True):
            pairs = zip(held, prompt[:-1], strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            shared.append(min(len(held), len(prompt) - 1) if first is None else first)
        self.tokens = [held[:size] for held, size in zip(self.tokens, shared, strict=True)]
        return shared

    def start(self, lengths: Tensor) -> None:
        """End the prefill with `lengths` [B] int32 committed slots per row."""
        self.lengths = lengths

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """After an exception the cache holds what it shared with the prompts, and nothing else."""
        self.is_in_use = True
        try:
            yield
        except BaseException:
            self.is_in_use, self.num_nodes = False, None
            if self.lengths is not None:
                sizes = [len(held) for held in self.tokens]
                self.lengths = torch.tensor(sizes, dtype=torch.int32, device=self.lengths.device)
            raise

    def hold(self, sequences: Sequence[Sequence[int]]) -> None:
        """Remember what the committed slots hold: the last token of a row is not in the cache."""
        assert self.lengths is not None
        sizes = self.lengths.tolist()
        self.tokens = [list(s[:size]) for s, size in zip(sequences, sizes, strict=True)]
        self.is_in_use, self.num_nodes = False, None

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

    @property
    def cache(self) -> TreeCache:
        """The cache whose layer it is, and which holds it: a strong reference back would keep the
        buffers of a finished text until Python looks for cycles.
        """
        cache = self._cache()
        assert cache is not None
        return cache

    @cache.setter
    def cache(self, cache: TreeCache) -> None:
        self._cache = weakref.ref(cache)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate on the first write, when sizes, dtype and device are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            self._buffer(x, self.cache.capacity) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def grown(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Larger copies of the buffers."""
        new = [self._buffer(x, capacity) for x in (self.keys, self.values)]
        for to, of in zip(new, (self.keys, self.values), strict=True):
            to[:, :, : of.shape[2]] = of
        return new[0], new[1]

    @staticmethod
    def _buffer(like: Tensor, capacity: int) -> Tensor:
        batch, heads, _, dim = like.shape
        return torch.empty((batch, heads, capacity, dim), dtype=like.dtype, device=like.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens; the keys and values that the attention will read, without
        copying them.
        """
        cache = self.cache
        if not cache.is_in_use:
            raise ValueError(
                "the cache of a speculative output holds rows of different lengths: pass it to "
                "speculative decoding, or none to other loops"
            )
        new_keys, new_values = heads_by_rows(key_states), heads_by_rows(value_states)
        if not self.is_initialized:
            self.lazy_initialization(new_keys, new_values)
        if cache.num_nodes is None:
            new = new_keys.shape[2]
            self.keys[:, :, :new] = new_keys
            self.values[:, :, :new] = new_values
            return key_states, value_states
        starts = cache.lengths if cache.starts is None else cache.starts
        write_kv(new_keys, new_values, self.keys, self.values, starts, cache.num_nodes)
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
