"""The examples of the README and of the guide run as they stand, and what pages name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)


def test_the_first_example_generates(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    text, speed = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert len(text) > 20
    assert float(speed.split()[0]) >= 1.0 and speed.endswith("tokens per forward pass")


def test_the_drafter_of_the_second_example_drafts(tiny_model) -> None:
    from prompts import greedy, left_pad, random_prompts

    from specdec_kernels import SpeculativeDecoder

    names: dict = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    (row,) = random_prompts((12,), 101)
    decoder = SpeculativeDecoder(names["RepeatLast"]())
    output = tiny_model.generate(**left_pad([row]), max_new_tokens=20, custom_generate=decoder)
    assert output[0].tolist() == greedy(tiny_model, row, 20)
    assert sum(decoder.stats.num_drafted) > 20


def test_the_guide_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "docs" / "generation.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    names: dict = {}
    printed = []
    for block in blocks:
        exec(compile(block, "generation.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert "three, four, five, six" in printed[0]
    assert "Friday, Saturday" in printed[1] and "Sunday" not in printed[1]
    model, longer = names["model"], names["longer"]
    whole = names["specdec_kernels"].generate(model, longer, max_new_tokens=8, do_sample=False)
    assert names["second"].tolist() == whole.tolist()
    assert len(blocks) == 4 and issubclass(names["NoRepeat"], names["LogitsProcessor"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        headings = (
            re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.MULTILINE) if anchor else []
        )
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings]


def test_pages_name_commands_and_options_that_there_are() -> None:
    from typer.main import get_command

    from specdec_kernels.cli import app

    commands = [
        (page.name, line)
        for page in PAGES
        for line in re.findall(
            r"specdec ((?:bench|env|generate|report|tune)\b[^`#\n]*)", page.read_text("utf-8")
        )
    ]
    assert len(commands) > 15
    for page, line in commands:
        command = get_command(app)
        words = line.split()
        while words and getattr(command, "commands", None):
            command = command.commands[words.pop(0)]
        known = {
            name for option in command.params for name in (*option.opts, *option.secondary_opts)
        }
        assert {word for word in words if word.startswith("--")} <= known, f"{page}: {line}"
