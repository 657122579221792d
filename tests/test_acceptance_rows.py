"""`verify` under every rule on rows that have caught other implementations out, and the equality of
the forms that its arguments can take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec_kernels import verify
from specdec_kernels.acceptance import RULES
from specdec_kernels.registry import OPS
from specdec_kernels.testing import LAST_COIN

INF, NAN = math.inf, math.nan
TESTING_RULES = ["token", "block", "traversal", "gd_traversal"]
FLAT = [0.0] * 4
NAMES = (
    "path", "num_accepted", "next_tokens", "status", "logprobs", "margins", "thresholds", "next_law"
)  # fmt: skip

pytestmark = pytest.mark.parametrize("backend", ["reference", "cpu"])


def _verify(backend: str, **arguments: Any) -> dict[str, Tensor]:
    arguments["lossy"] = arguments.get("rule") == "typical"
    answers = verify(**arguments, return_logprobs=True, return_law=True, backend=backend)
    return dict(zip(NAMES, answers, strict=True))


def _step(
    backend: str,
    rule: str,
    logits: Sequence[Sequence[float]],
    tokens: Sequence[int],
    *,
    parents: Sequence[int] | None = None,
    coins: Sequence[float] | float = 0.0,
    q: Sequence[float] | None = None,
    kind: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """One request, a chain by default; drafted from q where that is given, one-hot otherwise."""
    nodes = len(tokens)
    coins = [coins] * nodes if isinstance(coins, float) else coins
    inputs = {
        "logits": torch.tensor([logits]),
        "tokens": torch.tensor([tokens]),
        "parents": torch.tensor([parents or range(-1, nodes - 1)], dtype=torch.int32),
        "num_nodes": torch.tensor([nodes], dtype=torch.int32),
        "temperature": torch.ones(1),
        "coins": torch.tensor([coins], dtype=torch.float64),
        **options,
    }
    if q is not None and rule in TESTING_RULES:
        inputs["kinds"] = torch.full((1, nodes), kind, dtype=torch.int8)
        inputs["draft_rows"] = torch.zeros((1, nodes), dtype=torch.int32)
        inputs["draft_probs"] = torch.tensor([[q]])
    answer = _verify(backend, **inputs, rule=rule)
    return {name: value[0].tolist() for name, value in answer.items()}


def _assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [[-INF] * 4, [NAN] * 4, [NAN, -INF, NAN, -INF]])
@pytest.mark.parametrize("q", [None, [0.25] * 4])
def test_a_root_without_a_finite_logit_is_reported(
    bad: list[float], q: list[float] | None, rule: str, backend: str
) -> None:
    for coin in (0.0, LAST_COIN):
        answer = _step(backend, rule, [bad, FLAT], [0, 1], coins=coin, q=q)
        assert answer["path"] == [0, -1]
        assert [answer[n] for n in NAMES[1:4]] == [0, 0, 1]
        assert answer["next_law"] == FLAT
    masked = torch.zeros((1, 4), dtype=torch.bool)
    assert _step(backend, rule, [FLAT, FLAT], [0, 1], q=q, mask=masked)["status"] == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("q", [None, [0.25] * 4])
def test_the_path_ends_where_no_logit_is_finite(
    q: list[float] | None, nodes: int, rule: str, backend: str
) -> None:
    logits = [FLAT, [NAN] * 4, FLAT][:nodes]
    answer = _step(backend, rule, logits, [0, 0, 0][:nodes], q=q)
    is_bottom_up = rule in ("block", "traversal", "gd_traversal")
    assert answer["path"][:2] == ([0, -1] if is_bottom_up else [0, 1])
    assert [answer[n] for n in NAMES[1:4]] == [0 if is_bottom_up else 1, 0, 1]


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_a_tree_without_drafts(rule: str, backend: str) -> None:
    for row, law in (
        ([0.0, INF, 0.0, INF], [0, 0.5, 0, 0.5]),
        ([-INF, -INF, -5.0, -INF], [0, 0, 1, 0]),
        ([NAN, 0.0, -INF, 0.0], [0, 0.5, 0, 0.5]),
    ):
        possible = [token for token, p in enumerate(law) if p > 0]
        for coin, token in ((0.0, possible[0]), (LAST_COIN, possible[-1])):
            answer = _step(backend, rule, [row], [7], coins=coin)
            assert answer["next_law"] == law
            assert [answer[n] for n in NAMES[:4]] == [[0], 0, token, 0]
            assert math.isnan(answer["thresholds"][0])


@pytest.mark.parametrize("rule", TESTING_RULES)
def test_a_draft_from_the_targets_own_law_is_always_kept(rule: str, backend: str) -> None:
    answer = _step(backend, rule, [FLAT] * 3, [0, 3, 1], q=[0.25] * 4, coins=LAST_COIN)
    assert answer["path"] == [0, 1, 2]
    assert set(answer["thresholds"][1 if rule == "token" else 2 :]) == {1.0}
    assert answer["next_law"] == [0.25] * 4


@pytest.mark.parametrize("rule", TESTING_RULES)
def test_a_residual_of_rounding_errors_has_a_defined_answer(rule: str, backend: str) -> None:
    """Draft and target with the same logits: only a coin within rounding of 1 can reject."""
    logits = torch.randn((64, 3, 50), generator=torch.Generator().manual_seed(0)) * 3
    inputs = {
        "logits": logits,
        "tokens": torch.randint(0, 50, (64, 3), generator=torch.Generator().manual_seed(1)),
        "parents": torch.tensor([[-1, 0, 1]] * 64, dtype=torch.int32),
        "num_nodes": torch.full((64,), 3, dtype=torch.int32),
        "temperature": torch.ones(64),
        "kinds": torch.ones((64, 3), dtype=torch.int8),
        "draft_rows": torch.tensor([[0, 1, 2]] * 64, dtype=torch.int32),
        "draft_logits": logits,
        "rule": rule,
    }
    coins = torch.full((64, 3), LAST_COIN, dtype=torch.float64)
    answer = _verify(backend, **inputs, coins=coins - 1e-12)
    assert answer["num_accepted"].tolist() == [2] * 64
    answer = _verify(backend, **inputs, coins=coins)
    assert not answer["status"].any()
    torch.testing.assert_close(answer["next_law"].sum(1), torch.ones(64).double())
    assert bool((answer["next_law"].gather(1, answer["next_tokens"][:, None]) > 0).all())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("coin", [0.0, LAST_COIN])
def test_the_outermost_coins_emit_nothing_impossible(coin: float, rule: str, backend: str) -> None:
    inputs = OPS["verify"].inputs(B=64, N=6, V=9, rule=rule, seed=5)
    gaps = torch.rand((64, 6, 9), generator=torch.Generator().manual_seed(0)) < 0.4
    inputs["logits"] = (inputs["logits"] * 0.3).masked_fill(gaps, -INF)
    inputs["temperature"] = torch.ones(64)
    inputs["coins"] = torch.full((64, 6), coin, dtype=torch.float64)
    inputs.pop("return_logprobs", None)
    answer = _verify(backend, **{k: v for k, v in inputs.items() if k != "lossy"})
    is_on_path = answer["path"] >= 0
    fine = (answer["status"] == 0)[:, None] & is_on_path
    assert int(fine.sum()) > 64
    assert bool((answer["logprobs"][fine] > -INF).all())
    assert bool(answer["logprobs"][~is_on_path].isnan().all())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("token", [-1, 4, 2**40])
def test_a_guess_outside_the_vocabulary_is_never_kept(token: int, rule: str, backend: str) -> None:
    for coin in (0.0, LAST_COIN):
        answer = _step(backend, rule, [FLAT] * 3, [0, token, 1], coins=coin)
        assert [answer[n] for n in NAMES[:4]] == [[0, -1, -1], 0, 3 if coin else 0, 0]
        assert answer["next_law"] == [0.25] * 4


@pytest.mark.parametrize("rule", TESTING_RULES)
@pytest.mark.parametrize(
    ("token", "mass"), [(1, 0.0), (1, NAN), (1, -1.0), (-1, 0.25), (4, 0.25), (2**40, 0.25)]
)
@pytest.mark.parametrize("kind", [1, 2])
def test_a_draft_that_its_law_cannot_give_is_reported(
    kind: int, token: int, mass: float, rule: str, backend: str
) -> None:
    q = [0.5, mass, 0.25, 0.25]
    answer = _step(backend, rule, [FLAT] * 2, [0, token], q=q, kind=kind)
    assert [answer[n] for n in NAMES[:4]] == [[0, -1], 0, 0, 2]


@pytest.mark.parametrize("rule", TESTING_RULES)
def test_draft_masses_that_are_none_count_as_zero(rule: str, backend: str) -> None:
    logits = [[0.5, 1.0, 0.0, -1.0]] * 2
    want = _step(backend, rule, logits, [0, 2], q=[0.0, 0.0, 0.75, 0.25], coins=LAST_COIN)
    got = _step(backend, rule, logits, [0, 2], q=[NAN, -1.0, 0.75, 0.25], coins=LAST_COIN)
    assert got["num_accepted"] == want["num_accepted"] == 0
    assert (got["next_law"], got["thresholds"][1]) == (want["next_law"], want["thresholds"][1])


@pytest.mark.parametrize("rule", ["walk", "token", "traversal", "gd_traversal"])
def test_of_equal_guesses_the_first_counts(rule: str, backend: str) -> None:
    """Rejected, it leaves nothing for the others; kept, it is the one on the path."""
    siblings = {"parents": (-1, 0, 0, 0)}
    answer = _step(backend, rule, [FLAT] * 4, [0, 2, 2, 1], **siblings, coins=[0.99, 0.3, 0, 0.9])
    if rule == "walk":
        assert [answer[n] for n in NAMES[:3]] == [[0, -1, -1, -1], 0, 3]
        answer = _step(backend, rule, [FLAT] * 4, [0, 2, 2, 1], **siblings, coins=0.6)
        assert [answer[n] for n in NAMES[:3]] == [[0, 1, -1, -1], 1, 2]
        return
    assert answer["thresholds"][1:] == [0.25, 0.0, pytest.approx(1 / 3)]
    assert answer["path"] == [0, -1, -1, -1]
    assert answer["next_law"] == pytest.approx([0.5, 0, 0, 0.5])
    answer = _step(backend, rule, [FLAT] * 4, [0, 2, 2, 1], **siblings)
    assert answer["path"] == [0, 1, -1, -1]


@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_a_repeated_draw_with_replacement_is_tested_against_the_residual(
    rule: str, backend: str
) -> None:
    """p uniform, q = (1/2, 1/2, 0, 0): token 0 is kept with 1/2, and never once it was rejected."""
    answer = _step(
        backend, rule, [FLAT] * 3, [0, 0, 0], parents=(-1, 0, 0), q=[0.5, 0.5, 0, 0], coins=0.5
    )
    assert answer["thresholds"][1:] == [0.5, 0.0]
    assert answer["next_law"] == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize("rule", RULES)
def test_an_idle_row_answers_with_padding(rule: str, backend: str) -> None:
    inputs = OPS["verify"].inputs(B=3, N=4, V=9, rule=rule)
    inputs = {k: v for k, v in inputs.items() if k not in ("lossy", "return_logprobs")}
    inputs["num_nodes"] = torch.tensor([0, 1, 0], dtype=torch.int32)
    answer = {name: value.tolist() for name, value in _verify(backend, **inputs).items()}
    for b in (0, 2):
        assert [answer[n][b] for n in NAMES[:4]] == [[-1] * 4, 0, -1, 0]
        assert answer["next_law"][b] == [0.0] * 9
        assert all(map(math.isnan, answer["logprobs"][b] + answer["thresholds"][b]))


def _batch(rule: str, seed: int) -> dict[str, Any]:
    """Ragged trees, whose drafts are kept about as often as not; keyed by seeds."""
    inputs = OPS["verify"].inputs(B=7, N=9, V=61, rule=rule, seed=seed)
    inputs["logits"] = inputs["logits"] * 0.4
    return {k: v for k, v in inputs.items() if k not in ("lossy", "return_logprobs")}


def _rows(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    return {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_depend_on_its_batch(rule: str, backend: str) -> None:
    inputs = _batch(rule, 1)
    want = _verify(backend, **inputs)
    for rows in (torch.tensor([3, 6, 0, 5, 1, 4, 2]), *torch.arange(7)[:, None]):
        _assert_equal(_verify(backend, **_rows(inputs, rows)), _rows(want, rows))


@pytest.mark.parametrize("rule", RULES)
def test_padding_is_not_read(rule: str, backend: str) -> None:
    inputs = _batch(rule, 0)
    want = _verify(backend, **inputs)
    is_padding = torch.arange(9) >= inputs["num_nodes"][:, None]
    assert bool(is_padding.any())
    poison = {"tokens": 2**40, "parents": 77, "kinds": 99, "draft_rows": 2**30}
    for name, value in poison.items():
        if name in inputs:
            inputs[name] = inputs[name].masked_fill(is_padding, value)
    for name in ("logits", "draft_probs"):
        if name in inputs:
            inputs[name] = inputs[name].masked_fill(is_padding[:, :, None], NAN)
    if "kinds" in inputs:
        inputs["kinds"][:, 0] = 55  # the root was not drafted
        is_parent = torch.zeros((7, 10), dtype=torch.bool)
        sampled = torch.where((inputs["kinds"] > 0) & ~is_padding, inputs["parents"], 9)
        sampled[:, 0] = 9
        is_parent.scatter_(1, sampled.long(), True)
        inputs["draft_rows"] = inputs["draft_rows"].masked_fill(~is_parent[:, :9], -5)
    _assert_equal(_verify(backend, **inputs), want)


@pytest.mark.parametrize("rule", TESTING_RULES)
def test_draft_logits_are_the_law_of_their_softmax(rule: str, backend: str) -> None:
    inputs = _batch(rule, 1)
    want = _verify(backend, **inputs)
    inputs["draft_logits"] = inputs.pop("draft_probs").log() + 3
    got = _verify(backend, **inputs)
    for name in NAMES[:4]:
        assert torch.equal(got[name], want[name])
    for name in NAMES[4:]:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("rule", TESTING_RULES)
@pytest.mark.parametrize("form", ["draft_probs", "draft_logits"])
def test_draft_offsets_place_a_smaller_vocabulary(form: str, rule: str, backend: str) -> None:
    """Every third token of 61 can be drafted."""
    inputs = _batch(rule, 2)
    ids = torch.arange(0, 61, 3)
    is_drafted = inputs["tokens"] < 61
    inputs["tokens"] = torch.where(is_drafted, inputs["tokens"] // 3 * 3, inputs["tokens"])
    small = inputs.pop("draft_probs")[..., ids].softmax(-1)
    value, elsewhere = (small, 0.0) if form == "draft_probs" else (small.log(), -INF)
    dense = torch.full((7, 9, 61), elsewhere)
    dense[..., ids] = value
    want = _verify(backend, **inputs, **{form: dense})
    got = _verify(backend, **inputs, **{form: value}, draft_offsets=ids - torch.arange(21))
    exact = NAMES if form == "draft_probs" else NAMES[:4]
    for name in NAMES:
        limit = 0 if name in exact else 1e-12
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=limit, equal_nan=True)


@pytest.mark.parametrize("rule", RULES)
def test_a_mask_is_a_bias_of_minus_infinity(rule: str, backend: str) -> None:
    inputs = _batch(rule, 3)
    mask = torch.rand((7, 61), generator=torch.Generator().manual_seed(0)) < 0.7
    bias = torch.zeros((7, 61)).masked_fill(~mask, -INF)
    want = _verify(backend, **inputs, bias=bias)
    _assert_equal(_verify(backend, **inputs, mask=mask), want)
    assert want["next_tokens"].tolist() != _verify(backend, **inputs)["next_tokens"].tolist()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_logprobs_and_margins_by_hand(temperature: float, rule: str, backend: str) -> None:
    """Both drafts are kept; the biased logits are (4, 1, 2), and (2, 1, 0) at the last node."""
    bias = torch.tensor([[0.0, 0.0, 2.0]])
    answer = _step(
        backend, rule, [[4.0, 1, 0], [4.0, 1, 0], [2.0, 1, -2]], [9, 0, 0], coins=0.0,
        bias=bias, temperature=torch.tensor([temperature]),
    )  # fmt: skip
    assert (answer["path"], answer["next_tokens"]) == ([0, 1, 2], 0)
    heat = temperature or 1.0
    first = -math.log(sum(math.exp((x - 4) / heat) for x in (4, 1, 2)))
    last = -math.log(sum(math.exp((x - 2) / heat) for x in (2, 1, 0)))
    assert answer["logprobs"] == pytest.approx([first, first, last], abs=1e-6)
    assert answer["margins"] == [2.0, 2.0, 1.0]


@pytest.mark.parametrize("rule", RULES)
def test_logprobs_are_of_the_filtered_law(rule: str, backend: str) -> None:
    """Top-2 of (3, 2, 1, 0) at temperature 1; the path is the root alone."""
    answer = _step(
        backend, rule, [[3.0, 2, 1, 0], FLAT], [0, 3], coins=0.99,
        top_k=torch.tensor([2], dtype=torch.int32),
    )  # fmt: skip
    assert (answer["num_accepted"], answer["next_tokens"]) == (0, 1)
    assert answer["logprobs"][0] == pytest.approx(-math.log(1 + math.e), abs=1e-6)
    assert answer["margins"][0] == 1.0
    assert math.isnan(answer["logprobs"][1]) and math.isnan(answer["margins"][1])


@pytest.mark.parametrize("rule", TESTING_RULES)
def test_infinite_draft_entries_are_read_as_sample_reads_them(rule: str, backend: str) -> None:
    """+inf logits are uniform among themselves; an infinite probability is none."""
    for name, law, threshold in (
        ("draft_logits", [INF, 0.0, INF, -INF], 0.5),
        ("draft_probs", [0.5, INF, 0.5, 0.0], 0.5),
    ):
        options = {
            "kinds": torch.ones((1, 2), dtype=torch.int8),
            "draft_rows": torch.zeros((1, 2), dtype=torch.int32),
            name: torch.tensor([[law]]),
        }
        answer = _step(backend, rule, [FLAT, FLAT], [0, 2], coins=LAST_COIN, **options)
        assert answer["thresholds"][1] == threshold
        assert answer["next_law"] == [0, 0.5, 0, 0.5]
        assert _step(backend, rule, [FLAT, FLAT], [0, 3], **options)["status"] == 2
