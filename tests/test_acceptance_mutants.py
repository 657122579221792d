"""Known mistakes of acceptance rules, planted one at a time: the law comparison must see each.

Most are mistakes of published code. Each is applied to a random table on which it shows well.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec_kernels.ops.verify  # noqa: F401 - the module behind the operator of that name
from specdec_kernels import acceptance, verify
from specdec_kernels.acceptance import Decision, Request
from specdec_kernels.philox import Domain, uniforms
from specdec_kernels.testing import (
    Speculation,
    accepted_law,
    dyadic_law,
    exact_law,
    random_speculation,
    target_law,
)
from specdec_kernels.tree import DraftKind

Patch = pytest.MonkeyPatch
SAMPLED, WITHOUT = int(DraftKind.SAMPLED), int(DraftKind.SAMPLED_WITHOUT_REPLACEMENT)


def _change_request(patch: Patch, change: Callable[[Request], Request]) -> None:
    def mutant(rule: str, request: Request, **options: Any) -> Decision:
        return acceptance.decide(rule, change(request), **options)

    patch.setattr(sys.modules["specdec_kernels.ops.verify"], "decide", mutant)


def _change_rejection(
    patch: Patch, change: Callable[[Any, int, float, Tensor, Tensor], None]
) -> None:
    """`change(node, token, reach, p, q)` after a rejection, with the state before it."""

    def mutant(node: Any, child: int) -> None:
        before = node.reach, node.p, node._draft_law()
        reject(node, child)
        change(node, node._request.tokens[child], *before)

    reject = acceptance._Node.reject
    patch.setattr(acceptance._Node, "reject", mutant)


def _no_renormalisation(patch: Patch) -> None:
    def change(node: Any, token: int, reach: float, p: Tensor, q: Tensor) -> None:
        node._q = q.index_fill(0, torch.tensor([token]), 0.0)

    _change_rejection(patch, change)


def _wrong_reach(patch: Patch) -> None:
    """a <- S / (1 - q(x)) instead of S / (S + 1 - a)."""

    def change(node: Any, token: int, reach: float, p: Tensor, q: Tensor) -> None:
        mass = float((reach * p - q).clamp_min(0).sum())
        node.reach = min(1.0, mass / (1.0 - float(q[token]))) if q[token] < 1 else 1.0

    _change_rejection(patch, change)


def _reversed_siblings(patch: Patch) -> None:
    _change_request(patch, lambda r: replace(r, children=[c[::-1] for c in r.children]))


def _unlikely_drafts_dropped(patch: Patch) -> None:
    """Whether a sampled token is tested depends on the token itself."""

    def change(request: Request) -> Request:
        kept = [
            [c for c in children if request.draft(node)[request.tokens[c]] >= 0.3]
            for node, children in enumerate(request.children)
        ]
        return replace(request, children=kept)

    _change_request(patch, change)


def _zero_coins_below_zero(patch: Patch) -> None:
    """`coin <= threshold`, as far as it goes wrong: a coin of 0 keeps what has no probability."""
    _change_request(patch, lambda r: replace(r, coins=[c or -1e-300 for c in r.coins]))


def _reused_coin(patch: Patch) -> None:
    """The next token is drawn with the coin of the last test, uniform below or above its
    threshold.
    """

    def mutant(rule: str, request: Request, **options: Any) -> Decision:
        decision = acceptance.decide(rule, request, **options)
        if decision.law is not None and decision.thresholds:
            node, threshold = list(decision.thresholds.items())[-1]
            low, high = (0.0, threshold) if node in decision.path else (threshold, 1.0)
            ends = decision.law.cumsum(0).clamp(low, high)
            share = ends.diff(prepend=torch.tensor([low], dtype=ends.dtype))
            decision.law = share / share.sum()
        return decision

    patch.setattr(sys.modules["specdec_kernels.ops.verify"], "decide", mutant)


def _block(
    patch: Patch,
    is_shared: bool = False,
    is_uncapped: bool = False,
    has_token_residual: bool = False,
) -> None:
    """Block verification once more, as in its paper: all thresholds first, then the last that
    holds. With one coin for all of them, a threshold counts beyond those tested before it.
    """

    def bottom_up(request: Request, decision: Decision) -> SimpleNamespace:
        last = len(request.tokens) - 1
        p = [request.target(i) for i in range(last + 1)]
        q = [request.draft(i) for i in range(last)]
        ratios = [float(p[i][x] / q[i][x]) for i, x in enumerate(request.tokens[1:])]
        reach = [1.0]
        for ratio in ratios:
            reach.append(min(1.0, reach[-1] * ratio))
        keep = list(reach)
        for i in range(1, last):
            mass = float((reach[i] * p[i] - q[i]).clamp_min(0).sum())
            keep[i] = mass / (mass + 1 - reach[i]) if mass + 1 - reach[i] > 0 else 1.0
        if is_uncapped:
            keep[last] = min(1.0, math.prod(ratios))
        used = 0.0
        for i in range(last, 0, -1):
            chance = keep[i]
            if is_shared:
                chance = max(0.0, keep[i] - used) / (1 - used) if used < 1 else 0.0
                used = max(used, keep[i])
            decision.thresholds[i] = chance
            if request.coins[i] < chance:
                break
        else:
            i = 0
        decision.path = list(range(i + 1))
        if i == last:
            return SimpleNamespace(p=p[i], is_touched=False)
        rest = ((1.0 if has_token_residual else reach[i]) * p[i] - q[i]).clamp_min(0)
        return SimpleNamespace(p=rest / rest.sum() if rest.sum() > 0 else p[i], is_touched=True)

    patch.setattr(acceptance, "_bottom_up", bottom_up)


def _likely_guesses_tested_as_drawn(case: Speculation) -> Callable[..., Any]:
    """Deterministic children against the draft's softmax, as if they had been drawn from it."""

    def mutant(**arguments: Any) -> Any:
        rows, nodes = arguments["tokens"].shape
        return verify(
            **arguments,
            kinds=torch.full((rows, nodes), SAMPLED, dtype=torch.int8),
            draft_rows=torch.zeros((rows, nodes), dtype=torch.int32),
            draft_probs=case.draft_law(()).expand(rows, 1, -1),
        )

    return mutant


