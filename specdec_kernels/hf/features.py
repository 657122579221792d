"""What drafters may see of the target: its embeddings, its head, and its hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attention import by_rows
from .support import decoder_of
from .target import HFTarget


class HFTargetView:
    """See `drafters.network.TargetView`.

    Attributes:
        target: who is seen.
    """

    def __init__(self, target: HFTarget) -> None:
        self.target = target
        model: Any = target.model
        self.name = type(model).__name__
        self.device = target.device
        self.dtype = model.dtype
        self.vocab_size = target.vocab_size
        config = model.config.get_text_config(decoder=True)
        self.hidden_size = int(config.hidden_size)
        self.num_layers = int(config.num_hidden_layers)
        self._embeddings: Any = model.get_input_embeddings()
        self._head: Any = model.get_output_embeddings()
        self._decoder = decoder_of(model)

    def embed(self, tokens: Tensor) -> Tensor:
        """See `TargetView`."""
        embeddings: Tensor = self._embeddings(tokens)
        return embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        """See `TargetView`."""
        logits: Tensor = self._head(hidden)
        return logits

    def head_rows(self, tokens: Tensor) -> Tensor:
        """See `TargetView`."""
        if not isinstance(self._head, nn.Linear) or getattr(self._head, "bias", None) is not None:
            raise ValueError(f"{self.name}: its output head must be a linear layer without bias")
        rows: Tensor = self._head.weight.detach()[tokens]
        return rows

    @contextmanager
    def watch(self, layers: Sequence[int] = (), *, only_last: bool = False) -> Iterator[_Features]:
        """See `TargetView`.

        Raises:
            ValueError: no such layers in this model.
        """
        size = self.hidden_size * max(1, len(layers))
        empty = torch.empty((0, size), dtype=self.dtype, device=self.device)
        features = _Features(self.target, len(layers), only_last, empty)
        with ExitStack() as hooks:
            for i, module in enumerate(self._layers(layers)):
                hook = module.register_forward_pre_hook(features.hook(i), with_kwargs=True)
                hooks.callback(hook.remove)
            if not layers:
                hook = self._decoder.register_forward_hook(features.last_hook)
                hooks.callback(hook.remove)
            self.target.watchers.append(features)
            hooks.callback(self.target.watchers.remove, features)
            yield features

    def _layers(self, layers: Sequence[int]) -> list[nn.Module]:
        modules = getattr(self._decoder, "layers", None)
        if layers and not isinstance(modules, nn.ModuleList):
            raise ValueError(f"{self.name} has no decoder layers to take features from")
        if any(not 0 <= layer < self.num_layers for layer in layers):
            raise ValueError(
                f"{self.name}: features come from the layers {list(layers)}, it has "
                f"{self.num_layers}"
            )
        return [] if modules is None else [modules[layer] for layer in layers]


class _Features:
    """A `FeatureQueue` that hooks fill; also a `target.Watcher`."""

    wants_rows = False

    def __init__(self, target: HFTarget, num_layers: int, only_last: bool, empty: Tensor) -> None:
        self._target = target
        self.empty = empty
        self.wants_all = not only_last
        self._only_last = only_last
        self._parts: list[Tensor | None] = [None] * max(1, num_layers)
        self._pending: list[list[Tensor]] = []

    def hook(self, part: int) -> Any:
        """Keeps the input of a layer. PyTorch gives a hook no keywords while another thread adds or
        removes it.
        """

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
            if self._target.is_running():
                self._parts[part] = by_rows(args[0] if args else kwargs["hidden_states"])

        return keep

    def last_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keeps the output of the decoder."""
        if self._target.is_running():
            self._parts[0] = by_rows(output[0])

    def prefilled(self, lengths: Sequence[int]) -> None:
        """See `Watcher`."""
        features = self._computed()
        first = (lambda n: max(0, n - 1)) if self._only_last else (lambda n: 0)
        self._pending = [[features[b, first(n) : n].clone()] for b, n in enumerate(lengths)]

    def committed(self, path: Tensor, num_kept: Tensor) -> None:
        """See `Watcher`."""
        features = self._computed()
        for b, kept in enumerate(num_kept.tolist()):
            if not kept:
                continue
            if self._only_last:
                self._pending[b] = []
            nodes = path[b, kept - 1 if self._only_last else 0 : kept].long()
            self._pending[b].append(features[b, nodes])

    def take(self) -> list[Tensor]:
        """See `FeatureQueue`."""
        taken = [torch.cat(rows) if rows else self.empty for rows in self._pending]
        self._pending = [[] for _ in taken]
        return taken

    def _computed(self) -> Tensor:
        parts = [part for part in self._parts if part is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
