"""The acceptance rules that test drafts with coins, defined once: one request, in float64 PyTorch.

Every rule is made of one step. A node holds what is left of its target law, `p`, and its `reach`
`a`: the probability with which the rule, having come this far, would keep the node. A child with
token x, drawn from the law q, is kept with probability `min(1, a p(x) / q(x))`. If it is not, the
node goes on with

    r = max(0, a p - q),  S = sum r,  p <- r / S,  a <- S / (S + 1 - a).

A deterministic child is one whose law q is 1 at its token. Siblings drawn without replacement take
their token out of q for those after them. Top-down with a = 1 at every node this is rejection
sampling; bottom-up it is block verification on a chain and traversal verification on a tree.

Sources: Leviathan et al., 2211.17192, algorithm 1; Chen et al., 2302.01318; SpecInfer, 2305.09781
(several drafts); block verification, 2403.10444, algorithm 2; traversal verification, 2505.12398;
greedy drafts, 2502.18779, section 4; typical acceptance, Medusa, 2401.10774, section 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sampling import NO_SUCH_DRAW, OK
from .tree import DraftKind

RULES = ("walk", "token", "block", "traversal", "gd_traversal", "typical")
"""Acceptance rules; all but `typical` are lossless."""


class RowError(Exception):
    """A request that cannot be decided; `status` says why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as the rules see it.

    Attributes:
        tokens: token of each node; node 0 is the root.
        children: the children of each node, in node order.
        kinds: `DraftKind` of each node.
        target: node -> its target law [V] float64; raises `RowError` where there is none.
        draft: node -> the law [V] float64 from which its sampled children were drawn.
        coins: of each node, in [0, 1); that of the root draws the next token.
        draw_coin: depth of the node drawn from, whether children were rejected there -> the coin.
    """

    tokens: Sequence[int]
    children: Sequence[Sequence[int]]
    kinds: Sequence[int]
    target: Callable[[int], Tensor]
    draft: Callable[[int], Tensor]
    coins: Sequence[float]
    draw_coin: Callable[[int, bool], float]


@dataclass(slots=True)
class Decision:
    """What a rule decided for one request.

    Attributes:
        path: accepted nodes, from the root down.
        next_token: the token after the path.
        status: as in `ops.verify`.
        thresholds: node -> the acceptance probability that its coin was compared with.
        law: [V] float64 that the next token was drawn from.
    """

    path: list[int]
    next_token: int = 0
    status: int = OK
    thresholds: dict[int, float] = field(default_factory=dict)
    law: Tensor | None = None


class _Node:
    """A node whose children are tested one after another."""

    def __init__(self, request: Request, node: int, reach: float = 1.0) -> None:
        self.node = node
        self.reach = reach
        self.p = request.target(node)
        self.remaining = list(request.children[node])
        self.is_touched = False
        self._request = request
        self._recorded: Tensor | None = None
        self._q: Tensor | None = None  # without what was drawn without replacement
        self._tried: list[int] = []

    def weigh(self, child: int) -> tuple[float, float]:
        """(a p(x), q(x)) of a child: it is kept with probability min(1, a p(x) / q(x))."""
        token = self._request.tokens[child]
        is_token = 0 <= token < len(self.p)
        kept = self.reach * float(self.p[token]) if is_token else 0.0
        if self._request.kinds[child] == DraftKind.ONEHOT:
            return kept, 1.0
        drawn = float(self._draft_law(self._request.kinds[child])[token]) if is_token else 0.0
        if not drawn > 0.0:
            raise RowError(NO_SUCH_DRAW)
        return kept, drawn

    def reject(self, child: int) -> None:
        """Take out of the target law what this child would have covered."""
        token, kind = self._request.tokens[child], self._request.kinds[child]
        self.is_touched = True
        self.remaining.remove(child)
        if not 0 <= token < len(self.p):
            return  # a deterministic guess outside the vocabulary covers nothing
        if kind == DraftKind.ONEHOT:
            proposal = torch.zeros_like(self.p)
            proposal[token] = 1.0
        else:
            proposal = self._draft_law(kind)
        self._tried.append(token)
        rest = (self.reach * self.p - proposal).clamp_min(0.0)
        rest[token] = 0.0
        mass = float(rest.sum())
        denominator = mass + 1.0 - self.reach
        self.reach = mass / denominator if denominator > 0.0 else 1.0
        self.p = rest / mass if mass > 0.0 else self._fallback()
        if kind == DraftKind.SAMPLED_WITHOUT_REPLACEMENT:
            left = proposal.clone()
            left[token] = 0.0
            self._q = left / left.sum().clamp_min(torch.finfo(torch.float64).tiny)

    def _draft_law(self, kind: int = DraftKind.SAMPLED_WITHOUT_REPLACEMENT) -> Tensor:
        """The law of the next sampled child of that kind."""
        if self._recorded is None or self._q is None:
            self._recorded = self._q = self._request.draft(self.node)
        return self._recorded if kind == DraftKind.SAMPLED else self._q

    def _fallback(self) -> Tensor:
        """Where rounding left nothing: the target law without the tokens tried, else all of it."""
        law = self._request.target(self.node)
        rest = law.clone()
        rest[self._tried] = 0.0
        return rest / rest.sum() if float(rest.sum()) > 0.0 else law


def decide(rule: str, request: Request, *, epsilon: float, delta: float) -> Decision:
    """Apply a rule other than `walk` to one sampled request.

    Args:
        rule: one of `RULES`.
        request: its tree, laws and coins.
        epsilon, delta: of `typical`: accept x if p(x) > min(epsilon, delta exp(-H(p))).
    """
    decision = Decision(path=[0])
    try:
        if rule == "token":
            last = _top_down(request, decision)
        elif rule == "typical":
            last = _typical(request, decision, epsilon, delta)
        else:
            last = _bottom_up(request, decision)
    except RowError as error:
        decision.status = error.status
        return decision
    decision.law = last.p
    coin = request.draw_coin(len(decision.path) - 1, last.is_touched)
    decision.next_token = draw_by_coin(last.p, coin)
    return decision


def draw_by_coin(law: Tensor, coin: float) -> int:
    """The lowest token at which the cumulative mass exceeds `coin` times the whole."""
    cumulative = law.cumsum(0)
    beyond = cumulative > coin * cumulative[-1]
    if not bool(beyond.any()):  # a coin so near 1 that the product rounds up
        return int(law.nonzero()[-1])
    return int(beyond.to(torch.int8).argmax())


def _top_down(request: Request, decision: Decision) -> _Node:
    node = _Node(request, 0)
    while node.remaining:
        child = node.remaining[0]
        kept, drawn = node.weigh(child)
        decision.thresholds[child] = min(1.0, kept / drawn)
        if request.coins[child] < decision.thresholds[child]:
            decision.path.append(child)
            node = _Node(request, child)
        else:
            node.reject(child)
    return node


def _bottom_up(request: Request, decision: Decision) -> _Node:
    """The leaf that comes first in depth-first order is tested; rejected, it leaves the tree."""
    stack = [_Node(request, 0)]
    while True:
        node = stack[-1]
        if node.remaining:
            child = node.remaining[0]
            kept, drawn = node.weigh(child)
            if kept > 0.0:
                stack.append(_Node(request, child, min(1.0, kept / drawn)))
            else:  # nothing below can be kept
                decision.thresholds[child] = 0.0
                node.reject(child)
            continue
        if len(stack) == 1:
            return node
        decision.thresholds[node.node] = node.reach
        if request.coins[node.node] < node.reach:
            decision.path = [above.node for above in stack]
            return node
        stack.pop()
        stack[-1].reject(node.node)


def _typical(request: Request, decision: Decision, epsilon: float, delta: float) -> _Node:
    """The deepest node all of whose path is typical; among equals the likeliest path."""
    logprobs = {0: 0.0}  # of the path to each typical node
    paths = {0: [0]}
    best = 0
    for node, children in enumerate(request.children):
        if node not in paths or not children:
            continue
        decision.path = paths[node]
        law = request.target(node)
        entropy = -float(torch.special.xlogy(law, law).sum())
        floor = min(epsilon, delta * math.exp(-entropy))
        for child in children:
            token = request.tokens[child]
            chance = float(law[token]) if 0 <= token < len(law) else 0.0
            if not chance > floor:
                continue
            paths[child] = [*paths[node], child]
            logprobs[child] = logprobs[node] + math.log(chance)
            if (len(paths[child]), logprobs[child]) > (len(paths[best]), logprobs[best]):
                best = child
    decision.path = paths[best]
    return _Node(request, best)
