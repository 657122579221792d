"""Decoder layers in four operators: which layers run so, and that they compute what they did."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from prompts import left_pad, random_prompts
from torch import Tensor, nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from specdec_kernels import SpeculativeDecoder, TokenTree, layouts, tree_mask
from specdec_kernels.hf import fusing, packing
from specdec_kernels.hf import layers as whole
from specdec_kernels.hf.attention import Localities, TreeCall, handing, tree_attention_in
from specdec_kernels.hf.fusing import fast_layers
from specdec_kernels.hf.locality import FULL
from specdec_kernels.hf.target import HFTarget
from specdec_kernels.layouts import Panels
from specdec_kernels.shapes import FLOATS


@pytest.fixture(autouse=True)
def _packs_in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CPUs without products of float16 do."""
    monkeypatch.setattr(layouts, "layout_for", lambda dtype: Panels if dtype in FLOATS else None)


SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def _replaced(model: nn.Module) -> int:
    return sum("forward" in m.__dict__ for m in model.modules() if hasattr(m, "self_attn"))


def _leave_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers run as they are from now on."""
    monkeypatch.setattr(whole, "decoder_layers", lambda *_: {})
    monkeypatch.setattr(fusing, "_parts", weakref.WeakKeyDictionary())


of_each_dtype = pytest.mark.parametrize(
    "dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def _family(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    if name == "llama":
        model: Any = make_tiny_model()
    elif name == "mistral, a window":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))
    elif name == "qwen2, with biases":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data = torch.randn_like(parameter)
    elif name == "qwen3, norms of heads":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data = torch.rand_like(parameter) + 0.5
    elif name == "granite, scaled residuals":
        model = GraniteForCausalLM(GraniteConfig(**SIZES, residual_multiplier=0.5))
    elif name == "cohere2, in parallel":
        model = Cohere2ForCausalLM(Cohere2Config(**SIZES))
    elif name == "gemma, another norm":
        model = GemmaForCausalLM(GemmaConfig(**SIZES))
    else:
        model = make_tiny_model(hidden_act=name)
    return model.eval().to(dtype).requires_grad_(False)


FAMILIES = {
    "llama": 3, "mistral, a window": 2, "qwen2, with biases": 2, "silu": 3,
    "qwen3, norms of heads": 2, "granite, scaled residuals": 0, "cohere2, in parallel": 0,
    "gemma, another norm": 0, "gelu": 0, "gelu_pytorch_tanh": 0, "relu": 0, "quick_gelu": 0,
}  # fmt: skip


@contextmanager
def _running(model: Any) -> Iterator[None]:
    with torch.no_grad(), tree_attention_in(model), fast_layers(model, True):
        yield


TREE = [-1, 0, 1, 0, 3, 3]


def _scores(model: Any, batch: int = 1) -> Tensor:
    """Logits of a tree after prompts of different lengths."""
    rows = random_prompts((9, 14, 11)[:batch], 101)
    tree = TokenTree.from_rows([([5, 6, 7, 8, 9, 10], TREE)] * batch, "cpu")
    target = HFTarget(model, capacity=32)
    target.prefill(rows)
    return target.forward(tree).float()


@of_each_dtype
@pytest.mark.parametrize("family", FAMILIES)
def test_which_layers_are_replaced_and_that_they_compute_what_they_did(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _family(family, dtype)
    wide = copy.deepcopy(model).float()
    with torch.no_grad(), tree_attention_in(wide):
        exact = _scores(wide, 3)
    with _running(model):
        assert _replaced(model) == FAMILIES[family]
        fused = _scores(model, 3)
    assert _replaced(model) == 0
    _leave_all(monkeypatch)
    with _running(model):
        assert _replaced(model) == 0
        apart = _scores(model, 3)
    if dtype == torch.float32:
        assert float((fused - exact).norm()) < 4e-6 * float(exact.norm())
        return
    # Not the same bits: as near to float32 as before.
    rounding = float((apart - exact).abs().mean())
    assert rounding > 0 and float((fused - exact).abs().mean()) < 1.2 * rounding


@pytest.mark.parametrize(("rows", "passes"), [(None, 2), (10, 2), (9, 1)])
def test_the_operators_run_in_every_layer(
    rows: int | None, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt of 9 tokens and of a tree; not of a prompt of too many rows for panels."""
    if rows is not None:
        monkeypatch.setattr(packing, "has_matrix_tiles", lambda: True)
        monkeypatch.setattr(packing, "_TILE_ROWS", rows)
    calls = []
    for name in ("before_attention", "after_attention"):
        own = getattr(whole, name)
        monkeypatch.setattr(
            whole, name, lambda *args, own=own, name=name: calls.append(name) or own(*args)
        )
    model = _family("llama")
    with _running(model):
        calls.clear()
        _scores(model)
    assert calls == ["before_attention", "after_attention"] * 3 * passes


class _Loud(nn.SiLU):
    """A layer of somebody's own."""

    def forward(self, input: Tensor) -> Tensor:
        return 1.5 * super().forward(input)


