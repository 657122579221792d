"""Prompts and trees of different sizes in one pass: what the layers compute, and that nobody else
notices.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from specdec_kernels import Budget, DraftContext, Drafter, Proposal
from specdec_kernels.drafting import SamplingParams
from specdec_kernels.hf.attention import Localities, by_rows, handing, tree_attention_in
from specdec_kernels.hf.cache import TreeCache
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.fusing import fast_layers
from specdec_kernels.hf.ragged import Ragged
from specdec_kernels.hf.target import HFTarget
from specdec_kernels.proposing import Proposer
from specdec_kernels.shapes import PAD
from specdec_kernels.statistics import DecodeStats
from specdec_kernels.tree import TokenTree

PROMPTS = [[5, 6, 7], [8, 9], [1, 2, 3, 4], [11]]
TREES = [([7, 1, 2, 3], [PAD, 0, 0, 1]), ([9], [PAD]), ([], []), ([11, 4], [PAD, 0])]
LATER = [([2, 5], [PAD, 0]), ([3, 4, 5], [PAD, 0, 0]), ([], []), ([4], [PAD])]


def test_joined_rows_come_apart_again() -> None:
    ragged = Ragged.of(torch.tensor([2, 0, 3], dtype=torch.int32), 3)
    assert ragged is not None
    rows = torch.arange(18).view(3, 3, 2)
    joined = ragged.join(rows)
    assert joined[0, :, 0].tolist() == [0, 2, 12, 14, 16]
    for row, size in ((0, 2), (2, 3)):
        assert torch.equal(ragged.split(joined)[row, :size], rows[row, :size])
    assert Ragged.of(torch.tensor([3, 3], dtype=torch.int32), 3) is None
    ended = Ragged.of(torch.tensor([0, 2], dtype=torch.int32), 2)  # nothing lies before its padding
    assert ended is not None
    assert torch.equal(ended.split(ended.join(rows[:2, :2]))[1], rows[1, :2])


class _Pads(HFTarget):
    pads = True


def _passes(model: Any, kind: type[HFTarget]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Logits and features of the real tokens in a prefill and two steps, and the shapes that the
    layers saw.
    """
    logits: list[Tensor] = []
    features: list[Tensor] = []
    shapes: list[Any] = []
    target = kind(model, 20)
    view = HFTargetView(target)
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(tree_attention_in(model))
        stack.enter_context(fast_layers(model))
        hook = model.model.norm.register_forward_hook(
            lambda *x: shapes.append(tuple(x[1][0].shape))
        )
        stack.callback(hook.remove)
        queue = stack.enter_context(view.watch([1]))
        last = stack.enter_context(view.watch(only_last=True))
        logits += target.prefill(PROMPTS)
        features += [*queue.take(), *last.take()]
        for trees, kept in ((TREES, [2, 1, 0, 1]), (LATER, [2, 2, 0, 1])):
            scores = target.forward(TokenTree.from_rows(trees))
            logits += [scores[b, : len(tokens)] for b, (tokens, _) in enumerate(trees)]
            path = torch.tensor([[0, 1, 0, 0]] * 4, dtype=torch.int32)[:, : scores.shape[1]]
            target.commit(path.contiguous(), torch.tensor(kept, dtype=torch.int32))
            features += [*queue.take(), *last.take()]
    return logits, features, [shape[:2] for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_computes_no_padding_and_its_rows_what_they_would_alone(dtype: torch.dtype) -> None:
    model = make_tiny_model().to(dtype).requires_grad_(False)
    padded, joined = _passes(model, _Pads), _passes(model, HFTarget)
    assert padded[2] == [(4, 4), (4, 4), (4, 3)] and joined[2] == [(1, 10), (1, 7), (1, 6)]
    exact = 1e-5 if dtype == torch.float32 else 0.05
    for ours, own in zip([*joined[0], *joined[1]], [*padded[0], *padded[1]], strict=True):
        torch.testing.assert_close(ours, own, rtol=exact, atol=exact)


_SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "initializer_range"}  # fmt: skip


@pytest.mark.parametrize("window", [None, 3])
@torch.no_grad()
def test_a_cache_is_continued_without_padding(window: int | None) -> None:
    """Rows go on from what the cache holds of them, each by another number of tokens."""
    model = make_tiny_model()
    if window is not None:
        sizes = {k: v for k, v in model.config.to_dict().items() if k in _SIZES}
        model = MistralForCausalLM(MistralConfig(sliding_window=window, **sizes)).eval()
    longer = [[*PROMPTS[0], 1, 2, 3, 4, 5, 6, 7], [8, 9, 3], [*PROMPTS[2], 5], [11, 12, 13]]
    for prompts in (PROMPTS, longer):
        rows = [model(torch.tensor([row])).logits[0, -1] for row in prompts]
        fresh = HFTarget(model, 20)
        with tree_attention_in(model):
            torch.testing.assert_close(fresh.prefill(prompts), torch.stack(rows), rtol=0, atol=5e-5)
    cache = TreeCache(model, 4)
    with tree_attention_in(model):
        for prompts in (PROMPTS, longer):
            logits = HFTarget(model, 20, cache).prefill(prompts)
            cache.hold(prompts)
            cache.is_in_use = True
    torch.testing.assert_close(logits, torch.stack(rows), rtol=0, atol=5e-5)


def test_who_wants_rows_gets_padding() -> None:
    target = HFTarget(make_tiny_model(), 20)
    assert not target.pads

    class Watcher:
        wants_all, wants_rows = False, True

    target.watchers.append(Watcher())  # type: ignore[arg-type]
    assert target.pads
    model = make_tiny_model()
    model.register_forward_hook(lambda *_: None)
    assert not HFTarget(model, 20).pads, "whoever calls the whole model"
    model.model.layers[1].register_forward_pre_hook(lambda *_: None)
    assert HFTarget(model, 20).pads
    assert HFTarget(make_tiny_model(), 64, compile="eager").pads


class _Three(Drafter):
    """Three nodes for the first row, one for the last."""

    max_nodes = 3

    def propose(self, context: DraftContext) -> Proposal:
        rows = [([2, 7, 8], [PAD, 0, 1]), ([], []), ([5], [PAD])]
        return Proposal.onehot(rows, context.device)


class _Spy(Budget):
    def record(self, **what: Any) -> None:
        self.seen = what


@pytest.mark.parametrize(("pads", "computed", "plain"), [(False, 4, 2), (True, 9, 3)])
def test_the_budget_pays_for_what_is_computed(pads: bool, computed: int, plain: int) -> None:
    budget = _Spy()
    sampling = SamplingParams(torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    context = DraftContext(
        [[1, 2], [3], [4, 5]], [True, False, True], [5, 0, 5], torch.device("cpu"), 20, sampling,
        budget, pads,
    )  # fmt: skip
    proposer = Proposer(_Three(), DecodeStats.start(3), budget)
    proposer.begin(3)
    proposer.record(proposer.propose(context), 1, 0.02, pads=pads)
    seen = budget.seen
    assert (seen["running"], seen["computed"], seen["plain"]) == (2, computed, plain)


def test_rows_are_joined_in_a_pass_only() -> None:
    ragged = Ragged.of(torch.tensor([1, 0], dtype=torch.int32), 1)
    computed = torch.ones(1, 1, 2)
    with handing(Localities(), ragged):
        assert by_rows(computed).shape == (2, 1, 2)
    assert by_rows(computed) is computed
