"""Drafters side by side, from one `bench e2e` record of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """What one drafter did.

    Attributes:
        name: of the drafter.
        num_parameters: of its network; 0 without one.
        tokens_per_step: mean over all steps, by category and for "all".
        by_depth: share of the tested depths that were accepted.
        draft_share: of the time of a step: drafting against drafting, the pass and acceptance.
        tok_s: median over prompts.
        speedup: against `generate`, the same; lookup_speedup of its prompt lookup, if measured.
        predicted: speed by the formula, from acceptance and the time of a step.
    """

    name: str
    num_parameters: int
    tokens_per_step: dict[str, float]
    by_depth: list[float]
    draft_share: float
    tok_s: float
    speedup: float
    lookup_speedup: float | None
    predicted: float


def compare(records: Sequence[Record]) -> list[Line]:
    """A line for each record of a drafter that took steps, in the order given; later ones of one
    drafter with the same settings take the place of earlier ones. Batches are left out: the time of
    their steps is that of several rows.
    """
    lines: dict[tuple[Any, ...], Line] = {}
    for record in records:
        settings = record["machine"]["settings"]
        num_steps = record.get("statistics", {}).get("num_steps", 0)
        if num_steps and settings.get("batch", 1) == 1:
            key = tuple(settings[name] for name in ("drafter", "max_nodes", "budget"))
            lines[key] = _line(record)
    return list(lines.values())


def _line(record: Record) -> Line:
    summary, statistics = record["summary"], record["statistics"]
    own, settings = summary["specdec"], record["machine"]["settings"]
    draft, *others = (statistics[f"{part}_seconds"] for part in ("draft", "forward", "verify"))
    step = (draft + sum(others)) / statistics["num_steps"]
    by_depth = statistics["acceptance_by_depth"]
    lookup = summary.get("prompt_lookup")
    return Line(
        name=settings["drafter"],
        num_parameters=settings.get("drafter_parameters", 0),
        tokens_per_step={name: row["mean_tokens_per_step"] for name, row in own.items()},
        by_depth=by_depth,
        draft_share=draft / (draft + sum(others)),
        tok_s=own["all"]["tok_s"],
        speedup=own["all"]["speedup"],
        lookup_speedup=None if lookup is None else lookup["all"]["speedup"],
        predicted=expected_tokens(by_depth) / (step * summary["generate"]["all"]["tok_s"]),
    )


def expected_tokens(by_depth: Sequence[float]) -> float:
    """Tokens of a step whose depth d is right, where d - 1 was, with probability `by_depth[d - 1]`
    whatever the text: 1 + a_1 + a_1 a_2 + ...; for equal ones (1 - a^(g + 1)) / (1 - a).

    Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding",
        2211.17192, equation 1.
    """
    return 1.0 + math.fsum(accumulate(by_depth, mul))