@pytest.mark.parametrize("part", ["mlp.act_fn", "mlp.up_proj", "self_attn", "input_layernorm"])
def test_a_layer_with_a_part_of_somebody_s_own_is_left_alone(part: str) -> None:
    model = _family("llama")
    layer = model.model.layers[1]
    parent, _, name = part.rpartition(".")
    holder = layer.get_submodule(parent)
    if name == "act_fn":
        holder.act_fn = _Loud()
    else:
        own = getattr(holder, name)
        own.forward = own.forward  # as accelerate does it
    wanted = _own_scores(model)
    with _running(model):
        assert ["forward" in layer.__dict__ for layer in model.model.layers] == [True, False, True]
        torch.testing.assert_close(_scores(model), wanted, rtol=0.05, atol=0.02)


def _own_scores(model: Any) -> Tensor:
    with torch.no_grad(), tree_attention_in(model):
        return _scores(model)


@pytest.mark.parametrize("part", ["", "self_attn", "self_attn.v_proj", "mlp", "mlp.down_proj"])
def test_hooks_see_and_change_what_they_did(part: str) -> None:
    model = _family("llama")
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        seen.append(first)
        return (2 * first, *output[1:]) if isinstance(output, tuple) else 2 * first

    module = model.model.layers[1].get_submodule(part)
    with _running(model):
        assert _replaced(model) == 3
        plain = _scores(model)
        handle = module.register_forward_hook(hook)  # while we run
        assert len(seen) == 0
        changed = _scores(model)
        handle.remove()
        assert len(seen) == 2 and not torch.equal(changed, plain)  # the prompt, then the tree
        assert torch.equal(_scores(model), plain)
    handle = module.register_forward_hook(hook)
    torch.testing.assert_close(_own_scores(model), changed, rtol=0.05, atol=0.02)
    handle.remove()


def test_trying_a_layer_touches_nothing_of_it() -> None:
    model = _family("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[Any] = []
    hooks = [m.register_forward_hook(lambda *args: seen.append(args)) for m in model.modules()]
    whole._rehearsed.clear()
    with _running(model):
        assert len(whole._rehearsed) == _replaced(model) == 3
    assert not seen
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for hook in hooks:
        hook.remove()


def _layers_apart(model: Any) -> list[bool]:
    with _running(model):
        return ["forward" not in layer.__dict__ for layer in model.model.layers]


def test_each_layer_has_its_own_options() -> None:
    """Layers of one class and size that differ in a number, which may change between two calls."""
    model = _family("llama")
    for scaling in (5.0, 0.0):
        model.model.layers[1].self_attn.scaling = scaling
        layers = whole.decoder_layers(model, {m for m in model.modules() if hasattr(m, "weight")})
        assert [options["scale"] for options in layers.values()] == [0.25, scaling, 0.25]


class _Capped(LlamaAttention):
    """Says more to its attention than Llama's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, softcap=0.5, sliding_window=4, **kwargs)


def test_prompts_and_trees_are_attended_as_the_layer_says() -> None:
    model = _family("llama", torch.float32)
    plain = _own_scores(model)
    for layer in model.model.layers:
        layer.self_attn.__class__ = _Capped
        layer.self_attn.scaling = 2.0
    wanted = _own_scores(model)
    assert float((wanted - plain).norm()) > 0.01 * float(plain.norm())
    with _running(model):
        assert _replaced(model) == 3
        assert float((_scores(model) - wanted).norm()) < 4e-6 * float(wanted.norm())


class _InItsPlace(LlamaDecoderLayer):
    """What it computes depends on its place, or on a buffer."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(hidden_states, *args, **kwargs)
        louder = self.self_attn.layer_idx == 1 or getattr(self, "factor", 1.0) != 1.0
        return 2 * out if louder else out


def test_a_layer_that_differs_by_its_place_is_left_alone() -> None:
    model = _family("llama")
    for layer in model.model.layers:
        layer.__class__ = _InItsPlace
    assert _layers_apart(model) == [False, True, False]


def test_a_layer_with_a_buffer_is_left_alone() -> None:
    """It may change after the layer was tried."""
    model = _family("llama")
    model.model.layers[2].__class__ = _InItsPlace
    model.model.layers[2].register_buffer("factor", torch.ones(()))
    assert _layers_apart(model) == [False, False, True]


def test_weights_that_change_are_read_anew() -> None:
    model = _family("llama")
    with _running(model):
        _scores(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3)
    model.model.layers[1].input_layernorm.weight = nn.Parameter(torch.full((64,), 2.0).bfloat16())
    wanted = _own_scores(model)
    with _running(model):
        torch.testing.assert_close(_scores(model), wanted, rtol=0.05, atol=0.02)


def test_an_error_gives_the_layers_back() -> None:
    model = _family("llama")
    with pytest.raises(RuntimeError, match="mine"), _running(model):
        raise RuntimeError("mine")
    assert _replaced(model) == 0


@pytest.mark.parametrize("how", ["float64", "mixed", "unpacked", "compiled", "autocast"])
def test_what_stays_as_it_was(how: str) -> None:
    model = _family("llama", torch.float64 if how == "float64" else torch.bfloat16)
    if how == "mixed":
        for layer in model.model.layers:
            layer.input_layernorm.float()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
        fast_layers(model, how != "unpacked", compiled=how == "compiled"),
    ):
        assert _replaced(model) == 0


