"""The main job on the real model: fp32 equal to `generate`, bf16 up to near-ties."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from importlib import resources

import pytest
import torch
from prompts import left_pad
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec_kernels import (
    AutoDrafter,
    Drafter,
    OracleDrafter,
    PromptLookupDrafter,
    SpeculativeDecoder,
)
from specdec_kernels.drafters import DRAFTERS, SHIPPED, make_drafter
from specdec_kernels.drafters.shipped import FINGERPRINT, FOLDER, fingerprint, shipped_folder_for
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.target import HFTarget

pytestmark = pytest.mark.xdist_group("smollm2")  # one worker loads it, and writes the true texts

NEW = 48
LONG = 96
"""New tokens, and those of the exhaustive tests."""
NEAR_TIE = 0.25  # logits: a few bfloat16 steps at the size of a top logit


@pytest.fixture(scope="module")
def model(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Iterator[PreTrainedModel]:
    """Without an end token, so that every prompt gives the full number of tokens."""
    model, _ = smollm2
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    yield model
    model.generation_config.eos_token_id = eos


@pytest.fixture(scope="module")
def prompts(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> list[Tensor]:
    """The twelve prompts of the package, through the chat template."""
    _, tokenizer = smollm2
    lines = resources.files("specdec_kernels.bench").joinpath("prompts.jsonl").read_text("utf-8")
    rows = []
    for line in lines.splitlines():
        chat = [{"role": "user", "content": json.loads(line)["turns"][0]}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        rows.append(inputs["input_ids"][0])
    assert len(rows) >= 12
    return rows[:12]


def _plain(model: PreTrainedModel, rows: list[Tensor], new_tokens: int) -> list[list[int]]:
    return [
        model.generate(**left_pad([r]), max_new_tokens=new_tokens, do_sample=False)[0].tolist()
        for r in rows
    ]


@pytest.fixture(scope="module")
def truth(model: PreTrainedModel, prompts: list[Tensor]) -> list[list[int]]:
    """By `generate` in one batch, which in float32 takes a quarter of the time of twelve calls."""
    inputs = left_pad(prompts, model.generation_config.pad_token_id)
    output = model.generate(**inputs, max_new_tokens=NEW + 8, do_sample=False)
    padding = [inputs["input_ids"].shape[1] - len(prompt) for prompt in prompts]
    return [row[pad:].tolist() for row, pad in zip(output, padding, strict=True)]


@pytest.fixture(scope="module")
def long_truth(model: PreTrainedModel, prompts: list[Tensor]) -> list[list[int]]:
    return _plain(model, prompts, LONG + 8)


def _drafter(kind: str, nodes: int, truth: list[list[int]], vocab: int) -> Drafter:
    if kind != "oracle":
        return make_drafter(kind, max_nodes=nodes)
    return OracleDrafter(truth, vocab, max_nodes=nodes, max_hidden=min(12, nodes - 2))


def _assert_equal(
    model: PreTrainedModel,
    prompts: list[Tensor],
    truth: list[list[int]],
    chosen: list[int],
    drafter: Drafter,
    new: int = NEW,
) -> float:
    """Tokens per step of one batch whose rows must all equal plain decoding."""
    inputs = left_pad([prompts[i] for i in chosen], model.generation_config.pad_token_id)
    decoder = SpeculativeDecoder(drafter, budget=False)
    output = model.generate(**inputs, max_new_tokens=new, do_sample=False, custom_generate=decoder)
    assert decoder.stats.num_failures == 0
    for i, row in zip(chosen, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        assert row == truth[i][len(prompts[i]) : len(prompts[i]) + new], f"prompt {i}"
    return decoder.stats.tokens_per_step


def _batches(num_prompts: int, batch: int) -> list[list[int]]:
    """Every prompt at least once; the last batch is filled up from the first prompts."""
    starts = range(0, num_prompts, batch)
    return [[i % num_prompts for i in range(start, start + batch)] for start in starts]


KINDS = ("oracle", *SHIPPED, *(name for name in DRAFTERS if name != "none"))
SIZES = (70, 8, 32)


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_fp32_equals_generate_token_for_token(
    model, prompts, truth, report: Callable[[str], None], batch: int
) -> None:
    """All prompts in every batch size; the drafters and tree sizes take turns."""
    vocab, steps = model.config.vocab_size, []
    for turn, chosen in enumerate(_batches(len(prompts), batch)):
        kind, nodes = KINDS[turn % len(KINDS)], SIZES[(turn + turn // len(KINDS)) % len(SIZES)]
        drafter = _drafter(kind, nodes, truth, vocab)
        steps.append(_assert_equal(model, prompts, truth, chosen, drafter))
    mean = sum(steps) / len(steps)
    report(f"fp32, batch {batch}: {len(prompts)} prompts equal, {mean:.2f} tokens per step")


@pytest.mark.exhaustive
@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("nodes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_equals_generate_with_every_drafter_and_size(
    model, prompts, long_truth, report: Callable[[str], None], kind: str, nodes: int, batch: int
) -> None:
    drafter = _drafter(kind, nodes, long_truth, model.config.vocab_size)
    steps = [
        _assert_equal(model, prompts, long_truth, chosen, drafter, LONG)
        for chosen in _batches(len(prompts), batch)
    ]
    mean = sum(steps) / len(steps)
    report(f"fp32, {kind}, N {nodes}, batch {batch}: equal, {mean:.2f} tokens per step")


@pytest.mark.parametrize("temperature", [0.7, pytest.param(1.0, marks=pytest.mark.exhaustive)])
def test_seeded_sampling_equals_plain_sampling(model, prompts, temperature: float) -> None:
    options = {"do_sample": True, "temperature": temperature, "top_p": 0.9, "max_new_tokens": 32}
    rows = sorted(prompts, key=len)[:4]
    plain = [
        model.generate(
            **left_pad([r]), custom_generate=SpeculativeDecoder(None, seed=21), **options
        )
        for r in rows
    ]
    truth = [p[0].tolist() for p in plain]
    for drafter in (
        PromptLookupDrafter(16, min_probability=0.0),
        AutoDrafter(16),
        OracleDrafter(truth, model.config.vocab_size, max_nodes=32),
    ):
        for chosen in ([0], [1, 2, 3], [3, 0]):
            inputs = left_pad([rows[i] for i in chosen])
            decoder = SpeculativeDecoder(drafter, seed=21)
            output = model.generate(**inputs, custom_generate=decoder, **options)
            new = output[:, inputs["input_ids"].shape[1] :].tolist()
            assert new == [truth[i][len(rows[i]) :] for i in chosen]


def test_the_end_token_ends_a_row_as_in_generate(smollm2) -> None:
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    want = model.generate(**inputs, **options)
    got = model.generate(**inputs, **options, custom_generate=SpeculativeDecoder())
    assert got.tolist() == want.tolist()
    assert want.shape[1] < inputs["input_ids"].shape[1] + 60, "the prompt must end by itself"


@pytest.mark.parametrize("new", [NEW, pytest.param(LONG, marks=pytest.mark.exhaustive)])
def test_bf16_parts_from_generate_only_at_near_ties(
    smollm2, prompts, report: Callable[[str], None], new: int
) -> None:
    from specdec_kernels.hf import load_model

    model, _ = load_model("smollm2", dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    parted, gaps = 0, []
    prompts = prompts if new == LONG else sorted(prompts, key=len)[:6]  # slow in bf16 on most CPUs
    truth = _plain(model, prompts, new)
    drafters = (  # whose trees do not hang on time, as a budget's do
        PromptLookupDrafter(16),
        OracleDrafter(truth, model.config.vocab_size, max_nodes=32),
    )
    for drafter in drafters:
        decoder = SpeculativeDecoder(drafter)
        for row, want in zip(prompts, truth, strict=True):
            inputs = left_pad([row])
            got = model.generate(
                **inputs, max_new_tokens=new, do_sample=False, custom_generate=decoder
            )[0].tolist()
            first = next(
                (i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), None
            )
            if first is None:
                continue
            parted += 1
            with torch.no_grad():
                logits = model(torch.tensor([want[:first]])).logits[0, -1].float()
            gaps.append((logits.max() - logits[got[first]]).item())
    report(
        f"bf16: {parted} of {2 * len(prompts)} texts part from generate within {new} tokens; "
        f"top-2 gaps there, logits: {sorted(round(g, 3) for g in gaps)}"
    )
    assert all(gap <= NEAR_TIE for gap in gaps), gaps


def test_shipped_heads_know_their_target_in_any_dtype(smollm2) -> None:
    model, _ = smollm2
    for dtype in (torch.float32, torch.bfloat16):
        view = HFTargetView(HFTarget(copy.deepcopy(model).to(dtype), 1))
        found = shipped_folder_for(view)
        assert found is not None and found.name == SHIPPED["mlp"]
        assert fingerprint(view) == json.loads((found / "config.json").read_text())[FINGERPRINT]
    with torch.no_grad():  # a tuned model is another one
        view.target.model.get_input_embeddings().weight[0, 0] += 0.5
    assert shipped_folder_for(view) is None


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_heads_are_what_their_card_says(name: str) -> None:
    folder = FOLDER / SHIPPED[name]
    card = (folder / "README.md").read_text("utf-8")
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in card and "Apache-2.0" in card
    facts = json.loads((folder / "training.json").read_text("utf-8"))
    assert f"{facts['steps']} steps" in card and len(facts["curve"]) == facts["steps"]
    total = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert total <= 16 * 2**20


def test_auto_merges_the_shipped_heads(model, prompts, truth) -> None:
    """More tokens per step than from the text alone."""
    chosen = list(range(4))
    steps = [
        _assert_equal(model, prompts, truth, chosen, AutoDrafter(32, heads=heads))
        for heads in (None, "shipped")
    ]
    assert steps[1] > 1.05 * steps[0], steps
