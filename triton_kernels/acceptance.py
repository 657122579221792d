"""The acceptance rules that test drafts with coins, on the device: specdec_kernels/acceptance.py.

Bytes moved: per node opened its row, see sampling.py; per rejection the blocks that the filters
kept, with their draft masses, and a few numbers.

Delicate: records are written by one thread and read by all, so barriers enclose each group of
writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .laws import (
    DEPTH,
    DRAFT_LARGEST,
    DRAFT_SCALE,
    EDGE,
    FACTOR,
    FALLBACK,
    FIELDS,
    FIRST,
    IS_INFINITE,
    IS_TOUCHED,
    LARGEST,
    LAST,
    LOGPROB,
    NEXT,
    NO_FINITE_LOGIT,
    NO_SUCH_DRAW,
    NODES_AT_ONCE,
    OK,
    ONEHOT,
    PRIOR,
    REACH,
    SAMPLED,
    SHARE,
    SUM,
    TAKEN,
    TESTED,
    TO_ALL,
    WITHOUT_REPLACEMENT,
    Law,
    Rest,
    draft_law,
    draft_masses,
    find_child,
    free_share,
    open_draft_law,
    read_law,
    read_rest,
    rest_of,
    whole_mass,
)
from .philox import ACCEPT, uniform
from .sampling import (
    LOWEST,
    Scores,
    biased_logits,
    block_largest,
    block_scores,
    find_edge,
    largest_logit,
    read_filters,
    summarize_row,
    to_scores,
    total_weight,
    weights,
)


@triton.jit
def try_drafts(
    target, filters, tree, draft, records, coins_ptr, thresholds_ptr, request, seed, position,
    IS_TOP_DOWN: tl.constexpr, IS_SUMMARIZED: tl.constexpr, HAS_FILTERS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(status, last node kept) of one sampled request under `token`, or a bottom-up rule.

    Top-down, children are tested where they are met. Bottom-up, the leaf that comes first in
    depth-first order is tested; rejected, it leaves the tree.
    """
    node = tl.full((), 0, tl.int32)
    status = tl.full((), OK, tl.int32)
    reach = tl.full((), 1.0, tl.float64)
    is_opening = True
    is_running = tree.size > 0
    while is_running:
        if is_opening:
            is_fine, _, _, _, _ = open_node(
                target, filters, records, request, node, reach, True, IS_SUMMARIZED, HAS_FILTERS,
                True, BLOCK_V,
            )  # fmt: skip
            if not is_fine:
                status = tl.full((), NO_FINITE_LOGIT, tl.int32)
        is_opening = False
        is_rejecting = False
        child = tl.full((), -1, tl.int32)
        if status == OK:
            record = records + tl.cast(node, tl.int64) * FIELDS
            child = find_child(tree, node, tl.load(record + TESTED).to(tl.int32), 0, True)
            tested = child
            threshold = tl.load(record + REACH)
            if child >= 0:
                kept, drawn = weigh(target, tree, draft, records, node, child, BLOCK_V)
                if drawn > 0.0:
                    threshold = tl.where(kept < drawn, kept / drawn, 1.0)
                    if not IS_TOP_DOWN:
                        is_opening = kept > 0.0
                else:
                    status = tl.full((), NO_SUCH_DRAW, tl.int32)
            else:
                tested = node
            is_tested = (status == OK) & (tested > 0) & (not is_opening)
            if IS_TOP_DOWN:
                is_tested = is_tested & (child >= 0)
            if is_tested:
                if thresholds_ptr is not None:
                    tl.store(thresholds_ptr + tested, threshold)
                coin = _coin(coins_ptr, seed, position, tested)
                is_kept = coin < threshold
                if IS_TOP_DOWN:
                    is_opening = is_kept
                    is_rejecting = not is_kept
                else:
                    is_rejecting = (not is_kept) | (child >= 0)
            if is_opening:
                node = child
                reach = tl.where(IS_TOP_DOWN, 1.0, threshold)
            if is_rejecting:
                if child < 0:
                    node = tl.load(tree.parents + tested)
                reject(target, tree, draft, records, node, tested, BLOCK_V)
        is_running = is_opening | is_rejecting
    if not IS_TOP_DOWN:
        node = tl.where(status == OK, node, 0)
    return status, node


