"""The least that a call of each operator must move and compute, and how soon that can be done.

Counted are tensors whose size grows with what an operator is for: caches, rows of logits, queries,
candidates, results. What only steers (lengths, page tables, paths, ancestor words) is left out: it
is small, and leaving it out keeps each figure a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Work:
    """The least memory traffic and arithmetic of one call."""

    num_bytes: int
    num_flops: int = 0


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published rates of a GPU.

    Attributes:
        name: as its driver calls it begins so.
        bandwidth_gbs: 10^9 bytes of memory per second.
        bf16_gflops: 10^9 operations per second of a dense bfloat16 matrix product.
        source: whose figures.
    """

    name: str
    bandwidth_gbs: float
    bf16_gflops: float
    source: str


GPUS = (
    Gpu("NVIDIA A100-SXM4-80GB", 2039, 312_000, "NVIDIA A100 Tensor Core GPU datasheet"),
    Gpu(
        "NVIDIA H100 80GB HBM3",
        3350,
        989_500,
        "NVIDIA H100 Tensor Core GPU datasheet, SXM; half of the rate with sparsity",
    ),
    Gpu("NVIDIA H200", 4800, 989_500, "NVIDIA H200 Tensor Core GPU datasheet, SXM; likewise"),
    Gpu(
        "NVIDIA B200",
        8000,
        2_250_000,
        "NVIDIA Blackwell datasheet, HGX B200; half of the rate with sparsity",
    ),
)


def published(device_name: str) -> Gpu | None:
    """The rates of the GPU with this name, where the table has them."""
    return next((gpu for gpu in GPUS if device_name.startswith(gpu.name)), None)


def roofline_us(work: Work, bandwidth_gbs: float, bf16_gflops: float) -> float:
    """µs that the work takes at best: the longer of its traffic and its arithmetic."""
    traffic = work.num_bytes / bandwidth_gbs / 1e3
    arithmetic = work.num_flops / bf16_gflops / 1e3
    return max(traffic, arithmetic)


def least_work(op: str, inputs: Inputs, outputs: Any) -> Work:
    """The least work of one call.

    Args:
        op: name of the operator.
        inputs: its arguments, as they were before the call where it writes to them.
        outputs: what the reference returned.
    """
    return _LEAST[op](inputs, outputs)


def num_bytes(*values: Any) -> int:
    """Bytes of the tensors, also those inside lists and tuples."""
    return sum(
        value.nbytes
        if isinstance(value, Tensor)
        else num_bytes(*value)
        if isinstance(value, (list, tuple))
        else 0
        for value in values
    )


def _real_nodes(inputs: Inputs, nodes: int) -> Tensor:
    """[B] int64, nodes of each tree."""
    real: Tensor = inputs["num_nodes"].long().clamp(0, nodes)
    return real


def _attention(inputs: Inputs, outputs: Any) -> Work:
    """Queries, what they see, the result."""
    q = inputs["q"]
    sizes = _real_nodes(inputs, q.shape[2])
    queries = int(sizes.sum()) * q.shape[1] * q.shape[3] * q.element_size()
    k_cache, v_cache, window = (inputs[name] for name in ("k_cache", "v_cache", "window"))
    seen = _seen(inputs, q.shape[1], k_cache, v_cache, window)
    return Work(queries + seen.num_bytes + num_bytes(*outputs), seen.num_flops)


def _seen(inputs: Inputs, heads: int, k: Tensor, v: Tensor, window: int) -> Work:
    """Each seen slot once for all heads of a group; two products per pair of a node and a slot that
    it sees.
    """
    depths, lengths = inputs["depths"].long(), inputs["lengths"].long()
    dims, nodes = k.shape[3] + v.shape[3], depths.shape[1]
    sizes, window = _real_nodes(inputs, nodes), window or 2**40
    slots = lengths.clamp_max(window - 1) * (sizes > 0) + sizes
    prefix = (window - 1 - depths).clamp_min(0).minimum(lengths[:, None])
    seen = prefix + (depths + 1).clamp_max(window)
    is_node = torch.arange(nodes, device=sizes.device) < sizes[:, None]
    cache = int(slots.sum()) * k.shape[1] * dims * k.element_size()
    return Work(cache, 2 * heads * dims * int((seen * is_node).sum()))


