"""Models that PEFT or a quantizer has changed: the same text, or refused."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from conftest import make_tiny_model
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from prompts import left_pad, random_prompts

import specdec_kernels
from specdec_kernels import ModelDrafter, SpeculativeDecoder, TopKTree
from specdec_kernels.hf import DraftModel
from specdec_kernels.hf.support import check_model

PROMPTS = random_prompts((11, 17, 6), 101)
INPUTS = left_pad(PROMPTS) | {"max_new_tokens": 24, "do_sample": False}


def _adapted(config: PeftConfig) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(make_tiny_model(), config, adapter_name="a").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".a" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
        LoraConfig(r=4, target_modules=["embed_tokens", "o_proj"]),
        LoraConfig(r=4, target_modules="all-linear", use_dora=True),
        TrainableTokensConfig(token_indices=PROMPTS[0][-2:]),
    ],
    ids=["lora", "lora-embeddings", "dora", "trainable-tokens"],
)
def test_adapters_are_part_of_the_model(config: PeftConfig) -> None:
    model = _adapted(config)
    expected = model.generate(**INPUTS)
    assert not torch.equal(expected, make_tiny_model().generate(**INPUTS))
    assert torch.equal(specdec_kernels.generate(model, **INPUTS), expected)
    assert torch.equal(model.generate(**INPUTS), expected)
    drafts = ModelDrafter(DraftModel(model), TopKTree(6))
    decoder = SpeculativeDecoder(drafts, budget=False)
    assert torch.equal(model.generate(**INPUTS, custom_generate=decoder), expected)
    assert decoder.stats.tokens_per_step > 2.5  # it is its own draft model


def test_merged_adapters_are_seen_in_weights_that_were_packed_before() -> None:
    """PEFT adds them through `weight.data`, which changes no version."""
    model = _adapted(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    decoder = SpeculativeDecoder(pack=True)
    base = make_tiny_model().generate(**INPUTS)

    def check(model: torch.nn.Module) -> torch.Tensor:
        expected = model.generate(**INPUTS)
        assert torch.equal(model.generate(**INPUTS, custom_generate=decoder), expected)
        return expected

    with model.disable_adapter():
        assert torch.equal(check(model), base)
    model.merge_adapter()
    assert not torch.equal(check(model), base)
    model.unmerge_adapter()
    check(model)
    check(model.merge_and_unload())


def test_rows_have_adapters_of_their_own() -> None:
    model = _adapted(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    model.add_adapter("b", LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False))
    names = {"adapter_names": ["a", "b", "__base__"]}
    expected = model.generate(**INPUTS, **names)
    ends = {"eos_token_id": int(expected[1, 24])}  # so that row 1 ends before the others
    for options in ({}, ends):
        expected = model.generate(**INPUTS, **names, **options)
        output = model.generate(**INPUTS, **names, **options, custom_generate=SpeculativeDecoder())
        assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "virtual tokens"),
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "virtual tokens"),
        (
            LoraConfig(
                target_modules=["q_proj"], alora_invocation_tokens=[5, 7], task_type="CAUSAL_LM"
            ),
            "activated LoRA counts tokens from the end",
        ),
    ],
    ids=["prompt-tuning", "prefix-tuning", "activated-lora"],
)
def test_adapters_that_read_the_prompt_are_refused(config: PeftConfig, message: str) -> None:
    model = _adapted(config)
    expected = model.generate(**INPUTS)
    with pytest.raises(ValueError, match=f"LlamaForCausalLM is refused: .*{message}"):
        specdec_kernels.generate(model, **INPUTS)
    assert torch.equal(model.generate(**INPUTS), expected)


def test_inputs_that_somebody_else_prepares_are_refused() -> None:
    model = make_tiny_model()
    model.prepare_inputs_for_generation = model.prepare_inputs_for_generation  # as PEFT leaves it
    expected = model.generate(**INPUTS)
    assert torch.equal(specdec_kernels.generate(model, **INPUTS), expected)

    def shifted(self, input_ids, attention_mask=None, **inputs):
        inputs["attention_mask"] = attention_mask
        return type(model).prepare_inputs_for_generation(self, input_ids + 1, **inputs)

    model.prepare_inputs_for_generation = MethodType(shifted, model)
    with pytest.raises(ValueError, match=r"shifted stands in for its prepare_inputs_for_gen"):
        specdec_kernels.generate(model, **INPUTS)
    check_model(model.model)  # has no such method, and needs none


def test_scales_of_whole_batches_are_refused() -> None:
    model = make_tiny_model()
    quantize = torch.ao.quantization.quantize_dynamic
    with pytest.warns(DeprecationWarning, match="torch.ao.quantization"):
        model = quantize(model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="quantize all tokens of a pass by one scale"):
        specdec_kernels.generate(model, **INPUTS)
