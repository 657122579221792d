"""The bridge from transformers' attention interface to `ops.tree_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..drafters.growth import spread
from ..ops import tree_attention

NAME = "specdec_tree"
"""Avoids the substrings (sdpa, flash, flex) that transformers dispatches on."""


@dataclass(slots=True)
class TreeCall:
    """The tree of one forward pass, handed to every attention layer as the keyword `specdec`.

    A pass may compute some of its nodes only; `sources` and `places` then are those of
    `drafters.growth.Block`.
    """

    ancestors: Tensor
    depths: Tensor
    lengths: Tensor
    num_nodes: Tensor
    num_layers: int = 0
    """Layers that read it; 0 after a forward pass means that the model dropped the keyword."""
    sources: Tensor | None = None
    places: Tensor | None = None


def dropped_keyword(name: str) -> str:
    """The error text for a model whose layers do not hand keyword arguments on to their
    attention.
    """
    return (
        f"{name}: the model drops the keyword arguments of its attention layers, "
        "so token trees cannot reach them"
    )


@contextmanager
def tree_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """Let the model use the tree attention, and give it back as it was.

    Raises:
        ValueError: an architecture that ignores registered attention functions.
    """
    before = model.config._attn_implementation
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} computes attention itself and ignores registered attention "
            "functions, so token trees cannot be exact with it"
        )
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    specdec: TreeCall | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: q [B, H, N, D], k/v [B, G, S, D] -> out [B, N, H, E].

    Whatever changes the result is a named parameter: nothing that matters may vanish in `kwargs`.
    """
    name = type(module).__name__
    if position_bias is not None or is_causal is False:
        raise ValueError(f"{name}: position biases and bidirectional attention are not supported")
    if specdec is None:
        if attention_mask is not None and attention_mask.shape[-1] == 0:
            raise ValueError(dropped_keyword(name))
        if softcap is not None or s_aux is not None:
            raise ValueError(f"{name}: softcap and sinks are not supported in the prefill yet")
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    specdec.num_layers += 1
    if specdec.sources is not None:
        query = spread(query, specdec.sources)
    out, _ = tree_attention(
        query,
        key,
        value,
        specdec.ancestors,
        specdec.depths,
        specdec.lengths,
        specdec.num_nodes,
        scale=scaling if scaling is not None else query.shape[3] ** -0.5,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.float(),
    )
    if specdec.places is not None:
        out = spread(out, specdec.places)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
