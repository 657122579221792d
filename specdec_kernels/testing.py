"""Exact laws: what an acceptance rule emits, summed over every draft and every coin.

`verify(..., coins=, return_law=True)` tells with which probability each node is kept and from which
law the next token comes. Coins that force every branch, on a vocabulary of three or four tokens,
then give the law of the output itself: a kernel is proved lossless to rounding, without sampling.

    case = random_speculation(parents=(-1, 0, 0, 1), kinds=(0, 1, 1, 1), vocab=3, seed=0)
    error = (exact_law(case, rule="token", verify=mine) - target_law(case, verify=mine)).abs().max()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .ops.verify import verify as _verify
from .registry import BACKENDS
from .sampling import OK
from .tiny import (
    DraftTree,
    Prefix,
    Speculation,
    draft_trees,
    dyadic_law,
    random_speculation,
    verify_inputs,
)

__all__ = [
    "LAST_COIN",
    "Speculation",
    "accepted_law",
    "dyadic_law",
    "exact_law",
    "random_speculation",
    "target_law",
]

Verify: TypeAlias = Callable[..., Sequence[Tensor]]

LAST_COIN = 1.0 - 2.0**-53
"""The largest coin: of all thresholds, it is below 1 only."""


def exact_law(
    speculation: Speculation,
    *,
    rule: str,
    at_edges: bool = False,
    verify: Verify | None = None,
    backend: str | None = None,
) -> Tensor:
    """Joint law of the first tokens that a step of speculation emits, then the target continues.

    Args:
        speculation: the case.
        rule: one of `acceptance.RULES`.
        at_edges: also demand that each decision turns at the threshold that `verify` reports: what
            is kept is kept with the coin just below it, what is rejected with the coin equal to it.
        verify: a function with the arguments and results of `specdec_kernels.verify`, called with
            keywords; that one by default.
        backend: given to `verify` if not None; the tensors are on the device that it runs on.

    Returns:
        [V] * (depth of the tree + 1) float64, to be compared with `target_law`.

    Raises:
        ValueError: a case that cannot be drafted, see `tiny.draft_trees`, or a `verify` that
            reports a status other than 0.
    """
    call = _caller(speculation, rule, verify, backend)
    laws = _conditional_laws(speculation, call)
    emitted = [torch.zeros_like(law) for law in laws]
    for outcome in _outcomes(speculation, rule, laws, call, at_edges):
        emitted[len(outcome.accepted)][outcome.accepted] += outcome.probability * outcome.law
    joint = emitted[0]
    for law, ends_here in zip(laws[1:], emitted[1:], strict=True):
        joint = joint[..., None] * law + ends_here
    return joint


def target_law(
    speculation: Speculation,
    *,
    rule: str = "walk",
    verify: Verify | None = None,
    backend: str | None = None,
) -> Tensor:
    """Joint law of as many tokens when the target is sampled without any draft.

    The target's law at each prefix is what `verify` itself reports for a tree of the root alone.

    Args:
        speculation, rule, verify, backend: as in `exact_law`.

    Returns:
        [V] * (depth of the tree + 1) float64.
    """
    joint = torch.ones((), dtype=torch.float64)
    for law in _conditional_laws(speculation, _caller(speculation, rule, verify, backend)):
        joint = joint[..., None] * law
    return joint


def accepted_law(
    speculation: Speculation,
    *,
    rule: str,
    verify: Verify | None = None,
    backend: str | None = None,
) -> Tensor:
    """Probability of each number of accepted draft tokens.

    Args:
        speculation, rule, verify, backend: as in `exact_law`.

    Returns:
        [depth of the tree + 1] float64.
    """
    call = _caller(speculation, rule, verify, backend)
    laws = _conditional_laws(speculation, call)
    num_accepted = torch.zeros(len(laws), dtype=torch.float64)
    for outcome in _outcomes(speculation, rule, laws, call, at_edges=False):
        num_accepted[len(outcome.accepted)] += outcome.probability
    return num_accepted


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What is emitted under one draft and one way for the coins to fall."""

    probability: float
    accepted: Prefix
    law: Tensor


@dataclass(frozen=True, slots=True)
class _Answer:
    """One row of what `verify` returned."""

    path: list[int]
    next_token: int
    thresholds: list[float]
    law: Tensor


_Fork: TypeAlias = dict[float, float]
"""The ways on from a node: coin -> probability. The first is taken unless another is forced."""
_Branch: TypeAlias = tuple[int, frozenset[tuple[int, float]]]
"""A drafted tree, and the (node, coin) that are forced there."""


