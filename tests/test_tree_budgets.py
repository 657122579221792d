"""Top-k trees of networks under a budget: how deep they are drafted, and what of them is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_model
from draft_trees import similar_to
from prompts import greedy, left_pad, random_prompts
from torch import Tensor

from specdec_kernels import (
    Budget,
    CostCurve,
    DraftContext,
    DraftNetwork,
    ModelDrafter,
    Proposal,
    SamplingParams,
    SpeculativeDecoder,
    TopKTree,
)
from specdec_kernels.drafters import pace
from specdec_kernels.drafters.network import Level
from specdec_kernels.hf import DraftModel

FREE = CostCurve((1, 64), (1.0, 1.0))
DEAR = CostCurve((1, 64), (1.0, 12.0))
VOCAB = 12


class Sure(DraftNetwork):
    """After every token the same law: 0.6 for token 5, 0.2 for 6, the rest for all others."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.now = seconds, 0.0  # of a level
        law = torch.full((VOCAB,), 0.2 / (VOCAB - 2))
        law[5], law[6] = 0.6, 0.2
        self.logits = law.log()
        self.num_levels = 0

    def begin(self, batch: int, num_slots: int) -> None:
        self.batch = batch

    def start(self, context: DraftContext) -> Tensor:
        return self.logits.expand(self.batch, -1)

    def extend(self, level: Level) -> Tensor:
        self.num_levels += 1
        self.now += self.seconds
        return self.logits.expand(self.batch, max(map(len, level)), -1)


def _propose(drafter: ModelDrafter, budget: Budget | None, rows: int = 1) -> Proposal:
    sampling = SamplingParams(torch.zeros(rows, dtype=torch.int64), torch.zeros(rows))
    drafter.begin(rows)
    return drafter.propose(
        DraftContext(
            [[3, 4]] * rows, [True] * rows, [9] * rows, torch.device("cpu"), VOCAB, sampling,
            budget, pads=False,
        )
    )  # fmt: skip


def _timed(curve: CostCurve) -> Budget:
    """A budget that knows how long a pass takes: a second."""
    budget = Budget(curve)
    budget.record(
        running=1, computed=1, plain=1, num_accepted=0, forward_seconds=1.0, draft_seconds=0.0
    )
    budget.choose([[]])
    return budget


@pytest.mark.parametrize("rows", [1, 3])
def test_of_the_tree_the_likeliest_nodes_are_kept(rows: int) -> None:
    drafter = ModelDrafter(Sure(), TopKTree(16))
    whole = _propose(drafter, None, rows).tree
    assert whole.num_nodes.tolist() == [16] * rows
    assert _propose(drafter, Budget(FREE), rows).tree.tokens.equal(whole.tokens)
    kept = _propose(drafter, Budget(DEAR), rows).tree
    sizes = kept.num_nodes.tolist()
    assert all(1 < size < 8 for size in sizes)
    for row, size in enumerate(sizes):
        assert kept.tokens[row, :size].equal(whole.tokens[row, :size])
        assert kept.parents[row, :size].equal(whole.parents[row, :size])


def test_a_level_is_drafted_while_it_may_bring_more_than_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it may: 0.71, 0.54, 0.36, ... of a token."""
    for seconds, wanted in ((0.01, 6), (0.4, 2), (0.6, 1), (100.0, 0)):
        network, tree = Sure(seconds), TopKTree(16, depth=7)
        clock = SimpleNamespace(perf_counter=lambda network=network: network.now)
        monkeypatch.setattr(pace, "time", clock)
        drafter = ModelDrafter(network, tree)
        for _ in range(3):  # in the first weights are packed, the second is measured
            network.num_levels = 0
            _propose(drafter, _timed(FREE))
        assert network.num_levels == wanted
    for _ in range(9):
        _propose(drafter, _timed(FREE))
    assert tree._pace.seconds == pytest.approx(100 * 0.99**11), "it would never be tried again"
    _propose(drafter, None)
    assert network.num_levels == 6, "without a budget time does not matter"


def test_beams_that_no_node_of_a_tree_is_worth_are_not_drafted() -> None:
    network = Sure()
    drafter = ModelDrafter(network, TopKTree(16, depth=7))
    _propose(drafter, Budget(FREE))
    assert network.num_levels == 6
    network.num_levels = 0
    _propose(drafter, Budget(DEAR))  # least score: 0.18
    assert network.num_levels < 6


@pytest.mark.parametrize("curve", [FREE, CostCurve((1, 64), (1.0, 2.0))])
def test_texts_are_those_of_generate_under_any_budget(curve: CostCurve) -> None:
    model = make_tiny_model(3)
    rows = random_prompts((21, 30, 26), 101)
    drafter = ModelDrafter(DraftModel(similar_to(model)), TopKTree(12))
    assert drafter.wants_budget
    decoder = SpeculativeDecoder(drafter, budget=Budget(curve))
    inputs = left_pad(rows)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, custom_generate=decoder)
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    assert new == [greedy(model, row, 24)[len(row) :] for row in rows]
    assert decoder.stats is not None and sum(decoder.stats.num_drafted) > 0
