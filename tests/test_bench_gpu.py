"""The bench for GPUs, driven on the CPU: all of it but the GPU's own events and kernels."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from io import StringIO
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from specdec_kernels.bench import baselines, gpu
from specdec_kernels.bench.baselines import FLEX_ATTENTION
from specdec_kernels.bench.cases import BenchCase
from specdec_kernels.bench.gpu import DeviceClock, gpu_cases, run_gpu
from specdec_kernels.bench.gpu_baselines import FLASHINFER
from specdec_kernels.bench.ops import baseline_agrees, run_reference
from specdec_kernels.bench.roofline import GPUS
from specdec_kernels.cli import main
from specdec_kernels.registry import OPS
from specdec_kernels.tables import gpu_table

H100 = next(g for g in GPUS if "H100" in g.name)


class Event:
    """What the bench asks of `torch.cuda.Event`."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        assert self.time > 0

    def elapsed_time(self, end: Event) -> float:
        """ms"""
        return (end.time - self.time) * 1e3


def _ten_us(call: Callable[[], Any]) -> float:
    call()
    return 10.0


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known GPU, and FlexAttention as it is without a compiler."""
    machine = {"gpu": H100.name, "bandwidth_gbs": 1.0, "bf16_gflops": 1.0}
    monkeypatch.setattr(gpu, "describe_machine", lambda device: machine)
    monkeypatch.setattr(baselines, "_compiled_flex_attention", lambda *shapes: flex_attention)
    monkeypatch.setattr(gpu, "_QUICK_SECONDS", 0.0)


def _run(**options: Any) -> dict[str, Any]:
    return run_gpu(quick=True, device="cpu", **{"backends": ("cpu", "cuda"), **options})


@pytest.mark.usefixtures("pretended")
def test_rows_hold_time_rate_and_share_of_the_roofline() -> None:
    seen: list[str] = []
    record = _run(ops=["tree_mask"], clock=_ten_us, progress=seen.append)
    assert seen == [f"tree_mask {case.name}" for case in gpu_cases(["tree_mask"], True)]
    assert not record["failures"] and record["absent"] == {"tree_mask cuda": "no CUDA device"}
    assert record["rates"] == {
        "bandwidth_gbs": 3350, "bf16_gflops": 989_500, "source": H100.source,
    }  # fmt: skip
    first = record["rows"][0]
    num_bytes = 15 * 4 + 16 * 8 + 16 * 4
    assert first == {
        "op": "tree_mask", "case": "B1_N16", "contender": "cpu", "us": 10.0, "spread": 0.0,
        "gbs": round(num_bytes / 10 / 1e3, 2), "roofline": round(num_bytes / 3350 / 1e3 / 10, 4),
        "against": {"cpu": 1.0},
    }  # fmt: skip
    assert [row["contender"] for row in record["rows"]] == 2 * ["cpu", "mask row by row"]


@pytest.mark.usefixtures("pretended")
def test_attention_meets_all_its_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", _flashinfer())
    monkeypatch.setattr(gpu, "CASES", [c for c in gpu.CASES if c.sizes.get("N") == 16])
    record = _run(ops=["tree_attention"], clock=DeviceClock("cpu", Event, num_bytes=64))
    assert not record["failures"]
    cases = list(gpu_cases(["tree_attention"], True))
    names = ["cpu", "hf sdpa", "sdpa enable_gqa", FLEX_ATTENTION.name, FLASHINFER.name]
    assert [row["contender"] for row in record["rows"]] == names * len(cases)
    assert all(row["us"] > 0 and row["against"]["cpu"] > 0 for row in record["rows"])
    console = Console(width=200, record=True, file=StringIO())
    console.print(gpu_table(record))
    text = " ".join(console.export_text().split())
    for part in ("3350 GB/s", FLASHINFER.name, "absent: tree_attention cuda: "):
        assert part in text


def _flashinfer() -> ModuleType:
    """What the bench uses of FlashInfer, by its documentation: queries [N, H, D], keys and values
    [G, S, D] in layout "HND", a mask of bits, the lowest first.
    """

    def packbits(bits: Tensor, bitorder: str) -> Tensor:
        assert bits.dim() == 1 and bitorder == "little"
        padded = torch.nn.functional.pad(bits.int(), (0, -len(bits) % 8)).view(-1, 8)
        return (padded << torch.arange(8)).sum(1).to(torch.uint8)

    def single_prefill_with_kv_cache(
        q: Tensor, k: Tensor, v: Tensor, *, packed_custom_mask: Tensor, kv_layout: str,
        sm_scale: float,
    ) -> Tensor:  # fmt: skip
        assert kv_layout == "HND"
        nodes, slots = len(q), k.shape[1]
        bits = packed_custom_mask[:, None] >> torch.arange(8) & 1
        mask = bits.flatten()[: nodes * slots].view(nodes, slots).bool()
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], mask, scale=sm_scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    module: Any = ModuleType("flashinfer")
    module.__spec__ = SimpleNamespace()  # found by importlib
    module.quantization = SimpleNamespace(packbits=packbits)
    module.single_prefill_with_kv_cache = single_prefill_with_kv_cache
    return module


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("wrong", ["result", "error"])
def test_what_is_wrong_is_told_and_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**inputs: Any) -> Any:
        if wrong == "error":
            raise RuntimeError("CUDA error: misaligned address\nmore")
        ancestors, depths = OPS["tree_mask"].reference(**inputs)
        return ancestors ^ 2, depths

    monkeypatch.setitem(OPS["tree_mask"].backends, "cpu", broken)
    record = _run(ops=["tree_mask"], clock=_ten_us)
    errors = {failure["error"] for failure in record["failures"]}
    assert (
        errors
        == {
            "result": {"the result differs from the reference's"},
            "error": {"CUDA error: misaligned address"},
        }[wrong]
    )
    assert {failure["contender"] for failure in record["failures"]} == {"cpu"}
    assert {row["contender"] for row in record["rows"]} == {"mask row by row"}
    assert all(row["against"] == {} for row in record["rows"])


@pytest.mark.usefixtures("pretended")
def test_lengths_start_anew_for_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    original = OPS["commit"].backends["cpu"]

    def watched(**inputs: Any) -> Any:
        lengths.append(int(inputs["lengths"][0]))
        return original(**inputs)

    case = BenchCase("commit", {"B": 1, "N": 4, "L": 1, "G": 1, "D": 8, "S": 16}, (), dict)
    monkeypatch.setitem(OPS["commit"].backends, "cpu", watched)
    monkeypatch.setattr(gpu, "CASES", (case,))
    record = _run(ops=["commit"], clock=_ten_us, backends=("cpu",))
    assert not record["failures"] and lengths == [12] * 14  # checked once, warm, timed


def test_an_unknown_gpu_is_measured() -> None:
    machine = {"gpu": None, "bandwidth_gbs": 7.0, "bf16_gflops": 9.0}
    rates = gpu._rates(machine)
    assert (rates["bandwidth_gbs"], rates["bf16_gflops"]) == (7.0, 9.0)
    assert rates["source"].startswith("measured here")


def test_a_wrong_mask_of_flex_attention_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: bits of another tree give another result."""
    monkeypatch.setattr(baselines, "_compiled_flex_attention", lambda *shapes: flex_attention)
    case = next(c for c in gpu_cases(["tree_attention"], True) if c.sizes["N"] == 16)
    inputs = case.inputs()
    reference = run_reference(case, inputs, "cpu")
    assert baseline_agrees(FLEX_ATTENTION, inputs, reference, "cpu")
    inputs["ancestors"] = inputs["ancestors"] | 0x0F
    assert not baseline_agrees(FLEX_ATTENTION, inputs, reference, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", "--op", "tree_mask"]) == 1
    assert "no CUDA device; on a CPU: specdec bench ops" in capsys.readouterr().err
    assert main(["bench", "gpu", "--op", "attention"]) == 1
    assert "unknown operator 'attention'" in capsys.readouterr().err


def test_the_exit_code_tells_of_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = {"op": "verify", "case": "B1", "contender": "cuda", "error": "differs"}
    rates = {"bandwidth_gbs": 1.0, "bf16_gflops": 1.0, "source": "none"}
    record = {"rates": rates, "rows": [], "failures": [failure], "absent": {}}
    monkeypatch.setattr(gpu, "run_gpu", lambda *_, **__: record)
    assert main(["bench", "gpu"]) == 1
    assert "WRONG verify B1 cuda: differs" in capsys.readouterr().out
    record["failures"] = []
    assert main(["bench", "gpu"]) == 0
