"""The cache and the model between calls: continuing, growing, and after an interruption."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from conftest import make_tiny_model
from prompts import greedy, left_pad, random_prompts
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import specdec_kernels
from specdec_kernels import (
    AutoDrafter,
    Drafter,
    ModelDrafter,
    OracleDrafter,
    SpeculativeDecoder,
    TopKTree,
)
from specdec_kernels.hf.cache import TreeCache
from specdec_kernels.hf.draft_model import DraftModel

VOCAB = 101
OPTIONS = {"do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    return random_prompts((7, 11), VOCAB)


def _texts(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """Rows without their left padding."""
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    return [row[pad:] for row, pad in zip(output.tolist(), pads, strict=True)]


def _cache_of(output) -> object:
    return output["cache"] if "cache" in output else output["past_key_values"]


def _oracle(model, rows, new: int) -> SpeculativeDecoder:
    truth = [greedy(model, r, new + 8) for r in rows]
    return SpeculativeDecoder(OracleDrafter(truth, VOCAB, max_nodes=16))


def test_a_conversation_continues_from_the_returned_cache(tiny_model, rows) -> None:
    """A ragged batch: the second turn computes only what is new, and writes the same."""
    inputs = left_pad(rows)
    first = tiny_model.generate(
        **inputs, max_new_tokens=9, custom_generate=_oracle(tiny_model, rows, 9), **OPTIONS
    )
    cache = _cache_of(first)
    turn = random_prompts((3, 5), VOCAB, seed=9)
    texts = [torch.tensor(t) for t in _texts(first.sequences, inputs)]
    longer = [torch.cat([t, u]) for t, u in zip(texts, turn, strict=True)]
    widths: list[int] = []
    hook = tiny_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        second = specdec_kernels.generate(
            tiny_model,
            **left_pad(longer),
            max_new_tokens=9,
            past_key_values=cache,
            drafter=None,
            **OPTIONS,
        )
    finally:
        hook.remove()
    assert _texts(second.sequences, left_pad(longer)) == [greedy(tiny_model, r, 9) for r in longer]
    assert widths[0] == 4 + 6, "of each row the last token of the first turn, and the new ones"
    assert _cache_of(second) is cache


def test_an_edited_conversation_keeps_what_is_shared(tiny_model, rows) -> None:
    inputs = left_pad(rows[1:])
    first = specdec_kernels.generate(tiny_model, **inputs, max_new_tokens=4, **OPTIONS)
    edited = rows[1].clone()
    edited[6] = (edited[6] + 1) % VOCAB
    second = specdec_kernels.generate(
        tiny_model,
        **left_pad([edited]),
        max_new_tokens=6,
        past_key_values=_cache_of(first),
        **OPTIONS,
    )
    assert second.sequences[0].tolist() == greedy(tiny_model, edited, 6)


def test_a_cache_is_sized_once_and_grown_on_request(tiny_model, rows) -> None:
    inputs = left_pad(rows[:1])
    decoder = SpeculativeDecoder(OracleDrafter([], VOCAB, max_nodes=5))
    options = {**OPTIONS, "custom_generate": decoder}
    cache = _cache_of(tiny_model.generate(**inputs, max_new_tokens=4, **options))
    assert cache.layers[0].keys.shape[2] == 7 + 4 + 5
    before = cache.layers[0].keys.data_ptr()
    tiny_model.generate(**inputs, max_new_tokens=3, past_key_values=cache, **options)
    assert cache.layers[0].keys.data_ptr() == before
    tiny_model.generate(**inputs, max_new_tokens=30, past_key_values=cache, **options)
    assert cache.layers[0].keys.shape[2] == 7 + 30 + 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_interruption_leaves_the_model_and_the_cache_as_they_were(
    tiny_model, rows, error: type[BaseException]
) -> None:
    inputs = left_pad(rows[:1])
    first = specdec_kernels.generate(tiny_model, **inputs, max_new_tokens=5, **OPTIONS)
    cache, text = _cache_of(first), first.sequences[0]
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error

    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_model.modules()]
    attention = tiny_model.config._attn_implementation
    hook = tiny_model.model.layers[1].register_forward_hook(fail)
    longer = left_pad([torch.cat([text, text[:3]])])
    with pytest.raises(error):
        specdec_kernels.generate(
            tiny_model, **longer, max_new_tokens=9, past_key_values=cache, drafter=None, **OPTIONS
        )
    hook.remove()
    assert tiny_model.config._attn_implementation == attention
    left = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_model.modules()]
    assert left == hooks
    assert cache.lengths.tolist() == [len(text) - 1] == [len(cache.tokens[0])]
    again = specdec_kernels.generate(
        tiny_model, **longer, max_new_tokens=9, past_key_values=cache, **OPTIONS
    )
    assert again.sequences[0].tolist() == greedy(tiny_model, longer["input_ids"][0], 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drafter", ["none", "auto", "model"])
def test_nothing_of_a_text_outlives_it(
    drafter: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffers are freed at once, not when Python next looks for cycles: a GPU fills before."""
    made: weakref.WeakSet[TreeCache] = weakref.WeakSet()
    own = TreeCache.__init__

    def remembered(cache: TreeCache, *args: object) -> None:
        own(cache, *args)
        made.add(cache)
        num_made.append(1)

    num_made: list[int] = []
    monkeypatch.setattr(TreeCache, "__init__", remembered)
    model = make_tiny_model(3).requires_grad_(False).to(dtype)
    inputs = left_pad(random_prompts((7, 11), VOCAB))
    drafters: dict[str, Callable[[], Drafter | None]] = {
        "none": lambda: None,
        "auto": AutoDrafter,
        "model": lambda: ModelDrafter(DraftModel(make_tiny_model(2).to(dtype)), TopKTree(6)),
    }
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            decoder = SpeculativeDecoder(drafters[drafter](), budget=False)
            model.generate(**inputs, max_new_tokens=12, custom_generate=decoder, do_sample=False)
            del decoder
            assert num_made and not len(made)
    finally:
        gc.enable()


