"""Accept a path through a draft tree from the target's logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..acceptance import RULES, Request, RowError, decide
from ..philox import Domain, uniforms
from ..registry import op
from ..sampling import NO_FINITE_LOGIT, OK, draw, filtered_scores, keep_infinite
from ..shapes import PAD
from ..tree import DraftKind, random_trees
from .sample import sampling_inputs
from .verify_checks import Laws, check_arguments, check_drafts


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
    batch, nodes, vocab = logits.shape
    scored = (batch, nodes) if return_logprobs else (0, 0)
    return (
        logits.new_empty((batch, nodes), dtype=torch.int32),
        logits.new_empty(batch, dtype=torch.int32),
        logits.new_empty(batch, dtype=torch.int64),
        logits.new_empty(batch, dtype=torch.int32),
        logits.new_empty(scored, dtype=torch.float32),
        logits.new_empty(scored, dtype=torch.float32),
        logits.new_empty((batch, nodes) if return_law else (0, 0), dtype=torch.float64),
        logits.new_empty((batch, vocab) if return_law else (0, 0), dtype=torch.float64),
    )


def _inputs(
    B: int,
    N: int,
    V: int,
    greedy: bool = False,
    rule: str = "walk",
    chain: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    tree = random_trees(B, N, V, generator, chain=chain or rule == "block")
    logits = (torch.randn((N, B, V), generator=generator) * 2).transpose(0, 1)
    for b in range(B):  # lift drafted tokens, so that walks go deep
        for i in range(1, int(tree.num_nodes[b])):
            logits[b, int(tree.parents[b, i]), int(tree.tokens[b, i])] += 8
    tokens = tree.tokens.clone()
    tokens[torch.arange(N) >= tree.num_nodes[:, None]] = 2**40  # poison
    made = {
        "logits": logits.to(dtype),
        "tokens": tokens,
        "parents": tree.parents,
        "num_nodes": tree.num_nodes,
        **sampling_inputs(B, greedy, generator),
        "rule": rule,
    }
    if rule == "walk":
        return made
    made["lossy"] = rule == "typical"
    made["return_logprobs"] = True
    if rule != "typical":
        made |= _draft_inputs(tree.parents, tokens, rule, V, generator)
    return made


def _draft_inputs(
    parents: Tensor, tokens: Tensor, rule: str, vocab: int, generator: torch.Generator
) -> dict[str, Any]:
    """Kinds that the rule allows, and draft laws that like the drafted tokens."""
    batch, nodes = parents.shape
    kinds = torch.zeros((batch, nodes), dtype=torch.int8)
    laws = torch.randn((batch, nodes, vocab), generator=generator)
    for b in range(batch):
        sampled = int(torch.randint(1, 3, (), generator=generator))
        firsts: set[int] = set()
        for i in range(1, nodes):
            parent = int(parents[b, i])
            if parent == PAD:
                continue
            if rule != "gd_traversal" or parent not in firsts:
                kinds[b, i] = sampled
                laws[b, parent, int(tokens[b, i])] += 6
            firsts.add(parent)
    rows = torch.arange(nodes, dtype=torch.int32).repeat(batch, 1)
    is_padding = parents == PAD
    is_padding[:, 0] = False
    kinds[is_padding], rows[is_padding], laws[is_padding] = 99, -9, torch.nan  # poison
    return {"kinds": kinds, "draft_rows": rows, "draft_probs": laws.softmax(-1)}


@op(
    shapes="logits: B N V float, tokens: B N int64, parents: B N int32, num_nodes: B int32, "
    "seeds: B int64, positions: B int64, temperature: B float32, top_k: B int32, "
    "top_p: B float32, min_p: B float32, bias: B V float32, mask: B V bool, kinds: B N int8, "
    "draft_rows: B N int32, draft_probs: B Q U float32, draft_logits: B Q U float32, "
    "draft_offsets: U int64, coins: B N float64",
    fake=_fake,
    inputs=_inputs,
    cases=(
        {"B": 1, "N": 1, "V": 5},
        {"B": 5, "N": 7, "V": 1000},
        {"B": 3, "N": 70, "V": 513, "greedy": True},
        {"B": 3, "N": 70, "V": 513},
        {"B": 2, "N": 16, "V": 49152, "greedy": True},
        *({"B": 5, "N": 9, "V": 301, "rule": rule} for rule in RULES[1:]),
    ),
    tolerance={torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5},
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
    """Keep a path of the draft tree and draw the next token, so that the output is the target's.

    Rules, all lossless but the last; they differ in how much of a sampled draft they keep:

    - `walk`: for one-hot drafts. Draw the target's token at each node as `sample` does, and follow
      it while it is a drafted child. The token drawn at node i has position
      `positions[b] + depth(i) + 1`, so the emitted tokens equal those of plain sampling with the
      same seed.
    - `token`: top-down; at each node its children are tested in node order against what is left of
      the target law. On a chain, speculative sampling; on a tree, multi-draft rejection.
    - `block`: on chains; tests from the last node back. Never keeps fewer tokens than `token`.
    - `traversal`: the same on trees, from the first leaf in depth-first order.
    - `gd_traversal`: `traversal` where a node's children are at most one sampled token, which comes
      first, and deterministic ones, best left out of the law that it was sampled from.
    - `typical`: lossy. Keep x if p(x) > min(epsilon, delta exp(-entropy(p))); deepest path.

    A request whose temperature is 0 follows the argmax under every rule. Only rows that a rule
    visits are filtered: those on the walk for `walk` and `token`, also those of rejected nodes for
    the others.

    Args:
        logits: [B, N, V] float, any strides: the target's, row i given the path to node i. Slice
            off a padded vocabulary: `logits[..., :V]`.
        tokens: [B, N] int64, parents [B, N] int32, num_nodes [B] int32: the tree; padding is not
            read. A token outside [0, V) is never accepted.
        seeds: [B] int64 and positions [B] int64, absolute position of the root; needed with
            `temperature`, unless `coins` are given.
        temperature, top_k, top_p, min_p: [B], as in `sample`.
        bias: [B, V] float32, added to every row of its request. mask: [B, V] bool, False forbids a
            token.
        kinds: [B, N] int8 of `DraftKind`; None means all one-hot.
        draft_rows: [B, N] int32, node -> row of the draft law that its sampled children were drawn
            from; other nodes are not read.
        draft_probs: [B, Q, U] float32, those laws after the drafter's own temperature and filters;
            each sums to 1. Or draft_logits: [B, Q, U] float32, of which the law is the softmax.
        draft_offsets: [U] int64, for a draft vocabulary other than the target's: draft id u is
            target id `u + draft_offsets[u]` (EAGLE-3's `d2t`).
        coins: [B, N] float64 in [0, 1), instead of seeds: coin i tests node i, that of the root
            draws the next token by inversion. `walk` draws the token at node i by coin i.
        rule: one of `acceptance.RULES`.
        lossy: must be True for a rule that changes the output law.
        typical_epsilon, typical_delta: probabilities of rule `typical`.
        return_logprobs: also score the emitted tokens.
        return_law: also return what the coins were compared with (for proofs).

    Returns:
        path [B, N] int32: accepted nodes from the root (0) down, then PAD; num_accepted [B] int32:
        draft tokens kept, so `path[b, :num_accepted[b] + 1]` is valid; next_tokens [B] int64: the
        token after the path; status [B] int32: 0 ok; 1 a visited row has no finite logit; 2 a
        draft token has no mass in the law it is said to be drawn from. With status 1 or 2 the next
        token is 0, and the path ends where the trouble was met (at the root in bottom-up rules).
        An idle row (num_nodes 0) returns PAD, 0, PAD, 0.
        With `return_logprobs`, else [0, 0]: logprobs [B, N] float32, of the token emitted after
        each path node under the filtered target law (at temperature 0: of the softmax); margins
        [B, N] float32, distance of the two largest biased logits there; NaN beyond the path.
        With `return_law`, else [0, 0]: thresholds [B, N] float64, the acceptance probability that
        each tested node's coin was below or not, NaN where none was; next_law [B, V] float64, the
        law of the next token.

    Raises:
        ValueError: an unknown rule, a draft kind or tree that the rule cannot test, a sampled node
            without draft law, temperature without seeds or coins.

    Coins come from (seed, position of the root, node, domain ACCEPT) and (seed, position of the
    next token, 0, domain RESIDUAL or TARGET). A coin is below its threshold strictly. Logits are
    read as in `sample`; NaN, infinite or negative draft probabilities count as 0. Where rounding
    leaves no residual, the next token is drawn from the target law without the tokens tried.

    Source: see `specdec_kernels.acceptance`. For one-hot trees the walk is optimal: it keeps a node
        with the target's own probability of its path.
    """
    laws = (draft_rows, draft_probs, draft_logits, draft_offsets)
    batch, nodes, vocab = logits.shape
    check_arguments(
        rule, lossy, draft_rows, draft_probs, draft_logits, temperature, seeds, positions, coins
    )
    check_drafts(rule, parents, num_nodes, kinds, laws, vocab)
    filters = (temperature, top_k, top_p, min_p, bias, mask)
    path, num_accepted, next_tokens, status = _walk(
        logits, tokens, parents, num_nodes, seeds, positions, filters, coins
    )
    thresholds = torch.full((batch, nodes), torch.nan, dtype=torch.float64, device=logits.device)
    next_law = torch.zeros((batch, vocab), dtype=torch.float64, device=logits.device)
    target = partial(_target_law, logits, filters)
    keys = None if seeds is None or positions is None else (seeds, positions)
    for b, size in enumerate(num_nodes.clamp(0, nodes).tolist()):
        is_greedy = temperature is None or not float(temperature[b]) > 0
        if size == 0 or rule == "walk" or is_greedy:
            if return_law and int(status[b]) == OK and size > 0:
                next_law[b] = _walked_law(target, b, path, num_accepted, next_tokens, is_greedy)
            continue
        request = _request(b, tokens, parents, size, kinds, laws, keys, coins, target, vocab)
        decision = decide(rule, request, epsilon=typical_epsilon, delta=typical_delta)
        path[b] = PAD
        path[b, : len(decision.path)] = torch.tensor(decision.path, dtype=torch.int32)
        num_accepted[b] = len(decision.path) - 1
        next_tokens[b] = decision.next_token
        status[b] = decision.status
        for node, threshold in decision.thresholds.items():
            thresholds[b, node] = threshold
        if decision.law is not None:
            next_law[b] = decision.law
    logprobs, margins = (logits.new_empty((0, 0), dtype=torch.float32) for _ in range(2))
    if return_logprobs:
        logprobs, margins = _score(logits, tokens, path, num_accepted, next_tokens, filters)
    if not return_law:
        thresholds, next_law = (logits.new_empty((0, 0), dtype=torch.float64) for _ in range(2))
    return path, num_accepted, next_tokens, status, logprobs, margins, thresholds, next_law


Filters = tuple[Tensor | None, ...]
"""temperature, top_k, top_p, min_p, bias, mask"""


def _walk(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    seeds: Tensor | None,
    positions: Tensor | None,
    filters: Filters,
    coins: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rule `walk` for every row; for greedy rows it is every rule."""
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
        scores = filtered_scores(logits[rows, node], *filters)
        next_positions = None if positions is None else positions + depth + 1
        coin = None if coins is None else coins[rows, node]
        drawn, row_status = draw(
            scores, filters[0], seeds, next_positions, Domain.TARGET, coins=coin
        )
        drawn = drawn[:, 0]
        next_tokens = torch.where(walking, drawn, next_tokens)
        status = torch.where(walking, row_status, status)
        is_child = (parents == node[:, None]) & (tokens == drawn[:, None]) & (index > node[:, None])
        is_child &= (index < num_nodes[:, None]) & (row_status == OK)[:, None]
        walking = walking & is_child.any(1)
        node = torch.where(walking, is_child.to(torch.int8).argmax(1), node)
        num_accepted = num_accepted + walking.int()
        if not bool(walking.any()):
            break
    return path, num_accepted, next_tokens, status


def _target_law(logits: Tensor, filters: Filters, b: int, node: int) -> Tensor:
    """[V] float64 target law at a node of request b."""
    one = slice(b, b + 1)
    scores = filtered_scores(logits[one, node], *(None if f is None else f[one] for f in filters))
    if float(scores.max()) == -torch.inf:
        raise RowError(NO_FINITE_LOGIT)
    return scores[0].double().softmax(-1)


def _walked_law(
    target: Callable[[int, int], Tensor],
    b: int,
    path: Tensor,
    num_accepted: Tensor,
    next_tokens: Tensor,
    is_greedy: bool,
) -> Tensor:
    law = target(b, int(path[b, num_accepted[b]]))
    if not is_greedy:
        return law
    return torch.zeros_like(law).index_fill_(0, next_tokens[b : b + 1], 1.0)


def _request(
    b: int,
    tokens: Tensor,
    parents: Tensor,
    size: int,
    kinds: Tensor | None,
    laws: Laws,
    keys: tuple[Tensor, Tensor] | None,
    coins: Tensor | None,
    target: Callable[[int, int], Tensor],
    vocab: int,
) -> Request:
    """Request b as the rules see it; `keys` are (seeds, positions)."""

    def keyed(offset: int, num: int, domain: Domain) -> list[float]:
        assert keys is not None  # `verify` has checked
        seed, position = (key[b : b + 1] for key in keys)
        drawn: list[float] = uniforms(seed, position + offset, num, domain)[0].tolist()
        return drawn

    def draw_coin(depth: int, is_residual: bool) -> float:
        domain = Domain.RESIDUAL if is_residual else Domain.TARGET
        return keyed(depth + 1, 1, domain)[0] if coins is None else float(coins[b, 0])

    return Request(
        tokens=tokens[b, :size].tolist(),
        children=_children(parents[b, :size].tolist()),
        kinds=[int(DraftKind.ONEHOT)] * size if kinds is None else kinds[b, :size].tolist(),
        target=partial(target, b),
        draft=partial(_draft_law, laws, vocab, b),
        coins=keyed(0, size, Domain.ACCEPT) if coins is None else coins[b].tolist(),
        draw_coin=draw_coin,
    )


def _children(parents: list[int]) -> list[list[int]]:
    children: list[list[int]] = [[] for _ in parents]
    for i, parent in enumerate(parents):
        if 0 <= parent < i:
            children[parent].append(i)
    return children


def _draft_law(laws: Laws, vocab: int, b: int, node: int) -> Tensor:
    """[V] float64 law over target ids from which a node's sampled children were drawn."""
    draft_rows, probs, logits, offsets = laws
    assert draft_rows is not None  # `verify` has checked
    row = int(draft_rows[b, node])
    if probs is not None:
        law = probs[b, row].double().nan_to_num(0.0, 0.0).clamp_min(0.0)
    else:
        assert logits is not None
        scores = logits[b, row][None].double().nan_to_num(-torch.inf, torch.inf, -torch.inf)
        law = keep_infinite(scores).softmax(-1)[0].nan_to_num(0.0)
    ids = torch.arange(len(law), device=law.device)
    spread = law.new_zeros(vocab)
    spread[ids if offsets is None else ids + offsets] = law
    return spread


def _score(
    logits: Tensor,
    tokens: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    next_tokens: Tensor,
    filters: Filters,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the emitted tokens, and top-2 margins where they were drawn."""
    batch, nodes, vocab = logits.shape
    rows = torch.arange(batch, device=logits.device)
    logprobs = torch.full((batch, nodes), torch.nan, dtype=torch.float64, device=logits.device)
    margins = logprobs.clone()
    for depth in range(nodes):
        node = path[:, depth].long()
        is_emitted = node != PAD
        if not bool(is_emitted.any()):
            break
        row = logits[rows, node.clamp_min(0)]
        following = path[:, min(depth + 1, nodes - 1)].long().clamp_min(0)
        token = torch.where(depth < num_accepted, tokens[rows, following], next_tokens)
        scores = filtered_scores(row, *filters).double().log_softmax(-1)
        logprob = scores.gather(1, token.clamp(0, vocab - 1)[:, None])[:, 0]
        logprobs[:, depth] = torch.where(is_emitted, logprob, torch.nan)
        biased = filtered_scores(row, None, None, None, None, *filters[4:]).double()
        best = torch.nn.functional.pad(biased, (0, 1), value=-torch.inf).topk(2).values
        margins[:, depth] = torch.where(is_emitted, best[:, 0] - best[:, 1], torch.nan)
    return logprobs.float(), margins.float()
