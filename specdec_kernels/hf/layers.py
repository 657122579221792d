"""Whole decoder layers in four operators each, while this package decodes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import after_attention, before_attention, panels_of
from .attention import (
    Rehearsal,
    TreeCall,
    attend,
    check_keywords,
    current_call,
    handing,
    lending,
)
from .cache import CACHE_KEYWORDS
from .packing import lent_forwards, most_rows, panels_in_use, takes_panels
from .stacks import Stack

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_CHILDREN = {
    "": [{"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}],
    "self_attn": [{*_PROJECTIONS}, {*_PROJECTIONS, *_HEAD_NORMS}],
    "mlp": [{*_MLP, "act_fn"}],
}
"""Part -> what it may consist of."""
_OF_THE_LAYER = {"attention_mask", "position_embeddings", *CACHE_KEYWORDS}
"""Keywords that the attention never sees, or that `_Forward` gives it by itself."""
_TOLERANCES = {torch.float32: 1e-5, torch.float16: 0.0025, torch.bfloat16: 0.02}
"""Of the whole, in Euclidean norm: what roundings to bfloat16 leave of it is about 0.004, what the
order of float32 sums does 3e-7.
"""


def decoder_layers(model: nn.Module, norms: Container[nn.Module]) -> dict[Any, dict[str, Any]]:
    """The layers that the two operators around an attention can take the place of, and what each
    gives its attention besides tensors: scale, softcap and sliding window.

    Args:
        norms: the modules that are known to compute `rms_norm`.
    """
    found: dict[Any, dict[str, Any]] = {}
    twins: dict[Any, Any] = {}
    for layer in model.modules():
        if _has_the_parts(layer, norms) and (options := _options_of(layer, twins)) is not None:
            found[layer] = options
    return found


class WholeLayers:
    """Runs those of `decoder_layers` whose linear layers are in panels by the operators.

    Layers with hooks on their parts go their own way, and so do long prompts where the CPU has
    matrix tiles.

    Args:
        model: of which only the modules below are kept alive.
        norms: as for `decoder_layers`.
    """

    def __init__(self, model: nn.Module, norms: Container[nn.Module]) -> None:
        self._options = decoder_layers(model, norms)
        self._linears = [linear for layer in self._options for linear in _linears(layer)]
        lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
        self._lists = [layers for layers in lists if all(m in self._options for m in layers)]
        self._panels: list[Tensor | None] = []
        self._forwards: dict[Any, _Forward] = {}

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Lend the layers their forwards, those of the last time if nothing was packed anew."""
        panels = [panels_in_use(linear) for linear in self._linears]
        if [*map(id, panels)] != [*map(id, self._panels)]:
            self._panels, self._forwards = panels, self._make()
        with lent_forwards(list(self._forwards), self._forwards.__getitem__):
            yield

    def _make(self) -> dict[Any, _Forward]:
        forwards = {
            layer: _Forward(layer, **options)
            for layer, options in self._options.items()
            if all(panels_in_use(linear) is not None for linear in _linears(layer))
        }
        for layers in self._lists:
            stacked = [forwards[layer] for layer in layers if layer in forwards]
            if len(stacked) < len(layers):
                continue
            stack = Stack(layers, [f.halves for f in stacked], [f.options for f in stacked])
            for index, forward in enumerate(stacked):
                forward.stack, forward.index = stack, index
        return forwards


def _has_the_parts(layer: Any, norms: Container[nn.Module]) -> bool:
    for path, choices in _CHILDREN.items():
        part = getattr(layer, path, None) if path else layer
        if not isinstance(part, nn.Module) or "forward" in part.__dict__:
            return False
        if {name for name, _ in part.named_children()} not in choices:
            return False
    own = _norms(layer)
    return (
        next(layer.buffers(), None) is None
        and len({parameter.dtype for parameter in layer.parameters()}) == 1
        and all(norm in norms and norm.variance_epsilon == own[0].variance_epsilon for norm in own)
        and all(takes_panels(linear) for linear in _linears(layer))
    )


def _norms(layer: Any) -> list[Any]:
    heads = [getattr(layer.self_attn, name, None) for name in _HEAD_NORMS]
    whole = [layer.input_layernorm, layer.post_attention_layernorm]
    return whole + [norm for norm in heads if norm is not None]


