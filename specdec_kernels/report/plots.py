"""The figures of the report, as SVG text that takes its font from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .drafters import Line
from .what_if import CARDS, LLAMA_8B, Target, speedup

Draw = Callable[["Theme"], Figure]


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one mode of the page.

    Attributes:
        name: "light" or "dark".
        page, ink, faint: of the page, of text, and of lines that only help.
        colours: of series; told apart by the colour-blind (Okabe and Ito, 2008).
        accepted: of draft tokens that were kept.
    """

    name: str
    page: str
    ink: str
    faint: str
    colours: tuple[str, ...]
    accepted: str


_OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LIGHTER = ("#56b4e9", "#ff8c42", "#2fc99a", "#e29ac4", "#f0c24b", "#8ab6ff")
THEMES = (
    Theme("light", "#ffffff", "#1d1f23", "#c9ccd1", _OKABE_ITO, "#009e73"),
    Theme("dark", "#16181c", "#e6e8eb", "#4a4f57", _LIGHTER, "#2fc99a"),
)
_MODES = {
    "prompt_lookup": "generate, its prompt lookup",
    "static": "generate, its compiled static cache",
    "plain": "specdec_kernels, no drafts",
    "specdec": "specdec_kernels",
}


def both_themes(draw: Draw, title: str) -> str:
    """The figure in light and dark, of which the page shows one."""
    parts = []
    for theme in THEMES:
        with _style(theme):
            parts.append(_svg(draw(theme), f"{theme.name}-{_slug(title)}"))
    shown = zip(THEMES, parts, strict=True)
    return "".join(
        f'<div class="{t.name}" role="img" aria-label="{title}">{svg}</div>' for t, svg in shown
    )


def speedups(record: dict[str, Any]) -> Draw:
    """Bars of speed against `generate`, by category and mode."""
    summary = {m: rows for m, rows in record["summary"].items() if m in _MODES}
    names = [c for c in next(iter(record["summary"].values())) if c != "all"] + ["all"]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(7.6, 0.42 * len(names) * max(1, len(summary)) ** 0.5 + 1.2))
        axes = figure.subplots()
        height = 0.8 / max(1, len(summary))
        for i, (mode, rows) in enumerate(summary.items()):
            at = [place + (i - (len(summary) - 1) / 2) * height for place in range(len(names))]
            values = [rows[name]["speedup"] for name in names]
            colour = theme.colours[i + 1] if mode != "specdec" else theme.colours[0]
            bars = axes.barh(at, values, height * 0.92, color=colour, label=_MODES[mode])
            axes.bar_label(bars, [f"{v:.2f}x" for v in values], padding=3, fontsize=8)
        axes.axvline(1.0, color=theme.ink, linewidth=1)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("tokens per second against generate (median over prompts)")
        axes.margins(x=0.1)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3 if len(summary) < 4 else 2)
        return figure

    return draw


def tokens_by_size(points: Mapping[str, Mapping[int, float]]) -> Draw:
    """Tokens per step against the size of full trees, a line for each category."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(7.6, 3.4))
        axes = figure.subplots()
        for i, (category, line) in enumerate(points.items()):
            is_all = category == "all"
            colour = theme.ink if is_all else theme.colours[i % len(theme.colours)]
            width = 2.4 if is_all else 1.3
            sizes, values = list(line), list(line.values())
            axes.plot(sizes, values, "o-", label=category, color=colour, linewidth=width)
        _sizes_axis(axes, sorted({size for line in points.values() for size in line}))
        axes.set_xlabel("nodes of a tree, the root included")
        axes.set_ylabel("tokens per step")
        axes.legend(ncols=2)
        return figure

    return draw


def tokens_by_drafter(lines: Sequence[Line]) -> Draw:
    """Tokens per step of each category, a dot for each drafter."""
    names = [name for name in lines[0].tokens_per_step if name != "all"] + ["all"]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(7.6, 0.42 * len(names) + 1.6))
        axes = figure.subplots()
        for i, line in enumerate(lines):
            known = [(n, row) for row, n in enumerate(names) if n in line.tokens_per_step]
            values = [line.tokens_per_step[name] for name, _ in known]
            marker = "osD^vPX*"[i % 8]
            aside = (i - (len(lines) - 1) / 2) * 0.6 / len(lines)  # equal ones stay apart
            axes.plot(
                values,
                [row + aside for _, row in known],
                marker,
                label=line.name,
                color=theme.colours[i % len(theme.colours)],
                markersize=7,
                alpha=0.85,
            )
        axes.axvline(1.0, color=theme.ink, linewidth=1)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.invert_yaxis()
        axes.grid(axis="y", color=theme.faint, linewidth=0.6)
        axes.set_xlabel("tokens per step (mean over all steps)")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        return figure

    return draw


def cost_curve(curve: dict[str, Any], machine: dict[str, Any]) -> Draw:
    """Time of a forward pass by its tokens, above the floor of this machine."""
    sizes, times = curve["nodes"], [1e3 * s for s in curve["seconds"]]
    settings = machine["settings"]
    read = settings["weight_bytes"] / machine["bandwidth_gbs"] / 1e6
    each = 2 * settings["num_parameters"] / machine["bf16_gflops"] / 1e6
    floor = [max(read, size * each) for size in sizes]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(7.6, 3.4))
        axes = figure.subplots()
        axes.plot(sizes, times, "o-", color=theme.colours[0], linewidth=2, label="measured")
        floor_name = "floor: weights / bandwidth, or operations / matrix rate"
        axes.plot(sizes, floor, "--", color=theme.colours[1], label=floor_name)
        _sizes_axis(axes, sizes)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in the pass")
        axes.set_ylabel("ms")
        axes.legend()
        return figure

    return draw


def shares_of_roofline(rows: Sequence[dict[str, Any]]) -> Draw:
    """Floor / time of every operator and case, once however many baselines it has."""
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        shares.setdefault(row["op"], {})[row["case"]] = row["floor_us"] / row["us"]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(7.6, 0.38 * len(shares) + 1.0))
        axes = figure.subplots()
        for i, cases in enumerate(shares.values()):
            values = sorted(cases.values())
            axes.plot(values, [i] * len(values), "o", color=theme.colours[0], alpha=0.55)
            middle = values[len(values) // 2]
            axes.plot([middle], [i], "|", color=theme.ink, markersize=16, markeredgewidth=2)
        axes.set_yticks(range(len(shares)), list(shares))
        axes.invert_yaxis()
        axes.set_xlim(0, max(1.0, *(v for cases in shares.values() for v in cases.values())) * 1.03)
        axes.axvline(1.0, color=theme.ink, linewidth=1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
        axes.set_xlabel("least time / measured time; a dot for each case, a bar at the median")
        return figure

    return draw


def acceptance(statistics: dict[str, Any]) -> Draw:
    """How often draft tokens were kept, by depth and by rank among siblings."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(7.6, 2.8))
        for axes, name, values in zip(
            figure.subplots(1, 2, sharey=True),
            ("depth in the tree", "rank among siblings"),
            (statistics["acceptance_by_depth"], statistics["acceptance_by_rank"]),
            strict=True,
        ):
            shown = values[:12]
            axes.bar(range(1, len(shown) + 1), shown, color=theme.accepted)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
            axes.xaxis.set_major_locator(FixedLocator(range(1, len(shown) + 1)))
            axes.set_xlabel(name)
        figure.axes[0].set_ylabel("accepted where tested")
        return figure

    return draw


