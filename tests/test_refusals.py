"""Bad input: one clear error, and the user's model left as it was found."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from conftest import make_tiny_model
from prompts import left_pad, random_prompts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import specdec_kernels
from specdec_kernels import (
    DraftContext,
    Drafter,
    OracleDrafter,
    PromptLookupDrafter,
    Proposal,
    RowDrafter,
    SpeculativeDecoder,
    Verified,
)
from specdec_kernels.hf import DraftModel

VOCAB = 101
INPUTS = left_pad(random_prompts((8, 5), VOCAB))


def _tiny(model_type: str, **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def _generate(model: PreTrainedModel, **options: object) -> torch.Tensor:
    return model.generate(
        **{**INPUTS, "max_new_tokens": 6, "custom_generate": SpeculativeDecoder(), **options}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, r"num_beams must be 1 with speculation, got 3"),
        ({"max_new_tokens": 0}, r"max_new_tokens"),
        ({"output_attentions": True}, r"output_attentions=True is not supported"),
        ({"guidance_scale": 1.5}, r"logits processor UnbatchedClassifierFreeGuidance\w+ is not"),
        (
            {"attention_mask": torch.zeros_like(INPUTS["attention_mask"])},
            r"row 0 of the batch is empty",
        ),
        (
            {"attention_mask": INPUTS["attention_mask"].flip(1)},
            r"attention_mask of row 1 must be 0s, then 1s up to the last column",
        ),
    ],
)
def test_requests_that_cannot_be_exact(tiny_model, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _generate(tiny_model, **options)
    assert tiny_model.config._attn_implementation == "sdpa"


def test_a_model_in_double_precision() -> None:
    """Before anything runs; as a draft model, too."""
    model = make_tiny_model().double()
    message = "LlamaForCausalLM is refused: its dtype must be .* or float32, got float64"
    with pytest.raises(ValueError, match=message):
        _generate(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match=message):
        DraftModel(model)


def test_an_empty_prompt(tiny_model) -> None:
    empty = torch.zeros((1, 0), dtype=torch.int64)
    with pytest.raises(ValueError, match="row 0 of the batch is empty"):
        _generate(tiny_model, input_ids=empty, attention_mask=empty)


def test_a_prompt_longer_than_the_positions(tiny_model) -> None:
    long = torch.ones((1, 300), dtype=torch.int64)
    with pytest.raises(
        ValueError, match="row 0 has 300 tokens, more than the model's 256 positions"
    ):
        _generate(tiny_model, input_ids=long, attention_mask=long)


def test_input_embeddings(tiny_model) -> None:
    embeddings = tiny_model.get_input_embeddings()(INPUTS["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds is not supported"):
        tiny_model.generate(
            inputs_embeds=embeddings, max_new_tokens=4, custom_generate=SpeculativeDecoder()
        )


def test_a_cache_that_already_holds_tokens(tiny_model) -> None:
    cache = DynamicCache()
    tiny_model(INPUTS["input_ids"][:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match="a DynamicCache that holds tokens cannot be continued"):
        _generate(tiny_model, past_key_values=cache)


def test_an_encoder_decoder() -> None:
    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = 0
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        _generate(model)


def test_recurrent_layers() -> None:
    model = _tiny("mamba", hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match=r"MambaForCausalLM has .* rolled back"):
        _generate(model)


def test_an_architecture_that_ignores_registered_attention() -> None:
    model = _tiny("bloom", hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="BloomForCausalLM computes attention itself and ignores"):
        _generate(model)


def test_logits_without_a_finite_value() -> None:
    model = make_tiny_model()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ArithmeticError, match="row 0: the target's logits have no finite value"):
        _generate(model)


def test_seeds_must_fit_the_batch(tiny_model) -> None:
    with pytest.raises(ValueError, match="seed must be an int or one per row = 2, got 3"):
        _generate(tiny_model, do_sample=True, custom_generate=SpeculativeDecoder(seed=[1, 2, 3]))


class _Fixed(RowDrafter):
    """Proposes the same draft tokens and parents at every step."""

    def __init__(self, tokens: list[int], parents: list[int], max_nodes: int = 8) -> None:
        self.tokens, self.parents, self.max_nodes = tokens, parents, max_nodes

    def propose_row(self, row: int, sequence: Sequence[int], max_depth: int):
        return self.tokens, self.parents


class _WrongRoot(Drafter):
    max_nodes = 4

    def propose(self, context: DraftContext) -> Proposal:
        return Proposal.onehot([([0], [-1]) for _ in context.sequences])


class _WrongParents(Drafter):
    """Goes round the checks of `TokenTree.from_rows`."""

    max_nodes = 4

    def propose(self, context: DraftContext) -> Proposal:
        proposal = Proposal.onehot([([s[-1], 5, 6], [-1, 0, 0]) for s in context.sequences])
        proposal.tree.parents[:, 1] = 2
        return proposal


class _WrongSizes(Drafter):
    """The same."""

    max_nodes = 4

    def propose(self, context: DraftContext) -> Proposal:
        proposal = Proposal.onehot([([s[-1], 5, 6], [-1, 0, 0]) for s in context.sequences])
        proposal.tree.num_nodes[:] = -1
        return proposal


class _Raises(Drafter):
    """Breaks down in each of its methods."""

    max_nodes = 4

    def begin(self, batch: int) -> None:
        raise RuntimeError("no begin")

    def propose(self, context: DraftContext) -> Proposal:
        raise KeyError("lost")

    def observe(self, verified: Verified) -> None:
        raise ZeroDivisionError("of course")

    def end(self, sequences, num_prompt) -> None:
        raise OSError("disk")


class _Nothing(Drafter):
    max_nodes = 4

    def propose(self, context: DraftContext) -> Proposal:
        return None


FAILING = [
    (_Fixed([VOCAB], [0]), r"row 0: tokens\[1\] must be in \[0, V\) = \[0, 101\), got 101"),
    (_Fixed([-1], [0]), r"row 0: tokens\[1\] must be in \[0, V\) = \[0, 101\), got -1"),
    (_Fixed([5, 6], [0, 2]), r"tree: row 0: parents\[2\] must be in \[0, 2\), got 2"),
    (_Fixed([5, 6], [0]), r"tree: row 0 must have one parent per token, got 3 tokens"),
    (_Fixed([5] * 8, [0] * 8), r"tree.tokens must be \[B, N\] .* max_nodes = 8, got \[2, 9\]"),
    (_WrongRoot(), r"row 0: node 0 must be the last committed token"),
    (_WrongParents(), r"row 0: parents\[1\] must be in \[0, 1\), got 2"),
    (_WrongSizes(), r"tree: row 0: num_nodes must be in \[0, 3\], got -1"),
    (_Nothing(), r"TypeError: propose must return a Proposal, got NoneType"),
]


@pytest.mark.parametrize(("drafter", "message"), FAILING)
def test_a_drafter_that_proposes_no_tree_is_reported_and_decoded_without(
    tiny_model, drafter: Drafter, message: str
) -> None:
    decoder = SpeculativeDecoder(drafter)
    name = type(drafter).__name__
    with pytest.warns(RuntimeWarning, match=rf"{name} failed at step 1, .* plainly: .*{message}"):
        output = _generate(tiny_model, custom_generate=decoder)
    assert output.tolist() == tiny_model.generate(**INPUTS, max_new_tokens=6).tolist()
    failure = decoder.stats.failures[0]
    assert (failure.step, failure.drafter) == (1, name) and re.search(message, failure.error)
    assert decoder.stats.num_failures == max(decoder.stats.num_steps) == 5
    assert sum(decoder.stats.num_drafted) == 0


def test_a_drafter_that_raises_everywhere_is_reported_and_decoded_without(tiny_model) -> None:
    decoder = SpeculativeDecoder(_Raises())
    with pytest.warns(RuntimeWarning, match="_Raises failed at step 0, .* RuntimeError: no begin"):
        output = _generate(tiny_model, custom_generate=decoder)
    assert output.tolist() == tiny_model.generate(**INPUTS, max_new_tokens=6).tolist()
    errors = [failure.error for failure in decoder.stats.failures]
    assert errors[:4] == [
        "RuntimeError: no begin",
        "ZeroDivisionError: of course",
        "KeyError: 'lost'",
        "ZeroDivisionError: of course",
    ]
    assert errors[-1] == "OSError: disk"


@pytest.mark.parametrize("make", [PromptLookupDrafter, lambda n: OracleDrafter([], 9, max_nodes=n)])
def test_a_tree_needs_room_for_its_root(make) -> None:
    with pytest.raises(ValueError, match=r"Drafter: max_nodes must be >= 1 \(the root\), got 0"):
        make(0)


def test_arguments_of_generate_that_cannot_be_combined(tiny_model) -> None:
    with pytest.raises(ValueError, match="stop_strings needs the tokenizer"):
        specdec_kernels.generate(tiny_model, **INPUTS, max_new_tokens=4, stop_strings=["a"])
    with pytest.raises(ValueError, match=r"drafter must be one of auto, .*, none, .* got 'fast'"):
        specdec_kernels.generate(tiny_model, **INPUTS, max_new_tokens=4, drafter="fast")
