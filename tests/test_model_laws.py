"""Sampled text of real networks over five tokens: the joint law is the target's, whoever drafts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from head_checkpoints import save_eagle3, save_medusa
from laws import chi_square
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import specdec_kernels.drafting as drafting
from specdec_kernels import DraftNetwork, ModelDrafter, SampledTree, SamplingParams, load_heads
from specdec_kernels.decoding import decode
from specdec_kernels.hf import DraftModel, EarlyExitModel
from specdec_kernels.hf.attention import tree_attention_in
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.target import HFTarget

VOCAB, SIZE, NUM, ROWS = 5, 16, 3, 1000
PROMPT = [1, 3, 0]

# network, tree, rule
CASES = {
    "draft model, chain": ("draft", SampledTree((1, 1)), "block"),
    "draft model, distinct": ("draft", SampledTree((2, 2)), "traversal"),
    "early exit, greedy drafts": ("exit", SampledTree((3, 2), greedy_drafts=True), "gd_traversal"),
    "medusa, independent": ("medusa", SampledTree((2, 1), replacement=True), "token"),
    "eagle-3 over three tokens": ("eagle-3", SampledTree((2, 1), temperature=1.5), None),
}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=SIZE, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _network(name: str, target: PreTrainedModel, folder: Path) -> DraftNetwork:
    if name == "exit":
        return EarlyExitModel(2)
    if name == "draft":
        draft = copy.deepcopy(target)
        draft.get_input_embeddings().weight.data *= 1.5
        return DraftModel(draft)
    if name == "medusa":
        save_medusa(folder, SIZE, VOCAB)
    else:
        save_eagle3(folder, SIZE, VOCAB, 3)
    return load_heads(folder)


@torch.no_grad()
def _exact_law(target: PreTrainedModel) -> Tensor:
    """Joint law of the next NUM tokens, [V] * NUM float64."""
    prefixes = torch.cartesian_prod(*[torch.arange(VOCAB)] * (NUM - 1))
    ids = torch.cat([torch.tensor([PROMPT] * len(prefixes)), prefixes], 1)
    laws = target(ids).logits[:, len(PROMPT) - 1 :].double().softmax(-1)
    joint = laws[:, -1].reshape([VOCAB] * NUM)
    for i in range(NUM - 1):
        along = laws[:, i].gather(1, prefixes[:, i : i + 1]).reshape([VOCAB] * (NUM - 1))
        joint = joint * along[..., None]
    return joint


def _measure(target: PreTrainedModel, name: str, folder: Path) -> tuple[float, float, int]:
    kind, tree, rule = CASES[name]
    drafter = ModelDrafter(_network(kind, target, folder), tree)
    cached = HFTarget(target, 40)
    with tree_attention_in(target), drafter.attach(HFTargetView(cached)):
        sequences, stats = decode(
            cached,
            drafter,
            [PROMPT] * ROWS,
            max_lengths=[12] * ROWS,
            should_stop=lambda row, sequence: len(sequence) == len(PROMPT) + NUM,
            sampling=SamplingParams(torch.arange(ROWS), torch.ones(ROWS)),
            rule=rule,
        )
    emitted = torch.tensor(sequences)[:, len(PROMPT) :]
    return *chi_square(emitted, _exact_law(target)), sum(stats.num_accepted)


@pytest.mark.parametrize("name", CASES)
def test_the_joint_law_of_three_tokens_is_the_target_s(
    target, tmp_path: Path, name: str, report
) -> None:
    measured, bound, num_accepted = _measure(target, name, tmp_path)
    report(f"joint law of 3 tokens, {name}: chi-square {measured:.0f}, bound {bound:.0f}")
    assert num_accepted > ROWS / 4
    assert measured < bound


def test_a_law_that_was_not_sampled_is_found(target, tmp_path: Path, report, monkeypatch) -> None:
    sample = drafting.sample

    def mutant(logits: Tensor, **options: object):
        tokens, status, _ = sample(logits, **options)
        hotter = {**options, "temperature": options["temperature"] * 4}
        return tokens, status, sample(logits, **hotter)[2]

    monkeypatch.setattr(drafting, "sample", mutant)
    measured, bound, _ = _measure(target, "draft model, chain", tmp_path)
    report(f"planted, another law of a draft model: chi-square {measured:.0f}, bound {bound:.0f}")
    assert measured > bound
