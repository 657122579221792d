"""What a node's law is, and what its rejected children left of it: records, not rows.

No law is stored. A node's record holds its target law (largest score, edge, sum) and, as scalars,
what each of its rejected children did to it; `block_masses` recomputes what is left of the law of a
block from logits and draft masses.

Delicate: masses are float64 and uncontracted. Where rounding left no mass, the record says which
law the node falls back to.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .sampling import NO_TOKEN, Row, Scores, block_largest, block_scores, weights

OK, NO_FINITE_LOGIT, NO_SUCH_DRAW = (tl.constexpr(i) for i in range(3))
ONEHOT, SAMPLED, WITHOUT_REPLACEMENT = (tl.constexpr(i) for i in range(3))  # tree.DraftKind

NODES_AT_ONCE = tl.constexpr(128)  # nodes that are searched together

# The record of a node: its target law; its children; the draft law of its sampled ones;
LARGEST, EDGE, SUM, IS_INFINITE = (tl.constexpr(i) for i in range(4))
REACH, TESTED, FIRST, LAST, IS_TOUCHED = (tl.constexpr(i) for i in range(4, 9))
DRAFT_LARGEST, DRAFT_SCALE, SHARE = (tl.constexpr(i) for i in range(9, 12))
# and what its own rejection did to its parent: p <- FACTOR max(0, PRIOR p - TAKEN q).
PRIOR, FACTOR, TAKEN, FALLBACK, NEXT = (tl.constexpr(i) for i in range(12, 17))
LOGPROB, DEPTH = PRIOR, NEXT  # of rule `typical`, which rejects nothing
FIELDS = tl.constexpr(17)

TO_REST, TO_ALL = tl.constexpr(1), tl.constexpr(2)  # FALLBACK: the law without tokens tried; all


class Tree(NamedTuple):
    """The tree of one request; padding is not read."""

    tokens: tl.tensor  # [N] int64
    parents: tl.tensor  # [N] int32
    size: tl.tensor


class Draft(NamedTuple):
    """The laws that sampled nodes were drawn from, and where those of one request begin."""

    kinds: tl.tensor | None  # [B, N] int8; None where all nodes are one-hot
    rows: tl.tensor | None  # [B, N] int32
    first_node: tl.tensor  # int64
    first: tl.tensor  # int64
    probs: tl.tensor | None  # [B, Q, U] float32
    logits: tl.tensor | None  # or this
    stride_q: tl.tensor
    stride_u: tl.tensor
    ids: tl.tensor | None  # [V] int32, target id -> draft id or PAD
    laws: tl.tensor  # Q
    vocab: tl.tensor  # U


class Target(NamedTuple):
    """The target's rows of one request."""

    row: Row
    first: tl.tensor  # int64 offset of the root's token 0
    stride: tl.tensor  # from node to node
    maxima: tl.tensor  # [N, blocks], summaries as in sampling.py
    best: tl.tensor
    tokens: tl.tensor


class Filters(NamedTuple):
    """Where the filters of the requests are; None where not given."""

    top_k: tl.tensor | None
    top_p: tl.tensor | None
    min_p: tl.tensor | None


class Law(NamedTuple):
    """Weights of a row above an edge, times the inverse of their sum."""

    scores: Scores
    edge: tl.tensor
    inverse: tl.tensor


class Rest(NamedTuple):
    """How the rejected children of a node changed its law."""

    tree: Tree | None
    draft: Draft | None
    records: tl.tensor | None  # [N, FIELDS] float64; None where nothing can be rejected
    child: tl.tensor  # the first one rejected, or PAD
    first: tl.tensor  # int64 offset of the node's draft law
    largest: tl.tensor  # of its logits
    scale: tl.tensor  # of its masses; 0 before it is needed


@triton.jit
def find_child(tree, node, previous, token, ANY: tl.constexpr):
    """The first child of `node` after node `previous`, with that token unless ANY; or PAD."""
    found = tl.full((), NO_TOKEN, tl.int32)
    first = previous + 1
    while (first < tree.size) & (found == NO_TOKEN):
        offs = first + tl.arange(0, NODES_AT_ONCE)
        mask = offs < tree.size
        is_child = tl.load(tree.parents + offs, mask=mask, other=-1) == node
        if not ANY:
            is_child = is_child & (tl.load(tree.tokens + offs, mask=mask, other=-1) == token)
        found = tl.min(tl.where(is_child & mask, offs, NO_TOKEN), 0)
        first += NODES_AT_ONCE
    return tl.where(found == NO_TOKEN, -1, found)


