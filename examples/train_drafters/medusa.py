"""Medusa: residual heads on the last hidden state, each for a token further ahead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from checkpoints import write_checkpoint
from features import Batch
from torch import Tensor
from training import HeadsSystem, later

from specdec_kernels.drafters.medusa import MedusaHeads
from specdec_kernels.hf.features import HFTargetView


class Medusa(HeadsSystem):
    """One residual block for each head, 0 at first; the last layers are the target's rows, which
    are not trained.

    Args:
        target: whose hidden states the heads see.
        ids: [U] int64 sorted, the draft vocabulary.
        folder: where the weights go.
        num_depths: heads.

    Source: Cai et al., "Medusa", 2401.10774, section 2.2.1 (Medusa-1).
    """

    muon, muon_rate = ("",), 2.5  # all matrices

    def __init__(self, target: HFTargetView, ids: Tensor, folder: Path, num_depths: int) -> None:
        size = target.hidden_size
        config = {
            "model_type": "medusa",
            "medusa_num_heads": num_depths,
            "medusa_num_layers": 1,
            "vocab_size": target.vocab_size,
            "draft_vocab_size": len(ids),
        }
        tensors = {f"{i}.0.linear.weight": torch.zeros(size, size) for i in range(num_depths)}
        tensors |= {f"{i}.0.linear.bias": torch.zeros(size) for i in range(num_depths)}
        self.heads = MedusaHeads(write_checkpoint(folder / "initial", config, tensors, ids))
        super().__init__(self.heads, config, target, ids, num_depths)

    def outputs(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """See `System`."""
        hidden = batch.hidden[:, :-2]
        for i in range(self.num_depths):
            yield self.heads.state(i, hidden), self.heads.last_layer(i)
            hidden = later(hidden)
