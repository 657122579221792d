"""Accept a path through a draft tree from the target's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..philox import Domain
from ..registry import op
from ..sampling import OK, draw, filtered_scores
from ..shapes import PAD
from ..tree import random_trees
from .sample import sampling_inputs

RULES = ("walk", "token", "block", "traversal", "gd_traversal", "typical")
"""Acceptance rules; all but `typical` are lossless."""


def _fake(
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
    kinds: Tensor | None = None,
    draft_probs: Tensor | None = None,
    coins: Tensor | None = None,
    *,
    rule: str = "walk",
    lossy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, nodes, _ = logits.shape
    return (
        logits.new_empty((batch, nodes), dtype=torch.int32),
        logits.new_empty(batch, dtype=torch.int32),
        logits.new_empty(batch, dtype=torch.int64),
        logits.new_empty(batch, dtype=torch.int32),
    )


def _inputs(
    B: int,
    N: int,
    V: int,
    greedy: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    tree = random_trees(B, N, V, generator)
    logits = (torch.randn((N, B, V), generator=generator) * 2).transpose(0, 1)
    for b in range(B):  # lift drafted tokens, so that walks go deep
        for i in range(1, int(tree.num_nodes[b])):
            logits[b, int(tree.parents[b, i]), int(tree.tokens[b, i])] += 8
    tokens = tree.tokens.clone()
    tokens[torch.arange(N) >= tree.num_nodes[:, None]] = 2**40  # poison
    sampling = sampling_inputs(B, greedy, generator)
    return {
        "logits": logits.to(dtype),
        "tokens": tokens,
        "parents": tree.parents,
        "num_nodes": tree.num_nodes,
        **sampling,
    }


@op(
    shapes="logits: B N V float, tokens: B N int64, parents: B N int32, num_nodes: B int32, "
    "seeds: B int64, positions: B int64, temperature: B float32, top_k: B int32, "
    "top_p: B float32, min_p: B float32, bias: B V float32, kinds: B N int8, "
    "draft_probs: B N V float32, coins: B N K float32",
    fake=_fake,
    inputs=_inputs,
    cases=(
        {"B": 1, "N": 1, "V": 5},
        {"B": 5, "N": 7, "V": 1000},
        {"B": 3, "N": 70, "V": 513, "greedy": True},
        {"B": 3, "N": 70, "V": 513},
        {"B": 2, "N": 16, "V": 49152, "greedy": True},
    ),
)
def verify(
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
    kinds: Tensor | None = None,
    draft_probs: Tensor | None = None,
    coins: Tensor | None = None,
    *,
    rule: str = "walk",
    lossy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the path of the draft tree that the target would have written; draw the next token.

    Rule `walk`, for one-hot drafts: draw the target's token at each node as `sample` does, and
    follow it while it is a drafted child. Only rows on the walk are filtered and drawn. The token
    drawn at node i has position `positions[b] + depth(i) + 1`, so the emitted tokens equal those of
    plain sampling with the same seed.

    Args:
        logits: [B, N, V] float, any strides: the target's, row i given the path to node i.
        tokens: [B, N] int64, parents [B, N] int32, num_nodes [B] int32: the tree; padding is not
            read.
        seeds: [B] int64 and positions [B] int64, absolute position of the root; needed with
            `temperature`.
        temperature, top_k, top_p, min_p: [B], as in `sample`.
        bias: [B, V] float32, added to every row of its request.
        kinds: [B, N] int8 of `DraftKind`; None means all one-hot.
        draft_probs, coins: for rules that test sampled drafts.
        rule: one of `RULES`.
        lossy: must be True for a rule that changes the output law.

    Returns:
        path [B, N] int32: accepted nodes from the root (0) down, then PAD; num_accepted [B] int32:
        draft tokens kept, so `path[b, :num_accepted[b] + 1]` is valid; next_tokens [B] int64: the
        token after the path; status [B] int32: 0 ok; 1 a visited row had no finite logit, the walk
        stopped there and next_token is 0. An idle row (num_nodes 0) returns PAD, 0, PAD, 0.

    Raises:
        ValueError: an unknown or unwritten rule, a draft kind the rule cannot test, temperature
            without seeds.

    Source: 2305.09781, algorithm 2 (greedy); for one-hot trees the walk is optimal, as it accepts a
        node with the target's
    own probability of its path.
    """
    _check_rule(rule, kinds, draft_probs, coins, lossy)
    if temperature is not None and (seeds is None or positions is None):
        raise ValueError("verify: seeds and positions must be given with temperature, got None")
    batch, nodes, _ = logits.shape
    device = logits.device
    rows = torch.arange(batch, device=device)
    index = torch.arange(nodes, device=device)
    walking = num_nodes > 0
    node = torch.zeros(batch, dtype=torch.int64, device=device)
    path = torch.full((batch, nodes), PAD, dtype=torch.int32, device=device)
    num_accepted = torch.zeros(batch, dtype=torch.int32, device=device)
    next_tokens = torch.full((batch,), PAD, dtype=torch.int64, device=device)
    status = torch.full((batch,), OK, dtype=torch.int32, device=device)
    for depth in range(nodes):
        path[:, depth] = torch.where(walking, node.int(), PAD)
        scores = filtered_scores(logits[rows, node], temperature, top_k, top_p, min_p, bias)
        next_positions = None if positions is None else positions + depth + 1
        drawn, row_status = draw(scores, temperature, seeds, next_positions, Domain.TARGET)
        next_tokens = torch.where(walking, drawn, next_tokens)
        status = torch.where(walking, row_status, status)
        is_child = (parents == node[:, None]) & (tokens == drawn[:, None]) & (index > 0)
        is_child &= (index < num_nodes[:, None]) & (row_status == OK)[:, None]
        walking = walking & is_child.any(1)
        node = torch.where(walking, is_child.to(torch.int8).argmax(1), node)
        num_accepted = num_accepted + walking.int()
    return path, num_accepted, next_tokens, status


def _check_rule(
    rule: str, kinds: Tensor | None, draft_probs: Tensor | None, coins: Tensor | None, lossy: bool
) -> None:
    if rule not in RULES:
        raise ValueError(f"verify: rule must be one of {', '.join(RULES)}, got {rule!r}")
    if rule == "typical" and not lossy:
        raise ValueError("verify: rule 'typical' is lossy and must be asked for with lossy=True")
    if rule != "walk":
        raise ValueError(f"verify: rule {rule!r} is not written yet; available: walk")
    if draft_probs is not None or coins is not None:
        raise ValueError("verify: rule 'walk' takes neither draft_probs nor coins")
    if kinds is not None and kinds.device.type == "cpu" and bool(kinds.any()):
        raise ValueError(
            "verify: rule 'walk' tests one-hot drafts only, got sampled nodes in kinds"
        )
