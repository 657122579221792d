"""Draft networks made of transformers models: a small model, and the target's first layers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.base import DraftContext
from ..drafters.growth import Block, Growth, chain
from ..drafters.network import DraftNetwork, Level, TargetView
from ..shapes import PAD
from .attention import TreeCall, dropped_keyword, tree_attention_in
from .cache import TreeCache, cache_keyword
from .features import HFTargetView
from .support import check_model
from .target import HFTarget


class DraftModel(DraftNetwork):
    """A causal language model with the target's vocabulary, and a ragged cache of its own.

    A step takes in all tokens committed since the last one in a single forward pass. Those that it
    drafted itself are not computed again: their keys and values move to the committed ones, and
    what was rejected is forgotten.

    Args:
        model: any model that `SpeculativeDecoder` takes, on the target's device.
        tokenizers: of the target and of this model, which then must give every token the same
            id. Without them the sizes of both vocabularies must agree.

    Raises:
        ValueError: another tokenizer, by the first token that differs; a model with a state other
            than keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
    ) -> None:
        check_model(model)
        if tokenizers is not None:
            check_same_vocabulary(*tokenizers)
        self.model = model
        self._has_same_tokens = tokenizers is not None
        self._batch, self._num_slots = 0, 0
        self._cached: _GrowingTarget | None = None
        self._known: list[int] = []  # cached tokens of each row

    @contextmanager
    def attach(self, target: TargetView) -> Iterator[None]:
        """See `DraftNetwork`."""
        embeddings: Any = self.model.get_input_embeddings()
        own = int(embeddings.num_embeddings)
        name = type(self.model).__name__
        if own != target.vocab_size and not self._has_same_tokens:
            raise ValueError(
                f"draft model {name} has a vocabulary of {own} tokens, the target {target.name} "
                f"has {target.vocab_size}: their ids cannot mean the same; if only the padding "
                "differs, pass both tokenizers"
            )
        if self.model.device != target.device:
            raise ValueError(
                f"draft model {name} must be on the target's device {target.device}, "
                f"got {self.model.device}"
            )
        self._last_id = own - 1
        with tree_attention_in(self.model):
            try:
                yield
            finally:
                self._cached = None

    def begin(self, batch: int, num_slots: int) -> None:
        """See `DraftNetwork`."""
        self._batch, self._num_slots = batch, num_slots
        self._cached = None

    def start(self, context: DraftContext) -> Tensor:
        """See `DraftNetwork`."""
        self._check_positions(context)
        if self._cached is None:
            return self._prefill(context)
        self._keep_accepted(context)
        missed = [
            [self._known_id(token) for token in sequence[known:]] if active else []
            for sequence, known, active in zip(
                context.sequences, self._known, context.active, strict=True
            )
        ]
        block = chain(missed, self.model.device)
        logits = self._cached.grow(block, only_last=True)
        assert self._cached.cache.lengths is not None
        self._cached.cache.lengths += block.counts
        self._known = [known + len(m) for known, m in zip(self._known, missed, strict=True)]
        self._growth = Growth(self._batch, self.model.device)
        return logits[:, 0]

    def extend(self, level: Level) -> Tensor:
        """See `DraftNetwork`."""
        assert self._cached is not None
        rows = [[(self._known_id(token), parent) for token, parent in row] for row in level]
        return self._cached.grow(self._growth.add(rows))

    def _prefill(self, context: DraftContext) -> Tensor:
        rooms = zip(context.sequences, context.max_depths, strict=True)
        capacity = max(len(sequence) + depth + 1 for sequence, depth in rooms) + self._num_slots
        self._cached = _GrowingTarget(self.model, capacity)
        prompts = [[self._known_id(token) for token in s] for s in context.sequences]
        logits = self._cached.prefill(prompts)
        self._known = [len(prompt) for prompt in prompts]
        self._growth = Growth(self._batch, self.model.device)
        return logits

    def _keep_accepted(self, context: DraftContext) -> None:
        """Commit the drafted nodes that the target kept."""
        assert self._cached is not None
        paths = [
            self._growth.walk(row, [self._known_id(token) for token in sequence[known:]])
            for row, (sequence, known) in enumerate(
                zip(context.sequences, self._known, strict=True)
            )
        ]
        kept = [len(path) if a else 0 for path, a in zip(paths, context.active, strict=True)]
        lengths = self._cached.cache.lengths
        assert lengths is not None
        num_kept = torch.tensor(kept, dtype=torch.int32, device=lengths.device)
        if all(path == list(range(len(path))) for path in paths):
            lengths += num_kept  # a chain lies where it belongs
        else:
            width = max(map(len, self._growth.tokens))
            padded = [[*path, *[PAD] * width][:width] for path in paths]
            nodes = torch.tensor(padded, dtype=torch.int32, device=lengths.device)
            self._cached.commit(nodes, num_kept)
        self._known = [known + n for known, n in zip(self._known, kept, strict=True)]

    def _known_id(self, token: int) -> int:
        """Ids that only pad the target's vocabulary have no row in a smaller one."""
        return min(token, self._last_id)

    def _check_positions(self, context: DraftContext) -> None:
        limit = _num_positions(self.model)
        longest = max(map(len, context.sequences))
        if longest > limit:
            raise ValueError(
                f"draft model {type(self.model).__name__} has {limit} positions, "
                f"got a text of {longest} tokens"
            )


