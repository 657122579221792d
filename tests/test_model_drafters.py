"""A draft model, and the target's first layers, as drafters: caches, laws, and lossless text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from byte_model import save_byte_model
from conftest import make_tiny_model
from draft_trees import TREES, similar_to
from prompts import greedy, left_pad, random_prompts
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import specdec_kernels
from specdec_kernels import (
    DraftContext,
    Drafter,
    ModelDrafter,
    SampledTree,
    SamplingParams,
    SpeculativeDecoder,
    TopKTree,
)
from specdec_kernels.hf import DraftModel, EarlyExitModel
from specdec_kernels.hf.attention import tree_attention_in
from specdec_kernels.hf.draft_model import assistant_drafter, check_same_vocabulary
from specdec_kernels.hf.early_exit import first_layers
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.growing import GrowingTarget
from specdec_kernels.hf.target import HFTarget

VOCAB, NEW = 101, 24
RULES = {
    "top-k": "walk", "chain": "block", "distinct": "traversal", "independent": "token",
    "greedy drafts": "gd_traversal",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[Tensor]:
    return random_prompts((21, 30, 26), VOCAB)


@pytest.fixture(scope="module")
def similar(tiny_model: PreTrainedModel) -> PreTrainedModel:
    return similar_to(tiny_model)


def _network(name: str, similar: PreTrainedModel) -> Any:
    return DraftModel(similar) if name == "draft" else EarlyExitModel(2)


def _new_tokens(output: Tensor, inputs: dict[str, Tensor]) -> list[list[int]]:
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["draft", "early exit"])
def test_greedy_equals_generate(tiny_model, similar, rows, name: str, tree: str) -> None:
    """Batch 1 and ragged 3."""
    want = [greedy(tiny_model, row, NEW)[len(row) :] for row in rows]
    drafter = ModelDrafter(_network(name, similar), TREES[tree])
    for chosen in ([0, 1, 2], [1]):
        inputs = left_pad([rows[i] for i in chosen])
        decoder = SpeculativeDecoder(drafter, budget=False)
        output = tiny_model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder
        )
        assert _new_tokens(output, inputs) == [want[i] for i in chosen]
        assert sum(decoder.stats.num_accepted) > 2 * len(chosen), "acceptance must be exercised"


@pytest.mark.parametrize("name", ["draft", "early exit"])
def test_sampled_rows_with_deterministic_trees_are_plain_sampling(
    tiny_model, similar, rows, name: str
) -> None:
    options = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": NEW}
    inputs = left_pad(rows)
    plain = tiny_model.generate(
        **inputs, custom_generate=SpeculativeDecoder(None, seed=[3, 4, 5]), **options
    )
    drafter = ModelDrafter(_network(name, similar), TREES["top-k"])
    decoder = SpeculativeDecoder(drafter, seed=[3, 4, 5], budget=False)
    assert tiny_model.generate(**inputs, custom_generate=decoder, **options).equal(plain)
    assert sum(decoder.stats.num_accepted) > 10


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["draft", "early exit"])
def test_sampled_rows_depend_on_their_seed_alone(
    tiny_model, similar, rows, name: str, tree: str
) -> None:
    options = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 8}

    def run(order: Sequence[int]) -> list[list[int]]:
        drafter = ModelDrafter(_network(name, similar), TREES[tree])
        decoder = SpeculativeDecoder(drafter, seed=list(order), rule=RULES[tree], budget=False)
        inputs = left_pad([rows[i] for i in order])
        output = tiny_model.generate(**inputs, custom_generate=decoder, **options)
        return _new_tokens(output, inputs)

    together = run([0, 1, 2])
    assert run([2, 0]) == [together[2], together[0]]


class _Audited(DraftModel):
    """Compares its cache with a fresh prefill at every step."""

    num_audits, worst = 0, 0.0

    def start(self, context: DraftContext) -> Tensor:
        logits = super().start(context)
        cache = self._cached.cache
        for row, sequence in enumerate(context.sequences):
            if not context.active[row]:
                continue
            length = int(cache.lengths[row])
            assert length == len(sequence) == self._known[row]
            fresh = HFTarget(self.model, length)
            want = fresh.prefill([list(sequence)])[0]
            pairs = [(logits[row], want)]
            for ours, theirs in zip(cache.tree_layers, fresh.cache.tree_layers, strict=True):
                pairs += [
                    (ours.keys[row, :, :length], theirs.keys[0, :, :length]),
                    (ours.values[row, :, :length], theirs.values[0, :, :length]),
                ]
            self.worst = max([self.worst, *(float((a - b).abs().max()) for a, b in pairs)])
            self.num_audits += 1
        return logits


def _audit(model: PreTrainedModel, draft: PreTrainedModel, rows: list[Tensor], tree: str) -> Any:
    network = _Audited(draft)
    decoder = SpeculativeDecoder(ModelDrafter(network, TREES[tree]), seed=[1, 2, 3], budget=False)
    model.generate(
        **left_pad(rows), max_new_tokens=NEW, do_sample=True, temperature=0.7,
        custom_generate=decoder,
    )  # fmt: skip
    assert sum(decoder.stats.num_accepted) > 5 and network.num_audits > 20
    return network


@pytest.mark.parametrize("tree", TREES)
def test_a_rejected_draft_leaves_the_draft_cache_exact(
    tiny_model, similar, rows, tree: str, report
) -> None:
    network = _audit(tiny_model, similar, rows, tree)
    report(f"draft cache after {tree}: {network.num_audits} audits, worst {network.worst:.1e}")
    assert network.worst < 2e-4


def test_a_cache_without_compaction_is_found(tiny_model, similar, rows, monkeypatch) -> None:
    def mutant(self: GrowingTarget, path: Tensor, kept: Tensor) -> None:
        self.cache.lengths += kept

    monkeypatch.setattr(GrowingTarget, "commit", mutant)
    assert _audit(tiny_model, similar, rows, "top-k").worst > 0.01


def _context(sequences: Sequence[Sequence[int]], **more: Any) -> DraftContext:
    made = {
        "active": [True] * len(sequences),
        "max_depths": [9] * len(sequences),
        "device": torch.device("cpu"),
        "vocab_size": VOCAB,
        "sampling": SamplingParams(),
        **more,
    }
    return DraftContext(sequences, **made)


def _fresh(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0, -1]


@torch.no_grad()
def test_missed_tokens_are_taken_in_by_one_forward_pass(tiny_model, similar, rows) -> None:
    """Row 0 missed ten tokens, of which it had drafted two; row 1 one; row 2 is finished."""
    texts = [row.tolist() for row in rows]
    network = DraftModel(similar)
    count = 0

    def forward(*_: object) -> None:
        nonlocal count
        count += 1

    view = HFTargetView(HFTarget(tiny_model, 99))
    hook = similar.register_forward_hook(forward)
    with network.attach(view):
        network.begin(3, 8)
        first = network.start(_context(texts))
        network.extend([[(5, -1), (6, -1)], [(7, -1)], [(8, -1)]])
        network.extend([[(9, 1)], [], [(9, 0)]])
        assert count == 3
        longer = [[*texts[0], 6, 9, *range(30, 38)], [*texts[1], 44], texts[2]]
        logits = network.start(_context(longer, active=[True, True, False]))
        assert count == 4
        deeper = network.extend([[(50, -1), (51, -1)], [(52, -1)], []])
    hook.remove()
    for got, tokens in (
        (first[0], texts[0]), (first[2], texts[2]), (logits[0], longer[0]), (logits[1], longer[1]),
        (deeper[0, 1], [*longer[0], 51]), (deeper[1, 0], [*longer[1], 52]),
    ):  # fmt: skip
        torch.testing.assert_close(got, _fresh(similar, tokens), rtol=0, atol=2e-4)


@torch.no_grad()
def test_early_exit_reads_the_target_s_cache_and_leaves_what_is_committed(tiny_model, rows) -> None:
    texts = [row.tolist() for row in rows]
    target = HFTarget(tiny_model, 60)
    network = EarlyExitModel(2)
    with tree_attention_in(tiny_model), network.attach(HFTargetView(target)):
        network.begin(3, 8)
        target.prefill(texts)
        before = [layer.keys.clone() for layer in target.cache.tree_layers]
        roots = [[*text, 17 + i] for i, text in enumerate(texts)]
        logits = network.start(_context(roots, active=[True, False, True]))
        deeper = network.extend([[(3, -1), (4, -1)], [], [(5, -1)]])
        deepest = network.extend([[(6, 0), (7, 1)], [], []])
    for layer, keys in zip(target.cache.tree_layers, before, strict=True):
        for row, text in enumerate(texts):
            assert layer.keys[row, :, : len(text)].equal(keys[row, :, : len(text)])
    shorter = first_layers(tiny_model, 2)
    assert len(tiny_model.get_decoder().layers) == 3, "the target keeps its layers"
    for got, tokens in (
        (logits[0], roots[0]), (logits[2], roots[2]), (deeper[0, 1], [*roots[0], 4]),
        (deeper[2, 0], [*roots[2], 5]), (deepest[0, 1], [*roots[0], 4, 7]),
    ):  # fmt: skip
        torch.testing.assert_close(got, _fresh(shorter, tokens), rtol=0, atol=2e-4)


def _other_architecture(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "initializer_range": 0.2, "bos_token_id": None}
    if name == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=96, **sizes)
        return GPT2LMHeadModel(config).eval()
    config = MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, **sizes,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_a_draft_model_may_have_another_architecture(tiny_model, rows, name: str) -> None:
    """Learned positions; a sliding window, in positions and not in slots."""
    draft = _other_architecture(name)
    network = _Audited(draft)
    decoder = SpeculativeDecoder(ModelDrafter(network, TREES["top-k"]), budget=False)
    inputs = left_pad(rows)
    output = tiny_model.generate(
        **inputs, max_new_tokens=12, do_sample=False, custom_generate=decoder
    )
    assert _new_tokens(output, inputs) == [greedy(tiny_model, r, 12)[len(r) :] for r in rows]
    assert network.worst < 2e-4
    inputs = left_pad(rows[:1])
    itself = ModelDrafter(EarlyExitModel(1), TREES["top-k"])
    draft.generation_config.eos_token_id = None
    if name == "mistral":
        want = draft.generate(**inputs, max_new_tokens=12, do_sample=False)
        got = draft.generate(
            **inputs, max_new_tokens=12, do_sample=False, custom_generate=SpeculativeDecoder(itself)
        )
        assert got.equal(want)


@torch.no_grad()
def test_the_law_handed_over_is_the_one_of_the_draft_model(tiny_model, similar, rows) -> None:
    texts = [row.tolist() for row in rows[:2]]
    sampling = SamplingParams(torch.tensor([5, 6]), torch.tensor([0.7, 1.3]))
    drafter = ModelDrafter(DraftModel(similar), SampledTree((2, 1), temperature=1.5, top_k=9))
    with drafter.attach(HFTargetView(HFTarget(tiny_model, 99))):
        drafter.begin(2)
        proposal = drafter.propose(_context(texts, sampling=sampling))
    tree = proposal.tree
    for row, text in enumerate(texts):
        tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
        assert len(tokens) == 5
        for node in (0, 1, 2):
            path = [tokens[node]] if node else []
            assert node == 0 or parents[node] == 0
            logits = _fresh(similar, [*text, *path]) / 1.5
            floor = logits.topk(9).values[-1]
            law = logits.masked_fill(logits < floor, -torch.inf).softmax(-1)
            got = proposal.draft_probs[row, proposal.draft_rows[row, node]]
            torch.testing.assert_close(got, law, rtol=0, atol=1e-5)


def test_a_model_itself_is_no_network(tiny_model) -> None:
    with pytest.raises(TypeError, match=r"hf.DraftModel\(model\) is, got LlamaForCausalLM"):
        ModelDrafter(tiny_model)


def test_a_drafter_says_what_it_is(similar) -> None:
    """For the records of benches."""
    named = {tree: str(ModelDrafter(EarlyExitModel(2), TREES[tree])) for tree in TREES}
    assert named["top-k"] == "EarlyExitModel, top-3, depth 4, 14 nodes"
    assert named["distinct"] == "EarlyExitModel, sampled 3-2-1"
    assert named["greedy drafts"] == "EarlyExitModel, greedy drafts 3-2-1"


def test_depth_and_length_limits_are_kept(tiny_model, similar, rows) -> None:
    for new in (1, 2, 3, 5):
        for tree in ("top-k", "distinct"):
            drafter = ModelDrafter(DraftModel(similar), TREES[tree])
            output = tiny_model.generate(
                **left_pad(rows[:1]), max_new_tokens=new, do_sample=False,
                custom_generate=SpeculativeDecoder(drafter, budget=False),
            )  # fmt: skip
            assert output[0].tolist() == greedy(tiny_model, rows[0], new)


def test_an_assistant_model_drafts_chains(tiny_model, similar, rows, monkeypatch) -> None:
    inputs = left_pad(rows)
    made: list[Drafter] = []
    init = SpeculativeDecoder.__init__

    def spy(self: SpeculativeDecoder, drafter: Drafter, **options: Any) -> None:
        made.append(drafter)
        init(self, drafter, **options)

    monkeypatch.setattr(SpeculativeDecoder, "__init__", spy)
    output = specdec_kernels.generate(
        tiny_model, **inputs, assistant_model=similar, num_assistant_tokens=3,
        max_new_tokens=10, do_sample=False,
    )  # fmt: skip
    assert _new_tokens(output, inputs) == [greedy(tiny_model, r, 10)[len(r) :] for r in rows]
    assert made[0].network.model is similar and made[0].tree.widths == (1, 1, 1)
    assert assistant_drafter(similar).tree.widths == (1,) * 5
    monkeypatch.setattr(similar.generation_config, "num_assistant_tokens", 7)
    assert assistant_drafter(similar).tree.widths == (1,) * 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_assistant_tokens": 0}, r"num_assistant_tokens must be >= 1, got 0"),
        ({"prompt_lookup_num_tokens": 3}, r"either assistant_model or prompt_lookup_num_tokens"),
        ({"assistant_model": None, "assistant_tokenizer": object()}, r"needs an assistant_model"),
    ],
)
def test_assistant_options_that_contradict_are_refused(
    tiny_model, similar, rows, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        specdec_kernels.generate(
            tiny_model, **left_pad(rows[:1]), max_new_tokens=4,
            **{"assistant_model": similar, **options},
        )  # fmt: skip


def test_another_vocabulary_is_refused(tiny_model, rows, tmp_path) -> None:
    small = make_tiny_model()
    small.resize_token_embeddings(90)
    message = r"draft model LlamaForCausalLM has a vocabulary of 90 tokens, the target .* has 101"
    with pytest.raises(ValueError, match=message):
        specdec_kernels.generate(
            tiny_model, **left_pad(rows[:1]), assistant_model=small, max_new_tokens=4
        )
    save_byte_model(tmp_path)
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path) for _ in range(2))
    check_same_vocabulary(ours, theirs)
    theirs.add_tokens(["<more>"])
    message = r"another tokenizer than the target: token '<more>' is 259 there and absent here"
    with pytest.raises(ValueError, match=message):
        DraftModel(small, tokenizers=(ours, theirs))


def test_a_vocabulary_that_is_only_padded_differently_is_taken(
    tiny_model, similar, rows, tmp_path
) -> None:
    """The tokenizers agree; the draft model has fewer, or more, unused rows."""
    save_byte_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for size in (97, 120):
        draft = copy.deepcopy(similar)
        draft.resize_token_embeddings(size)
        network = DraftModel(draft, tokenizers=(tokenizer, tokenizer))
        for tree in ("top-k", "greedy drafts"):
            decoder = SpeculativeDecoder(ModelDrafter(network, TREES[tree]), budget=False)
            output = tiny_model.generate(
                **left_pad(rows[:1]), max_new_tokens=12, do_sample=False, custom_generate=decoder
            )
            assert output[0].tolist() == greedy(tiny_model, rows[0], 12)
            assert sum(decoder.stats.num_accepted) > 2


@pytest.mark.parametrize("layers", [0, 3])
def test_an_exit_layer_outside_the_model_is_refused(tiny_model, rows, layers: int) -> None:
    decoder = SpeculativeDecoder(ModelDrafter(EarlyExitModel(layers)))
    with pytest.raises(ValueError, match=rf"exit layer must be in \[1, 2\] .*got {layers}"):
        tiny_model.generate(**left_pad(rows[:1]), max_new_tokens=4, custom_generate=decoder)


def test_a_text_beyond_the_draft_model_s_positions_is_decoded_plainly(tiny_model, rows) -> None:
    draft = _other_architecture("gpt2")
    decoder = SpeculativeDecoder(ModelDrafter(DraftModel(draft)))
    long = left_pad([torch.cat([rows[0]] * 5)])
    with pytest.warns(RuntimeWarning, match=r"GPT2LMHeadModel has 96 positions, got a text of 106"):
        output = tiny_model.generate(**long, max_new_tokens=4, custom_generate=decoder)
    assert torch.equal(output, tiny_model.generate(**long, max_new_tokens=4, do_sample=False))
    assert decoder.stats.num_failures >= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKTree(0), r"TopKTree: max_nodes, depth and width must be >= 1, got 0"),
        (lambda: SampledTree(()), r"SampledTree: widths must be >= 1, got \[\]"),
        (lambda: SampledTree((2, 0)), r"widths must be >= 1, got \[2, 0\]"),
        (
            lambda: SampledTree((2,), greedy_drafts=True, replacement=True),
            r"greedy_drafts draw one token",
        ),
        (lambda: SpeculativeDecoder("draft"), r"drafter 'draft' needs a network: pass ModelDraft"),
    ],
)
def test_a_tree_that_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
