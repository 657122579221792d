"""The loop on an accelerator, a pretended one: everything lies where it is computed, a step waits
once, and passes are timed by when they were over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from head_checkpoints import LAYERS, save_all
from pretend_device import DEVICE, moved, pretending
from prompts import left_pad, random_prompts
from test_heads import TREES
from test_speculative_streaming import _saved
from tiny_media import PLANS, media_inputs, media_prompts, tiny_media_model
from tiny_models import VOCAB
from tiny_models import tiny_model as tiny_of
from toy_target import ToyTarget
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import specdec_kernels
from specdec_kernels import (
    AutoDrafter,
    Budget,
    CostCurve,
    ModelDrafter,
    SpeculativeDecoder,
    TopKTree,
    decoding,
    load_heads,
    pass_timer,
)
from specdec_kernels.drafters import PromptLookupDrafter
from specdec_kernels.hf import DraftModel
from specdec_kernels.hf.target import HFTarget
from specdec_kernels.pass_timer import PassTimer
from specdec_kernels.tree import at_once

NEW = 10
pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="to pretend, PyTorch must be built with CUDA"
)
TWO_LEVELS = TopKTree(4, depth=2, width=2)
SAMPLED = {"do_sample": True, "seed": [1, 2, 3]}


class Events:
    """Stands in for `torch.Event`: work that is queued is done when somebody waits for it."""

    def __init__(self) -> None:
        self.done = self.queued = 0.0

    def __call__(self, device: torch.device, *, enable_timing: bool) -> Any:
        assert device.type == "cuda" and enable_timing
        event = SimpleNamespace(at=0.0)

        def elapsed_time(end: Any) -> float:
            assert end.at <= self.done, "not waited for"
            return 1e3 * (end.at - event.at)

        event.record = lambda: setattr(event, "at", self.queued)
        event.synchronize = lambda: setattr(self, "done", max(self.done, event.at))
        event.elapsed_time = elapsed_time
        return event


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    made = Events()
    monkeypatch.setattr(torch, "Event", made)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    return made


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_tiny_model(LAYERS)


@pytest.fixture(scope="module")
def draft_model() -> PreTrainedModel:
    return make_tiny_model(1)


@pytest.fixture(scope="module")
def heads(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("heads")
    save_all(folder, target)
    return folder


def _inputs() -> dict[str, torch.Tensor]:
    return left_pad(random_prompts((9, 14, 5), VOCAB))


def _check_same(
    generate: Callable[..., torch.Tensor],
    *models: PreTrainedModel,
    default: torch.dtype = torch.bfloat16,
    rows: dict[str, torch.Tensor] | None = None,
) -> None:
    """The same text on the device as on the CPU, and whatever is made where nobody says how."""
    rows = _inputs() if rows is None else rows
    want = generate(*models, **rows)
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):  # whose tensors have no values
            assert generate(*models, **rows).tolist() == want.tolist()
    finally:
        torch.set_default_dtype(torch.float32)
    with pretending():
        inputs = {name: tensor.to(DEVICE) for name, tensor in rows.items()}
        output = generate(*map(moved, models), **inputs)
        assert output.device == DEVICE
        assert output.tolist() == want.tolist()


def _generating(make: Callable[..., Any], **options: Any) -> Callable[..., torch.Tensor]:
    """Generates with the drafter that `make` makes of all models but the first."""
    names = ("seed", "temperature", "top_k", "top_p", "min_p")
    own = {name: options.pop(name) for name in names if isinstance(options.get(name), list)}

    def generate(model: Any, *others: Any, **inputs: Any) -> torch.Tensor:
        decoder = SpeculativeDecoder(make(*others), budget=False, **own)
        options.setdefault("do_sample", False)
        output = model.generate(**inputs, max_new_tokens=NEW, custom_generate=decoder, **options)
        assert decoder.stats is not None and not decoder.stats.failures
        return output if isinstance(output, torch.Tensor) else output.sequences

    return generate


@pytest.mark.parametrize("drafter", [None, "auto", "prompt_lookup", "token_recycling"])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_from_the_text(target, events, drafter, options: dict[str, Any]) -> None:
    _check_same(_generating(lambda: drafter, **options), target)


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("medusa", "top-k"),
        ("speculator-lent", "greedy drafts"),
        ("eagle-1", "chain"),
        ("eagle-3-rows", "top-k"),
        ("eagle-3-full", "greedy drafts"),
    ],
)
def test_trained_heads(target, heads, events, name: str, tree: str) -> None:
    make = lambda: ModelDrafter(load_heads(heads / name), TREES[tree])  # noqa: E731
    _check_same(_generating(make), target)


def test_streams(tmp_path: Path, events) -> None:
    streams = _saved(tmp_path)
    make = lambda: ModelDrafter(load_heads(streams), TREES["top-k"])  # noqa: E731
    _check_same(_generating(make), make_tiny_model())


@pytest.mark.parametrize("name", ["speculator-some", "eagle-3"])
def test_heads_in_a_merged_tree(target, heads, events, name: str) -> None:
    _check_same(_generating(lambda: AutoDrafter(heads=load_heads(heads / name))), target)


@pytest.mark.parametrize("tree", TREES)
def test_a_draft_model(target, draft_model, events, tree: str) -> None:
    make = lambda model: ModelDrafter(DraftModel(model), TREES[tree])  # noqa: E731
    _check_same(_generating(make, **SAMPLED, top_k=9), target, draft_model)


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl", "gemma3"])
def test_prompts_with_images(events, model_type: str) -> None:
    model = tiny_media_model(model_type)
    inputs = media_inputs(model_type, media_prompts(model_type, *PLANS))
    if model_type == "qwen3_vl":  # which finds them in a way that needs a real device
        ids = inputs["input_ids"]
        inputs["position_ids"] = model._prepare_position_ids_for_generation(ids, inputs)
    _check_same(_generating(lambda: "auto"), model, rows=inputs)


class _StopAt20(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 20, device=input_ids.device)


@pytest.mark.parametrize(
    "options",
    [
        {
            **SAMPLED,
            "temperature": [0.0, 0.7, 1.0],
            "top_k": [0, 5, 9],
            "top_p": [1.0, 0.9, 0.5],
            "min_p": [0.0, 0.1, 0.0],
        },
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": [5, 7, 9, 11, 30, 41, 60, 77]},
        {"suppress_tokens": [3, 4]},
        {"suppress_tokens": [3, 4], "sequence_bias": [[[3], 2.0], [[4, 5], 1.0]]},
        {**SAMPLED, "typical_p": 0.9, "renormalize_logits": True},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(3, 60))},
        {"output_scores": True, "output_logits": True, "return_dict_in_generate": True},
        {"stopping_criteria": StoppingCriteriaList([_StopAt20()]), "max_time": 1e3},
        {"do_sample": True, "seed": [1] * 6, "num_return_sequences": 2},
    ],
    ids=lambda options: "-".join(name for name in options if name not in SAMPLED) or "several",
)
def test_what_a_request_may_ask_for(target, events, options: dict[str, Any]) -> None:
    # transformers' own biases are of the default dtype, which must be that of the scores
    default = torch.float32 if "sequence_bias" in options else torch.bfloat16
    _check_same(_generating(lambda: "auto", **options), target, default=default)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_attention_of_other_kinds(events, model_type: str) -> None:
    """Softcap and windows, sinks, chunks, latent keys."""
    model = tiny_of(model_type).eval()
    model.set_experts_implementation("eager")  # others are of the device
    _check_same(_generating(lambda: "auto"), model)


def test_a_conversation_that_goes_on(target, heads, events) -> None:
    def generate(model: Any, **inputs: Any) -> torch.Tensor:
        drafter = ModelDrafter(load_heads(heads / "eagle-3"), TREES["top-k"])
        options = {"max_new_tokens": 8, "do_sample": False, "drafter": drafter}
        first = specdec_kernels.generate(model, **inputs, **options, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, inputs["input_ids"][:, -3:]], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 11), value=1)
        keyword = "cache" if "cache" in first else "past_key_values"
        options[keyword] = first[keyword]
        return specdec_kernels.generate(model, longer, attention_mask=mask, **options)

    _check_same(generate, target)


def test_what_lies_elsewhere_is_refused_here_as_there() -> None:
    """The pretended device sees mistakes."""
    with pretending() as transfers:
        there = torch.arange(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there + torch.arange(3)
        with pytest.raises(RuntimeError, match=r"tree_mask.*on one device"):
            specdec_kernels.tree_mask(there[None].int() - 1, torch.tensor([3]).int())
        assert (there + torch.tensor(1))[1:].cpu().tolist() == [2, 3]
        assert (transfers.reads, transfers.writes) == (1, 0)
        assert bool(there[2] == 2) and there[there > 0].shape == (2,)
        assert (transfers.reads, transfers.writes) == (3, 0)
        torch.tensor([1, 2], device=DEVICE)
        assert (transfers.reads, transfers.writes) == (3, 1)


@pytest.mark.parametrize(
    ("make", "reads", "writes"),
    [
        (lambda heads: None, 0, 0),
        # whose trees are checked
        (lambda heads: PromptLookupDrafter(), 1, 0),
        # which reads the target's candidates after each node, too
        (lambda heads: AutoDrafter(heads=None), 2, 0),
        (lambda heads: ModelDrafter(load_heads(heads / "speculator-some"), TWO_LEVELS), 5, 2),
        (lambda heads: ModelDrafter(load_heads(heads / "eagle-3"), TWO_LEVELS), 5, 4),
    ],
    ids=["none", "prompt_lookup", "auto", "speculator", "eagle"],
)
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_step_waits_once_for_its_decision(
    target, heads, events, make, reads: int, writes: int, options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as often as the drafter has to; it gives the trees, positions, and how much is kept."""
    before: list[tuple[int, int]] = []
    forward, verify = HFTarget.forward, decoding.verify
    with pretending() as transfers:

        def counted(self: HFTarget, tree: Any) -> torch.Tensor:
            before.append((transfers.reads, transfers.writes))
            return forward(self, tree)

        def launched(*args: Any, **kwargs: Any) -> Any:
            answer = verify(*args, **kwargs)
            assert before[-1] == (transfers.reads, transfers.writes), "waited for the pass"
            return answer

        monkeypatch.setattr(HFTarget, "forward", counted)
        monkeypatch.setattr(decoding, "verify", launched)
        inputs = {name: tensor.to(DEVICE) for name, tensor in _inputs().items()}
        _generating(lambda: make(heads), **options)(moved(target), **inputs)
    steps = {(b - a, d - c) for (a, c), (b, d) in itertools.pairwise(before[:-2])}
    assert len(before) > 5 and steps == {(1 + reads, 3 + writes)}


