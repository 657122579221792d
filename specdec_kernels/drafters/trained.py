"""What trained heads have in common: weights of a checkpoint, for one target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..layouts import PackedWeights
from ..ops import rms_norm
from .checkpoint import Checkpoint
from .network import DraftNetwork, FeatureQueue, TargetView


class TrainedHeads(DraftNetwork):
    """Heads for one target.

    Args:
        checkpoint: whose tensors they take.
        target_size, vocab_size: hidden size and vocabulary of their target.

    Attributes:
        weights: their tensors, by name.
        sees_newest: of the target's features, the newest token's suffice.
        uses_target_rows: their output head is the target's, cut to the draft vocabulary.
    """

    sees_newest = False
    uses_target_rows = False

    def __init__(self, checkpoint: Checkpoint, target_size: int, vocab_size: int) -> None:
        self.folder = checkpoint.folder
        self.target_size, self.vocab_size = target_size, vocab_size
        self.weights: dict[str, Tensor] = {}
        self._ids = torch.arange(vocab_size, device="cpu")
        self._packed = PackedWeights()

    @property
    def num_parameters(self) -> int:  # type: ignore[override]
        """See `DraftNetwork`."""
        return sum(weight.numel() for weight in self.weights.values())

    def take_draft_vocab(self, checkpoint: Checkpoint, size: int) -> None:
        """The tensor `d2t` [U]: draft id u is target id `u + d2t[u]`. Without it the draft
        vocabulary of `size` = U tokens must be the target's.

        Raises:
            ValueError: it is missing, has another length, or maps to no or to equal target ids.
        """
        if "d2t" not in checkpoint and size == self.vocab_size:
            return
        self.offsets = checkpoint.take("d2t", [size]).long()
        self._ids = ids = self.offsets + torch.arange(size, device="cpu")
        low, high, num = int(ids.min()), int(ids.max()), len(ids.unique())
        if num < len(ids) or low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"{self.folder}: d2t must map draft ids to distinct target ids in "
                f"[0, {self.vocab_size}), found [{low}, {high}] and {num} of {len(ids)} distinct"
            )

    def linear(self, name: str, values: Tensor, bias: str = "") -> Tensor:
        """values [..., F] W^T + b with the weight of that name, and the bias if it is there."""
        return self._packed.linear(name, values, self.weights[name], self.weights.get(bias))

    @staticmethod
    def rms_norm(values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """values [..., F] over their root mean square, times weight [F]; in training by formula."""
        if weight.dtype == values.dtype and not torch.is_grad_enabled():
            normed: Tensor = rms_norm(values.flatten(0, -2), weight, epsilon)
            return normed.view_as(values)
        square = values.float().pow(2).mean(-1, keepdim=True)
        return weight * (values.float() * torch.rsqrt(square + epsilon)).to(values.dtype)

    def output_head(self, name: str, hidden: Tensor) -> Tensor:
        """Logits [..., U] by `output_weight`."""
        return self._packed.linear(name, hidden, self.output_weight(name), None)

    def output_weight(self, name: str) -> Tensor:
        """[U, d], the output head of that name, or the target's rows."""
        return self._rows if self.uses_target_rows else self.weights[name]

    def watched(self, num_layers: int) -> Sequence[int]:
        """The layers whose inputs are the target's features; none: what goes into its head."""
        return ()

    @contextmanager
    def attach(self, target: TargetView) -> Iterator[None]:
        """See `DraftNetwork`."""
        for name, own, others in (
            ("hidden size", self.target_size, target.hidden_size),
            ("vocabulary", self.vocab_size, target.vocab_size),
        ):
            if own != others:
                raise ValueError(
                    f"{self.folder}: these heads are for a {name} of {own}, {target.name} has "
                    f"{others}"
                )
        self.target = target
        self.weights = {n: w.to(target.device, target.dtype) for n, w in self.weights.items()}
        if self.offsets is not None:
            self.offsets = self.offsets.to(target.device)
        if self.uses_target_rows:
            self._rows = target.head_rows(self._ids.to(target.device))
        layers = self.watched(target.num_layers)
        with target.watch(layers, only_last=self.sees_newest) as self._features:
            yield

    target: TargetView
    _rows: Tensor
    _features: FeatureQueue


def newest(features: FeatureQueue, hidden: list[Tensor | None]) -> Tensor:
    """The last feature [B, F] of each row; `hidden` remembers those of rows that stood still."""
    for b, rows in enumerate(features.take()):
        if len(rows):
            hidden[b] = rows[-1]
    known = next(h for h in hidden if h is not None)
    return torch.stack([torch.zeros_like(known) if h is None else h for h in hidden])


def take_columns(values: Tensor, columns: Tensor) -> Tensor:
    """values [B, K, F] at columns [B, M]: [B, M, F]."""
    batch, width, size = values.shape
    if batch > 1:  # counted through all rows
        columns = columns + width * torch.arange(batch, device=columns.device)[:, None]
    # For a few rows on the CPU a third of what `gather` takes.
    taken = values.flatten(0, 1).index_select(0, columns.flatten())
    return taken.view(*columns.shape, size)
