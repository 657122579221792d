"""Options that several commands take, and the model that they name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .output import status

if TYPE_CHECKING:
    from .hf.text import TextModel

Model = Annotated[str, typer.Option(help='"smollm2", a folder, or an id on the HuggingFace hub.')]
Dtype = Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Type of the weights.")]
DrafterName = Annotated[
    str,
    typer.Option(
        "--drafter",
        help="Who drafts: auto, suffix, token_recycling, prompt_lookup, eagle, mlp, medusa, "
        'streaming, heads, draft, early-exit; "none" decodes plainly.',
    ),
]
MaxNodes = Annotated[
    int | None, typer.Option(min=1, help="Most nodes of a draft tree, root included.")
]
HasBudget = Annotated[
    bool, typer.Option("--budget/--no-budget", help="Size trees by cost, or fill them all.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given.")]
JsonOut = Annotated[
    Path | None, typer.Option("--json", help='Write the record to this file, "-" for stdout.')
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus; 1 is off.")]
Prompts = Annotated[
    Path | None, typer.Option(help="Spec-Bench JSON lines; the package's own if not given.")
]
LimitPerCategory = Annotated[
    int | None, typer.Option(min=1, help="At most this many prompts of each, evenly spread.")
]
OpNames = Annotated[list[str] | None, typer.Option("--op", help="Only this operator; repeatable.")]
IsQuick = Annotated[bool, typer.Option("--quick", help="Small sizes, short repeats.")]


def temperatures_of(text: str) -> tuple[float, ...]:
    """Comma-separated temperatures.

    Raises:
        typer.BadParameter: something else, or one that samples nothing.
    """
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < math.inf for value in values):
        raise typer.BadParameter(f"--temperatures must be numbers above 0, got {text!r}")
    return values


def load_subject(model: str, dtype: str, threads: int | None) -> TextModel:
    """The model that a command measures, or writes with."""
    with status(f"loading {model}"):
        import torch

        from .hf.text import TextModel, silence_transformers

        if threads is not None:
            torch.set_num_threads(threads)
        silence_transformers()
        return TextModel(model, dtype=dtype)
