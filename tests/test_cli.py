"""The `specdec` command: what it prints, and one line for every mistake."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from byte_model import greedy_tokens, save_byte_model
from head_checkpoints import save_medusa
from rich.console import Console
from transformers.utils import logging

import specdec_kernels
from specdec_kernels import display, drafter_options
from specdec_kernels.cli import main
from specdec_kernels.drafters import MODEL_DRAFTERS, SHIPPED, TopKTree
from specdec_kernels.drafters.shipped import FOLDER
from specdec_kernels.hf.text import TextModel
from specdec_kernels.statistics import DecodeStats

FP32 = ["--dtype", "fp32"]
SHIPPED_EAGLE = str(FOLDER / SHIPPED["eagle"])
EXIT = ["generate", "--prompt", "a", "--drafter", "early-exit", "--exit-layer"]


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


@pytest.fixture(autouse=True)
def _transformers_stays_talkative() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def _json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_env_names_every_backend_of_every_operator(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # room for the backend that only tests have
    report = _json(["env", "--json"], capsys)
    assert report["ops"] == specdec_kernels.available()
    assert report["versions"]["specdec_kernels"] == specdec_kernels.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"].keys() == {
        "python", "torch", "triton", "transformers", "specdec_kernels"
    }  # fmt: skip
    assert {"cpu", "isa", "gpu", "native_library", "cuda_kernels"} <= report["machine"].keys()
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*report["ops"], torch.__version__))


@pytest.mark.parametrize("drafter", ["prompt_lookup", "none"])
def test_generate_writes_the_tokens_of_generate(
    folder: Path, subject: TextModel, drafter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["--prompt", "abcabc", "--drafter", drafter, "--max-new-tokens", "48"]
    report = _json(
        ["generate", "--model", str(folder), *FP32, *request, "--compare", "--json"], capsys
    )
    assert report.keys() == {"model", "prompt", "text", "tokens", "stats", "compare"}
    assert report["tokens"] == greedy_tokens(subject, "abcabc", 48)
    assert report["text"] == subject.decode(report["tokens"])
    stats, compare = report["stats"], report["compare"]
    assert stats["num_tokens"] == 48
    assert stats["tokens_per_step"] == pytest.approx(47 / stats["num_steps"])
    assert (stats["num_accepted"] > 0) == (stats["num_steps"] < 47) == (drafter != "none")
    assert compare["agrees"] and compare["divergence"] is None
    assert compare["speedup"] == pytest.approx(stats["tok_s"] / compare["tok_s"])


@pytest.mark.parametrize(
    "options",
    [
        ["--drafter", "early-exit", "--exit-layer", "1", "--no-budget"],
        ["--drafter", "early-exit", "--exit-layer", "1", "--tree", "2-1", "--siblings", "greedy"],
        [
            "--drafter",
            "draft",
            "--draft-model",
            "FOLDER",
            "--depth",
            "3",
            "--width",
            "2",
            "--no-budget",
        ],
        ["--drafter", "draft", "--draft-model", "FOLDER", "--tree", "1-1-1"],
        ["--drafter", "auto", "--draft-model", "FOLDER", "--no-budget"],
        ["--drafter", "heads", "--heads", "HEADS", "--max-nodes", "6", "--no-budget"],
        ["--drafter", "auto", "--heads", "HEADS", "--no-budget"],
    ],
)
def test_networks_draft_on_the_command_line(
    folder: Path,
    subject: TextModel,
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_medusa(tmp_path, 64, subject.model.config.vocab_size)
    places = {"FOLDER": str(folder), "HEADS": str(tmp_path)}
    request = ["--prompt", "abcabc", "--max-new-tokens", "20", "--json", "--model", str(folder)]
    report = _json(["generate", *request, *FP32, *[places.get(o, o) for o in options]], capsys)
    assert report["tokens"] == greedy_tokens(subject, "abcabc", 20)
    assert report["stats"]["num_drafted"] > 0
    assert ("FOLDER" in options) <= (report["stats"]["tokens_per_step"] > 2)


def test_help_names_the_sizes_of_top_k_trees() -> None:
    options = drafter_options.Depth, drafter_options.Width
    depth, width = (get_args(option)[1].help for option in options)
    assert depth.endswith(f"; {TopKTree().depth}.")
    least, some, most = (TopKTree(nodes).width for nodes in (4, 32, 400))
    assert some == 32 // 4 and width.endswith(f"a quarter of its nodes, from {least} to {most}.")


def test_chat_goes_through_the_template(
    folder: Path, subject: TextModel, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["--chat", "hello", "--max-new-tokens", "12", "--json"]
    report = _json(["generate", "--model", str(folder), *FP32, *request], capsys)
    assert report["tokens"] == greedy_tokens(subject, "<user>hello<model>", 12)
    assert report["tokens"] != greedy_tokens(subject, "hello", 12) and report["compare"] is None


def test_sampled_text_depends_on_the_seed_and_not_on_the_drafter(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["--prompt", "abcabc", "--max-new-tokens", "24", "--temperature", "0.7", "--json"]
    request += ["--top-k", "20", "--top-p", "0.9", "--model", str(folder), *FP32]
    first = _json(["generate", *request, "--seed", "5", "--compare"], capsys)
    again = _json(["generate", *request, "--seed", "5", "--drafter", "none"], capsys)
    other = _json(["generate", *request, "--seed", "6"], capsys)
    assert first["compare"]["agrees"]
    assert first["tokens"] == again["tokens"] != other["tokens"]


def test_piped_text_is_plain_and_alone_on_stdout(
    folder: Path, subject: TextModel, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["--prompt", "abcabc", "--max-new-tokens", "32", "--compare"]
    assert main(["generate", "--model", str(folder), *FP32, *request]) == 0
    out, err = capsys.readouterr()
    assert out == subject.decode(greedy_tokens(subject, "abcabc", 32)) + "\n"
    assert "\x1b" not in out + err
    assert re.search(r"32 tokens in \d+ steps, [\d.]+ tokens per step, \d+ of \d+ draft", err)
    assert "with speculation" in err and "agree token for token" in err


def test_characters_wait_for_their_last_byte(subject: TextModel) -> None:
    expected = "a é 漢 \N{GRINNING FACE}!"
    text = display.TokenText(subject.decode)
    pieces = [text.push([token]) for token in subject.tokenizer(expected)["input_ids"]]
    assert "".join(pieces) == expected and len(pieces) == len(expected.encode())
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    half = subject.tokenizer("é")["input_ids"][:1]
    assert text.push(half) == "" and text.finish() == "\N{REPLACEMENT CHARACTER}"


def test_spaces_survive_a_tokenizer_that_drops_the_first_one() -> None:
    text = display.TokenText(lambda tokens: "".join(f" w{t}" for t in tokens).removeprefix(" "))
    assert [text.push([token]) for token in (1, 2, 3)] == ["w1", " w2", " w3"]


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_shows_accepted_tokens_in_green(no_color: bool) -> None:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, color_system="standard", no_color=no_color, _environ={}
    )
    with display.StreamingDisplay(console, lambda tokens: "".join(map(chr, tokens))) as shown:
        shown(0, [*b"ab", *b"c\x1b"], 2)
    assert file.getvalue() == ("abc\n" if no_color else "\x1b[1;32mab\x1b[0mc\n")


def test_bench_overhead_compares_the_loop_with_generate(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--texts", "2", "--max-new-tokens", "6", "--json", "-", *FP32]
    assert main(["bench", "overhead", "--model", str(folder), *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["mode"] for row in record["rows"]] == ["generate", "specdec, no drafter", "specdec"]
    assert record["rows"][0]["slower"] == 0 and all(row["tok_s"] > 0 for row in record["rows"])
    assert record["machine"]["settings"]["drafter"] == "AutoDrafter"


def _watched(lines: int) -> str:
    """What a terminal of that height gets: two steps with statistics, then an interruption."""
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=lines, _environ={})
    stats = DecodeStats.start(1)
    with (
        suppress(KeyboardInterrupt),
        display.StreamingDisplay(console, lambda t: "".join(map(chr, t)), lambda: stats) as shown,
    ):
        for steps in (1, 2):
            stats.num_steps[0], stats.num_tokens[0] = steps, 5 * steps
            shown(0, [*b"hello"], 4)
        raise KeyboardInterrupt
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_shows_statistics_below_the_text_and_gets_its_last_line_back() -> None:
    written = _watched(lines=24)
    assert written.count("\x1b[1;23r") == 1
    assert re.search(r"\x1b\[24;1H\x1b\[K\x1b\[2m5 tokens, \S+ tok/s, 5\.00 per step", written)
    assert re.search(r"\x1b\[24;1H\x1b\[K\x1b\[2m10 tokens, \S+ tok/s, 5\.00 per step", written)
    assert written.endswith("\n\x1b7\x1b[r\x1b[24;1H\x1b[K\x1b8")


def test_a_low_terminal_shows_the_text_alone() -> None:
    assert "per step" not in _watched(lines=3) and "\x1b[r" not in _watched(lines=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], r"give either --prompt or --chat"),
        (["generate", "--prompt", "a", "--chat", "b"], r"give either --prompt or --chat"),
        (["generate", "--prompt", ""], r"the prompt is empty"),
        (
            ["generate", "--prompt", "a" * 250, "--max-new-tokens", "9"],
            r"250 tokens .* 256 positions",
        ),
        (["generate", "--prompt", "a", "--max-new-tokens", "0"], r"--max-new-tokens"),
        (["generate", "--prompt", "a", "--max-nodes", "0"], r"--max-nodes"),
        (["generate", "--prompt", "a", "--temperature", "-0.1"], r"--temperature"),
        (["generate", "--prompt", "a", "--temperature", "nan"], r"--temperature"),
        (["generate", "--prompt", "a", "--top-p", "1.5"], r"--top-p"),
        (["generate", "--prompt", "a", "--top-k", "5"], r"--top-k and --top-p need --temperature"),
        (["generate", "--prompt", "a", "--dtype", "int8"], r"--dtype.*'int8' is not one of"),
        (["generate", "--prompt", "a", "--drafter", "psychic"], r"must be one of .* got 'psychic'"),
        (
            ["generate", "--prompt", "a", "--drafter", "none", "--max-nodes", "4"],
            r"needs a drafter",
        ),
        (["generate", "--prompt", "a", "--drafter", "draft"], r"draft needs --draft-model"),
        (
            ["generate", "--prompt", "a", "--draft-model", "b", "--heads", "c"],
            r"auto takes --heads or --draft-model, not both",
        ),
        (["generate", "--prompt", "a", "--exit-layer", "1"], r"does not take --exit-layer"),
        (["generate", "--prompt", "a", "--tree", "2-1"], r"--tree needs --drafter draft,"),
        ([*EXIT, "9"], r"exit layer must be in \[1, 1\] .*got 9"),
        ([*EXIT, "1", "--tree", "2-x"], r"--tree must be .* got '2-x'"),
        ([*EXIT, "1", "--tree", "2-1", "--depth", "3"], r"--depth and --width need --tree top-k"),
        ([*EXIT, "1", "--siblings", "greedy"], r"need a sampled --tree"),
        (
            ["generate", "--prompt", "a", "--drafter", "heads", "--heads", "/absent"],
            r"/absent: no such folder",
        ),
        (
            ["generate", "--prompt", "a", "--drafter", "mlp", "--heads", "/absent"],
            r"/absent: no such folder",
        ),
        (["generate", "--prompt", "a", "--heads", "/absent"], r"/absent: no such folder"),
        (
            ["generate", "--prompt", "a", "--drafter", "suffix", "--heads", "/absent"],
            r"--drafter suffix does not take --heads",
        ),
        (["generate", "--prompt", "a", "--drafter", "medusa"], r"medusa needs --heads"),
        (["generate", "--prompt", "a", "--drafter", "streaming"], r"streaming needs --heads"),
        (
            ["generate", "--prompt", "a", "--drafter", "medusa", "--heads", SHIPPED_EAGLE],
            r"--drafter medusa needs MedusaHeads, found Eagle3Head",
        ),
        (
            ["generate", "--prompt", "a", "--drafter", "eagle"],
            r"weights/smollm2-135m-instruct-eagle: these heads are for a hidden size of 576",
        ),
        (["generate", "--prompt", "a", "--model", "/absent"], r"cannot load '/absent'"),
        (["generate", "--prompt", "a", "--bogus"], r"No such option: --bogus"),
        (["bench", "e2e", "--modes", "generate,magic"], r"modes must be among .* got 'magic'"),
        (["bench", "e2e", "--modes", "specdec"], r"modes must include 'generate'"),
        (["bench", "e2e", "--prompts", "/absent.jsonl"], r"No such file .*'/absent.jsonl'"),
        (["bench", "e2e", "--category", "poetry"], r"category must be one of .* got 'poetry'"),
        (["bench", "e2e", "--json", "/"], r"--json must be a file, got the folder /"),
        (["bench", "ops", "--op", "attention"], r"unknown operator 'attention'"),
        (["bench", "ops", "--backend", "tpu"], r"backend 'tpu' cannot run"),
        (["bench", "rules", "--drafter", "suffix"], r"must have a network: .* got 'suffix'"),
        (["bench", "rules", "--tree", "4-0"], r"children by depth like 4-2-1-1, got '4-0'"),
        (["bench", "rules", "--temperatures", "1,0"], r"--temperatures must be .* got '1,0'"),
        (["serve"], r"No such command 'serve'"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "generate" and "--model" not in arguments:
        arguments = [*arguments, "--model", str(folder)]
    assert main(arguments) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.match(rf"specdec: .*{message}", err)


def test_a_model_without_chat_template_still_continues_texts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    request = ["--model", str(tmp_path), "--max-new-tokens", "2"]
    assert main(["generate", *request, "--chat", "a"]) == 1
    assert capsys.readouterr().err.endswith("has no chat template; give it a raw prompt instead\n")
    assert main(["generate", *request, "--prompt", "a"]) == 0


def test_ops_puts_the_record_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--op", "tree_mask", "--quick", "--backend", "reference", "--json", "-"]
    assert main(["bench", "ops", *options]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert {row["op"] for row in record["rows"]} == {"tree_mask"} and record["machine"]
    assert "tree_mask" in err and "ratio" in err


def test_options_name_the_drafters_that_have_trees() -> None:
    assert set(drafter_options._HAVE_TREES) == {*MODEL_DRAFTERS, *SHIPPED}
