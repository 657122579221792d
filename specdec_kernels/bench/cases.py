"""The bench cases of every operator, in one table: sizes, inputs, baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..registry import OPS
from . import baselines as base
from .baselines import SAMPLING, Baseline, Inputs
from .roofline import Work, least_work


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One operator at one size."""

    op: str
    sizes: dict[str, Any]
    baselines: tuple[Baseline, ...]
    make_realistic: Callable[[Inputs], Inputs]
    """Turns the operator's own test inputs into what a decoder holds."""

    @property
    def name(self) -> str:
        """Like "B1_N16_H9_G3_D64_S1024"."""
        parts = (key if value is True else f"{key}{value}" for key, value in self.sizes.items())
        return "_".join(parts)

    @property
    def is_quick(self) -> bool:
        """Small enough for a first look."""
        largest = {"S": 1024, "V": 49152, "D": 64, "F": 576}
        return all(self.sizes.get(key, 0) <= value for key, value in largest.items())

    def work(self, inputs: Inputs, outputs: Any) -> Work:
        """Unavoidable work, from the inputs and the reference's outputs."""
        return least_work(self.op, inputs, outputs)

    def inputs(self, device: str = "cpu") -> Inputs:
        """bfloat16 arguments of one call."""
        made = OPS[self.op].inputs(**self.sizes, dtype=torch.bfloat16)
        copied: Inputs = copy_to(self.make_realistic(made), device)
        return copied


