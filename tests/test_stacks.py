"""All layers in one operator: when, bit for bit what they are one by one, and never unseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prompts import random_prompts
from test_layers import FAMILIES, SIZES, TREE, _family, _packs_in_panels, _running, of_each_dtype
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from specdec_kernels import TokenTree, layer_stack
from specdec_kernels.hf import stacks
from specdec_kernels.hf.target import HFTarget
from specdec_kernels.registry import OPS

pytestmark = pytest.mark.usefixtures(_packs_in_panels.__name__)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the operator had."""
    seen: list[int] = []

    def spy(x: Tensor, cos: Tensor, sin: Tensor, k_caches: list[Tensor], *rest: Any, **kw: Any):
        seen.append(len(k_caches))
        return layer_stack(x, cos, sin, k_caches, *rest, **kw)

    monkeypatch.setattr(stacks, "layer_stack", spy)
    return seen


def _target(model: Any, lengths: tuple[int, ...] = (9, 14, 11)) -> tuple[HFTarget, TokenTree]:
    target = HFTarget(model, capacity=48)
    target.prefill(random_prompts(lengths, 101))
    tree = TokenTree.from_rows([([5, 6, 7, 8, 9, 10], TREE)] * len(lengths), "cpu")
    return target, tree


def _keys(target: HFTarget) -> Tensor:
    """Of the tree's slots, in all layers."""
    starts = target.cache.lengths.tolist()
    layers = target.cache.tree_layers
    return torch.stack(
        [layer.keys[b, :, at : at + 6] for layer in layers for b, at in enumerate(starts)]
    )


@of_each_dtype
@pytest.mark.parametrize("joined", [False, True], ids=["rows", "joined"])
@pytest.mark.parametrize("family", [name for name, count in FAMILIES.items() if count])
def test_the_second_pass_is_one_call_with_the_same_bits(
    family: str, joined: bool, dtype: torch.dtype, calls: list[int]
) -> None:
    """Also of trees of different sizes, joined into one row, where a text has ended."""
    model = _family(family, dtype)
    with _running(model):
        target, tree = _target(model)
        if joined:
            rows = [([5], [-1]), ([], []), ([5, 6, 7, 8, 9, 10], TREE)]
            tree = TokenTree.from_rows(rows, "cpu")
            assert not target.pads
        is_node = torch.arange(6) < tree.num_nodes[:, None]
        one_by_one, keys = target.forward(tree), _keys(target)
        assert calls == []
        starts = target.cache.lengths.tolist()
        for layer in target.cache.tree_layers:  # what the trees must write
            for b, (start, size) in enumerate(zip(starts, tree.num_nodes.tolist(), strict=True)):
                layer.keys[b, :, start : start + size] = torch.nan
        together = target.forward(tree)
    assert calls == [FAMILIES[family]]
    assert torch.equal(together[is_node], one_by_one[is_node])
    for now, before in zip(_keys(target).split(3), keys.split(3), strict=True):
        of_nodes, as_before = (x.transpose(1, 2)[is_node] for x in (now, before))
        assert torch.equal(of_nodes, as_before)


def test_a_text_goes_on_behind_what_it_keeps(calls: list[int]) -> None:
    """Steps of trees, each committed, against steps layer by layer."""
    model = _family("llama")
    path = torch.tensor([[0, 3, 4, -1, -1, -1]] * 3, dtype=torch.int32)
    kept = torch.tensor([3, 1, 2], dtype=torch.int32)
    logits: dict[bool, list[Tensor]] = {}
    for hooked in (False, True):
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        if not hooked:
            handle.remove()
        with _running(model):
            target, tree = _target(model)
            steps = []
            for _ in range(4):
                steps.append(target.forward(tree))
                target.commit(path, kept)
        logits[hooked] = steps
        handle.remove()
    assert calls == [3] * 3
    for together, one_by_one in zip(logits[False], logits[True], strict=True):
        assert torch.equal(together, one_by_one)


@pytest.mark.parametrize("part", ["self_attn", "mlp.down_proj", "post_attention_layernorm"])
def test_hooks_see_every_pass(part: str, calls: list[int]) -> None:
    model = _family("llama")
    seen: list[Any] = []
    with _running(model):
        target, tree = _target(model)
        target.forward(tree)
        handle = (
            model.model.layers[2]
            .get_submodule(part)
            .register_forward_hook(lambda *args: seen.append(args))
        )
        target.forward(tree)
        assert len(seen) == 1 and calls == []
        handle.remove()
        target.forward(tree)
    assert len(seen) == 1 and calls == [3]


def _hook(layer: nn.Module, kind: str, change: Any) -> Any:
    """On what goes into a layer, or what comes out of it; `change` may return something else."""
    if kind == "out":
        return layer.register_forward_hook(lambda _, args, out: change(out))
    return layer.register_forward_pre_hook(lambda _, args: change(args[0]))