def test_a_model_that_changes_its_dtype_is_tried_anew() -> None:
    model = _family("llama")
    tried = []
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float32):
        with _running(model.to(dtype)):
            assert _replaced(model) == 3
        tried.append([whole._rehearsed[layer] for layer in model.model.layers])
    first, same, other = tried
    assert all(a is b and a is not c for a, b, c in zip(first, same, other, strict=True))


def _handing_a_chain(batch: int, nodes: int) -> Any:
    parents = torch.arange(-1, nodes - 1, dtype=torch.int32).repeat(batch, 1)
    sizes = torch.full((batch,), nodes, dtype=torch.int32)
    localities = Localities({0: FULL})
    return handing(TreeCall(*tree_mask(parents, sizes), torch.zeros_like(sizes), sizes, localities))


def test_one_rotary_embedding_for_all_rows() -> None:
    model = _family("llama")
    layer, x = model.model.layers[0], torch.randn(2, 3, 64).bfloat16()
    one = tuple(torch.randn(2, 1, 3, 16).bfloat16())
    with _running(model), _handing_a_chain(2, 3):
        each = tuple(e.expand(2, 3, 16) for e in one)
        assert torch.equal(layer(x, position_embeddings=one), layer(x, position_embeddings=each))


@pytest.mark.parametrize("how", ["gradients", "positional", "wide rows"])
def test_other_calls_go_the_layer_s_own_way(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _family("llama")
    layer = model.model.layers[0]
    with _running(model):
        pass  # tried before
    monkeypatch.setattr(whole, "before_attention", lambda *_: pytest.fail("taken"))
    x, (cos, sin) = torch.randn(1, 3, 64).bfloat16(), torch.randn(2, 1, 3, 16).bfloat16()
    args = (None, None) if how == "positional" else ()
    with _running(model), _handing_a_chain(1, 3):
        assert "forward" in layer.__dict__
        if how == "wide rows":  # which its own norm cannot multiply by narrow weights
            with pytest.raises(RuntimeError, match="dtype"):
                layer(x.float(), position_embeddings=(cos, sin))
            return
        with torch.set_grad_enabled(how == "gradients"):
            own = layer(x, *args, position_embeddings=(cos, sin))
    with tree_attention_in(model), torch.no_grad(), _handing_a_chain(1, 3):
        wanted = layer(x, position_embeddings=(cos, sin))
    torch.testing.assert_close(own, wanted, rtol=2**-6, atol=2**-6)


def test_an_embedding_of_another_type_is_the_layer_s_own_affair() -> None:
    model = _family("llama")
    x, (cos, sin) = torch.randn(1, 3, 64).bfloat16(), torch.randn(2, 1, 3, 16)
    refused = pytest.raises(ValueError, match="tree_attention: v_cache must be float32 like q")
    with _running(model), _handing_a_chain(1, 3), refused:
        model.model.layers[0](x, position_embeddings=(cos, sin))


def test_a_keyword_that_we_do_not_know_is_refused() -> None:
    model = _family("llama")
    with _running(model), _handing_a_chain(1, 3):
        x, (cos, sin) = torch.randn(1, 3, 64).bfloat16(), torch.randn(2, 1, 3, 16).bfloat16()
        with pytest.raises(ValueError, match="LlamaAttention gives its attention the keyword mine"):
            model.model.layers[0](x, position_embeddings=(cos, sin), mine=x)


def test_norms_that_differ_in_their_epsilon_are_left_alone() -> None:
    model = _family("qwen3, norms of heads")
    model.model.layers[0].self_attn.k_norm.variance_epsilon = 1e-5
    with _running(model):
        assert _replaced(model) == 1


def test_layers_stay_where_their_weights_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_fits", lambda linears: False)
    model = _family("llama")
    with fast_layers(model):
        assert _replaced(model) == 0


class _WithSinks(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, s_aux=torch.ones(4), **kwargs)


def test_attention_with_sinks_is_left_alone() -> None:
    model = _family("llama")
    model.model.layers[1].self_attn.__class__ = _WithSinks
    with _running(model):
        assert _replaced(model) == 2


def test_parts_too_small_to_show_are_tried_too() -> None:
    model = _family("gelu")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 1e-3
    with _running(model):
        assert _replaced(model) == 0


@of_each_dtype
@pytest.mark.parametrize("sampled", [False, True])
def test_generation_is_the_same_with_and_without(
    sampled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of a random model part soon if anything is wrong; rounding alone parts few."""
    model = _family("llama", dtype)
    rows = random_prompts((9, 14, 11, 20), 101)

    def run() -> Tensor:
        decoder = SpeculativeDecoder("suffix", seed=[1, 2, 3, 4], pack=True)
        options: dict[str, Any] = {"do_sample": sampled, "max_new_tokens": 12}
        return model.generate(**left_pad(rows), custom_generate=decoder, **options)

    fused = run()
    _leave_all(monkeypatch)
    assert float((fused == run()).float().mean()) > 0.7
