"""A transformers model that computes draft trees block by block, behind its committed slots."""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafters.growth import Block
from .attention import TreeCall, handing, ignores_attention
from .cache import TreeCache, cache_keyword, positions_of
from .support import decoder_of
from .target import HFTarget, asking_for, logits_at


class GrowingTarget(HFTarget):
    """A model that computes trees block by block."""

    def share(self, cache: TreeCache) -> None:
        """Use the first layers of another cache, its lengths included."""
        decoder = decoder_of(self.model)
        own = TreeCache(self.model, cache.batch)
        own.capacity, own.localities = cache.capacity, cache.localities
        own.tree_layers = [copy.copy(layer) for layer in cache.tree_layers[: len(decoder.layers)]]
        for layer in own.tree_layers:
            layer.cache = own
        own.layers = list(own.tree_layers)
        own.lengths, own.offsets = cache.lengths, cache.offsets
        self._cache = own

    def grow(self, block: Block, *, only_last: bool = False) -> Tensor:
        """Logits [B, M, V] after the block's nodes; [B, 1, V] after the last one of each row."""
        cache = self.cache
        assert cache.lengths is not None
        cache.num_nodes = block.counts
        cache.starts = cache.lengths + block.firsts
        call = TreeCall(
            block.ancestors,
            block.depths,
            cache.lengths,
            block.num_nodes,
            cache.localities,
            sources=block.sources,
            places=block.places,
        )
        depths = block.depths.gather(1, block.places)
        positions = positions_of(cache.lengths, depths, cache.offsets)
        limit = num_positions(self.model)
        batch = len(block.tokens)
        no_mask = torch.empty((batch, 1, 1, 0), dtype=torch.bool, device=self.device)
        last = (block.counts.long().clamp_min(1) - 1)[:, None]
        with handing(call):
            out = self.model(
                input_ids=block.tokens,
                attention_mask=no_mask,
                # guesses may lie beyond the last position
                position_ids=positions.clamp_max(limit - 1),
                use_cache=True,
                **{cache_keyword(self.model): cache},
                **asking_for(last if only_last else None, self.model),
            )
        if call.num_layers == 0:
            raise ValueError(ignores_attention(type(self.model).__name__))
        logits: Tensor = out.logits
        return logits_at(last, logits) if only_last else logits


def num_positions(model: PreTrainedModel) -> int:
    """Most tokens of a text that the model takes."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    return sys.maxsize if limit is None else int(limit)
