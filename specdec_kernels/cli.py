"""The `specdec` command: generate text, measure, show what runs here.

Modules that import torch or transformers are imported inside the commands that need them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

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
from .output import check_out, progress_bar, publish, status

if TYPE_CHECKING:
    from .hf.text import TextModel

app = typer.Typer(
    help="Speculative decoding with fused kernels: generate text, measure, show what runs here.",
    add_completion=False,
    no_args_is_help=True,
)
bench_app = typer.Typer(help="Measure operators or whole generations.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Model = Annotated[str, typer.Option(help='"smollm2", a folder, or an id on the HuggingFace hub.')]
Dtype = Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Type of the weights.")]
DrafterName = Annotated[
    str,
    typer.Option(
        "--drafter",
        help="Who drafts: auto, suffix, token_recycling, prompt_lookup, draft, early-exit, heads; "
        '"none" decodes plainly.',
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
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus; 1 is off.")] = 1.0,
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
    subject = _load(model, dtype, threads)
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
    subject = _load(model, dtype, threads)

    from .budget import save_cost
    from .hf.cost import cost_key, measure_cost
    from .tables import cost_table

    with progress_bar("measuring", repeats + 1) as step:
        curve = measure_cost(subject.model, repeats=repeats, progress=step)
    path = save_cost(cost_key(subject.model), curve, output)
    Console(highlight=False).print(cost_table(curve.nodes, curve.seconds))
    typer.echo(f"written to {path}", err=True)


@bench_app.command()
def e2e(
    model: Model = "smollm2",
    prompts: Annotated[
        Path | None, typer.Option(help="Spec-Bench JSON lines; the package's own if not given.")
    ] = None,
    categories: Annotated[
        list[str] | None, typer.Option("--category", help="Only this category; repeatable.")
    ] = None,
    limit_per_category: Annotated[
        int | None, typer.Option(min=1, help="At most this many prompts of each, evenly spread.")
    ] = None,
    modes: Annotated[
        str,
        typer.Option(
            help="Comma-separated; also plain, this package without drafter, and static, generate "
            "with a compiled static cache."
        ),
    ] = "generate,prompt_lookup,specdec",
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
    batch: Annotated[int, typer.Option(min=1, help="Prompts of one call.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of sampling.")] = 1.0,
    compile_steps: Annotated[
        bool, typer.Option("--compile", help="Run this package's steps under torch.compile.")
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
    dtype: Dtype = "bf16",
    threads: Threads = None,
    out: JsonOut = None,
) -> None:
    """Time generation prompt by prompt: plain, HuggingFace's prompt lookup, and specdec."""
    check_out(out)
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

    from .bench.e2e import read_prompts, run_e2e, select_prompts
    from .bench.ways import Decoding, check_modes
    from .tables import e2e_table

    chosen_modes = list(dict.fromkeys(modes.split(",")))
    check_modes(chosen_modes)
    decoding = Decoding(batch, temperature, top_p, compile_steps)
    decoding.check(chosen_modes)
    chosen = select_prompts(
        read_prompts(prompts), categories=categories or (), limit=limit_per_category
    )
    subject = _load(model, dtype, threads)
    drafter = options.make(subject)
    with progress_bar("measuring", len(chosen) * len(chosen_modes)) as step:
        record = run_e2e(
            subject,
            chosen,
            modes=chosen_modes,
            drafter=drafter,
            budget=None if budget else False,
            decoding=decoding,
            max_new_tokens=max_new_tokens,
            progress=lambda prompt, mode: step(f"{prompt.category} {prompt.question_id} {mode}"),
        )
    publish(record, out, e2e_table(record))


@bench_app.command()
def gpu(
    names: Annotated[
        list[str] | None, typer.Option("--op", help="Only this operator; repeatable.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, short repeats.")] = False,
    out: JsonOut = None,
) -> int:
    """Check and time the CUDA and Triton kernels on the GPU here, beside its roofline and others.

    Fails if a result was wrong.
    """
    check_out(out)

    from .bench.gpu import gpu_cases, run_gpu
    from .tables import gpu_table

    with progress_bar("measuring", len(list(gpu_cases(names, quick)))) as step:
        record = run_gpu(names, quick=quick, progress=step)
    publish(record, out, gpu_table(record))
    return 1 if record["failures"] else 0


@bench_app.command()
def ops(
    names: Annotated[
        list[str] | None, typer.Option("--op", help="Only this operator; repeatable.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Instead of the automatic choice.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, short repeats.")] = False,
    out: JsonOut = None,
) -> None:
    """Time each operator beside what a HuggingFace user runs instead, and the machine's limit."""
    check_out(out)

    from .bench.cases import CASES
    from .bench.ops import run_ops
    from .tables import ops_table

    cases = [c for c in CASES if (not names or c.op in names) and (c.is_quick or not quick)]
    with progress_bar("measuring", sum(len(case.baselines) for case in cases)) as step:
        record = run_ops(
            names,
            backend=backend,
            quick=quick,
            progress=lambda row: step(f"{row['op']} {row['case']}"),
        )
    publish(record, out, ops_table(record["rows"]))


@bench_app.command()
def overhead(
    model: Model = "smollm2",
    drafter_name: DrafterName = "auto",
    texts: Annotated[int, typer.Option(min=2, help="Random texts.")] = 12,
    max_new_tokens: MaxNewTokens = 128,
    dtype: Dtype = "bf16",
    threads: Threads = None,
    out: JsonOut = None,
) -> None:
    """Time what speculation costs on random tokens, which no drafter can predict."""
    check_out(out)
    options = DrafterOptions(drafter_name)
    options.check()

    from .bench.overhead import run_overhead
    from .tables import overhead_table

    subject = _load(model, dtype, threads)
    with progress_bar("measuring", 3 * texts) as step:
        record = run_overhead(
            subject,
            num_texts=texts,
            drafter=options.make(subject),
            max_new_tokens=max_new_tokens,
            progress=step,
        )
    publish(record, out, overhead_table(record["rows"]))


@bench_app.command()
def rules(
    model: Model = "smollm2",
    prompts: Annotated[
        Path | None, typer.Option(help="Spec-Bench JSON lines; the package's own if not given.")
    ] = None,
    limit_per_category: Annotated[
        int | None, typer.Option(min=1, help="At most this many prompts of each, evenly spread.")
    ] = None,
    contexts: Annotated[int, typer.Option(min=2, help="Contexts, 50 after each prompt.")] = 600,
    dtype: Dtype = "bf16",
    threads: Threads = None,
    out: JsonOut = None,
) -> None:
    """Count the draft tokens that each acceptance rule keeps, on the same contexts of a model."""
    check_out(out)

    from .bench.e2e import read_prompts, select_prompts
    from .bench.rules import run_rules
    from .tables import rules_table

    chosen = select_prompts(read_prompts(prompts), categories=(), limit=limit_per_category)
    subject = _load(model, dtype, threads)
    with progress_bar("measuring", contexts) as step:
        record = run_rules(subject, chosen, num_contexts=contexts, progress=step)
    publish(record, out, rules_table(record["rows"]))


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


def _load(model: str, dtype: str, threads: int | None) -> TextModel:
    with status(f"loading {model}"):
        import torch

        from .hf.text import TextModel, silence_transformers

        if threads is not None:
            torch.set_num_threads(threads)
        silence_transformers()
        return TextModel(model, dtype=dtype)
