"""What the command line prints: tables of backends and measurements, and summaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Column, Table
from rich.text import Text

_NEAR_TIE = 0.25  # logits: a few bfloat16 steps at the size of a top logit
_MOST_SHARES = 8


def backends_table(ops: dict[str, dict[str, str | None]]) -> Table:
    """Operator x backend: "yes", or why not."""
    backends = list(next(iter(ops.values())))
    table = Table("op", *backends)
    for name, reasons in ops.items():
        cells = [
            Text("yes", "green") if reasons[b] is None else Text(str(reasons[b]), "dim")
            for b in backends
        ]
        table.add_row(name, *cells)
    return table


def facts_table(facts: dict[str, Any]) -> Table:
    """Names and values, without lines."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(name, "bold"), Text("-" if value is None else str(value)))
    return table


def models_table(rows: list[tuple[str, str]]) -> Table:
    """Architecture and "exact", or the reason for refusing it."""
    table = Table("architecture", Column("token trees", overflow="fold"))
    for name, answer in rows:
        table.add_row(name, Text(answer, "green" if answer == "exact" else "dim"))
    return table


def e2e_table(record: dict[str, Any]) -> Table:
    """One section per category, one row per mode; below, how close the texts that part were."""
    summary = record["summary"]
    numbers = _numbers("tok/s", "speedup", "tokens/step", "mean", "agreement")
    table = Table("category", "mode", *numbers, caption=_partings(record["prompts"]))
    categories = list(next(iter(summary.values())))
    for category in (*(c for c in categories if c != "all"), "all"):
        for i, (mode, by_category) in enumerate(summary.items()):
            row = by_category[category]
            table.add_row(
                "" if i else category,
                mode,
                f"{row['tok_s']:.1f}",
                f"{row['speedup']:.2f}x",
                f"{row['tokens_per_step']:.2f}",
                f"{row['mean_tokens_per_step']:.2f}",
                "-" if row["agreement"] is None else f"{row['agreement']:.0%}",
            )
        table.add_section()
    return table


def ops_table(record: dict[str, Any]) -> Table:
    """One row per case and baseline; below, what is absent."""
    table = Table(
        "op",
        Column("case", overflow="fold"),
        *_numbers("us", "floor us"),
        "baseline",
        *_numbers("baseline us", "ratio"),
        caption="\n".join(_absent(record)),
    )
    for row in record["rows"]:
        table.add_row(
            row["op"],
            row["case"],
            f"{row['us']:.1f}",
            f"{row['floor_us']:.1f}",
            row["baseline"],
            f"{row['baseline_us']:.1f}",
            f"{row['ratio']:.2f}x",
        )
    return table


def _absent(record: dict[str, Any]) -> list[str]:
    return [f"absent: {name}: {reason}" for name, reason in record["absent"].items()]


def gpu_table(record: dict[str, Any]) -> Table:
    """One section per case, one row per contender; below, what was wrong and what is absent."""
    rows, rates = record["rows"], record["rates"]
    notes = [f"roofline: {rates['bandwidth_gbs']:g} GB/s, {rates['bf16_gflops']:g} GFLOP/s"]
    notes[0] += f" ({rates['source']})"
    notes += [f"WRONG {f['op']} {f['case']} {f['contender']}: {f['error']}"
              for f in record["failures"]]  # fmt: skip
    notes += _absent(record)
    table = Table(
        "op",
        Column("case", overflow="fold"),
        "contender",
        *_numbers("us", "GB/s", "of roofline", "time against"),
        caption="\n".join(notes),
    )
    for i, row in enumerate(rows):
        is_first = i == 0 or (rows[i - 1]["op"], rows[i - 1]["case"]) != (row["op"], row["case"])
        if is_first:
            table.add_section()
        table.add_row(
            row["op"] if is_first else "",
            row["case"] if is_first else "",
            row["contender"],
            f"{row['us']:.1f}",
            f"{row['gbs']:.1f}",
            f"{row['roofline']:.0%}",
            ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["against"].items()),
        )
    return table


