"""All decoder layers of a pass over trees in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..registry import op
from ..tree import random_trees
from .after_attention import after_attention
from .before_attention import before_attention
from .cache_slots import cache_inputs
from .packed_linear import check_panels, panels_of
from .tree_attention import tree_attention
from .tree_mask import tree_mask
from .write_kv import write_kv

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear layers of a decoder layer, in the order of `panels` and `biases`."""
MOST_JOINED = 64
"""Nodes of a tree of several whose nodes are the rows of one."""


def _check(
    x: Tensor,
    cos: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    depths: Tensor,
    num_nodes: Tensor | None,
    norm_weights: Sequence[Tensor],
    panels: Sequence[Tensor],
    biases: Sequence[Tensor],
    head_norm_weights: Sequence[Tensor],
    windows: Sequence[int],
    num_heads: int,
    num_hidden: int,
    entry: Tensor | None,
) -> None:
    name, num = "layer_stack", len(k_caches)
    if num == 0:
        raise ValueError(f"{name}: k_caches must be of one layer or more, got none")
    wanted = {
        "v_caches": (v_caches, (num,)),
        "norm_weights": (norm_weights, (2 * num,)),
        "panels": (panels, (7 * num,)),
        "biases": (biases, (0, 7 * num)),
        "head_norm_weights": (head_norm_weights, (0, 2 * num)),
        "windows": (windows, (num,)),
    }
    for argument, (values, counts) in wanted.items():
        if len(values) not in counts:
            allowed = " or ".join(map(str, counts))
            raise ValueError(
                f"{name}: {argument} must be {allowed} for {num} layers, got {len(values)}"
            )
    if x.shape[:2] != depths.shape:
        (batch, nodes), rows = depths.shape, list(x.shape[:2])
        total = rows[1] if num_nodes is None else int(num_nodes.clamp(0, nodes).sum())
        if rows != [1, total] or nodes > MOST_JOINED:
            raise ValueError(
                f"{name}: x must be [B, N, F] = [{batch}, {nodes}, F], or [1, T, F] with the "
                f"T = {total} nodes of trees of N <= {MOST_JOINED}, got [{rows[0]}, {rows[1]}, F]"
            )
    features, head_dim = x.shape[2], cos.shape[2]
    entries = features if entry is None else entry.shape[2]
    if head_dim % 2:
        raise ValueError(f"{name}: D must be even, got {head_dim}")
    groups = k_caches[0].shape[1]
    if groups == 0 or num_heads % groups:
        raise ValueError(
            f"{name}: num_heads must be a multiple of key/value heads, got {num_heads} and {groups}"
        )
    width, narrow = num_heads * head_dim, groups * head_dim
    rest = [(features, width), *[(num_hidden, features)] * 2, (features, num_hidden)]
    sizes = [
        size
        for inputs in [entries, *[features] * (num - 1)]
        for size in [(width, inputs), *[(narrow, inputs)] * 2, *rest]
    ]
    for i, (packed, size) in enumerate(zip(panels, sizes, strict=True)):
        bias = biases[i] if biases and biases[i].numel() else None
        check_panels(name, f"layer {i // 7}: {LINEARS[i % 7]}_", packed, size, bias)


def _fake(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    ancestors: Tensor,
    depths: Tensor,
    lengths: Tensor,
    num_nodes: Tensor,
    norm_weights: Sequence[Tensor],
    panels: Sequence[Tensor],
    biases: Sequence[Tensor],
    head_norm_weights: Sequence[Tensor],
    windows: Sequence[int],
    num_heads: int,
    num_hidden: int,
    epsilon: float,
    scale: float,
    softcap: float = 0.0,
    entry: Tensor | None = None,
) -> Tensor:
    _check(
        x, cos, k_caches, v_caches, depths, None, norm_weights, panels, biases,
        head_norm_weights, windows, num_heads, num_hidden, entry,
    )  # fmt: skip
    return x.new_empty(x.shape)


