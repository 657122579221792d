"""The same work as each operator, written as a HuggingFace user would.

A baseline prepares untimed what its user would already hold (lists, masks, an index) and returns
the call to time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from ..hf.baseline import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    growing_layer,
    sdpa_attention,
    speculative_sampling,
    warpers,
)
from ..ops import after_attention, before_attention, tree_attention, write_kv
from ..ops.packed_linear import weight_of
from ..registry import OPS

Inputs = dict[str, Any]

SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05}
"""Sampling parameters of every bench row that samples."""


class Run(NamedTuple):
    """One finished call: what it returned, and its inputs afterwards; some are written in place."""

    outputs: Any
    inputs: Inputs


@dataclass(frozen=True, slots=True)
class Baseline:
    """A way to do an operator's work without it."""

    name: str
    prepare: Callable[[Inputs], Callable[[], Any]]
    agrees: Callable[[Run, Run], bool] | None
    """Whether its run and the reference's did the same; None where each draws its own numbers."""
    why_absent: Callable[[], str | None] = lambda: None
    """Why it cannot run here; None if it can."""


def tree_bits(inputs: Inputs) -> Tensor:
    """[B, N, N] bool from the ancestor words."""
    nodes = inputs["ancestors"].shape[1]
    index = torch.arange(nodes, device=inputs["ancestors"].device)
    words: Tensor = inputs["ancestors"][:, :, index // 64]
    return (words >> (index % 64) & 1).bool()


def dense_mask(inputs: Inputs) -> Tensor:
    """[B, 1, N, S] bool for a full cache: the whole prefix, then the tree."""
    bits = tree_bits(inputs)
    prefix = bits.new_ones((*bits.shape[:2], inputs["k_cache"].shape[2] - bits.shape[2]))
    return torch.cat([prefix, bits], -1)[:, None]


def _hf_sdpa(inputs: Inputs) -> Callable[[], Tensor]:
    q, k, v = inputs["q"], inputs["k_cache"], inputs["v_cache"]
    return partial(sdpa_attention, q, k, v, dense_mask(inputs), inputs["scale"])


def _gqa_sdpa(inputs: Inputs) -> Callable[[], Tensor]:
    q, k, v, mask = inputs["q"], inputs["k_cache"], inputs["v_cache"], dense_mask(inputs)

    def call() -> Tensor:
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=inputs["scale"], enable_gqa=True
        )
        return out.transpose(1, 2).contiguous()

    return call


@lru_cache(maxsize=1)
def _compiled_flex_attention(*shapes: torch.Size) -> Callable[..., Tensor]:
    """Compiled for these shapes, and for no others: a graph that fits several, or a fall-back past
    the limit of recompilation, would be slower.
    """
    torch.compiler.reset()
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return compiled


