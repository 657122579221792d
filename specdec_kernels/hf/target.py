"""A transformers causal language model as the decoding loop's target."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..ops import tree_mask
from ..shapes import PAD
from ..tree import TokenTree, pad_rows
from .attention import AsItIs, Call, TreeCall, current_call, handing, ignores_attention
from .cache import TreeCache, cache_keyword, positions_of
from .compiled import Backend, CompiledStep, pad_tree
from .locality import NotLocal
from .media import Media
from .ragged import Ragged
from .support import vocab_size


class Watcher(Protocol):
    """Who wants to know which computed tokens are kept.

    Attributes:
        wants_all: every token's pass, also of those that a cache holds already.
        wants_rows: passes over trees [B, N], padding included.
    """

    wants_all: bool
    wants_rows: bool

    def prefilled(self, lengths: Sequence[int]) -> None:
        """So many tokens of each row's prompt are, packed to the left. 0 of each where a cache is
        continued: what it does not hold is then `committed` as a tree.
        """

    def committed(self, path: Tensor, num_kept: Tensor) -> None:
        """These nodes of the last tree are; see `HFTarget.commit`."""


class HFTarget:
    """The model with a cache of `capacity` slots per row; see `decoding.Target`.

    Args:
        model: as loaded.
        capacity: committed tokens and tree nodes of the longest row; `compiled_capacity` with
            `compile`.
        cache: one that may hold the beginning of the prompts; a new one if None.
        compile: run tree steps under `torch.compile`; True, or one of its backends.
        media: images and sounds in the prompts.

    Attributes:
        watchers: told what is kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        cache: TreeCache | None = None,
        *,
        compile: Backend = False,
        media: Media | None = None,
    ) -> None:
        self.model = model
        self.device = model.device
        self.vocab_size = vocab_size(model)
        self.watchers: list[Watcher] = []
        self._cache = cache
        self._capacity = capacity
        self._media = media
        self._step = CompiledStep.of(model, compile) if compile else None
        self._is_in_step = False
        parts = (module for module in model.modules() if module is not model)
        self._has_hooks = any(m._forward_hooks or m._forward_pre_hooks for m in parts)

    @property
    def is_compiled(self) -> bool:
        """Whether tree steps run under `torch.compile`."""
        return self._step is not None

    @property
    def pads(self) -> bool:
        """See `decoding.Target`. On a GPU a pass is not worth less for a few tokens, and to count
        them would have to wait for it; others' hooks on parts of the model may expect the rows.
        """
        wants_rows = self._has_hooks or any(watcher.wants_rows for watcher in self.watchers)
        return self.is_compiled or self.device.type != "cpu" or wants_rows

    @property
    def cache(self) -> TreeCache:
        """The cache; made with the first prompts if none was given."""
        if self._cache is None:
            raise ValueError("the target has no prompts yet")
        return self._cache

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Rows are packed to the left: a causal mask then hides the padding, and slots are
        positions. Tokens that the cache holds already are not computed again.
        """
        if self._cache is None:
            self._cache = TreeCache(self.model, len(prompts))
        cache = self.cache
        shared = cache.rewind(prompts, self._media)
        cache.reserve(self._capacity)
        if any(shared) and not any(watcher.wants_all for watcher in self.watchers):
            return self._continue(prompts, shared)
        lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int32, device=self.device)
        tokens = pad_rows(prompts, torch.int64, self.device)
        # some models view it as one row
        positions = torch.arange(tokens.shape[1], device=self.device).repeat(len(prompts), 1)
        cache.num_nodes = None
        if self._media is None:
            logits = self._run(cache.localities, tokens, positions, lengths, only_last=True)
        else:
            logits = self._prefill_media(self._media, tokens, positions, lengths)
        cache.start(lengths)
        for watcher in self.watchers:
            watcher.prefilled([len(p) for p in prompts])
        return logits[:, 0]

    def forward(self, tree: TokenTree) -> Tensor:
        """See `decoding.Target.forward`."""
        if self._step is None:
            return self._score(tree)
        padded = pad_tree(tree)
        lengths = self.cache.lengths
        assert lengths is not None
        self.cache.num_nodes = padded.num_nodes
        self._is_in_step = True
        try:
            return self._step(self.cache, padded)[:, : tree.tokens.shape[1]]
        finally:
            self._is_in_step = False

    def is_running(self) -> bool:
        """Whether it is its own pass that the model computes: processors, listeners and other
        threads may call the model, too.
        """
        if self._is_in_step:
            return True
        call, cache = current_call(), self._cache
        if cache is None or call is None:
            return False
        if isinstance(call, TreeCall):
            return call.lengths is cache.lengths
        return call is cache.localities or (isinstance(call, AsItIs) and call.cache is cache)

    def commit(self, path: Tensor, num_kept: Tensor) -> None:
        """See `decoding.Target.commit`."""
        self.cache.commit(path, num_kept.to(self.device))
        for watcher in self.watchers:
            watcher.committed(path, num_kept)

    def _prefill_media(
        self, media: Media, tokens: Tensor, positions: Tensor, lengths: Tensor
    ) -> Tensor:
        """Logits [B, 1, V] after prompts with images or sounds."""
        localities, pads = self.cache.localities, positions >= lengths[:, None]
        places = positions if media.positions is None else media.positions

        def run(call: Call, **inputs: Any) -> Tensor:
            inputs |= media.inputs
            return self._run(call, tokens, places, lengths, only_last=True, by_rows=True, **inputs)

        try:
            return run(localities)
        except NotLocal:  # images that see ahead
            self._run(localities, tokens[:, :1], positions[:, :1], lengths.clamp_max(1))  # learn it
            return run(AsItIs(self.cache), attention_mask=(~pads).long())

    def _continue(self, prompts: Sequence[Sequence[int]], shared: list[int]) -> Tensor:
        """Score what the cache does not hold yet, as a chain behind it."""
        cache = self.cache
        new = [list(p[size:]) for p, size in zip(prompts, shared, strict=True)]
        cache.start(torch.tensor(shared, dtype=torch.int32, device=self.device))
        chains = [(n, range(PAD, len(n) + PAD)) for n in new]
        tree = TokenTree.from_rows(chains, self.device)
        logits = self._score(tree, only_last=True)
        for watcher in self.watchers:
            watcher.prefilled([0] * len(prompts))
        path = torch.arange(tree.tokens.shape[1], dtype=torch.int32, device=self.device)
        self.commit(path.expand(len(prompts), -1).contiguous(), tree.num_nodes)
        return logits[:, 0]

    def _score(self, tree: TokenTree, *, only_last: bool = False) -> Tensor:
        cache = self.cache
        assert cache.lengths is not None
        cache.num_nodes = tree.num_nodes
        ancestors, depths = tree_mask(tree.parents, tree.num_nodes)
        positions = positions_of(cache.lengths, depths, cache.offsets)
        call = TreeCall(
            ancestors, depths, cache.lengths, tree.num_nodes, cache.localities, is_whole=True
        )
        logits = self._run(call, tree.tokens, positions, tree.num_nodes, only_last=only_last)
        if call.num_layers == 0:
            raise ValueError(ignores_attention(type(self.model).__name__))
        if call.run is not None:
            call.run.finish()
            call.run = None  # which knows the call
        return logits

    def _run(
        self,
        call: Call,
        tokens: Tensor,
        positions: Tensor,
        sizes: Tensor,
        *,
        only_last: bool = False,
        by_rows: bool = False,
        **inputs: Any,
    ) -> Tensor:
        """Logits [B, N, V] of tokens [B, N], so many of each row, or [B, 1, V] of each last one.

        Args:
            by_rows: also where rows could be joined.
            **inputs: of the model, besides.
        """
        ragged = None if by_rows or self.pads else Ragged.of(sizes, tokens.shape[1])
        options, last = dict(inputs), None
        if only_last:
            last = (sizes.long() - 1)[:, None]
            last = last if ragged is None else ragged.places.gather(1, last).T
        if ragged is not None:
            tokens, positions = ragged.join_last(tokens), ragged.join_last(positions)
        if isinstance(call, TreeCall):
            # A 4-D mask keeps transformers from making its own; the attention reads `call` instead.
            options["attention_mask"] = torch.empty(
                (len(tokens), 1, 1, 0), dtype=torch.bool, device=self.device
            )
        with handing(call, ragged):
            out = self.model(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                **{cache_keyword(self.model): self.cache},
                **asking_for(last, self.model),
                **options,
            )
        if last is not None:
            return logits_at(last, out.logits).view(len(sizes), 1, -1)
        logits: Tensor = out.logits
        return logits if ragged is None else ragged.split(logits)


def asking_for(places: Tensor | None, model: PreTrainedModel) -> dict[str, Tensor]:
    """Keyword by which a model computes the logits of these places [R, K] of its rows only."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_it = any(p.name == "logits_to_keep" or p.kind is p.VAR_KEYWORD for p in parameters)
    return {"logits_to_keep": places} if places is not None and takes_it else {}


def logits_at(places: Tensor, logits: Tensor) -> Tensor:
    """Logits [R, K, V] of a model that was asked for these places. Some answer with all; those that
    index with what they are given, as all did once, with the places of all rows in each.
    """
    if logits.dim() == 4:
        rows = torch.arange(len(places), device=logits.device)
        return logits[rows, rows]
    is_answer = logits.shape[1] == places.shape[1]
    return logits if is_answer else logits.take_along_dim(places[..., None], 1)
