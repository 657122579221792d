"""When a row ends: the stopping criteria of `generate`, asked after every single token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
)

from ..decoding import Agree, alone


class StopRule:
    """The stopping criteria of a batch, one row at a time, so that none is overshot.

    Args:
        criteria: as `generate` made them.
        pads: the padding before each row's prompt: criteria see padded rows, as in plain decoding.
        prompt_length: of the padded rows, tokens.
        agree: of `decode`: all processes must end a row at the same token.

    Attributes:
        max_length: most tokens of a padded row.
        default_pad: what to pad finished rows with if nothing else is said.
        scores_of: (row, number of new tokens) -> their scores [1, V] each, for criteria that read
            them; None without `output_scores`.

    Raises:
        ValueError: no length limit or one that leaves no room; a criterion for drafting models.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        pads: Sequence[Tensor],
        prompt_length: int,
        agree: Agree,
    ) -> None:
        self._eos: set[int] = set()
        self._others: list[Any] = []
        self._pads = pads
        self._prompt_length = prompt_length
        self.scores_of: Callable[[int, int], tuple[Tensor, ...] | None] = lambda row, count: None
        self._agree = agree
        limits = []
        self.default_pad = 0
        for criterion in criteria:
            if isinstance(criterion, EosTokenCriteria):
                ends = criterion.eos_token_id.tolist()
                self.default_pad = self.default_pad if self._eos else ends[0]
                self._eos.update(ends)
            elif isinstance(criterion, MaxLengthCriteria):
                limits.append(criterion.max_length)
            elif isinstance(criterion, ConfidenceCriteria):
                raise ValueError("stopping criterion ConfidenceCriteria is for drafting models")
            else:
                self._others.append(criterion)
        if not limits:
            raise ValueError("a length limit is needed: pass max_new_tokens or max_length")
        self.max_length = min(limits)
        if self.max_length <= prompt_length:
            raise ValueError(
                f"max_new_tokens must be >= 1, got max_length {self.max_length} "
                f"for a prompt of {prompt_length} tokens"
            )

    def __call__(self, row: int, sequence: list[int]) -> bool:
        """Whether the row ends with its last token."""
        is_end = sequence[-1] in self._eos
        if not self._others:
            return is_end
        pads = self._pads[row]
        if not is_end:
            ids = torch.cat([pads, torch.tensor(sequence, device=pads.device)])[None]
            scores = self.scores_of(row, ids.shape[1] - self._prompt_length)
            is_end = any(_is_met(criterion, criterion(ids, scores)) for criterion in self._others)
        if self._agree is alone:
            return is_end
        (end,) = self._agree((torch.tensor([is_end], device=pads.device),))  # clocks differ
        return bool(end)


def _is_met(criterion: Any, answer: bool | Tensor) -> bool:
    if isinstance(answer, Tensor) and answer.numel() != 1:
        raise ValueError(
            f"stopping criterion {type(criterion).__name__} must answer for [1, L] tokens, "
            f"got {list(answer.shape)} answers: rows end one by one"
        )
    return bool(answer)