def _write(inputs: Inputs, outputs: Any) -> Work:
    """The rows of real nodes, read and written."""
    rows = int(_real_nodes(inputs, inputs["k"].shape[2]).sum())
    row = sum(inputs[name][0, :, 0].nbytes for name in ("k", "v"))
    return Work(2 * rows * row)


def _verify(inputs: Inputs, outputs: Any) -> Work:
    """The target's rows on the path."""
    row = inputs["logits"][0, 0].nbytes
    return Work(int((outputs[1] + 1).sum()) * row)


def _rows(inputs: Inputs, outputs: Any) -> Work:
    """Every row with its bias and mask, the results."""
    rows = (inputs.get(name) for name in ("logits", "bias", "mask"))
    return Work(num_bytes(*rows, *outputs))


def _commit(inputs: Inputs, outputs: Any) -> Work:
    """Each kept slot that changes place, read and written in every layer; hidden states of kept
    nodes read, of all nodes written.
    """
    path, kept = inputs["path"], inputs["num_kept"].long()
    places = torch.arange(path.shape[1], device=path.device)
    moved = int(((path != places) & (places < kept[:, None])).sum())
    caches = (*inputs["k_caches"], *inputs["v_caches"])
    slot = sum(cache[0, :, 0].nbytes for cache in caches)
    hidden = inputs.get("hidden")
    gathered = 0 if hidden is None else int(kept.sum()) * hidden[0, 0].nbytes + hidden.nbytes
    return Work(2 * moved * slot + gathered)


def _tree_mask(inputs: Inputs, outputs: Any) -> Work:
    """The parents of real nodes but the roots, the results."""
    sizes = _real_nodes(inputs, inputs["parents"].shape[1])
    children = int((sizes - 1).clamp_min(0).sum())
    return Work(children * inputs["parents"].element_size() + num_bytes(*outputs))


def _build_tree(inputs: Inputs, outputs: Any) -> Work:
    """The candidates, the results."""
    read = (inputs.get(name) for name in ("candidates", "logprobs", "candidate_parents"))
    return Work(num_bytes(*read, *outputs))


def _packed_linear(inputs: Inputs, outputs: Any) -> Work:
    """Every weight once, the rows, the result; two operations for each weight and row."""
    x, panels = inputs["x"], inputs["panels"]
    traffic = num_bytes(x, panels, inputs["bias"], outputs)
    return Work(traffic, 2 * x.shape[0] * x.shape[1] * inputs["num_outputs"])


def _layer_half(inputs: Inputs, outputs: Any) -> Work:
    """Every weight once, what comes in and goes out; two operations for each weight and row."""
    x = inputs["x"] if "x" in inputs else inputs["residual"]
    panels = [value for name, value in inputs.items() if name.endswith("_panels")]
    weights = sum(packed.numel() for packed in panels)
    return Work(num_bytes(*inputs.values(), outputs), 2 * x[..., 0].numel() * weights)


def _layer_stack(inputs: Inputs, outputs: Any) -> Work:
    """Every weight once, what the nodes see in every layer, what comes in and goes out."""
    caches = zip(inputs["k_caches"], inputs["v_caches"], inputs["windows"], strict=True)
    seen = [_seen(inputs, inputs["num_heads"], *layer) for layer in caches]
    lists = ("norm_weights", "panels", "biases", "head_norm_weights")
    traffic = num_bytes(*(inputs[name] for name in ("x", "entry", *lists)), outputs)
    weights = sum(packed.numel() for packed in inputs["panels"])
    return Work(
        traffic + sum(layer.num_bytes for layer in seen),
        2 * inputs["x"][..., 0].numel() * weights + sum(layer.num_flops for layer in seen),
    )


def _elementwise(inputs: Inputs, outputs: Any) -> Work:
    """All tensors once."""
    results = outputs if isinstance(outputs, tuple) else (outputs,)
    return Work(num_bytes(*inputs.values(), *results))


_LEAST: dict[str, Callable[[Inputs, Any], Work]] = {
    "tree_attention": _attention,
    "write_kv": _write,
    "verify": _verify,
    "sample": _rows,
    "topk_logprobs": _rows,
    "packed_linear": _packed_linear,
    "before_attention": _layer_half,
    "after_attention": _layer_half,
    "layer_stack": _layer_stack,
    "rms_norm": _elementwise,
    "rope": _elementwise,
    "commit": _commit,
    "tree_mask": _tree_mask,
    "build_tree": _build_tree,
}
