"""Medusa: heads on the target's last hidden state, each for a token further ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from .base import DraftContext
from .checkpoint import Checkpoint
from .network import DraftNetwork, FeatureQueue, Level, TargetView

_Layer = tuple[Tensor, Tensor]


class MedusaHeads(DraftNetwork):
    """Head i guesses token i + 1 after the root from the hidden state before it, knowing none of
    the tokens between:

        h <- h + SiLU(W h + b) for each residual block, then logits = H h.

    Args:
        checkpoint: `config.json` with `medusa_num_heads` and `medusa_num_layers`; tensors
            `i.j.linear.weight`, `i.j.linear.bias` of block j and `i.L.weight` of the last layer of
            head i, bare or behind `medusa_head.`.

    Raises:
        ValueError: a missing tensor or one of a wrong shape, by file and key.

    Source: Cai et al., "Medusa", 2401.10774, section 2.1.1.
    """

    def __init__(self, checkpoint: Checkpoint | str | Path) -> None:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint(checkpoint)
        self.folder = checkpoint.folder
        checkpoint.strip(["medusa_head."])
        num_blocks = checkpoint.number("medusa_num_layers", 1)
        # Published configs may name fewer heads than their file holds; all are used.
        count = checkpoint.number("medusa_num_heads", 1)
        while f"{count}.{num_blocks}.weight" in checkpoint:
            count += 1
        self.vocab_size, self.hidden_size = checkpoint.shape(f"0.{num_blocks}.weight", 2)
        square = [self.hidden_size, self.hidden_size]
        self._blocks: list[list[_Layer]] = []
        self._heads: list[Tensor] = []
        for i in range(count):
            self._blocks.append(
                [
                    (
                        checkpoint.take(f"{i}.{j}.linear.weight", square),
                        checkpoint.take(f"{i}.{j}.linear.bias", square[:1]),
                    )
                    for j in range(num_blocks)
                ]
            )
            shape = [self.vocab_size, self.hidden_size]
            self._heads.append(checkpoint.take(f"{i}.{num_blocks}.weight", shape))
        checkpoint.refuse_others()
        self.max_depth = count

    def head(self, i: int, hidden: Tensor) -> Tensor:
        """Logits [..., V] of head i after hidden [..., F]."""
        for weight, bias in self._blocks[i]:
            hidden = hidden + silu(linear(hidden, weight, bias))
        return linear(hidden, self._heads[i])

    @contextmanager
    def attach(self, target: TargetView) -> Iterator[None]:
        """See `DraftNetwork`."""
        check_sizes(self.folder, target, self.hidden_size, self.vocab_size)
        device, dtype = target.device, target.dtype
        self._blocks = [
            [(weight.to(device, dtype), bias.to(device, dtype)) for weight, bias in blocks]
            for blocks in self._blocks
        ]
        self._heads = [weight.to(device, dtype) for weight in self._heads]
        with target.watch(only_last=True) as self._features:
            yield

    def begin(self, batch: int, num_slots: int) -> None:
        """See `DraftNetwork`."""
        self._hidden: list[Tensor | None] = [None] * batch

    def start(self, context: DraftContext) -> Tensor:
        """See `DraftNetwork`."""
        self._state = newest(self._features, self._hidden)
        self._depth = 0
        return self.head(0, self._state)

    def extend(self, level: Level) -> Tensor:
        """See `DraftNetwork`."""
        self._depth += 1
        logits = self.head(self._depth, self._state)
        return logits[:, None].expand(-1, max(map(len, level)), -1)

    _features: FeatureQueue


def newest(features: FeatureQueue, hidden: list[Tensor | None]) -> Tensor:
    """The last feature [B, F] of each row; `hidden` remembers those of rows that stood still."""
    for b, rows in enumerate(features.take()):
        if len(rows):
            hidden[b] = rows[-1]
    known = next(h for h in hidden if h is not None)
    return torch.stack([torch.zeros_like(known) if h is None else h for h in hidden])


def check_sizes(folder: Path, target: TargetView, hidden_size: int, vocab_size: int) -> None:
    """Raise ValueError for heads that were trained for another target."""
    for name, own, others in (
        ("hidden size", hidden_size, target.hidden_size),
        ("vocabulary", vocab_size, target.vocab_size),
    ):
        if own != others:
            raise ValueError(
                f"{folder}: these heads are for a {name} of {own}, {target.name} has {others}"
            )
