"""What cannot be exact is refused, before anything is touched."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .architectures import EXACT, WITH_MEDIA, why_refused
from .attention import ignores_attention
from .cache import CACHE_KEYWORDS
from .media import BY_TOKEN

_RECURRENT = ("linear", "mamba", "conv", "recurrent", "ssm", "rwkv")
_DYNAMIC_LAYERS = "torch.ao.nn.quantized.dynamic."
_HOST = ("cpu", "disk", "meta")  # where weights may wait for their device
_HANDLED_INPUTS = {
    "attention_mask",
    "position_ids",
    *CACHE_KEYWORDS,
    "use_cache",
    "logits_to_keep",
}
_MODES = (  # drafting changes nothing in the other two
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
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
    if not model._can_set_attn_implementation():
        raise ValueError(ignores_attention(name))
    devices = {d for d in getattr(model, "hf_device_map", {}).values() if d not in _HOST}
    if len({str(torch.device(d)) for d in devices}) > 1:
        raise ValueError(
            f"{name} is spread over {len(devices)} devices by device_map: token trees run on one; "
            "use tensor parallelism, or device_map with one device"
        )
    if _has_own_texts(model):
        raise ValueError(
            f"{name} is sharded by FSDP or ZeRO-3, whose processes have texts of their own and "
            "take different numbers of steps; use tensor parallelism"
        )
    reason = why_refused(model.config)
    is_of_transformers = type(model).__module__.startswith("transformers.models.")
    if reason is None and is_of_transformers and model.config.model_type not in EXACT:
        reason = (
            f"its type {model.config.model_type} is not among those that are tested to be exact; "
            "see `specdec env --models`"
        )
    if reason is None and "position_ids" not in inspect.signature(model.forward).parameters:
        reason = "it counts positions itself and takes no position_ids"
    reason = reason or _why_altered(model)
    if reason is not None:
        raise ValueError(f"{name} is refused: {reason}")


def _why_altered(model: PreTrainedModel) -> str | None:
    """What was made of a model that trees would be exact with, so that they are not."""
    if model.dtype == torch.float64:
        return "its dtype must be bfloat16, float16 or float32, got float64"
    name = "prepare_inputs_for_generation"  # of a mixin that a draft model may lack
    prepare = getattr(model, name, None)
    if getattr(prepare, "__func__", prepare) is not getattr(type(model), name, None):
        return (
            f"{getattr(prepare, '__qualname__', prepare)} stands in for its {name}, which nobody "
            "calls here (adapters put virtual tokens before a text so)"
        )
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        return "its activated LoRA counts tokens from the end of what it is given"
    if any(type(part).__module__.startswith(_DYNAMIC_LAYERS) for part in model.modules()):
        return "its layers quantize all tokens of a pass by one scale, which drafts would change"
    return None


def vocab_size(model: PreTrainedModel) -> int:
    """Tokens that the model's embeddings have, adapters or not."""
    embeddings: Any = model.get_input_embeddings()
    return int(getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0])


def decoder_of(model: PreTrainedModel) -> Any:
    """The part of a model that has its decoder layers and gives their last hidden states, adapters
    or not. For some, transformers' `get_decoder` is the whole model (Llama 4) or its head.
    """
    base: Any = model
    whole = base.get_base_model() if hasattr(base, "get_base_model") else base
    decoder = whole.get_decoder()
    if isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is None:
        return decoder
    return getattr(whole, "model", decoder)


def _has_own_texts(model: PreTrainedModel) -> bool:
    """Whether processes share the weights but not the prompts."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    if torch.distributed.get_world_size() == 1:
        return False
    is_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    return is_sharded or is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled()


def check_positions(model: PreTrainedModel, prompts: list[list[int]], max_length: int) -> None:
    """Raise ValueError where rotary angles change with the longest text: keys in the cache would
    not fit drafts beyond that point, or another row's.
    """
    config = model.config.get_text_config(decoder=True)
    for rope in _rope_settings(config):
        if rope.get("rope_type") not in ("dynamic", "longrope"):
            continue
        limit = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        )
        if rope["rope_type"] == "longrope" and min(map(len, prompts)) > limit:
            continue  # the long factors from the start
        if max_length > limit:
            raise ValueError(
                f"{rope['rope_type']} rotary positions change when a text passes {limit} tokens, "
                f"so max_length must be <= {limit}, got {max_length}"
            )


def _rope_settings(config: Any) -> list[Mapping[str, Any]]:
    """The rotary settings of the model, which some keep per layer type."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, Mapping)]
    return nested or [settings]


