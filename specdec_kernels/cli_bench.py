"""`specdec bench`: measure operators and whole generations.

Modules that import torch or transformers are imported inside the commands that need them.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .cli_options import (
    DrafterName,
    Dtype,
    HasBudget,
    IsQuick,
    JsonOut,
    LimitPerCategory,
    MaxNewTokens,
    MaxNodes,
    Model,
    OpNames,
    Prompts,
    Temperature,
    Threads,
    TopP,
    load_subject,
    temperatures_of,
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
    widths_of,
)
from .output import check_out, progress_bar, publish

bench_app = typer.Typer(help="Measure operators or whole generations.", no_args_is_help=True)


@bench_app.command()
def e2e(
    model: Model = "smollm2",
    prompts: Prompts = None,
    categories: Annotated[
        list[str] | None, typer.Option("--category", help="Only this category; repeatable.")
    ] = None,
    limit_per_category: LimitPerCategory = None,
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
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
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
    subject = load_subject(model, dtype, threads)
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
    names: OpNames = None,
    quick: IsQuick = False,
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
    names: OpNames = None,
    backend: Annotated[str | None, typer.Option(help="Instead of the automatic choice.")] = None,
    quick: IsQuick = False,
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
    publish(record, out, ops_table(record))


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

    subject = load_subject(model, dtype, threads)
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
    prompts: Prompts = None,
    limit_per_category: LimitPerCategory = None,
    contexts: Annotated[int, typer.Option(min=2, help="Contexts, 50 after each prompt.")] = 600,
    drafter_name: Annotated[
        str | None,
        typer.Option(
            "--drafter", help="A network that drafts, as for generate; the target's own if none."
        ),
    ] = None,
    draft_model: DraftModelName = None,
    exit_layer: ExitLayer = None,
    heads: HeadsFolder = None,
    tree: Annotated[
        str, typer.Option(help="Children by depth, sampled; 1-1-1-1 is a chain.")
    ] = "4-2-1-1",
    temperatures: Annotated[
        str, typer.Option(help="Comma-separated; of target and draft alike.")
    ] = "1.0,0.6",
    dtype: Dtype = "bf16",
    threads: Threads = None,
    out: JsonOut = None,
) -> None:
    """Count the draft tokens that each acceptance rule keeps, on the same contexts of a model."""
    check_out(out)
    options = None
    if drafter_name is not None:
        options = DrafterOptions(drafter_name, None, draft_model, exit_layer, heads, tree)
        options.check_network()

    from .bench.draft_laws import NetworkLaws
    from .bench.e2e import read_prompts, select_prompts
    from .bench.rules import Settings, run_rules
    from .tables import rules_table

    settings = Settings(widths_of(tree), temperatures_of(temperatures))
    chosen = select_prompts(read_prompts(prompts), categories=(), limit=limit_per_category)
    subject = load_subject(model, dtype, threads)
    laws = None
    if options is not None:
        laws = NetworkLaws(options.name, options.network(subject))
    with progress_bar("measuring", contexts) as step:
        record = run_rules(
            subject, chosen, num_contexts=contexts, settings=settings, laws=laws, progress=step
        )
    publish(record, out, rules_table(record["rows"]))
