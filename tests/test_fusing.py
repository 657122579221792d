"""Fused norms and rotary embeddings: what is replaced, what is not, and that all is given back."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from prompts import left_pad, random_prompts
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from specdec_kernels import SpeculativeDecoder
from specdec_kernels.hf import fusing
from specdec_kernels.hf.attention import Localities, handing
from specdec_kernels.hf.fusing import fast_layers

OWN_ROPE = modeling_llama.apply_rotary_pos_emb


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
of_each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture
def model() -> Any:
    return make_tiny_model().bfloat16().requires_grad_(False)


def _norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, LlamaRMSNorm)]


def _fused(model: nn.Module) -> int:
    return sum("forward" in norm.__dict__ for norm in _norms(model))


@of_each_dtype
def test_norms_and_rotations_are_replaced_and_given_back(model: Any, dtype: torch.dtype) -> None:
    model.to(dtype)
    with fast_layers(model, False):
        assert _fused(model) == len(_norms(model)) == 7
        assert modeling_llama.apply_rotary_pos_emb is not OWN_ROPE
        with fast_layers(model, False):  # a model may draft for itself
            assert modeling_llama.apply_rotary_pos_emb is not OWN_ROPE
        assert _fused(model) == 7
        assert modeling_llama.apply_rotary_pos_emb is not OWN_ROPE
    assert _fused(model) == 0 and modeling_llama.apply_rotary_pos_emb is OWN_ROPE


def test_an_error_gives_back_too(model: Any) -> None:
    with pytest.raises(IndexError), torch.no_grad(), fast_layers(model, False):
        model(torch.full((1, 3), 500))
    assert _fused(model) == 0 and modeling_llama.apply_rotary_pos_emb is OWN_ROPE


@pytest.mark.parametrize("how", ["float64", "compiled", "autocast"])
def test_what_stays_as_it_was(model: Any, how: str) -> None:
    model = model.double() if how == "float64" else model
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
        fast_layers(model, False, compiled=how == "compiled"),
    ):
        assert _fused(model) == 0 and modeling_llama.apply_rotary_pos_emb is OWN_ROPE


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad(), handing(Localities()):
        return model(tokens, use_cache=False).logits.double()


@of_each_dtype
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_the_model_computes_what_it_did(family: str, dtype: torch.dtype, model: Any) -> None:
    """Llama's, a norm of every head, and a norm of another formula."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    elif family == "gemma":
        model = GemmaForCausalLM(GemmaConfig(**sizes)).eval()
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand_like(parameter) + 0.5
    tokens = torch.randint(3, 101, (2, 9))
    exact = _logits(copy.deepcopy(model).double(), tokens)
    plain = _logits(model, tokens)
    with fast_layers(model, False):
        fused = _logits(model, tokens)
        replaced = sum("forward" in m.__dict__ for m in model.modules())
    assert replaced == {"llama": 7, "qwen3": 9, "gemma": 0}[family]
    # Not the same bits: sums are made in another order. As near to the exact ones as before.
    rounding = float((plain - exact).abs().mean())
    assert rounding > 0 and float((fused - exact).abs().mean()) < 1.1 * rounding


def test_a_norm_of_another_formula_is_left_alone() -> None:
    """Olmo's rounds once, which ones as weights would hide; in float32 there is nothing to
    round.
    """
    norms = nn.ModuleList([Olmo2RMSNorm(64), LlamaRMSNorm(64)])
    for dtype, is_same in ((torch.float32, True), (torch.bfloat16, False), (torch.float16, False)):
        with fast_layers(norms.to(dtype), False):
            assert ["forward" in norm.__dict__ for norm in norms] == [is_same, True]


def test_other_inputs_and_gradients_take_the_layer_s_own_way() -> None:
    norm = LlamaRMSNorm(64).bfloat16()
    x = torch.randn(2, 64).bfloat16()
    norm(x).sum().backward()
    grad, norm.weight.grad = norm.weight.grad, None
    with fast_layers(norm, False):
        norm(x).sum().backward()
        assert torch.equal(norm.weight.grad, grad)
        with torch.no_grad():
            assert norm(x.float()).dtype == torch.float32
            assert norm(x[0]).shape == (64,) and norm(x[:0]).shape == (0, 64)


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)


def test_rotations_outside_of_our_passes_are_the_file_s_own(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    rope = fusing.rope

    def counted(*args: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(threading.get_ident())
        return rope(*args)

    monkeypatch.setattr(fusing, "rope", counted)
    q, k = torch.randn(2, 4, 3, 16).bfloat16(), torch.randn(2, 2, 3, 16).bfloat16()
    cos, sin = torch.randn(2, 1, 3, 16).bfloat16()
    want = OWN_ROPE(q, k, cos, sin)
    with torch.no_grad(), fast_layers(model, False):
        calls.clear()
        results = [_turned(q, k, cos, sin)]
        with ThreadPoolExecutor(1) as pool, handing(Localities()):
            results.append(_turned(q, k, cos, sin))
            results.append(pool.submit(_turned, q, k, cos, sin).result())
            wide = (q.float(), k.float(), cos.float(), sin.float())
            torch.testing.assert_close(_turned(*wide), OWN_ROPE(*wide))
    assert calls == [threading.get_ident()]
    for result in results:
        for own, other in zip(result, want, strict=True):
            assert torch.equal(own, other)


def test_two_models_of_one_file_turn_each_in_its_own_dtype(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    rope = fusing.rope
    wide = make_tiny_model().requires_grad_(False)
    heads = [torch.randn(shape) for shape in ((1, 4, 3, 16), (1, 2, 3, 16))]
    heads += torch.randn(2, 1, 3, 16)
    kinds = (torch.float32, torch.bfloat16)
    with torch.no_grad(), fast_layers(model, False), handing(Localities()):
        with fast_layers(wide, False):
            monkeypatch.setattr(fusing, "rope", lambda q, *x: seen.append(q.dtype) or rope(q, *x))
            for dtype in kinds:
                _turned(*(x.to(dtype) for x in heads))
            assert seen == [torch.float32, torch.bfloat16]
        for dtype in kinds:
            _turned(*(x.to(dtype) for x in heads))
        assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]


@of_each_dtype
@pytest.mark.parametrize("sampled", [False, True])
def test_generation_is_the_same_with_and_without(
    model: Any, sampled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of a random model part soon if anything is wrong; rounding alone parts few."""
    model.to(dtype)
    rows = random_prompts((9, 14, 11, 20), 101)
    options: dict[str, Any] = {"do_sample": sampled, "max_new_tokens": 12}

    def run() -> Tensor:
        decoder = SpeculativeDecoder("suffix", seed=[1, 2, 3, 4])
        return model.generate(**left_pad(rows), custom_generate=decoder, **options)

    fused = run()
    monkeypatch.setattr(fusing, "_is_fusable", lambda tensor: False)
    assert float((fused == run()).float().mean()) > 0.7
