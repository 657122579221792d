"""What cannot be exact is refused, before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .cache import CACHE_KEYWORDS

_RECURRENT = ("linear", "mamba", "conv", "recurrent", "ssm", "rwkv")
_HANDLED_INPUTS = {
    "attention_mask",
    "position_ids",
    *CACHE_KEYWORDS,
    "use_cache",
    "logits_to_keep",
}
_WARPERS = {  # in the order in which `verify` applies them: class -> (parameter, attribute)
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError unless `model` is a decoder whose whole state is a key/value cache."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; only decoder-only models are supported")
    config = model.config.get_text_config(decoder=True)
    layer_types = getattr(config, "layer_types", None) or []
    recurrent = [t for t in layer_types if any(word in t for word in _RECURRENT)]
    if recurrent or model._is_stateful:
        what = f"{recurrent[0]} layers" if recurrent else "a recurrent state"
        raise ValueError(f"{name} has {what}, which cannot be rolled back to the accepted branch")


def check_request(
    config: GenerationConfig, input_ids: Tensor, model_inputs: Mapping[str, Any]
) -> None:
    """Raise ValueError for generation modes and inputs that cannot be exact."""
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams must be 1 with speculation, got {config.num_beams}")
    for option in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, option, None):
            raise ValueError(f"{option}=True is not supported with speculation")
    if model_inputs.get("inputs_embeds") is not None or input_ids.dim() != 2:
        raise ValueError("inputs_embeds is not supported: drafts are token ids; pass input_ids")
    unknown = [k for k, v in model_inputs.items() if v is not None and k not in _HANDLED_INPUTS]
    if unknown:
        raise ValueError(f"model inputs not supported with speculation: {', '.join(unknown)}")
    for name in CACHE_KEYWORDS:
        cache = model_inputs.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"{name} must be empty: continuing a cache is not supported")


def sampling_options(processors: LogitsProcessorList, do_sample: bool) -> dict[str, float]:
    """Temperature and filters of `verify` from the processors that `generate` made.

    Raises:
        ValueError: a processor that is not one of these filters, or filters out of order.
    """
    options: dict[str, float] = {"temperature": 1.0} if do_sample else {}
    order = list(_WARPERS)
    last = -1
    for processor in processors:
        kind = type(processor)
        if kind not in _WARPERS or getattr(processor, "filter_value", -float("inf")) != -float(
            "inf"
        ):
            raise ValueError(f"logits processor {kind.__name__} is not supported with speculation")
        if order.index(kind) <= last:
            raise ValueError(f"logits processor {kind.__name__} is out of order or given twice")
        last = order.index(kind)
        parameter, attribute = _WARPERS[kind]
        options[parameter] = float(getattr(processor, attribute))
    if options and not do_sample:
        raise ValueError(f"{', '.join(options)} need do_sample=True")
    return options


def check_lengths(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    """Raise ValueError for an empty prompt or one longer than the model's positions."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"row {row} of the batch is empty: it has no token to continue")
        if limit is not None and len(prompt) > limit:
            raise ValueError(
                f"row {row} has {len(prompt)} tokens, more than the model's {limit} positions"
            )
