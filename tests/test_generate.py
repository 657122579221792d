"""Speculative generation on a small random model: equal to plain decoding, whatever the drafter,
batch and options.
"""

from __future__ import annotations

import threading

import pytest
import torch
from prompts import greedy, left_pad, random_prompts
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import specdec_kernels
from specdec_kernels import OracleDrafter, PromptLookupDrafter, SpeculativeDecoder

NEW = 40
VOCAB = 101


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    return random_prompts((21, 30, 26), VOCAB)


@pytest.fixture(scope="module")
def truth(tiny_model: PreTrainedModel, rows: list[torch.Tensor]) -> list[list[int]]:
    return [greedy(tiny_model, row, NEW + 8) for row in rows]


def _new_tokens(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("nodes", [1, 2, 8, 32, 70, 130])
def test_greedy_equals_generate_in_a_ragged_batch(
    tiny_model, rows, truth, nodes: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_BACKEND", backend)
    inputs = left_pad(rows)
    decoder = SpeculativeDecoder(OracleDrafter(truth, VOCAB, max_nodes=nodes))
    output = tiny_model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder
    )
    want = [t[len(r) : len(r) + NEW] for t, r in zip(truth, rows, strict=True)]
    assert _new_tokens(output, inputs) == want
    if nodes >= 8:
        assert decoder.stats.tokens_per_step > 2, "the drafter must exercise acceptance"


def test_repetitive_text_is_drafted_by_prompt_lookup(tiny_model, rows) -> None:
    prompt = torch.cat([rows[0]] * 3)
    decoder = SpeculativeDecoder(PromptLookupDrafter(8, min_probability=0.0))
    inputs = left_pad([prompt, rows[1]])
    output = tiny_model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder
    )
    want = [greedy(tiny_model, r, NEW)[len(r) :] for r in (prompt, rows[1])]
    assert _new_tokens(output, inputs) == want
    assert sum(decoder.stats.num_drafted) > 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_seeded_sampling_equals_plain_sampling_in_any_batch(
    tiny_model, rows, temperature: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_BACKEND", backend)
    options = {"do_sample": True, "temperature": temperature, "top_p": 0.9, "max_new_tokens": NEW}
    plain = []
    for seed, row in enumerate(rows):
        decoder = SpeculativeDecoder(None, seed=seed)
        plain.append(tiny_model.generate(**left_pad([row]), custom_generate=decoder, **options)[0])
    truth = [p.tolist() for p in plain]
    assert len({tuple(t[-NEW:]) for t in truth}) == len(rows)
    for order in ([0, 1, 2], [2, 0], [1]):
        inputs = left_pad([rows[i] for i in order])
        drafter = OracleDrafter(truth, VOCAB, max_nodes=24)
        decoder = SpeculativeDecoder(drafter, seed=order)
        output = tiny_model.generate(**inputs, custom_generate=decoder, **options)
        assert _new_tokens(output, inputs) == [truth[i][len(rows[i]) :] for i in order]
        assert decoder.stats.tokens_per_step > 2


def test_a_seed_gives_the_same_sample_twice_and_another_seed_another(tiny_model, rows) -> None:
    def run(seed: int | None) -> list[int]:
        decoder = SpeculativeDecoder(seed=seed)
        options = {"do_sample": True, "max_new_tokens": NEW, "custom_generate": decoder}
        return tiny_model.generate(**left_pad(rows[:1]), **options)[0].tolist()

    assert run(5) == run(5) != run(6)
    torch.manual_seed(1)
    first = run(None)
    torch.manual_seed(1)
    assert run(None) == first != run(None)


def test_returned_sequences_of_one_prompt_differ(tiny_model, rows) -> None:
    output = specdec_kernels.generate(
        tiny_model,
        **left_pad(rows[:2]),
        seed=3,
        do_sample=True,
        num_return_sequences=2,
        max_new_tokens=20,
    )
    alone = specdec_kernels.generate(
        tiny_model, **left_pad(rows[1:2]), seed=4, do_sample=True, max_new_tokens=20
    )
    assert output.shape[0] == 4
    assert output[2].tolist() != output[3].tolist()
    assert output[3].tolist() == alone[0].tolist()[-output.shape[1] :]


def test_the_end_token_inside_an_accepted_path_ends_the_row(tiny_model, rows, truth) -> None:
    """Row 0 ends at its 10th new token; the others go on; the rest of row 0 is padding."""
    eos = truth[0][len(rows[0]) + 9]
    inputs = left_pad(rows)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    want = tiny_model.generate(**inputs, **options)
    decoder = SpeculativeDecoder(OracleDrafter(truth, VOCAB, max_nodes=16, max_hidden=9))
    got = tiny_model.generate(**inputs, custom_generate=decoder, **options)
    assert got.tolist() == want.tolist()
    assert want[0, inputs["input_ids"].shape[1] + 9] == eos


def test_stop_criteria_are_asked_after_every_token(tiny_model, rows, truth) -> None:
    class StopAt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids[0, -1].item() == stop_token])

    stop_token = truth[0][len(rows[0]) + 6]
    decoder = SpeculativeDecoder(OracleDrafter(truth, VOCAB, max_nodes=16, max_hidden=9))
    output = tiny_model.generate(
        **left_pad(rows[:1]), max_new_tokens=NEW, do_sample=False, custom_generate=decoder,
        stopping_criteria=StoppingCriteriaList([StopAt()]),
    )  # fmt: skip
    first = truth[0].index(stop_token, len(rows[0]))
    assert output[0].tolist() == truth[0][: first + 1]