class EarlyExitModel(DraftNetwork):
    """The target's first layers, with its norm and head behind them: no second model.

    Its keys and values of committed tokens are the target's own in these layers, so there is
    nothing to prefill; its drafts lie in the target's cache behind the committed slots, until the
    target writes its own tree there.

    Args:
        num_layers: how many layers it runs.

    Source: draft and verify, Zhang et al., 2309.08168; LayerSkip, Elhoushi et al., 2404.16710.
    """

    uses_target_slots = True

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._batch = 0

    @contextmanager
    def attach(self, target: TargetView) -> Iterator[None]:
        """See `DraftNetwork`.

        Raises:
            ValueError: a target without so many layers, or of another build.
        """
        if not isinstance(target, HFTargetView):
            raise ValueError(f"EarlyExitModel needs a transformers model, got {target.name}")
        self._target = target.target
        self._model = first_layers(self._target.model, self.num_layers)
        yield

    def begin(self, batch: int, num_slots: int) -> None:
        """See `DraftNetwork`."""
        self._batch = batch
        self._cached: _GrowingTarget | None = None

    def start(self, context: DraftContext) -> Tensor:
        """See `DraftNetwork`."""
        if self._cached is None:  # the target's buffers are there once it has prefilled
            self._cached = _GrowingTarget(self._model, 0)
            self._cached.share(self._target.cache)
        self._growth = Growth(self._batch, self._target.device)
        roots = [
            [(sequence[-1], PAD)] if active else []
            for sequence, active in zip(context.sequences, context.active, strict=True)
        ]
        return self._cached.grow(self._growth.add(roots))[:, 0]

    def extend(self, level: Level) -> Tensor:
        """See `DraftNetwork`."""
        assert self._cached is not None
        # The root is node 0 here, so that everything else is counted one further.
        rows = [[(token, parent - PAD) for token, parent in row] for row in level]
        return self._cached.grow(self._growth.add(rows))


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A model that shares the weights of the first layers, the norm and the head of another.

    Raises:
        ValueError: an architecture whose decoder has no list of layers, or not so many.
    """
    decoder: Any = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    names = [name for name, module in model.named_children() if module is decoder]
    if not isinstance(layers, nn.ModuleList) or not names:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers to exit from")
    if not 0 < num_layers < len(layers):
        raise ValueError(
            f"exit layer must be in [1, {len(layers) - 1}] for {type(model).__name__}, "
            f"got {num_layers}"
        )
    shorter = _shallow(decoder)
    shorter._modules["layers"] = nn.ModuleList(layers[:num_layers])
    whole: PreTrainedModel = _shallow(model)
    whole._modules[names[0]] = shorter
    return whole


def _shallow(module: Any) -> Any:
    """A module of its own with the same children."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _num_positions(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    return sys.maxsize if limit is None else int(limit)


def check_same_vocabulary(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless both give every token the same id."""
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours == theirs:
        return
    differing = min(
        (token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, theirs.get(token)), token),
    )
    raise ValueError(
        f"the draft model has another tokenizer than the target: token {differing!r} is "
        f"{theirs.get(differing, 'absent')} there and {ours.get(differing, 'absent')} here "
        f"({len(theirs)} and {len(ours)} tokens)"
    )


class _GrowingTarget(HFTarget):
    """A model that computes trees block by block."""

    def share(self, cache: TreeCache) -> None:
        """Use the first layers of another cache, its lengths included."""
        decoder: Any = self.model.get_decoder()
        own = TreeCache(0, cache.capacity)
        own.tree_layers = [copy.copy(layer) for layer in cache.tree_layers[: len(decoder.layers)]]
        for layer in own.tree_layers:
            layer.cache = own
        own.layers = list(own.tree_layers)
        own.lengths = cache.lengths
        self.cache = own
        self._cache_argument = {cache_keyword(self.model): own}

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
            sources=block.sources,
            places=block.places,
        )
        positions = cache.lengths[:, None] + block.depths.gather(1, block.places)
        limit = _num_positions(self.model)
        batch = len(block.tokens)
        no_mask = torch.empty((batch, 1, 1, 0), dtype=torch.bool, device=self.device)
        last = (block.counts.long().clamp_min(1) - 1)[:, None]
        out = self.model(
            input_ids=block.tokens,
            attention_mask=no_mask,
            position_ids=positions.long().clamp_max(limit - 1),  # guesses may lie beyond the last
            **self._cache_argument,
            use_cache=True,
            specdec=call,
            **({"logits_to_keep": last} if only_last else {}),
        )
        if call.num_layers == 0:
            raise ValueError(dropped_keyword(type(self.model).__name__))
        logits: Tensor = out.logits
        return logits
