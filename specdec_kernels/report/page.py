"""The report as one HTML page: sections for what the records hold, no file beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .drafters import Line, compare
from .records import Records
from .what_if import CARDS, EFFICIENCY, HOST_SECONDS, LLAMA_8B

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1d1f23; --dim: #5c626b; --page: #ffffff; --line: #dfe2e6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --dim: #9aa1ab; --page: #16181c; --line: #33373e; }
  .light { display: none; }
}
@media (prefers-color-scheme: light) { .dark { display: none; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 48rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p, li { max-width: 44rem; } .dim { color: var(--dim); font-size: .9rem; }
svg { width: 100%; height: auto; } svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.model { border-left: 4px solid #e69f00; padding-left: .8rem; }
"""


def make_page(records: Records) -> str:
    """The page.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        sections = [*_sections(records)]
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError(
            "report: needs matplotlib: pip install 'specdec_kernels[report]'"
        ) from None
    body = "\n".join(f"<h2>{escape(title)}</h2>\n{content}" for title, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>specdec_kernels: measurements</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>specdec_kernels: measurements</h1>\n{_origin(records)}\n"
        f"{body}\n</body></html>\n"
    )


def write_page(records: Records, path: Path) -> None:
    """Write the page, whole or not at all."""
    text = make_page(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def _origin(records: Records) -> str:
    """Machine, versions and commit of the records, and how fast each found the machine."""
    runs: dict[str, list[str]] = {}
    for machine in (r["machine"] for r in (*records.e2e, *records.ops)):
        found = f"{machine['bandwidth_gbs']:.1f} GB/s, {machine['bf16_gflops']:.0f} GFLOP/s"
        runs.setdefault(_machine_line(machine), []).append(
            f"{found}, load {machine['load_average']}"
        )
    lines = [
        f"{line}. Read and multiplied bfloat16 at {'; '.join(dict.fromkeys(found))}."
        for line, found in runs.items()
    ]
    return "".join(f'<p class="dim">{escape(line)}</p>' for line in lines)


def _machine_line(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['isa']}; {versions}; commit {machine['commit'] or 'unknown'}"
    )


def _sections(records: Records) -> Iterator[tuple[str, str]]:
    from . import plots

    main = records.main
    if main is not None:
        settings = main["machine"]["settings"]
        title = "Speed against generate"
        yield title, plots.both_themes(plots.speedups(main), title) + _speed_note(main)
        if "statistics" in main:
            title = "What is accepted"
            yield title, plots.both_themes(plots.acceptance(main["statistics"]), title)
        if len(main.get("example", {}).get("path", ())) > 1:
            title = "One real step"
            note = (
                f"Of the steps of {settings['model']} with much to choose, the one that kept the "
                "most: the root is the last token written, the bold path is what the model kept."
            )
            drawn = plots.both_themes(plots.tree(main["example"]), title)
            yield title, f'<div class="scroll">{drawn}</div><p class="dim">{escape(note)}</p>'
        for key, curve in records.costs.items():
            title = "Cost of a forward pass"
            drawn = plots.both_themes(plots.cost_curve(curve, main["machine"]), f"{title} {key}")
            yield title, f'{drawn}<p class="dim">{escape(key)}, by specdec tune.</p>'
    lines = compare(records.e2e)
    if len({line.name for line in lines}) > 1:
        title = "Drafters compared"
        drawn = plots.both_themes(plots.tokens_by_drafter(lines), title)
        yield title, drawn + _drafters_table(lines)
    points = records.tokens_per_step()
    if len(points) > 1:
        categories = list(records.e2e[0]["summary"]["specdec"])
        curves = {name: records.tokens_per_step(name) for name in categories}
        title = "Tokens per step"
        note = "Full trees, without the budget; means over all verify steps."
        yield (
            title,
            f'{plots.both_themes(plots.tokens_by_size(curves), title)}<p class="dim">{note}</p>',
        )
    for record in records.ops:
        title = "Operators against the machine's limit"
        note = (
            "100 % is the roofline: the larger of least bytes / measured bandwidth and "
            "operations / measured matrix rate. Operands are in no cache; a call also pays its "
            "dispatch, which is most of the time of the smallest cases."
        )
        drawn = plots.both_themes(plots.shares_of_roofline(record["rows"]), title)
        yield title, f'{drawn}<p class="dim">{escape(note)}</p>{_ratios(record["rows"])}'
    if points:
        title = "GPU what-if"
        yield title, _what_if_note(points) + plots.both_themes(plots.what_if(points), title)


def _speed_note(record: dict[str, Any]) -> str:
    settings, total = record["machine"]["settings"], record["summary"]["specdec"]["all"]
    temperature, batch = settings.get("temperature"), settings.get("batch", 1)
    law = f"temperature {temperature}" if temperature else "greedy"
    note = (
        f"{settings['model']}, {settings['dtype']}, {law}, {settings['max_new_tokens']} new "
        f"tokens, batch {batch}, {len(record['prompts'])} prompts, drafter "
        f"{settings['drafter']}, trees of at most {settings['max_nodes']} nodes: "
        f"{total['tok_s']:.1f} tokens per second, {total['mean_tokens_per_step']:.2f} tokens per "
        "step."
    )
    return f'<p class="dim">{escape(note)}</p>'


def _ratios(rows: list[dict[str, Any]]) -> str:
    """Smallest, middle and largest ratio of each operator against each baseline."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        ratios.setdefault((row["op"], row["baseline"]), []).append(row["ratio"])
    cells = []
    for (op, baseline), values in ratios.items():
        low, middle, high = min(values), sorted(values)[len(values) // 2], max(values)
        shown = "".join(f"<td>{value:.1f}x</td>" for value in (low, middle, high))
        cells.append(f"<tr><td>{escape(op)} / {escape(baseline)}</td>{shown}</tr>")
    head = "<tr><th>faster than</th><th>least</th><th>median</th><th>most</th></tr>"
    return f"<table>{head}{''.join(cells)}</table>"


def _drafters_table(lines: Sequence[Line]) -> str:
    """What each drafter did; the formula stands beside what was measured."""
    head = (
        "drafter", "parameters", "tokens per step", "accepted at depth 1, 2, 3, 4",
        "drafting, of a step", "tok/s", "against generate", "against its prompt lookup",
        "by the formula",
    )  # fmt: skip
    rows = []
    for line in lines:
        lookup = line.lookup_speedup
        cells = (
            line.name,
            f"{line.num_parameters / 1e6:.1f} M" if line.num_parameters else "",
            f"{line.tokens_per_step['all']:.2f}",
            ", ".join(f"{share:.0%}" for share in line.by_depth[:4]),
            f"{line.draft_share:.0%}",
            f"{line.tok_s:.1f}",
            f"{line.speedup:.2f}x",
            "" if lookup is None else f"{line.speedup / lookup:.2f}x",
            f"{line.predicted:.2f}x",
        )
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    note = (
        "The formula: 1 + a1 + a1 a2 + ... tokens of a step whose depths are right with these "
        "probabilities whatever the text, over the measured time of a step in tokens of generate "
        "(Leviathan et al., 2211.17192, equation 1 and theorem 3.8, with the measured cost of a "
        "pass over a tree). It leaves out the prefill, and a depth counts where a tree had it: "
        "drafters that go deep only where they are sure get too much."
    )
    return (
        f'<div class="scroll"><table><tr>{titles}</tr>{"".join(rows)}</table></div>'
        f'<p class="dim">{escape(note)}</p>'
    )


def _what_if_note(points: dict[int, float]) -> str:
    kept = ", ".join(f"{tokens:.2f} of {nodes}" for nodes, tokens in points.items())
    cards = "".join(
        f"<li>{escape(c.name)}: {c.bandwidth_gbs:,.0f} GB/s, {c.bf16_gflops / 1e3:,.0f} TFLOP/s "
        f"({escape(c.source)})</li>"
        for c in CARDS
    )
    return (
        '<div class="model"><p><b>A model, not a measurement.</b> If '
        f"{escape(LLAMA_8B.name)} kept as many tokens per step as were measured here ({kept} "
        "nodes), a GPU would gain this much, at the best tree size of each point. A pass over n "
        "tokens of B requests of S tokens is taken to cost "
        f"T(n) = (weight bytes / bandwidth + n 2 P / rate) / {EFFICIENCY} + "
        "B S cache bytes / bandwidth, and the gain is "
        "tokens per step (T(B) + host) / (T(B N) + host) "
        f"with {HOST_SECONDS * 1e3:.1f} ms on the host (Leviathan et al., 2211.17192, with T that "
        "depends on n). For an H100 this is within a few percent of the linear fit of passes "
        "measured in vLLM: 5.886 ms + 21.0 µs a token + 39.3 ns a cached token.</p></div>"
        f'<ul class="dim">{cards}</ul>'
    )
