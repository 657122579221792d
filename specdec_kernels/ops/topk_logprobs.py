"""Top-k tokens and their log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import op


def _fake(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def _inputs(
    R: int, V: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn((V, R), generator=generator) * 4).to(dtype).T  # strided rows
    return {"logits": logits.contiguous() if R % 2 else logits, "k": k}


@op(
    shapes="logits: R V float",
    fake=_fake,
    inputs=_inputs,
    tolerance={torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5},
    cases=(
        {"R": 1, "V": 5, "k": 5},
        {"R": 3, "V": 1000, "k": 8},
        {"R": 2, "V": 4099, "k": 64},
        {"R": 4, "V": 49152, "k": 10},
    ),
)
def topk_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row with log-probabilities, likeliest first, ties by index.

    Args:
        logits: [R, V] float, any strides. NaN counts as -inf.
        k: how many, 1 <= k <= V.

    Returns:
        logprobs [R, k] float32 (natural logarithm; -inf in a row without a finite logit) and tokens
        [R, k] int64.

    Raises:
        ValueError: k outside [1, V].
    """
    check_k(k, logits.shape[1])
    scores = logits.float().nan_to_num(-torch.inf, torch.inf, -torch.inf)
    tokens = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    best = scores.gather(1, tokens)
    total = scores.double().logsumexp(-1, keepdim=True)
    logprobs = (best.double() - total).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    return logprobs.float(), tokens.contiguous()


def check_k(k: int, vocab: int) -> None:
    """Raise if a row has no k tokens."""
    if not 1 <= k <= vocab:
        raise ValueError(f"topk_logprobs: k must be in [1, V] = [1, {vocab}], got {k}")