def test_max_length_is_never_passed(tiny_model, rows, truth) -> None:
    drafter = OracleDrafter(truth, VOCAB, max_nodes=16, max_hidden=9)
    for new in range(1, 12):
        output = tiny_model.generate(
            **left_pad(rows[:1]), max_new_tokens=new, do_sample=False,
            custom_generate=SpeculativeDecoder(drafter),
        )  # fmt: skip
        assert output[0].tolist() == truth[0][: len(rows[0]) + new]


def test_return_dict_and_generation_config_are_honoured(tiny_model, rows, truth) -> None:
    output = specdec_kernels.generate(
        tiny_model, left_pad(rows[:1])["input_ids"], max_new_tokens=5, return_dict_in_generate=True
    )
    assert output.sequences[0].tolist() == truth[0][: len(rows[0]) + 5]


def test_models_may_view_the_positions(tiny_model, rows) -> None:
    """As kosmos-2 does."""
    sizes: list[int] = []
    hook = tiny_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["position_ids"].view(-1).shape[0]),
        with_kwargs=True,
    )
    try:
        specdec_kernels.generate(tiny_model, **left_pad(rows), drafter=None, max_new_tokens=3)
    finally:
        hook.remove()
    assert sizes == [3 * 30, 3, 3]


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended.set()


def test_a_streamer_gets_every_token_once_and_is_ended(tiny_model, rows, truth) -> None:
    streamer = _Recorder()
    drafter = OracleDrafter(truth, VOCAB, max_nodes=16)
    specdec_kernels.generate(
        tiny_model, **left_pad(rows[:1]), drafter=drafter, streamer=streamer, max_new_tokens=NEW
    )
    assert streamer.tokens == truth[0][: len(rows[0]) + NEW]
    assert streamer.ended.is_set()


def test_a_streamer_is_ended_after_an_error(tiny_model, rows) -> None:
    streamer = _Recorder()
    with pytest.raises(ValueError, match="a streamer takes one row, got a batch of 3"):
        specdec_kernels.generate(tiny_model, **left_pad(rows), streamer=streamer, max_new_tokens=4)
    assert streamer.ended.is_set()


def test_the_listener_learns_which_tokens_were_drafted(tiny_model, rows, truth) -> None:
    seen: list[tuple[int, list[int], int]] = []
    decoder = SpeculativeDecoder(
        OracleDrafter(truth, VOCAB, max_nodes=16),
        listener=lambda row, tokens, accepted: seen.append((row, tokens, accepted)),
    )
    tiny_model.generate(**left_pad(rows[:1]), max_new_tokens=NEW, custom_generate=decoder)
    assert [t for _, tokens, _ in seen for t in tokens] == truth[0][len(rows[0]) :][:NEW]
    assert sum(accepted for *_, accepted in seen) == sum(decoder.stats.num_accepted) > 10