def _flex_attention(inputs: Inputs) -> Callable[[], Tensor]:
    q, k, v, bits = inputs["q"], inputs["k_cache"], inputs["v_cache"], tree_bits(inputs)
    batch, nodes, slots = len(q), q.shape[2], k.shape[2]
    prefix = slots - nodes  # a full cache, as in `dense_mask`

    def is_seen(b: Tensor, _: Tensor, node: Tensor, slot: Tensor) -> Tensor:
        seen: Tensor = (slot < prefix) | bits[b, node, (slot - prefix).clamp_min(0)]
        return seen

    mask = create_block_mask(is_seen, batch, None, nodes, slots, device=q.device)
    attend = _compiled_flex_attention(q.shape, k.shape, v.shape)

    def call() -> Tensor:
        out = attend(q, k, v, block_mask=mask, scale=inputs["scale"], enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    return call


def _why_no_flex_attention() -> str | None:
    from torch._inductor import cpp_builder, exc  # seconds to import

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "torch.compile finds no C++ compiler"
    return None


def same_attention(own: Run, reference: Run) -> bool:
    expected = reference.outputs[0].transpose(1, 2).float()
    error = (own.outputs.float() - expected).abs().max()
    return bool(error <= 1e-2 * expected.abs().max())


def _walker(inputs: Inputs) -> Callable[[list[int]], tuple[list[int], int]]:
    """Follow the token drawn at each node while it is a drafted child."""
    edges = zip(inputs["parents"][0].tolist(), inputs["tokens"][0].tolist(), strict=True)
    children = {edge: node for node, edge in enumerate(edges) if node}

    def walk(drawn: list[int]) -> tuple[list[int], int]:
        path = [0]
        while (child := children.get((path[-1], drawn[path[-1]]))) is not None:
            path.append(child)
        return path, drawn[path[-1]]

    return walk


def _argmax_walk(inputs: Inputs) -> Callable[[], tuple[list[int], int]]:
    logits, walk = inputs["logits"], _walker(inputs)
    return lambda: walk(logits[0].argmax(-1).tolist())


def _same_path(own: Run, reference: Run) -> bool:
    path, token = own.outputs
    accepted, count, next_tokens, *_ = reference.outputs
    kept = accepted[0, : int(count[0]) + 1].tolist()
    return bool(path == kept) and token == int(next_tokens[0])


def _draw_like_hf(logits: Tensor) -> Callable[[], Tensor]:
    """Filter and draw one token per row of [R, V] logits."""
    filters = warpers(**SAMPLING)
    prompt: Any = None  # none of these filters looks at the ids

    def call() -> Tensor:
        return torch.multinomial(filters(prompt, logits.float()).softmax(-1), 1)[:, 0]

    return call


def _draw_walk(inputs: Inputs) -> Callable[[], tuple[list[int], int]]:
    walk, draw = _walker(inputs), _draw_like_hf(inputs["logits"][0])
    return lambda: walk(draw().tolist())


def _assisted_chain(inputs: Inputs) -> Callable[[], Any]:
    """Assisted decoding's filters and acceptance of a sampled chain."""
    filters, logits = warpers(**SAMPLING), inputs["logits"]
    tokens, draft_logits = inputs["tokens"][:, 1:], inputs["draft_probs"][:, :-1].log()
    prompt: Any = None

    def call() -> Any:
        kept = filters(prompt, logits[0].float())[None]
        return speculative_sampling(tokens, draft_logits, kept)

    return call


def _log_softmax_topk(inputs: Inputs) -> Callable[[], Any]:
    logits, k = inputs["logits"], inputs["k"]
    return lambda: logits.log_softmax(-1, dtype=torch.float32).topk(k)


def _same_logprobs(own: Run, reference: Run) -> bool:
    # equal logits come in any order from torch.topk, so the ids may differ
    return torch.allclose(own.outputs.values, reference.outputs[0], rtol=1e-4, atol=1e-4)


def _index_and_copy(inputs: Inputs) -> Callable[[], None]:
    caches, lengths = (*inputs["k_caches"], *inputs["v_caches"]), inputs["lengths"]
    first, kept = int(lengths[0]), int(inputs["num_kept"][0])
    source = first + inputs["path"][0, :kept].long()

    def call() -> None:
        for cache in caches:
            cache[:, :, first : first + kept] = cache.index_select(2, source)
        lengths.add_(kept)

    return call


def _same_caches(own: Run, reference: Run) -> bool:
    return all(
        torch.equal(mine, theirs)
        for name in ("k_caches", "v_caches")
        for mine, theirs in zip(own.inputs[name], reference.inputs[name], strict=True)
    ) and torch.equal(own.inputs["lengths"], reference.inputs["lengths"])


def _dynamic_layer(inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    length = int(inputs["lengths"][0])
    prefix = (inputs[name][:, :, :length] for name in ("k_cache", "v_cache"))
    return partial(growing_layer(*prefix).update, inputs["k"], inputs["v"])


def _same_prefix(own: Run, reference: Run) -> bool:
    written = (reference.inputs[name] for name in ("k_cache", "v_cache"))
    return all(
        torch.equal(grown, cache[:, :, : grown.shape[2]])
        for grown, cache in zip(own.outputs, written, strict=True)
    )


def _row_by_row(inputs: Inputs) -> Callable[[], tuple[Tensor, list[int]]]:
    parents = inputs["parents"][0].tolist()

    def call() -> tuple[Tensor, list[int]]:
        mask = torch.eye(len(parents), dtype=torch.bool)
        depths = [0] * len(parents)
        for i, parent in enumerate(parents[1:], 1):
            mask[i] |= mask[parent]
            depths[i] = depths[parent] + 1
        return mask, depths

    return call


def _same_mask(own: Run, reference: Run) -> bool:
    mask, depths = own.outputs
    bits = tree_bits({"ancestors": reference.outputs[0]})[0].cpu()
    return torch.equal(mask, bits) and bool(depths == reference.outputs[1][0].tolist())


def _python_heap(inputs: Inputs) -> Callable[[], Any]:
    return partial(OPS["build_tree"].reference, **inputs)


def _same_tree(own: Run, reference: Run) -> bool:
    return all(map(torch.equal, own.outputs, reference.outputs))


def _linear(inputs: Inputs) -> Callable[[], Tensor]:
    x, bias = inputs["x"], inputs["bias"]
    weight = weight_of(inputs["panels"], inputs["num_outputs"], x.shape[1])
    return lambda: linear(x, weight, bias)


def _hf_norm(inputs: Inputs) -> Callable[[], Tensor]:
    norm = _norm_of({"norm_weight": inputs["weight"], "epsilon": inputs["epsilon"]})
    return lambda: norm(inputs["x"])


def _norm_of(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    norm: Any = LlamaRMSNorm(len(inputs["norm_weight"]), inputs["epsilon"])
    norm.weight = torch.nn.Parameter(inputs["norm_weight"], requires_grad=False)
    made: Callable[[Tensor], Tensor] = norm
    return made


def _hf_rope(inputs: Inputs) -> Callable[[], Any]:
    return lambda: apply_rotary_pos_emb(*(inputs[name] for name in ("q", "k", "cos", "sin")))


def _hf_before_attention(inputs: Inputs) -> Callable[[], Any]:
    x, cos, sin = (inputs[name] for name in ("x", "cos", "sin"))
    norm = _norm_of(inputs)
    counts = (inputs["num_heads"], inputs["num_groups"], inputs["num_groups"])
    weights = [
        weight_of(inputs[f"{name}_panels"], count * cos.shape[2], x.shape[2])
        for name, count in zip("qkv", counts, strict=True)
    ]

    def call() -> Any:
        normed = norm(x)
        q, k, v = (
            linear(normed, weight).view(*x.shape[:2], -1, cos.shape[2]).transpose(1, 2)
            for weight in weights
        )
        return *apply_rotary_pos_emb(q, k, cos, sin), v

    return call


def _hf_after_attention(inputs: Inputs) -> Callable[[], Tensor]:
    attended, hidden = inputs["attended"], inputs["num_hidden"]
    residual: Tensor = inputs["residual"]
    values, features = attended.transpose(1, 2).flatten(2), residual.shape[2]
    norm = _norm_of(inputs)
    sizes = {
        "o": (features, values.shape[2]),
        "gate": (hidden, features),
        "up": (hidden, features),
        "down": (features, hidden),
    }
    weights = {name: weight_of(inputs[f"{name}_panels"], *size) for name, size in sizes.items()}

    def product(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[name])

    def call() -> Tensor:
        new = residual + product("o", values)
        normed = norm(new)
        return new + product("down", silu(product("gate", normed)) * product("up", normed))

    return call


def _layer_by_layer(inputs: Inputs) -> Callable[[], Tensor]:
    """The operators of each layer, one by one."""
    tree = tuple(inputs[name] for name in ("ancestors", "depths", "lengths", "num_nodes"))
    cos, sin, epsilon, scale = (inputs[name] for name in ("cos", "sin", "epsilon", "scale"))
    heads, groups = inputs["num_heads"], inputs["k_caches"][0].shape[1]
    norms, panels = inputs["norm_weights"], inputs["panels"]
    num_hidden = inputs["num_hidden"]

    def call() -> Tensor:
        x: Tensor = inputs["x"]
        for i, (k_cache, v_cache) in enumerate(
            zip(inputs["k_caches"], inputs["v_caches"], strict=True)
        ):
            first, second = norms[2 * i : 2 * i + 2]
            own = panels[7 * i : 7 * i + 7]
            q, k, v = before_attention(x, first, epsilon, *own[:3], cos, sin, heads, groups)
            write_kv(k, v, k_cache, v_cache, *tree[2:])
            attended, _ = tree_attention(q, k_cache, v_cache, *tree, scale=scale)
            x = after_attention(attended, x, own[3], second, epsilon, *own[4:], num_hidden)
        return x

    return call


def _same_values(own: Run, reference: Run) -> bool:
    return all(
        bool(torch.isclose(a, b, rtol=2**-7, atol=0.0).all()) for a, b in _pairs(own, reference)
    )


def _same_products(own: Run, reference: Run) -> bool:
    return all(
        bool((a - b).abs().max() <= b.abs().max() * 2**-7) for a, b in _pairs(own, reference)
    )


def _same_layers(own: Run, reference: Run) -> bool:
    """In Euclidean norm: eight layers round some eighty times."""
    return all(
        bool((a.float() - b.float()).norm() <= 0.01 * b.float().norm())
        for a, b in _pairs(own, reference)
    )


def _pairs(own: Run, reference: Run) -> list[tuple[Tensor, Tensor]]:
    if isinstance(own.outputs, tuple):
        return list(zip(own.outputs, reference.outputs, strict=True))
    return [(own.outputs, reference.outputs)]


HF_SDPA = Baseline("hf sdpa", _hf_sdpa, same_attention)
GQA_SDPA = Baseline("sdpa enable_gqa", _gqa_sdpa, same_attention)
FLEX_ATTENTION = Baseline(
    "compiled FlexAttention", _flex_attention, same_attention, _why_no_flex_attention
)
ARGMAX_WALK = Baseline("argmax + walk", _argmax_walk, _same_path)
DRAW_WALK = Baseline("hf warpers + multinomial + walk", _draw_walk, None)
ASSISTED = Baseline("hf warpers + speculative sampling", _assisted_chain, None)
DRAW = Baseline("hf warpers + multinomial", lambda inputs: _draw_like_hf(inputs["logits"]), None)
LOG_SOFTMAX_TOPK = Baseline("log_softmax + topk", _log_softmax_topk, _same_logprobs)
INDEX_AND_COPY = Baseline("index_select + copy", _index_and_copy, _same_caches)
DYNAMIC_LAYER = Baseline("hf DynamicCache", _dynamic_layer, _same_prefix)
ROW_BY_ROW = Baseline("mask row by row", _row_by_row, _same_mask)
PYTHON_HEAP = Baseline("python heap", _python_heap, _same_tree)
HF_NORM = Baseline("hf LlamaRMSNorm", _hf_norm, _same_values)
HF_ROPE = Baseline("hf apply_rotary_pos_emb", _hf_rope, _same_values)
LINEAR = Baseline("torch linear", _linear, _same_products)
HF_BEFORE_ATTENTION = Baseline("hf layer, eager", _hf_before_attention, _same_products)
HF_AFTER_ATTENTION = Baseline("hf layer, eager", _hf_after_attention, _same_products)
LAYER_BY_LAYER = Baseline("layer by layer", _layer_by_layer, _same_layers)
