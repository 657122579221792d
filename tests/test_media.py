"""Images and sounds in the prompt: the text is `generate`'s, drafts or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prompts import left_pad, random_prompts
from tiny_media import IMAGE, KINDS, PLANS, media_inputs, media_prompts, tiny_media_model
from tiny_models import VOCAB, tiny_model
from torch import Tensor
from transformers import CONFIG_MAPPING, LlamaForCausalLM

from specdec_kernels import (
    ModelDrafter,
    OracleDrafter,
    SampledTree,
    SpeculativeDecoder,
    generate,
)
from specdec_kernels.hf import DraftModel, EarlyExitModel, support
from specdec_kernels.hf.architectures import WITH_MEDIA, support_rows
from specdec_kernels.hf.attention import tree_attention_in
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.media import Media
from specdec_kernels.hf.target import HFTarget

NEW = 12
_USUAL = """
llava llava_onevision idefics3 gemma3 qwen2_5_vl qwen3_vl qwen2_audio
"""
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
INSTALLED = sorted(set(KINDS) & set(CONFIG_MAPPING))
"""The oldest transformers that is supported lacks a few."""


def _written(output: Tensor, inputs: dict[str, Any]) -> list[list[int]]:
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def _oracle(model: Any, inputs: dict[str, Any], prompts: list[Tensor]) -> OracleDrafter:
    """Hides the true text among distractors."""
    longer = GREEDY | {"max_new_tokens": NEW + 8}
    truth = _written(model.generate(**inputs, **longer), inputs)
    texts = [[*p.tolist(), *t] for p, t in zip(prompts, truth, strict=True)]
    return OracleDrafter(texts, VOCAB, max_nodes=16)


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in _USUAL.split() else pytest.mark.exhaustive)
        for name in INSTALLED
    ],
)
def test_a_ragged_batch_with_images_is_exact(model_type: str) -> None:
    model = tiny_media_model(model_type)
    own = model.config._attn_implementation
    prompts = media_prompts(model_type, *PLANS)
    inputs = media_inputs(model_type, prompts)
    want = _written(model.generate(**inputs, **GREEDY), inputs)
    other = media_inputs(model_type, prompts, seed=3)
    assert _written(model.generate(**other, **GREEDY), other) != want, "images must matter"
    for drafter in (_oracle(model, inputs, prompts), "auto", None):
        decoder = SpeculativeDecoder(drafter)
        got = model.generate(**inputs, **GREEDY, custom_generate=decoder)
        assert _written(got, inputs) == want
        if isinstance(drafter, OracleDrafter):
            assert decoder.stats.tokens_per_step > 2, "the drafter must exercise acceptance"
    assert model.config._attn_implementation == own

    words = left_pad(random_prompts((9, 5), VOCAB, seed=3))
    words["input_ids"][words["input_ids"] == IMAGE] += 4
    want = model.generate(**words, **GREEDY)
    assert model.generate(**words, **GREEDY, custom_generate=SpeculativeDecoder()).equal(want)


def test_every_type_in_the_table_is_tested() -> None:
    assert set(KINDS) == WITH_MEDIA
    said = dict(support_rows())
    assert {name for name, what in said.items() if "with images" in what} == set(INSTALLED)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "gemma3"])
def test_other_drafters_and_steps_write_the_same(model_type: str) -> None:
    """A draft model reads tokens alone; the first layers share the target's cache."""
    model = tiny_media_model(model_type)
    inputs = media_inputs(model_type, media_prompts(model_type, *PLANS))
    want = model.generate(**inputs, **GREEDY)
    draft = tiny_model("llama")
    for drafter in (ModelDrafter(DraftModel(draft)), ModelDrafter(EarlyExitModel(2))):
        assert generate(model, **inputs, **GREEDY, drafter=drafter).equal(want)
    assert generate(model, **inputs, **GREEDY, compile="eager").equal(want)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "gemma3"])
@torch.no_grad()
def test_heads_see_the_hidden_states_of_images(model_type: str) -> None:
    model = tiny_media_model(model_type)
    prompts = media_prompts(model_type, *PLANS)
    prompts[-1] = prompts[-1][:-1]  # ends with an image, which padding must not go on with
    inputs = media_inputs(model_type, prompts)
    ids = inputs.pop("input_ids")
    positions = model._prepare_position_ids_for_generation(ids, inputs)
    mask = inputs.pop("attention_mask")
    options = {"output_hidden_states": True, "position_ids": positions}
    want = model(ids, attention_mask=mask, **options, **inputs).hidden_states[-1]
    rows = [prompt.tolist() for prompt in prompts]
    target = HFTarget(model, 40, media=Media.of(inputs, positions, rows))
    with tree_attention_in(model), HFTargetView(target).watch() as features:
        target.prefill(rows)
        got = features.take()
    assert [len(states) for states in got] == [len(row) for row in rows]
    for states, whole, row in zip(got, want, rows, strict=True):
        torch.testing.assert_close(states, whole[-len(row) :], rtol=1e-4, atol=1e-4)


