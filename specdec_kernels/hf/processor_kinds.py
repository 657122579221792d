"""Every logits processor class of transformers: how it reads its arguments, or why it is
refused.
"""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """How a logits processor reads its arguments."""

    PURE = "pure"
    """Only the scores: one call on all nodes."""
    LENGTH = "length"
    """Also how many tokens there are: one call per depth."""
    PREFIX = "prefix"
    """Also which: called on the nodes that the walk visits, with their own prefix."""
    ROW_BOUND = "row-bound"
    """Also the row of the batch: as PREFIX, with a copy per row."""


_AUDIO = "it is for the codebooks of an audio model"
_MODEL = "it runs the model itself, and keeps state between calls"
_STATE = "it keeps state between calls"
_DOUBLE = "it needs a batch of conditional and unconditional rows"
_DIFFUSION = "it is for denoising steps, not for tokens one after another"
_SERVING = "it belongs to continuous batching"

_COMMON: dict[str, Kind | str] = {
    "MinLengthLogitsProcessor": Kind.LENGTH,
    "MinNewTokensLengthLogitsProcessor": Kind.LENGTH,
    "TemperatureLogitsWarper": Kind.PURE,
    "RepetitionPenaltyLogitsProcessor": Kind.ROW_BOUND,
    "EncoderRepetitionPenaltyLogitsProcessor": Kind.ROW_BOUND,
    "TopPLogitsWarper": Kind.PURE,
    "TopKLogitsWarper": Kind.PURE,
    "TopHLogitsWarper": Kind.PURE,
    "MinPLogitsWarper": Kind.PURE,
    "TypicalLogitsWarper": Kind.PURE,
    "EpsilonLogitsWarper": Kind.PURE,
    "EtaLogitsWarper": Kind.PURE,
    "NoRepeatNGramLogitsProcessor": Kind.PREFIX,
    "EncoderNoRepeatNGramLogitsProcessor": Kind.ROW_BOUND,
    "SequenceBiasLogitsProcessor": Kind.PREFIX,
    "NoBadWordsLogitsProcessor": Kind.PREFIX,
    "PrefixConstrainedLogitsProcessor": Kind.ROW_BOUND,
    "ForcedBOSTokenLogitsProcessor": Kind.LENGTH,
    "ForcedEOSTokenLogitsProcessor": Kind.LENGTH,
    "InfNanRemoveLogitsProcessor": Kind.PURE,
    "ExponentialDecayLengthPenalty": Kind.LENGTH,
    "LogitNormalization": Kind.PURE,
    "SuppressTokensAtBeginLogitsProcessor": Kind.LENGTH,
    "SuppressTokensLogitsProcessor": Kind.PURE,
    "WhisperTimeStampLogitsProcessor": Kind.PREFIX,
    "WhisperNoSpeechDetection": _MODEL,
    "ClassifierFreeGuidanceLogitsProcessor": _DOUBLE,
    "AlternatingCodebooksLogitsProcessor": Kind.LENGTH,
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": _MODEL,
    "BarkEosPrioritizerLogitsProcessor": Kind.PURE,
    "WatermarkLogitsProcessor": Kind.PREFIX,
    "SynthIDTextWatermarkLogitsProcessor": _STATE,
    "DiaClassifierFreeGuidanceLogitsProcessor": _DOUBLE,
    "DiaEOSChannelFilterLogitsProcessor": _AUDIO,
    "DiaEOSDelayPatternLogitsProcessor": _AUDIO,
}
_BATCHING = "generation.continuous_batching.cb_logits_processors"

KINDS: dict[str, Kind | str] = {
    **{f"generation.logits_process.{name}": kind for name, kind in _COMMON.items()},
    "models.diffusion_gemma.generation_diffusion_gemma."
    "LinearTemperatureScheduleLogitsProcessor": _DIFFUSION,
    "models.vibevoice.generation_vibevoice.VibeVoiceTokenConstraintProcessor": Kind.PURE,
    "models.higgs_audio_v2.generation_higgs_audio_v2."
    "HiggsAudioV2DelayPatternLogitsProcessor": _AUDIO,
    "models.unlimited_ocr.generation_unlimited_ocr."
    "UnlimitedOcrSlidingWindowNoRepeatNgramLogitsProcessor": Kind.PREFIX,
    **{
        f"{_BATCHING}.ContinuousBatching{name}LogitsWarper": _SERVING
        for name in ("Temperature", "TopK", "TopP")
    },
}
"""Module and class, below `transformers.` -> kind, or the reason for refusing it."""
