"""Speculative streaming: the target's own last layers draft while they verify."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..drafters.base import DraftContext
from ..drafters.checkpoint import Checkpoint
from ..drafters.network import Level, TargetView
from ..drafters.trained import TrainedHeads
from ..shapes import num_words
from .attention import TreeCall, current_call, replace_call
from .cache import TreeCache
from .features import HFTargetView
from .growing import num_positions
from .support import decoder_of


class SpeculativeStreams(TrainedHeads):
    """Streams behind every node that the target scores, each for a token further ahead.

    They enter before the target's last layers, as more nodes of the tree: stream j hangs on stream
    j - 1, the first one on its node, so that it sees what its node sees, its node, and the streams
    before it. Low-rank adapters act on their rows only:

        s_j = h + U V h + p_j before these layers;  W x + U' V' x in each of their products

    Nothing that the target computes for its own nodes sees a stream; their keys and values lie
    behind the tree's and are never committed. The streams of the last node that is kept make the
    next draft. After the prefill there are none: the first draft is arbitrary.

    Args:
        checkpoint: `config.json` with `model_type` "speculative_streaming", `num_streams`,
            `num_layers`, `hidden_size`, `vocab_size`, `draft_vocab_size`; tensors `streams` [J, F],
            `enter.down` [r, F], `enter.up` [F, r], and for products of the last layers, counted
            from the first of them, `i.NAME.down` and `i.NAME.up`, where NAME is that of a linear
            layer inside a decoder layer; `d2t` as in `Eagle3Head`. The output head is the target's.

    Raises:
        ValueError: a missing tensor or one of a wrong shape, by file and key.

    Source: Bhendawade et al., "Speculative Streaming", 2402.11131, section 3.1. There the target is
        fine-tuned with its streams; here its own rows stay as they were.
    """

    sees_newest = True
    uses_target_rows = True
    wants_all = False
    wants_rows = True

    def __init__(self, checkpoint: Checkpoint | str | Path) -> None:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint(checkpoint)
        number = checkpoint.number
        size = number("hidden_size")
        super().__init__(checkpoint, size, number("vocab_size"))
        self.num_layers = number("num_layers")
        self.max_depth = self.num_streams = number("num_streams")
        rank = checkpoint.shape("enter.down", 2)[0]
        self.weights = {
            "streams": checkpoint.take("streams", [self.num_streams, size]),
            "enter.down": checkpoint.take("enter.down", [rank, size]),
            "enter.up": checkpoint.take("enter.up", [size, rank]),
        }
        for name in checkpoint.names(".down"):
            if name != "enter":
                down = checkpoint.shape(f"{name}.down", 2)
                up = checkpoint.shape(f"{name}.up", 2)
                self.weights[f"{name}.down"] = checkpoint.take(f"{name}.down", [up[1], down[1]])
                self.weights[f"{name}.up"] = checkpoint.take(f"{name}.up", up)
        self.take_draft_vocab(checkpoint, number("draft_vocab_size", self.vocab_size))
        checkpoint.refuse_others()

    @contextmanager
    def attach(self, target: TargetView) -> Iterator[None]:
        """See `DraftNetwork`.

        Raises:
            ValueError: a target of another build or size, or one that runs compiled.
        """
        if not isinstance(target, HFTargetView):
            raise ValueError(f"SpeculativeStreams needs a transformers model, got {target.name}")
        if target.target.is_compiled:
            raise ValueError("SpeculativeStreams cannot run in compiled steps: leave `compile` out")
        model: Any = target.target.model
        layers = last_layers(model, self.num_layers)
        decoder = decoder_of(model)
        with ExitStack() as hooks:
            hooks.enter_context(super().attach(target))
            hooks.enter_context(self.adapting(layers))
            for i, layer in enumerate(layers):
                before = self._opening(decoder, target) if i == 0 else self._between
                hook = layer.register_forward_pre_hook(before, with_kwargs=True)
                hooks.callback(hook.remove)
            hooks.callback(layers[-1].register_forward_hook(self._close).remove)
            self._norm: Callable[[Tensor], Tensor] = decoder.norm
            target.target.watchers.append(self)
            hooks.callback(target.target.watchers.remove, self)
            yield

    @contextmanager
    def adapting(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Add the adapters to the products of these layers, on the rows from `num_own` on.

        Raises:
            ValueError: no such product in them, or one of another size.
        """
        self.num_own: int | None = None
        names = [key.removesuffix(".down") for key in self.weights if key.endswith(".down")]
        with ExitStack() as hooks:
            for name in names:
                if name != "enter":
                    linear = self._linear_in(layers, name)
                    hooks.callback(linear.register_forward_hook(self._adapter(name)).remove)
            yield

    def enter(self, hidden: Tensor) -> Tensor:
        """Own rows [B, N, F], then the streams of each: [B, N (1 + J), F]."""
        w = self.weights
        entered = hidden + hidden @ w["enter.down"].T @ w["enter.up"].T
        streams = entered[:, :, None] + w["streams"]
        return torch.cat([hidden, streams.flatten(1, 2)], 1)

    def prefilled(self, lengths: Any) -> None:
        """See `target.Watcher`: no row has streams yet."""
        self._newest: list[Tensor | None] = [None] * len(lengths)

    def committed(self, path: Tensor, num_kept: Tensor) -> None:
        """See `target.Watcher`."""
        for b, kept in enumerate(num_kept.tolist()):
            if kept:
                (self._newest[b],) = self._streams[b, path[b, kept - 1 : kept].long()]

    def begin(self, batch: int, num_slots: int) -> None:
        """See `DraftNetwork`."""

    def start(self, context: DraftContext) -> Tensor:
        """See `DraftNetwork`."""
        self._depth = 0
        return self._logits(0)

    def extend(self, level: Level) -> Tensor:
        """See `DraftNetwork`."""
        self._depth += 1
        return self._logits(self._depth)[:, None].expand(-1, max(map(len, level)), -1)

    def _logits(self, stream: int) -> Tensor:
        """[B, U] of every row's newest streams; all alike where it has none."""
        nothing = self._rows.new_zeros(self.target_size)
        states = torch.stack([nothing if s is None else s[stream] for s in self._newest])
        return self.output_head("", self._norm(states))

    def _opening(self, decoder: Any, target: HFTargetView) -> Any:
        """Before the first of the layers: the streams enter, and the attention reads a tree that
        includes them.
        """

        def open_(module: nn.Module, args: Any, kwargs: Any = None) -> Any:
            call = current_call()
            if not isinstance(call, TreeCall) or not target.target.is_running():
                return None  # a prefill, or somebody else's call
            hidden = args[0] if args else kwargs.pop("hidden_states")
            self.num_own = hidden.shape[1]
            nodes = self.num_own
            entered = self.enter(hidden)
            self._call = wider = _wider(call, self.num_streams)
            replace_call(wider)
            _make_room(target.target.cache, wider)
            target.target.cache.num_nodes = wider.num_nodes
            ahead = (wider.lengths[:, None] + wider.depths[:, nodes:]).long()
            ahead = ahead.clamp_max(num_positions(target.target.model) - 1)
            self._ahead = ahead, decoder.rotary_emb(entered, position_ids=ahead)
            return (entered,), self._placed(kwargs)

        return open_

    def _between(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        return (args, self._placed(kwargs)) if self._is_at_work() else None

    def _placed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The layer's keywords with the streams' positions behind those of its own rows, whose
        embeddings stay: those of some models change with the largest position.
        """
        ahead, embeddings = self._ahead
        own = kwargs.get("position_embeddings")
        if not isinstance(own, tuple) or any(part.dim() != 3 for part in own):
            raise ValueError(
                f"{self.folder}: streams need layers that are given rotary embeddings as cos and "
                f"sin [B, N, D], got {type(own).__name__}"
            )
        pairs = zip(own, embeddings, strict=True)
        joined = tuple(torch.cat([o.expand(len(e), -1, -1), e], 1) for o, e in pairs)
        positions = torch.cat([kwargs["position_ids"].expand(len(ahead), -1), ahead], 1)
        return {**kwargs, "position_ids": positions, "position_embeddings": joined}

    def _close(self, module: nn.Module, args: Any, hidden: Tensor) -> Tensor | None:
        """Behind the last layer: the streams leave, and stay here."""
        if not self._is_at_work():
            return None
        own, streams = hidden[:, : self.num_own], hidden[:, self.num_own :]
        self._streams = streams.unflatten(1, (-1, self.num_streams))
        self.num_own = None
        return own

    def _is_at_work(self) -> bool:
        """Between these layers, and in the thread that drafts: others may use the model, too."""
        return self.num_own is not None and current_call() is self._call

    def _adapter(self, name: str) -> Any:
        def adapt(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._is_at_work():
                inner = self.linear(f"{name}.down", args[0][:, self.num_own :])
                output[:, self.num_own :] += self.linear(f"{name}.up", inner)

        return adapt

    def _linear_in(self, layers: Sequence[nn.Module], name: str) -> nn.Module:
        index, _, path = name.partition(".")
        shape = [len(self.weights[f"{name}.up"]), self.weights[f"{name}.down"].shape[1]]
        found: Any = None
        if index.isdecimal() and int(index) < len(layers):
            found = dict(layers[int(index)].named_modules()).get(path)
        if not isinstance(found, nn.Linear) or list(found.weight.shape) != shape:
            raise ValueError(
                f"{self.folder}: adapter {name} is for a linear layer {shape} in the last "
                f"{len(layers)} layers, the target has none there"
            )
        return found

    _streams: Tensor
    _call: TreeCall | None = None


def last_layers(model: Any, num_layers: int) -> list[nn.Module]:
    """Of a decoder built like Llama's.

    Raises:
        ValueError: another build, or no layers before them.
    """
    decoder = decoder_of(model)
    layers = getattr(decoder, "layers", None)
    parts = [getattr(decoder, name, None) for name in ("norm", "rotary_emb")]
    if not isinstance(layers, nn.ModuleList) or None in parts:
        raise ValueError(f"{type(model).__name__} has no decoder layers that streams could enter")
    if not 0 < num_layers < len(layers):
        raise ValueError(
            f"streams must enter {type(model).__name__} before 1 to {len(layers) - 1} layers, "
            f"got {num_layers}"
        )
    return list(layers[len(layers) - num_layers :])


def _make_room(cache: TreeCache, call: TreeCall) -> None:
    """For the streams of all nodes; by half more, so that it is seldom done."""
    needed = int(call.lengths.max()) + call.depths.shape[1]
    if needed > cache.capacity:
        cache.reserve(needed + cache.capacity // 2)


def _wider(call: TreeCall, num_streams: int) -> TreeCall:
    """The tree with a chain of streams behind each of its nodes, padding included."""
    _, nodes, words = call.ancestors.shape
    device, size = call.ancestors.device, nodes * (1 + num_streams)
    columns = torch.arange(nodes, size, device=device)
    own = torch.zeros((size - nodes, num_words(size)), dtype=torch.int64, device=device)
    own[columns - nodes, columns // 64] = 1 << columns % 64
    before = own.unflatten(0, (nodes, num_streams)).cumsum(1)  # bits of a stream and those above it
    nodes_bits = torch.nn.functional.pad(call.ancestors, (0, before.shape[-1] - words))
    streams = nodes_bits[:, :, None] | before
    ahead = torch.arange(1, num_streams + 1, dtype=torch.int32, device=device)
    depths = call.depths[:, :, None] + ahead
    return replace(
        call,
        ancestors=torch.cat([nodes_bits, streams.flatten(1, 2)], 1),
        depths=torch.cat([call.depths, depths.flatten(1)], 1),
        num_nodes=torch.where(call.num_nodes > 0, size, 0).int(),
    )
