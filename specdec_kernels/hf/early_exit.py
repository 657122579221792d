"""A draft inside the target: the logits it would write if it stopped after some of its layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..drafters.base import DraftContext
from ..drafters.growth import Growth
from ..drafters.network import DraftNetwork, Level, TargetView
from ..shapes import PAD
from .features import HFTargetView
from .growing import GrowingTarget
from .support import decoder_of


class EarlyExit:
    """Keeps the hidden states after a decoder layer, forward pass by forward pass, while entered.

    Args:
        model: a decoder with `model.layers` and `model.norm`, as Llama's is.
        num_layers: how many layers the draft runs.

    Raises:
        ValueError: another architecture, or no such layer.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int) -> None:
        decoder = decoder_of(model)
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


class EarlyExitModel(DraftNetwork):
    """The target's first layers, with its norm and head behind them: no second model.

    Its keys and values of committed tokens are the target's own in these layers, so there is
    nothing to prefill; its drafts lie in the target's cache behind the committed slots, until the
    target writes its own tree there.

    Args:
        num_layers: how many layers it runs.

    Source: draft and verify, Zhang et al., 2309.08168; LayerSkip, Elhoushi et al., 2404.16710.
    """

    uses_target_slots = True

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._batch = 0

    @contextmanager
    def attach(self, target: TargetView) -> Iterator[None]:
        """See `DraftNetwork`.

        Raises:
            ValueError: a target without so many layers, or of another build.
        """
        if not isinstance(target, HFTargetView):
            raise ValueError(f"EarlyExitModel needs a transformers model, got {target.name}")
        self._target = target.target
        self._model = first_layers(self._target.model, self.num_layers)
        yield

    def begin(self, batch: int, num_slots: int) -> None:
        """See `DraftNetwork`."""
        self._batch = batch
        self._cached: GrowingTarget | None = None

    def start(self, context: DraftContext) -> Tensor:
        """See `DraftNetwork`."""
        if self._cached is None:  # the target's buffers are there once it has prefilled
            self._cached = GrowingTarget(self._model, 0)
            self._cached.share(self._target.cache)
        self._growth = Growth(self._batch, self._target.device)
        roots = [
            [(sequence[-1], PAD)] if active else []
            for sequence, active in zip(context.sequences, context.active, strict=True)
        ]
        return self._cached.grow(self._growth.add(roots))[:, 0]

    def extend(self, level: Level) -> Tensor:
        """See `DraftNetwork`."""
        assert self._cached is not None
        # The root is node 0 here, so that everything else is counted one further.
        rows = [[(token, parent - PAD) for token, parent in row] for row in level]
        return self._cached.grow(self._growth.add(rows))


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A model that shares the weights of the first layers, the norm and the head of another.

    Raises:
        ValueError: an architecture whose decoder has no list of layers, or not so many.
    """
    decoder = decoder_of(model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of decoder layers to exit from")
    if not 0 < num_layers < len(layers):
        raise ValueError(
            f"exit layer must be in [1, {len(layers) - 1}] for {type(model).__name__}, "
            f"got {num_layers}"
        )
    path = next(name for name, module in model.named_modules() if module is decoder)
    whole: PreTrainedModel = _shallow(model)
    part: Any = whole
    for name in path.split("."):
        part._modules[name] = _shallow(part._modules[name])
        part = part._modules[name]
    part._modules["layers"] = nn.ModuleList(layers[:num_layers])
    return whole


def _shallow(module: Any) -> Any:
    """A module of its own with the same children."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
