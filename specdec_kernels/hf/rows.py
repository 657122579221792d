"""The rows of a batch: their prompts without padding, seeds and sampling parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from ..drafting import SamplingParams

FILTERS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Sampling parameter -> the value that changes nothing."""


def unpad(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The real tokens of every left-padded row.

    Raises:
        ValueError: padding anywhere else, or a mask of another shape.
    """
    if attention_mask is None:
        return [list(row) for row in input_ids.tolist()]
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be [B, P] = {list(input_ids.shape)}, "
            f"got {list(attention_mask.shape)}"
        )
    prompts = []
    for row, (tokens, mask) in enumerate(
        zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True)
    ):
        length = sum(mask)
        if not all(mask[len(mask) - length :]):
            raise ValueError(
                f"attention_mask of row {row} must be 0s, then 1s up to the last column "
                "(left padding)"
            )
        prompts.append(tokens[len(tokens) - length :])
    return prompts


def sampling_params(
    fused: Mapping[str, float],
    per_row: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    bias: Tensor | None,
    *,
    do_sample: bool,
    device: torch.device,
) -> SamplingParams:
    """Per-row parameters of `ops.sample`.

    Args:
        fused: parameters that all rows share.
        per_row: parameters of every row, instead.
        seeds: one per row.
        bias: [V] float32, added to all logits.
        do_sample: False is greedy.

    Raises:
        ValueError: a wrong number of values, values out of range, or any of them in greedy mode.
    """
    batch = len(seeds)
    shared = None if bias is None else bias.expand(batch, -1)
    if not do_sample:
        if per_row:
            raise ValueError(f"{', '.join(per_row)} per row need do_sample=True")
        return SamplingParams(bias=shared)
    values: dict[str, Sequence[float]] = {k: [v] * batch for k, v in fused.items()}
    values = {"temperature": [1.0] * batch, **values, **per_row}
    tensors = {}
    for name, row_values in values.items():
        if len(row_values) != batch:
            raise ValueError(f"{name} must be one per row = {batch}, got {len(row_values)}")
        _check_range(name, row_values)
        dtype = torch.int32 if name == "top_k" else torch.float32
        tensors[name] = torch.tensor(row_values, dtype=dtype, device=device)
    return SamplingParams(seeds=torch.tensor(seeds, device=device), bias=shared, **tensors)


def row_seeds(seed: int | Sequence[int] | None, batch: int, num_return: int) -> list[int]:
    """One seed per row; rows of the same prompt must differ, whatever else is in the batch.

    Raises:
        ValueError: a wrong number of seeds, or one that is no int64.
        TypeError: a seed that is no integer.
    """
    if seed is None:
        return torch.randint(0, 2**62, (batch,), device="cpu").tolist()
    given: Any = seed  # a tensor, too
    try:
        seeds = [index(given) + row % num_return for row in range(batch)]
    except TypeError:
        seeds = [index(s) for s in given]
    if len(seeds) != batch:
        raise ValueError(f"seed must be an int or one per row = {batch}, got {len(seeds)}")
    for row, value in enumerate(seeds):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"seed of row {row} must be in [-2**63, 2**63), got {value}")
    return seeds


def _check_range(name: str, values: Sequence[float]) -> None:
    limit = "1]" if name in ("top_p", "min_p") else "inf)"
    for row, value in enumerate(values):
        if not 0 <= value < math.inf or (limit == "1]" and value > 1):
            raise ValueError(f"{name} of row {row} must be in [0, {limit}, got {value}")
        if name == "top_k" and value != int(value):
            raise ValueError(f"top_k of row {row} must be a whole number, got {value}")