@triton.jit
def draft_masses(draft, first, largest, scale, tokens, mask):
    """Mass of target tokens in a draft law, in float64; of any shape.

    NaN, infinite or negative probabilities count as 0; logits are read as in `sample`.
    """
    ids = tokens
    if draft.ids is not None:
        ids = tl.load(draft.ids + tokens, mask=mask, other=-1)
    return id_masses(draft, first, largest, scale, ids, mask & (ids >= 0) & (ids < draft.vocab))


@triton.jit
def id_masses(draft, first, largest, scale, ids, mask):
    places = first + tl.cast(ids, tl.int64) * draft.stride_u
    if draft.probs is not None:
        values = tl.load(draft.probs + places, mask=mask, other=0.0).to(tl.float64)
        masses = tl.where((values > 0.0) & (values < float("inf")), values, 0.0)
    elif draft.logits is not None:
        logits = tl.load(draft.logits + places, mask=mask, other=-float("inf")).to(tl.float64)
        infinite = tl.where(logits == float("inf"), 1.0, 0.0)
        values = tl.where(largest == float("inf"), infinite, tl.exp(logits - largest))
        masses = tl.where(logits > -float("inf"), values * scale, 0.0)
    else:
        masses = places.to(tl.float64) * 0.0
    return masses


@triton.jit
def rest_of(rest, masses, drafted, tokens):
    """What the rejected children, in order, left of target masses; of any shape."""
    left = masses
    is_tried = tokens < 0
    is_taken = tokens < 0
    child = rest.child
    while child >= 0:
        record = rest.records + tl.cast(child, tl.int64) * FIELDS
        taken = tl.load(record + TAKEN)
        is_distinct = (taken < 0.0).to(tl.int32) != 0
        is_here = tokens == tl.load(rest.tree.tokens + child)
        drawn = drafted * tl.where(is_distinct, -taken, taken)
        drawn = tl.where(is_taken & is_distinct, 0.0, drawn)
        left = tl.maximum(tl.load(record + PRIOR) * left - drawn, 0.0)
        left = tl.where(is_here, 0.0, left)
        is_tried = is_tried | is_here
        is_taken = is_taken | (is_here & is_distinct)
        fallback = tl.load(record + FALLBACK).to(tl.int32)
        if fallback > 0:
            left = tl.where(is_tried & (fallback == TO_REST), 0.0, masses)
        left = left * tl.load(record + FACTOR)
        child = tl.load(record + NEXT).to(tl.int32)
    return left


@triton.jit
def block_masses(law, rest, block, BLOCK_V: tl.constexpr):
    """(tokens [BLOCK_V], their masses in float64) of what is left of a law."""
    offs, values = block_scores(law.scores, block, BLOCK_V)
    masses = weights(values, law.edge, law.scores.largest) * law.inverse
    if rest.records is not None and rest.child >= 0:
        drafted = tl.zeros((BLOCK_V,), tl.float64)
        if rest.draft.kinds is not None and rest.scale > 0.0:
            mask = offs < law.scores.row.vocab
            drafted = draft_masses(rest.draft, rest.first, rest.largest, rest.scale, offs, mask)
        masses = rest_of(rest, masses, drafted, offs)
    return offs, masses


@triton.jit
def whole_mass(law, rest, BLOCK_V: tl.constexpr):
    """The sum of what is left of a law."""
    whole = tl.zeros((BLOCK_V,), tl.float64)
    for block in range(tl.cdiv(law.scores.row.vocab, BLOCK_V)):
        if block_largest(law.scores, block) >= law.edge:
            _, masses = block_masses(law, rest, block, BLOCK_V)
            whole += masses
    return tl.sum(whole, 0)


