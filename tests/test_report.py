"""The report: what the page shows of which record, and the model of the GPU what-if."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from byte_model import save_byte_model

from specdec_kernels.bench.roofline import GPUS
from specdec_kernels.cli import main
from specdec_kernels.report.drafters import compare, expected_tokens
from specdec_kernels.report.records import read_records
from specdec_kernels.report.what_if import LLAMA_8B, pass_seconds, speedup

H100 = next(gpu for gpu in GPUS if "H100" in gpu.name)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real records of two tree sizes and one with the budget, of a tiny model; rows of operators
    and a cost curve in the form of theirs.
    """
    folder = tmp_path_factory.mktemp("records")
    save_byte_model(folder / "model")
    prompts = folder / "prompts.jsonl"
    rows = [(1, "writing", "ab <b>$x$"), (2, "qa", "xyz")]
    lines = ({"question_id": n, "category": c, "turns": [t]} for n, c, t in rows)
    prompts.write_text("\n".join(map(json.dumps, lines)))
    common = ["--model", str(folder / "model"), "--prompts", str(prompts), "--dtype", "fp32"]
    paths = []
    for name, options in {
        "small": ["--no-budget", "--max-nodes", "4"],
        "large": ["--no-budget", "--max-nodes", "8"],
        "budget": [],
    }.items():
        paths.append(folder / f"{name}.json")
        command = ["bench", "e2e", *common, "--max-new-tokens", "16", *options]
        assert main([*command, "--json", str(paths[-1])]) == 0
    machine = json.loads(paths[0].read_text())["machine"]
    row = {
        "op": "verify",
        "case": "B1_N16",
        "us": 20.0,
        "floor_us": 5.0,
        "baseline": "HF <warpers>",
    }
    ops = {"machine": machine, "rows": [{**row, "ratio": r, "case": f"B{r}"} for r in (3.0, 9.0)]}
    costs = {"llama-3x64-float32-cpu-2": {"nodes": [1, 8, 64], "seconds": [0.01, 0.02, 0.05]}}
    for name, record in (("ops", ops), ("costs", costs)):
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(record))
    return paths


def _page(paths: list[Path], tmp_path: Path) -> str:
    out = tmp_path / "pages" / "report.html"
    assert main(["report", *map(str, paths), "--out", str(out)]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    return out.read_text("utf-8")


def test_every_record_has_its_sections_on_one_page_without_files(records, tmp_path) -> None:
    page = _page(records, tmp_path)
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Speed against generate",
        "What is accepted",
        "One real step",
        "Cost of a forward pass",
        "Tokens per step",
        "Operators against the machine&#x27;s limit",
        "GPU what-if",
    ]
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(drawings) == 14  # light and dark of each
    ids = [i for drawing in drawings for i in re.findall(r'\bid="([^"]+)"', drawing)]
    assert len(ids) == len(set(ids))
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    targets = re.findall(r'(?:src|href)="([^"#][^"]*)"|url\(([^#)][^)]*)\)', page)
    assert targets == [] and "<script" not in page
    assert "A model, not a measurement" in page and "HF &lt;warpers&gt;" in page
    assert "commit" in page and "<td>9.0x</td>" in page


def test_a_record_alone_makes_a_page_of_its_own(records, tmp_path) -> None:
    assert re.findall(r"<h2>(.*?)</h2>", _page(records[3:4], tmp_path)) == [
        "Operators against the machine&#x27;s limit"
    ]
    assert "GPU what-if" not in _page(records[2:3], tmp_path)  # trees sized by cost tell no tau(N)


def test_a_machine_is_named_once_with_what_each_run_found(records, tmp_path: Path) -> None:
    faster = json.loads(records[0].read_text())
    faster["machine"] |= {"bandwidth_gbs": 12345.6, "commit": "abcdef0"}
    other = json.loads(json.dumps(faster))
    other["machine"] |= {"bandwidth_gbs": 6543.2}
    paths = [tmp_path / "faster.json", tmp_path / "other.json"]
    for path, record in zip(paths, (faster, other), strict=True):
        path.write_text(json.dumps(record))
    page = _page(paths, tmp_path)
    assert page.count("commit abcdef0") == 1
    assert "12345.6 GB/s" in page and "6543.2 GB/s" in page


def test_the_record_with_the_budget_is_the_main_one(records) -> None:
    read = read_records(records)
    assert read.main is not None and read.main["machine"]["settings"]["budget"] is None
    assert list(read.tokens_per_step()) == [4, 8]