def tree(example: dict[str, Any]) -> Draw:
    """A draft tree from left to right, the kept path in colour."""
    parents: list[int] = example["parents"]
    kept = set(example["path"])
    children: dict[int, list[int]] = {node: [] for node in range(-1, len(parents))}
    for node, parent in enumerate(parents):
        children[parent].append(node)
    depth, height = _layout(children, parents)
    rows = max(height.values(), default=0) + 1
    texts = [repr(token)[1:-1] or " " for token in example["tokens"]]
    texts = [text if len(text) <= 12 else text[:11] + "…" for text in texts]
    # inches of a level: a frame, and its letters
    width = (0.36 + 0.058 * max(map(len, texts))) * (max(depth.values()) + 1)

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(max(7.6, width), 0.3 * rows + 0.4))
        axes = figure.subplots()
        axes.set_axis_off()
        for node, parent in enumerate(parents):
            is_kept = node in kept
            colour = theme.accepted if is_kept else theme.faint
            if parent >= 0:
                xs = [depth[parent] + 0.08, depth[node] - 0.08]
                ys = [height[parent], height[node]]
                axes.plot(xs, ys, color=colour, linewidth=2.2 if is_kept else 1, zorder=1)
            axes.text(
                depth[node],
                height[node],
                texts[node].replace("$", r"\$"),
                ha="center",
                va="center",
                fontsize=8,
                color=theme.ink if is_kept else theme.faint if theme.name == "dark" else "#70757d",
                fontweight="bold" if is_kept else "normal",
                bbox={"boxstyle": "round,pad=0.25", "fc": theme.page, "ec": colour, "lw": 1.2},
                zorder=2,
            )
        axes.set_xlim(-0.6, max(depth.values()) + 0.6)
        axes.set_ylim(rows - 0.4, -0.6)
        return figure

    return draw


def what_if(kept: Mapping[int, float], contexts: Sequence[int] = (500, 4000, 32000)) -> Draw:
    """Predicted speedup against the batch, a panel for each context and a line for each GPU."""
    target: Target = LLAMA_8B
    batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(7.6, 3.3))
        panels = figure.subplots(1, len(contexts), sharey=True)
        for axes, context in zip(panels, contexts, strict=True):
            for i, gpu in enumerate(CARDS):
                ratios = [
                    speedup(gpu, target, kept, batch=batch, context=context)[0] for batch in batches
                ]
                name = gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce ")
                axes.plot(batches, ratios, color=theme.colours[i], label=name.split("-")[0])
            _sizes_axis(axes, [1, 4, 16, 64, 256])
            axes.set_title(f"{context:,} tokens of context", fontsize=9)
            axes.set_xlabel("requests")
        panels[0].set_ylabel("predicted speedup")
        panels[0].set_ylim(bottom=0.9)
        panels[-1].legend(fontsize=7)
        return figure

    return draw


def _layout(
    children: dict[int, list[int]], parents: Sequence[int]
) -> tuple[dict[int, int], dict[int, float]]:
    """Depth of each node, and its place from top to bottom: leaves a row each, parents between."""
    depth: dict[int, int] = {}
    for node, parent in enumerate(parents):
        depth[node] = 0 if parent < 0 else depth[parent] + 1
    height: dict[int, float] = {}
    rows = 0
    stack = [(root, False) for root in reversed(children[-1])]
    while stack:
        node, is_done = stack.pop()
        if not children[node]:
            height[node], rows = rows, rows + 1
        elif is_done:
            below = [height[child] for child in children[node]]
            height[node] = (below[0] + below[-1]) / 2
        else:
            stack.append((node, True))
            stack += [(child, False) for child in reversed(children[node])]
    return depth, height


def _sizes_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    parameters: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "specdec",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "grid.color": theme.faint,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
            theme.ink,
        ),
    }
    with mpl.rc_context(parameters):
        yield


def _svg(figure: Figure, prefix: str) -> str:
    """The drawing alone; ids are made unique in the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    )


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower())