def cost_table(nodes: Sequence[int], seconds: Sequence[float]) -> Table:
    """Time of a forward pass by its number of tokens."""
    table = Table(*_numbers("tokens", "ms", "against 1"))
    for size, time in zip(nodes, seconds, strict=True):
        table.add_row(str(size), f"{time * 1e3:.2f}", f"{time / seconds[0]:.2f}x")
    return table


def overhead_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One row per way to generate."""
    table = Table("mode", *_numbers("tok/s", "time against generate", "quartiles"))
    for row in rows:
        quartiles = f"{row['low']:+.1%} to {row['high']:+.1%}"
        table.add_row(row["mode"], f"{row['tok_s']:.1f}", f"{row['slower']:+.1%}", quartiles)
    return table


def rules_table(rows: list[dict[str, Any]]) -> Table:
    """One section per draft law, one row per way to draw and test siblings."""
    numbers = _numbers("accepted", "against the first")
    table = Table("draft", "temperature", "siblings", "rule", *numbers)
    for i, row in enumerate(rows):
        is_first = i == 0 or rows[i - 1]["temperature"] != row["temperature"]
        if is_first:
            table.add_section()
        table.add_row(
            row["draft"] if is_first else "",
            f"{row['temperature']:g}" if is_first else "",
            row["siblings"],
            row["rule"],
            f"{row['accepted']:.2f} ± {row['ci95']:.2f}",
            "" if is_first or row["gain"] is None else _gain(row),
        )
    return table


def _gain(row: dict[str, Any]) -> str:
    return f"{row['gain']:+.1%} ± {row['gain_ci95']:.1%}"


def generation_lines(report: dict[str, Any], dtype: str) -> list[str]:
    """The summary of a report of `specdec generate`."""
    stats, compare = report["stats"], report["compare"]
    lines = [
        f"{stats['num_tokens']} tokens in {stats['num_steps']} steps, "
        f"{stats['tokens_per_step']:.2f} tokens per step, "
        f"{stats['num_accepted']} of {stats['num_drafted']} draft tokens accepted",
        f"{stats['tok_s']:.1f} tok/s with speculation",
        f"{stats['draft_seconds']:.2f} s drafting, {stats['forward_seconds']:.2f} s in the model, "
        f"{stats['verify_seconds']:.2f} s verifying",
        f"accepted by depth: {_shares(stats['acceptance_by_depth'])}; "
        f"by rank among siblings: {_shares(stats['acceptance_by_rank'])}",
    ]
    if stats["num_failures"]:
        lines.append(f"the drafter failed {stats['num_failures']} times: {stats['failures'][0]}")
    if compare is not None:
        lines[1] += f", {compare['tok_s']:.1f} without: {compare['speedup']:.2f}x"
        lines.append(_agreement_line(compare["divergence"], dtype))
    return lines


def _shares(values: Sequence[float]) -> str:
    return " ".join(f"{share:.0%}" for share in values[:_MOST_SHARES]) or "none tested"


def _agreement_line(divergence: dict[str, Any] | None, dtype: str) -> str:
    if divergence is None:
        return "the two texts agree token for token"
    line = f"the two texts part at new token {divergence['index']}"
    if divergence["gap"] is not None:
        line += f"; the target's logits of the two tokens are {divergence['gap']:.3g} apart there"
        if divergence["gap"] <= _NEAR_TIE and dtype != "fp32":
            line += f", a near-tie that {dtype} rounding decides"
    return line


def _partings(prompts: list[dict[str, Any]]) -> str | None:
    """How far apart, at most, the target puts the tokens where texts part from the baseline."""
    gaps: dict[str, float] = {}
    for prompt in prompts:
        for mode, result in prompt["modes"].items():
            if result["divergence"] is not None and result["divergence"]["gap"] is not None:
                gaps[mode] = max(gaps.get(mode, 0.0), result["divergence"]["gap"])
    if not gaps:
        return None
    each = ", ".join(f"{mode} {gap:.3g}" for mode, gap in gaps.items())
    return f"largest distance of the target's logits where texts part from generate: {each}"


def _numbers(*names: str) -> list[Column]:
    return [Column(name, justify="right", no_wrap=True) for name in names]
