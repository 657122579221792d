"""Where the command line writes: records to files or stdout, progress to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

STDOUT = Path("-")
"""The path that stands for standard output."""


def status(text: str) -> AbstractContextManager[object]:
    """A spinner on stderr, if that is a terminal."""
    return Console(stderr=True).status(text)


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, if that is a terminal; call what it yields at every step."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(text, total=total)

        def step(description: str) -> None:
            bar.update(task, advance=1, description=description)

        yield step


def check_out(out: Path | None) -> None:
    """Refuse an unusable path before measuring for minutes."""
    if out is None or out == STDOUT:
        return
    if out.is_dir():
        raise typer.BadParameter(f"--json must be a file, got the folder {out}")
    out.parent.mkdir(parents=True, exist_ok=True)


def publish(record: dict[str, Any], out: Path | None, table: Table) -> None:
    """Write the record and show its table; "-" leaves stdout to the record."""
    if out == STDOUT:
        print(json.dumps(record))
        _wide_console(stderr=True).print(table)
        return
    _wide_console(stderr=False).print(table)
    if out is not None:
        # renamed whole: a reader or an interruption never leaves half a record
        partial = out.with_name(out.name + ".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        partial.replace(out)


def _wide_console(*, stderr: bool) -> Console:
    """A terminal's own width; a file or a pipe has none, and gets enough for a whole row."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=160)
