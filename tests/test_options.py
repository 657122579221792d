"""The options of `generate`, batches, and scripts that were written for it."""

from __future__ import annotations

import threading

import pytest
import torch
from prompts import greedy, left_pad, random_prompts
from transformers import (
    GenerationConfig,
    TextIteratorStreamer,
    pipeline,
)

import specdec_kernels
from specdec_kernels import OracleDrafter, SpeculativeDecoder

VOCAB = 101
NEW = 16


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    return random_prompts((7, 11, 9), VOCAB)


@pytest.fixture(scope="module")
def truth(tiny_model, rows) -> list[list[int]]:
    return [greedy(tiny_model, row, NEW + 8) for row in rows]


def _oracle(truth: list[list[int]]) -> OracleDrafter:
    return OracleDrafter(truth, VOCAB, max_nodes=16, max_hidden=9)


def test_scores_and_logits_equal_those_of_generate(tiny_model, rows, truth) -> None:
    ends = [truth[0][len(rows[0]) + 5], truth[1][len(rows[1]) + 11]]
    options = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": ends,
        "pad_token_id": 0,
        "output_scores": True,
        "output_logits": True,
        "return_dict_in_generate": True,
        "repetition_penalty": 1.1,
        "suppress_tokens": [3, 4],
    }
    inputs = left_pad(rows)
    want = tiny_model.generate(**inputs, **options)
    decoder = SpeculativeDecoder(_oracle(truth))
    got = tiny_model.generate(**inputs, custom_generate=decoder, **options)
    assert got.sequences.tolist() == want.sequences.tolist()
    new = got.sequences[:, inputs["input_ids"].shape[1] :]
    assert len(got.scores) == len(got.logits) == len(want.scores) == new.shape[1]
    has_ended = torch.zeros(len(rows), dtype=torch.bool)
    for step in range(new.shape[1]):
        for ours, theirs in ((got.scores, want.scores), (got.logits, want.logits)):
            live = ~has_ended
            torch.testing.assert_close(ours[step][live], theirs[step][live], atol=2e-4, rtol=2e-4)
            assert not ours[step][has_ended].any()
        has_ended |= torch.isin(new[:, step], torch.tensor(ends))
    assert has_ended[0]


def test_one_row_and_a_batch_give_the_same(tiny_model, rows, truth) -> None:
    """Greedy and sampled rows with parameters of their own, in one batch and alone."""
    parameters = {"temperature": [0.0, 0.7, 1.4], "top_k": [0, 20, 7], "top_p": [1.0, 0.9, 0.95]}
    options = {"do_sample": True, "max_new_tokens": NEW}

    def run(chosen: list[int], drafter: object) -> list[list[int]]:
        inputs = left_pad([rows[i] for i in chosen])
        output = specdec_kernels.generate(
            tiny_model, **inputs, drafter=drafter, seed=[40 + i for i in chosen],
            **{name: [values[i] for i in chosen] for name, values in parameters.items()}, **options,
        )  # fmt: skip
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    alone = [run([i], None)[0] for i in range(3)]
    assert alone[0] == truth[0][len(rows[0]) :][:NEW], "temperature 0 is greedy"
    known = [[*row.tolist(), *text] for row, text in zip(rows, alone, strict=True)]
    assert run([0, 1, 2], _oracle(known)) == alone
    assert run([2, 0], _oracle(known)) == [alone[2], alone[0]]
    different = {name: values[::-1] for name, values in parameters.items()}
    parameters.update(different)
    assert run([0, 1, 2], None) != alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": [1.0]}, "temperature must be one per row = 3, got 1"),
        ({"top_p": [0.5, 0.5, 1.5]}, r"top_p of row 2 must be in \[0, 1\], got 1.5"),
        ({"top_k": [1, 1, 1], "do_sample": False}, "top_k per row need do_sample=True"),
    ],
)
def test_wrong_parameters_per_row(tiny_model, rows, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specdec_kernels.generate(
            tiny_model, **left_pad(rows), **{"do_sample": True, "max_new_tokens": 4, **options}
        )


def test_a_finished_row_is_not_computed_on(tiny_model, rows, truth) -> None:
    """Rows end at 2 and 16 new tokens: the first one takes part in no later step."""
    end = truth[0][len(rows[0]) + 1]
    decoder = SpeculativeDecoder(None)
    output = tiny_model.generate(
        **left_pad(rows[:2]), max_new_tokens=NEW, do_sample=False, custom_generate=decoder,
        eos_token_id=end, pad_token_id=0,
    )  # fmt: skip
    assert decoder.stats.num_steps[0] < decoder.stats.num_steps[1]
    assert output[0, 13:].tolist() == [0] * (output.shape[1] - 13)


def test_a_time_limit_ends_the_text(tiny_model, rows) -> None:
    output = specdec_kernels.generate(
        tiny_model, **left_pad(rows[:1]), max_new_tokens=200, max_time=1e-9
    )
    assert output.shape[1] == len(rows[0]) + 1


def test_a_stop_string_is_never_overshot(bytes_model) -> None:
    model, tokenizer = bytes_model
    inputs = tokenizer("abcabc", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    text = tokenizer.decode(plain[inputs["input_ids"].shape[1] :])
    stop = next(text[i : i + 2] for i in range(4, 30) if text[i : i + 2].isascii())
    want = model.generate(
        **inputs, max_new_tokens=40, do_sample=False, stop_strings=stop, tokenizer=tokenizer
    )[0]
    config = GenerationConfig(max_new_tokens=40, stop_strings=stop, pad_token_id=0)
    drafter = OracleDrafter([plain.tolist()], 200, max_nodes=16, max_hidden=14)
    for options in ({"stop_strings": stop}, {"generation_config": config}):
        got = specdec_kernels.generate(
            model, **inputs, **{"max_new_tokens": 40, "do_sample": False, **options},
            tokenizer=tokenizer, drafter=drafter,
        )  # fmt: skip
        assert got[0].tolist() == want.tolist() != plain.tolist()


def test_a_script_for_assisted_decoding_runs_unchanged(bytes_model) -> None:
    model, tokenizer = bytes_model
    inputs = tokenizer("abcabcabc", return_tensors="pt")
    arguments = {
        "prompt_lookup_num_tokens": 6,
        "max_matching_ngram_size": 3,
        "num_assistant_tokens": 8,
        "num_assistant_tokens_schedule": "constant",
        "max_new_tokens": 24,
        "do_sample": False,
    }
    want = model.generate(**inputs, **arguments)
    assert specdec_kernels.generate(model, **inputs, **arguments).tolist() == want.tolist()
    config = GenerationConfig(prompt_lookup_num_tokens=6, max_new_tokens=24, do_sample=False)
    config.pad_token_id = 0
    got = specdec_kernels.generate(model, **inputs, generation_config=config)
    assert got.tolist() == want.tolist()


def test_a_pipeline_speculates(bytes_model) -> None:
    model, tokenizer = bytes_model
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    decoder = SpeculativeDecoder("prompt_lookup")
    options = {"max_new_tokens": 24, "do_sample": False}
    want = write("abcabc", **options)
    assert write("abcabc", custom_generate=decoder, **options) == want
    assert decoder.stats.num_accepted[0] > 0


def test_a_text_iterator_streamer_gets_the_text_and_ends(bytes_model) -> None:
    model, tokenizer = bytes_model
    inputs = tokenizer("abcabc", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=120)
    options = {**inputs, "max_new_tokens": 24, "do_sample": False}
    thread = threading.Thread(
        target=specdec_kernels.generate, args=(model,), kwargs={**options, "streamer": streamer}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    new = model.generate(**options)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(new)
