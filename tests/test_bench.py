"""The operator benches: every contender does the same work, and a wrong result is never timed."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from specdec_kernels.bench import machine, ops
from specdec_kernels.bench.baselines import ROW_BY_ROW
from specdec_kernels.bench.cases import CASES, BenchCase
from specdec_kernels.bench.draft_laws import NetworkLaws
from specdec_kernels.bench.e2e import read_prompts
from specdec_kernels.bench.ops import check_case, run_ops
from specdec_kernels.bench.roofline import Work
from specdec_kernels.bench.rules import DISTINCT, RULES, Settings, _mean, _summary, run_rules
from specdec_kernels.drafters import DraftNetwork, shipped_heads
from specdec_kernels.hf import DraftModel, EarlyExitModel
from specdec_kernels.hf.text import TextModel
from specdec_kernels.registry import INTERPRETS_TRITON, OPS, multiply_registers
from specdec_kernels.tables import ops_table, rules_table

FIELDS = {
    "op",
    "case",
    "backend",
    "us",
    "spread",
    "floor_us",
    "num_bytes",
    "num_flops",
    "baseline",
    "baseline_us",
    "baseline_spread",
    "ratio",
}


def test_a_baseline_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(ROW_BY_ROW, name="another", why_absent=lambda: "not installed")
    case = next(case for case in CASES if case.op == "tree_mask")
    monkeypatch.setattr(ops, "CASES", (replace(case, baselines=(ROW_BY_ROW, absent)),))
    record = run_ops(["tree_mask"], quick=True)
    assert [row["baseline"] for row in record["rows"]] == [ROW_BY_ROW.name]
    assert record["absent"] == {"another": "not installed"}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(ops_table(record))
    assert "absent: another: not installed" in console.export_text()


def test_every_operator_has_a_bench_case() -> None:
    assert {case.op for case in CASES} == OPS.keys()


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.is_quick], ids=lambda case: f"{case.op}-{case.name}"
)
def test_operator_and_baselines_agree_and_some_work_is_needed(case: BenchCase) -> None:
    reference = check_case(case, None)
    assert case.work(case.inputs(), reference.outputs).num_bytes > 0


def test_rows_hold_the_times_and_the_machine() -> None:
    seen: list[dict[str, Any]] = []
    result = run_ops(["tree_mask"], backend="reference", quick=True, progress=seen.append)
    assert result["rows"] == seen and len(seen) == 2
    for row in seen:
        assert row.keys() == FIELDS and row["backend"] == "reference"
        assert row["us"] > 0 and row["ratio"] == pytest.approx(row["baseline_us"] / row["us"], 0.2)
    described = result["machine"]
    assert described["versions"]["torch"] == torch.__version__
    assert described["bandwidth_gbs"] > 0 and described["bf16_gflops"] > 0


@pytest.mark.parametrize("faster", [torch.bfloat16, torch.float32])
def test_the_matrix_rate_is_that_of_the_faster_type(
    faster: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPUs without bfloat16 products emulate them; a large one may take a minute."""
    large = []

    def seconds(product: Any, device: str) -> float:
        matrix = product.args[0]
        large.extend([matrix.dtype] if len(matrix) == machine._MATRIX else [])
        return 0.5 if matrix.dtype == faster else 2.0

    monkeypatch.setattr(machine, "_fastest", seconds)
    assert machine._matrix_rate("cpu") == 2 * machine._MATRIX**3 / 0.5
    assert large == [faster]


def test_products_in_registers_are_counted_and_the_better_rate_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = multiply_registers(1)
    assert one % (2 * torch.get_num_threads()) == 0 < one
    assert multiply_registers(2**23) == 2**23 * one  # counted from what the products gave
    monkeypatch.setattr(machine, "_read_bandwidth", lambda device: 3e9)
    monkeypatch.setattr(machine, "_matrix_rate", lambda device: 5e9)
    for registers, best in ((4e9, 5.0), (6e9, 6.0)):
        monkeypatch.setattr(machine, "_register_rate", lambda device, rate=registers: rate)
        assert machine.measure_rates() == {"bandwidth_gbs": 3.0, "bf16_gflops": best}


def test_floors_are_of_the_best_rates_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is twice as fast at the end: the first operators' floors halve."""
    described = {"bandwidth_gbs": 4.0, "bf16_gflops": 1e9}
    later = iter(
        [{"bandwidth_gbs": 8.0, "bf16_gflops": 1.0}, {"bandwidth_gbs": 2.0, "bf16_gflops": 1.0}]
    )
    monkeypatch.setattr(ops, "describe_machine", lambda device: dict(described))
    monkeypatch.setattr(ops, "measure_rates", lambda device: next(later))
    result = run_ops(["tree_mask", "build_tree"], quick=True)
    assert result["machine"] == {"bandwidth_gbs": 8.0, "bf16_gflops": 1e9}
    assert next(later, None) is None  # measured after each operator, no more
    assert {row["op"] for row in result["rows"]} == {"tree_mask", "build_tree"}
    for row in result["rows"]:
        assert row["floor_us"] == pytest.approx(row["num_bytes"] / 8e3, abs=0.006)


def test_copies_are_as_many_as_what_a_call_touches_needs() -> None:
    """Of a tree's logits that are the rows on the path, not all."""
    inputs = {"logits": torch.zeros(2**20)}
    for touched, copies in ((2**22, 34), (2**20, 130), (2**17, 258), (2**30, 2)):
        assert len(ops.cold_copies(inputs, Work(touched))) == copies
    assert len(ops.cold_copies({"logits": torch.zeros(8)}, Work(32))) == 2048


