"""What a model-based drafter asks of its network, and the network of its target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from .base import DraftContext

Level = Sequence[Sequence[tuple[int, int]]]
"""New nodes of each row: (token, parent), both as the network knows them: a draft's token is the
target's id; nodes are numbered from 0 in the order in which they were given, PAD is the root.
"""


class FeatureQueue(Protocol):
    """Hidden states of the target at the tokens that it has computed and kept."""

    def take(self) -> list[Tensor]:
        """Those of each row since the last call, oldest first: [m, F]. The root has none yet."""


class TargetView(Protocol):
    """The target, as far as a drafter may look into it.

    Attributes:
        name: for error messages.
        device, dtype: of its weights.
        vocab_size, hidden_size, num_layers: its sizes.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    hidden_size: int
    num_layers: int

    def embed(self, tokens: Tensor) -> Tensor:
        """Its input embeddings: [..., hidden_size]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Its output head: hidden [..., hidden_size] behind the last norm -> [..., V]."""

    def head_rows(self, tokens: Tensor) -> Tensor:
        """The rows of its output head's weight for tokens [U]: [U, hidden_size].

        Raises:
            ValueError: a head that is more than one matrix.
        """

    def watch(
        self, layers: Sequence[int] = (), *, only_last: bool = False
    ) -> AbstractContextManager[FeatureQueue]:
        """Keep features while entered: the inputs of some layers side by side, F =
        len(layers) * hidden_size; without layers what goes into the output head.

        Args:
            layers: counted from 0.
            only_last: keep the newest token's only.
        """


class DraftNetwork(ABC):
    """Logits for draft trees, grown level by level from the committed tokens.

    Attributes:
        offsets: [U] int64, as in `ProposalBuilder`; None if draft ids are target ids.
        max_depth: deepest level that it can draft; None for any.
        uses_target_slots: its nodes lie in the target's cache, behind the committed slots, which
            must have room for them.
        num_parameters: of its own, those of the target left out.
    """

    offsets: Tensor | None = None
    max_depth: int | None = None
    uses_target_slots = False
    num_parameters = 0

    def attach(self, target: TargetView) -> AbstractContextManager[object]:
        """Entered around all that is drafted for one target.

        Raises:
            ValueError: on entering, a target that the network does not fit.
        """
        return nullcontext()

    @abstractmethod
    def begin(self, batch: int, num_slots: int) -> None:
        """A new batch starts; no step will `extend` by more than `num_slots` nodes a row."""

    @abstractmethod
    def start(self, context: DraftContext) -> Tensor:
        """Take in the tokens committed since the last call; logits [B, U] after each root. Rows
        that are not active have arbitrary ones.
        """

    @abstractmethod
    def extend(self, level: Level) -> Tensor:
        """Compute the next level of every row's tree: logits [B, M, U] after its nodes, M the most
        nodes of a row; arbitrary in padding.
        """