def _linears(layer: Any) -> list[Any]:
    attention = [getattr(layer.self_attn, name) for name in _PROJECTIONS]
    return attention + [getattr(layer.mlp, name) for name in _MLP]


class Halves:
    """What a layer does before its attention and after it.

    Attributes:
        norms: weights of the norms before attention and MLP, and of heads of queries and keys.
        panels, biases: of q, k, v, o, gate, up and down.
        sizes: query heads, key/value heads, head dim, outputs of gate and up, epsilon.
    """

    def __init__(self, layer: Any, panels: Callable[[Any], Tensor | None]) -> None:
        attention, mlp, linears = layer.self_attn, layer.mlp, _linears(layer)
        first, second, *of_heads = _norms(layer)
        self.head_dim = int(attention.head_dim)
        self.size, self.dtype = first.weight.numel(), first.weight.dtype
        heads, groups = (linear.out_features // self.head_dim for linear in linears[:2])
        packed = [panels(linear) for linear in linears]
        self.panels: list[Tensor] = [p for p in packed if p is not None]
        self.biases: list[Tensor | None] = [linear.bias for linear in linears]
        self.norms: list[Tensor] = [norm.weight for norm in (first, second, *of_heads)]
        self.sizes = (heads, groups, self.head_dim, linears[4].out_features, first.variance_epsilon)
        q, k, v, o, gate, up, down = self.panels
        epsilon = first.variance_epsilon
        self._before = (first.weight, epsilon, q, k, v)
        self._heads = (heads, groups, *self.biases[:3], *self.norms[2:])
        self._after = (o, second.weight, epsilon, gate, up, down)
        self._hidden = (linears[4].out_features, *self.biases[3:])
        hooked = (attention, mlp, *attention.children(), *mlp.children(), first, second)
        self._hooks = [x for p in hooked for x in (p._forward_hooks, p._forward_pre_hooks)]

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, N, D], k and v [B, G, N, D]."""
        heads: tuple[Tensor, Tensor, Tensor]
        heads = before_attention(x, *self._before, cos, sin, *self._heads)
        return heads

    def after(self, attended: Tensor, residual: Tensor) -> Tensor:
        """The next layer's hidden states, of attended values [B, H, N, D]."""
        out: Tensor = after_attention(attended, residual, *self._after, *self._hidden)
        return out

    def fit(self, x: Tensor, embeddings: Any) -> bool:
        """Whether these are hidden states and a rotary embedding as the operators take them."""
        if not isinstance(embeddings, tuple) or x.dim() != 3 or x.dtype != self.dtype:
            return False
        shape = (x.shape[1], self.head_dim)
        return all(e.dtype == x.dtype and e.shape[1:] == shape for e in embeddings)

    def has_hooks(self) -> bool:
        """Whether somebody wants to see, or change, what a part computes."""
        return any(self._hooks)


_rehearsed: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, Any] | None]]
_rehearsed = weakref.WeakKeyDictionary()
"""Layer -> its options when it was tried, and those of its attention; None if the operators compute
something else.
"""


def _options_of(layer: Any, twins: dict[Any, Any]) -> dict[str, Any] | None:
    """Each layer is tried: what it computes may depend on its place.

    Args:
        twins: by classes and sizes, shared by the layers of a model.
    """
    plain = (int, float, str, bool)
    config = getattr(layer.self_attn, "config", None)
    state: list[Any] = [
        (name, value if isinstance(value, plain) else id(value))
        for thing in (config, *layer.modules())
        for name, value in _own_values(thing).items()
    ]
    state.append(layer.input_layernorm.weight.dtype)
    if layer not in _rehearsed or _rehearsed[layer][0] != state:
        classes = tuple(type(part) for part in layer.modules())
        made_of = (classes, *((name, x.shape, x.dtype) for name, x in layer.named_parameters()))
        if made_of not in twins:
            twins[made_of] = _twin(layer)
        _rehearsed[layer] = (state, _rehearse(layer, twins[made_of]))
    return _rehearsed[layer][1]


def _own_values(thing: Any) -> dict[str, Any]:
    """What somebody set on it, besides PyTorch."""
    values = getattr(thing, "__dict__", {})
    return {name: value for name, value in values.items() if not name.startswith("_")}


