"""Every causal architecture of transformers: exact, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prompts import left_pad, random_prompts
from tiny_models import VOCAB, tiny_model
from transformers import CONFIG_MAPPING, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specdec_kernels import ModelDrafter, OracleDrafter, SpeculativeDecoder, TopKTree
from specdec_kernels.cli import main
from specdec_kernels.hf import EarlyExitModel, support
from specdec_kernels.hf.architectures import (
    EXACT,
    REFUSED,
    WITH_MEDIA,
    support_rows,
    why_refused,
)
from specdec_kernels.hf.attention import tree_attention_in
from specdec_kernels.hf.cache import TreeCacheLayer
from specdec_kernels.hf.dense_attention import visible_slots
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.locality import Locality
from specdec_kernels.hf.support import decoder_of
from specdec_kernels.hf.target import HFTarget

NEW = 12
_USUAL = """
llama qwen2 mistral gemma2 gemma3 gemma3n_text gpt2 gptj phi3 opt cohere2 smollm3 deepseek_v3
gpt_oss llama4_text gpt_bigcode stablelm nemotron modernbert-decoder
"""
INSTALLED = EXACT & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The oldest transformers that is supported lacks a few."""
USUAL = [name for name in _USUAL.split() if name in INSTALLED]
"""Run by default: every mechanism is among them."""


def _check(model_type: str) -> None:
    """A ragged batch with the true text hidden among distractors is equal to `generate`."""
    model = tiny_model(model_type)
    rows = random_prompts((9, 14, 11), VOCAB)
    options = {"do_sample": False}
    truth = [
        model.generate(**left_pad([r]), max_new_tokens=NEW + 8, **options)[0].tolist() for r in rows
    ]
    decoder = SpeculativeDecoder(OracleDrafter(truth, VOCAB, max_nodes=16))
    inputs = left_pad(rows)
    output = model.generate(**inputs, max_new_tokens=NEW, custom_generate=decoder, **options)
    want = [t[len(r) : len(r) + NEW] for t, r in zip(truth, rows, strict=True)]
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == want
    assert decoder.stats.tokens_per_step > 2, "the drafter must exercise acceptance"
    assert "specdec" not in str(model.config._attn_implementation)


@pytest.mark.parametrize("model_type", USUAL)
def test_a_usual_architecture_is_exact(model_type: str) -> None:
    _check(model_type)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", sorted(INSTALLED - set(USUAL)))
def test_another_architecture_is_exact(model_type: str) -> None:
    _check(model_type)


def test_every_causal_architecture_is_exact_or_refused() -> None:
    assert len(USUAL) >= len(_USUAL.split()) - 1  # gptj came later
    assert {name for name, _ in support_rows()} - WITH_MEDIA == (
        set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - WITH_MEDIA
    )
    assert not EXACT & set(REFUSED)
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - EXACT - set(REFUSED) == set()


@pytest.mark.parametrize(
    "model_type", sorted(set(REFUSED) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
)
def test_a_refused_type_has_its_reason(model_type: str) -> None:
    assert why_refused(CONFIG_MAPPING[model_type]) == REFUSED[model_type]


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bart", "BartForCausalLM is refused: it counts positions itself"),
        ("doge", "DogeForCausalLM is refused: its attention picks keys by a mask of its own"),
        ("xglm", "XGLMForCausalLM computes attention itself"),
        ("lfm2", "Lfm2ForCausalLM is refused: its recurrent or convolutional layers"),
    ],
)
def test_a_refused_architecture_says_why(model_type: str, message: str) -> None:
    model = tiny_model(model_type)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        model.generate(
            **left_pad(random_prompts((5,), VOCAB)),
            max_new_tokens=4,
            custom_generate=SpeculativeDecoder(),
        )
    assert model.config._attn_implementation == before


