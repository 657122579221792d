"""Logits processors in token trees: every class is classified, and equal to plain decoding."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from prompts import left_pad, random_prompts
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    TemperatureLogitsWarper,
    WatermarkingConfig,
    WhisperTimeStampLogitsProcessor,
)
from transformers.generation.logits_process import (
    AlternatingCodebooksLogitsProcessor,
    BarkEosPrioritizerLogitsProcessor,
)

import specdec_kernels.hf.processors as processors_module
from specdec_kernels import DraftContext, Drafter, OracleDrafter, Proposal, SpeculativeDecoder
from specdec_kernels.hf.processor_kinds import KINDS, Kind
from specdec_kernels.hf.processors import declare_logits_processor

NEW = 16
VOCAB = 101
EOS = 7


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    return [torch.cat([r, r[:5]]) for r in random_prompts((9, 13, 11), VOCAB)]


def _whisper() -> LogitsProcessor:
    config = GenerationConfig(eos_token_id=90, bos_token_id=90)
    config.no_timestamps_token_id = 91
    return WhisperTimeStampLogitsProcessor(config, begin_index=18)


def _constrain(batch: int, ids: torch.Tensor) -> list[int]:
    """Depends on the row's number and its last token."""
    return [t for t in range(3, VOCAB) if (t + batch + int(ids[-1])) % 3]


OPTIONS: dict[str, dict] = {
    "MinLengthLogitsProcessor": {"min_length": 24, "eos_token_id": "text"},
    "MinNewTokensLengthLogitsProcessor": {"min_new_tokens": 6, "eos_token_id": "text"},
    "TemperatureLogitsWarper": {"logits_processor": [TemperatureLogitsWarper(0.5)]},
    "RepetitionPenaltyLogitsProcessor": {"repetition_penalty": 1.5},
    "EncoderRepetitionPenaltyLogitsProcessor": {"encoder_repetition_penalty": 1.5},
    "NoRepeatNGramLogitsProcessor": {"no_repeat_ngram_size": 2},
    "EncoderNoRepeatNGramLogitsProcessor": {"encoder_no_repeat_ngram_size": 2},
    "SequenceBiasLogitsProcessor": {"sequence_bias": [[[12], 3.0], [[40, 41], 9.0]]},
    "one SequenceBias of single tokens": {"sequence_bias": [[[12], 3.0], [[50], -2.0]]},
    "NoBadWordsLogitsProcessor": {"bad_words_ids": "text"},
    "PrefixConstrainedLogitsProcessor": {"prefix_allowed_tokens_fn": _constrain},
    "ForcedBOSTokenLogitsProcessor": {"forced_bos_token_id": 5},
    "ForcedEOSTokenLogitsProcessor": {"forced_eos_token_id": EOS},
    "InfNanRemoveLogitsProcessor": {"remove_invalid_values": True},
    "ExponentialDecayLengthPenalty": {
        "exponential_decay_length_penalty": (3, 1.6),
        "eos_token_id": EOS,
    },
    "LogitNormalization": {"renormalize_logits": True},
    "SuppressTokensAtBeginLogitsProcessor": {"begin_suppress_tokens": list(range(50))},
    "SuppressTokensLogitsProcessor": {"suppress_tokens": list(range(40))},
    "WhisperTimeStampLogitsProcessor": {"logits_processor": [_whisper()]},
    "AlternatingCodebooksLogitsProcessor": {
        "logits_processor": [AlternatingCodebooksLogitsProcessor(18, 30, 40)]
    },
    "BarkEosPrioritizerLogitsProcessor": {
        "logits_processor": [BarkEosPrioritizerLogitsProcessor(EOS, 0.02)],
        "eos_token_id": EOS,
    },
    "WatermarkLogitsProcessor": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "several": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 4,
        "suppress_tokens": [20, 21],
        "eos_token_id": [EOS, 30],
    },
}
SAMPLED = {
    "TopPLogitsWarper": {"top_p": 0.7},
    "TopKLogitsWarper": {"top_k": 9},
    "TopHLogitsWarper": {"top_h": 0.5},
    "MinPLogitsWarper": {"min_p": 0.1},
    "TypicalLogitsWarper": {"typical_p": 0.6},
    "EpsilonLogitsWarper": {"epsilon_cutoff": 0.01},
    "EtaLogitsWarper": {"eta_cutoff": 0.02},
    "filters, one after what is not fused": {
        "temperature": 1.3,
        "top_k": 30,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
    },
}