def _raw_draft_law(case: Speculation) -> Callable[..., Any]:
    """Drafts drawn at temperature 1 and tested against the law at temperature 2."""

    def mutant(**arguments: Any) -> Any:
        if "draft_probs" in arguments:
            warmer = arguments["draft_probs"].sqrt()
            arguments["draft_probs"] = warmer / warmer.sum(-1, keepdim=True)
        return verify(**arguments)

    return mutant


def _one_coin_for_the_walk(case: Speculation) -> Callable[..., Any]:
    def mutant(**arguments: Any) -> Any:
        arguments["coins"] = arguments["coins"][:, :1].expand_as(arguments["coins"])
        return verify(**arguments)

    return mutant


ONE, PAIR, TRIPLE, TWO = (-1, 0), (-1, 0, 0), (-1, 0, 0, 0), (-1, 0, 1)
MUTANTS: dict[str, tuple[Any, str, tuple[int, ...], int, int, bool, float]] = {
    "no renormalisation": (_no_renormalisation, "token", PAIR, WITHOUT, 5, True, 0.39),
    "no renormalisation, bottom-up": (
        _no_renormalisation, "traversal", PAIR, WITHOUT, 5, True, 0.39
    ),
    "softmax q for guesses": (
        _likely_guesses_tested_as_drawn, "token", ONE, 0, 21, False, 0.79
    ),
    "one coin for the walk": (_one_coin_for_the_walk, "walk", ONE, 0, 0, False, 0.1),
    "one coin for the block": (partial(_block, is_shared=True), "block", TWO, 1, 7, True, 0.096),
    "token residual in block": (
        partial(_block, has_token_residual=True), "block", TWO, 1, 7, False, 0.029
    ),
    "uncapped last position": (partial(_block, is_uncapped=True), "block", TWO, 1, 6, True, 0.072),
    "a = S / (1 - q)": (_wrong_reach, "traversal", TWO, 1, 7, True, 0.48),
    "unlikely drafts dropped": (_unlikely_drafts_dropped, "token", ONE, 1, 14, True, 0.17),
    "siblings in reverse": (_reversed_siblings, "token", TRIPLE, WITHOUT, 3, False, 0.78),
    "siblings in reverse, bottom-up": (
        _reversed_siblings, "traversal", TRIPLE, WITHOUT, 3, False, 0.78
    ),
    "raw q": (_raw_draft_law, "token", ONE, 1, 21, False, 0.11),
    "reused coin": (_reused_coin, "token", ONE, 1, 5, True, 0.15),
    "reused coin, bottom-up": (_reused_coin, "block", TWO, 1, 5, True, 0.10),
}  # fmt: skip
"""Name -> mutant, rule, tree, kind, seed and zeros of its table, least error."""
WRAPPERS = (_likely_guesses_tested_as_drawn, _raw_draft_law, _one_coin_for_the_walk)


def _error(case: Speculation, rule: str, **options: Any) -> float:
    want = target_law(case, backend="reference")
    return float((exact_law(case, rule=rule, backend="reference", **options) - want).abs().max())


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught_by_the_law(name: str, monkeypatch: Patch) -> None:
    mutant, rule, parents, kind, seed, has_zeros, known = MUTANTS[name]
    kinds = (0, *[kind] * (len(parents) - 1))
    case = random_speculation(parents, kinds, 3, seed, has_zeros=has_zeros)
    assert _error(case, rule) < 1e-12
    if mutant in WRAPPERS:
        error = _error(case, rule, verify=mutant(case))
    else:
        mutant(monkeypatch)
        error = _error(case, rule)
    assert error > known


