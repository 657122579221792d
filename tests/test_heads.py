"""Trained heads: published checkpoints load, compute the papers' formulas, and stay lossless."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from head_checkpoints import DRAFT_VOCAB, LAYERS, VOCAB, draft_ids, save_all
from prompts import greedy, left_pad, random_prompts
from torch import Tensor
from transformers import PreTrainedModel

from specdec_kernels import (
    AutoDrafter,
    DraftContext,
    Drafter,
    DraftNetwork,
    ModelDrafter,
    SampledTree,
    SpeculativeDecoder,
    TopKTree,
    load_heads,
)
from specdec_kernels.budget import Budget
from specdec_kernels.drafters import pace
from specdec_kernels.drafters.adviser import Advice, Adviser
from specdec_kernels.drafters.mlp_speculator import place
from specdec_kernels.drafters.network import Level
from specdec_kernels.drafting import GREEDY
from specdec_kernels.hf.attention import tree_attention_in
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.target import HFTarget

NEW = 16
TREES = {
    "top-k": TopKTree(10, depth=3, width=3),
    "chain": SampledTree((1, 1, 1)),
    "greedy drafts": SampledTree((3, 2), greedy_drafts=True),
}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    """The tiny Llama with six layers, whose text the drafts sometimes guess."""
    return make_tiny_model(LAYERS)


@pytest.fixture(scope="module")
def rows() -> list[Tensor]:
    return random_prompts((9, 14, 5), VOCAB)


def _features(target: PreTrainedModel, tokens: Sequence[int], layers: Sequence[int]) -> Tensor:
    """[n, F] float64 of all tokens but the root, by a fresh forward pass."""
    with torch.no_grad():
        out = target(torch.tensor([tokens[:-1]]), output_hidden_states=True)
    hidden = out.hidden_states
    return torch.cat([hidden[i][0].double() for i in (layers or [-1])], -1)


@pytest.fixture(scope="module")
def saved(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_all(tmp_path_factory.mktemp("heads"), target)


NAMES = [
    "medusa", "medusa-safetensors", "speculator", "speculator-tied", "eagle-1", "eagle-3",
    "eagle-3-full", "medusa-some", "medusa-rows", "speculator-some", "speculator-lent",
    "eagle-3-rows",
]  # fmt: skip


class Checked(DraftNetwork):
    """Compares all logits of a network with a formula, from scratch."""

    def __init__(self, network: DraftNetwork, formula: Callable[..., Tensor]) -> None:
        self.network = network
        self.formula = formula
        self.offsets, self.max_depth = network.offsets, network.max_depth
        self.num_checked, self.worst = 0, 0.0

    def attach(self, target: Any) -> Any:
        return self.network.attach(target)

    def begin(self, batch: int, num_slots: int) -> None:
        self.network.begin(batch, num_slots)

    def start(self, context: DraftContext) -> Tensor:
        logits = self.network.start(context)
        self.offsets = self.network.offsets
        self.sequences = [list(s) for s in context.sequences]
        self.paths: list[list[list[int]]] = [[] for _ in self.sequences]
        for row, active in enumerate(context.active):
            if active:
                self._compare(logits[row], row, [])
        return logits

    def extend(self, level: Level) -> Tensor:
        logits = self.network.extend(level)
        for row, nodes in enumerate(level):
            before = list(self.paths[row])
            for column, (token, parent) in enumerate(nodes):
                path = [*(before[parent] if parent >= 0 else []), token]
                self.paths[row].append(path)
                self._compare(logits[row, column], row, path)
        return logits

    def _compare(self, logits: Tensor, row: int, path: list[int]) -> None:
        want = self.formula(self.sequences[row], path)
        self.num_checked += 1
        error = float((logits.double() - want).abs().max() / want.abs().max())
        self.worst = max(self.worst, error)


def _drafter(network: DraftNetwork, tree: str) -> Drafter:
    if tree == "merged":
        return AutoDrafter(24, heads=network, heads_depth=3, heads_width=3)
    return ModelDrafter(network, TREES[tree])


@pytest.mark.parametrize("tree", [*TREES, "merged"])
@pytest.mark.parametrize("name", NAMES)
def test_heads_compute_the_papers_formula_and_greedy_text_is_the_target_s(
    target, rows, saved, name: str, tree: str, report
) -> None:
    folder, kind, formula, layers = saved[name]
    network = load_heads(folder)
    assert type(network) is kind
    features: dict[tuple[int, ...], Tensor] = {}

    def reference(tokens: Sequence[int], path: Sequence[int]) -> Tensor:
        key = tuple(tokens)
        if key not in features:
            features[key] = _features(target, tokens, layers)
        return formula(features[key], tokens, path)

    checked = Checked(network, reference)
    decoder = SpeculativeDecoder(_drafter(checked, tree), budget=False)
    inputs = left_pad(rows)
    output = target.generate(**inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder)
    want = [greedy(target, row, NEW)[len(row) :] for row in rows]
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == want
    assert checked.num_checked > 80 and checked.worst < 1e-4
    report(f"{name}, {tree}: {checked.num_checked} laws, worst error {checked.worst:.1e}")


@pytest.mark.parametrize("name", ["medusa", "speculator", "eagle-1", "eagle-3"])
def test_sampled_rows_depend_on_their_seed_alone(target, rows, saved, name: str) -> None:
    options = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 6}

    def run(order: Sequence[int], tree: str, rule: str | None) -> list[list[int]]:
        network = load_heads(saved[name][0])
        decoder = SpeculativeDecoder(
            _drafter(network, tree), seed=list(order), rule=rule, budget=False
        )
        inputs = left_pad([rows[i] for i in order])
        output = target.generate(**inputs, custom_generate=decoder, **options)
        assert sum(decoder.stats.num_drafted) > 10
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    together = run([0, 1, 2], "greedy drafts", "gd_traversal")
    assert run([2, 0], "greedy drafts", "gd_traversal") == [together[2], together[0]]
    plain = SpeculativeDecoder(None, seed=[0, 1, 2])
    inputs = left_pad(rows)
    want = target.generate(**inputs, custom_generate=plain, **options)
    for tree in ("top-k", "merged"):
        assert run([0, 1, 2], tree, None) == want[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ["medusa", "speculator", "eagle-3"])
def test_a_conversation_that_goes_on_from_a_cache_drafts_as_a_new_one(
    target, rows, saved, name: str
) -> None:
    """Heads that see the newest token alone do not have the others computed again."""
    folder, _, formula, layers = saved[name]
    checked = Checked(
        load_heads(folder),
        lambda tokens, path: formula(_features(target, tokens, layers), tokens, path),
    )
    decoder = SpeculativeDecoder(_drafter(checked, "top-k"), budget=False)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    first = target.generate(**left_pad(rows), custom_generate=decoder, **options)
    cache = first["cache"] if "cache" in first else first["past_key_values"]
    texts = [torch.tensor(greedy(target, row, 6)) for row in rows]
    longer = [torch.cat([text, torch.tensor([7, 8, 9])]) for text in texts]
    num_before, widths = checked.num_checked, []
    hook = target.register_forward_pre_hook(
        lambda module, args, kwargs: (
            widths.append(kwargs["input_ids"].shape[1]) if "input_ids" in kwargs else None
        ),
        with_kwargs=True,
    )
    inputs = left_pad(longer)
    second = target.generate(**inputs, custom_generate=decoder, past_key_values=cache, **options)
    hook.remove()
    # The last token of the first turn is not in the cache.
    assert widths[0] == (max(map(len, longer)) if name == "eagle-3" else 4)
    new = second.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    assert new == [greedy(target, row, 6)[len(row) :] for row in longer]
    assert checked.num_checked > num_before + 20 and checked.worst < 1e-4


@pytest.mark.parametrize("name", ["eagle-3", "medusa-some", "medusa-rows", "speculator-some"])
def test_heads_draft_only_what_their_vocabulary_holds(target, rows, saved, name: str) -> None:
    ids = draft_ids(VOCAB, DRAFT_VOCAB)
    seen: set[int] = set()

    class Spy(ModelDrafter):
        def propose(self, context: DraftContext) -> Any:
            proposal = super().propose(context)
            for tokens, size in zip(
                proposal.tree.tokens.tolist(), proposal.tree.num_nodes.tolist(), strict=True
            ):
                seen.update(tokens[1:size])
            return proposal

    for tree in TREES.values():
        drafter = Spy(load_heads(saved[name][0]), tree)
        target.generate(
            **left_pad(rows), max_new_tokens=6, do_sample=True,
            custom_generate=SpeculativeDecoder(drafter, seed=0, budget=False),
        )  # fmt: skip
    assert len(seen) > 20 and seen <= set(ids.tolist())


@pytest.mark.parametrize("name", ["medusa", "speculator", "eagle-3"])
def test_heads_see_the_features_of_compiled_steps(target, rows, saved, name: str) -> None:
    inputs = left_pad(rows)
    steps = []
    for compiled in (False, "eager"):
        decoder = SpeculativeDecoder(
            _drafter(load_heads(saved[name][0]), "top-k"), budget=False, compile=compiled
        )
        output = target.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder
        )
        want = [greedy(target, row, NEW)[len(row) :] for row in rows]
        assert output[:, inputs["input_ids"].shape[1] :].tolist() == want
        steps.append((decoder.stats.num_steps, decoder.stats.num_accepted))
        assert not decoder.stats.num_failures
    assert steps[0] == steps[1], "drafts from the same features are the same"


@pytest.mark.parametrize("sizes", [[2, 2], [1, 2], [2, 0]])
def test_a_level_s_states_lie_behind_those_of_each_row(sizes: list[int]) -> None:
    kept, new = torch.randn((2, 2, 3)), torch.randn((2, 4, 3))
    placed = place(kept, new, sizes)
    for b, size in enumerate(sizes):
        assert torch.equal(placed[b, : size + 4], torch.cat([kept[b, :size], new[b]]))


@contextmanager
def _prefilled(
    model: PreTrainedModel, network: DraftNetwork, prompts: Sequence[Tensor]
) -> Iterator[DraftContext]:
    """The network attached to the model, which has the prompts in its cache."""
    target = HFTarget(model, capacity=64)
    texts = [prompt.tolist() for prompt in prompts]
    with torch.no_grad(), tree_attention_in(model), network.attach(HFTargetView(target)):
        target.prefill(texts)
        network.begin(len(texts), 8)
        sequences = [[*text, 3] for text in texts]
        batch = len(texts)
        yield DraftContext(
            sequences, [True] * batch, [9] * batch, torch.device("cpu"), VOCAB, GREEDY
        )


@pytest.mark.parametrize("name", ["eagle-1", "eagle-3", "speculator"])
def test_levels_of_different_sizes_are_what_each_row_gives_alone(
    target, rows, saved, name: str
) -> None:
    levels = [[[(5, -1), (6, -1)], [(7, -1)]], [[(8, 1)], [(9, 0), (10, 0), (11, 0)]]]

    def logits(chosen: Sequence[int]) -> list[Tensor]:
        network = load_heads(saved[name][0])
        with _prefilled(target, network, [rows[i] for i in chosen]) as context:
            network.start(context)
            given = [network.extend([level[i] for i in chosen]) for level in levels]
        return [
            out[b, : len(level[i])]
            for out, level in zip(given, levels, strict=True)
            for b, i in enumerate(chosen)
        ]

    first, second = logits([0]), logits([1])
    for got, want in zip(logits([0, 1]), [first[0], second[0], first[1], second[1]], strict=True):
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["eagle-3", "medusa"])
def test_an_adviser_names_the_target_s_tokens(target, rows, saved, name: str) -> None:
    network = load_heads(saved[name][0])
    adviser = Adviser(network, 2, 2, num_tokens=4)
    with _prefilled(target, network, rows[:2]) as context:
        adviser.begin(2)
        laws = network.start(context).log_softmax(-1).exp()
    ids = torch.arange(laws.shape[1])
    ids = ids if network.offsets is None else ids + network.offsets
    with _prefilled(target, network, rows[:2]) as context:
        adviser.begin(2)
        for law, advice in zip(laws, adviser.start(context), strict=True):
            best = law.topk(4)
            assert list(advice.probabilities) == ids[best.indices].tolist()
            assert list(advice.probabilities.values()) == pytest.approx(best.values.tolist())


def test_an_adviser_s_times_are_those_of_calls_with_packed_weights(
    target, rows, saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_heads(saved["speculator"][0])
    adviser = Adviser(network, 3, 2)
    ticks = iter([0.0, 10.0, 20.0, 20.5, 30.0, 30.25])  # how long the first two take, nobody asks
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    with _prefilled(target, network, rows[:2]) as context:
        adviser.begin(2)
        for _ in range(2):
            assert adviser.pace.start_seconds == adviser.pace.seconds == 0.0
            adviser.start(context)
            adviser.extend([[(5, -1)], [(6, -1)]])
    assert (adviser.pace.start_seconds, adviser.pace.seconds) == (0.5, 0.25)


@pytest.mark.parametrize("name", ["start_seconds", "seconds"])
def test_an_adviser_that_was_slow_once_is_asked_again(
    name: str, saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The times of one that is not worth asking fade, else nobody would ever look again."""
    drafter = AutoDrafter(heads=load_heads(saved["speculator"][0]))
    adviser = drafter._adviser
    assert adviser is not None
    setattr(adviser.pace, name, 1e6)
    monkeypatch.setattr(adviser, "start", lambda context: [Advice({8: 0.9})])
    monkeypatch.setattr(adviser, "extend", lambda level: pytest.fail("asked"))
    budget = Budget()
    budget.record(
        running=1, computed=1, plain=1, num_accepted=0, forward_seconds=1.0, draft_seconds=0.0
    )
    budget.choose([[]])
    context = DraftContext(
        [[5, 6, 7]], [True], [4], torch.device("cpu"), VOCAB, GREEDY, budget=budget
    )
    drafter.begin(1)
    for _ in range(3):
        drafter.propose(context)
    assert getattr(adviser.pace, name) == pytest.approx(1e6 * 0.99**3)
