"""The MLP speculator: a state that runs along the draft tokens, the same weights at each depth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from checkpoints import write_checkpoint
from features import Batch
from torch import Tensor
from training import HeadsSystem, later

from specdec_kernels.drafters.mlp_speculator import MLPSpeculator
from specdec_kernels.hf.features import HFTargetView


class Speculator(HeadsSystem):
    """Tied; its embeddings are the target's, its head begins as the target's rows.

    Args:
        target: whose hidden states it starts from.
        ids: [U] int64 sorted, the draft vocabulary.
        folder: where the weights go.
        num_depths: tokens that it predicts.

    Source: Wertheimer et al., 2404.19124; of its two phases only the second, on the target's own
        text.
    """

    muon, muon_rate = ("proj.",), 2.0

    def __init__(self, target: HFTargetView, ids: Tensor, folder: Path, num_depths: int) -> None:
        size = target.hidden_size
        config = {
            "architectures": ["MLPSpeculatorPreTrainedModel"],
            "model_type": "mlp_speculator",
            "emb_dim": size,
            "inner_dim": 0,
            "n_predict": num_depths,
            "vocab_size": target.vocab_size,
            "draft_vocab_size": len(ids),
            "tie_weights": True,
            "scale_input": True,
        }
        generator = torch.Generator().manual_seed(0)
        tensors = {
            f"proj.{i}.weight": torch.randn((size, size), generator=generator) * size**-0.5
            for i in range(min(num_depths, 2))
        }
        tensors["ln.0.weight"], tensors["ln.0.bias"] = torch.ones(size), torch.zeros(size)
        tensors["head.0.weight"] = target.head_rows(ids.to(target.device)).float()
        self.network = MLPSpeculator(write_checkpoint(folder / "initial", config, tensors, ids))
        super().__init__(self.network, config, target, ids, num_depths)

    def outputs(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """See `System`."""
        tokens = batch.tokens[:, 1:-1]
        before = self.network.first_state(batch.hidden[:, :-2])
        for i in range(self.num_depths):
            state = self.network.step(i, before, tokens)
            yield state, self.network.last_layer(i)
            before = later(state)
