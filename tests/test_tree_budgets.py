"""Top-k trees of networks under a budget: how deep they are drafted, and what of them is kept."""

from __future__ import annotations

from collections.abc import Iterator
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


class Table(DraftNetwork):
    """Another random law after every path, of a row's own; it computes nothing twice or in vain."""

    def law(self, row: int, path: tuple[int, ...]) -> Tensor:
        seed = hash((row, path)) % 2**32
        scores = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
        return (3 * scores).log_softmax(0)

    def begin(self, batch: int, num_slots: int) -> None:
        self.paths: list[list[tuple[int, ...]]] = [[] for _ in range(batch)]

    def start(self, context: DraftContext) -> Tensor:
        return torch.stack([self.law(row, ()) for row in range(len(self.paths))])

    def extend(self, level: Level) -> Tensor:
        logits = torch.zeros((len(level), max(map(len, level)), VOCAB))
        for row, nodes in enumerate(level):
            known = list(self.paths[row])
            for i, (token, parent) in enumerate(nodes):
                path = (*(() if parent == -1 else known[parent]), token)
                self.paths[row].append(path)
                logits[row, i] = self.law(row, path)
        return logits

    def _likeliest(
        self, row: int, path: tuple[int, ...], width: int
    ) -> Iterator[tuple[float, int]]:
        values, tokens = self.law(row, path).topk(width)
        return zip(values.tolist(), tokens.tolist(), strict=True)

    def best(self, row: int, num: int, depth: int, width: int) -> set[tuple[int, ...]]:
        """The likeliest `num` paths that the beams find, by plain lists."""
        beams, found = {(): 0.0}, {}
        for _ in range(depth):
            below = {
                (*path, token): score + value
                for path, score in beams.items()
                for value, token in self._likeliest(row, path, width)
            }
            found |= below
            beams = {p: below[p] for p in sorted(below, key=below.get, reverse=True)[:width]}
        return set(sorted(found, key=found.get, reverse=True)[:num])


def test_a_tree_holds_the_likeliest_paths_that_beams_find() -> None:
    depths, width = [5, 2, 0, 3], 3
    network = Table()
    drafter = ModelDrafter(network, TopKTree(24, depth=5, width=width))
    drafter.begin(len(depths))
    sampling = SamplingParams(torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    active = [True] * 4
    context = DraftContext([[3, 4]] * 4, active, depths, torch.device("cpu"), VOCAB, sampling)
    tree = drafter.propose(context).tree
    for row, (tokens, parents) in enumerate(tree.rows()):
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(tokens[1:], parents[1:], strict=True):
            paths.append((*paths[parent], token))
        assert set(paths[1:]) == network.best(row, 23, depths[row], width)
        computed = network.paths[row]
        assert len(set(computed)) == len(computed)
        assert all(len(path) < depths[row] for path in computed), "nobody can use what follows"
    assert max(map(len, network.paths[0])) == 4, "every level must be there"


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