def _outcomes(
    case: Speculation, rule: str, laws: list[Tensor], call: Verify, at_edges: bool
) -> Iterator[_Outcome]:
    """Force the coin of one node more at a time: every branch is reached, and counted once."""
    trees = list(draft_trees(case))
    inputs = verify_inputs(case, trees)
    usual_coin = 0.0 if rule == "walk" else LAST_COIN
    branches: list[_Branch] = [(i, frozenset()) for i in range(len(trees))]
    seen = set(branches)
    while branches:
        coins = torch.full((len(branches), len(case.parents)), usual_coin, dtype=torch.float64)
        for b, (_, forced) in enumerate(branches):
            for node, coin in forced:
                coins[b, node] = coin
        rows = torch.tensor([i for i, _ in branches])
        answers = _answers(call, inputs, rows, coins)
        further: list[_Branch] = []
        reached: list[tuple[int, float]] = []
        for b, ((i, forced), answer) in enumerate(zip(branches, answers, strict=True)):
            forks = _walk_forks(answer, trees[i], laws) if rule == "walk" else _forks(answer)
            taken = dict(forced)
            if any(coin not in forks.get(node, {}) for node, coin in forced):
                continue  # a coin that decided nothing: another branch says the same
            chance = math.prod(f[taken.get(n, usual_coin)] for n, f in forks.items())
            reached.append((b, chance))
            for node in forks.keys() - taken.keys():
                ways = [(i, forced | {(node, coin)}) for coin in list(forks[node])[1:]]
                further += [way for way in ways if way not in seen]
                seen.update(ways)
        if at_edges and rule != "walk":
            answers = _answers(call, inputs, rows, _edge_coins(coins, answers))
        for b, chance in reached:
            tree, answer = trees[branches[b][0]], answers[b]
            law = _onehot(answer) if rule == "walk" else answer.law
            accepted = tuple(tree.tokens[node] for node in answer.path[1:])
            yield _Outcome(tree.probability * chance, accepted, law)
        branches = further


def _forks(answer: _Answer) -> dict[int, _Fork]:
    """A tested node is rejected, with the last coin, or kept, with the coin 0."""
    tested = {n: h for n, h in enumerate(answer.thresholds) if not math.isnan(h)}
    return {
        node: {LAST_COIN: 1.0 - h, 0.0: h} if h < 1.0 else {LAST_COIN: 1.0}
        for node, h in tested.items()
    }


def _walk_forks(answer: _Answer, tree: DraftTree, laws: list[Tensor]) -> dict[int, _Fork]:
    """At each node of a walk a coin in the middle of each token's share; 0 for the first."""
    forks = {}
    for node in answer.path:
        prefix = tree.prefixes[node]
        law = laws[len(prefix)][prefix]
        middles = (law.cumsum(0) - law / 2).tolist()
        ways = [(coin, p) for coin, p in zip(middles, law.tolist(), strict=True) if p > 0.0]
        forks[node] = dict([(0.0, ways[0][1]), *ways[1:]])
    return forks


def _edge_coins(coins: Tensor, answers: list[_Answer]) -> Tensor:
    """Coins that decide as these do, as near to the thresholds as can be."""
    thresholds = torch.tensor([answer.thresholds for answer in answers], dtype=torch.float64)
    below = torch.nextafter(thresholds, torch.zeros_like(thresholds))
    edges = torch.where(coins < thresholds, below, thresholds)
    return torch.where(thresholds.isnan(), coins, edges)


def _onehot(answer: _Answer) -> Tensor:
    return torch.zeros_like(answer.law).index_fill_(0, torch.tensor([answer.next_token]), 1.0)


def _answers(
    call: Verify, inputs: Mapping[str, Tensor], rows: Tensor, coins: Tensor
) -> list[_Answer]:
    chosen = {name: tensor[rows] for name, tensor in inputs.items()}
    path, num_accepted, next_tokens, status, _, _, thresholds, laws = call(**chosen, coins=coins)
    if bool((status != OK).any()):
        row = int(status.nonzero()[0])
        raise ValueError(
            f"exact_law: verify must report status 0, got {int(status[row])} "
            f"for the tokens {chosen['tokens'][row].tolist()}"
        )
    depths = num_accepted.tolist()
    paths = [nodes[: depth + 1] for nodes, depth in zip(path.tolist(), depths, strict=True)]
    columns = (paths, next_tokens.tolist(), thresholds.tolist(), laws)
    return [_Answer(*row) for row in zip(*columns, strict=True)]


def _conditional_laws(case: Speculation, call: Verify) -> list[Tensor]:
    """The target's law after each prefix: entry k is [V] * (k + 1) float64."""
    root = Speculation((-1,), (0,), case.target)
    vocab = len(case.logits(()))
    laws = []
    for length in range(case.depth + 1):
        trees = [DraftTree((0,), (p,), 1.0) for p in product(range(vocab), repeat=length)]
        coins = torch.zeros((len(trees), 1), dtype=torch.float64)
        answers = _answers(call, verify_inputs(root, trees), torch.arange(len(trees)), coins)
        laws.append(torch.stack([a.law for a in answers]).reshape([vocab] * (length + 1)))
    return laws


def _caller(case: Speculation, rule: str, verify: Verify | None, backend: str | None) -> Verify:
    """`verify` with the rule, and with the target's filters spread over the rows."""
    function: Verify = _verify if verify is None else verify
    options: dict[str, Any] = {"rule": rule, "lossy": rule == "typical", "return_law": True}
    if backend is not None:
        options["backend"] = backend
    device = BACKENDS.get(backend or "", "any").replace("any", "cpu")
    filters = {
        "temperature": (case.temperature, torch.float32),
        "top_k": (case.top_k or None, torch.int32),
        "top_p": (case.top_p if case.top_p < 1.0 else None, torch.float32),
        "min_p": (case.min_p or None, torch.float32),
        "bias": (case.bias, torch.float32),
        "mask": (case.mask, torch.bool),
    }
    one = {n: torch.as_tensor(v, dtype=d) for n, (v, d) in filters.items() if v is not None}

    def call(**arguments: Tensor) -> Sequence[Tensor]:
        rows = len(arguments["logits"])
        spread = {name: value.repeat(rows, *[1] * value.dim()) for name, value in one.items()}
        inputs = {name: value.to(device) for name, value in (arguments | spread).items()}
        return [answer.cpu() for answer in function(**inputs, **options)]

    return call
