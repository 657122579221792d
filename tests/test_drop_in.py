"""Scripts that were written for `model.generate`: what they ask for is done, or refused by name."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from conftest import make_tiny_model
from prompts import greedy, left_pad, random_prompts
from transformers import (
    CompileConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

import specdec_kernels
from specdec_kernels import OracleDrafter, SpeculativeDecoder
from specdec_kernels.hf import EarlyExitModel

VOCAB = 101
NEW = 14


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    return random_prompts((9, 14, 6), VOCAB)


@pytest.fixture(scope="module")
def truth(tiny_model, rows) -> list[list[int]]:
    return [greedy(tiny_model, row, NEW + 8) for row in rows]


def _stop_string(model, tokenizer, inputs) -> str:
    """Two letters in the middle of the greedy text."""
    plain = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    text = tokenizer.decode(plain[inputs["input_ids"].shape[1] :])
    return next(text[i : i + 2] for i in range(4, 30) if text[i : i + 2].isascii())


def test_stop_strings_of_the_models_own_configuration(bytes_model, monkeypatch) -> None:
    model, tokenizer = bytes_model
    inputs = tokenizer("abcabc", return_tensors="pt")
    own = copy.copy(model.generation_config)
    own.stop_strings = _stop_string(model, tokenizer, inputs)
    plain = model.generate(**inputs, max_new_tokens=40, do_sample=False).tolist()
    monkeypatch.setattr(model, "generation_config", own)
    options = {"max_new_tokens": 40, "do_sample": False}
    given = GenerationConfig(**options, pad_token_id=0)
    want = model.generate(**inputs, **options, tokenizer=tokenizer).tolist()
    assert want != plain
    for arguments in (options, {"generation_config": given}):
        drafter = OracleDrafter(plain, 200, max_nodes=16, max_hidden=14)
        got = specdec_kernels.generate(
            model, **inputs, **arguments, tokenizer=tokenizer, drafter=drafter
        )
        assert got.tolist() == want
        with pytest.raises(ValueError, match="stop_strings needs the tokenizer"):
            specdec_kernels.generate(model, **inputs, **arguments)
    other = specdec_kernels.generate(
        model, **inputs, **options, tokenizer=tokenizer, stop_strings=["never written"]
    )
    assert other.tolist() == plain
    assert model.generation_config.stop_strings == own.stop_strings


def test_stop_strings_in_a_batch_end_one_row_at_a_time(bytes_model) -> None:
    """With an end token, finished rows are padded by `generate`, too."""
    model, tokenizer = bytes_model
    stop = _stop_string(model, tokenizer, tokenizer("abcabc", return_tensors="pt"))
    texts = ["abcabc", "xyz zyx abc"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    plain = model.generate(**inputs, **options).tolist()
    want = model.generate(**inputs, **options, stop_strings=[stop, "zz"], tokenizer=tokenizer)
    assert want[0, -1] == 0 != want[1, -1]
    drafter = OracleDrafter([plain[0][5:], plain[1]], 200, max_nodes=16)
    got = specdec_kernels.generate(
        model, **inputs, **options, stop_strings=[stop, "zz"], tokenizer=tokenizer, drafter=drafter
    )
    assert got.tolist() == want.tolist()


class _Counter(BaseStreamer):
    """How often it was ended."""

    def __init__(self) -> None:
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"no_such_option": 1},
        {"max_new_tokens": 0},
        {"num_beams": 2},
        {"drafter": "no such drafter"},
        {"rule": "typical"},
        {"stop_strings": "a"},
        {"custom_generate": "repository/name"},
        {"attention_mask": torch.zeros((1, 9))},
    ],
)
def test_a_streamer_is_ended_once_whatever_is_wrong(tiny_model, rows, options: dict) -> None:
    streamer = _Counter()
    arguments = {**left_pad(rows[:1]), "max_new_tokens": 2, "streamer": streamer, **options}
    if options:
        with pytest.raises(ValueError, match=r".+"):
            specdec_kernels.generate(tiny_model, **arguments)
    else:
        specdec_kernels.generate(tiny_model, **arguments)
    assert streamer.ends == 1


def test_who_waits_for_a_text_iterator_is_freed_by_a_misspelt_option(bytes_model) -> None:
    model, tokenizer = bytes_model
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    inputs = tokenizer("abcabc", return_tensors="pt")
    errors = []

    def run() -> None:
        try:
            specdec_kernels.generate(model, **inputs, max_new_token=4, streamer=streamer)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    list(streamer)
    thread.join()
    assert "model_kwargs" in str(errors[0]) and "max_new_token" in str(errors[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search, .* is not supported"),
        ({"dola_layers": "low"}, "dola generation, .* is not supported"),
        ({"force_words_ids": [[5]]}, "constrained beam search, .* is not supported"),
        ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight must be None.*got 0.5"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged' is not supported"),
        ({"token_healing": True}, r"token_healing=True is not .*heal_tokens"),
        ({"synced_gpus": True}, "synced_gpus=True is not supported"),
        (
            {"position_ids": torch.arange(0, 28, 2).expand(3, -1)},
            r"position_ids of row 0 must be 0, 1, ... 8 over its tokens, got \[10, 12",
        ),
        (
            {"attention_mask": torch.eye(3, 5)},
            r"attention_mask must be \[B, P\] = \[3, 14\], got \[3, 5\]",
        ),
        (
            {"drafter": None, "assistant_early_exit": 1},
            "give either drafter or assistant_early_exit",
        ),
        ({"prompt_lookup_num_tokens": 2, "assistant_early_exit": 1}, "give either assistant_early"),
        ({"assistant_early_exit": 3}, r"exit layer must be in \[1, 2\] for Llama"),
    ],
)
def test_what_would_change_the_text_is_refused(tiny_model, rows, options, message: str) -> None:
    arguments = {**left_pad(rows), "max_new_tokens": 4, **options}
    if "position_ids" not in options and "attention_mask" not in options:
        arguments = {**left_pad(rows[:1]), "max_new_tokens": 4, **options}
    with pytest.raises(ValueError, match=message):
        specdec_kernels.generate(tiny_model, **arguments)
    assert tiny_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "options",
    [
        {"custom_generate": None},
        {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic"},
        {"assistant_confidence_threshold": 0.4, "assistant_lookbehind": 3, "target_lookbehind": 3},
        {"use_mtp": None, "speculation_type": None},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic", "use_cache": False},
        {"compile_config": CompileConfig(), "disable_compile": True},
        {"low_memory": True, "prefill_chunk_size": 4},
        {"synced_gpus": False, "trust_remote_code": True},
        {"logits_to_keep": 1},
        {"min_new_tokens": 9, "eos_token_id": list(range(0, VOCAB, 3))},
        {"min_length": 20, "eos_token_id": torch.arange(0, VOCAB, 4)},
        {"max_length": 20, "max_new_tokens": None},
        {"max_time": 1000.0},
    ],
)
def test_what_changes_only_the_way_is_taken(tiny_model, rows, options: dict) -> None:
    arguments = {**left_pad(rows), "max_new_tokens": NEW, "do_sample": False, **options}
    want = tiny_model.generate(**arguments)
    assert specdec_kernels.generate(tiny_model, **arguments).tolist() == want.tolist()


def test_masks_of_any_type_and_usual_positions_are_taken(tiny_model, rows, truth) -> None:
    inputs = left_pad(rows)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    want = [t[len(r) : len(r) + 5] for t, r in zip(truth, rows, strict=True)]
    for kind in (torch.bool, torch.float32, torch.int32):
        mask = inputs["attention_mask"].to(kind)
        output = specdec_kernels.generate(
            tiny_model, inputs["input_ids"], GenerationConfig(max_new_tokens=5, pad_token_id=0),
            attention_mask=mask, position_ids=positions,
        )  # fmt: skip
        assert output[:, 14:].tolist() == want


def test_an_early_exit_drafts(tiny_model, rows, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []
    attach = EarlyExitModel.attach

    def watched(self: EarlyExitModel, target: object):
        entered.append(self.num_layers)
        return attach(self, target)

    monkeypatch.setattr(EarlyExitModel, "attach", watched)
    options = {**left_pad(rows[:1]), "max_new_tokens": NEW, "do_sample": False}
    want = tiny_model.generate(**options, assistant_early_exit=2)
    entered.clear()
    got = specdec_kernels.generate(tiny_model, **options, assistant_early_exit=2)
    assert got.tolist() == want.tolist() and entered == [2]
    config = GenerationConfig(assistant_early_exit=1, pad_token_id=0)
    specdec_kernels.generate(tiny_model, **options, generation_config=config)
    specdec_kernels.generate(tiny_model, **options, generation_config=config, drafter="suffix")
    assert entered == [2, 1], "a drafter that is named goes before the configuration"


def test_rows_of_the_same_prompt_are_drawn_on_their_own(tiny_model, rows) -> None:
    """As by `generate`; a seed that is given belongs to the row, not to its place."""
    inputs = left_pad([rows[0]] * 12)
    options = {"do_sample": True, "top_k": 0, "temperature": 2.0, "max_new_tokens": 3}
    free = specdec_kernels.generate(tiny_model, **inputs, **options)
    assert len({tuple(row) for row in free.tolist()}) > 6
    same = specdec_kernels.generate(tiny_model, **inputs, **options, seed=5)
    assert len({tuple(row) for row in same.tolist()}) == 1
    several = {**options, "num_return_sequences": 12}
    alone = specdec_kernels.generate(tiny_model, **left_pad(rows[:1]), **several)
    assert len({tuple(row) for row in alone.tolist()}) > 6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": 2**63}, ValueError, r"seed of row 0 must be in \[-2\*\*63, 2\*\*63\), got"),
        ({"seed": [0, 1, -(2**64)]}, ValueError, "seed of row 2 must be in"),
        ({"seed": torch.tensor([1, 2])}, ValueError, "one per row = 3, got 2"),
        ({"seed": 1.5}, TypeError, "float"),
        ({"temperature": [1, 1, float("inf")]}, ValueError, r"row 2 must be in \[0, inf\), got"),
        ({"top_k": [1.5, 1, 1]}, ValueError, "top_k of row 0 must be a whole number, got 1.5"),
    ],
)
def test_seeds_and_filters_out_of_range(tiny_model, rows, options, error, message) -> None:
    with pytest.raises(error, match=message):
        specdec_kernels.generate(
            tiny_model, **left_pad(rows), max_new_tokens=2, do_sample=True, **options
        )


class _Confident(StoppingCriteria):
    """Ends where the last token was sure enough; reads the scores, as documented for `generate`."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        self.seen.append(len(scores))
        chosen = scores[-1].softmax(-1).gather(1, input_ids[:, -1:])
        return chosen[:, 0] > 0.7