@pytest.mark.parametrize(
    ("places", "segments"),
    [
        ([(0, "in")], [3]),
        ([(2, "out")], [3]),
        ([(1, "in")], [1, 2]),
        ([(1, "out")], [2, 1]),
        ([(0, "out"), (2, "in"), (1, "in")], [1, 1, 1]),
    ],
)
def test_hooks_of_layers_divide_the_stack_and_see_the_same_bits(
    places: list[tuple[int, str]], segments: list[int], calls: list[int]
) -> None:
    model = _family("llama")
    seen: list[Tensor] = []
    handles = [_hook(model.model.layers[i], kind, seen.append) for i, kind in places]
    with _running(model):
        target, tree = _target(model)
        seen.clear()
        one_by_one = target.forward(tree)
        assert calls == [] and len(seen) == len(places)
        assert torch.equal(target.forward(tree), one_by_one)
        assert calls == segments and len(seen) == 2 * len(places)
        for first, second in zip(seen[: len(places)], seen[len(places) :], strict=True):
            assert torch.equal(first, second)
        for handle in handles:
            handle.remove()
        assert torch.equal(target.forward(tree), one_by_one)
    assert calls == [*segments, 3]


@pytest.mark.parametrize("kind", ["in", "out"])
def test_what_a_hook_changes_after_the_first_pass_is_computed_with(kind: str) -> None:
    """Against the same hook in a pass layer by layer."""
    model = _family("llama")
    logits = []
    for apart in (False, True):
        with _running(model):
            target, tree = _target(model)
            target.forward(tree)
            handles = [_hook(model.model.layers[1], kind, lambda x: x * 1.5)]
            if apart:
                handles.append(model.model.layers[1].mlp.register_forward_hook(lambda *_: None))
            logits.append(target.forward(tree))
        for handle in handles:
            handle.remove()
    assert torch.equal(*logits)
    with _running(model):
        target, tree = _target(model)
        assert not torch.equal(target.forward(tree), logits[0])


def test_layers_that_differ_in_an_option_run_one_by_one(calls: list[int]) -> None:
    model = _family("llama")
    model.model.layers[1].self_attn.scaling = 0.5
    with _running(model):
        target, tree = _target(model)
        assert torch.equal(target.forward(tree), target.forward(tree))
    assert calls == []


def test_layers_some_of_which_run_their_own_way_are_no_stack(calls: list[int]) -> None:
    model = _family("llama")
    layer = model.model.layers[1]
    layer.forward = layer.forward  # as accelerate does it
    with _running(model):
        target, tree = _target(model)
        target.forward(tree)
        target.forward(tree)
    assert calls == []


class _Between(nn.Module):
    """What somebody does between two layers, from some pass on."""

    def __init__(self, layer: nn.Module, first_pass: int, what: str) -> None:
        super().__init__()
        self.num_passes, self.first_pass, self.what = 0, first_pass, what
        self.own = layer.forward

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.num_passes += 1
        if self.num_passes >= self.first_pass:
            if self.what == "hidden":
                hidden_states = hidden_states * 1.5
            elif self.what == "rotary":
                kwargs["position_embeddings"] = tuple(-x for x in kwargs["position_embeddings"])
            else:
                return hidden_states
        return self.own(hidden_states, **kwargs)


def _put_between(model: Any, first_pass: int, what: str) -> None:
    """In the list of the running model's layers, whose forwards are lent already."""
    layer = model.model.layers[1]
    between = _Between(layer, first_pass, what)
    layer.__dict__["forward"] = between.forward


@pytest.mark.parametrize("what", ["hidden", "rotary", "skipped"])
def test_what_happens_between_two_layers_from_the_first_is_seen(
    what: str, calls: list[int]
) -> None:
    model = _family("llama")
    with _running(model):
        target, tree = _target(model)
        _put_between(model, 1, what)
        assert torch.equal(target.forward(tree), target.forward(tree))
    assert calls == []


@pytest.mark.parametrize("what", ["hidden", "rotary", "skipped"])
def test_what_happens_later_is_refused(what: str) -> None:
    model = _family("llama")
    with _running(model):
        target, tree = _target(model)
        _put_between(model, 3, what)
        target.forward(tree)
        target.forward(tree)
        with pytest.raises(ValueError, match=r"decoder layer.* decode with pack=False"):
            target.forward(tree)


def test_fewer_layers_than_in_the_first_pass_are_refused() -> None:
    model = _family("llama")
    with _running(model):
        target, tree = _target(model)
        target.forward(tree)
        model.config.num_hidden_layers = 2
        with pytest.raises(ValueError, match="only 2 of 3 decoder layers were called"):
            target.forward(tree)
    model.config.num_hidden_layers = 3