def check_request(
    model: PreTrainedModel,
    config: GenerationConfig,
    input_ids: Tensor,
    model_inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """Raise ValueError for generation modes and inputs that cannot be exact.

    Returns:
        the inputs of images and sounds in the prompts.
    """
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams must be 1 with speculation, got {config.num_beams}")
    mode = config.get_generation_mode()
    if mode not in _MODES:
        raise ValueError(
            f"{mode.value.replace('_', ' ')}, which these options ask for, is not supported with "
            "speculation: only greedy search and sampling"
        )
    if getattr(config, "assistant_ensemble_weight", None) is not None:
        raise ValueError(
            "assistant_ensemble_weight must be None, as another one changes the text, "
            f"got {config.assistant_ensemble_weight}"
        )
    for option in ("output_attentions", "output_hidden_states"):
        if getattr(config, option, None):
            raise ValueError(f"{option}=True is not supported with speculation")
    if model_inputs.get("inputs_embeds") is not None or input_ids.dim() != 2:
        raise ValueError("inputs_embeds is not supported: drafts are token ids; pass input_ids")
    others = {k: v for k, v in model_inputs.items() if k not in _HANDLED_INPUTS}
    others = {k: v for k, v in others.items() if not _is_empty(v)}
    if model.config.get_text_config(decoder=True) is not model.config:  # text, if all are of a type
        others = {k: v for k, v in others.items() if k not in BY_TOKEN or bool(v.any())}
    if others and model.config.model_type not in WITH_MEDIA:
        name, rest = type(model).__name__, ", ".join(others)
        raise ValueError(
            f"model inputs not supported with speculation: {name} either ignores them or reads "
            f"them in a way that is not tested to be exact: {rest}"
        )
    return others


def check_position_ids(position_ids: Tensor | None, prompts: list[list[int]]) -> None:
    """Raise ValueError unless the real tokens of every row are at positions 0, 1, 2 ...

    Args:
        position_ids: [..., B or 1, P], or None.
        prompts: the real tokens of each row.
    """
    if position_ids is None:
        return
    for row, prompt in enumerate(prompts):
        own = position_ids[..., row if position_ids.shape[-2] > 1 else 0, -len(prompt) :]
        if own.shape[-1] != len(prompt) or bool(
            (own != torch.arange(len(prompt), device=own.device)).any()
        ):
            raise ValueError(
                f"position_ids of row {row} must be 0, 1, ... {len(prompt) - 1} over its tokens, "
                f"got {own.flatten()[:8].tolist()}"
            )


def _is_empty(value: Any) -> bool:
    """Whether an input says nothing, as the outputs of an image encoder without images."""
    if isinstance(value, Mapping):
        return all(map(_is_empty, value.values()))
    return value is None


def split_processors(
    processors: LogitsProcessorList, do_sample: bool
) -> tuple[list[Any], dict[str, float]]:
    """The processors that run one by one, and the filters at their end that `verify` fuses."""
    rest = list(processors)
    fused: dict[str, float] = {}
    order = list(_WARPERS)
    limit = len(order)
    while do_sample and rest and type(rest[-1]) in _WARPERS:
        last = rest[-1]
        place = order.index(type(last))
        removed = getattr(last, "filter_value", -float("inf"))
        kept = getattr(last, "min_tokens_to_keep", 1)
        if place >= limit or removed != -float("inf") or kept != 1:
            break
        parameter, attribute = _WARPERS[type(last)]
        fused[parameter] = float(getattr(last, attribute))
        limit = place
        rest.pop()
    return rest, fused


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
