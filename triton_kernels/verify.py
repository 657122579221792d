"""Accept a path through a draft tree: what specdec_kernels/ops/verify.py defines.

Plan. Phase 1, `summarize_nodes`, runs over requests x nodes x blocks of the vocabulary and leaves
each block's largest logit and, where the walk draws without filters, its best noisy score. Phase 2,
`decide`, is one program per request that follows a rule: it filters the rows that it visits, and
reads of them only the blocks that can matter. With many rows for the processors at hand phase 1 is
left out, and each program of phase 2 summarises the rows that it visits. What is asked for besides
is spread over the device afterwards, from what phase 2 noted: `score_path`, `write_law`.

Bytes per call: with phase 1, the logits of all rows, B N V e with e bytes each; without, those of
the visited rows, about B (accepted + 1) V e. Then per visited row the blocks that the filters'
search and the law need, from L2; per rejection those of the law again, with their draft masses (4
bytes). Roofline: with phase 1 B N V e / bandwidth, plus visited rows V e / (bandwidth of one
processor) where filters are on; without, visited rows V e / (bandwidth of one processor), once for
all B <= processors. Laws and masses are float64: on GPUs where that runs at 1/64 of float32, a
sampled row with top-p or a testing rule is bound by it.

Delicate: keyed noise and scores have the reference's bits; see sampling.py and acceptance.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.verify import verify
from ..ops.verify_checks import check_arguments
from ..shapes import PAD
from .acceptance import find_typical, open_node, try_drafts
from .launch import INTERPRETED, Launch, num_processors
from .laws import (
    FIELDS,
    IS_TOUCHED,
    NO_FINITE_LOGIT,
    NODES_AT_ONCE,
    OK,
    Draft,
    Filters,
    Law,
    Rest,
    Target,
    Tree,
    draft_law,
    draw_by_coin,
    find_child,
    read_law,
    read_rest,
)
from .philox import RESIDUAL, TARGET, uniform
from .sampling import (
    Noise,
    Row,
    Scores,
    best_block,
    block_summaries,
    contiguous,
    draw_noisy,
    read_filters,
    read_temperature,
    row_arguments,
    row_options,
    stream_options,
    summarize_block,
    vocab_block,
)
from .verify_outputs import LAUNCH as OUTPUTS_LAUNCH
from .verify_outputs import score_path, write_law

LAUNCH = {
    "summarize_nodes": Launch(num_warps=4, fuses=False),
    "decide": Launch(num_warps=8, fuses=False),
}
ROWS_PER_PROCESSOR = 40 if INTERPRETED else 4
"""Up to so many rows of all requests phase 1 runs; unmeasured."""

FAMILIES = {"walk": 0, "token": 1, "block": 2, "traversal": 2, "gd_traversal": 2, "typical": 3}
WALK, TOP_DOWN, BOTTOM_UP, TYPICAL = (tl.constexpr(i) for i in range(4))


@triton.jit(do_not_specialize=["nodes"])
def summarize_nodes(
    logits_ptr,  # [B, N, V]
    stride_logits_b,
    stride_logits_n,
    stride_logits_v,
    bias_ptr,  # [B, V] or None
    stride_bias_b,
    stride_bias_v,
    mask_ptr,  # [B, V] uint8 or None
    stride_mask_b,
    stride_mask_v,
    parents_ptr,  # [B, N]
    num_nodes_ptr,  # [B]
    seeds_ptr,  # [B]; None where no walk draws noise
    positions_ptr,  # [B]
    temperature_ptr,  # [B] or None, as the filters
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    maxima_ptr,  # [B, N, blocks]
    best_ptr,  # [B, N, blocks]
    token_ptr,  # [B, N, blocks]
    nodes,
    vocab,
    BLOCK_V: tl.constexpr,
):
    pid_b = (tl.program_id(0) // nodes).to(tl.int64)
    node = tl.program_id(0) % nodes
    block = tl.program_id(1)
    if node < tl.load(num_nodes_ptr + pid_b):
        is_sampled, temperature = read_temperature(temperature_ptr, pid_b)
        row = Row(
            logits_ptr, stride_logits_v, bias_ptr, pid_b * stride_bias_b, stride_bias_v,
            mask_ptr, pid_b * stride_mask_b, stride_mask_v, vocab, temperature,
        )  # fmt: skip
        first = pid_b * stride_logits_b + node.to(tl.int64) * stride_logits_n
        summary = (pid_b * nodes + node) * tl.cdiv(vocab, BLOCK_V)
        maxima, best, tokens = maxima_ptr + summary, best_ptr + summary, token_ptr + summary
        if seeds_ptr is None:
            summarize_block(row, first, None, False, block, maxima, best, tokens, BLOCK_V)
        else:
            top_k, top_p, min_p = read_filters(top_k_ptr, top_p_ptr, min_p_ptr, pid_b)
            is_filtered = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
            is_noisy = is_sampled & (not is_filtered)
            position = tl.load(positions_ptr + pid_b)
            if is_noisy:
                position += 1 + _depth(parents_ptr + pid_b * nodes, node)
            counter = tl.full((), 0, tl.uint32)
            noise = Noise(tl.load(seeds_ptr + pid_b), position, counter, TARGET)
            summarize_block(row, first, noise, is_noisy, block, maxima, best, tokens, BLOCK_V)


@triton.jit
def _depth(parents, node):
    """Number of ancestors. Wrong parents end the count: no walk comes by there."""
    depth = tl.full((), 0, tl.int32)
    while node > 0:
        above = tl.load(parents + node)
        is_above = (above >= 0) & (above < node)
        node = tl.where(is_above, above, 0)
        depth += 1
    return depth


@triton.jit(do_not_specialize=["laws", "nodes"])
def decide(
    logits_ptr,  # [B, N, V]
    stride_logits_b,
    stride_logits_n,
    stride_logits_v,
    bias_ptr,  # [B, V] or None
    stride_bias_b,
    stride_bias_v,
    mask_ptr,  # [B, V] uint8 or None
    stride_mask_b,
    stride_mask_v,
    tokens_ptr,  # [B, N]
    parents_ptr,  # [B, N]
    num_nodes_ptr,  # [B]
    seeds_ptr,  # [B] or None
    positions_ptr,  # [B] or None
    temperature_ptr,  # [B] or None, as the filters
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    maxima_ptr,  # [B, N, blocks]
    best_ptr,  # [B, N, blocks]
    best_token_ptr,  # [B, N, blocks]
    kinds_ptr,  # [B, N]; None where all are one-hot
    rows_ptr,  # [B, N]
    probs_ptr,  # [B, Q, U] or None
    draft_logits_ptr,  # [B, Q, U] or None
    stride_draft_b,
    stride_draft_q,
    stride_draft_u,
    ids_ptr,  # [V] or None
    laws,
    draft_vocab,
    coins_ptr,  # [B, N] or None
    records_ptr,  # [B, N, FIELDS] float64, or None for a walk that nobody asks about
    thresholds_ptr,  # [B, N] of NaN, or None
    path_ptr,  # [B, N]
    num_accepted_ptr,  # [B]
    next_token_ptr,  # [B]
    status_ptr,  # [B]
    nodes,
    vocab,
    FAMILY: tl.constexpr,
    EPSILON: tl.constexpr,
    DELTA: tl.constexpr,
    HAS_FILTERS: tl.constexpr,
    HAS_SUM: tl.constexpr,
    IS_SUMMARIZED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid_b = tl.program_id(0).to(tl.int64)
    is_sampled, temperature = read_temperature(temperature_ptr, pid_b)
    row = Row(
        logits_ptr, stride_logits_v, bias_ptr, pid_b * stride_bias_b, stride_bias_v,
        mask_ptr, pid_b * stride_mask_b, stride_mask_v, vocab, temperature,
    )  # fmt: skip
    first_node = pid_b * nodes
    summary = first_node * tl.cdiv(vocab, BLOCK_V)
    target = Target(
        row, pid_b * stride_logits_b, stride_logits_n, maxima_ptr + summary, best_ptr + summary,
        best_token_ptr + summary,
    )  # fmt: skip
    filters = Filters(top_k_ptr, top_p_ptr, min_p_ptr)
    size = tl.minimum(tl.load(num_nodes_ptr + pid_b), nodes)
    tree = Tree(tokens_ptr + first_node, parents_ptr + first_node, size)
    seed = tl.full((), 0, tl.int64)
    position = tl.full((), 0, tl.int64)
    if seeds_ptr is not None:
        seed = tl.load(seeds_ptr + pid_b)
        position = tl.load(positions_ptr + pid_b)
    coins = coins_ptr
    if coins_ptr is not None:
        coins = coins_ptr + first_node
    records = records_ptr
    if records_ptr is not None:
        records = records_ptr + first_node * FIELDS
    status = tl.full((), OK, tl.int32)
    node = tl.full((), 0, tl.int32)
    next_token = tl.full((), 0, tl.int32)
    is_walking = size > 0
    if FAMILY != WALK:
        is_walking = is_walking & (not is_sampled)
        if is_sampled & (size > 0):
            draft = Draft(
                kinds_ptr, rows_ptr, first_node, pid_b * stride_draft_b, probs_ptr,
                draft_logits_ptr, stride_draft_q, stride_draft_u, ids_ptr, laws, draft_vocab,
            )  # fmt: skip
            if FAMILY == TYPICAL:
                status, node = find_typical(
                    target, filters, tree, records, pid_b, EPSILON, DELTA, IS_SUMMARIZED,
                    HAS_FILTERS, BLOCK_V,
                )  # fmt: skip
            else:
                thresholds = thresholds_ptr
                if thresholds_ptr is not None:
                    thresholds = thresholds_ptr + first_node
                status, node = try_drafts(
                    target, filters, tree, draft, records, coins, thresholds, pid_b, seed,
                    position, FAMILY == TOP_DOWN, IS_SUMMARIZED, HAS_FILTERS, BLOCK_V,
                )  # fmt: skip
            if status == OK:
                next_token = _draw_next(
                    target, tree, draft, records, coins, seed, position, node, BLOCK_V
                )
    if is_walking:
        status, node, next_token = _walk(
            target, filters, tree, records, coins, seeds_ptr, seed, position, pid_b, is_sampled,
            FAMILY == WALK, IS_SUMMARIZED, HAS_FILTERS, HAS_SUM, BLOCK_V,
        )  # fmt: skip
    depth = tl.where(size > 0, _depth(tree.parents, node), -1)
    path = path_ptr + first_node
    for first in range(0, nodes, NODES_AT_ONCE):
        offs = first + tl.arange(0, NODES_AT_ONCE)
        is_beyond = (offs > depth) & (offs < nodes)
        tl.store(path + offs, tl.full((NODES_AT_ONCE,), -1, tl.int32), mask=is_beyond)
    place = depth
    while place >= 0:
        tl.store(path + place, node)
        if place > 0:
            node = tl.load(tree.parents + node)
        place -= 1
    next_token = tl.where(size > 0, next_token, -1)
    tl.store(num_accepted_ptr + pid_b, tl.maximum(depth, 0))
    tl.store(next_token_ptr + pid_b, next_token.to(tl.int64))
    tl.store(status_ptr + pid_b, status)


@triton.jit
def _walk(
    target, filters, tree, records, coins, seeds_ptr, seed, position, request, is_sampled,
    CAN_SAMPLE: tl.constexpr, IS_SUMMARIZED: tl.constexpr, HAS_FILTERS: tl.constexpr,
    HAS_SUM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(status, last node, next token): draw the target's token and follow it while it is a child.

    Greedy requests follow the argmax; they are all that comes here unless CAN_SAMPLE.
    """
    status = tl.full((), OK, tl.int32)
    node = tl.full((), 0, tl.int32)
    token = tl.full((), 0, tl.int32)
    child = tl.full((), 0, tl.int32)
    while child >= 0:
        node = child
        child = tl.full((), -1, tl.int32)
        position += 1
        is_fine, largest, edge, _total, is_infinite = open_node(
            target, filters, records, request, node, 1.0, is_sampled, IS_SUMMARIZED,
            HAS_FILTERS and CAN_SAMPLE, HAS_SUM and CAN_SAMPLE, BLOCK_V,
        )  # fmt: skip
        if is_fine:
            blocks = tl.cdiv(target.row.vocab, BLOCK_V)
            summary = tl.cast(node, tl.int64) * blocks
            first = target.first + tl.cast(node, tl.int64) * target.stride
            scores = Scores(target.row, first, target.maxima + summary, largest, is_infinite)
            is_summary_best = not is_sampled
            if CAN_SAMPLE and IS_SUMMARIZED and coins is None:
                top_k, top_p, min_p = read_filters(
                    filters.top_k, filters.top_p, filters.min_p, request
                )
                is_filtered = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
                is_summary_best = is_summary_best | (not is_filtered)
            if is_summary_best:
                _, token = best_block(
                    scores, target.best + summary, target.tokens + summary, BLOCK_V
                )
            elif CAN_SAMPLE:
                if coins is not None:
                    coin = tl.load(coins + node)
                    rest = Rest(None, None, None, -1, 0, 0.0, 0.0)
                    token = draw_by_coin(Law(scores, edge, 1.0), rest, coin, BLOCK_V)
                elif seeds_ptr is not None:
                    counter = tl.full((), 0, tl.uint32)
                    noise = Noise(seed, position, counter, TARGET)
                    _, token = draw_noisy(scores, noise, edge, BLOCK_V)
            child = find_child(tree, node, node, token, False)
        else:
            status = tl.full((), NO_FINITE_LOGIT, tl.int32)
            token = tl.full((), 0, tl.int32)
    return status, node, token


