"""The end-to-end bench: prompts, the order of the modes, the record, and texts that part."""

from __future__ import annotations

import io
import json
import re
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import POSITIONS, greedy_tokens, save_byte_model
from rich.console import Console

from specdec_kernels.bench.e2e import Prompt, read_prompts, run_e2e, select_prompts
from specdec_kernels.bench.example import Witness
from specdec_kernels.bench.ways import MODES, Decoding, ways
from specdec_kernels.cli import main
from specdec_kernels.drafters import Drafter, PromptLookupDrafter
from specdec_kernels.drafters.base import Verified
from specdec_kernels.hf.text import TextModel
from specdec_kernels.tables import e2e_table
from specdec_kernels.tree import TokenTree

FP32 = ["--dtype", "fp32"]
EAGER = [mode for mode in MODES if mode != "static"]
MALFORMED = {
    "not json": r"2: not JSON: .* at column 1",
    "[1]": r"2: must be a JSON object, got list",
    '{"category": "qa", "turns": ["a"]}': r"2: question_id must be a number or a string",
    '{"question_id": 1, "category": 7, "turns": ["a"]}': r"2: category must be a name, got 7",
    '{"question_id": 1, "category": "qa", "turns": []}': r"2: turns must be a list",
    '{"question_id": 1, "category": "qa", "turns": "abc"}': r"2: turns must be a list",
    '{"question_id": 1, "category": "qa", "turns": [""]}': r"2: turns must be a list",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that soon repeats itself."""
    path = tmp_path_factory.mktemp("model")
    save_byte_model(path)
    return path


@pytest.fixture(scope="module")
def subject(folder: Path) -> TextModel:
    """The same model through the API."""
    return TextModel(str(folder), dtype="fp32")


def test_a_divergence_is_where_the_texts_part_and_how_much_the_target_cares(
    subject: TextModel,
) -> None:
    ids = subject.encode("abc", is_chat=False, max_new_tokens=12)
    tokens = greedy_tokens(subject, "abc", 12)
    with torch.no_grad():
        logits = subject.model(torch.cat([ids, torch.tensor([tokens[:7]])], 1)).logits[0, -1]
    wrong = int(logits.topk(9).indices[-1])
    found = subject.divergence(ids, [*tokens[:7], wrong, *tokens[8:]], tokens)
    assert found is not None and found.index == 7
    assert found.gap == pytest.approx(float(logits.max() - logits[wrong]), abs=1e-4)
    assert subject.divergence(ids, tokens, [*tokens[:7], wrong, *tokens[8:]]) == found
    shorter = subject.divergence(ids, tokens[:5], tokens)
    assert shorter is not None and (shorter.index, shorter.gap) == (5, None)
    assert subject.divergence(ids, tokens, tokens) is None


def _write_prompts(path: Path) -> Path:
    entries = [("writing", 1), ("qa", 2), ("coding", 3), ("qa", 4)]
    lines = [
        json.dumps({"question_id": number, "category": category, "turns": ["abcabc" * number, "x"]})
        for category, number in entries
    ]
    path.write_text("\n".join(lines) + "\n\n")
    return path


def test_e2e_records_every_mode_category_and_prompt(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = _write_prompts(tmp_path / "prompts.jsonl")
    out = tmp_path / "new" / "folder" / "e2e.json"
    arguments = ["--model", str(folder), *FP32, "--prompts", str(prompts), "--max-new-tokens", "20"]
    arguments += ["--drafter", "auto", "--no-budget", "--modes", ",".join(EAGER)]
    assert main(["bench", "e2e", *arguments, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["e2e.json"]
    record = json.loads(out.read_text())
    assert record.keys() == {"machine", "summary", "prompts", "statistics", "example"}
    assert record["statistics"]["num_calls"] == 4  # the warm-up is not among them
    assert record["statistics"]["tokens_per_step"] > 1
    tree = record["example"]
    assert len(tree["path"]) > 1 and tree["path"][0] == 0 and tree["parents"][0] == -1
    assert all(tree["parents"][b] == a for a, b in pairwise(tree["path"]))
    assert record["machine"]["settings"]["max_new_tokens"] == 20
    assert list(record["summary"]) == EAGER
    for mode, by_category in record["summary"].items():
        assert mode in shown
        assert by_category.keys() == {"all", "mt_bench", "qa"}, "MT-Bench's categories are one"
        for row in by_category.values():
            assert row.keys() == {
                "tok_s", "speedup", "tokens_per_step", "mean_tokens_per_step", "agreement"
            }  # fmt: skip
            assert row["agreement"] == 1.0 and row["tok_s"] > 0
    hf, plain, ours = (record["summary"][m]["all"] for m in ("generate", "plain", "specdec"))
    assert hf["speedup"] == 1.0 < ours["tokens_per_step"]
    assert hf["tokens_per_step"] == plain["tokens_per_step"] == 1.0
    steps = [19 / p["modes"]["specdec"]["tokens_per_step"] for p in record["prompts"]]
    assert ours["mean_tokens_per_step"] == pytest.approx(19 * 4 / sum(steps))
    assert [p["question_id"] for p in record["prompts"]] == [1, 3, 2, 4]
    for prompt in record["prompts"]:
        assert prompt["modes"].keys() == set(EAGER)
        speeds = {mode: result["tok_s"] for mode, result in prompt["modes"].items()}
        ratio = speeds["specdec"] / speeds["generate"]
        assert prompt["modes"]["specdec"]["speedup"] == pytest.approx(ratio)


def test_another_mode_goes_first_at_each_prompt(subject: TextModel) -> None:
    prompts = [Prompt(number, "qa", "abc") for number in range(4)]
    order: list[tuple[Any, str]] = []
    run_e2e(
        subject,
        prompts,
        modes=EAGER,
        drafter=PromptLookupDrafter(),
        max_new_tokens=2,
        progress=lambda prompt, mode: order.append((prompt.question_id, mode)),
    )
    assert order[::4] == list(enumerate(EAGER)) and len(set(order)) == 16


def test_e2e_reports_texts_that_part(subject: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = subject.generate_batch

    def wrong(rows: list[torch.Tensor], **options: Any) -> Any:
        runs = generate(rows, **options)
        if "custom_generate" in options:
            runs[0].tokens[3] = (runs[0].tokens[3] + 1) % 200
        return runs

    monkeypatch.setattr(subject, "generate_batch", wrong)
    prompts = [Prompt(1, "qa", "abc")]
    record = run_e2e(subject, prompts, drafter=PromptLookupDrafter(), max_new_tokens=6)
    assert record["summary"]["specdec"]["all"]["agreement"] == 0.0
    divergence = record["prompts"][0]["modes"]["specdec"]["divergence"]
    assert divergence["index"] == 3 and divergence["gap"] > 0
    console = Console(file=io.StringIO(), width=100)
    console.print(e2e_table(record))
    shown = " ".join(console.file.getvalue().split())  # the line may be broken
    assert f"specdec {divergence['gap']:.3g}" in shown


def test_batches_are_of_one_category_and_their_rows_end_on_their_own(subject: TextModel) -> None:
    prompts = [Prompt(i, "qa" if i < 5 else "rag", "abc" * (1 + i % 3)) for i in range(7)]
    chats = [subject.encode(p.text, is_chat=True, max_new_tokens=12) for p in prompts]
    alone = [subject.generate(c, do_sample=False, max_new_tokens=12).tokens for c in chats]
    shown: list[Any] = []
    end = alone[1][2]
    subject.model.generation_config.eos_token_id = end
    try:
        record, one_by_one = (
            run_e2e(
                subject,
                prompts,
                modes=("generate", "specdec"),
                drafter=PromptLookupDrafter(),
                decoding=Decoding(batch),
                max_new_tokens=12,
                progress=progress,
            )
            for batch, progress in (
                (3, lambda prompt, _: shown.append(prompt.question_id)),
                (1, None),
            )
        )
    finally:
        subject.model.generation_config.eos_token_id = None
    assert sorted(set(shown)) == [0, 3, 5], "three, two and two prompts"
    lengths = [row["modes"]["specdec"]["new_tokens"] for row in record["prompts"]]
    ends = [tokens.index(end) + 1 if end in tokens else 12 for tokens in alone]
    assert lengths == ends and len(set(lengths)) > 1
    assert record["summary"]["specdec"]["all"]["agreement"] == 1.0
    for own, other in zip(record["prompts"], one_by_one["prompts"], strict=True):
        for mode in ("generate", "specdec"):
            steps = own["modes"][mode]["tokens_per_step"]
            assert steps == other["modes"][mode]["tokens_per_step"], "a row counts its own steps"
    seconds = [row["modes"]["generate"]["seconds"] for row in record["prompts"]]
    assert seconds[0] == seconds[1] == seconds[2] != seconds[3] == seconds[4] != seconds[5]


def test_sampled_texts_follow_the_law_and_are_not_compared(subject: TextModel) -> None:
    prompts = [Prompt(1, "qa", "abc")]
    record = run_e2e(
        subject,
        prompts,
        modes=EAGER,
        drafter=PromptLookupDrafter(),
        decoding=Decoding(temperature=0.8, top_p=0.95),
        max_new_tokens=12,
    )
    assert record["machine"]["settings"]["top_p"] == 0.95
    for mode in EAGER:
        assert record["summary"][mode]["all"]["agreement"] is None
    gaps = [row["divergence"] for row in record["prompts"][0]["modes"].values()]
    assert any(gap is not None for gap in gaps), "other draws"
    assert all(gap is None or gap["gap"] is None for gap in gaps)
    console = Console(file=io.StringIO(), width=100)
    console.print(e2e_table(record))
    assert "%" not in console.file.getvalue()


def test_compiled_ways_write_the_same_texts(subject: TextModel) -> None:
    prompts = [Prompt(1, "qa", "abc"), Prompt(2, "qa", "abcabcab")]
    record = run_e2e(
        subject,
        prompts,
        modes=("generate", "static", "specdec"),
        drafter=PromptLookupDrafter(max_nodes=4),
        decoding=Decoding(compile="eager"),
        max_new_tokens=10,
    )
    assert all(row["all"]["agreement"] == 1.0 for row in record["summary"].values())


def test_all_ways_decode_by_the_same_law_and_compile_by_the_same_backend() -> None:
    options = ways(MODES, PromptLookupDrafter(), False, Decoding(1, 0.8, 0.95, compile="eager"))
    law = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
    assert list(options) == list(MODES)
    assert all(given.items() >= law.items() for given in options.values())
    assert options["static"]["compile_config"].backend == "eager"
    for mode in ("plain", "specdec"):
        assert options[mode]["custom_generate"].compile == "eager"
    greedy = ways(MODES, None, False, Decoding())
    assert all(not given["do_sample"] and "temperature" not in given for given in greedy.values())
    assert greedy["specdec"]["custom_generate"].compile is False


def test_a_nucleus_without_temperature_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "e2e", "--top-p", "0.9"]) == 1
    assert "top_p needs a temperature above 0, got top_p 0.9" in capsys.readouterr().err


def test_prompt_lookup_of_transformers_takes_no_batch(subject: TextModel) -> None:
    with pytest.raises(ValueError, match=r"takes one prompt at a time in transformers, got .* 2;"):
        run_e2e(
            subject, [Prompt(1, "qa", "abc")], drafter=None, decoding=Decoding(2), max_new_tokens=3
        )


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_timed(subject: TextModel) -> None:
    prompts = [Prompt(1, "qa", "abc"), Prompt(77, "qa", "a" * POSITIONS)]
    with pytest.raises(ValueError, match=r"^question 77: a prompt of .* positions"):
        run_e2e(subject, prompts, drafter=None, max_new_tokens=6)


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_prompt_is_named_by_its_line(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question_id": 1, "category": "qa", "turns": ["a"]}\n' + line + "\n")
    assert main(["bench", "e2e", "--prompts", str(path)]) == 1
    err = capsys.readouterr().err
    assert re.match(rf"specdec: {re.escape(str(path))}:{MALFORMED[line]}", err)
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_prompts_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: (no prompts|not UTF-8)"):
        read_prompts(path)


def test_a_limit_spreads_over_each_category() -> None:
    prompts = [Prompt(i, "qa" if i % 2 else "rag", "x") for i in range(20)]
    chosen = select_prompts(prompts, categories=["qa"], limit=5)
    assert [p.question_id for p in chosen] == [1, 5, 9, 13, 17]
    assert len(select_prompts(prompts, limit=50)) == 20
    assert {p.category for p in read_prompts()} > {"mt_bench", "qa"}


def test_the_witness_of_the_drawn_step_hands_every_call_on() -> None:
    calls: list[str] = []

    class Recording(Drafter):
        max_nodes, wants_budget = 9, True

        def attach(self, target: object) -> AbstractContextManager[object]:
            calls.append("attach")
            return nullcontext()

        def begin(self, batch: int) -> None:
            calls.append("begin")

        def propose(self, context: object) -> Any:
            calls.append("propose")
            return "its proposal"

        def observe(self, verified: Verified) -> None:
            calls.append("observe")

        def end(self, sequences: object, num_prompt: object) -> None:
            calls.append("end")

    witness: Any = Witness(Recording())
    assert (witness.max_nodes, witness.wants_budget, str(witness)) == (9, True, "Recording")
    tree = TokenTree.from_rows([([4, 5, 6, 7, 8, 9], [-1, 0, 0, 1, 1, 2])])
    with witness.attach(None):
        witness.begin(1)
        assert witness.propose(None) == "its proposal"
        for path in ([0, 2], [0, 1, 3], [0]):
            witness.observe(Verified(tree, torch.zeros(1, 6, 9), [path], [[4]]))
        for size in (9, 20):  # a chain, and what no picture has room for
            parents = [-1, 0, 0, 0, *range(3, size - 1)] if size == 20 else [*range(-1, size - 1)]
            large = TokenTree.from_rows([([4] * size, parents)])
            witness.observe(Verified(large, torch.zeros(1, size, 9), [[0, 3, 4, 5, 6]], [[4]]))
        witness.end([[4]], [1])
    assert calls == ["attach", "begin", "propose", *["observe"] * 5, "end"]
    assert witness.example(str) == {
        "tokens": ["[4]", "[5]", "[6]", "[7]", "[8]", "[9]"],
        "parents": [-1, 0, 0, 1, 1, 2],
        "path": [0, 1, 3],
    }
