"""Packed weights: the same products, kept up to date, and a model that is left as it was found."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from torch import Tensor, nn

from specdec_kernels import SpeculativeDecoder, layouts
from specdec_kernels.hf import packing
from specdec_kernels.hf.large_pages import LargePages, aligned
from specdec_kernels.hf.packing import packed_linears
from specdec_kernels.layouts import OneDnn, Panels, layout_for

KINDS = {
    "panels-float32": (Panels, torch.float32),
    "panels-float16": (Panels, torch.float16),
    "panels-bfloat16": (Panels, torch.bfloat16),
    "onednn-bfloat16": (OneDnn, torch.bfloat16),
}
ROUNDING = {torch.float32: 2**-20, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True, params=KINDS)
def kind(request, monkeypatch) -> tuple[object, torch.dtype]:
    """Both layouts, whichever this CPU would choose."""
    layout, packs = KINDS[request.param]
    if layout is OneDnn and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN multiplies no bfloat16 on this CPU")
    monkeypatch.setattr(layouts, "layout_for", lambda dtype: layout if dtype == packs else None)
    monkeypatch.setattr(packing, "_packed", weakref.WeakKeyDictionary())
    return layout, packs


@pytest.fixture
def layout(kind) -> object:
    return kind[0]


@pytest.fixture
def dtype(kind) -> torch.dtype:
    return kind[1]


class Doubled(nn.Linear):
    """No plain linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.fixture
def layers(dtype) -> Iterator[nn.ModuleDict]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield nn.ModuleDict(
            {
                "plain": nn.Linear(96, 40, bias=False),
                "biased": nn.Linear(96, 33),
                "subclass": Doubled(96, 40),
                "other": nn.LayerNorm(96),
            }
        ).to(dtype)


def _packed(layers: nn.ModuleDict) -> set[str]:
    return {name for name, layer in layers.items() if "forward" in layer.__dict__}


