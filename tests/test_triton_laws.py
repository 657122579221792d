"""The Triton acceptance kernels, integrated over every draft and coin by their own thresholds; both
of their plans; and the constants that they share with Python.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from laws import SMALL_LAWS, assert_law_is_exact

pytest.importorskip("triton", reason="triton is not installed")
from specdec_kernels.philox import Domain, uniforms
from specdec_kernels.registry import INTERPRETS_TRITON, OPS
from specdec_kernels.sampling import NO_FINITE_LOGIT, NO_SUCH_DRAW, OK
from specdec_kernels.tree import DraftKind

if not INTERPRETS_TRITON:
    pytest.skip("kernels run compiled here, not interpreted", allow_module_level=True)


@pytest.mark.parametrize("name", SMALL_LAWS)
def test_the_law_of_what_a_rule_emits_is_the_target_s(name: str) -> None:
    assert_law_is_exact(name, "triton")


@pytest.mark.parametrize("rows", [0, 10**9], ids=["lazily", "summarised"])
@pytest.mark.parametrize("rule", ["walk", "token", "traversal"])
def test_both_plans_decide_alike(rule: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("specdec_kernels.triton_kernels.verify")
    monkeypatch.setattr(module, "ROWS_PER_PROCESSOR", rows)
    operator = OPS["verify"]
    inputs = operator.inputs(B=3, N=6, V=201, rule=rule, seed=11)
    got, want = (operator(**inputs, backend=backend) for backend in ("triton", "reference"))
    for ours, theirs in zip(got[:4], want[:4], strict=True):
        assert torch.equal(ours, theirs)


def test_shared_constants_are_the_same() -> None:
    philox = importlib.import_module("specdec_kernels.triton_kernels.philox")
    laws = importlib.import_module("specdec_kernels.triton_kernels.laws")
    for name in ("ACCEPT", "RESIDUAL", "TARGET"):
        assert getattr(philox, name).value == Domain[name]
    assert [laws.OK.value, laws.NO_FINITE_LOGIT.value, laws.NO_SUCH_DRAW.value] == [
        OK, NO_FINITE_LOGIT, NO_SUCH_DRAW
    ]  # fmt: skip
    assert [laws.ONEHOT.value, laws.SAMPLED.value, laws.WITHOUT_REPLACEMENT.value] == [
        DraftKind.ONEHOT, DraftKind.SAMPLED, DraftKind.SAMPLED_WITHOUT_REPLACEMENT
    ]  # fmt: skip


def test_seeded_coins_are_those_of_philox() -> None:
    operator = OPS["verify"]
    inputs = operator.inputs(B=3, N=6, V=33, rule="token", seed=3)
    seeds, positions = inputs["seeds"], inputs["positions"]
    seeds[0] = -7
    got = operator(**inputs, return_law=True, backend="triton")
    coins = uniforms(seeds, positions, 6, Domain.ACCEPT)
    thresholds, path = got[6], got[0]
    is_tested = ~thresholds.isnan()
    assert bool(is_tested.any())
    kept = torch.zeros_like(is_tested)
    for row, nodes in enumerate(path.tolist()):
        kept[row, [node for node in nodes if node > 0]] = True
    assert torch.equal((coins < thresholds)[is_tested], kept[is_tested])