def _twin(layer: Any) -> Any:
    """A copy with random weights, since in a model's own one part may be too small to show."""
    config = getattr(layer.self_attn, "config", None)
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(layer, {id(config): config})
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    for parameter in twin.parameters():
        size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
        random = torch.randn(parameter.shape, generator=generator, device="cpu") * size
        parameter.data = random.to(parameter.dtype)
    return twin


def _rehearse(layer: Any, twin: Any) -> dict[str, Any] | None:
    """Run the twin, as if it were the layer, and both halves on random numbers; what it gives its
    attention.
    """
    for part, own_part in zip(twin.modules(), layer.modules(), strict=True):
        part.__dict__.update(_own_values(own_part))
    generator = torch.Generator().manual_seed(0)
    config = getattr(layer.self_attn, "config", None)
    rehearsal = Rehearsal()
    try:
        halves = Halves(twin, lambda linear: panels_of(linear.weight))
        x, cos, sin = (
            torch.randn((2, 3, size), generator=generator, device="cpu").to(halves.dtype)
            for size in (halves.size, halves.head_dim, halves.head_dim)
        )
        with torch.no_grad(), lending([config]), handing(rehearsal):
            own = type(twin).forward(twin, x, position_embeddings=(cos, sin))
            if not isinstance(own, Tensor) or rehearsal.given is None:
                return None
            pairs = [*zip(halves.before(x, cos, sin), rehearsal.given, strict=True)]
            pairs.append((halves.after(rehearsal.given[0], x), own))
    except (AttributeError, RuntimeError, TypeError, ValueError):  # wants something else
        return None
    options = rehearsal.options | {"sliding_window": rehearsal.sliding_window}
    has_sinks = options.pop("sinks") is not None
    return options if not has_sinks and all(_near(*pair) for pair in pairs) else None


def _near(ours: Tensor, own: Tensor) -> bool:
    if ours.shape != own.shape or ours.dtype != own.dtype:
        return False
    return bool((ours.float() - own.float()).norm() <= _TOLERANCES[own.dtype] * own.float().norm())


class _Forward:
    """The forward that is lent to a layer.

    Attributes:
        halves: what the layer computes with.
        options: what it gives its attention: scale and softcap.
        stack, index: the layers that it is one of, and its place there.
    """

    def __init__(
        self, layer: Any, *, scale: float, softcap: float, sliding_window: int | None
    ) -> None:
        self.halves = Halves(layer, panels_in_use)
        self.options = {"scale": scale, "softcap": softcap}
        self._sliding_window = sliding_window
        self._most_rows = most_rows(self.halves.dtype)
        self.stack: Stack | None = None
        self.index = 0
        self._layer, self._own, self._attention = layer, type(layer).forward, layer.self_attn

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call, embeddings = current_call(), kwargs.get("position_embeddings")
        tree = call if isinstance(call, TreeCall) else None
        run = tree.run if tree is not None and not args else None
        if run is not None and run.end and run.stack is self.stack:
            return run.go_on(self.index, hidden_states, kwargs)
        if (
            args
            or call is None
            or not self.halves.fit(hidden_states, embeddings)
            or (tree is None and hidden_states.shape[:2].numel() > self._most_rows)
            or self.halves.has_hooks()
            or torch.is_grad_enabled()
        ):
            whole: Tensor = self._own(self._layer, hidden_states, *args, **kwargs)
            return whole
        attention = self._attention
        check_keywords(attention, {k: v for k, v in kwargs.items() if k not in _OF_THE_LAYER})
        if tree is not None and self.stack is not None and self.index == 0:
            of_all = self.stack.begin(tree, hidden_states, kwargs)
            if of_all is not None:
                return of_all
        batch = len(hidden_states)
        cos, sin = (e if len(e) == batch else e.expand(batch, -1, -1) for e in embeddings or ())
        q, k, v = self.halves.before(hidden_states, cos, sin)
        for name in CACHE_KEYWORDS:
            if (cache := kwargs.get(name)) is not None:
                k, v = cache.update(k, v, attention.layer_idx)
        attended, _ = attend(
            attention,
            q,
            k,
            v,
            kwargs.get("attention_mask"),
            scaling=self.options["scale"],
            softcap=self.options["softcap"],
            sliding_window=self._sliding_window,
        )
        out = self.halves.after(attended.transpose(1, 2), hidden_states)
        if tree is not None and self.stack is not None:
            self.stack.watch(tree, self.index, hidden_states, kwargs, out)
        return out