def _options(name: str, model, rows) -> dict:
    """The options of that name; those that depend on the text are filled in."""
    options = {"do_sample": False, **OPTIONS[name]}
    new = model.generate(**left_pad(rows), max_new_tokens=NEW, do_sample=False)[:, -NEW:].tolist()
    if options.get("eos_token_id") == "text":
        options["eos_token_id"] = [new[0][2], new[1][3], new[2][9]]
    if options.get("bad_words_ids") == "text":
        options["bad_words_ids"] = [new[0][1:3], new[1][4:5]]
    return options


def _run(model, rows, drafter, options, **decoder_options):
    """Output of a batch and its decoder."""
    options = dict(options)
    if "logits_processor" in options:
        options["logits_processor"] = LogitsProcessorList(options["logits_processor"])
    decoder = SpeculativeDecoder(drafter, **decoder_options)
    output = model.generate(
        **left_pad(rows), max_new_tokens=NEW, pad_token_id=0, custom_generate=decoder, **options
    )
    return output.tolist(), decoder


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_equals_generate_in_the_same_batch(tiny_model, rows, name: str) -> None:
    if name == "ForcedBOSTokenLogitsProcessor":  # it forces the token after a single one
        rows = [row[:1] for row in rows]
    options = _options(name, tiny_model, rows)
    inputs = left_pad(rows)
    plain = dict(options)
    if "logits_processor" in plain:
        plain["logits_processor"] = LogitsProcessorList(plain["logits_processor"])
    want = tiny_model.generate(**inputs, max_new_tokens=NEW, pad_token_id=0, **plain).tolist()
    without = tiny_model.generate(**inputs, max_new_tokens=NEW, pad_token_id=0, do_sample=False)
    inert = ("TemperatureLogitsWarper", "InfNanRemoveLogitsProcessor", "LogitNormalization")
    assert (want == without.tolist()) == (name in inert), "the option must change the text"
    pads = [len(inputs["input_ids"][0]) - len(r) for r in rows]
    truth = [text[pad:] for text, pad in zip(want, pads, strict=True)]
    got, decoder = _run(tiny_model, rows, OracleDrafter(truth, VOCAB, max_nodes=16), options)
    assert got == want
    assert decoder.stats.tokens_per_step > 1.3, "the drafter must exercise acceptance"


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_text_depends_on_the_seed_alone(tiny_model, rows, name: str) -> None:
    options = {"do_sample": True, "top_k": 0, **SAMPLED[name]}
    truth = [_run(tiny_model, [r], None, options, seed=i)[0][0] for i, r in enumerate(rows)]
    for order in ([2, 0], [1]):
        batch = [rows[i] for i in order]
        drafter = OracleDrafter(truth, VOCAB, max_nodes=16)
        got, decoder = _run(tiny_model, batch, drafter, options, seed=order)
        # n-grams and penalties see padding: compare a batch of equal lengths, or none
        width = max(len(r) for r in batch)
        assert [t[width:] for t in got] == [truth[i][len(rows[i]) :] for i in order]
        assert decoder.stats.tokens_per_step > 1.5


def test_the_law_after_filters_is_that_of_transformers(tiny_model, rows) -> None:
    """The first token's scores: filtered here, and by the classes of transformers."""
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.02}
    options |= {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 1}
    decoder = SpeculativeDecoder(seed=1)
    ours = tiny_model.generate(**left_pad(rows[:1]), custom_generate=decoder, **options).scores[0]
    theirs = tiny_model.generate(**left_pad(rows[:1]), **options).scores[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def _processor_classes() -> dict[str, ast.ClassDef]:
    """Every class of the installed transformers below LogitsProcessor, by its source."""
    root = Path(transformers.__file__).parent
    found: dict[str, tuple[ast.ClassDef, list[str]]] = {}
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "LogitsProcessor" not in text or path.name.startswith("modular_"):
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                bases = [b.id for b in node.bases if isinstance(b, ast.Name)]
                found[f"{module}.{node.name}"] = (node, bases)
    known = {"LogitsProcessor", "ContinuousBatchingLogitsProcessor"}
    classes: dict[str, ast.ClassDef] = {}
    while True:
        new = {k: n for k, (n, bases) in found.items() if known & {*bases} and k not in classes}
        if not new:
            return classes
        classes |= new
        known |= {name.rsplit(".", 1)[1] for name in new}


def test_every_class_of_transformers_is_classified() -> None:
    classes = _processor_classes()
    assert len(classes) > 30
    assert sorted(set(classes) - set(KINDS)) == []


def test_every_supported_class_is_run_above() -> None:
    """But for those of audio and image models, which run like the others of their kind."""
    names = {k.rsplit(".", 1)[1] for k, kind in KINDS.items() if isinstance(kind, Kind)}
    special = {
        "VibeVoiceTokenConstraintProcessor",
        "UnlimitedOcrSlidingWindowNoRepeatNgramLogitsProcessor",
    }
    assert names - special - set(OPTIONS) - set(SAMPLED) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 2.0}, r"UnbatchedClassifierFreeGuidance\w+ is not supported: it runs"),
        (
            {
                "watermarking_config": transformers.SynthIDTextWatermarkingConfig(
                    keys=[1, 2], ngram_len=2
                )
            },
            r"SynthIDTextWatermarkLogitsProcessor is not supported: it keeps state",
        ),
    ],
)
def test_a_stateful_processor_is_refused_by_name(tiny_model, rows, options, message) -> None:
    options = {"do_sample": True, **options}
    with pytest.raises(ValueError, match=message):
        _run(tiny_model, rows, None, options)