@pytest.mark.parametrize("rows", [(96,), (0, 96), (1, 96), (2, 17, 96)])
@pytest.mark.parametrize("name", ["plain", "biased"])
def test_products_are_those_of_the_layer(layers, dtype, name: str, rows: tuple[int, ...]) -> None:
    x = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = layers[name]
    exact = nn.functional.linear(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    with packed_linears(layers, True):
        assert _packed(layers) == {"plain", "biased"}
        got = layer(x)
    assert got.dtype == dtype and got.shape == exact.shape
    torch.testing.assert_close(got.double(), exact, rtol=ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("rows", [packing._TILE_ROWS - 1, packing._TILE_ROWS])
def test_matrix_tiles_take_many_rows_of_bfloat16(layers, kind, rows: int, monkeypatch) -> None:
    layout, dtype = kind
    monkeypatch.setattr(packing, "has_matrix_tiles", lambda: True)
    multiplied = []
    multiply = layout.multiply
    monkeypatch.setattr(
        layout,
        "multiply",
        staticmethod(lambda x, *rest: multiplied.append(x.shape) or multiply(x, *rest)),
    )
    with packed_linears(layers, True):
        layers["plain"](torch.zeros(2, rows // 2, 96).to(dtype))
        layers["plain"](torch.zeros(rows, 96).to(dtype))
    has_own_product = kind == (Panels, torch.bfloat16) and rows == packing._TILE_ROWS
    assert len(multiplied) == (0 if has_own_product else 2)


def test_layers_are_given_back_even_after_an_error(layers, dtype) -> None:
    with (
        pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"),
        packed_linears(layers, True),
    ):
        layers["plain"](torch.zeros(1, 7).to(dtype))
    assert _packed(layers) == set()


def test_another_dtype_and_gradients_take_the_layer_s_own_way(layers, dtype) -> None:
    layer = layers["plain"]
    with packed_linears(layers, True):
        with pytest.raises(RuntimeError, match="dtype"):
            layer(torch.zeros(1, 96).double())
        with torch.enable_grad():
            assert layer(torch.zeros(1, 96).to(dtype)).requires_grad


def _replace(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(-layer.weight)


def _set_data(layer: nn.Linear) -> None:
    layer.weight.data = -layer.weight.data


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.mul_(-1),
        lambda layer: layer.weight.data.mul_(-1),  # as PEFT merges, and as weights are averaged
        _replace,
        _set_data,
    ],
    ids=["in-place", "through-data", "replaced", "other-data"],
)
def test_a_changed_weight_is_packed_anew(layers, dtype, change) -> None:
    layer, x = layers["plain"], torch.randn(3, 96).to(dtype)
    with packed_linears(layers, True):
        before = layer(x)
    change(layer)
    with packed_linears(layers, True):
        assert torch.equal(layer(x), -before)


def test_weights_of_inference_mode_count_no_versions(dtype) -> None:
    with torch.inference_mode():
        layers = nn.ModuleDict({"plain": nn.Linear(96, 40)}).to(dtype)
        layer, x = layers["plain"], torch.randn(3, 96).to(dtype)
        for _ in range(2):
            with packed_linears(layers, True):
                assert _packed(layers) == {"plain"}
                packed = layer(x)
            torch.testing.assert_close(packed, layer(x), rtol=ROUNDING[dtype], atol=1e-6)
            layer.weight.neg_()


def test_layers_with_a_forward_of_their_own_keep_it(layers) -> None:
    layers["plain"].forward = lambda x: x  # as hooks of accelerate do
    with packed_linears(layers, True):
        assert _packed(layers) == {"plain", "biased"}
        assert layers["plain"](7) == 7
    assert _packed(layers) == {"plain"}


def test_copies_are_made_once_and_go_with_the_model(layers) -> None:
    gc.collect()
    before = len(packing._packed)
    with packed_linears(layers, True):
        copies = [copy for _, copy in packing._packed.values()]
    with packed_linears(layers, True):
        again = [copy for _, copy in packing._packed.values()]
    assert all(a is b for a, b in zip(copies, again, strict=True))
    assert len(packing._packed) == before + 2
    del layers["plain"], layers["biased"], copies, again
    gc.collect()
    assert len(packing._packed) == before


def test_copies_in_panels_lie_side_by_side(layers, layout) -> None:
    with packed_linears(layers, True):
        copies = sorted((c for _, c in packing._packed.values() if layout is Panels), key=_address)
        assert len(copies) == (2 if layout is Panels else 0)
        for before, after in pairwise(copies):
            assert _address(after) == _address(before) + aligned(before.nbytes)
        assert [c.nbytes for c in copies] == [
            Panels.num_bytes(layer.weight) for layer in (layers["plain"], layers["biased"])
        ][: len(copies)]


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


@pytest.mark.parametrize("has_large_pages", [False, True])
def test_large_pages_hold_copies(monkeypatch, has_large_pages: bool) -> None:
    if not has_large_pages:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    tensors = [torch.randn(3, 7).bfloat16(), torch.empty(0), torch.arange(40.0).view(8, 5)]
    pages = LargePages(t.nbytes for t in tensors)
    copies = [pages.copy(t) for t in tensors]
    del pages
    gc.collect()
    for copy, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copy, tensor) and copy.data_ptr() % 64 == 0
        copy.fill_(-1)  # nothing overlaps
    for first, second in combinations([t for t in copies if t.numel()], 2):
        assert first.data_ptr() + first.nbytes <= second.data_ptr()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent large pages"
)
def test_large_pages_are_asked_for_in_private_memory() -> None:
    held = LargePages([2**22]).copy(torch.zeros(2**20))
    address, inside = held.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text("ascii").splitlines():
        first = line.split()[0]
        if "-" in first:
            begin, end = (int(bound, 16) for bound in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            assert "hg" in line.split() and "sh" not in line.split()
            return
    raise AssertionError("not in the list of mappings")


def test_a_dtype_without_a_layout_is_left_alone(layers) -> None:
    with packed_linears(layers.double(), True):
        assert _packed(layers) == set()


@pytest.mark.parametrize(("free", "packs"), [(0, False), (2 * 73 * 96, True)])
def test_unasked_it_needs_free_memory(layers, dtype, monkeypatch, free: int, packs: bool) -> None:
    monkeypatch.setattr(packing, "_free_bytes", lambda: free * dtype.itemsize)
    with packed_linears(layers):
        assert bool(_packed(layers)) == packs
    with packed_linears(layers, False):
        assert not _packed(layers)
    with packed_linears(layers, True):
        assert _packed(layers)


def test_free_memory_is_that_of_the_control_group(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(packing, "_CGROUP", tmp_path)
    unlimited = packing._free_bytes()
    assert unlimited > 2**20  # MemAvailable
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert packing._free_bytes() == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert packing._free_bytes() > 2**20


def test_the_decoder_packs_and_unpacks(monkeypatch, layout, dtype) -> None:
    model = make_tiny_model().to(dtype)
    seen = []
    monkeypatch.setattr(packing, "_forward", lambda linear: seen.append(linear) or linear.forward)
    ids = torch.tensor([[5, 6, 7]])
    for pack, compile, packs in (
        (False, False, False),
        (True, "eager", layout is Panels),
        (True, False, True),
    ):
        seen.clear()
        decoder = SpeculativeDecoder("suffix", pack=pack, compile=compile)
        model.generate(ids, max_new_tokens=4, do_sample=False, custom_generate=decoder)
        assert bool(seen) == packs
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("has_float16", [False, True])
def test_the_layout_that_a_cpu_gets(monkeypatch, capability: str, has_float16: bool) -> None:
    """oneDNN's for float16 where it multiplies it, panels for all else that a register widens."""
    monkeypatch.setattr(layouts, "cpu_capability", lambda: capability)
    onednn = torch.ops.mkldnn
    monkeypatch.setattr(onednn, "_is_mkldnn_fp16_supported", lambda: has_float16)
    monkeypatch.setattr(onednn, "_is_mkldnn_bf16_supported", lambda: False)
    panels = None if capability == "default" else Panels
    chosen = {dtype: layout_for.__wrapped__(dtype) for dtype in (*ROUNDING, torch.float64)}
    assert chosen == {
        torch.float32: panels,
        torch.float16: OneDnn if has_float16 else panels,
        torch.bfloat16: panels,
        torch.float64: None,
    }
