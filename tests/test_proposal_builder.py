"""What a proposal builder draws, records and refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import specdec_kernels.drafting as drafting
from specdec_kernels import (
    DraftKind,
    DraftNode,
    Proposal,
    ProposalBuilder,
    SamplingParams,
)

PACKAGE = Path(drafting.__file__).parent
SEQUENCES = [[3, 1], [2, 0, 4], [1, 1]]
VOCAB = 6
ONEHOT, SAMPLED, JOINT = (int(kind) for kind in DraftKind)


def _builder(temperature: float = 1.0, **options: object) -> ProposalBuilder:
    """Three rows, of which the last one is finished."""
    sampling = SamplingParams(torch.tensor([7, 8, 9]), torch.full((3,), temperature))
    active = [True, True, False]
    made = {"vocab_size": VOCAB, "sampling": sampling, "active": active, **options}
    return ProposalBuilder(SEQUENCES, **made)


def _logits(rows: int = 2, width: int = VOCAB) -> Tensor:
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(1)) * 2


def _tokens(siblings: list[DraftNode]) -> list[int]:
    return [node.token for node in siblings]


def test_a_proposal_cannot_be_made_from_tensors() -> None:
    made = Proposal.onehot([([3, 4], [-1, 0])])
    with pytest.raises(TypeError, match=r"use Proposal\.onehot\(rows\) .* or a ProposalBuilder"):
        Proposal(made.tree, made.kinds)
    with pytest.raises(TypeError, match="cannot be constructed from tensors"):
        dataclasses.replace(made, draft_probs=torch.ones((1, 1, 5)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.draft_probs = torch.ones((1, 1, 5))
    users = {p.name for p in PACKAGE.rglob("*.py") if "_seal(" in p.read_text("utf-8")}
    assert users == {"tree.py", "drafting.py"}


def test_the_law_recorded_is_the_filtered_softmax_that_was_drawn_from() -> None:
    builder = _builder()
    logits = _logits()
    children = builder.sample(builder.roots, logits, num_children=2, temperature=0.5, top_k=3)
    proposal = builder.build()
    is_kept = logits >= logits.sort(-1).values[:, -3:-2]
    law = (logits * 2).masked_fill(~is_kept, -torch.inf).softmax(-1)
    torch.testing.assert_close(proposal.draft_probs[:2, 0], law)
    assert proposal.draft_rows.tolist() == [[0, -1, -1], [0, -1, -1], [-1, -1, -1]]
    assert proposal.kinds.tolist() == [[ONEHOT, JOINT, JOINT]] * 2 + [[ONEHOT] * 3]
    assert proposal.tree.num_nodes.tolist() == [3, 3, 0]
    for row, siblings in enumerate(children):
        assert proposal.tree.tokens[row, 1:].tolist() == _tokens(siblings)
        assert all(law[row, token] > 0 for token in _tokens(siblings))


def test_draws_use_the_target_s_temperature_and_filters_unless_told_otherwise() -> None:
    row = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    sampling = SamplingParams(torch.tensor([1]), torch.tensor([2.0]), top_k=torch.tensor([2]))
    laws = []
    for options in ({}, {"temperature": torch.tensor([4.0]), "top_k": 0}):
        builder = ProposalBuilder([[5]], vocab_size=VOCAB, sampling=sampling)
        builder.sample(builder.roots, row, num_children=1, **options)
        laws.append(builder.build().draft_probs[0, 0])
    torch.testing.assert_close(laws[0][-2:], (row[0, -2:] / 2).softmax(-1))
    assert laws[0][:-2].tolist() == [0.0] * 4
    torch.testing.assert_close(laws[1], (row[0] / 4).softmax(-1))


def test_the_likeliest_tokens_are_left_out_of_the_law_of_the_one_drawn() -> None:
    builder = _builder()
    logits = _logits()
    children = builder.sample(builder.roots, logits, num_children=1, num_top=2, top_k=5)
    proposal = builder.build()
    top = logits.topk(2).indices
    is_kept = logits >= logits.topk(5).values[:, -1:]
    law = logits.masked_fill(~is_kept, -torch.inf).scatter(1, top, -torch.inf).softmax(-1)
    torch.testing.assert_close(proposal.draft_probs[:2, 0], law)
    assert proposal.kinds[:2].tolist() == [[ONEHOT, SAMPLED, ONEHOT, ONEHOT]] * 2
    for row, siblings in enumerate(children):
        assert _tokens(siblings)[1:] == top[row].tolist()
        assert law[row, siblings[0].token] > 0


def test_a_law_with_few_tokens_gives_few_children() -> None:
    """Also where the other tokens are too unlikely for float32."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -200.0, -80.0, -torch.inf], [9.0, *[-500.0] * 5]])
    builder = _builder()
    joint = builder.sample(builder.roots, logits, num_children=4)
    assert [sorted(_tokens(siblings)) for siblings in joint] == [[0, 1], [0]]
    again = builder.sample([joint[0][0], joint[1][0]], logits, num_children=1, num_top=3)
    assert [sorted(_tokens(siblings)) for siblings in again] == [[0, 1], [0]]
    assert builder.build().kinds.tolist()[1] == [ONEHOT, JOINT, ONEHOT, ONEHOT, ONEHOT]


