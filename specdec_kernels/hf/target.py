"""A transformers causal language model as the decoding loop's target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..ops import tree_mask
from ..tree import TokenTree
from .attention import TreeCall, dropped_keyword
from .cache import TreeCache, cache_keyword


class Watcher(Protocol):
    """Who wants to know which computed tokens are kept."""

    def prefilled(self, lengths: Sequence[int]) -> None:
        """All prompt tokens are, in rows packed to the left."""

    def committed(self, path: Tensor, num_kept: Tensor) -> None:
        """These nodes of the last tree are; see `HFTarget.commit`."""


class HFTarget:
    """The model with a cache of `capacity` slots per row; see `decoding.Target`.

    Attributes:
        watchers: told what is kept.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model = model
        self.device = model.device
        embeddings: Any = model.get_input_embeddings()
        self.vocab_size = int(embeddings.num_embeddings)
        config = model.config.get_text_config(decoder=True)
        self.cache = TreeCache(config.num_hidden_layers, capacity)
        self._cache_argument = {cache_keyword(model): self.cache}
        self.watchers: list[Watcher] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Rows are packed to the left: a causal mask then hides the padding, and slots are
        positions.
        """
        lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int32, device=self.device)
        width = max(len(p) for p in prompts)
        padded = [[*p, *[0] * (width - len(p))] for p in prompts]
        out = self.model(
            input_ids=torch.tensor(padded, device=self.device),
            position_ids=torch.arange(width, device=self.device).expand(len(prompts), -1),
            **self._cache_argument,
            use_cache=True,
            logits_to_keep=(lengths.long() - 1)[:, None],
        )
        self.cache.start(lengths)
        for watcher in self.watchers:
            watcher.prefilled([len(p) for p in prompts])
        logits: Tensor = out.logits
        return logits[:, 0]

    def forward(self, tree: TokenTree) -> Tensor:
        """See `decoding.Target.forward`."""
        cache = self.cache
        assert cache.lengths is not None
        cache.num_nodes = tree.num_nodes
        ancestors, depths = tree_mask(tree.parents, tree.num_nodes)
        call = TreeCall(ancestors, depths, cache.lengths, tree.num_nodes)
        # A 4-D mask keeps transformers from building its own; the attention reads `specdec`
        # instead.
        no_mask = torch.empty((len(tree.tokens), 1, 1, 0), dtype=torch.bool, device=self.device)
        out = self.model(
            input_ids=tree.tokens,
            attention_mask=no_mask,
            position_ids=(cache.lengths[:, None] + depths).long(),
            **self._cache_argument,
            use_cache=True,
            specdec=call,
        )
        if call.num_layers == 0:
            raise ValueError(dropped_keyword(type(self.model).__name__))
        logits: Tensor = out.logits
        return logits

    def commit(self, path: Tensor, num_kept: Tensor) -> None:
        """See `decoding.Target.commit`."""
        self.cache.commit(path, num_kept)
        for watcher in self.watchers:
            watcher.committed(path, num_kept)
