"""A small transformers model as the draft network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.base import DraftContext
from ..drafters.growth import Growth, chain
from ..drafters.model import ModelDrafter, SampledTree
from ..drafters.network import DraftNetwork, Level, TargetView
from ..shapes import PAD
from .attention import tree_attention_in
from .fusing import fast_layers
from .growing import GrowingTarget, num_positions
from .support import check_model, vocab_size

DRAFT_VOCAB = "draft_vocab.safetensors"
"""Beside a draft model with a vocabulary of its own: its `ids`, as `DraftModel` takes them."""


class DraftModel(DraftNetwork):
    """A causal language model with the target's vocabulary or a part of it, and a ragged cache of
    its own.

    A step takes in all tokens committed since the last one in a single forward pass. Those that it
    drafted itself are not computed again: their keys and values move to the committed ones, and
    what was rejected is forgotten.

    Args:
        model: any model that `SpeculativeDecoder` takes, on the target's device; of a PEFT model
            what it wraps, with its adapters.
        tokenizers: of the target and of this model, which then must give every token the same
            id. Without them the sizes of both vocabularies must agree.
        ids: [U] distinct integers, the target's id of each of this model's. Its vocabulary then has
            one token more, the last one, which stands for all others where they are read, and is
            never drafted.

    Raises:
        ValueError: another tokenizer, by the first token that differs; a model with a state other
            than keys and values; ids that are not one fewer than the model's tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
        ids: Tensor | None = None,
    ) -> None:
        model = getattr(model, "get_base_model", lambda: model)()
        check_model(model)
        if tokenizers is not None:
            check_same_vocabulary(*tokenizers)
        self.model = model
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self._has_same_tokens = tokenizers is not None
        self._last_id = vocab_size(model) - 1
        self._own_ids: dict[int, int] | None = None
        self._num_drafted: int | None = None
        if ids is not None:
            self._take_vocabulary(ids.long())
        self._batch, self._num_slots = 0, 0
        self._cached: GrowingTarget | None = None
        self._known: list[int] = []  # cached tokens of each row

    @contextmanager
    def attach(self, target: TargetView) -> Iterator[None]:
        """See `DraftNetwork`."""
        own = self._last_id + 1
        name = type(self.model).__name__
        if self._own_ids is not None:
            if max(self._own_ids) >= target.vocab_size:
                raise ValueError(
                    f"draft model {name} drafts token {max(self._own_ids)}, the target "
                    f"{target.name} has {target.vocab_size}"
                )
        elif own != target.vocab_size and not self._has_same_tokens:
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
        if self.offsets is not None:
            self.offsets = self.offsets.to(target.device)
        with tree_attention_in(self.model), fast_layers(self.model):
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
        return logits[:, 0, : self._num_drafted]

    def extend(self, level: Level) -> Tensor:
        """See `DraftNetwork`."""
        assert self._cached is not None
        rows = [[(self._known_id(token), parent) for token, parent in row] for row in level]
        return self._cached.grow(self._growth.add(rows))[..., : self._num_drafted]

    def _prefill(self, context: DraftContext) -> Tensor:
        rooms = zip(context.sequences, context.max_depths, strict=True)
        capacity = max(len(sequence) + depth + 1 for sequence, depth in rooms) + self._num_slots
        self._cached = GrowingTarget(self.model, capacity)
        prompts = [[self._known_id(token) for token in s] for s in context.sequences]
        logits = self._cached.prefill(prompts)
        self._known = [len(prompt) for prompt in prompts]
        self._growth = Growth(self._batch, self.model.device)
        return logits[:, : self._num_drafted]

    def _keep_accepted(self, context: DraftContext) -> None:
        """Commit the drafted nodes that the target kept. The root is computed in any case."""
        assert self._cached is not None
        paths = [
            self._growth.walk(row, [self._known_id(token) for token in sequence[known:-1]])
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
        if self._own_ids is not None:
            return self._own_ids.get(token, self._last_id)
        return min(token, self._last_id)

    def _take_vocabulary(self, ids: Tensor) -> None:
        name = type(self.model).__name__
        if ids.dim() != 1 or len(ids) != self._last_id:
            raise ValueError(
                f"draft model {name}: ids must be [{self._last_id}], one fewer than its "
                f"vocabulary, got {list(ids.shape)}"
            )
        self._own_ids = {token: own for own, token in enumerate(ids.tolist())}
        if len(self._own_ids) != len(ids) or min(self._own_ids, default=0) < 0:
            raise ValueError(f"draft model {name}: ids must be distinct and >= 0")
        self._num_drafted = len(ids)
        self.offsets = ids - torch.arange(len(ids), device=ids.device)

    def _check_positions(self, context: DraftContext) -> None:
        limit = num_positions(self.model)
        longest = max(map(len, context.sequences))
        if longest > limit:
            raise ValueError(
                f"draft model {type(self.model).__name__} has {limit} positions, "
                f"got a text of {longest} tokens"
            )


def read_draft_vocab(folder: str | Path) -> Tensor | None:
    """The `ids` of the draft model in a folder; None if it has the target's vocabulary."""
    path = Path(folder) / DRAFT_VOCAB
    return load_file(path)["ids"] if path.is_file() else None


def write_draft_vocab(folder: Path, ids: Tensor) -> None:
    """Put them beside a draft model."""
    save_file({"ids": ids.int().contiguous()}, folder / DRAFT_VOCAB)


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


def assistant_drafter(
    assistant: PreTrainedModel,
    num_tokens: int | None = None,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
) -> ModelDrafter:
    """The drafter that `assistant_model=` stands for: chains of `num_tokens` draft tokens.

    Raises:
        ValueError: fewer than one token, or another tokenizer.
    """
    if num_tokens is None:
        config = getattr(assistant, "generation_config", None)
        num_tokens = getattr(config, "num_assistant_tokens", None)
    return ModelDrafter(DraftModel(assistant, tokenizers=tokenizers), chain_of(num_tokens))


def chain_of(num_tokens: int | None) -> SampledTree:
    """A chain of that many draft tokens; None is 5.

    Raises:
        ValueError: fewer than one token.
    """
    if num_tokens is None:
        num_tokens = 5
    if num_tokens < 1:
        raise ValueError(f"num_assistant_tokens must be >= 1, got {num_tokens}")
    return SampledTree((1,) * num_tokens)