def test_a_copied_cache_stands_for_itself(tiny_model, rows) -> None:
    """Two continuations of one beginning, as transformers' users write them."""
    inputs = left_pad(rows)
    first = tiny_model.generate(
        **inputs, max_new_tokens=9, custom_generate=SpeculativeDecoder(None), **OPTIONS
    )
    cache = _cache_of(first)
    copied = copy.deepcopy(cache)
    # bits: slots that nobody has written may hold NaN
    before = [layer.keys.view(torch.int32).clone() for layer in cache.tree_layers]
    texts = _texts(first.sequences, inputs)
    longer = [torch.tensor([*text, 5 + i]) for i, text in enumerate(texts)]
    second = specdec_kernels.generate(
        tiny_model, **left_pad(longer), max_new_tokens=9, past_key_values=copied, drafter=None,
        **OPTIONS,
    )  # fmt: skip
    for layer, keys in zip(cache.tree_layers, before, strict=True):
        assert layer.cache is cache and torch.equal(layer.keys.view(torch.int32), keys)
    assert all(layer.cache is copied for layer in copied.tree_layers)
    assert _cache_of(second) is copied
    wanted = [greedy(tiny_model, row, 9) for row in longer]
    assert _texts(second.sequences, left_pad(longer)) == wanted


def test_threads_may_share_a_model(tiny_model, rows) -> None:
    """The first one to finish must not take the attention from the other one, nor keep it."""
    attention = tiny_model.config._attn_implementation
    second_runs, first_is_done = threading.Event(), threading.Event()
    texts: dict[int, list[int]] = {}

    class Meet(StoppingCriteria):
        """The first one waits until the second one runs, which then waits until the first ends."""

        def __init__(self, is_first: bool) -> None:
            self.is_first = is_first

        def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
            if self.is_first and not second_runs.is_set():
                second.start()
                assert second_runs.wait(60)
            elif not self.is_first:
                second_runs.set()
                assert first_is_done.wait(60)
            return torch.tensor([False])

    def run(place: int) -> None:
        try:
            output = specdec_kernels.generate(
                tiny_model, **left_pad([rows[place]]), max_new_tokens=8, do_sample=False,
                stopping_criteria=StoppingCriteriaList([Meet(place == 0)]),
            )  # fmt: skip
            texts[place] = output[0].tolist()
        finally:
            second_runs.set()

    second = threading.Thread(target=run, args=(1,))
    run(0)
    assert tiny_model.config._attn_implementation != attention, "the second one still runs"
    first_is_done.set()
    second.join()
    assert tiny_model.config._attn_implementation == attention
    assert [texts.get(i) for i in range(2)] == [greedy(tiny_model, row, 8) for row in rows]


def test_a_cache_of_something_else_is_refused(tiny_model, rows) -> None:
    inputs = left_pad(rows[:1])
    cache = _cache_of(specdec_kernels.generate(tiny_model, **inputs, max_new_tokens=2, **OPTIONS))
    with pytest.raises(ValueError, match=r"the cache is of 1 rows .* got 2"):
        specdec_kernels.generate(
            tiny_model, **left_pad(rows), max_new_tokens=2, past_key_values=cache
        )
    foreign = DynamicCache()
    tiny_model(inputs["input_ids"], past_key_values=foreign)
    with pytest.raises(ValueError, match="a DynamicCache that holds tokens cannot be continued"):
        specdec_kernels.generate(tiny_model, **inputs, max_new_tokens=2, past_key_values=foreign)
