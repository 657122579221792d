"""The bridge from transformers' attention interface to `ops.tree_attention`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ops import tree_attention
from .dense_attention import attend_densely
from .locality import FULL, Locality, locality_of, mark_locality
from .prompt_attention import attend_prompt
from .ragged import Ragged

if TYPE_CHECKING:
    from .stacks import Run

NAME = "specdec_tree"
"""Avoids the substrings (sdpa, flash, flex) that transformers dispatches on."""

_HARMLESS = {  # keywords of attention functions that do not change the result here
    "position_ids",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "use_cache",
    "return_dict",
    "position_embeddings",
    "layer_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "output_router_logits",
    "num_items_in_batch",
    "logits_to_keep",
    "deterministic",
}


@dataclass(slots=True)
class Localities:
    """Which keys each layer sees, learned from the masks that the model asks for in the prefill."""

    by_layer: dict[int, Locality] = field(default_factory=dict)


@dataclass(slots=True)
class TreeCall:
    """The tree of one forward pass, as every attention layer reads it.

    A pass may compute some of its nodes only; `sources` and `places` then are those of
    `drafters.growth.Block`.
    """

    ancestors: Tensor
    depths: Tensor
    lengths: Tensor
    num_nodes: Tensor
    localities: Localities
    num_layers: int = 0
    """Layers that read it; 0 after a forward pass means that the model attends by itself."""
    sources: Tensor | None = None
    places: Tensor | None = None
    is_whole: bool = False
    """Whether the target's own pass, through all of its layers, reads it."""
    run: Run | None = None


@dataclass(slots=True)
class Rehearsal:
    """Stands in for the attention while somebody tries a layer: notes what the layer gives it, and
    answers with the queries.
    """

    given: tuple[Tensor, Tensor, Tensor] | None = None
    """Query, key and value."""
    options: dict[str, Any] = field(default_factory=dict)
    """The others, as `attend_tree` names them."""
    sliding_window: int | None = None
    """What it says of its window, for prompts; of trees `Localities` knows it."""


@dataclass(slots=True)
class AsItIs:
    """Leaves the attention of a pass to the model: of a prompt whose images see ahead.

    Attributes:
        cache: where its keys and values go.
    """

    cache: Any


Call = TreeCall | Localities | Rehearsal | AsItIs

_call: ContextVar[Call | None] = ContextVar("specdec_call", default=None)
_ragged: ContextVar[Ragged | None] = ContextVar("specdec_ragged", default=None)


@contextmanager
def handing(call: Call, ragged: Ragged | None = None) -> Iterator[None]:
    """Hand a tree, or the record that a prefill fills, to the attention layers.

    Not as a keyword of the model: some models drop the keywords of their attention layers.

    Args:
        ragged: given where the model computes the tokens of all rows as those of one.
    """
    before = _call.set(call), _ragged.set(ragged)
    try:
        yield
    finally:
        _call.reset(before[0])
        _ragged.reset(before[1])


def current_call() -> Call | None:
    """What the attention layers read now."""
    return _call.get()


def _joined() -> Ragged | None:
    """What `handing` was given. Compiled steps join no rows, and a graph cannot ask before torch
    2.14.
    """
    return None if torch.compiler.is_compiling() else _ragged.get()


def is_ragged() -> bool:
    """Whether the model computes the tokens of all rows as those of one."""
    return _joined() is not None


def by_rows(computed: Tensor) -> Tensor:
    """What a layer computed, [B, N, ...], also in a pass over the tokens of all rows as one."""
    ragged = _joined()
    return computed if ragged is None else ragged.split(computed)


def heads_by_rows(computed: Tensor) -> Tensor:
    """`by_rows` of [B, H, N, D]."""
    ragged = _joined()
    if ragged is None:
        return computed  # views cost, too, where the caches are cold
    return ragged.split(computed.transpose(1, 2)).transpose(1, 2)


def replace_call(call: TreeCall) -> None:
    """Hand the layers that follow another tree, until `handing` ends."""
    _call.set(call)


@contextmanager
def tree_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """Let the model use the tree attention, and give it back as it was.

    Raises:
        ValueError: an architecture that ignores registered attention functions.
    """
    with lending(_decoder_configs(model)):
        yield


@contextmanager
def lending(configs: Sequence[Any]) -> Iterator[None]:
    """Let whoever reads these configurations use the tree attention."""
    user = object()
    try:
        for config in configs:
            _lend(config, user)
        yield
    finally:
        for config in configs:
            _give_back(config, user)


_lock = threading.RLock()
_loans: dict[int, tuple[str, set[object]]] = {}
"""By a configuration's id: its own attention, and who uses the tree attention. Threads may share a
model, and a model may draft for itself.
"""


def _lend(config: Any, user: object) -> None:
    with _lock:
        own = config._attn_implementation_internal
        _, users = _loans.setdefault(id(config), (own, set()))
        users.add(user)
        config._attn_implementation_internal = NAME


def _give_back(config: Any, user: object) -> None:
    with _lock:
        own, users = _loans.get(id(config), ("", set()))
        if user not in users:
            return
        users.remove(user)
        if not users:
            config._attn_implementation_internal = own
            del _loans[id(config)]


