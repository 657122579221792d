"""Draw one token per row of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import op
from ..sampling import draw, filtered_scores


def _fake(
    logits: Tensor,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    domain: int = 3,
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.int32)


def sampling_inputs(rows: int, greedy: bool, generator: torch.Generator) -> dict[str, Any]:
    """Per-row sampling parameters with every filter on and off, and a greedy row, in one batch."""
    if greedy:
        return {}

    def pick(*values: float) -> Tensor:
        choice = torch.randint(0, len(values), (rows,), generator=generator)
        return torch.tensor(values)[choice]

    return {
        "seeds": torch.randint(0, 2**62, (rows,), generator=generator),
        "positions": torch.randint(0, 2**33, (rows,), generator=generator),
        "temperature": pick(0.0, 0.7, 1.0, 1.5),
        "top_k": pick(0, 1, 5, 50).int(),
        "top_p": pick(1.0, 0.5, 0.9),
        "min_p": pick(0.0, 0.05),
    }


def _inputs(
    R: int, V: int, greedy: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn((R, 2 * V), generator=generator) * 3).to(dtype)[:, ::2]
    bias = torch.zeros((R, V)).masked_fill(
        torch.rand((R, V), generator=generator) < 0.1, -torch.inf
    )
    return {"logits": logits, "bias": bias, **sampling_inputs(R, greedy, generator)}


@op(
    shapes="logits: R V float, seeds: R int64, positions: R int64, temperature: R float32, "
    "top_k: R int32, top_p: R float32, min_p: R float32, bias: R V float32",
    fake=_fake,
    inputs=_inputs,
    cases=(
        {"R": 1, "V": 7},
        {"R": 33, "V": 1001},
        {"R": 3, "V": 4096, "greedy": True},
        {"R": 2, "V": 49152},
    ),
)
def sample(
    logits: Tensor,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    domain: int = 3,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row from the filtered softmax; greedy where temperature is 0 or absent.

    A draw is the argmax of score + Gumbel noise keyed by (seed, position, token, domain), so it
    depends on nothing else in the batch. Filters: bias, temperature, top-k, top-p, min-p, in
    HuggingFace's order; ties at an edge are kept.

    Args:
        logits: [R, V] float, any strides. NaN counts as -inf; a row with +inf is uniform over those
            tokens.
        seeds: [R] int64 and positions [R] int64, absolute position of the token drawn; needed with
            `temperature`.
        temperature: [R] float32; 0 is greedy.
        top_k: [R] int32, 0 is off. top_p: [R] float32, 1 is off. min_p: [R] float32, 0 is off.
        bias: [R, V] float32, added to the logits; -inf forbids a token.
        domain: a `philox.Domain`.

    Returns:
        tokens [R] int64 and status [R] int32: 0 ok; 1 no finite logit, and the token is 0.

    Raises:
        ValueError: temperature without seeds and positions.

    Source: Gumbel-max trick, Maddison et al., "A* sampling", 1411.0030.
    """
    if temperature is not None and (seeds is None or positions is None):
        raise ValueError("sample: seeds and positions must be given with temperature, got None")
    scores = filtered_scores(logits, temperature, top_k, top_p, min_p, bias)
    return draw(scores, temperature, seeds, positions, domain)