class _Own(LogitsProcessor):
    """Forbids the last token of the prefix, and remembers the lengths that it saw."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


def test_an_unknown_class_sees_one_row_as_in_plain_decoding(tiny_model, rows) -> None:
    plain, own = _Own(), _Own()
    inputs = left_pad(rows[:1])
    want = tiny_model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, logits_processor=LogitsProcessorList([plain])
    ).tolist()
    drafter = OracleDrafter(want, VOCAB, max_nodes=16)
    got, _ = _run(tiny_model, rows[:1], drafter, {"do_sample": False, "logits_processor": [own]})
    assert got == want
    assert own.lengths == plain.lengths


def test_an_unknown_class_in_a_batch_must_be_declared(
    tiny_model, rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors_module, "_declared", {})
    options = {"do_sample": False, "logits_processor": [_Own()]}
    with pytest.raises(ValueError, match=r"_Own is unknown, .* declare_logits_processor"):
        _run(tiny_model, rows, None, options)
    with pytest.raises(ValueError, match="kind must be one of pure, length, prefix, got 'other'"):
        declare_logits_processor(_Own, "other")
    declare_logits_processor(_Own, "prefix")
    got, _ = _run(tiny_model, rows, None, options)
    want = tiny_model.generate(
        **left_pad(rows), max_new_tokens=NEW, pad_token_id=0, do_sample=False,
        logits_processor=LogitsProcessorList([_Own()]),
    )  # fmt: skip
    assert got == want.tolist()


def test_a_wrong_kind_changes_the_text(tiny_model, rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the length ignored, the test of equality would notice."""
    name = f"generation.logits_process.{MinLengthLogitsProcessor.__name__}"
    assert inspect.getmodule(MinLengthLogitsProcessor).__name__.endswith("logits_process")
    monkeypatch.setitem(KINDS, name, Kind.PURE)
    inputs = left_pad(rows)
    options = {**_options("MinLengthLogitsProcessor", tiny_model, rows), "min_length": 20}
    want = tiny_model.generate(**inputs, max_new_tokens=NEW, pad_token_id=0, **options).tolist()
    assert _run(tiny_model, rows, None, options)[0] != want
    monkeypatch.setitem(KINDS, name, Kind.LENGTH)
    assert _run(tiny_model, rows, None, options)[0] == want


class _Half(Drafter):
    """Sampled drafts in even rows, deterministic ones in odd rows."""

    max_nodes = 4

    def propose(self, context: DraftContext) -> Proposal:
        builder = context.builder()
        for root in builder.roots:
            if root.row % 2:
                builder.add(root, (context.sequences[root.row][-1] + 1) % VOCAB)
            else:
                builder.sample([root], torch.zeros((1, VOCAB)), num_children=2)
        return builder.build()


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.4}, {"suppress_tokens": [3]}])
def test_walked_rows_are_the_same_beside_rows_with_sampled_drafts(
    tiny_model, rows, options: dict
) -> None:
    """And rows with sampled drafts obey the processors, too."""
    options = {"do_sample": True, "no_repeat_ngram_size": 1, "temperature": 0.9, **options}
    plain = _run(tiny_model, rows, None, options, seed=[5, 6, 7])[0]
    mixed = _run(tiny_model, rows, _Half(), options, seed=[5, 6, 7])[0]
    assert mixed[1] == plain[1]
    width = max(len(row) for row in rows)
    for prompt, row in zip(rows, mixed, strict=True):
        new = row[width:]
        assert len(set(new)) == NEW and not {*new} & {*prompt.tolist()}, "no token comes twice"