def test_the_block_verification_of_the_paper_is_ours(monkeypatch: Patch) -> None:
    """Without its mistakes the mutant above is right: an independent copy of rule `block`."""
    cases = [random_speculation((-1, 0, 1, 2), (0, 1, 1, 1), 3, seed) for seed in range(3)]
    ours = [accepted_law(case, rule="block", backend="reference") for case in cases]
    _block(monkeypatch)
    for case, want in zip(cases, ours, strict=True):
        assert _error(case, "block", at_edges=True) < 1e-12
        got = accepted_law(case, rule="block", backend="reference")
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_a_coin_of_zero_that_keeps_the_impossible_is_caught(monkeypatch: Patch) -> None:
    """p = (1/2, 1/2, 0, 0) and q uniform: half of the drafts have no probability."""
    logits, law = torch.tensor([0.0, 0.0, -math.inf, -math.inf]), dyadic_law([1.0] * 4)
    case = Speculation(ONE, (0, 1), lambda _: logits, lambda _: law)
    assert _error(case, "token", at_edges=True) < 1e-12
    _zero_coins_below_zero(monkeypatch)
    assert _error(case, "token", at_edges=True) > 0.12


P, Q = [0.5, 0.25, 0.125, 0.125], [0.125, 0.25, 0.125, 0.5]
"""Target and draft at every prefix, in the simulations from seeds."""
BACKENDS = [pytest.param("reference", 1200, id="reference"), pytest.param("cpu", 50_000, id="cpu")]
"""And how many requests each simulates."""


def _simulate(
    rule: str, parents: tuple[int, ...], num: int, backend: str, domain: Domain = Domain.DRAFT
) -> tuple[Tensor, Tensor]:
    """[num, N + 1] tokens emitted, continued by the target, and how many of them were drafted."""
    nodes = len(parents)
    seeds, positions = torch.arange(num), torch.full((num,), 100)
    coins = uniforms(seeds, positions, nodes, domain)
    tokens = torch.searchsorted(torch.tensor(Q).double().cumsum(0), coins, right=True)
    path, num_accepted, next_tokens, *_ = verify(
        torch.tensor(P).log().expand(num, nodes, 4),
        tokens,
        torch.tensor(parents, dtype=torch.int32).repeat(num, 1),
        torch.full((num,), nodes, dtype=torch.int32),
        seeds, positions, torch.ones(num),
        kinds=torch.ones((num, nodes), dtype=torch.int8),
        draft_rows=torch.zeros((num, nodes), dtype=torch.int32),
        draft_probs=torch.tensor(Q).expand(num, 1, 4),
        rule=rule, backend=backend,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    more = torch.multinomial(torch.tensor(P), num * nodes, True, generator=generator)
    accepted = tokens.gather(1, path[:, 1:].long().clamp_min(0))
    emitted = torch.where(path[:, 1:] >= 0, accepted, more.view(num, nodes)[:, 1:])
    emitted = torch.cat([emitted, more.view(num, nodes)[:, :1]], 1)
    return emitted.scatter(1, num_accepted[:, None].long(), next_tokens[:, None]), num_accepted


@pytest.mark.parametrize(("backend", "num"), BACKENDS)
def test_the_number_of_tokens_follows_the_formula_of_leviathan(backend: str, num: int) -> None:
    """(1 - alpha^(gamma + 1)) / (1 - alpha), with alpha the mass that p and q share."""
    alpha = sum(map(min, P, Q))
    _, num_accepted = _simulate("token", (-1, 0, 1, 2, 3), num, backend)
    want = (1 - alpha**5) / (1 - alpha)
    assert float(num_accepted.double().mean()) + 1 == pytest.approx(want, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "num"), BACKENDS)
@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_tokens_from_seeds_follow_the_target(rule: str, backend: str, num: int) -> None:
    """Chi-square of the first two tokens; drafts from the noise that also tests them must fail."""
    want = torch.outer(torch.tensor(P), torch.tensor(P)).flatten().double() * num
    chi_square = {}
    for domain in (Domain.DRAFT, Domain.ACCEPT):
        emitted, _ = _simulate(rule, (-1, 0, 0, 1), num, backend, domain)
        counts = torch.bincount(emitted[:, 0] * 4 + emitted[:, 1], minlength=16)
        chi_square[domain] = float(((counts - want) ** 2 / want).sum())
    assert chi_square[Domain.DRAFT] < 72  # 15 degrees of freedom: 1e-9 by chance
    assert chi_square[Domain.ACCEPT] > 0.1 * num
