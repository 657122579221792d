"""What `verify` returns on request, spread over the device from what `decide` noted.

`score_path`: one program per place of the path, which reads its row once more, and the largest
blocks twice. `write_law`: one program per block of the last node's row; writes 8 bytes per token.
Roofline: (rows on the path) V e / bandwidth, and B V (e + 8) / bandwidth, e = bytes per logit.

Delicate: margins are of biased logits, whatever the filters; log-probabilities of a greedy request
are those of the plain softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Launch
from .laws import FIELDS, OK, Draft, Law, Rest, Tree, block_masses, draft_law, read_law, read_rest
from .sampling import Row, Scores, best_of, biased_logits, read_temperature, to_scores, total_weight

LAUNCH = {
    "score_path": Launch(num_warps=8, fuses=False),
    "write_law": Launch(num_warps=4, fuses=False),
}


@triton.jit(do_not_specialize=["nodes"])
def score_path(
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
    temperature_ptr,  # [B] or None
    maxima_ptr,  # [B, N, blocks]
    records_ptr,  # [B, N, FIELDS]
    path_ptr,  # [B, N]
    num_accepted_ptr,  # [B]
    next_token_ptr,  # [B]
    logprobs_ptr,  # [B, N]
    margins_ptr,  # [B, N]
    nodes,
    vocab,
    BLOCK_V: tl.constexpr,
):
    pid_b = (tl.program_id(0) // nodes).to(tl.int64)
    depth = tl.program_id(0) % nodes
    place = pid_b * nodes + depth
    node = tl.load(path_ptr + place)
    logprob = tl.full((), float("nan"), tl.float64)
    margin = tl.full((), float("nan"), tl.float32)
    if node >= 0:
        _is_sampled, temperature = read_temperature(temperature_ptr, pid_b)
        row = Row(
            logits_ptr, stride_logits_v, bias_ptr, pid_b * stride_bias_b, stride_bias_v,
            mask_ptr, pid_b * stride_mask_b, stride_mask_v, vocab, temperature,
        )  # fmt: skip
        first = pid_b * stride_logits_b + node.to(tl.int64) * stride_logits_n
        maxima = maxima_ptr + (pid_b * nodes + node) * tl.cdiv(vocab, BLOCK_V)
        largest, edge, _, is_infinite = read_law(records_ptr + (pid_b * nodes + node) * FIELDS)
        scores = Scores(row, first, maxima, largest, is_infinite)
        token = tl.load(next_token_ptr + pid_b)
        if depth < tl.load(num_accepted_ptr + pid_b):
            token = tl.load(tokens_ptr + pid_b * nodes + tl.load(path_ptr + place + 1))
        logit = biased_logits(row, first, token, (token >= 0) & (token < vocab))
        value = to_scores(logit, temperature, is_infinite)
        is_fine = (largest > -float("inf")) & (largest < float("inf")) & (edge <= largest)
        if is_fine:
            distance = value.to(tl.float64) - largest.to(tl.float64)
            logprob = distance - tl.log(total_weight(scores, edge, BLOCK_V))
            logprob = tl.where(value >= edge, logprob, -float("inf"))
        best, second = _top_two(row, first, maxima, BLOCK_V)
        margin = best - second
    tl.store(logprobs_ptr + place, logprob.to(tl.float32))
    tl.store(margins_ptr + place, margin)


@triton.jit
def _top_two(row, first, maxima, BLOCK_V: tl.constexpr):
    """The two largest biased logits of a row."""
    best = tl.full((), -float("inf"), tl.float32)
    second = tl.full((), -float("inf"), tl.float32)
    for block in range(tl.cdiv(row.vocab, BLOCK_V)):
        if tl.load(maxima + block) > second:
            offs = block * BLOCK_V + tl.arange(0, BLOCK_V)
            logits = biased_logits(row, first, offs, offs < row.vocab)
            here, token = best_of(logits, offs)
            next_here = tl.max(tl.where(offs == token, -float("inf"), logits), 0)
            second = tl.maximum(tl.minimum(best, here), tl.maximum(second, next_here))
            best = tl.maximum(best, here)
    return best, second


@triton.jit(do_not_specialize=["laws", "nodes"])
def write_law(
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
    temperature_ptr,  # [B] or None
    maxima_ptr,  # [B, N, blocks]
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
    records_ptr,  # [B, N, FIELDS]
    path_ptr,  # [B, N]
    num_accepted_ptr,  # [B]
    next_token_ptr,  # [B]
    status_ptr,  # [B]
    law_ptr,  # [B, V]
    nodes,
    vocab,
    BLOCK_V: tl.constexpr,
):
    pid_b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    offs = block * BLOCK_V + tl.arange(0, BLOCK_V)
    first_node = pid_b * nodes
    is_sampled, temperature = read_temperature(temperature_ptr, pid_b)
    node = tl.load(path_ptr + first_node + tl.load(num_accepted_ptr + pid_b))
    is_fine = (node >= 0) & (tl.load(status_ptr + pid_b) == OK)
    masses = tl.zeros((BLOCK_V,), tl.float64)
    if is_fine & is_sampled:
        row = Row(
            logits_ptr, stride_logits_v, bias_ptr, pid_b * stride_bias_b, stride_bias_v,
            mask_ptr, pid_b * stride_mask_b, stride_mask_v, vocab, temperature,
        )  # fmt: skip
        tree = Tree(tokens_ptr + first_node, parents_ptr + first_node, 0)
        draft = Draft(
            kinds_ptr, rows_ptr, first_node, pid_b * stride_draft_b, probs_ptr, draft_logits_ptr,
            stride_draft_q, stride_draft_u, ids_ptr, laws, draft_vocab,
        )  # fmt: skip
        records = records_ptr + first_node * FIELDS
        record = records + node.to(tl.int64) * FIELDS
        largest, edge, inverse, is_infinite = read_law(record)
        child, largest_draft, scale = read_rest(record)
        _, first_draft = draft_law(draft, node)
        first = pid_b * stride_logits_b + node.to(tl.int64) * stride_logits_n
        maxima = maxima_ptr + (first_node + node) * tl.cdiv(vocab, BLOCK_V)
        law = Law(Scores(row, first, maxima, largest, is_infinite), edge, inverse)
        rest = Rest(tree, draft, records, child, first_draft, largest_draft, scale)
        _, masses = block_masses(law, rest, block, BLOCK_V)
    elif is_fine:
        masses = tl.where(offs == tl.load(next_token_ptr + pid_b), 1.0, masses)
    tl.store(law_ptr + pid_b * vocab + offs, masses, mask=offs < vocab)