@pytest.fixture(scope="module")
def other_drafter(records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of the same prompts, its numbers chosen."""
    record = json.loads(records[0].read_text())
    record["machine"]["settings"] |= {"drafter": "Slow <one>", "drafter_parameters": 2_500_000}
    record["statistics"] |= {
        "draft_seconds": 1.0, "forward_seconds": 2.0, "verify_seconds": 1.0, "num_steps": 80,
        "acceptance_by_depth": [0.5, 0.5, 0.25],
    }  # fmt: skip
    record["summary"]["generate"]["all"]["tok_s"] = 25.0
    record["summary"]["specdec"]["all"] |= {"tok_s": 30.0, "speedup": 1.5}
    record["summary"]["specdec"]["all"]["mean_tokens_per_step"] = 1.75
    record["summary"]["prompt_lookup"]["all"]["speedup"] = 1.2
    path = tmp_path_factory.mktemp("other") / "other.json"
    path.write_text(json.dumps(record))
    return path


def test_drafters_are_compared_and_the_formula_stands_beside(
    records, other_drafter: Path, tmp_path: Path
) -> None:
    page = _page([*records[:3], other_drafter], tmp_path)
    assert "<h2>Drafters compared</h2>" in page
    (row,) = re.findall(r"<tr><td>Slow &lt;one&gt;</td>(.*?)</tr>", page)
    assert re.findall(r"<td>(.*?)</td>", row) == [
        "2.5 M", "1.75", "50%, 50%, 25%", "25%", "30.0", "1.50x", "1.25x",
        # 1 + 1/2 + 1/4 + 1/16 tokens in 4 s / 80, which are 1.25 tokens of generate
        f"{1.8125 / 1.25:.2f}x",
    ]  # fmt: skip
    batch = json.loads(other_drafter.read_text())
    batch["machine"]["settings"] |= {"drafter": "batched", "batch": 4}
    idle = json.loads(other_drafter.read_text())
    idle["machine"]["settings"]["drafter"] = "idle"
    idle["statistics"] |= {f"{part}_seconds": 0.0 for part in ("draft", "forward", "verify")}
    idle["statistics"]["num_steps"] = 0
    assert compare([batch, idle]) == []
    read = read_records([*records[:3], other_drafter])
    assert [line.num_parameters for line in compare(read.e2e)].count(0) == 3
    assert read.tokens_per_step() == read_records(records[:3]).tokens_per_step()


def test_the_formula_of_a_chain_is_leviathans() -> None:
    for share in (0.3, 0.8):
        want = (1 - share**6) / (1 - share)
        assert expected_tokens([share] * 5) == pytest.approx(want)
    assert expected_tokens([]) == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"not JSON"),
        ("[1]", r"must be a JSON object, got list"),
        ('{"a": 1}', r"must come from specdec bench e2e, bench ops or tune, got an object with a"),
        ("{}", r"got an object with nothing"),
    ],
)
def test_another_file_is_refused(tmp_path, capsys, text: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert main(["report", str(path), "--out", str(tmp_path / "r.html")]) == 1
    assert re.search(rf"report: \S+other.json: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "r.html").exists()


def test_without_matplotlib_it_says_what_to_install(
    records, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "specdec_kernels.report.plots", raising=False)
    assert main(["report", str(records[0]), "--out", str(tmp_path / "r.html")]) == 1
    assert "pip install 'specdec_kernels[report]'" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 256, 512])
@pytest.mark.parametrize("cached", [500, 4000 * 32])
def test_a_pass_costs_what_was_fitted_on_an_h100(tokens: int, cached: int) -> None:
    """The published fit of Llama-3.1-8B in vLLM: ms, µs per token, ns per cached token."""
    fitted = 5.886e-3 + 21.0e-6 * tokens + 39.3e-9 * cached
    assert pass_seconds(H100, LLAMA_8B, tokens, cached) == pytest.approx(fitted, rel=0.05)


@pytest.mark.parametrize(
    ("nodes", "kept", "batch", "context", "published"),
    [
        (4, 2.4, 1, 500, 1.83), (4, 2.4, 32, 500, 1.61), (4, 2.4, 128, 4000, 1.79),
        (6, 3.0, 1, 500, 2.28), (6, 3.0, 32, 500, 1.81), (6, 3.0, 128, 4000, 1.97),
    ],
)  # fmt: skip
def test_speedups_follow_from_the_fit(
    nodes: int, kept: float, batch: int, context: int, published: float
) -> None:
    """EAGLE-3 with a draft pass of 2.14 ms, by the formula from the same fit."""
    options = {"batch": batch, "context": context, "draft_seconds": 2.14e-3}
    ratio, size = speedup(H100, LLAMA_8B, {nodes: kept}, **options)
    assert size == nodes and ratio == pytest.approx(published, rel=0.05)


def test_where_trees_do_not_pay_the_model_decodes_plainly() -> None:
    assert speedup(H100, LLAMA_8B, {64: 1.5}, batch=256, context=500) == (1.0, 1)
    both: dict[int, Any] = {8: 2.0, 32: 2.2}
    assert speedup(H100, LLAMA_8B, both, batch=1, context=500)[1] == 32
    assert speedup(H100, LLAMA_8B, both, batch=32, context=500)[1] == 8
