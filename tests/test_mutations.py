"""Known mistakes, planted one at a time: the equality test of generation must catch each."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from prompts import greedy, left_pad, random_prompts
from torch import Tensor
from transformers import PreTrainedModel

import specdec_kernels.decoding as decoding
import specdec_kernels.hf.target as target
import specdec_kernels.ops.tree_attention  # noqa: F401 - the module behind the operator of that name
from specdec_kernels import OracleDrafter, SpeculativeDecoder
from specdec_kernels.hf.attention import tree_attention_in
from specdec_kernels.hf.cache import TreeCache, TreeCacheLayer
from specdec_kernels.hf.target import HFTarget
from specdec_kernels.ops.tree_mask import tree_mask
from specdec_kernels.shapes import num_words

NEW = 40
VOCAB = 101


def _bits(seen: Tensor) -> Tensor:
    """[B, N, N] bool -> ancestor words."""
    batch, nodes, _ = seen.shape
    words = torch.zeros((batch, nodes, num_words(nodes)), dtype=torch.int64)
    for j in range(nodes):
        words[:, :, j // 64] |= seen[:, :, j].long() << j % 64
    return words


def _no_compaction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TreeCache, "commit", lambda self, path, kept: self.lengths.add_(kept))


def _chain_mask(patch: pytest.MonkeyPatch) -> None:
    def mutant(parents: Tensor, num_nodes: Tensor) -> tuple[Tensor, Tensor]:
        _, depths = tree_mask(parents, num_nodes)
        nodes = parents.shape[1]
        seen = torch.ones((nodes, nodes), dtype=torch.bool).tril()
        return _bits(seen.expand(len(parents), -1, -1)), depths

    patch.setattr(target, "tree_mask", mutant)


def _self_and_parent_mask(patch: pytest.MonkeyPatch) -> None:
    def mutant(parents: Tensor, num_nodes: Tensor) -> tuple[Tensor, Tensor]:
        _, depths = tree_mask(parents, num_nodes)
        index = torch.arange(parents.shape[1])
        seen = (index == index[:, None]) | (index == parents[:, :, None])
        return _bits(seen), depths

    patch.setattr(target, "tree_mask", mutant)


def _node_index_as_position(patch: pytest.MonkeyPatch) -> None:
    def mutant(parents: Tensor, num_nodes: Tensor) -> tuple[Tensor, Tensor]:
        ancestors, depths = tree_mask(parents, num_nodes)
        return ancestors, torch.arange(parents.shape[1], dtype=torch.int32).expand_as(depths)

    patch.setattr(target, "tree_mask", mutant)


def _stale_slots(patch: pytest.MonkeyPatch) -> None:
    """Every row sees the slots up to the longest row's length, left over from older trees."""
    module = sys.modules["specdec_kernels.ops.tree_attention"]
    visible = module._visible

    def mutant(ancestors, depths, lengths, num_nodes, slots, window):
        seen = visible(ancestors, depths, lengths, num_nodes, slots, window)
        return seen | (slots < lengths.max())[:, None]

    def written(like: Tensor, capacity: int) -> Tensor:  # else it may be NaN, and `decode` raises
        return like.new_ones((*like.shape[:2], capacity, like.shape[3]))

    patch.setattr(TreeCacheLayer, "_buffer", staticmethod(written))
    patch.setenv("SPECDEC_BACKEND", "reference")
    patch.setattr(module, "_visible", mutant)


def _last_token_hidden(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: HFTarget, prompts: list[list[int]]) -> Tensor:
        logits = prefill(self, prompts)
        self.cache.lengths -= 1
        return logits

    prefill = HFTarget.prefill
    patch.setattr(HFTarget, "prefill", mutant)


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no compaction": _no_compaction,
    "chain mask instead of ancestors": _chain_mask,
    "self and parent only": _self_and_parent_mask,
    "node index instead of depth as position": _node_index_as_position,
    "stale slots": _stale_slots,
    "last committed token missing": _last_token_hidden,
}


@pytest.fixture(scope="module")
def rows() -> list[Tensor]:
    return random_prompts((21, 30, 26), VOCAB)


@pytest.fixture(scope="module")
def truth(tiny_model: PreTrainedModel, rows: list[Tensor]) -> list[list[int]]:
    return [greedy(tiny_model, row, NEW + 8) for row in rows]


def _num_equal(model: PreTrainedModel, rows: list[Tensor], truth: list[list[int]]) -> int:
    inputs = left_pad(rows)
    decoder = SpeculativeDecoder(OracleDrafter(truth, VOCAB, max_nodes=16))
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder)
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    wanted = [t[len(r) : len(r) + NEW] for t, r in zip(truth, rows, strict=True)]
    return sum(a == b for a, b in zip(new, wanted, strict=True))


def test_without_a_mutation_every_row_is_equal(tiny_model, rows, truth) -> None:
    assert _num_equal(tiny_model, rows, truth) == len(rows)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_changes_the_output(tiny_model, rows, truth, name, monkeypatch) -> None:
    MUTATIONS[name](monkeypatch)
    assert _num_equal(tiny_model, rows, truth) < len(rows)


def _committed(model: PreTrainedModel, rows: list[Tensor], truth: list[list[int]]) -> bool:
    """Whether the cache ends with exactly the tokens of each sequence, but for its last one."""
    drafter = OracleDrafter(truth, VOCAB, max_nodes=16, max_hidden=9)
    prompts = [r.tolist() for r in rows]
    ends = [len(p) + 7 for p in prompts]
    with tree_attention_in(model):
        cached = HFTarget(model, max(ends) + 40)
        sequences, _ = decoding.decode(
            cached,
            drafter,
            prompts,
            max_lengths=[end + 20 for end in ends],
            should_stop=lambda row, sequence: len(sequence) == ends[row],
        )
    assert [len(s) for s in sequences] == ends
    return cached.cache.lengths.tolist() == [end - 1 for end in ends]


def test_commit_after_the_stop_rules_keeps_the_cache_and_the_text_together(
    tiny_model, rows, truth, monkeypatch
) -> None:
    assert _committed(tiny_model, rows, truth)
    push = decoding._push_step

    def crop_after_commit(rows, stats, tree, emitted):
        push(rows, stats, tree, emitted)
        sizes = tree.sizes()
        return [len(nodes) if size else 0 for (nodes, _), size in zip(emitted, sizes, strict=True)]

    monkeypatch.setattr(decoding, "_push_step", crop_after_commit)
    assert not _committed(tiny_model, rows, truth)