def test_the_first_layers_draft_where_the_target_is() -> None:
    """Behind an image, too: where the last layer changes nothing, all that they draft is right."""
    model = tiny_media_model("qwen2_5_vl")
    last = model.model.language_model.layers[-1]
    torch.nn.init.zeros_(last.self_attn.o_proj.weight)
    torch.nn.init.zeros_(last.mlp.down_proj.weight)
    inputs = media_inputs("qwen2_5_vl", media_prompts("qwen2_5_vl", (3, 6), (4, 2)))
    decoder = SpeculativeDecoder(ModelDrafter(EarlyExitModel(2), SampledTree([1, 1, 1])))
    model.generate(**inputs, **GREEDY | {"max_new_tokens": 13}, custom_generate=decoder)
    assert decoder.stats.num_accepted == decoder.stats.num_drafted == [9, 9]


def test_sampled_rows_follow_their_seeds() -> None:
    model = tiny_media_model("qwen3_vl")
    prompts = media_prompts("qwen3_vl", (3, 6), (4, 2))
    inputs = media_inputs("qwen3_vl", prompts)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.9}
    options |= {"num_return_sequences": 2, "seed": 5}
    plain = generate(model, **inputs, **options, drafter=None)
    drafted = generate(
        model, **inputs, **options, drafter=ModelDrafter(DraftModel(tiny_model("llama")))
    )
    assert drafted.equal(plain)
    assert not plain[0].equal(plain[1])


def test_positions_behind_an_image_are_not_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six tokens of an image lie in two rows of three: what follows is three positions behind."""
    model = tiny_media_model("qwen2_5_vl")
    inputs = media_inputs("qwen2_5_vl", media_prompts("qwen2_5_vl", (3, 6), (4, 2)))
    want = model.generate(**inputs, **GREEDY)
    made = []
    of = Media.of

    def without(*args: Any) -> Media:
        made.append(of(*args))
        return Media(made[0].inputs, made[0].positions, None)

    monkeypatch.setattr(Media, "of", without)
    assert not generate(model, **inputs, **GREEDY).equal(want)
    assert made[0].offsets.tolist() == [[0, 0]] + [[-3, -3]] * 3


def test_a_conversation_goes_on_with_its_images_only() -> None:
    """Tokens do not tell images apart, so nothing of the cache is kept."""
    model = tiny_media_model("llava")
    (prompt,) = media_prompts("llava", (3, 6))
    inputs = media_inputs("llava", [prompt])
    first = generate(model, **inputs, **GREEDY, return_dict_in_generate=True)
    longer = torch.cat([first.sequences[0], torch.tensor([30, 40, 50])])
    name = next(name for name in ("cache", "past_key_values") if name in first)
    cache = first[name]
    again = media_inputs("llava", [longer], seed=1)
    want = model.generate(**again, **GREEDY)
    assert generate(model, **again, **GREEDY, **{name: cache}).equal(want)
    alone = media_inputs("llava", [longer], media=False)
    with pytest.raises(ValueError, match="holds images or sounds, whose tokens alone say nothing"):
        generate(model, **alone, **GREEDY, **{name: cache})


def test_images_of_other_types_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_media_model("llava")
    inputs = media_inputs("llava", media_prompts("llava", (3, 6)))
    monkeypatch.setattr(support, "WITH_MEDIA", WITH_MEDIA - {"llava"})
    with pytest.raises(ValueError, match=r"LlavaForCond.* reads them in a way .* (mm_enc|pixel)"):
        generate(model, **inputs, **GREEDY)


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4"])
def test_kinds_of_tokens_say_nothing_where_all_are_words(model_type: str) -> None:
    """Processors give them for text alone, too."""
    model = tiny_model(model_type)
    words = left_pad(random_prompts((9, 5), VOCAB, seed=3))
    name = "token_type_ids" if model_type == "gemma3" else "mm_token_type_ids"
    words[name] = torch.zeros_like(words["input_ids"])
    assert generate(model, **words, **GREEDY).equal(model.generate(**words, **GREEDY))


class _HandsItOn(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        self.has_asked = "logits_to_keep" in kwargs or getattr(self, "has_asked", False)
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


class _AnswersWithAll(LlamaForCausalLM):
    def forward(
        self, input_ids: Tensor, position_ids: Any = None, logits_to_keep: Any = 0, **kwargs: Any
    ) -> Any:
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


class _IsNotAsked(LlamaForCausalLM):
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        given = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        return super().forward(input_ids, position_ids=position_ids, **given)


class _AnswersForAllRows(LlamaForCausalLM):
    """As models of older transformers do, and those that come with their code."""

    def forward(
        self, input_ids: Tensor, position_ids: Any = None, logits_to_keep: Any = 0, **kwargs: Any
    ) -> Any:
        out = super().forward(input_ids, position_ids=position_ids, **kwargs)
        if isinstance(logits_to_keep, Tensor):
            out.logits = out.logits[:, logits_to_keep]
        return out


@pytest.mark.parametrize("own", [_HandsItOn, _AnswersWithAll, _IsNotAsked, _AnswersForAllRows])
@pytest.mark.parametrize("lengths", [(9,), (9, 7, 8), (19, 3, 8)])
def test_models_that_compute_the_logits_of_other_places(
    own: type[LlamaForCausalLM], lengths: tuple[int, ...]
) -> None:
    like = tiny_model("llama")
    model = own(like.config).eval()
    model.load_state_dict(like.state_dict())
    model.generation_config = like.generation_config
    inputs = left_pad(random_prompts(lengths, VOCAB))
    want = like.generate(**inputs, **GREEDY)
    for drafter in ("auto", ModelDrafter(DraftModel(model))):
        assert generate(model, **inputs, **GREEDY, drafter=drafter).equal(want)
    assert getattr(model, "has_asked", True), "no prompt needs all of its logits"