def test_what_goes_there_at_once_is_aligned_and_keeps_its_type() -> None:
    """To 16 bytes, as if each had been allocated: kernels are chosen by that."""
    odd = torch.tensor([[7], [8], [9]])
    values = [torch.arange(3), odd, odd.int(), torch.tensor(4), odd.to(torch.int8), odd]
    with pretending() as transfers:
        there = at_once(DEVICE, *values)
        assert (transfers.reads, transfers.writes) == (0, 1)
        for own, moved_one in zip(values, there, strict=True):
            assert moved_one.device == DEVICE and moved_one.dtype == own.dtype
            assert moved_one.storage_offset() * own.element_size() % 16 == 0
            assert moved_one.tolist() == own.tolist()


def test_a_pass_takes_what_the_accelerator_takes(events) -> None:
    timer = PassTimer(DEVICE)
    for seconds in (0.5, 2.0):
        events.queued += 7.0  # somebody else's
        timer.start()
        events.queued += seconds
        timer.stop()
        events.queued += 3.0
        assert timer.seconds() == pytest.approx(seconds)


def test_on_a_cpu_it_takes_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 3.5])
    monkeypatch.setattr(pass_timer, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    timer = PassTimer(torch.device("cpu"))
    timer.start()
    timer.stop()
    assert timer.seconds() == 2.5


def test_the_budget_learns_when_a_pass_was_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the call came back, which on an accelerator is long before."""
    told: list[float] = []

    class Told(Budget):
        def record(self, *, forward_seconds: float, **others: Any) -> None:
            told.append(forward_seconds)

    class Slow:
        def __init__(self, device: torch.device) -> None:
            self.start = self.stop = lambda: None
            self.seconds = lambda: 4.0

    monkeypatch.setattr(decoding, "PassTimer", Slow)
    budget = Told(CostCurve((1, 2), (1.0, 1.0)))
    prompts = [[1, 2, 3, 1, 2, 3]]
    _, stats = decoding.decode(
        ToyTarget(6), PromptLookupDrafter(), prompts, max_lengths=[30], budget=budget
    )
    assert set(told) == {4.0} and stats.forward_seconds == 4.0 * len(told)
    assert 0.0 <= stats.verify_seconds < 4.0