@triton.jit
def draw_by_coin(law, rest, coin, BLOCK_V: tl.constexpr):
    """The lowest token at which the cumulative mass exceeds `coin` times the whole.

    A coin so near 1 that the product rounds up draws the last token with mass.
    """
    target = coin * whole_mass(law, rest, BLOCK_V)
    blocks = tl.cdiv(law.scores.row.vocab, BLOCK_V)
    below = tl.full((), 0.0, tl.float64)
    token = tl.full((), NO_TOKEN, tl.int32)
    last = tl.full((), 0, tl.int32)
    block = 0
    while (block < blocks) & (token == NO_TOKEN):
        if block_largest(law.scores, block) >= law.edge:
            offs, masses = block_masses(law, rest, block, BLOCK_V)
            mass = tl.sum(masses, 0)
            if mass > 0.0:
                last = tl.max(tl.where(masses > 0.0, offs, 0), 0)
            if below + mass > target:
                is_beyond = below + tl.cumsum(masses, 0) > target
                token = tl.min(tl.where(is_beyond, offs, last), 0)
            below += mass
        block += 1
    return tl.where(token == NO_TOKEN, last, token)


@triton.jit
def read_law(record):
    """(largest score, edge, 1 / sum, whether infinite) of an opened node."""
    largest = tl.load(record + LARGEST).to(tl.float32)
    edge = tl.load(record + EDGE).to(tl.float32)
    return largest, edge, 1.0 / tl.load(record + SUM), tl.load(record + IS_INFINITE) != 0.0


@triton.jit
def read_rest(record):
    """(first child rejected, largest draft logit, draft scale) of a node."""
    child = tl.load(record + FIRST).to(tl.int32)
    return child, tl.load(record + DRAFT_LARGEST), tl.load(record + DRAFT_SCALE)


@triton.jit
def draft_law(draft, node):
    """(whether the node names a draft law, its int64 offset)."""
    has_law = node < 0
    first = tl.cast(node, tl.int64)
    if draft.rows is not None:
        row = tl.load(draft.rows + draft.first_node + node)
        has_law = (row >= 0) & (row < draft.laws)
        first = draft.first + tl.cast(row, tl.int64) * draft.stride_q
    return has_law, first


@triton.jit
def open_draft_law(draft, first, record, BLOCK_V: tl.constexpr):
    """Note how the draft law of a node becomes masses, once; its children are sampled."""
    if tl.load(record + DRAFT_SCALE) == 0.0:
        largest = tl.full((), 0.0, tl.float64)
        scale = tl.full((), 1.0, tl.float64)
        if draft.logits is not None:
            top = tl.full((), -float("inf"), tl.float32)
            for block in range(tl.cdiv(draft.vocab, BLOCK_V)):
                offs = block * BLOCK_V + tl.arange(0, BLOCK_V)
                places = first + offs.to(tl.int64) * draft.stride_u
                mask = offs < draft.vocab
                logits = tl.load(draft.logits + places, mask=mask, other=-float("inf"))
                logits = tl.where(logits == logits, logits, -float("inf"))
                top = tl.maximum(top, tl.max(logits, 0))
            largest = top.to(tl.float64)
            total = tl.zeros((BLOCK_V,), tl.float64)
            for block in range(tl.cdiv(draft.vocab, BLOCK_V)):
                offs = block * BLOCK_V + tl.arange(0, BLOCK_V)
                total += id_masses(draft, first, largest, 1.0, offs, offs < draft.vocab)
            scale = 1.0 / tl.maximum(tl.sum(total, 0), 1e-300)
        tl.debug_barrier()
        tl.store(record + DRAFT_LARGEST, largest)
        tl.store(record + DRAFT_SCALE, scale)
        tl.debug_barrier()


@triton.jit
def free_share(tree, draft, rest, BLOCK_V: tl.constexpr):
    """1 over the mass of a draft law that its children without replacement have not taken."""
    whole = tl.zeros((BLOCK_V,), tl.float64)
    for block in range(tl.cdiv(draft.vocab, BLOCK_V)):
        offs = block * BLOCK_V + tl.arange(0, BLOCK_V)
        mask = offs < draft.vocab
        masses = id_masses(draft, rest.first, rest.largest, rest.scale, offs, mask)
        child = rest.child
        while child >= 0:
            record = rest.records + tl.cast(child, tl.int64) * FIELDS
            token = tl.load(tree.tokens + child)
            if draft.ids is not None:
                token = tl.load(draft.ids + token).to(tl.int64)
            is_distinct = (tl.load(record + TAKEN) < 0.0).to(tl.int32) != 0
            is_taken = (offs == token) & is_distinct
            masses = tl.where(is_taken, 0.0, masses)
            child = tl.load(record + NEXT).to(tl.int32)
        whole += masses
    left = tl.sum(whole, 0)
    return tl.where(left > 0.0, 1.0 / left, 0.0)
