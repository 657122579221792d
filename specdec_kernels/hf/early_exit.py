"""A draft inside the target: the logits it would write if it stopped after some of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class EarlyExit:
    """Keeps the hidden states after a decoder layer, forward pass by forward pass, while entered.

    Args:
        model: a decoder with `model.layers` and `model.norm`, as Llama's is.
        num_layers: how many layers the draft runs.

    Raises:
        ValueError: another architecture, or no such layer.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int) -> None:
        decoder: Any = model.get_decoder()
        layers = getattr(decoder, "layers", None)
        norm = getattr(decoder, "norm", None)
        if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
            raise ValueError(f"{type(model).__name__} has no decoder layers and norm to exit by")
        if not 0 < num_layers < len(layers):
            raise ValueError(f"num_layers must be in [1, {len(layers) - 1}], got {num_layers}")
        self._norm = norm
        self._head: Any = model.get_output_embeddings()
        self._hidden: Tensor | None = None
        self._layer = layers[num_layers - 1]

    def __enter__(self) -> EarlyExit:
        self._hook = self._layer.register_forward_hook(self._keep)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._hidden = output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[B, N, V] of the last forward pass."""
        assert self._hidden is not None
        logits: Tensor = self._head(self._norm(self._hidden))
        return logits