def _inputs(
    B: int,
    N: int,
    L: int,
    F: int,
    H: int,
    G: int,
    D: int,
    U: int,
    S: int,
    window: int = 0,
    softcap: float = 0.0,
    entry: int = 0,
    joined: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    cache = cache_inputs(B, N, G, D, S, 0, dtype, generator)
    caches = [
        [x + random(*x.shape, size=0.1) for x in (cache["k_cache"], cache["v_cache"])]
        for _ in range(L)
    ]
    tree = random_trees(B, N, 64, generator)
    ancestors, depths = tree_mask(tree.parents, tree.num_nodes, backend="reference")
    sizes = [(H * D, F), (G * D, F), (G * D, F), (F, H * D), (U, F), (U, F), (F, U)] * L
    if entry:
        sizes[:3] = [(outputs, entry) for outputs, _ in sizes[:3]]
    rows = (1, int(tree.num_nodes.sum())) if joined else (B, N)
    angles = torch.rand((1, rows[1], D // 2), generator=generator) * 6.0
    angles = torch.cat([angles, angles], -1).expand(*rows, D)
    biases = [random(size[0] if i % 7 != 3 else 0) for i, size in enumerate(sizes)]
    return {
        "x": random(*rows, F) * 3,
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "k_caches": [k for k, _ in caches],
        "v_caches": [v for _, v in caches],
        "ancestors": ancestors,
        "depths": depths,
        "lengths": cache["lengths"],
        "num_nodes": tree.num_nodes,
        "norm_weights": [random(F, size=0.2) + 1 for _ in range(2 * L)],
        "panels": [panels_of(random(*size, size=size[1] ** -0.5)) for size in sizes],
        "biases": biases if B % 2 else [],
        "head_norm_weights": [random(D, size=0.2) + 1 for _ in range(2 * L)] if N % 2 else [],
        "windows": [window * (i % 2) for i in range(L)],
        "num_heads": H,
        "num_hidden": U,
        "epsilon": 1e-5,
        "scale": D**-0.5,
        "softcap": softcap,
        "entry": random(*rows, entry) if entry else None,
    }


@op(
    shapes="x: R M F float, cos: R M D float, sin: R M D float, k_caches: [B G S D] float, "
    "v_caches: [B G S D] float, ancestors: B N W int64, depths: B N int32, lengths: B int32, "
    "num_nodes: B int32, norm_weights: [F] float, panels: [_ _ _ _] float, biases: [_] float, "
    "head_norm_weights: [D] float, entry: R M I float",
    fake=_fake,
    inputs=_inputs,
    mutates=("k_caches", "v_caches"),
    # Every layer rounds ten times what it adds.
    tolerance={torch.float32: 4e-6, torch.float16: 2**-8, torch.bfloat16: 2**-6},
    cases=(
        {"B": 1, "N": 1, "L": 1, "F": 64, "H": 2, "G": 1, "D": 16, "U": 96, "S": 9},
        {"B": 3, "N": 3, "L": 3, "F": 33, "H": 3, "G": 3, "D": 10, "U": 47, "S": 20, "window": 4},
        {"B": 2, "N": 8, "L": 2, "F": 576, "H": 9, "G": 3, "D": 64, "U": 1536, "S": 300},
        {"B": 1, "N": 40, "L": 2, "F": 128, "H": 4, "G": 2, "D": 32, "U": 200, "S": 90,
         "softcap": 3.0},
        {"B": 2, "N": 5, "L": 1, "F": 48, "H": 4, "G": 2, "D": 16, "U": 70, "S": 40, "entry": 96},
        {"B": 1, "N": 4, "L": 2, "F": 64, "H": 2, "G": 1, "D": 32, "U": 96, "S": 20, "entry": 33},
        {"B": 4, "N": 7, "L": 2, "F": 64, "H": 4, "G": 2, "D": 16, "U": 96, "S": 90,
         "joined": True},
        {"B": 3, "N": 20, "L": 2, "F": 33, "H": 3, "G": 3, "D": 10, "U": 47, "S": 40, "window": 4,
         "joined": True, "entry": 20},
    ),
)  # fmt: skip
def layer_stack(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    ancestors: Tensor,
    depths: Tensor,
    lengths: Tensor,
    num_nodes: Tensor,
    norm_weights: Sequence[Tensor],
    panels: Sequence[Tensor],
    biases: Sequence[Tensor],
    head_norm_weights: Sequence[Tensor],
    windows: Sequence[int],
    num_heads: int,
    num_hidden: int,
    epsilon: float,
    scale: float,
    softcap: float = 0.0,
    entry: Tensor | None = None,
) -> Tensor:
    """L pre-norm decoder layers in turn, each `before_attention`, `write_kv`, `tree_attention` and
    `after_attention`: what a model computes of its trees between embeddings and last norm.

    Args:
        x: [B, N, F] float, the hidden states, any strides; or [1, T, F], those of the T nodes of
            all trees, one tree behind the other, of N <= 64.
        cos, sin: [B, N, D] or [1, T, D], as in `rope`.
        k_caches, v_caches: L of [B, G, S, D], any strides, written as by `write_kv`.
        ancestors, depths, lengths, num_nodes: of the trees, as in `tree_attention`.
        norm_weights: 2 L of [F], of the norms before the attention and before the MLP of each
            layer, with `epsilon` as in `rms_norm`, of all norms.
        panels: 7 L, `panels_of` the weights of each layer's q, k, v, o, gate, up and down.
        biases: 7 L in the same order, [0] where a layer has none; or an empty list.
        head_norm_weights: 2 L of [D], of the norms of heads of queries and keys; or an empty list.
        windows: L, as in `tree_attention`.
        num_heads: H, of queries.
        num_hidden: U, outputs of gate and up.
        scale, softcap: as in `tree_attention`.
        entry: [B, N, I] or [1, T, I], what the first layer multiplies with its q, k and v in place
            of the norm of x, as EAGLE's layer does; the first norm weight then has no use.

    Returns:
        like x, contiguous; NaN and infinities as the formulas give them.

    Raises:
        ValueError: x of another number of nodes, no layers, lists of other lengths, panels or a
            bias of another size, an odd D, and what `write_kv` and `tree_attention` refuse.

    Source: Touvron et al., "LLaMA", 2302.13971, section 2; tree attention, Miao et al.,
        "SpecInfer", 2305.09781, section 4.
    """
    _check(
        x, cos, k_caches, v_caches, depths, num_nodes, norm_weights, panels, biases,
        head_norm_weights, windows, num_heads, num_hidden, entry,
    )  # fmt: skip
    joined = None
    if x.shape[:2] != depths.shape:
        joined = torch.arange(depths.shape[1], device=x.device) < num_nodes[:, None]
    for i, (k_cache, v_cache) in enumerate(zip(k_caches, v_caches, strict=True)):
        q_panels, k_panels, v_panels, o_panels, gate_panels, up_panels, down_panels = panels[
            7 * i : 7 * i + 7
        ]
        own = [bias if bias.numel() else None for bias in biases[7 * i : 7 * i + 7]] or [None] * 7
        heads: list[Tensor | None] = [*head_norm_weights[2 * i : 2 * i + 2]] or [None, None]
        q, k, v = before_attention.reference(
            x if entry is None else entry, norm_weights[2 * i] if entry is None else None, epsilon,
            q_panels, k_panels, v_panels, cos, sin,
            num_heads, k_cache.shape[1], own[0], own[1], own[2], heads[0], heads[1],
        )  # fmt: skip
        entry = None
        if joined is not None:
            q, k, v = (_by_trees(of_all, joined) for of_all in (q, k, v))
        write_kv.reference(k, v, k_cache, v_cache, lengths, num_nodes)
        attended, _ = tree_attention.reference(
            q, k_cache, v_cache, ancestors, depths, lengths, num_nodes,
            scale=scale, window=windows[i], softcap=softcap,
        )  # fmt: skip
        if joined is not None:
            attended = attended.transpose(1, 2)[joined].transpose(0, 1)[None]
        x = after_attention.reference(
            attended, x, o_panels, norm_weights[2 * i + 1], epsilon, gate_panels, up_panels,
            down_panels, num_hidden, own[3], own[4], own[5], own[6],
        )  # fmt: skip
    return x


def _by_trees(of_all: Tensor, is_node: Tensor) -> Tensor:
    """[1, H, T, D] as [B, H, N, D], for is_node [B, N]; padding is 0."""
    _, heads, _, dim = of_all.shape
    rows = of_all.new_zeros((*is_node.shape, heads, dim))
    rows[is_node] = of_all[0].transpose(0, 1)
    return rows.transpose(1, 2)
