"""The acceptance rules: the law of what they emit, integrated over every draft and every coin."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec_kernels import verify
from specdec_kernels.acceptance import draw_by_coin
from specdec_kernels.philox import Domain, uniforms
from specdec_kernels.registry import OPS
from specdec_kernels.testing import (
    LAST_COIN,
    Speculation,
    accepted_law,
    dyadic_law,
    exact_law,
    random_speculation,
    target_law,
)

BACKENDS = ["reference", "cpu"]
TESTING_RULES = ["token", "block", "traversal", "gd_traversal"]
CHAINS = {"one": (-1, 0), "two": (-1, 0, 1), "three": (-1, 0, 1, 2)}
TREES = {
    "pair": (-1, 0, 0),
    "triple": (-1, 0, 0, 0),
    "pair-of-chains": (-1, 0, 0, 1, 2),
    "late-pair": (-1, 0, 1, 1, 2),
    "early-pair": (-1, 0, 0, 1, 1),
}
KINDS = {
    "onehot": [[0] * 3] * 3,
    "sampled": [[1] * 3] * 3,
    "without": [[2] * 3] * 3,
    "mixed": [[1, 0, 2], [0, 2, 2], [2, 1, 1]],
    "sampled-then-onehot": [[1, 0, 0], [2, 0, 0], [1, 0, 0]],
}
"""Name -> kind by depth and by number of earlier siblings."""


def _kinds(parents: tuple[int, ...], name: str) -> tuple[int, ...]:
    depths, kinds = [0], [0]
    for i, parent in enumerate(parents[1:], 1):
        depths.append(depths[parent] + 1)
        kinds.append(KINDS[name][depths[i] - 1][parents[1:i].count(parent)])
    return tuple(kinds)


def _allows(rule: str, tree: str, kinds: str) -> bool:
    if tree in CHAINS and kinds in ("without", "sampled-then-onehot"):
        return False  # a chain has no siblings; "mixed" has the three kinds
    allowed = {
        "walk": kinds == "onehot",
        "block": tree in CHAINS,
        "gd_traversal": tree in CHAINS or kinds in ("onehot", "sampled-then-onehot"),
    }
    return allowed.get(rule, True)


LAWS = [
    pytest.param(rule, parents, _kinds(parents, kinds), id=f"{rule}-{tree}-{kinds}")
    for rule in ["walk", *TESTING_RULES]
    for tree, parents in (CHAINS | TREES).items()
    for kinds in KINDS
    if _allows(rule, tree, kinds)
]


def _error(case: Speculation, rule: str, backend: str, **options: Any) -> float:
    got = exact_law(case, rule=rule, backend=backend, **options)
    want = target_law(case, rule=rule, backend=backend)
    assert float(got.sum()) == pytest.approx(1.0, abs=1e-12)
    return float((got - want).abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rule", "parents", "kinds"), LAWS)
def test_the_output_law_is_the_targets(
    rule: str, parents: tuple[int, ...], kinds: tuple[int, ...], backend: str
) -> None:
    for seed, vocab in enumerate((3, 3, 4) if len(parents) < 5 else (3, 3)):
        case = random_speculation(parents, kinds, vocab, seed, has_zeros=seed > 0)
        assert _error(case, rule, backend) < 1e-12, f"seed {seed}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["token", "traversal"])
@pytest.mark.parametrize("parents", [(-1, 0, 0), (-1, 0, 0, 0)])
def test_a_child_drawn_with_replacement_may_follow_one_drawn_without(
    parents: tuple[int, ...], rule: str, backend: str
) -> None:
    """Its law is the recorded one: what its siblings took out does not touch it."""
    for seed in range(3):
        case = random_speculation(parents, (0, 2, 1, 2)[: len(parents)], 3, seed)
        assert _error(case, rule, backend) < 1e-12, f"seed {seed}"


FILTERS = {
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.3},
    "bias": {"bias": [0.5, -1.0, -math.inf, 0.25]},
    "mask": {"mask": [True, False, True, True]},
    "greedy": {"temperature": 0.0},
    "all": {
        "temperature": 1.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.05,
        "bias": [0.5, -1.0, 0.0, 0.25],
        "mask": [True, True, False, True],
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_leaves_the_law_exact(name: str, backend: str) -> None:
    tree, chain = (-1, 0, 0, 1), (-1, 0, 1)
    for rule, parents, kinds in (
        ("walk", tree, (0, 0, 0, 0)),
        ("token", tree, (0, 2, 2, 1)),
        ("block", chain, (0, 1, 1)),
        ("traversal", tree, (0, 1, 1, 2)),
        ("gd_traversal", tree, (0, 1, 0, 1)),
    ):
        case = random_speculation(parents, kinds, 4, 7, has_zeros=False, **FILTERS[name])
        assert _error(case, rule, backend) < 1e-12, rule


def _filtered_law(case: Speculation, logits: Tensor) -> list[float]:
    """The filters once more, token by token in float64."""
    bias = [0.0] * len(logits) if case.bias is None else case.bias
    mask = [True] * len(logits) if case.mask is None else case.mask
    scores = [
        x + b if m else -math.inf for x, b, m in zip(logits.tolist(), bias, mask, strict=True)
    ]
    if case.temperature == 0.0:
        return [float(i == scores.index(max(scores))) for i in range(len(scores))]
    weights = [math.exp((x - max(scores)) / case.temperature) for x in scores]
    if case.top_k:
        edge = sorted(weights, reverse=True)[case.top_k - 1]
        weights = [w if w >= edge else 0.0 for w in weights]
    law = [w / sum(weights) for w in weights]
    if case.top_p < 1.0:  # drop what, with all that is less likely, holds at most 1 - top_p
        law = [p if sum(o for o in law if o <= p) > 1.0 - case.top_p else 0.0 for p in law]
    law = [p if p >= case.min_p * max(law) else 0.0 for p in law]
    return [p / sum(law) for p in law]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FILTERS)
def test_the_target_law_is_the_filtered_softmax(name: str, backend: str) -> None:
    for seed in range(5):
        case = random_speculation((-1, 0), (0, 0), 4, seed, has_zeros=False, **FILTERS[name])
        got = target_law(case, backend=backend)
        first = torch.tensor(_filtered_law(case, case.target[()]))
        second = torch.tensor([_filtered_law(case, case.target[(x,)]) for x in range(4)])
        torch.testing.assert_close(got, first.double()[:, None] * second, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_typical_acceptance_is_not_lossless(backend: str) -> None:
    """The control of the tests above: the comparison sees a lossy rule, and says how lossy."""
    case = random_speculation((-1, 0, 0, 1), (0, 0, 0, 0), 3, 0, has_zeros=False)
    assert _error(case, "typical", backend) > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", TESTING_RULES)
def test_a_decision_turns_exactly_at_its_threshold(rule: str, backend: str) -> None:
    """Every coin that keeps a node is the one below its threshold, every other is the threshold."""
    tree = (-1, 0, 1, 2) if rule == "block" else (-1, 0, 0, 1)
    kinds = (0, 1, 0, 1) if rule == "gd_traversal" else (0, 1, 1, 2)
    for seed in range(8):
        case = random_speculation(tree, kinds, 3, seed)
        assert _error(case, rule, backend, at_edges=True) < 1e-12, f"seed {seed}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", TESTING_RULES)
def test_thresholds_and_laws_by_hand(rule: str, backend: str) -> None:
    """p = (1/2, 1/2, 0, 0), q = (0, 1/4, 1/4, 1/2); drafts 1, 2, 3 are kept with 1, 0, 0."""
    drafts = torch.tensor([1, 2, 3]).repeat_interleave(2)
    rows = len(drafts)
    path, num_accepted, next_tokens, _, _, _, thresholds, next_law = verify(
        torch.tensor([0.0, 0.0, -math.inf, -math.inf]).expand(rows, 2, 4),
        torch.stack([torch.zeros_like(drafts), drafts], 1),
        torch.tensor([[-1, 0]] * rows, dtype=torch.int32),
        torch.full((rows,), 2, dtype=torch.int32),
        temperature=torch.ones(rows),
        kinds=torch.ones((rows, 2), dtype=torch.int8),
        draft_rows=torch.zeros((rows, 2), dtype=torch.int32),
        draft_probs=torch.tensor([0.0, 0.25, 0.25, 0.5]).expand(rows, 1, 4),
        coins=torch.tensor([[0.25, 0.0], [0.75, LAST_COIN]], dtype=torch.float64).repeat(3, 1),
        rule=rule, return_law=True, backend=backend,
    )  # fmt: skip
    assert num_accepted.tolist() == [1, 1, 0, 0, 0, 0]
    assert path.tolist() == [[0, 1]] * 2 + [[0, -1]] * 4
    assert thresholds[:, 1].tolist() == [1, 1, 0, 0, 0, 0]
    assert bool(thresholds[:, 0].isnan().all())
    assert next_law[:2].tolist() == [[0.5, 0.5, 0, 0]] * 2
    assert next_law[2:].tolist() == [pytest.approx([2 / 3, 1 / 3, 0, 0])] * 4
    assert next_tokens.tolist() == [0, 1, 0, 1, 0, 1]


def _random_step(rule: str, rows: int = 48) -> dict[str, Any]:
    """Trees whose drafts are kept about as often as not."""
    inputs = OPS["verify"].inputs(B=rows, N=6, V=7, rule=rule, seed=3)
    logits = inputs["logits"] * 0.3
    return inputs | {"logits": logits, "temperature": torch.ones(rows), "return_law": True}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", TESTING_RULES)
def test_the_next_token_inverts_the_next_law(rule: str, backend: str) -> None:
    inputs = _random_step(rule)
    coins = torch.rand((48, 6), generator=torch.Generator().manual_seed(0)).double()
    _, accepted, *_, law = verify(**inputs, coins=coins, backend=backend)
    busy = inputs["num_nodes"] > 0
    torch.testing.assert_close(law.sum(1), busy.double(), atol=1e-12, rtol=0)
    for token in range(7):
        coins[:, 0] = law.cumsum(1)[:, token] - law[:, token] / 2
        again = verify(**inputs, coins=coins, backend=backend)
        assert torch.equal(again[1], accepted)
        possible = law[:, token] > 1e-9
        assert bool(possible.any()) and bool((again[2][possible] == token).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [*TESTING_RULES, "typical"])
def test_seeds_are_the_documented_coins(rule: str, backend: str) -> None:
    inputs = _random_step(rule)
    path, accepted, next_tokens, status, *_, thresholds, law = verify(**inputs, backend=backend)
    assert status.tolist() == [0] * 48
    coins = uniforms(inputs["seeds"], inputs["positions"], 6, Domain.ACCEPT)
    has_both = set()
    for b, size in enumerate(inputs["num_nodes"].tolist()):
        if size == 0:
            continue
        last = int(path[b, accepted[b]])
        rejected = (inputs["parents"][b, :size] == last) & ~thresholds[b, :size].isnan()
        domain = Domain.RESIDUAL if bool(rejected.any()) else Domain.TARGET
        has_both.add(domain)
        position = inputs["positions"][b : b + 1] + accepted[b] + 1
        coins[b, 0] = uniforms(inputs["seeds"][b : b + 1], position, 1, domain)[0, 0]
        assert int(next_tokens[b]) == draw_by_coin(law[b], float(coins[b, 0]))
    assert len(has_both) == (1 if rule == "typical" else 2)
    del inputs["seeds"], inputs["positions"]
    by_coins = verify(**inputs, coins=coins, backend=backend)
    for got, want in zip(by_coins[:4], (path, accepted, next_tokens, status), strict=True):
        assert torch.equal(got, want)


def _memoryless(parents: tuple[int, ...], p: list[float], q: list[float]) -> Speculation:
    """Every node samples its children from q, and has the target law p."""
    logits, law = torch.tensor(p).log(), dyadic_law(q, bits=24)
    return Speculation(parents, (0, *[1] * (len(parents) - 1)), lambda _: logits, lambda _: law)


def _mean(num_accepted: Tensor) -> float:
    return float((num_accepted * torch.arange(len(num_accepted))).sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_drafts_of_the_block_verification_paper(backend: str) -> None:
    case = _memoryless((-1, 0, 1), [1 / 3, 2 / 3], [2 / 3, 1 / 3])
    for rule, want in (("token", 10 / 9), ("block", 11 / 9), ("traversal", 11 / 9)):
        got = _mean(accepted_law(case, rule=rule, backend=backend))
        assert got == pytest.approx(want, abs=1e-6), rule


@pytest.mark.parametrize("backend", BACKENDS)
def test_block_keeps_at_least_what_token_keeps(backend: str) -> None:
    gains = []
    for seed in range(6):
        case = random_speculation((-1, 0, 1, 2), (0, 1, 1, 1), 3, seed, has_zeros=seed % 2 == 0)
        laws = {
            rule: accepted_law(case, rule=rule, backend=backend)
            for rule in ("token", "block", "traversal")
        }
        torch.testing.assert_close(laws["block"], laws["traversal"], atol=1e-12, rtol=0)
        gains.append(_mean(laws["block"]) - _mean(laws["token"]))
    assert min(gains) > -1e-12
    assert max(gains) > 0.02


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["walk", *TESTING_RULES])
def test_a_onehot_node_is_kept_with_the_targets_probability_of_its_path(
    rule: str, backend: str
) -> None:
    """No rule can keep more, and none keeps less."""
    case = random_speculation((-1, 0, 1, 2), (0, 0, 0, 0), 3, 5, has_zeros=False)
    joint = target_law(case, backend=backend)
    path: tuple[int, ...] = ()
    for _ in range(3):
        path = (*path, case.guesses[path][0])
    kept = [float(joint[path[:k]].sum()) for k in (1, 2, 3)]
    want = -torch.tensor([1.0, *kept, 0.0], dtype=torch.float64).diff()
    got = accepted_law(case, rule=rule, backend=backend)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_children_without_replacement_that_cover_the_target_are_kept_surely(backend: str) -> None:
    case = random_speculation((-1, 0, 0, 0), (0, 2, 2, 2), 3, 1, has_zeros=False)
    for rule in ("token", "traversal"):
        rejected, kept = accepted_law(case, rule=rule, backend=backend).tolist()
        assert rejected == pytest.approx(0.0, abs=1e-12) and kept == pytest.approx(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_drafts_reach_the_bound_of_optimal_transport(backend: str) -> None:
    """One sampled child outside D and all of D: kept with P(D) + sum of min(p, q) elsewhere."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for q, want in (([0.5, 0, 0.5, 0], 0.6 + 0.1 + 0.3), ([0.875, 0, 0.125, 0], 0.6 + 0.1 + 0.125)):
        law = dyadic_law(q)
        case = Speculation(
            (-1, 0, 0, 0), (0, 1, 0, 0), lambda _: p.log(), lambda _, law=law: law, lambda _: (1, 3)
        )
        got = accepted_law(case, rule="gd_traversal", backend=backend)
        assert float(got[1]) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": None}, "draft must be given for sampled nodes, got None"),
        ({"guesses": None}, "guesses must be given for one-hot nodes, got None"),
        ({"draft": lambda _: [0.1, 0.9]}, r"draft\(\) must be float32 numbers that sum to 1"),
        ({"draft": lambda _: [0.5, 0.25]}, r"draft\(\) must be float32 numbers that sum to 1"),
        ({"draft": lambda _: [0.0, 1.0]}, r"draft\(\) must have a token for each child .*node 2"),
        ({"target": lambda _: [math.nan, math.nan]}, "verify must report status 0, got 1"),
    ],
)
def test_a_case_without_an_exact_law_is_refused(changes: dict[str, Any], message: str) -> None:
    case = Speculation(
        (-1, 0, 0, 0), (0, 2, 2, 0), lambda _: [0.0, 0.0], lambda _: [0.5, 0.5], lambda _: [1]
    )
    assert _error(case, "token", "reference") < 1e-12
    with pytest.raises(ValueError, match=message):
        exact_law(replace(case, **changes), rule="token", backend="reference")
