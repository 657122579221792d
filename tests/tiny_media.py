"""Tiny random models that read images or sounds, and prompts with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from prompts import left_pad
from tiny_models import ENCODER_SIZES, VOCAB, tiny_config
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

IMAGE, VIDEO, START, END = 5, 6, 7, 8
PLANS = ((3, 2, 4), (9,), (5, 0))
"""Words around the images of three prompts: of two images, none, and one at the end."""
_FIRST_WORD = 20

_VISION: dict[str, Any] = ENCODER_SIZES | {"num_hidden_layers": 2}
_GRID_VISION: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 16,
    "hidden_size": 16,
    "num_heads": 2,
    "mlp_ratio": 2,
    "intermediate_size": 16,
    "out_hidden_size": 32,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "fullatt_block_indexes": [1],
    "window_size": 56,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "image_size": 56,
}
_AUDIO: dict[str, Any] = ENCODER_SIZES | {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_position_embeddings": 8,
}
_ROWS_AND_COLUMNS = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "mrope_section": [2, 1, 1],
    "partial_rotary_factor": 1.0,
}
_GRID = (1, 4, 6)
"""Frames, rows and columns of patches, four of which are a token."""


def _around(
    text: str,
    encoder: str | None = None,
    projected: int = 16,
    ahead: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    vision = _VISION | ({} if encoder is None else {"model_type": encoder})
    vision["projection_dim"] = projected
    config = tiny_config(text).to_dict()
    if ahead is not None:
        config["use_bidirectional_attention"] = ahead
    return {
        "text_config": config,
        "vision_config": vision,
        "image_token_id": IMAGE,
        "image_token_index": IMAGE,
        "tie_word_embeddings": False,
        **options,
    }


def _in_a_grid(text: str, **options: Any) -> dict[str, Any]:
    config = tiny_config(text, rope_parameters=_ROWS_AND_COLUMNS).to_dict()
    return {
        "text_config": config | {"rope_parameters": _ROWS_AND_COLUMNS},
        "vision_config": _GRID_VISION | {"hidden_size": 32 if text == "qwen2_vl_text" else 16},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        **options,
    }


def _hears(text: str, **options: Any) -> dict[str, Any]:
    return {"text_config": tiny_config(text).to_dict(), "audio_config": _AUDIO, **options}


def _pixels(*shape: int, **others: Any) -> Callable[[int, torch.Generator], dict[str, Any]]:
    def make(num: int, generator: torch.Generator) -> dict[str, Any]:
        values = torch.randn((num, *shape), generator=generator) * 2.0
        return {"pixel_values": values, **{k: torch.tensor([v] * num) for k, v in others.items()}}

    return make


def _patches(num: int, generator: torch.Generator) -> dict[str, Any]:
    patches = torch.randn((num * _GRID[1] * _GRID[2], 3 * 2 * 14 * 14), generator=generator) * 2.0
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([_GRID] * num)}


def _placed(num: int, generator: torch.Generator) -> dict[str, Any]:
    patches = torch.rand((num, 36, 3 * 14 * 14), generator=generator)
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(num, -1, -1)
    return {"pixel_values": patches, "image_position_ids": places}


def _mel(num: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_features": torch.randn((num, 8, 16), generator=generator) * 2.0}


_PLAIN = _pixels(3, 28, 28)
_TILES = _pixels(1, 3, 28, 28)
_SIZED = _pixels(3, 28, 28, image_sizes=[28, 28])
_TWO = _pixels(2, 3, 28, 28, image_sizes=[28, 28])
_POINTS: dict[str, Any] = {"image_grid_pinpoints": [[28, 28]], "vision_feature_layer": -1}
_FOUR: dict[str, Any] = {"vision_feature_layer": -1, "image_seq_length": 4}

Kind = tuple[Callable[[], dict[str, Any]], int, Callable[[int, torch.Generator], dict[str, Any]]]
KINDS: dict[str, Kind] = {
    "aria": (
        lambda: _around("aria_text", "idefics3_vision", projector_patch_to_query_dict={4: 3}),
        3,
        _PLAIN,
    ),
    "aya_vision": (lambda: _around("cohere2", "siglip_vision_model"), 1, _PLAIN),
    "cohere2_vision": (lambda: _around("cohere2", "siglip_vision_model"), 1, _PLAIN),
    "deepseek_vl": (lambda: _around("llama"), 4, _PLAIN),
    "gemma3": (
        lambda: _around("gemma3_text", "siglip_vision_model", mm_tokens_per_image=4),
        4,
        _PLAIN,
    ),
    "gemma4": (
        lambda: (
            _around("gemma4_text", "gemma4_vision", ahead="vision")
            | {"boi_token_id": START, "eoi_token_id": END, "video_token_id": VIDEO}
        ),
        4,
        _placed,
    ),
    "glm46v": (lambda: _in_a_grid("glm4v_text"), 6, _patches),
    "glm4v": (lambda: _in_a_grid("glm4v_text"), 6, _patches),
    "glm4v_moe": (lambda: _in_a_grid("glm4v_moe_text"), 6, _patches),
    "glm_ocr": (lambda: _in_a_grid("glm_ocr_text"), 6, _patches),
    "idefics2": (
        lambda: _around(
            "mistral",
            perceiver_config={
                "hidden_size": 32,
                "resampler_n_latents": 3,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
        ),
        3,
        _TILES,
    ),
    "idefics3": (lambda: _around("llama", scale_factor=2), 1, _TILES),
    "internvl": (lambda: _around("qwen2"), 1, _PLAIN),
    "janus": (lambda: _around("llama", "janus_vision_model", projected=32), 4, _PLAIN),
    "lighton_ocr": (lambda: _around("qwen3", "pixtral", spatial_merge_size=1), 4, _SIZED),
    "llava": (lambda: _around("llama", "clip_vision_model", **_FOUR), 4, _PLAIN),
    "llava_next": (lambda: _around("mistral", "clip_vision_model", **_POINTS), 10, _TWO),
    "llava_next_video": (
        lambda: _around("llama", "clip_vision_model", video_token_index=VIDEO, **_POINTS),
        10,
        _TWO,
    ),
    "llava_onevision": (
        lambda: _around("qwen2", "siglip_vision_model", video_token_index=VIDEO, **_POINTS),
        10,
        _TWO,
    ),
    "mistral3": (
        lambda: _around("mistral", "pixtral", spatial_merge_size=1, vision_feature_layer=-1),
        4,
        _SIZED,
    ),
    "qwen2_5_omni_thinker": (
        lambda: _in_a_grid("qwen2_5_omni_text", audio_config=_AUDIO, image_token_index=IMAGE),
        6,
        _patches,
    ),
    "qwen2_5_vl": (lambda: _in_a_grid("qwen2_5_vl_text"), 6, _patches),
    "qwen2_audio": (lambda: _hears("qwen2", audio_token_index=IMAGE), 4, _mel),
    "qwen2_vl": (lambda: _in_a_grid("qwen2_vl_text"), 6, _patches),
    "qwen3_vl": (lambda: _in_a_grid("qwen3_vl_text"), 6, _patches),
    "qwen3_vl_moe": (lambda: _in_a_grid("qwen3_vl_moe_text"), 6, _patches),
    "smolvlm": (lambda: _around("llama", scale_factor=2), 1, _TILES),
    "video_llava": (
        lambda: _around(
            "llama", "clip_vision_model", video_token_index=VIDEO, video_seq_length=4, **_FOUR
        ),
        4,
        _PLAIN,
    ),
    "vipllava": (
        lambda: _around(
            "llama", "clip_vision_model", vision_feature_layers=[0, 1], image_seq_length=4
        ),
        4,
        _PLAIN,
    ),
    "voxtral": (lambda: _hears("llama", audio_token_id=IMAGE), 8, _mel),
}
"""Model type -> its configuration, tokens of an image, and images."""


def tiny_media_model(model_type: str) -> Any:
    """A random model in float32, whose text depends on what it sees."""
    torch.manual_seed(0)
    config = type(AutoConfig.for_model(model_type))(**KINDS[model_type][0]())
    sees = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    of_its_kind = AutoModelForImageTextToText if sees else AutoModelForMultimodalLM
    model = of_its_kind.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.3)
        elif not bool(parameter.isfinite().all()):  # what is made empty
            parameter.data.zero_()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def media_prompts(model_type: str, *plans: Sequence[int]) -> list[Tensor]:
    """Prompts [P]: so many words, an image, so many words, and so on."""
    generator = torch.Generator().manual_seed(0)
    image = torch.tensor([START, *[IMAGE] * KINDS[model_type][1], END])
    prompts = []
    for plan in plans:
        words = [torch.randint(_FIRST_WORD, VOCAB, (num,), generator=generator) for num in plan]
        parts = [part for some in words for part in (some, image)]
        prompts.append(torch.cat(parts[:-1]))
    return prompts


def media_inputs(
    model_type: str, prompts: Sequence[Tensor], seed: int = 0, *, media: bool = True
) -> dict[str, Any]:
    """Arguments of `generate` for a batch, as a processor makes them."""
    inputs = left_pad(prompts)
    kinds = (inputs["input_ids"] == IMAGE).long()
    if model_type == "gemma3":
        inputs["token_type_ids"] = kinds
    elif model_type == "gemma4" or (
        "image_grid_thw" in images(model_type, 1) and "omni" not in model_type
    ):
        inputs["mm_token_type_ids"] = kinds
    starts = int((inputs["input_ids"] == START).sum())
    return inputs | (images(model_type, starts, seed) if media else {})


def images(model_type: str, num: int, seed: int = 0) -> dict[str, Any]:
    """So many images or sounds, as the model takes them."""
    made = KINDS[model_type][2](num, torch.Generator().manual_seed(seed))
    if model_type == "video_llava":
        made["pixel_values_images"] = made.pop("pixel_values")
    if model_type == "qwen2_audio":
        made["feature_attention_mask"] = torch.ones((num, 16), dtype=torch.long)
    return made
