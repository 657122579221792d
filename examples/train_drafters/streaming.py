"""Speculative streaming: low-rank adapters by which the target's last layers draft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_checkpoint
from features import Batch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from training import HeadsSystem, later
from transformers import AttentionInterface

from specdec_kernels.drafters.heads import STREAMING
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.speculative_streaming import SpeculativeStreams, last_layers

NUM_LAYERS = 3
"""Those behind the highest features of the corpus."""
RANK, RANK_AT_ENTRY = 64, 128


class Streams(HeadsSystem):
    """Adapters at every product of the last layers, 0 at first.

    Args:
        target: whose layers draft.
        ids: [U] int64 sorted, the draft vocabulary.
        folder: where the weights go.
        num_depths: streams of a node.

    Source: Bhendawade et al., "Speculative Streaming", 2402.11131, sections 3.1 and 3.2.
    """

    muon, muon_rate = ("enter.", *(f"{i}." for i in range(NUM_LAYERS))), 2.5

    def __init__(self, target: HFTargetView, ids: Tensor, folder: Path, num_depths: int) -> None:
        model: Any = target.target.model
        self._decoder = model.get_decoder()
        self._layers = last_layers(model, NUM_LAYERS)
        size = target.hidden_size
        config = {
            "model_type": STREAMING,
            "num_streams": num_depths,
            "num_layers": NUM_LAYERS,
            "hidden_size": size,
            "vocab_size": target.vocab_size,
            "draft_vocab_size": len(ids),
        }
        generator = torch.Generator().manual_seed(0)

        def adapter(name: str, rows: int, columns: int, rank: int) -> dict[str, Tensor]:
            down = torch.randn((rank, columns), generator=generator) * columns**-0.5
            return {f"{name}.down": down, f"{name}.up": torch.zeros(rows, rank)}

        tensors = {"streams": torch.zeros(num_depths, size)}
        tensors |= adapter("enter", size, size, RANK_AT_ENTRY)
        for i, layer in enumerate(self._layers):
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    tensors |= adapter(f"{i}.{name}", *module.weight.shape, RANK)
        self.streams = SpeculativeStreams(
            write_checkpoint(folder / "initial", config, tensors, ids)
        )
        super().__init__(self.streams, config, target, ids, num_depths)

    def outputs(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """See `System`."""
        hidden = self.streams.enter(batch.inputs[:, :, -1])
        own = torch.arange(batch.tokens.shape[1], device=hidden.device)
        ahead = torch.arange(1, self.num_depths + 1, device=hidden.device)
        positions = torch.cat([own, (own[:, None] + ahead).flatten()])
        embeddings = self._decoder.rotary_emb(hidden, position_ids=positions[None])
        with self.streams.adapting(self._layers), _attending_in(self._decoder.config):
            self.streams.num_own = len(own)
            for layer in self._layers:
                hidden = layer(hidden, position_embeddings=embeddings, num_own=len(own))
        hidden = self._decoder.norm(hidden[:, len(own) :]).unflatten(1, (-1, self.num_depths))
        for stream in range(self.num_depths):
            states = hidden[:, :-2, stream]
            for _ in range(stream):
                states = later(states)
            yield states, self.streams.output_weight("")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    num_own: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers, for T own rows and behind them the J streams of each: own
    rows see those before them, a stream sees what its own row sees and the streams up to itself.
    """
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    q, k, v = query[:, :, :num_own], key[:, :, :num_own], value[:, :, :num_own]
    own = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    q_streams, k_streams, v_streams = (
        x[:, :, num_own:].unflatten(2, (num_own, -1)) for x in (query * scaling, key, value)
    )
    scores = (q_streams.flatten(2, 3) @ k.transpose(2, 3)).unflatten(2, (num_own, -1))
    visible = torch.ones(num_own, num_own, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    among = q_streams @ k_streams.transpose(3, 4)
    before = torch.ones(among.shape[-2:], dtype=torch.bool, device=query.device).tril()
    among = among.masked_fill(~before, -torch.inf)
    probs = torch.cat([scores, among], -1).softmax(-1).to(value.dtype)
    seen = (probs[..., :num_own].flatten(2, 3) @ v).unflatten(2, (num_own, -1))
    streams = (seen + probs[..., num_own:] @ v_streams).flatten(2, 3)
    return torch.cat([own, streams], 2).transpose(1, 2), None


@contextmanager
def _attending_in(config: Any) -> Iterator[None]:
    own = config._attn_implementation_internal
    config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = own


_NAME = "specdec_streams"
AttentionInterface.register(_NAME, _attend)
