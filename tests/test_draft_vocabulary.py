"""A draft model whose vocabulary is a part of the target's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from draft_trees import TREES, similar_to
from prompts import greedy, left_pad, random_prompts
from torch import Tensor
from transformers import PreTrainedModel

from specdec_kernels import DraftContext, ModelDrafter, SpeculativeDecoder
from specdec_kernels.drafting import GREEDY
from specdec_kernels.hf import DraftModel
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.target import HFTarget
from specdec_kernels.shapes import PAD

VOCAB, NEW = 101, 24


@pytest.fixture(scope="module")
def rows() -> list[Tensor]:
    return random_prompts((21, 30, 26), VOCAB)


@pytest.fixture(scope="module")
def similar(tiny_model: PreTrainedModel) -> PreTrainedModel:
    return similar_to(tiny_model)


def _trimmed(similar: PreTrainedModel, ids: list[int]) -> PreTrainedModel:
    """The model with these tokens, and one for all others that has their mean embedding."""
    draft = copy.deepcopy(similar)
    draft.resize_token_embeddings(len(ids) + 1)
    for layer, old in (
        (draft.get_input_embeddings(), similar.get_input_embeddings()),
        (draft.get_output_embeddings(), similar.get_output_embeddings()),
    ):
        layer.weight.data[:-1] = old.weight.data[ids]
        layer.weight.data[-1] = old.weight.data.mean(0)
    return draft


@pytest.mark.parametrize("tree", TREES)
def test_a_draft_model_with_a_vocabulary_of_its_own(tiny_model, similar, rows, tree: str) -> None:
    wants = [greedy(tiny_model, row, NEW)[len(row) :] for row in rows]
    written = [token for want in wants for token in want]
    ids = sorted({*written, *range(0, VOCAB, 3)} - {written[4]}, reverse=True)
    drafts: list[int] = []

    class Watched(ModelDrafter):
        def propose(self, context: DraftContext) -> Any:
            proposal = super().propose(context)
            for row in proposal.tree.tokens.tolist():
                drafts.extend(row[1:])
            return proposal

    network = DraftModel(_trimmed(similar, ids), ids=torch.tensor(ids))
    inputs = left_pad(rows)
    decoder = SpeculativeDecoder(Watched(network, TREES[tree]), budget=False)
    output = tiny_model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder
    )
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == wants
    assert decoder.stats is not None and not decoder.stats.num_failures
    assert sum(decoder.stats.num_accepted) > 6
    assert set(drafts) <= {*ids, PAD, 0} and written[4] not in drafts


def test_a_vocabulary_of_its_own_reads_other_tokens_as_one(tiny_model, similar, rows) -> None:
    """Drafts after them are those of the whole model with that embedding."""
    ids = [token for token in range(VOCAB) if token % 4]
    trimmed = _trimmed(similar, ids)
    mixed = copy.deepcopy(similar)
    mixed.get_input_embeddings().weight.data[::4] = similar.get_input_embeddings().weight.data.mean(
        0
    )
    logits = []
    sequence = rows[0].tolist()
    context = DraftContext([sequence], [True], [9], torch.device("cpu"), VOCAB, GREEDY)
    view = HFTargetView(HFTarget(tiny_model, capacity=1))
    for network in (DraftModel(trimmed, ids=torch.tensor(ids)), DraftModel(mixed)):
        with torch.no_grad(), network.attach(view):
            network.begin(1, 2)
            first = network.start(context)
            logits.append((first, network.extend([[(ids[5], PAD), (8, PAD)]])))
    for own, whole in zip(*logits, strict=True):
        assert own.shape[-1] == len(ids)
        torch.testing.assert_close(own, whole[..., ids], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (range(99), r"ids must be \[100\], one fewer than its vocabulary, got \[99\]"),
        ([*range(99), 5], "ids must be distinct and >= 0"),
        ([-1, *range(99)], "ids must be distinct and >= 0"),
        ([*range(99), 777], "drafts token 777, the target LlamaForCausalLM has 101"),
    ],
)
def test_a_wrong_draft_vocabulary_is_refused(tiny_model, similar, rows, ids, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(
            **left_pad(rows[:1]), max_new_tokens=4,
            custom_generate=SpeculativeDecoder(
                ModelDrafter(DraftModel(similar, ids=torch.tensor(list(ids))))
            ),
        )  # fmt: skip
