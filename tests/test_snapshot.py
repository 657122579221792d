"""What a model has to be made faster is looked for again when it has changed, and only then."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from test_layers import _family, _packs_in_panels, _running
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from specdec_kernels.hf import fusing
from specdec_kernels.hf.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures(_packs_in_panels.__name__)


def _own_forward(model: Any) -> None:
    model.model.layers[1].mlp.forward = lambda x: x


def _narrow_norm(model: Any) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data.bfloat16()


CHANGES: dict[str, Callable[[Any], object]] = {
    "a part": lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.SiLU()),
    "a layer more": lambda m: m.model.layers.append(m.model.layers[0]),
    "layers in another order": lambda m: m.model.layers.insert(0, m.model.layers.pop(1)),
    "a parameter": lambda m: setattr(m.model.norm, "weight", nn.Parameter(torch.rand(64))),
    "a bias": lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.rand(101))),
    "a buffer": lambda m: m.model.layers[0].register_buffer("factor", torch.ones(1)),
    "a parameter's memory": lambda m: setattr(m.model.norm.weight, "data", torch.rand(64)),
    "a parameter's type": _narrow_norm,
    "all types": lambda m: m.half(),
    "a number": lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.125),
    "a new attribute": lambda m: setattr(m.model.norm, "epsilon", 1e-6),
    "the configuration": lambda m: setattr(m.config, "hidden_act", "gelu"),
    "the mode": lambda m: m.train(),
    "a forward of its own": _own_forward,
    "where hooks are kept": lambda m: setattr(
        m.model.layers[0].mlp, "_forward_hooks", OrderedDict()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change: Callable[[Any], object]) -> None:
    model = make_tiny_model()
    snapshot = Snapshot(model)
    assert snapshot.is_current()
    change(model)
    assert not snapshot.is_current()
    assert Snapshot(model).is_current()


def test_a_class_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot(make_tiny_model())
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, x, **_: x)
    assert not snapshot.is_current()


class _Elsewhere(nn.Parameter):
    """As wrapped or split parameters are."""

    def data_ptr(self) -> int:
        raise RuntimeError("no storage of its own")


def test_a_parameter_without_memory_of_its_own_is_seen_as_another_one() -> None:
    model = make_tiny_model()
    model.model.norm.weight = _Elsewhere(torch.ones(64))
    snapshot = Snapshot(model)
    assert snapshot.is_current()
    model.model.norm.weight = _Elsewhere(torch.ones(64))
    assert not snapshot.is_current()


def test_hooks_and_values_may_change() -> None:
    """What the replacements read whenever they run."""
    model = make_tiny_model()
    snapshot = Snapshot(model)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    assert snapshot.is_current()


def test_a_model_that_nobody_else_has_is_freed() -> None:
    model = _family("llama")
    with _running(model):
        pass
    alive = weakref.ref(model)
    assert model in fusing._parts
    del model
    gc.collect()
    assert alive() is None