def test_independent_draws_of_one_law_may_repeat_a_token() -> None:
    logits = torch.tensor([[5.0, 0.0, 0.0, 0.0, 0.0, 0.0]] * 2)
    builder = _builder()
    siblings = builder.sample(builder.roots, logits, num_children=8, replacement=True)[0]
    assert len(siblings) == 8 and _tokens(siblings).count(0) > 1
    assert set(builder.build().kinds[0, 1:].tolist()) == {SAMPLED}


@pytest.mark.parametrize("replacement", [False, True])
def test_a_row_at_temperature_0_gets_its_likeliest_tokens(replacement: bool) -> None:
    logits = _logits()
    builder = _builder(temperature=0.0)
    options = {"num_children": 2, "replacement": replacement}
    children = builder.sample(builder.roots, logits, **options)
    more = builder.sample([children[0][0]], logits[:1], num_children=1, num_top=2)[0]
    assert _tokens(children[0]) == logits[0].topk(1 if replacement else 2).indices.tolist()
    assert _tokens(more) == logits[0].topk(3).indices.tolist()
    proposal = builder.build()
    assert not proposal.kinds.any()
    assert proposal.draft_rows is None and proposal.draft_probs is None


def test_every_draw_of_a_row_has_noise_of_its_own_at_the_position_of_the_root(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[tuple[int, int]] = []
    sample = drafting.sample

    def spy(logits: Tensor, **options: object):
        assert options["domain"] == 0
        assert options["positions"].tolist() == [{7: 1, 8: 2}[s] for s in options["seeds"].tolist()]
        used.extend(zip(options["seeds"].tolist(), options["streams"].tolist(), strict=True))
        return sample(logits, **options)

    monkeypatch.setattr(drafting, "sample", spy)
    builder = _builder()
    guess = builder.add(builder.roots[0], 3)
    level = builder.sample(builder.roots, _logits(), num_children=3, replacement=True)
    builder.prune([guess])
    other = builder.add(builder.roots[0], 2)
    builder.sample([other, *level[0]], _logits(4), num_children=2)
    assert len(used) == len(set(used)) == 10


def test_draft_ids_become_target_ids() -> None:
    ids = torch.tensor([1, 4, 5])
    builder = _builder(offsets=ids - torch.arange(3))
    children = builder.sample(builder.roots, _logits(width=3), num_children=1, num_top=2)
    assert sorted(_tokens(children[0])) == ids.tolist()
    proposal = builder.build()
    assert proposal.draft_probs.shape == (3, 1, 3)
    assert (proposal.draft_offsets + torch.arange(3)).tolist() == ids.tolist()


def test_deterministic_nodes_can_be_pruned_and_handles_stay_valid() -> None:
    builder = _builder()
    first = builder.add(builder.roots[0], 5)
    below = builder.add(first, 4)
    second = builder.add(builder.roots[0], 3)
    (drawn,) = builder.sample([second], _logits(1), num_children=1)[0]
    builder.prune([below, first])
    last = builder.add(drawn, 0)
    assert builder.path(last) == [1, 3, drawn.token, 0] and last.depth == 3
    proposal = builder.build()
    assert proposal.tree.tokens[0].tolist() == [1, 3, drawn.token, 0]
    assert proposal.tree.parents[0].tolist() == [-1, 0, 1, 2]
    assert proposal.draft_rows[0].tolist() == [-1, 0, -1, -1]


def _drawn(builder: ProposalBuilder) -> DraftNode:
    return builder.sample(builder.roots[:1], _logits(1), num_children=1)[0][0]


def _prune_above_a_sampled_node(builder: ProposalBuilder) -> None:
    guess = builder.add(builder.roots[0], 2)
    builder.sample([guess], _logits(1), num_children=1)
    builder.prune([guess])


def _draw_twice(builder: ProposalBuilder) -> None:
    _drawn(builder)
    builder.sample(builder.roots, _logits(), num_children=1)


def _draw_from_a_pruned_node(builder: ProposalBuilder) -> None:
    guess = builder.add(builder.roots[0], 2)
    builder.prune([guess])
    builder.sample([guess], _logits(1), num_children=1)


def _other_width(builder: ProposalBuilder) -> None:
    node = _drawn(builder)
    builder.sample([node], _logits(1, 5), num_children=1)


def _too_many_draws(builder: ProposalBuilder) -> None:
    builder._num_draws[0] = 2**31
    _drawn(builder)


def _after_build(builder: ProposalBuilder) -> None:
    root = builder.roots[0]
    builder.build()
    builder.add(root, 1)


NOWHERE = DraftNode(2, 0, 1, 0)
REFUSALS: dict[str, tuple[Callable[[ProposalBuilder], object], str]] = {
    "prune a sampled node": (
        lambda b: b.prune([_drawn(b)]),
        "row 0: node 1 was sampled and cannot be pruned: whether a sampled token is verified may",
    ),
    "prune above a sampled node": (_prune_above_a_sampled_node, "row 0: node 2 was sampled and"),
    "prune a root": (lambda b: b.prune(b.roots), "row 0: the root cannot be pruned"),
    "draw twice": (_draw_twice, "row 0: node 0 was drawn from before; draw all its children at"),
    "draw twice in a call": (
        lambda b: b.sample(b.roots[:1] * 2, _logits(), num_children=1),
        "row 0: node 0 was drawn from before",
    ),
    "a finished row": (
        lambda b: b.sample([NOWHERE], _logits(1), num_children=1), "row 2 has no such node 0"
    ),
    "another builder's node": (
        lambda b: b.sample([DraftNode(0, 4, 1, 1)], _logits(1), num_children=1),
        "row 0 has no such node 4",
    ),
    "a pruned node": (_draw_from_a_pruned_node, "row 0 has no such node 1"),
    "a token beyond the vocabulary": (
        lambda b: b.add(b.roots[1], VOCAB), r"row 1: a token must be in \[0, V\) = \[0, 6\), got 6"
    ),
    "a negative token": (lambda b: b.add(b.roots[1], -1), r"\[0, 6\), got -1"),
    "a draft vocabulary beyond the target's": (
        lambda b: b.sample(b.roots, _logits(2, 7), num_children=1), r"U <= V = 6, got \[2, 7\]"
    ),
    "one row of logits too few": (
        lambda b: b.sample(b.roots, _logits(1), num_children=1),
        r"logits must be \[R, U\] = \[2, 6\] .*, got \[1, 6\]",
    ),
    "another width than before": (_other_width, r"= \[1, 6\] .* got \[1, 5\]"),
    "no finite logit": (
        lambda b: b.sample(b.roots, _logits() * torch.nan, num_children=2),
        "row 0: the draft logits of node 0 have no finite value",
    ),
    "no finite logit beside top tokens": (
        lambda b: b.sample(b.roots, _logits() - torch.inf, num_children=1, num_top=2),
        "row 0: the draft logits of node 0 have no finite value",
    ),
    "no children": (
        lambda b: b.sample(b.roots, _logits(), num_children=0), "num_children must be >= 1 and .* 0"
    ),
    "temperature of another batch": (
        lambda b: b.sample(b.roots, _logits(), num_children=1, temperature=torch.ones(2)),
        r"temperature must be a number or \[B\] = \[3\], got \[2\]",
    ),
    "more draws than noise": (_too_many_draws, "too many draws in one step, got 2147483649"),
    "after build": (_after_build, "it is built; make a new builder for the next step"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_builder_refuses(name: str) -> None:
    act, message = REFUSALS[name]
    with pytest.raises(ValueError, match=f"proposal: .*{message}"):
        act(_builder())
