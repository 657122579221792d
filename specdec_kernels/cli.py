"""The `specdec` command: generate text, measure, show what runs here.

Modules that import torch or transformers are imported inside the commands that need them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .cli_bench import bench_app
from .cli_options import (
    DrafterName,
    Dtype,
    HasBudget,
    MaxNewTokens,
    MaxNodes,
    Model,
    Temperature,
    Threads,
    TopP,
    load_subject,
)
from .drafter_options import (
    Depth,
    DrafterOptions,
    DraftModelName,
    DraftTemperature,
    ExitLayer,
    HeadsFolder,
    Siblings,
    Tree,
    Width,
)
from .output import check_out, progress_bar, status

app = typer.Typer(
    help="Speculative decoding with fused kernels: generate text, measure, show what runs here.",
    add_completion=False,
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; its exit code. A user's mistake is one line on stderr."""
    try:
        code = app(arguments, prog_name="specdec", standalone_mode=False)
    except typer.TyperException as error:
        return _fail(error.format_message() or "no command given; see specdec --help", 2)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        return _fail(str(error), 1)
    return code if isinstance(code, int) else 0


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    models: Annotated[
        bool, typer.Option("--models", help="The architectures instead: exact, or why refused.")
    ] = False,
) -> None:
    """Show which operator runs on which backend here, versions and the machine."""
    if models:
        from .hf.architectures import support_rows
        from .tables import models_table

        rows = support_rows()
        if as_json:
            print(json.dumps(dict(rows)))
        else:
            Console(highlight=False).print(models_table(rows))
        return
    import importlib.util
    from importlib import metadata

    from . import __version__, available
    from .bench.machine import describe_machine
    from .registry import NATIVE_LIBRARY, built_with_cuda

    machine = describe_machine()
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else None
    versions = {**machine.pop("versions"), "triton": triton, "specdec_kernels": __version__}
    is_built = NATIVE_LIBRARY.exists()
    machine["native_library"] = "built" if is_built else "not built; run: pip install ."
    machine["cuda_kernels"] = "built" if built_with_cuda() else "not built"
    report = {"versions": versions, "machine": machine, "ops": available()}
    if as_json:
        print(json.dumps(report))
        return
    from .tables import backends_table, facts_table

    out = Console(highlight=False)
    out.print(backends_table(report["ops"]))
    out.print(facts_table({**versions, **machine}))


@app.command()
def generate(
    model: Model = "smollm2",
    prompt: Annotated[str | None, typer.Option(help="A raw text to continue.")] = None,
    chat: Annotated[str | None, typer.Option(help="A message, put in the chat template.")] = None,
    drafter_name: DrafterName = "auto",
    max_nodes: MaxNodes = None,
    draft_model: DraftModelName = None,
    exit_layer: ExitLayer = None,
    heads: HeadsFolder = None,
    tree: Tree = "top-k",
    depth: Depth = None,
    width: Width = None,
    siblings: Siblings = "distinct",
    draft_temperature: DraftTemperature = None,
    budget: HasBudget = True,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest; 0 is off.")] = 0,
    top_p: TopP = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of sampled text.")] = 0,
    dtype: Dtype = "bf16",
    threads: Threads = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also without speculation.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object only.")] = False,
) -> None:
    """Generate text, streamed as it is committed; accepted draft tokens in green."""
    text = prompt if prompt is not None else chat
    if text is None or (prompt is not None and chat is not None):
        raise typer.BadParameter("give either --prompt or --chat")
    if temperature == 0 and (top_k or top_p < 1):
        raise typer.BadParameter("--top-k and --top-p need --temperature above 0")
    options = DrafterOptions(
        drafter_name,
        max_nodes,
        draft_model,
        exit_layer,
        heads,
        tree,
        depth,
        width,
        siblings,
        draft_temperature,
    )
    options.check()
    subject = load_subject(model, dtype, threads)
    ids = subject.encode(text, is_chat=prompt is None, max_new_tokens=max_new_tokens)

    from .display import StreamingDisplay
    from .hf.trial import Trial
    from .tables import generation_lines

    trial = Trial(
        subject,
        ids,
        options.make(subject),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        budget=None if budget else False,
    )
    with status("warming up"):
        trial.warm_up(compare=compare)
    report: dict[str, Any] = {"model": model, "prompt": text}
    if as_json:
        report |= trial.run()
    else:
        with StreamingDisplay(Console(), subject.decode, trial.statistics) as display:
            report |= trial.run(display)
    with status("generating without speculation"):
        report["compare"] = trial.compare() if compare else None
    if as_json:
        print(json.dumps(report))
        return
    sys.stdout.flush()
    for line in generation_lines(report, dtype):
        typer.echo(line, err=True)


@app.command()
def tune(
    model: Model = "smollm2",
    repeats: Annotated[int, typer.Option(min=1, help="Passes timed of each size.")] = 15,
    dtype: Dtype = "bf16",
    threads: Threads = None,
    output: Annotated[
        Path | None, typer.Option(help="Add the costs to this file, not to the cache folder's.")
    ] = None,
) -> None:
    """Measure what a forward pass over n tokens costs here; draft trees are then sized by it."""
    check_out(output)
    subject = load_subject(model, dtype, threads)

    from .budget import save_cost
    from .hf.cost import cost_key, measure_cost
    from .tables import cost_table

    with progress_bar("measuring", repeats + 1) as step:
        curve = measure_cost(subject.model, repeats=repeats, progress=step)
    path = save_cost(cost_key(subject.model), curve, output)
    Console(highlight=False).print(cost_table(curve.nodes, curve.seconds))
    typer.echo(f"written to {path}", err=True)


@app.command()
def report(
    records: Annotated[
        list[Path], typer.Argument(help="Files that bench e2e, bench ops or tune wrote.")
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """Show measurements as one HTML page: speed, acceptance, costs, and a GPU what-if."""
    from .report.page import write_page
    from .report.records import read_records

    write_page(read_records(records), out)
    typer.echo(f"written to {out}", err=True)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from . import __version__

        print(f"specdec {__version__}")
        raise typer.Exit


def _fail(message: str, code: int) -> int:
    typer.echo(f"specdec: {' '.join(message.split())}", err=True)
    return code
