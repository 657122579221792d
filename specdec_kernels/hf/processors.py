"""The logits processors of transformers inside token trees: which kind each is, and how it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from ..processing import NodeContext
from .processor_kinds import KINDS, Kind

_declared: dict[type, Kind] = {}


def declare_logits_processor(processor: type, kind: str) -> None:
    """Say how a logits processor class of your own reads its arguments.

    Args:
        processor: the class.
        kind: "pure" (the scores only), "length" (how many tokens there are, too) or "prefix" (the
            tokens, too). Not for one that keeps state between calls or knows rows by their number.

    Raises:
        ValueError: another kind.
    """
    kinds = {k.value: k for k in (Kind.PURE, Kind.LENGTH, Kind.PREFIX)}
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind!r}")
    _declared[processor] = kinds[kind]


def kind_of(processor: Any, batch: int) -> Kind:
    """How a processor runs.

    Raises:
        ValueError: one that cannot be exact, by name; in a batch, one of an unknown class.
    """
    kind = type(processor)
    name = f"{kind.__module__}.{kind.__qualname__}"
    known = _declared.get(kind) or KINDS.get(name.removeprefix("transformers."))
    if isinstance(known, str):
        raise ValueError(f"logits processor {kind.__name__} is not supported: {known}")
    if known is not None:
        return known
    if batch > 1:
        raise ValueError(
            f"logits processor {kind.__name__} is unknown, and rows of a batch advance at their "
            "own pace: say how it reads its arguments with declare_logits_processor, or pass one "
            "row"
        )
    return Kind.PREFIX


class Processors:
    """Logits processors in their order, as `processing.LogitsProcessing`.

    Args:
        processors: of transformers or the user.
        pads: the padding before each row's prompt: processors see padded rows, as in plain
            decoding.

    Raises:
        ValueError: see `kind_of`.
    """

    def __init__(self, processors: Sequence[Any], pads: Sequence[Tensor]) -> None:
        self._pads = [pad.tolist() for pad in pads]
        self._steps: list[tuple[Kind, list[Any]]] = []  # one processor, or one per row
        for processor in processors:
            kind = kind_of(processor, len(pads))
            is_bound = kind is Kind.ROW_BOUND
            rows = range(len(pads)) if is_bound else range(1)
            made = [_of_row(processor, r, len(pads)) if is_bound else processor for r in rows]
            self._steps.append((kind, made))
        self.needs_prefix = any(k in (Kind.PREFIX, Kind.ROW_BOUND) for k, _ in self._steps)

    def __bool__(self) -> bool:
        return bool(self._steps)

    def __call__(self, logits: Tensor, contexts: Sequence[NodeContext]) -> Tensor:
        """See `processing.LogitsProcessing`."""
        for kind, processors in self._steps:
            for members in self._groups(kind, contexts):
                processor = processors[contexts[members[0]].row if len(processors) > 1 else 0]
                ids = self._ids(kind, [contexts[i] for i in members], logits.device)
                index = torch.tensor(members, device=logits.device)
                if len(members) == len(contexts):
                    logits = processor(ids, logits)
                else:
                    logits[index] = processor(ids, logits[index])
        return logits

    def _groups(self, kind: Kind, contexts: Sequence[NodeContext]) -> list[list[int]]:
        """Contexts that one call can take: rows of one tensor have one length."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, context in enumerate(contexts):
            length = 0 if kind is Kind.PURE else self._length(context)
            row = context.row if kind is Kind.ROW_BOUND else -1
            groups.setdefault((length, row), []).append(i)
        return list(groups.values())

    def _ids(self, kind: Kind, contexts: Sequence[NodeContext], device: torch.device) -> Tensor:
        if kind in (Kind.PREFIX, Kind.ROW_BOUND):
            rows = [[*self._pads[c.row], *c.tokens()] for c in contexts]
            return torch.tensor(rows, device=device)
        length = 1 if kind is Kind.PURE else self._length(contexts[0])
        return torch.zeros((1, 1), dtype=torch.int64, device=device).expand(len(contexts), length)

    def _length(self, context: NodeContext) -> int:
        return len(self._pads[context.row]) + context.length


def fused_bias(processors: Sequence[Any], vocab_size: int, device: torch.device) -> Tensor | None:
    """[V] float32 that all these processors together add to every row of logits, whatever stands
    before; None if they do anything else.
    """
    if not processors:
        return None
    added = []
    for processor in processors:
        is_words = type(processor) in (SequenceBiasLogitsProcessor, NoBadWordsLogitsProcessor)
        is_constant = is_words and all(len(words) == 1 for words in processor.sequence_bias)
        if not is_constant and type(processor) is not SuppressTokensLogitsProcessor:
            return None
        ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
        nothing = torch.zeros((1, vocab_size), dtype=torch.float32, device=device)
        added.append(processor(ids, nothing)[0])
    # several finite ones would round differently from one after the other
    if sum(bool((b.isfinite() & (b != 0)).any()) for b in added) > 1:
        return None
    return torch.stack(added).sum(0)


def _of_row(processor: Any, row: int, batch: int) -> Any:
    """A copy of a row-bound processor for one row of the batch."""
    return _ROW_COPIES[type(processor).__name__](processor, row, batch)


def _repetition(processor: Any, row: int, batch: int) -> Any:
    ignored = processor.prompt_ignore_length
    if not isinstance(ignored, Tensor):
        return processor
    if len(ignored) != batch:
        raise ValueError(
            f"RepetitionPenaltyLogitsProcessor: prompt_ignore_length must be [B] = [{batch}], "
            f"got {list(ignored.shape)}"
        )
    made = copy.copy(processor)
    made.prompt_ignore_length = int(ignored[row])
    return made


def _encoder_repetition(processor: Any, row: int, batch: int) -> Any:
    made = copy.copy(processor)
    prompts = processor.encoder_input_ids
    made.encoder_input_ids = prompts[row * len(prompts) // batch][None]
    return made


def _encoder_ngrams(processor: Any, row: int, batch: int) -> Any:
    made = copy.copy(processor)
    made.generated_ngrams = [processor.generated_ngrams[row * processor.batch_size // batch]]
    made.batch_size = 1
    return made


def _constrained(processor: Any, row: int, batch: int) -> Any:
    made = copy.copy(processor)
    allowed: Callable[[int, Tensor], list[int]] = processor._prefix_allowed_tokens_fn
    prompt = row // processor._num_beams

    def of_prompt(_: int, ids: Tensor) -> list[int]:
        return allowed(prompt, ids)

    made._prefix_allowed_tokens_fn, made._num_beams = of_prompt, 1
    return made


_ROW_COPIES: dict[str, Callable[[Any, int, int], Any]] = {
    "RepetitionPenaltyLogitsProcessor": _repetition,
    "EncoderRepetitionPenaltyLogitsProcessor": _encoder_repetition,
    "EncoderNoRepeatNGramLogitsProcessor": _encoder_ngrams,
    "PrefixConstrainedLogitsProcessor": _constrained,
}
