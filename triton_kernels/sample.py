"""Draw one or more tokens per row of logits: what specdec_kernels/ops/sample.py defines.

Plan. With fewer rows than processors, `summarize_rows` first runs over rows x blocks, and one
program per row then draws from the summaries; with more, each program of `draw_rows` summarises its
own row. Filters and noise read only the blocks that can hold what they look for. Further draws
advance one block each: that of the token drawn last. `write_probs` spreads the law, if asked.

Bytes per call, with e per logit (and 4 more of bias, 1 of mask): R V e once, then from L2, where
filters are on, the blocks above the search's bracket, up to 11 times per filter; 12 per block of
summaries; with probs R V (e + 4) more. Roofline: R V e / bandwidth. Summaries keep all processors
at it when rows are few; where filters are on, a row's search runs on one processor alone. Masses
and laws are float64, which costs most on GPUs where that runs at 1/64 of float32.

Delicate: ties go to the lowest token, across blocks too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.sample import check_draws, sample
from .launch import Launch, num_processors
from .laws import Law, Rest, draw_by_coin
from .philox import stream_counter
from .sampling import (
    LOWEST,
    Noise,
    Row,
    Scores,
    best_block,
    best_of_block,
    biased_logits,
    block_summaries,
    contiguous,
    draw_noisy,
    find_edge,
    largest_logit,
    read_filters,
    read_temperature,
    row_arguments,
    row_options,
    stream_options,
    summarize_block,
    summarize_row,
    to_scores,
    total_weight,
    vocab_block,
    weights,
)

LAUNCH = {
    "summarize_rows": Launch(num_warps=4, fuses=False),
    "draw_rows": Launch(num_warps=8, fuses=False),
    "write_probs": Launch(num_warps=4, fuses=False),
}

LARGEST, EDGE, TOTAL, IS_INFINITE = (tl.constexpr(i) for i in range(4))  # fields of a row's law
FIELDS = tl.constexpr(4)


@triton.jit(do_not_specialize=["domain"])
def summarize_rows(
    logits_ptr,  # [R, V]
    stride_logits_r,
    stride_logits_v,
    bias_ptr,  # [R, V] or None
    stride_bias_r,
    stride_bias_v,
    mask_ptr,  # [R, V] uint8 or None
    stride_mask_r,
    stride_mask_v,
    seeds_ptr,  # [R]; None where no row draws noise
    positions_ptr,  # [R]
    streams_ptr,  # [R] or None
    temperature_ptr,  # [R] or None, as the filters
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    maxima_ptr,  # [R, blocks]
    best_ptr,  # [R, blocks]
    token_ptr,  # [R, blocks]
    domain,
    vocab,
    BLOCK_V: tl.constexpr,
):
    pid_r = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    is_sampled, temperature = read_temperature(temperature_ptr, pid_r)
    top_k, top_p, min_p = read_filters(top_k_ptr, top_p_ptr, min_p_ptr, pid_r)
    row = Row(
        logits_ptr, stride_logits_v, bias_ptr, pid_r * stride_bias_r, stride_bias_v,
        mask_ptr, pid_r * stride_mask_r, stride_mask_v, vocab, temperature,
    )  # fmt: skip
    first = pid_r * stride_logits_r
    summary = pid_r * tl.cdiv(vocab, BLOCK_V)
    maxima, best, tokens = maxima_ptr + summary, best_ptr + summary, token_ptr + summary
    if seeds_ptr is None:
        summarize_block(row, first, None, False, block, maxima, best, tokens, BLOCK_V)
    else:
        is_filtered = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
        counter = tl.full((), 0, tl.uint32)
        if streams_ptr is not None:
            counter = stream_counter(tl.load(streams_ptr + pid_r), vocab)
        noise = Noise(tl.load(seeds_ptr + pid_r), tl.load(positions_ptr + pid_r), counter, domain)
        is_noisy = is_sampled & (not is_filtered)
        summarize_block(row, first, noise, is_noisy, block, maxima, best, tokens, BLOCK_V)


@triton.jit(do_not_specialize=["domain", "num_draws"])
def draw_rows(
    logits_ptr,  # [R, V]
    stride_logits_r,
    stride_logits_v,
    bias_ptr,  # [R, V] or None
    stride_bias_r,
    stride_bias_v,
    mask_ptr,  # [R, V] uint8 or None
    stride_mask_r,
    stride_mask_v,
    seeds_ptr,  # [R]; None where no row draws noise
    positions_ptr,  # [R]
    streams_ptr,  # [R] or None
    coins_ptr,  # [R] or None
    temperature_ptr,  # [R] or None, as the filters
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    maxima_ptr,  # [R, blocks]
    best_ptr,  # [R, blocks]
    token_ptr,  # [R, blocks]
    law_ptr,  # [R, FIELDS] float64, or None
    drawn_ptr,  # [R, num_draws]
    status_ptr,  # [R]
    domain,
    num_draws,
    vocab,
    HAS_FILTERS: tl.constexpr,
    IS_SUMMARIZED: tl.constexpr,
    IS_MULTIPLE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid_r = tl.program_id(0).to(tl.int64)
    is_sampled, temperature = read_temperature(temperature_ptr, pid_r)
    row = Row(
        logits_ptr, stride_logits_v, bias_ptr, pid_r * stride_bias_r, stride_bias_v,
        mask_ptr, pid_r * stride_mask_r, stride_mask_v, vocab, temperature,
    )  # fmt: skip
    first = pid_r * stride_logits_r
    summary = pid_r * tl.cdiv(vocab, BLOCK_V)
    maxima, best, tokens = maxima_ptr + summary, best_ptr + summary, token_ptr + summary
    if not IS_SUMMARIZED:
        summarize_row(row, first, maxima, best, tokens, BLOCK_V)
    top_logit = largest_logit(maxima, tl.cdiv(vocab, BLOCK_V))
    is_infinite = is_sampled & (tl.div_rn(top_logit, temperature) == float("inf"))
    largest = to_scores(top_logit, temperature, is_infinite)
    scores = Scores(row, first, maxima, largest, is_infinite)
    is_fine = top_logit > -float("inf")
    edge = tl.full((), LOWEST, tl.float32)
    is_filtered = False
    if HAS_FILTERS:
        top_k, top_p, min_p = read_filters(top_k_ptr, top_p_ptr, min_p_ptr, pid_r)
        is_filtered = is_sampled & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
        if is_filtered & is_fine:
            edge = find_edge(scores, top_k, top_p, min_p, BLOCK_V)
            is_fine = edge <= largest
    tl.store(status_ptr + pid_r, tl.where(is_fine, 0, 1))
    is_summary_best = (not is_sampled) | (IS_SUMMARIZED & (not is_filtered))
    if coins_ptr is not None:
        is_summary_best = not is_sampled
    noise = None
    if seeds_ptr is not None:
        counter = tl.full((), 0, tl.uint32)
        if streams_ptr is not None:
            counter = stream_counter(tl.load(streams_ptr + pid_r), vocab)
        noise = Noise(tl.load(seeds_ptr + pid_r), tl.load(positions_ptr + pid_r), counter, domain)
    drawn = drawn_ptr + pid_r * num_draws
    if IS_MULTIPLE:
        if not (is_summary_best):
            for block in range(tl.cdiv(vocab, BLOCK_V)):
                _store_next(
                    scores, noise, is_sampled, edge, block, float("inf"), -1, best, tokens, BLOCK_V
                )
            tl.debug_barrier()
        for i in range(num_draws):
            value, token = best_block(scores, best, tokens, BLOCK_V)
            is_left = is_fine & (value > -float("inf"))
            none = tl.where(is_fine | (i > 0), -1, 0)
            tl.store(drawn + i, tl.where(is_left, token, none).to(tl.int64))
            if is_left:
                tl.debug_barrier()  # all have read the summaries
                _store_next(
                    scores, noise, is_sampled, edge, token // BLOCK_V, value, token, best, tokens,
                    BLOCK_V,
                )  # fmt: skip
                tl.debug_barrier()
    else:
        token = tl.full((), 0, tl.int32)
        if is_fine:
            if is_summary_best:
                _, token = best_block(scores, best, tokens, BLOCK_V)
            else:
                if coins_ptr is not None:
                    coin = tl.load(coins_ptr + pid_r)
                    rest = Rest(None, None, None, -1, 0, 0.0, 0.0)
                    token = draw_by_coin(Law(scores, edge, 1.0), rest, coin, BLOCK_V)
                elif seeds_ptr is not None:
                    _, token = draw_noisy(scores, noise, edge, BLOCK_V)
        tl.store(drawn, token.to(tl.int64))
    if law_ptr is not None:
        total = tl.full((), 1.0, tl.float64)
        if is_sampled & is_fine:
            total = total_weight(scores, edge, BLOCK_V)
        law = law_ptr + pid_r * FIELDS
        tl.store(law + LARGEST, tl.cast(largest, tl.float64))
        tl.store(law + EDGE, tl.cast(edge, tl.float64))
        tl.store(law + TOTAL, total)
        tl.store(law + IS_INFINITE, is_infinite.to(tl.float64))


@triton.jit
def _store_next(
    scores, noise, is_noisy, edge, block, value, token, best_ptr, token_ptr, BLOCK_V: tl.constexpr
):
    """Make what follows (value, token) in falling order the best of its block."""
    best, here = best_of_block(scores, noise, is_noisy, edge, block, value, token, BLOCK_V)
    tl.store(best_ptr + block, best)
    tl.store(token_ptr + block, here)


@triton.jit(do_not_specialize=["num_draws"])
def write_probs(
    logits_ptr,  # [R, V]
    stride_logits_r,
    stride_logits_v,
    bias_ptr,  # [R, V] or None
    stride_bias_r,
    stride_bias_v,
    mask_ptr,  # [R, V] uint8 or None
    stride_mask_r,
    stride_mask_v,
    temperature_ptr,  # [R] or None
    law_ptr,  # [R, FIELDS]
    drawn_ptr,  # [R, num_draws]
    num_draws,
    status_ptr,  # [R]
    probs_ptr,  # [R, V]
    vocab,
    BLOCK_V: tl.constexpr,
):
    pid_r = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_sampled, temperature = read_temperature(temperature_ptr, pid_r)
    is_fine = tl.load(status_ptr + pid_r) == 0
    probs = tl.zeros((BLOCK_V,), tl.float64)
    if is_fine & is_sampled:
        row = Row(
            logits_ptr, stride_logits_v, bias_ptr, pid_r * stride_bias_r, stride_bias_v,
            mask_ptr, pid_r * stride_mask_r, stride_mask_v, vocab, temperature,
        )  # fmt: skip
        law = law_ptr + pid_r * FIELDS
        logits = biased_logits(row, pid_r * stride_logits_r, offs, offs < vocab)
        values = to_scores(logits, temperature, tl.load(law + IS_INFINITE) != 0.0)
        edge = tl.load(law + EDGE).to(tl.float32)
        probs = weights(values, edge, tl.load(law + LARGEST)) / tl.load(law + TOTAL)
    elif is_fine:
        token = tl.load(drawn_ptr + pid_r * num_draws)
        probs = tl.where(offs == token, 1.0, probs)
    tl.store(probs_ptr + pid_r * vocab + offs, probs.to(tl.float32), mask=offs < vocab)


@sample.implement("triton")
def sample_triton(
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
    """`ops.sample` on the device. Streams beyond their range wrap to others."""
    check_draws(temperature, seeds, positions, coins, num_draws)
    rows, vocab = logits.shape
    device = logits.device
    drawn = torch.empty((rows, num_draws), dtype=torch.int64, device=device)
    status = torch.empty(rows, dtype=torch.int32, device=device)
    probs_shape = (rows, vocab) if return_probs else (0, 0)
    probs = torch.empty(probs_shape, dtype=torch.float32, device=device)
    if rows == 0:
        return drawn, status, probs
    temperature, top_k, top_p, min_p = map(contiguous, (temperature, top_k, top_p, min_p))
    seeds, positions, streams, coins = map(contiguous, (seeds, positions, streams, coins))
    if temperature is None:
        seeds = positions = top_k = top_p = min_p = coins = None
    elif coins is not None:
        seeds = positions = None
    source = row_arguments(logits, bias, mask)
    keys = (seeds, positions, streams if seeds is not None else None)
    filters = (temperature, top_k, top_p, min_p)
    block = vocab_block(vocab)
    blocks = triton.cdiv(vocab, block)
    summaries = block_summaries(rows, vocab, device)
    is_summarized = rows < num_processors(device)
    if is_summarized:
        summarize_rows[(rows, blocks)](
            *source, *keys, *filters, *summaries, domain, vocab, BLOCK_V=block,
            **stream_options(LAUNCH["summarize_rows"]),
        )  # fmt: skip
    law = None
    if return_probs:
        law = torch.empty((rows, FIELDS.value), dtype=torch.float64, device=device)
    draw_rows[(rows,)](
        *source, *keys, coins, *filters, *summaries, law, drawn, status, domain, num_draws, vocab,
        HAS_FILTERS=any(f is not None for f in filters[1:]), IS_SUMMARIZED=is_summarized,
        IS_MULTIPLE=num_draws > 1, BLOCK_V=block,
        **row_options(LAUNCH["draw_rows"]),
    )  # fmt: skip
    if return_probs:
        write_probs[(rows, blocks)](
            *source, temperature, law, drawn, num_draws, status, probs, vocab, BLOCK_V=block,
            **stream_options(LAUNCH["write_probs"]),
        )  # fmt: skip
    return drawn, status, probs
