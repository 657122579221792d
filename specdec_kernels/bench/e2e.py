"""Time whole generations: plain `generate`, its own prompt lookup, and this package."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from ..budget import Budget
from ..drafters import Drafter
from ..hf.generate import SpeculativeDecoder
from ..hf.text import Generation, TextModel
from ..statistics import TotalStats
from .example import example_step
from .machine import describe_machine

BASELINE = "generate"
MODES = (BASELINE, "prompt_lookup", "plain", "specdec")
_HF_LOOKUP_TOKENS = 10
_WARM_UP_TOKENS = 8
_MT_BENCH = frozenset(
    "writing roleplay reasoning math coding extraction stem humanities".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question; `category` has MT-Bench's eight merged into "mt_bench"."""

    question_id: int | str
    category: str
    text: str


def read_prompts(path: Path | None = None) -> list[Prompt]:
    """First turns of a file in Spec-Bench's form: lines of `question_id, category, turns`.

    Args:
        path: the file; None is the package's own prompts.

    Raises:
        ValueError: a malformed line, by its number, or no prompt at all.
        OSError: an unreadable file.
    """
    source = path or resources.files(__package__) / "prompts.jsonl"
    try:
        lines = source.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason})") from None
    prompts = [
        _parse(f"{source}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{source}: no prompts")
    return prompts


def select_prompts(
    prompts: Sequence[Prompt], *, categories: Sequence[str] = (), limit: int | None = None
) -> list[Prompt]:
    """The prompts of some categories (none named: all), at most `limit` of each, evenly spread.

    Raises:
        ValueError: a category without prompts.
    """
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    for name in categories:
        if name not in by_category:
            raise ValueError(f"category must be one of {', '.join(by_category)}, got {name!r}")
    chosen = []
    for name, group in by_category.items():
        if not categories or name in categories:
            count = min(limit or len(group), len(group))
            chosen += [group[i * len(group) // count] for i in range(count)]
    return chosen


def check_modes(modes: Sequence[str]) -> None:
    """Raise ValueError for an unknown mode, or without the one that the others are compared
    with.
    """
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"modes must be among {', '.join(MODES)}, got {mode!r}")
    if BASELINE not in modes:
        raise ValueError(
            f"modes must include {BASELINE!r}: speedup and agreement are relative to it"
        )


def run_e2e(
    subject: TextModel,
    prompts: Sequence[Prompt],
    *,
    modes: Sequence[str] = (BASELINE, "prompt_lookup", "specdec"),
    drafter: Drafter | None,
    budget: Budget | bool | None = None,
    max_new_tokens: int,
    progress: Callable[[Prompt, str], None] | None = None,
) -> dict[str, Any]:
    """Generate greedily after every prompt in every mode, one prompt at a time.

    The modes of a prompt run one after another, another one first each time, after a warm-up.

    Args:
        subject: the target; prompts go through its chat template.
        modes: "generate" is plain, "prompt_lookup" is `generate(prompt_lookup_num_tokens=10)`,
            "plain" is this package without drafter, "specdec" with `drafter`.
        budget: as in `SpeculativeDecoder`.
        progress: called before each generation.

    Returns:
        {"machine": see `describe_machine`, with "settings"; "summary": {mode: {category or "all":
        {"tok_s", "speedup", "tokens_per_step", "mean_tokens_per_step", "agreement"}}}; "prompts":
        [one dict per prompt]; with a drafter "statistics", `TotalStats` of "specdec", and
        "example", see `example_step`}. A summary holds medians over prompts, `speedup` of the
        ratios measured on the same prompt; `mean_tokens_per_step` is the mean over all verify
        steps; `agreement` is the fraction of prompts with exactly the tokens of "generate".

    Raises:
        ValueError: modes, or a prompt that does not fit the model.
    """
    check_modes(modes)
    encoded = [_encode(subject, prompt, max_new_tokens) for prompt in prompts]
    ways = _ways(modes, drafter, budget)
    settings = {
        "model": subject.name,
        "dtype": subject.dtype,
        "drafter": None if drafter is None else str(drafter),
        "max_nodes": 1 if drafter is None else drafter.max_nodes,
        "budget": budget if budget is None or isinstance(budget, bool) else "given",
        "max_new_tokens": max_new_tokens,
        "num_parameters": sum(p.numel() for p in subject.model.parameters()),
        "weight_bytes": sum(p.nbytes for p in subject.model.parameters()),
    }
    machine = {**describe_machine(), "settings": settings}
    for options in ways.values():
        subject.generate(encoded[0], **options, max_new_tokens=min(_WARM_UP_TOKENS, max_new_tokens))
    decoder = ways["specdec"]["custom_generate"] if "specdec" in ways else None
    if decoder is not None:
        decoder.totals = TotalStats()  # without the warm-up
    records = []
    for turn, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        results = {}
        first = turn % len(ways)
        for mode in (*list(ways)[first:], *list(ways)[:first]):
            if progress is not None:
                progress(prompt, mode)
            results[mode] = subject.generate(ids, **ways[mode], max_new_tokens=max_new_tokens)
        records.append(_record(subject, prompt, ids, {mode: results[mode] for mode in ways}))
    summary = {mode: _summary(mode, records) for mode in ways}
    record = {"machine": machine, "summary": summary, "prompts": records}
    if decoder is not None and drafter is not None:
        record["statistics"] = decoder.totals.as_dict()
        record["example"] = example_step(subject, encoded[-1], drafter, max_new_tokens)
    return record


def _parse(place: str, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must be a JSON object, got {type(entry).__name__}")
    number, category, turns = (entry.get(key) for key in ("question_id", "category", "turns"))
    if not isinstance(number, (int, str)):
        raise ValueError(f"{place}: question_id must be a number or a string, got {number!r}")
    if not isinstance(category, str) or not category:
        raise ValueError(f"{place}: category must be a name, got {category!r}")
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str) or not turns[0]:
        raise ValueError(f"{place}: turns must be a list that starts with a text, got {turns!r}")
    return Prompt(number, "mt_bench" if category in _MT_BENCH else category, turns[0])


def _encode(subject: TextModel, prompt: Prompt, max_new_tokens: int) -> Tensor:
    try:
        return subject.encode(prompt.text, is_chat=True, max_new_tokens=max_new_tokens)
    except ValueError as error:
        raise ValueError(f"question {prompt.question_id}: {error}") from None


def _ways(
    modes: Sequence[str], drafter: Drafter | None, budget: Budget | bool | None
) -> dict[str, dict[str, Any]]:
    """Mode -> options of `generate`."""
    options: dict[str, dict[str, Any]] = {
        BASELINE: {},
        "prompt_lookup": {"prompt_lookup_num_tokens": _HF_LOOKUP_TOKENS},
        "plain": {"custom_generate": SpeculativeDecoder(None)},
        "specdec": {"custom_generate": SpeculativeDecoder(drafter, budget=budget)},
    }
    return {mode: {"do_sample": False, **options[mode]} for mode in modes}


def _record(
    subject: TextModel, prompt: Prompt, ids: Tensor, results: dict[str, Generation]
) -> dict[str, Any]:
    baseline = results[BASELINE]
    record: dict[str, Any] = {
        "question_id": prompt.question_id,
        "category": prompt.category,
        "prompt_tokens": ids.shape[1],
        "modes": {},
    }
    for mode, result in results.items():
        divergence = subject.divergence(ids, result.tokens, baseline.tokens)
        record["modes"][mode] = {
            "new_tokens": len(result.tokens),
            "seconds": result.seconds,
            "tok_s": result.tok_s,
            "speedup": result.tok_s / baseline.tok_s,
            "tokens_per_step": result.tokens_per_step,
            "agrees": divergence is None,
            "divergence": None if divergence is None else asdict(divergence),
        }
    return record


def _summary(mode: str, records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[dict[str, Any]]] = {"all": []}
    for record in records:
        groups.setdefault(record["category"], []).append(record["modes"][mode])
        groups["all"].append(record["modes"][mode])
    return {
        category: {
            **{
                key: median(r[key] for r in group)
                for key in ("tok_s", "speedup", "tokens_per_step")
            },
            "mean_tokens_per_step": _mean_over_steps(group),
            "agreement": sum(r["agrees"] for r in group) / len(group),
        }
        for category, group in groups.items()
    }


def _mean_over_steps(group: Sequence[dict[str, Any]]) -> float:
    later = [r["new_tokens"] - 1 for r in group]  # the first token comes from the prefill
    steps = [n / r["tokens_per_step"] for n, r in zip(later, group, strict=True)]
    return sum(later) / sum(steps) if any(steps) else 1.0
