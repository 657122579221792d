"""The target's sampling law, defined once: filters and keyed draws, in PyTorch.

Filters follow HuggingFace `generate`: bias, temperature, top-k, top-p, min-p, each on the
renormalised rest. Ties at the edge of top-k and top-p are kept: the result depends on values, never
on a sort order. NaN logits count as -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import gumbel, random_bits
from .shapes import PAD

OK, NO_FINITE_LOGIT, NO_SUCH_DRAW = 0, 1, 2
"""Row status of `sample` and `verify`: fine; a row of logits without a finite value (or all of it
masked); a draft token without mass in the law it is said to be drawn from.
"""


def filtered_scores(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None = None,
) -> Tensor:
    """Logits divided by temperature, with filtered-out tokens at -inf.

    Args:
        logits: [R, V] float, any of the three dtypes.
        temperature: [R] float32; 0 or None is greedy (the scores are the biased logits).
        top_k: [R] int32; 0 is off.
        top_p: [R] float32; 1 is off.
        min_p: [R] float32; 0 is off.
        bias: [R, V] float32, added to the logits first; -inf forbids a token.
        mask: [R, V] bool; False forbids a token.

    Returns:
        [R, V] float32.
    """
    scores = logits.float()
    if bias is not None:
        scores = scores + bias
    scores = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if temperature is None:
        return scores
    greedy = ~(temperature > 0)[:, None]
    filtered = keep_infinite(scores / torch.where(greedy, 1.0, temperature[:, None]))
    if top_k is not None:
        filtered = _top_k(filtered, top_k)
    if top_p is not None:
        filtered = _top_p(filtered, top_p)
    if min_p is not None:
        probs = filtered.double().softmax(-1)
        filtered = filtered.masked_fill(probs < min_p[:, None] * probs.amax(-1, True), -torch.inf)
    return torch.where(greedy, scores, filtered)


def draw(
    scores: Tensor,
    temperature: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    domain: int,
    *,
    num_draws: int = 1,
    streams: Tensor | None = None,
    coins: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens from rows of filtered scores: the largest, with Gumbel noise where temperature > 0.

    Args:
        scores: [R, V] float32 from `filtered_scores`.
        temperature, seeds, positions: [R].
        domain: a `philox.Domain`.
        num_draws: tokens per row, without replacement: in falling order of noisy score.
        streams: [R] int64, which of the disjoint noises of a position; 0 if None.
        coins: [R] float64; where given, sampled rows invert their cumulative law instead.

    Returns:
        tokens [R, num_draws] int64, ties by lowest index, PAD where no token is left (0 in the
        first place of a row without finite score), and status [R] int32.
    """
    noisy = scores
    if temperature is not None and coins is not None:
        by_coin = _invert(scores, coins)
        drawn = torch.arange(scores.shape[-1], device=scores.device) == by_coin[:, None]
        noisy = torch.where((temperature > 0)[:, None] & ~drawn, -torch.inf, scores)
    elif temperature is not None and seeds is not None and positions is not None:
        noise = gumbel(random_bits(seeds, positions, scores.shape[-1], domain, streams))
        noisy = torch.where((temperature > 0)[:, None], scores + noise, scores)
    status = torch.where(scores.amax(-1) == -torch.inf, NO_FINITE_LOGIT, OK).to(torch.int32)
    columns = []
    for _ in range(num_draws):
        best = noisy.amax(-1, keepdim=True)
        token = (noisy == best).to(torch.int8).argmax(-1, keepdim=True)  # the lowest of equals
        columns.append(token.masked_fill(best == -torch.inf, PAD))
        noisy = noisy.scatter(-1, token, -torch.inf)
    columns[0] = columns[0].masked_fill((status != OK)[:, None], 0)
    return torch.cat(columns, -1), status


def _invert(scores: Tensor, coins: Tensor) -> Tensor:
    """[R] lowest token at which the cumulative law exceeds the coin times its whole mass."""
    cumulative = scores.double().softmax(-1).nan_to_num(0.0).cumsum(-1)
    beyond = cumulative > (coins * cumulative[:, -1])[:, None]
    last = (cumulative < cumulative[:, -1:]).sum(-1)  # a coin so near 1 that the product rounds up
    return torch.where(beyond.any(-1), beyond.to(torch.int8).argmax(-1), last)


def keep_infinite(scores: Tensor) -> Tensor:
    """A row with +inf logits is uniform over those tokens."""
    infinite = scores == torch.inf
    replaced = torch.where(infinite, 0.0, -torch.inf)
    return torch.where(infinite.any(-1, keepdim=True), replaced, scores)


def _top_k(scores: Tensor, top_k: Tensor) -> Tensor:
    vocab = scores.shape[-1]
    rank = torch.where(top_k > 0, top_k, vocab).clamp_max(vocab).long() - 1
    edge = scores.sort(-1, descending=True).values.gather(-1, rank[:, None])
    return scores.masked_fill(scores < edge, -torch.inf)


def _top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    """Keep a token if the tokens at most as likely as it hold more than 1 - top_p; the
    likeliest always stay.
    """
    ascending = scores.sort(-1).values
    mass = ascending.double().softmax(-1).nan_to_num(0.0).cumsum(-1)
    below = (mass <= 1.0 - top_p.double()[:, None]).sum(-1, keepdim=True)
    edge = ascending.gather(-1, below.clamp_max(scores.shape[-1] - 1))
    return torch.where((top_p < 1.0)[:, None] & (scores < edge), -torch.inf, scores)
