"""Which causal architectures of transformers token trees are exact with, and why not with others.

`tests/test_architectures.py` runs every exact one, and requires that none is missing here.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

_EXACT = """
afmoe apertus apertus1p5_text arcee aria_text axk1 beam bert bert-generation biogpt bitnet
camembert codegen cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm data2vec-text dbrx
deepseek_v2 deepseek_v3 diffllama dots1 electra emu3 ernie ernie4_5 ernie4_5_moe exaone exaone4
exaone_moe flex_olmo flint gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text
gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss gptj
granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense
hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama llama4
llama4_text longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral
ministral3 mistral mixtral mllama modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmoe opt
persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe roberta roberta-prelayernorm roc_bert
sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xlm-roberta
xlm-roberta-xl youtu
"""
_MEDIA = """
aria aya_vision cohere2_vision deepseek_vl gemma3 gemma4 glm46v glm4v glm4v_moe glm_ocr idefics2
idefics3 internvl janus lighton_ocr llava llava_next llava_next_video llava_onevision mistral3
qwen2_5_omni_thinker qwen2_5_vl qwen2_audio qwen2_vl qwen3_vl qwen3_vl_moe smolvlm video_llava
vipllava voxtral
"""
WITH_MEDIA = frozenset(_MEDIA.split())
"""Model types that are exact with images or sounds in the prompt, too."""
_ATTENDS_SINCE_5_24 = frozenset(("codegen", "gptj"))
_IS_OLDER = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)
_TEXT_PARTS = frozenset(("emu3_text_model", "mllama_text_model"))  # of emu3 and mllama
EXACT = (frozenset(_EXACT.split()) | _TEXT_PARTS | WITH_MEDIA) - (
    _ATTENDS_SINCE_5_24 if _IS_OLDER else frozenset()
)
"""Model types whose output is equal to plain decoding, in float32 token for token."""

_REASONS = {
    "its recurrent or convolutional layers cannot be rolled back to the accepted branch": """
    bailing_hybrid bamba deepseek_v4 falcon_h1 falcon_mamba granitemoehybrid inkling2_loop_text
    inkling2_text inkling_text jamba kimi_linear lara_mini lfm2 lfm2_moe lfm3 mamba mamba2 minimax
    nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp
    qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2 zaya
    """,
    "it computes attention itself and ignores registered attention functions": """
    big_bird bloom cpmant falcon gpt_neo gpt_neox_japanese megatron-bert mpt mvp openai-gpt
    prophetnet reformer rembert roformer trocr xglm xlm xlnet
    """,
    "its attention picks keys by a mask of its own": """
    axk2 deepseek_v32 doge dory dots3_note dots3_note_text glm_moe_dsa hy_v4
    """,
    "it counts positions itself and takes no position_ids": """
    bart bigbird_pegasus blenderbot blenderbot-small marian mbart pegasus plbart whisper
    """,
    "it is a drafting model": "gemma4_assistant gemma4_unified_assistant",
    "it is multimodal, and not yet tested with tokens alone": """
    fuyu gemma3n gemma4_unified git got_ocr2 moshi moss_transcribe_diarize musicgen musicgen_melody
    phi4_multimodal
    """,
    "it groups bytes into patches by the whole text": "blt",
    "it chooses adapters by a language that generate does not pass": "xmod",
}

REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}
if _IS_OLDER:
    REFUSED |= dict.fromkeys(
        _ATTENDS_SINCE_5_24, "before transformers 5.24 it ignores registered attention functions"
    )
"""Model type -> why token trees cannot be exact with it."""


def why_refused(config: Any) -> str | None:
    """Why a model of this configuration is refused by its type; None for exact and unknown ones."""
    return REFUSED.get(config.model_type)


def support_rows() -> list[tuple[str, str]]:
    """(model type, "exact" or the reason for refusing it) of what the installed transformers has,
    in alphabetical order.
    """
    media = "exact, also with images or sounds in the prompt"
    rows = [(name, media if name in WITH_MEDIA else "exact") for name in EXACT]
    rows += REFUSED.items()
    installed = {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *(WITH_MEDIA & set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)),
    }
    return sorted(row for row in rows if row[0] in installed)
