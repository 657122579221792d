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
    mask: Tensor | None = None,
    streams: Tensor | None = None,
    coins: Tensor | None = None,
    *,
    num_draws: int = 1,
    domain: int = 3,
    return_probs: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    return (
        logits.new_empty((rows, num_draws), dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.int32),
        logits.new_empty((rows, vocab) if return_probs else (0, 0), dtype=torch.float32),
    )


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
    R: int,
    V: int,
    greedy: bool = False,
    draws: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn((R, 2 * V), generator=generator) * 3).to(dtype)[:, ::2]
    bias = torch.zeros((R, V)).masked_fill(
        torch.rand((R, V), generator=generator) < 0.1, -torch.inf
    )
    made = {"logits": logits, "bias": bias, **sampling_inputs(R, greedy, generator)}
    if draws > 1:
        made["num_draws"], made["return_probs"] = draws, True
        made["mask"] = torch.rand((R, V), generator=generator) < 0.9
        made["streams"] = torch.randint(0, 4, (R,), generator=generator)
    return made


@op(
    shapes="logits: R V float, seeds: R int64, positions: R int64, temperature: R float32, "
    "top_k: R int32, top_p: R float32, min_p: R float32, bias: R V float32, mask: R V bool, "
    "streams: R int64, coins: R float64",
    fake=_fake,
    inputs=_inputs,
    cases=(
        {"R": 1, "V": 7},
        {"R": 33, "V": 1001},
        {"R": 3, "V": 4096, "greedy": True},
        {"R": 2, "V": 49152},
        {"R": 9, "V": 203, "draws": 4},
        {"R": 3, "V": 3, "draws": 5, "greedy": True},
    ),
    tolerance={torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6},
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
    mask: Tensor | None = None,
    streams: Tensor | None = None,
    coins: Tensor | None = None,
    *,
    num_draws: int = 1,
    domain: int = 3,
    return_probs: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens from the filtered softmax of each row; greedy where temperature is 0 or absent.

    A draw is the argmax of score + Gumbel noise keyed by (seed, position, token, domain), so it
    depends on nothing else in the batch. Further draws of a row are without replacement: the next
    largest noisy scores. Filters: bias and mask, temperature, top-k, top-p, min-p, in HuggingFace's
    order; ties at an edge are kept.

    Args:
        logits: [R, V] float, any strides. NaN counts as -inf; a row with +inf is uniform over those
            tokens.
        seeds: [R] int64 and positions [R] int64, absolute position of the token drawn; needed with
            `temperature`, unless `coins` are given.
        temperature: [R] float32; 0 is greedy.
        top_k: [R] int32, 0 is off. top_p: [R] float32, 1 is off. min_p: [R] float32, 0 is off.
        bias: [R, V] float32, added to the logits; -inf forbids a token.
        mask: [R, V] bool; False forbids a token.
        streams: [R] int64 from 0, below 2^32 / ceil(V/4): which of a position's disjoint noises,
            for independent draws at one position; 0 if not given.
        coins: [R] float64 in [0, 1), instead of seeds: inverts the cumulative law; one draw only.
        num_draws: K, tokens per row.
        domain: a `philox.Domain`.
        return_probs: also return the law.

    Returns:
        tokens [R, K] int64 in the order drawn, PAD where the law has no token left; status [R]
        int32: 0 ok; 1 no finite logit, and the first token is 0; probs [R, V] float32, the law that
        the first token was drawn from (one-hot for a greedy row), or [0, 0]. A probability below
        1e-45 is 0 there, though such a token may come as a later draw.

    Raises:
        ValueError: temperature without seeds and positions or coins, num_draws below 1, coins with
            several draws.

    Source: Gumbel-max trick, Maddison et al., "A* sampling", 1411.0030; without replacement, Kool
        et al., 1903.06059.
    """
    check_draws(temperature, seeds, positions, coins, num_draws)
    scores = filtered_scores(logits, temperature, top_k, top_p, min_p, bias, mask)
    keys = (temperature, seeds, positions, domain)
    tokens, status = draw(scores, *keys, num_draws=num_draws, streams=streams, coins=coins)
    probs = logits.new_empty((0, 0), dtype=torch.float32)
    if return_probs:
        probs = scores.double().softmax(-1).nan_to_num(0.0).float()
        if temperature is None:
            is_greedy = torch.ones_like(status, dtype=torch.bool)
        else:
            is_greedy = ~(temperature > 0)
        best = torch.zeros_like(probs).scatter_(1, tokens[:, :1], 1.0)
        best = best.masked_fill((status != 0)[:, None], 0.0)
        probs = torch.where(is_greedy[:, None], best, probs)
    return tokens, status, probs


def check_draws(
    temperature: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    coins: Tensor | None,
    num_draws: int,
) -> None:
    """Refuse draws without randomness, or fewer or more than can be made."""
    if temperature is not None and coins is None and (seeds is None or positions is None):
        raise ValueError("sample: seeds and positions must be given with temperature, got None")
    if num_draws < 1 or (coins is not None and num_draws > 1):
        raise ValueError(f"sample: num_draws must be >= 1, and 1 with coins, got {num_draws}")