def test_contenders_take_turns_in_bursts_and_every_call_has_the_next_copy() -> None:
    calls: list[tuple[str, int]] = []

    def contender(name: str) -> Callable[[Any], Callable[[], None]]:
        return lambda inputs: lambda: calls.append((name, int(inputs["x"])))

    copies = [{"x": torch.tensor(i)} for i in range(5)]
    own, other = ops._time_in_turn([contender("a"), contender("b")], copies, "cpu", 0.0)
    assert len(own) == len(other) == 8
    assert calls == [("a" if i < 8 else "b", i % 5) for i in range(16)]


def _wrong_mask(**inputs: Any) -> Any:
    ancestors, depths = OPS["tree_mask"].reference(**inputs)
    ancestors[0, -1, 0] ^= 2
    return ancestors, depths


def _imprecise_logprobs(**inputs: Any) -> Any:
    logprobs, tokens = OPS["topk_logprobs"].reference(**inputs)
    return logprobs * 1.001, tokens


def _forgotten_layer(**inputs: Any) -> Any:
    for name in ("k_caches", "v_caches"):
        inputs[name] = inputs[name][:-1]
    return OPS["commit"].reference(**inputs)


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        ("tree_mask", _wrong_mask),
        ("topk_logprobs", _imprecise_logprobs),
        ("commit", _forgotten_layer),
    ],
)
def test_a_wrong_result_is_never_timed(
    op: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPS[op].backends, "cpu", wrong)
    with pytest.raises(RuntimeError, match=rf"^{op} .*: the result differs from the reference's"):
        run_ops([op], backend="cpu", quick=True)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown operator 'attention'; known: "):
        run_ops(["attention"])
    with pytest.raises(ValueError, match="backend 'tpu' cannot run tree_mask: unknown"):
        run_ops(["tree_mask"], backend="tpu")


@pytest.mark.skipif(not INTERPRETS_TRITON, reason="kernels run compiled here, not interpreted")
def test_interpreted_kernels_are_not_timed() -> None:
    with pytest.raises(ValueError, match="interpreted kernels are not timed"):
        run_ops(["tree_mask"], backend="triton", quick=True)


def test_rules_are_compared_on_the_same_contexts() -> None:
    seen: list[str] = []
    record = run_rules(
        TextModel(),
        read_prompts()[:2],
        num_contexts=3,
        settings=Settings(shape=(2, 1), contexts_per_prompt=2, temperatures=(1.0,)),
        progress=seen.append,
    )
    assert len(seen) == 3 and record["machine"]["settings"]["num_contexts"] == 3
    rows = {(r["draft"], r["siblings"], r["rule"]): r for r in record["rows"]}
    assert len(rows) == 2 * sum(map(len, RULES.values()))
    for (_, siblings, rule), row in rows.items():
        assert 0 <= row["accepted"] <= 2 and row["temperature"] == 1.0
        if (siblings, rule) == (DISTINCT, "token"):
            assert row["gain"] == row["gain_ci95"] == 0
    assert any(row["accepted"] > 0 for row in rows.values())
    with pytest.raises(ValueError, match=r"contexts must be in \[3, 4\] with 2 prompts"):
        run_rules(TextModel(), read_prompts()[:2], num_contexts=5, settings=_TWO_EACH)


@pytest.mark.parametrize("shape", [(2, 1), (1, 1, 1)])
@pytest.mark.parametrize("name", ["mlp", "draft", "early-exit"])
def test_rules_are_compared_on_the_law_of_a_network(name: str, shape: tuple[int, ...]) -> None:
    """Drafts are tested by the law they come from: a status other than "ok" would raise."""
    subject = TextModel()
    network: DraftNetwork
    if name == "draft":
        ids = torch.arange(0, 49152, 3)
        model = TextModel().model
        rows = model.get_input_embeddings().weight.detach().clone()
        model.resize_token_embeddings(len(ids) + 1)
        model.get_input_embeddings().weight.data[:-1] = rows[ids]
        network = DraftModel(model, ids=ids)
    else:
        network = shipped_heads("mlp") if name == "mlp" else EarlyExitModel(24)
    settings = Settings(shape=shape, contexts_per_prompt=3, temperatures=(1.0, 0.5), num_seeds=8)
    record = run_rules(
        subject, read_prompts()[:2], num_contexts=5, settings=settings,
        laws=NetworkLaws(name, network),
    )  # fmt: skip
    rows = {(r["temperature"], r["siblings"], r["rule"]): r for r in record["rows"]}
    assert len(rows) == len(record["rows"]) == 2 * sum(map(len, settings.rules.values()))
    assert {r["draft"] for r in record["rows"]} == {name}
    kept = [row["accepted"] for row in rows.values()]
    assert max(kept) <= len(shape) and min(kept) > 0


def test_a_draft_of_which_nothing_is_kept_has_no_gain() -> None:
    key = ("a", 1.0, DISTINCT, "token")
    row = _summary(key, [{key: [0.0, 0.0]}, {key: [0.0]}])
    assert row["accepted"] == 0 and row["gain"] is None
    assert "0.00" in _text_of(rules_table([row, row]))


def _text_of(table: Table) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_confidence_takes_prompts_as_the_sample() -> None:
    middle, half_width = _mean([[1.0, 1.0], [3.0, 3.0]])
    assert middle == 2.0
    assert half_width == pytest.approx(1.96 * 1.0)  # two means, 1 from the middle each: s.e. 1


_TWO_EACH = Settings((2, 1), (1.0,), contexts_per_prompt=2)