def copy_to(value: Any, device: str) -> Any:
    """A deep copy of tensors in dicts and lists; anything else is kept."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {name: copy_to(item, device) for name, item in value.items()}
    return [copy_to(item, device) for item in value] if isinstance(value, list) else value


def _contiguous_cache(inputs: Inputs) -> Inputs:
    """Caches in [B, G, S, D] memory order, as the decoder allocates them; no LSE."""
    made = {**inputs, "return_lse": False} if "return_lse" in inputs else dict(inputs)
    for name in {"k_cache", "v_cache"} & made.keys():
        made[name] = made[name].contiguous()
    for name in {"k_caches", "v_caches"} & made.keys():
        made[name] = [cache.contiguous() for cache in made[name]]
    return made


def _model_rows(inputs: Inputs) -> Inputs:
    """Contiguous rows without bias; where they are sampled, by the same filters in every row."""
    made = {**inputs, "logits": inputs["logits"].contiguous()}
    if "bias" in made:
        made["bias"] = None
    if "temperature" in made:
        for name, value in SAMPLING.items():
            made[name] = torch.full_like(made[name], value)
    return made


def _likely_drafts(inputs: Inputs) -> Inputs:
    """Logits that like the tokens on the way to the last node: mostly accepted, sampled or not."""
    made = _model_rows(inputs)
    parents, tokens = (made[name][0].tolist() for name in ("parents", "tokens"))
    node = len(parents) - 1
    while node > 0:
        made["logits"][0, parents[node], tokens[node]] += 8
        node = parents[node]
    return made


def _sampled_drafts(inputs: Inputs) -> Inputs:
    """A sampled chain that is mostly accepted; the tokens alone are returned."""
    return {**_likely_drafts(inputs), "return_logprobs": False}


def _llama_layer(inputs: Inputs) -> Inputs:
    """Without biases and norms of heads."""
    left_out = {name for name in inputs if name.endswith(("_bias", "_norm_weight"))}
    return {name: value for name, value in inputs.items() if name not in left_out}


def _llama_stack(inputs: Inputs) -> Inputs:
    """Caches as the decoder allocates them, no biases and norms of heads."""
    return {**_contiguous_cache(inputs), "biases": [], "head_norm_weights": []}


def _unchanged(inputs: Inputs) -> Inputs:
    return inputs


def _attention_baselines(slots: int) -> tuple[Baseline, ...]:
    """FlexAttention with long caches only: it compiles for each size, a quarter of a minute on two
    cores.
    """
    usual = (base.HF_SDPA, base.GQA_SDPA)
    return (*usual, base.FLEX_ATTENTION) if slots >= 4096 else usual


_SMALL = {"G": 3, "D": 64}  # a 135M model
_LARGE = {"G": 8, "D": 128}  # an 8B model
_VOCABULARIES = (32000, 49152, 151936)
_DRAWN_ROWS = [{"R": rows, "V": vocab} for vocab in _VOCABULARIES for rows in (1, 16)]
_TREE_ROWS = [{"B": 1, "N": nodes, "V": vocab} for vocab in _VOCABULARIES for nodes in (1, 16, 64)]
_CHAINS = [
    {"B": 1, "N": nodes, "V": vocab, "rule": rule, "chain": True}
    for rule in ("token", "block")
    for vocab in _VOCABULARIES
    for nodes in (5, 16)
]

CASES: tuple[BenchCase, ...] = (
    *(
        BenchCase(
            "tree_attention",
            {"B": 1, "N": nodes, "H": heads, **cache, "S": slots},
            _attention_baselines(slots),
            _contiguous_cache,
        )
        for heads, cache in ((9, _SMALL), (32, _LARGE))
        for slots in (1024, 4096)
        for nodes in (1, 16, 64)
    ),
    *(
        BenchCase(
            "write_kv",
            {"B": 1, "N": nodes, **cache, "S": slots},
            (base.DYNAMIC_LAYER,),
            _contiguous_cache,
        )
        for cache in (_SMALL, _LARGE)
        for slots in (1024, 4096)
        for nodes in (1, 16)
    ),
    *(
        BenchCase(
            "commit",
            {"B": 1, "N": nodes, "L": layers, **cache, "S": 1024},
            (base.INDEX_AND_COPY,),
            _contiguous_cache,
        )
        for layers, cache in ((30, _SMALL), (32, _LARGE))
        for nodes in (16, 64)
    ),
    *(
        BenchCase("verify", {**rows, "greedy": True}, (base.ARGMAX_WALK,), _likely_drafts)
        for rows in _TREE_ROWS
    ),
    *(BenchCase("verify", rows, (base.DRAW_WALK,), _likely_drafts) for rows in _TREE_ROWS),
    *(BenchCase("verify", rows, (base.ASSISTED,), _sampled_drafts) for rows in _CHAINS),
    *(BenchCase("sample", rows, (base.DRAW,), _model_rows) for rows in _DRAWN_ROWS),
    *(
        BenchCase("topk_logprobs", {**rows, "k": 8}, (base.LOG_SOFTMAX_TOPK,), _model_rows)
        for rows in _DRAWN_ROWS
    ),
    *(
        BenchCase("packed_linear", {"R": rows, **layer}, (base.LINEAR,), _unchanged)
        for layer in ({"U": 49152, "F": 576}, {"U": 4096, "F": 14336})
        for rows in (1, 8, 16, 64)
    ),
    *(
        BenchCase("rms_norm", {"R": rows, "F": size}, (base.HF_NORM,), _unchanged)
        for size in (576, 4096)
        for rows in (1, 16, 64)
    ),
    *(
        BenchCase("rope", {"B": 1, **heads, "N": nodes}, (base.HF_ROPE,), _unchanged)
        for heads in ({"H": 9, "G": 3, "D": 64}, {"H": 32, "G": 8, "D": 128})
        for nodes in (1, 16, 64)
    ),
    *(
        BenchCase(
            "before_attention",
            {"B": 1, "N": nodes, **layer},
            (base.HF_BEFORE_ATTENTION,),
            _llama_layer,
        )
        for layer in ({"F": 576, "H": 9, **_SMALL}, {"F": 4096, "H": 32, **_LARGE})
        for nodes in (1, 8, 16, 64)
    ),
    *(
        BenchCase(
            "after_attention",
            {"B": 1, "N": nodes, **layer},
            (base.HF_AFTER_ATTENTION,),
            _llama_layer,
        )
        for layer in (
            {"F": 576, "H": 9, "E": 64, "U": 1536},
            {"F": 4096, "H": 32, "E": 128, "U": 14336},
        )
        for nodes in (1, 8, 16, 64)
    ),
    *(
        BenchCase(
            "layer_stack",
            {"B": 1, "N": nodes, "L": 8, "F": 576, "H": 9, **_SMALL, "U": 1536, "S": 1024},
            (base.LAYER_BY_LAYER,),
            _llama_stack,
        )
        for nodes in (1, 8, 16, 64)
    ),
    *(
        BenchCase("tree_mask", {"B": 1, "N": nodes}, (base.ROW_BY_ROW,), _unchanged)
        for nodes in (16, 64)
    ),
    *(
        BenchCase("build_tree", {"B": 1, **sizes}, (base.PYTHON_HEAP,), _unchanged)
        for sizes in ({"T": 5, "K": 10, "N": 60, "beams": True}, {"T": 8, "K": 8, "N": 64})
    ),
)