@triton.jit
def find_typical(
    target, filters, tree, records, request,
    EPSILON: tl.constexpr, DELTA: tl.constexpr, IS_SUMMARIZED: tl.constexpr,
    HAS_FILTERS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(status, node): the deepest one all of whose path is typical; among equals the likeliest."""
    row = target.row
    for begin in range(0, tree.size, NODES_AT_ONCE):
        offs = begin + tl.arange(0, NODES_AT_ONCE)
        places = records + offs.to(tl.int64) * FIELDS + LOGPROB
        tl.store(places, tl.where(offs == 0, 0.0, float("nan")), mask=offs < tree.size)
    tl.store(records + DEPTH, 0.0)
    tl.debug_barrier()
    best = tl.full((), 0, tl.int32)
    best_depth = tl.full((), 0.0, tl.float64)
    best_logprob = tl.full((), 0.0, tl.float64)
    status = tl.full((), OK, tl.int32)
    for step in range(tree.size + 1):  # the last step opens the best
        is_last = step == tree.size
        node = tl.where(is_last, best, step)
        record = records + tl.cast(node, tl.int64) * FIELDS
        logprob = tl.load(record + LOGPROB)
        child = tl.full((), -1, tl.int32)
        if (logprob == logprob) & (not is_last):
            child = find_child(tree, node, node, 0, True)
        if (status == OK) & (is_last | (child >= 0)):
            is_fine, largest, edge, total, is_infinite = open_node(
                target, filters, records, request, node, 1.0, True, IS_SUMMARIZED, HAS_FILTERS,
                True, BLOCK_V,
            )  # fmt: skip
            if not is_fine:
                status = tl.full((), NO_FINITE_LOGIT, tl.int32)
                best = node
            else:
                first = target.first + tl.cast(node, tl.int64) * target.stride
                maxima = target.maxima + tl.cast(node, tl.int64) * tl.cdiv(row.vocab, BLOCK_V)
                scores = Scores(row, first, maxima, largest, is_infinite)
                floor = _typical_floor(scores, edge, total, EPSILON, DELTA, BLOCK_V)
                depth = tl.load(record + DEPTH) + 1.0
                while child >= 0:
                    token = tl.load(tree.tokens + child)
                    is_token = (token >= 0) & (token < row.vocab)
                    logit = biased_logits(row, first, token, is_token)
                    value = to_scores(logit, row.temperature, is_infinite)
                    chance = weights(value, edge, largest) / total
                    if chance > floor:
                        chance = logprob + tl.log(chance)
                        tl.store(records + child.to(tl.int64) * FIELDS + LOGPROB, chance)
                        tl.store(records + child.to(tl.int64) * FIELDS + DEPTH, depth)
                        is_deeper = depth > best_depth
                        if is_deeper | ((depth == best_depth) & (chance > best_logprob)):
                            best = child
                            best_depth = depth
                            best_logprob = chance
                    child = find_child(tree, node, child, 0, True)
                tl.debug_barrier()
    return status, best


@triton.jit
def open_node(
    target, filters, records, request, node, reach, is_sampled,
    IS_SUMMARIZED: tl.constexpr, HAS_FILTERS: tl.constexpr, HAS_SUM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Filter the node's row and write its record, if there are any. False if nothing is left."""
    row = target.row
    blocks = tl.cdiv(row.vocab, BLOCK_V)
    first = target.first + tl.cast(node, tl.int64) * target.stride
    summary = tl.cast(node, tl.int64) * blocks
    maxima = target.maxima + summary
    if not IS_SUMMARIZED:
        summarize_row(row, first, maxima, target.best + summary, target.tokens + summary, BLOCK_V)
    top_logit = largest_logit(maxima, blocks)
    is_infinite = is_sampled & (tl.div_rn(top_logit, row.temperature) == float("inf"))
    largest = to_scores(top_logit, row.temperature, is_infinite)
    is_fine = top_logit > -float("inf")
    edge = tl.full((), LOWEST, tl.float32)
    total = tl.full((), 1.0, tl.float64)
    scores = Scores(row, first, maxima, largest, is_infinite)
    if is_fine & is_sampled:
        if HAS_FILTERS:
            top_k, top_p, min_p = read_filters(filters.top_k, filters.top_p, filters.min_p, request)
            edge = find_edge(scores, top_k, top_p, min_p, BLOCK_V)
            is_fine = edge <= largest
        if HAS_SUM:
            total = total_weight(scores, edge, BLOCK_V)
    if records is not None:
        record = records + tl.cast(node, tl.int64) * FIELDS
        tl.debug_barrier()
        tl.store(record + LARGEST, tl.cast(largest, tl.float64))
        tl.store(record + EDGE, tl.cast(edge, tl.float64))
        tl.store(record + SUM, total)
        tl.store(record + IS_INFINITE, is_infinite.to(tl.float64))
        tl.store(record + REACH, reach)
        tl.store(record + TESTED, tl.cast(node, tl.float64))
        tl.store(record + FIRST, -1.0)
        tl.store(record + LAST, -1.0)
        tl.store(record + IS_TOUCHED, 0.0)
        tl.store(record + DRAFT_LARGEST, 0.0)
        tl.store(record + DRAFT_SCALE, 0.0)
        tl.store(record + SHARE, 1.0)
        tl.debug_barrier()
    return is_fine, largest, edge, total, is_infinite


@triton.jit
def weigh(target, tree, draft, records, node, child, BLOCK_V: tl.constexpr):
    """(a p(x), q(x)) of a child: it is kept with probability min(1, a p(x) / q(x)).

    q(x) is 0 where the child cannot have been drawn.
    """
    record = records + tl.cast(node, tl.int64) * FIELDS
    token = tl.load(tree.tokens + child)
    row = target.row
    is_token = (token >= 0) & (token < row.vocab)
    kind = tl.full((), ONEHOT, tl.int32)
    has_law, first_draft = draft_law(draft, node)
    drawn = tl.full((), 1.0, tl.float64)
    drafted = tl.full((), 0.0, tl.float64)
    if draft.kinds is not None:
        kind = tl.load(draft.kinds + draft.first_node + child).to(tl.int32)
        if kind != ONEHOT:
            if has_law:
                open_draft_law(draft, first_draft, record, BLOCK_V)
                largest_draft = tl.load(record + DRAFT_LARGEST)
                scale = tl.load(record + DRAFT_SCALE)
                drafted = draft_masses(draft, first_draft, largest_draft, scale, token, is_token)
            drawn = drafted
            if kind == WITHOUT_REPLACEMENT:
                drawn = drafted * tl.load(record + SHARE)
                if _is_taken(tree, records, tl.load(record + FIRST).to(tl.int32), token):
                    drawn = drawn * 0.0
            elif kind != SAMPLED:
                drawn = drawn * 0.0
    largest, edge, inverse, is_infinite = read_law(record)
    child_rejected, largest_draft, scale = read_rest(record)
    first = target.first + tl.cast(node, tl.int64) * target.stride
    logit = biased_logits(row, first, token, is_token)
    mass = weights(to_scores(logit, row.temperature, is_infinite), edge, largest) * inverse
    if (child_rejected >= 0) & is_token:
        if draft.kinds is not None and (scale > 0.0) & has_law:
            drafted = draft_masses(draft, first_draft, largest_draft, scale, token, is_token)
        rest = Rest(tree, draft, records, child_rejected, first_draft, largest_draft, scale)
        mass = rest_of(rest, mass, drafted, token)
    return tl.load(record + REACH) * mass, drawn


@triton.jit
def reject(target, tree, draft, records, node, child, BLOCK_V: tl.constexpr):
    """Take out of the node's target law what this child would have covered."""
    record = records + tl.cast(node, tl.int64) * FIELDS
    mine = records + tl.cast(child, tl.int64) * FIELDS
    token = tl.load(tree.tokens + child)
    reach = tl.load(record + REACH)
    previous = tl.load(record + LAST)
    taken = tl.full((), 0.0, tl.float64)
    _has_law, first_draft = draft_law(draft, node)
    if draft.kinds is not None:
        kind = tl.load(draft.kinds + draft.first_node + child).to(tl.int32)
        if kind == WITHOUT_REPLACEMENT:
            taken = -tl.load(record + SHARE)
        elif kind == SAMPLED:
            taken = taken + 1.0
    tl.debug_barrier()
    tl.store(record + IS_TOUCHED, 1.0)
    tl.store(record + TESTED, tl.cast(child, tl.float64))
    if (token >= 0) & (token < target.row.vocab):
        tl.store(mine + PRIOR, reach)
        tl.store(mine + FACTOR, 1.0)
        tl.store(mine + TAKEN, taken)
        tl.store(mine + FALLBACK, 0.0)
        tl.store(mine + NEXT, -1.0)
        tl.store(record + LAST, tl.cast(child, tl.float64))
        link = records + previous.to(tl.int64) * FIELDS + NEXT
        before = tl.where(previous < 0.0, record + FIRST, link)
        tl.store(before, tl.cast(child, tl.float64))
        tl.debug_barrier()
        largest, edge, inverse, is_infinite = read_law(record)
        child_rejected, largest_draft, scale = read_rest(record)
        first = target.first + tl.cast(node, tl.int64) * target.stride
        maxima = target.maxima + tl.cast(node, tl.int64) * tl.cdiv(target.row.vocab, BLOCK_V)
        law = Law(Scores(target.row, first, maxima, largest, is_infinite), edge, inverse)
        rest = Rest(tree, draft, records, child_rejected, first_draft, largest_draft, scale)
        mass = whole_mass(law, rest, BLOCK_V)
        denominator = mass + 1.0 - reach
        fallback = 0
        while (mass <= 0.0) & (fallback < TO_ALL):  # rounding left nothing
            fallback += 1
            tl.debug_barrier()
            tl.store(mine + FALLBACK, tl.cast(fallback, tl.float64))
            tl.debug_barrier()
            mass = whole_mass(law, rest, BLOCK_V)
        left = tl.where(fallback > 0, 0.0, mass)
        next_reach = tl.where(denominator > 0.0, left / denominator, 1.0)
        factor = tl.where(fallback == TO_ALL, 1.0, 1.0 / mass)
        share = tl.load(record + SHARE)
        if draft.kinds is not None and taken < 0.0:
            share = free_share(tree, draft, rest, BLOCK_V)
        tl.debug_barrier()
        tl.store(record + REACH, next_reach)
        tl.store(record + SHARE, share)
        tl.store(mine + FACTOR, factor)
    tl.debug_barrier()


@triton.jit
def _is_taken(tree, records, child, token):
    """Whether a rejected child drawn without replacement, from `child` on, had that token."""
    is_taken = token < 0
    while child >= 0:
        record = records + tl.cast(child, tl.int64) * FIELDS
        is_here = tl.load(tree.tokens + child) == token
        is_taken = is_taken | (is_here & (tl.load(record + TAKEN) < 0.0))
        child = tl.load(record + NEXT).to(tl.int32)
    return is_taken


@triton.jit
def _coin(coins_ptr, seed, position, node):
    """The coin of a node of the request."""
    if coins_ptr is not None:
        coin = tl.load(coins_ptr + node)
    else:
        coin = uniform(seed, position, node, ACCEPT)
    return coin


@triton.jit
def _typical_floor(
    scores, edge, total, EPSILON: tl.constexpr, DELTA: tl.constexpr, BLOCK_V: tl.constexpr
):
    """min(epsilon, delta exp(-entropy)) of a law."""
    moments = tl.zeros((BLOCK_V,), tl.float64)
    for block in range(tl.cdiv(scores.row.vocab, BLOCK_V)):
        if block_largest(scores, block) >= edge:
            _, values = block_scores(scores, block, BLOCK_V)
            weight = weights(values, edge, scores.largest)
            distances = values.to(tl.float64) - tl.cast(scores.largest, tl.float64)
            moments += tl.where(weight > 0.0, weight * distances, 0.0)
    entropy = tl.log(total) - tl.sum(moments, 0) / total
    floor = tl.full((), DELTA, tl.float64) * tl.exp(-entropy)
    return tl.minimum(tl.full((), EPSILON, tl.float64), floor)