def test_joined_rows_of_more_than_64_nodes_go_layer_by_layer(calls: list[int]) -> None:
    model = _family("llama")
    with _running(model):
        target = HFTarget(model, capacity=96)
        target.prefill(random_prompts((9, 14, 11), 101))
        chain = [[5] * 65, [*range(-1, 64)]]
        tree = TokenTree.from_rows([chain, ([5], [-1]), ([6], [-1])], "cpu")
        one_by_one = target.forward(tree)
        assert torch.equal(target.forward(tree)[0], one_by_one[0])
    assert calls == []


def test_two_lists_of_layers_are_two_stacks(calls: list[int]) -> None:
    """A pass through one list of layers, then through another."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "num_hidden_layers": 4}))
    model = model.eval().bfloat16().requires_grad_(False)
    layers = list(model.model.layers)
    model.model.first, model.model.second = nn.ModuleList(layers[:2]), nn.ModuleList(layers[2:])
    with _running(model):
        target, tree = _target(model)
        one_by_one = target.forward(tree)
        assert torch.equal(target.forward(tree), one_by_one)
    assert calls == [2, 2]


def test_what_is_known_of_a_chain_serves_later_texts_until_the_model_changes(
    calls: list[int],
) -> None:
    model = _family("llama")
    wanted = []
    for passes in (2, 1):
        with _running(model):
            target, tree = _target(model)
            wanted += [target.forward(tree) for _ in range(passes)]
    assert calls == [3, 3]  # not the very first pass
    assert all(torch.equal(logits, wanted[0]) for logits in wanted)
    model.model.layers[1].self_attn.scaling = 0.5
    with _running(model):
        target, tree = _target(model)
        changed = target.forward(tree)
    assert calls == [3, 3]
    assert not torch.equal(changed, wanted[0])


def test_weights_that_were_packed_anew_are_multiplied() -> None:
    model = _family("llama")
    own = []
    for _ in range(2):
        with _running(model):
            target, tree = _target(model)
            target.forward(tree)
            own.append(target.forward(tree))
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(3)
    fresh = _family("llama")
    with torch.no_grad():
        fresh.model.layers[1].mlp.down_proj.weight.mul_(3)
    with _running(fresh):
        target, tree = _target(fresh)
        target.forward(tree)
        assert torch.equal(target.forward(tree), own[1])
    assert not torch.equal(*own)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k_caches", lambda x: [], "k_caches must be of one layer or more, got none"),
        ("v_caches", lambda x: x[:1], "v_caches must be 3 for 3 layers, got 1"),
        ("panels", lambda x: x[:-1], "panels must be 21 for 3 layers, got 20"),
        ("biases", lambda x: x[:7], "biases must be 0 or 21 for 3 layers, got 7"),
        ("head_norm_weights", lambda x: x[:3], "head_norm_weights must be 0 or 6 for 3 layers"),
        ("windows", lambda x: [*x, 0], "windows must be 3 for 3 layers, got 4"),
        ("num_heads", lambda x: 4, "num_heads must be a multiple of key/value heads, got 4 and 3"),
        ("num_hidden", lambda x: 46, "layer 0: gate_bias must be \\[46\\], got \\[47\\]"),
        ("entry", lambda x: torch.zeros(3, 3, 70), "q_panels of a weight \\[30, 70\\] must be"),
        ("entry", lambda x: torch.zeros(3, 2, 33), "entry must be \\[R, M, I\\]"),
        ("softcap", lambda x: -1.0, "tree_attention: window and softcap must be >= 0"),
        ("lengths", lambda x: x + 30, "must be in \\[0, 20"),
    ],
)
def test_a_mistake_is_named(backend: str, name: str, change: Any, message: str) -> None:
    inputs = OPS["layer_stack"].inputs(**OPS["layer_stack"].cases[1])
    before = [cache.clone() for cache in inputs["k_caches"]]
    caches = inputs["k_caches"]
    with pytest.raises(ValueError, match=message):
        layer_stack(**{**inputs, name: change(inputs[name])}, backend=backend)
    if backend == "cpu":  # nothing lost
        assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("nodes", [7, 70])
def test_joined_rows_of_another_number_are_refused(backend: str, nodes: int) -> None:
    case = next(case for case in OPS["layer_stack"].cases if case.get("joined"))
    inputs = OPS["layer_stack"].inputs(**{**case, "N": nodes, "S": 200})
    wrong = torch.full((4,), 7, dtype=torch.int32) if nodes == 7 else inputs["num_nodes"]
    total = int(wrong.sum())
    message = (
        f"x must be .* = \\[4, {nodes}, F\\], or .* T = {total} nodes of trees of N <= 64, got"
    )
    with pytest.raises(ValueError, match=message):
        layer_stack(**{**inputs, "num_nodes": wrong}, backend=backend)