@triton.jit
def _draw_next(target, tree, draft, records, coins, seed, position, node, BLOCK_V: tl.constexpr):
    """The token after `node`, from what its rejected children left of its law."""
    record = records + tl.cast(node, tl.int64) * FIELDS
    largest, edge, inverse, is_infinite = read_law(record)
    child, largest_draft, scale = read_rest(record)
    _, first_draft = draft_law(draft, node)
    first = target.first + tl.cast(node, tl.int64) * target.stride
    maxima = target.maxima + tl.cast(node, tl.int64) * tl.cdiv(target.row.vocab, BLOCK_V)
    law = Law(Scores(target.row, first, maxima, largest, is_infinite), edge, inverse)
    rest = Rest(tree, draft, records, child, first_draft, largest_draft, scale)
    if coins is not None:
        coin = tl.load(coins)
    else:
        domain = tl.where(tl.load(record + IS_TOUCHED) != 0.0, RESIDUAL, TARGET)
        coin = uniform(seed, position + 1 + _depth(tree.parents, node), 0, domain)
    return draw_by_coin(law, rest, coin, BLOCK_V)


@verify.implement("triton")
def verify_triton(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    kinds: Tensor | None = None,
    draft_rows: Tensor | None = None,
    draft_probs: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_offsets: Tensor | None = None,
    coins: Tensor | None = None,
    *,
    rule: str = "walk",
    lossy: bool = False,
    typical_epsilon: float = 0.09,
    typical_delta: float = 0.3,
    return_logprobs: bool = False,
    return_law: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.verify` on the device, which refuses no drafts for what its tensors hold.

    A kind other than 0, 1, 2 and a sampled node without draft law end in status 2 where the rule
    tests them; `walk` and `typical` test every draft as one-hot; `block` and `gd_traversal` test
    any tree as `traversal` does. A node whose parent is not before it is never reached. Draft ids
    outside the target's vocabulary are left out.
    """
    check_arguments(
        rule, lossy, draft_rows, draft_probs, draft_logits, temperature, seeds, positions, coins
    )
    batch, nodes, vocab = logits.shape
    device = logits.device

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    path = empty(torch.int32, batch, nodes)
    num_accepted, status = empty(torch.int32, batch), empty(torch.int32, batch)
    next_tokens = empty(torch.int64, batch)
    scored = (batch, nodes) if return_logprobs else (0, 0)
    logprobs, margins = empty(torch.float32, *scored), empty(torch.float32, *scored)
    thresholds = empty(torch.float64, *((batch, nodes) if return_law else (0, 0))).fill_(torch.nan)
    next_law = empty(torch.float64, *((batch, vocab) if return_law else (0, 0)))
    answer = (path, num_accepted, next_tokens, status, logprobs, margins, thresholds, next_law)
    if batch == 0:
        return answer
    tokens, parents, num_nodes = tokens.contiguous(), parents.contiguous(), num_nodes.contiguous()
    temperature, top_k, top_p, min_p = map(contiguous, (temperature, top_k, top_p, min_p))
    seeds, positions, coins = map(contiguous, (seeds, positions, coins))
    if temperature is None:
        seeds = positions = top_k = top_p = min_p = coins = None
    elif coins is not None:
        seeds = positions = None
    family = FAMILIES[rule]
    is_testing = family in (TOP_DOWN.value, BOTTOM_UP.value) and temperature is not None
    draft = _draft_arguments(
        kinds if is_testing else None, draft_rows, draft_probs, draft_logits, draft_offsets, vocab
    )
    source = row_arguments(logits, bias, mask)
    filters = (temperature, top_k, top_p, min_p)
    block = vocab_block(vocab)
    blocks = triton.cdiv(vocab, block)
    summaries = block_summaries(batch * nodes, vocab, device)
    is_summarized = batch * nodes <= ROWS_PER_PROCESSOR * num_processors(device)
    records = None
    if family != WALK.value or return_logprobs or return_law:
        records = empty(torch.float64, batch, nodes, FIELDS.value)
    if is_summarized:
        draws = (seeds, positions) if family == WALK.value else (None, None)
        summarize_nodes[(batch * nodes, blocks)](
            *source, parents, num_nodes, *draws, *filters, *summaries, nodes, vocab,
            BLOCK_V=block, **stream_options(LAUNCH["summarize_nodes"]),
        )  # fmt: skip
    decide[(batch,)](
        *source, tokens, parents, num_nodes, seeds, positions, *filters, *summaries, *draft,
        coins, records, thresholds if return_law else None, path, num_accepted, next_tokens,
        status, nodes, vocab,
        FAMILY=family, EPSILON=typical_epsilon, DELTA=typical_delta,
        HAS_FILTERS=any(f is not None for f in filters[1:]), HAS_SUM=return_law,
        IS_SUMMARIZED=is_summarized, BLOCK_V=block,
        **row_options(LAUNCH["decide"]),
    )  # fmt: skip
    if return_logprobs:
        score_path[(batch * nodes,)](
            *source, tokens, temperature, summaries[0], records, path, num_accepted, next_tokens,
            logprobs, margins, nodes, vocab, BLOCK_V=block,
            **OUTPUTS_LAUNCH["score_path"].options,
        )  # fmt: skip
    if return_law:
        write_law[(batch, blocks)](
            *source, tokens, parents, num_nodes, temperature, summaries[0], *draft, records, path,
            num_accepted, next_tokens, status, next_law, nodes, vocab, BLOCK_V=block,
            **stream_options(OUTPUTS_LAUNCH["write_law"]),
        )  # fmt: skip
    return answer


def _draft_arguments(
    kinds: Tensor | None,
    rows: Tensor | None,
    probs: Tensor | None,
    logits: Tensor | None,
    offsets: Tensor | None,
    vocab: int,
) -> tuple[object, ...]:
    """kinds, rows, laws with their strides, ids, number of laws, draft vocabulary."""
    law = logits if probs is None else probs
    if kinds is None or law is None or rows is None:
        return (contiguous(kinds), None, None, None, 0, 0, 0, None, 0, 0)
    num_laws, draft_vocab = law.shape[1:]
    ids = None
    if offsets is not None:
        draft_ids = torch.arange(draft_vocab, device=law.device)
        targets = draft_ids + offsets
        is_target = (targets >= 0) & (targets < vocab)
        ids = torch.full((vocab + 1,), PAD, dtype=torch.int32, device=law.device)
        ids.scatter_(0, torch.where(is_target, targets, vocab), draft_ids.int())
    rows = rows.contiguous()
    return (kinds.contiguous(), rows, probs, logits, *law.stride(), ids, num_laws, draft_vocab)
