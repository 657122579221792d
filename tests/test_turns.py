"""Calls that share a model: threads take turns, and plain calls in between disturb nobody."""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from head_checkpoints import LAYERS, save_all
from prompts import greedy, left_pad, random_prompts
from test_speculative_streaming import _saved
from tiny_models import VOCAB
from tiny_models import tiny_model as tiny_of
from transformers import PreTrainedModel

from specdec_kernels import AutoDrafter, ModelDrafter, SpeculativeDecoder, TopKTree, load_heads
from specdec_kernels.hf import DraftModel
from specdec_kernels.hf import turns as turns_module
from specdec_kernels.hf.attention import NAME, tree_attention_in
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.target import HFTarget
from specdec_kernels.hf.turns import turn

NEW = 12
LONG = 60.0  # seconds, for what comes at once
PROMPT, OTHER = random_prompts((9, 14), VOCAB)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_tiny_model(LAYERS)


@pytest.fixture(scope="module")
def heads(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    save_all(folder, target)
    return folder


def _write(model: PreTrainedModel, decoder: Any, prompt: torch.Tensor = PROMPT) -> Any:
    inputs = left_pad([prompt]) | {"max_new_tokens": NEW, "do_sample": False}
    return model.generate(**inputs, custom_generate=decoder)[0].tolist()


class Thread(threading.Thread):
    """Calls a function, and has its result or raises its error when joined."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._result: Any = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._result = self._call()
        except Exception as error:  # noqa: BLE001 - for whoever joins
            self._error = error

    def result(self) -> Any:
        if self.ident is not None:
            self.join(LONG)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._result


def _waits(*, having: tuple[object, ...], wanting: tuple[object, ...]) -> bool:
    """Whether a thread that wants these things waits for one that has those."""
    entered = threading.Event()

    def enter() -> None:
        with turn(wanting):
            entered.set()

    thread = Thread(enter)
    with turn(having):
        thread.start()
        was_alone = not entered.wait(0.1 if set(map(id, having)) & set(map(id, wanting)) else LONG)
    thread.result()
    assert entered.is_set() and not turns_module._waiting
    return was_alone


def test_a_turn_is_of_everything_that_is_wanted() -> None:
    a, b, c = [], [], []  # equal, but not the same
    assert _waits(having=(a,), wanting=(a,))
    assert _waits(having=(a, b), wanting=(c, b))
    assert not _waits(having=(a, b), wanting=(c,))
    assert not _waits(having=(), wanting=(a, b, c))


def test_who_has_a_turn_may_take_it_again_and_an_error_gives_it_back() -> None:
    a, b = [], []
    with turn((a,)), turn((a, b, b)):
        assert len(turns_module._waiting) == 2
    with pytest.raises(KeyError), turn((a, b)):
        raise KeyError
    assert not turns_module._waiting
    assert _waits(having=(a,), wanting=(b, a))


@pytest.mark.parametrize("is_reversed", [False, True])
def test_two_threads_that_want_the_same_never_wait_for_each_other(is_reversed: bool) -> None:
    """Each waits for its first thing; then both are free at once."""
    things: list[list[Any]] = [[], []][:: -1 if is_reversed else 1]
    entered: list[None] = []

    def enter(order: list[list[Any]]) -> None:
        with turn(order):
            entered.append(None)

    threads = [Thread(lambda o=order: enter(o)) for order in (things, things[::-1])]
    with turn(things):
        for thread in threads:
            thread.start()
        while [len(users) for _, users in turns_module._waiting.values()] != [3, 3]:
            time.sleep(0.001)
        time.sleep(0.05)
    for thread in threads:
        thread.result()
    assert len(entered) == 2 and not turns_module._waiting


def _decoders(shared: str, target: PreTrainedModel) -> tuple[list[Any], list[PreTrainedModel]]:
    """Two decoders and their models, of which one thing is the same."""
    is_one = shared in ("model", "compiled steps")
    models = [target, target if is_one else copy.deepcopy(target)]
    if shared == "compiled steps":
        return [SpeculativeDecoder(None, compile="eager") for _ in range(2)], models
    if shared == "decoder":
        return [SpeculativeDecoder(None)] * 2, models
    drafters: list[Any] = [AutoDrafter(), AutoDrafter()]
    if shared == "drafter":
        drafters = [drafters[0]] * 2
    if shared in ("draft model", "draft model in auto"):
        network = DraftModel(make_tiny_model(1))
        make = ModelDrafter if shared == "draft model" else lambda n: AutoDrafter(heads=n)
        drafters = [make(network), make(DraftModel(network.model))]
    if shared == "one drafts for the other":
        drafters[1] = ModelDrafter(DraftModel(target))
    return [SpeculativeDecoder(drafter) for drafter in drafters], models


@pytest.mark.parametrize(
    ("shared", "waits"),
    [
        ("decoder", True),
        ("drafter", True),
        ("compiled steps", True),
        ("model", False),
        ("draft model", False),
        ("draft model in auto", False),
        ("one drafts for the other", False),
        ("nothing", False),
    ],
)
def test_threads_take_turns_where_they_share_what_remembers_a_text(
    target, shared: str, waits: bool
) -> None:
    (first, second), models = _decoders(shared, target)
    want, other = greedy(target, PROMPT, NEW), greedy(target, OTHER, NEW)
    if shared == "compiled steps":
        _write(target, second, OTHER)  # so that nothing is left to compile
    told: list[int] = []
    threads: list[Thread] = []
    done = threading.Event()

    def write_second() -> list[int]:
        text = _write(models[1], second, OTHER)
        done.set()
        return text

    def listen(row: int, tokens: list[int], num_accepted: int) -> None:
        told.extend(tokens)
        if not threads:
            threads.append(Thread(write_second))
            threads[0].start()
            assert done.wait(0.3 if waits else LONG) != waits

    first.listener = listen
    text = _write(models[0], first)
    assert text == want
    assert threads[0].result() == other
    assert told[:NEW] == text[-NEW:]  # of one decoder the listener hears both texts, in turn
    assert not first.stats.failures and not second.stats.failures


@pytest.mark.parametrize("name", ["auto", "eagle-3", "medusa", "itself"])
def test_texts_of_many_threads_are_those_of_one(target, heads, name: str) -> None:
    def make() -> Any:
        if name == "auto":
            return "auto"
        network = DraftModel(target) if name == "itself" else load_heads(heads / name)
        return ModelDrafter(network, TopKTree(6))

    def write(prompt: torch.Tensor) -> tuple[Any, float]:
        decoder = SpeculativeDecoder(make(), budget=False)
        text = _write(target, decoder, prompt)
        assert decoder.stats is not None and not decoder.stats.failures
        return text, decoder.stats.tokens_per_step

    prompts = [PROMPT, OTHER] * 3
    alone = [write(prompt) for prompt in prompts]
    threads = [Thread(lambda p=prompt: write(p)) for prompt in prompts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        assert [thread.result() for thread in threads] == alone
    finally:
        sys.setswitchinterval(interval)
    assert alone[0][0] == greedy(target, PROMPT, NEW)
    assert not [m for m in target.modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("where", ["thread", "same thread"])
def test_a_text_beside_another_sees_weights_that_were_edited_since(where: str) -> None:
    model = make_tiny_model()
    other: list[Any] = []

    def listen(row: int, tokens: list[int], num_accepted: int) -> None:
        if other:
            return
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        thread = Thread(lambda: _write(model, SpeculativeDecoder("auto"), OTHER))
        if where == "thread":
            thread.start()
        else:
            thread.run()
        other.append(thread.result())

    before = greedy(model, OTHER, NEW)
    _write(model, SpeculativeDecoder("auto", listener=listen, pack=True))
    assert other == [greedy(model, OTHER, NEW)] != [before]


class Recording(ModelDrafter):
    """Notes what it proposes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.proposed: list[Any] = []

    def propose(self, context: Any) -> Any:
        proposal = super().propose(context)
        self.proposed.append([list(row) for row in proposal.tree.rows()])
        return proposal


@pytest.mark.parametrize(
    ("model_type", "implementation"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("mistral", "sdpa"),
        ("gemma2", "eager"),
        ("llama4_text", "sdpa"),
    ],
)
@pytest.mark.parametrize("when", ["before", "within", "ends within"])
def test_a_plain_pass_beside_has_the_model_s_own_attention(
    model_type: str, implementation: str, when: str
) -> None:
    """Whenever somebody began to speculate, or came to an end: to the bit."""
    model = tiny_of(model_type).eval()
    model.set_attn_implementation(implementation)
    inputs = left_pad(random_prompts((40, 23), VOCAB))
    want = model(**inputs).logits
    layer = model.model.layers[1]
    with ExitStack() as lent:
        if when != "within":
            lent.enter_context(tree_attention_in(model))
        switch = lent.close
        if when == "within":
            switch = lambda: lent.enter_context(tree_attention_in(model))  # noqa: E731
        if when != "before":
            hook = layer.register_forward_pre_hook(lambda *_: switch())
        got = model(**inputs).logits
        is_lent = model.config._attn_implementation == NAME
    assert torch.equal(got, want) and is_lent == (when != "ends within")
    assert model.config._attn_implementation == implementation
    if when != "before":
        hook.remove()


def test_plain_texts_are_written_beside(target) -> None:
    want = greedy(target, OTHER, NEW)
    texts: list[Any] = []

    def listen(row: int, tokens: list[int], num_accepted: int) -> None:
        for call in (lambda: greedy(target, OTHER, NEW), lambda: _write(target, None, OTHER)):
            thread = Thread(call)
            thread.start()
            texts.append(thread.result())
        texts.append(greedy(target, OTHER, NEW))

    decoder = SpeculativeDecoder("auto", listener=listen)
    assert _write(target, decoder) == greedy(target, PROMPT, NEW)
    assert len(texts) > 10 and all(text == want for text in texts)


@pytest.mark.parametrize("who", ["plain", "speculating", "thread"])
@pytest.mark.parametrize("name", ["eagle-3", "eagle-1", "medusa", "speculator-some"])
def test_calls_between_passes_leave_a_drafter_s_features_alone(
    target, heads, name: str, who: str
) -> None:
    """A listener is called after a pass, and before what was kept of it is known."""

    def call() -> None:
        if who == "speculating":
            _write(target, SpeculativeDecoder(None), OTHER)
            return
        with torch.no_grad():
            target(OTHER[None])

    def listen(row: int, tokens: list[int], num_accepted: int) -> None:
        if who == "thread":
            thread = Thread(call)
            thread.start()
            thread.result()
        else:
            call()

    proposed = []
    for listener in (None, listen):
        drafter = Recording(load_heads(heads / name), TopKTree(6))
        decoder = SpeculativeDecoder(drafter, budget=False, listener=listener)
        assert _write(target, decoder) == greedy(target, PROMPT, NEW)
        proposed.append(drafter.proposed)
    assert proposed[0] == proposed[1] and len(proposed[0]) > 3


@pytest.mark.parametrize("name", ["eagle-3", "medusa", "streams"])
def test_heads_that_have_no_prompt_yet_leave_others_alone(
    target, heads, tmp_path: Path, name: str
) -> None:
    """A thread hangs its hooks on the layers before it computes anything."""
    model = make_tiny_model() if name == "streams" else target
    network = load_heads(_saved(tmp_path) if name == "streams" else heads / name)
    waiting = HFTarget(model, 64)
    with network.attach(HFTargetView(waiting)):
        assert not waiting.is_running()
        assert _write(model, SpeculativeDecoder(None), OTHER) == greedy(model, OTHER, NEW)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_decoder_can_be_copied_and_its_copy_waits_for_nobody(target) -> None:
    decoder = SpeculativeDecoder("suffix")
    text = _write(target, decoder)
    with ExitStack() as held:
        held.enter_context(turn((decoder, decoder.drafter)))
        twin = copy.deepcopy(decoder)
        thread = Thread(lambda: _write(target, twin))
        thread.start()
        assert thread.result() == text


def test_a_call_within_a_call_of_the_same_decoder_counts_once(target) -> None:
    inner: list[Any] = []

    def listen(row: int, tokens: list[int], num_accepted: int) -> None:
        if not inner:
            inner.append(None)
            inner[0] = _write(target, decoder, OTHER)

    decoder = SpeculativeDecoder(None, listener=listen)
    assert _write(target, decoder) == greedy(target, PROMPT, NEW)
    assert inner == [greedy(target, OTHER, NEW)]
    assert decoder.totals.num_calls == 2 and decoder.totals.num_tokens == 2 * (NEW - 1)