def test_a_type_that_is_not_in_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """kosmos-2.5 looks like the others, and writes something else; a user's own class is free."""

    class Own(LlamaForCausalLM):
        pass

    model = tiny_model("llama")
    own = Own(model.config)
    options = {"max_new_tokens": 3, "custom_generate": SpeculativeDecoder()}
    inputs = left_pad(random_prompts((5,), VOCAB))
    monkeypatch.setattr(support, "EXACT", EXACT - {"llama"})
    with pytest.raises(ValueError, match="LlamaForCausalLM is refused: its type llama is not amo"):
        model.generate(**inputs, **options)
    own.generate(**inputs, **options)


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in {*USUAL, "llama4"} else pytest.mark.exhaustive)
        for name in sorted(INSTALLED)
    ],
)
@torch.no_grad()
def test_heads_see_the_last_hidden_states(model_type: str) -> None:
    model = tiny_model(model_type)
    text = random_prompts((9,), VOCAB)[0].tolist()
    positions = torch.arange(9)[None]
    out = model(torch.tensor([text]), position_ids=positions, output_hidden_states=True)
    target = HFTarget(model, 20)
    view = HFTargetView(target)
    with tree_attention_in(model), view.watch() as features:
        target.prefill([text])
        (got,) = features.take()
    if model_type in ("gemma3n_text", "hrm_text"):  # what they call hidden states is of other sizes
        assert view.logits(got).argmax(-1).equal(out.logits[0].argmax(-1))
    else:
        torch.testing.assert_close(got, out.hidden_states[-1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gemma3", "opt", "llama4_text", "cohere2", "deepseek_v3"])
def test_the_first_layers_draft(model_type: str) -> None:
    """Wherever in the model its decoder is."""
    model = tiny_model(model_type)
    _check_early_exit(model)
    assert len(decoder_of(model).layers) == 3


def _check_early_exit(model: Any) -> None:
    decoder = SpeculativeDecoder(ModelDrafter(EarlyExitModel(2), TopKTree(8)), budget=False)
    inputs = left_pad(random_prompts((9, 14), VOCAB))
    options = {"max_new_tokens": NEW, "do_sample": False}
    output = model.generate(**inputs, custom_generate=decoder, **options)
    assert output.equal(model.generate(**inputs, **options))
    assert decoder.stats.num_failures == 0 and all(decoder.stats.num_drafted)


@pytest.mark.parametrize("model_type", ["llama", "modernbert-decoder"])
def test_the_first_layers_draft_with_their_adapters(model_type: str) -> None:
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(model_type), config).eval()
    assert decoder_of(model) is decoder_of(model.get_base_model())
    _check_early_exit(model)


def test_windows_matter_at_these_lengths() -> None:
    """Without its window a model writes something else, so the tests above would notice."""
    rows = random_prompts((14,), VOCAB)
    for name, option in (("mistral", "sliding_window"), ("llama4_text", "attention_chunk_size")):
        local = tiny_model(name)
        wide = tiny_model(name, **{option: 200})
        texts = [
            m.generate(**left_pad(rows), max_new_tokens=NEW, do_sample=False)[0].tolist()
            for m in (local, wide)
        ]
        assert texts[0] != texts[1], name


def test_chunks_and_windows_are_in_positions() -> None:
    """A chain of four nodes behind nine slots, checked by hand."""

    class Call:
        ancestors = torch.tensor([[[0b0001], [0b0011], [0b0111], [0b1111]]])
        depths = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
        lengths = torch.tensor([9], dtype=torch.int32)
        num_nodes = torch.tensor([4], dtype=torch.int32)

    chunks = visible_slots(Call, 14, Locality(chunk=5))[0].int().tolist()
    assert chunks[0] == [0] * 5 + [1] * 5 + [0] * 4  # position 9 is the last of its chunk
    assert chunks[1] == [0] * 10 + [1] + [0] * 3
    window = visible_slots(Call, 14, Locality(window=3))[0].int().tolist()
    assert window[2] == [0] * 9 + [1] * 3 + [0] * 2


@pytest.mark.parametrize("model_type", ["llama4_text", "gemma2", "gpt_oss", "deepseek_v3"])
def test_slots_that_nobody_wrote_may_hold_anything(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch, where trees of different sizes are padded."""
    buffer = TreeCacheLayer._buffer
    poisoned = staticmethod(lambda like, capacity: buffer(like, capacity).fill_(torch.nan))
    monkeypatch.setattr(TreeCacheLayer, "_buffer", poisoned)
    monkeypatch.setattr(HFTarget, "pads", True)
    model = tiny_model(model_type)
    rows = random_prompts((9, 14, 11), VOCAB)
    inputs = left_pad(rows)
    options = {"max_new_tokens": NEW, "do_sample": False}
    decoder = SpeculativeDecoder("auto", budget=False)
    output = model.generate(**inputs, custom_generate=decoder, **options)
    new = output[:, inputs["input_ids"].shape[1] :]
    for row, tokens in zip(rows, new, strict=True):
        assert tokens.equal(model.generate(**left_pad([row]), **options)[0, len(row) :])


def test_texts_that_change_the_rotary_angles_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_model("llama", max_position_embeddings=20, rope_parameters=rope)
    inputs = left_pad(random_prompts((9,), VOCAB))
    decoder = SpeculativeDecoder()
    with pytest.raises(
        ValueError, match=r"dynamic rotary positions change .* 20 tokens, .* got 29"
    ):
        model.generate(**inputs, max_new_tokens=20, custom_generate=decoder)
    model.generate(**inputs, max_new_tokens=11, custom_generate=decoder)


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--models"]) == 0
    out = capsys.readouterr().out
    assert "gpt_oss" in out and "exact" in out and "rolled back" in out
    assert main(["env", "--models", "--json"]) == 0
    assert '"llama": "exact"' in capsys.readouterr().out