def _decoder_configs(model: PreTrainedModel) -> list[Any]:
    """The configurations that the text decoder reads: encoders of images or sound keep theirs."""
    text = model.config.get_text_config(decoder=True)
    found: dict[int, Any] = {id(text): text}
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        if module.config.get_text_config(decoder=True) is text:
            if not module._can_set_attn_implementation():
                raise ValueError(ignores_attention(type(model).__name__))
            found[id(module.config)] = module.config
    return list(found.values())


def ignores_attention(name: str) -> str:
    """The error text for a model that does not call registered attention functions."""
    return (
        f"{name} computes attention itself and ignores registered attention functions, "
        "so token trees cannot be exact with it"
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    specdec: TreeCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of transformers: q [B, H, N, D], k/v [B, G, S, D] -> out [B, N, H, E].

    Who calls the model while it speculates, a logits processor or another thread, gets the model's
    own attention, also for the rest of a pass that began before.
    """
    call = specdec if specdec is not None else _call.get()
    is_own = call is None or isinstance(call, AsItIs)
    own = _own_attention(module) if is_own else None
    if own is not None:
        result: tuple[Tensor, Tensor | None]
        result = own(module, query, key, value, attention_mask, **kwargs)
        return result
    return _attend(call, module, query, key, value, attention_mask, **kwargs), None


def make_mask(*, config: Any, **arguments: Any) -> Any:
    """Mask function of transformers, for whom `attend` serves."""
    name, call = _own_name(config), _call.get()
    if name == NAME or not (call is None or isinstance(call, AsItIs)):
        return mark_locality(**arguments)
    return ALL_MASK_ATTENTION_FUNCTIONS[name](config=config, **arguments)


def _own_name(config: Any) -> str:
    own, _ = _loans.get(id(config), (config._attn_implementation_internal, None))
    return own or "eager"


def _own_attention(module: nn.Module) -> Callable[..., Any] | None:
    """What the model attends by when it is lent nothing; None where that is unknown."""
    config = getattr(module, "config", None)
    if config is None or (name := _own_name(config)) == NAME:
        return None
    eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    own: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(name, eager)
    return own


def _attend(
    call: Call | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """Whatever changes the result is a named parameter: nothing that matters may vanish in
    `kwargs`.
    """
    check_keywords(module, kwargs, is_causal)
    options: dict[str, Any] = {
        "scale": float(scaling if scaling is not None else query.shape[3] ** -0.5),
        "softcap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.flatten().float(),
    }
    if isinstance(call, Rehearsal):
        call.given, call.options = (query, key, value), options
        call.sliding_window = sliding_window
        return query.transpose(1, 2)
    layer = getattr(module, "layer_idx", None)
    if isinstance(call, TreeCall):
        return attend_tree(call, layer, query, key, value, **options).transpose(1, 2)
    locality = locality_of(type(module).__name__, attention_mask, sliding_window)
    if isinstance(call, Localities) and layer is not None:
        call.by_layer[layer] = locality
    elif locality != FULL:
        raise ValueError(f"{type(module).__name__}: local attention in a layer without layer_idx")
    ragged = _joined()
    if ragged is None:
        return attend_prompt(query, key, value, locality, **options)
    rows = [
        attend_prompt(q, k, v, locality, **options)
        for q, k, v in zip(*(x.split(ragged.sizes, 2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(rows, 1)


def attend_tree(
    call: TreeCall,
    layer: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The attention of a layer, by its index, to the tree of a call: [B, H, N, E], of a query
    [B, H, N, D] and the keys and values of the cache.
    """
    call.num_layers += 1
    query = heads_by_rows(query)
    if call.sources is not None:
        query = _spread(query, call.sources)
    locality = FULL if layer is None else call.localities.by_layer[layer]
    if locality.chunk:
        out = attend_densely(
            query, key, value, call, locality, scale=scale, softcap=softcap, sinks=sinks
        ).transpose(1, 2)
    else:
        out, _ = tree_attention(
            query,
            key,
            value,
            call.ancestors,
            call.depths,
            call.lengths,
            call.num_nodes,
            window=locality.window,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )
    ragged = _joined()
    if ragged is not None:
        out = ragged.join(out.transpose(1, 2)).transpose(1, 2)
    return out if call.places is None else _spread(out, call.places)


def _spread(values: Tensor, index: Tensor) -> Tensor:
    """[B, H, M, D] at index [B, N] -> [B, H, N, D]."""
    batch, heads, _, size = values.shape
    return values.gather(2, index[:, None, :, None].expand(batch, heads, -1, size))


def check_keywords(
    module: nn.Module, kwargs: Mapping[str, Any], is_causal: bool | None = None
) -> None:
    """Refuse keywords of an attention that may change its result."""
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _HARMLESS]
    if unknown or is_causal is False:
        what = f"the keyword {unknown[0]}" if unknown else "is_causal=False"
        raise ValueError(
            f"{type(module).__name__} gives its attention {what}, which token trees do not support"
        )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