def test_a_criterion_may_read_the_scores(tiny_model, rows, truth) -> None:
    options = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "repetition_penalty": 1.2,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    inputs = left_pad(rows[:1])
    plain, ours = _Confident(), _Confident()
    want = tiny_model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([plain]))
    assert 1 < len(want.scores) < NEW, "the criterion must decide"
    longer = tiny_model.generate(**inputs, **options).sequences.tolist()
    decoder = SpeculativeDecoder(OracleDrafter(longer, VOCAB, max_nodes=16, max_hidden=9))
    got = tiny_model.generate(
        **inputs, **options, stopping_criteria=StoppingCriteriaList([ours]), custom_generate=decoder
    )
    assert got.sequences.tolist() == want.sequences.tolist()
    assert ours.seen == plain.seen
    assert len(got.scores) == len(want.scores)
    torch.testing.assert_close(got.scores, want.scores, atol=1e-4, rtol=1e-4)


def test_a_criterion_that_knows_the_batch_is_refused(tiny_model, rows) -> None:
    class Batch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
            return torch.tensor([False, True, False])

    with pytest.raises(ValueError, match=r"Batch must answer for \[1, L\] tokens, got \[3\] ans"):
        specdec_kernels.generate(
            tiny_model, **left_pad(rows), max_new_tokens=4,
            stopping_criteria=StoppingCriteriaList([Batch()]),
        )  # fmt: skip


def test_a_returned_cache_is_refused_by_other_loops(rows) -> None:
    """Plain decoding would take it for an empty one, and write something else."""
    model = make_tiny_model()
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    output = specdec_kernels.generate(model, **left_pad(rows[:1]), **options)
    cache = output["cache"] if "cache" in output else output["past_key_values"]
    with pytest.raises(ValueError, match="cache of a speculative output holds rows"):
        model.generate(output.sequences, past_key_values=cache, **options)
    again = specdec_kernels.generate(model, output.sequences, past_key_values=cache, **options)
    assert again.sequences[0].tolist() == greedy(model, rows[0], 8)
