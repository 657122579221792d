"""The backend "cuda-emulated": the CUDA kernels on CPU tensors, each GPU thread a fiber.

Registered by `install`, which conftest calls: only tests know this backend.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from specdec_kernels.ops.build_tree import empty_outputs as empty_trees
from specdec_kernels.ops.tree_attention import empty_outputs
from specdec_kernels.registry import BACKENDS, OPS
from specdec_kernels.shapes import num_words

BACKEND = "cuda-emulated"
MODULE = Path(__file__).resolve().parent.parent / "build" / "cmake" / "tests" / "cuda_emulated.so"
ORDERS = ("forward", "reverse", "random:1", "random:2")
"""Threads and blocks take turns so."""


def load() -> ModuleType:
    """The module that `make setup` builds."""
    spec = importlib.util.spec_from_file_location("cuda_emulated", MODULE)
    if spec is None or spec.loader is None:
        raise ImportError(f"{MODULE} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install() -> None:
    """Let the registry know the backend, where it was built."""
    if not MODULE.exists():
        return
    BACKENDS[BACKEND] = "cpu"
    global emulated
    emulated = load()
    for function in (tree_mask, write_kv, commit, topk_logprobs, build_tree, tree_attention):
        OPS[function.__name__].implement(BACKEND)(function)


@contextmanager
def in_order(order: str) -> Iterator[None]:
    """Threads and blocks take turns in this order."""
    emulated.set_order(order)
    try:
        yield
    finally:
        emulated.set_order("forward")


@contextmanager
def on_processors(num: int) -> Iterator[None]:
    """Kernels are told of that many multiprocessors, by which they split their work."""
    emulated.set_processors(num)
    try:
        yield
    finally:
        emulated.set_processors(8)


def tree_mask(parents: Tensor, num_nodes: Tensor) -> tuple[Tensor, Tensor]:
    """As the operator."""
    batch, nodes = parents.shape
    ancestors = torch.empty((batch, nodes, num_words(nodes)), dtype=torch.int64)
    depths = torch.empty((batch, nodes), dtype=torch.int32)
    emulated.tree_mask(parents, num_nodes, ancestors, depths)
    return ancestors, depths


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_nodes: Tensor,
    page_table: Tensor | None = None,
) -> None:
    """As the operator."""
    emulated.write_kv(k, v, k_cache, v_cache, lengths, num_nodes, page_table)


def commit(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    lengths: Tensor,
    path: Tensor,
    num_kept: Tensor,
    page_table: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """As the operator."""
    out = torch.empty((0, 0, 0)) if hidden is None else torch.empty(hidden.shape).to(hidden.dtype)
    emulated.commit([*k_caches, *v_caches], lengths, path, num_kept, page_table, hidden, out)
    return out


def topk_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As the operator."""
    emulated.check_topk(logits.shape[1], k)
    shape = (logits.shape[0], k)
    logprobs, tokens = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
    emulated.topk_logprobs(logits, k, logprobs, tokens)
    return logprobs, tokens


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ancestors: Tensor,
    depths: Tensor,
    lengths: Tensor,
    num_nodes: Tensor,
    page_table: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """As the operator, on as many multiprocessors as `on_processors` says."""
    out, lse = empty_outputs(
        q, k_cache, v_cache, ancestors, depths, lengths, num_nodes, scale=scale,
        return_lse=return_lse,
    )  # fmt: skip
    ancestors, depths = ancestors.contiguous(), depths.contiguous()
    lengths, num_nodes = lengths.contiguous(), num_nodes.contiguous()
    emulated.tree_attention(
        q, k_cache, v_cache, ancestors, depths, lengths, num_nodes, page_table,
        None if sinks is None else sinks.contiguous(), out.transpose(1, 2),
        lse if return_lse else None, scale, window, softcap,
    )  # fmt: skip
    return out, lse


def build_tree(
    roots: Tensor,
    candidates: Tensor,
    logprobs: Tensor,
    budgets: Tensor,
    candidate_parents: Tensor | None = None,
    *,
    max_nodes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the operator."""
    emulated.check_max_nodes(max_nodes)
    outputs = empty_trees(
        roots, candidates, logprobs, budgets, candidate_parents, max_nodes=max_nodes
    )
    emulated.build_tree(roots, candidates, logprobs, budgets, candidate_parents, *outputs)
    return outputs
