"""A draft model: some of the target's layers, distilled until they speak for all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from features import Batch
from torch import Tensor
from training import System

from specdec_kernels.hf.draft_model import write_draft_vocab
from specdec_kernels.hf.features import HFTargetView

NUM_LAYERS = 4


class Draft(System):
    """A model like the target, with few layers, and a vocabulary whose last token stands for all
    that it does not have.

    It begins with the target's layers at equal distances, the first and the last among them, and
    the target's rows for its tokens.

    Args:
        target: whom it learns from.
        ids: [U] int64 sorted, the draft vocabulary.
        folder: where the weights go.
        num_depths: 1, as it reads its own drafts like any text.

    Raises:
        ValueError: more depths.

    Source: Leviathan et al., 2211.17192; Chen et al., 2302.01318; Zhou et al., "DistillSpec",
        2310.08461 (forward divergence, on the target's own text).
    """

    use = "--drafter draft --draft-model"
    muon, muon_rate = ("model.layers.",), 10.0

    def __init__(self, target: HFTargetView, ids: Tensor, folder: Path, num_depths: int) -> None:
        if num_depths != 1:
            raise ValueError(f"draft: depths must be 1, got {num_depths}")
        self.model = _smaller(target.target.model, ids)
        config = {"draft_vocab_size": len(ids), "num_layers": NUM_LAYERS}
        super().__init__(dict(self.model.named_parameters()), config, target, ids, 1)
        self.save(folder / "initial", target.dtype)

    def outputs(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """See `System`."""
        tokens = self.draft_ids[batch.tokens]
        tokens[tokens < 0] = len(self.ids)
        # Padding comes last: no other token sees it.
        hidden = self.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        yield hidden[:, 1:-1], self.model.get_output_embeddings().weight[:-1]

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """See `System`."""
        copy.deepcopy(self.model).to(dtype).save_pretrained(folder)
        write_draft_vocab(folder, self.ids.cpu())


def _smaller(model: Any, ids: Tensor) -> Any:
    """In float32, to be trained."""
    config = copy.deepcopy(model.config)
    config.update({"num_hidden_layers": NUM_LAYERS, "vocab_size": len(ids) + 1})
    config.update(dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")))
    smaller = type(model)(config).to(model.device).float()
    own, whole = smaller.get_decoder(), model.get_decoder()
    for i, layer in enumerate(own.layers):
        of = whole.layers[round(i * (len(whole.layers) - 1) / (NUM_LAYERS - 1))]
        layer.load_state_dict(of.state_dict())
    own.norm.load_state_dict(whole.norm.state_dict())
    for get in ("get_input_embeddings", "get_output_embeddings"):
        rows = getattr(model, get)().weight.detach().float()
        getattr(smaller, get)().weight.data = torch.cat([rows[ids], rows.mean(0, keepdim=True)])
    smaller.tie_weights()
    return smaller
