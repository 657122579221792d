"""Time whole generations: `generate` in its own ways, and this package."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget
from ..drafters import Drafter
from ..hf.text import Generation, TextModel
from ..statistics import TotalStats
from .example import Witness
from .machine import describe_machine
from .ways import BASELINE, Decoding, check_modes, is_compiled, ways

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


def run_e2e(
    subject: TextModel,
    prompts: Sequence[Prompt],
    *,
    modes: Sequence[str] = (BASELINE, "prompt_lookup", "specdec"),
    drafter: Drafter | None,
    budget: Budget | bool | None = None,
    decoding: Decoding | None = None,
    max_new_tokens: int,
    progress: Callable[[Prompt, str], None] | None = None,
) -> dict[str, Any]:
    """Generate after every prompt in every mode, one prompt or batch at a time.

    The modes of a batch run one after another, another one first each time, after a warm-up.

    Args:
        subject: the target; prompts go through its chat template.
        modes: "generate" is plain, "prompt_lookup" is `generate(prompt_lookup_num_tokens=10)`,
            "static" is `generate` with a static cache under `torch.compile`, "plain" is this
            package without drafter, "specdec" with `drafter`.
        budget: as in `SpeculativeDecoder`.
        decoding: batch size, sampling, compilation; None is one prompt at a time, greedy.
        progress: called with the first prompt of a batch before each generation.

    Returns:
        {"machine": see `describe_machine`, with "settings"; "summary": {mode: {category or "all":
        {"tok_s", "speedup", "tokens_per_step", "mean_tokens_per_step", "agreement"}}}; "prompts":
        [one dict per prompt]; with a drafter "statistics", `TotalStats` of "specdec", and
        "example", see `Witness`}. A summary holds medians over prompts, `speedup` of the
        ratios measured on the same prompt; `mean_tokens_per_step` is the mean over all verify
        steps; `agreement` is the fraction of prompts with exactly the tokens of "generate", None
        where they are sampled. The rows of a batch share its time.

    Raises:
        ValueError: modes, or a prompt that does not fit the model.
    """
    check_modes(modes)
    decoding = Decoding() if decoding is None else decoding
    decoding.check(modes)
    encoded = [_encode(subject, prompt, max_new_tokens) for prompt in prompts]
    witness = None if drafter is None else Witness(drafter)
    options = ways(modes, witness, budget, decoding)
    settings: dict[str, Any] = {
        "model": subject.name,
        "dtype": subject.dtype,
        "max_nodes": 1 if drafter is None else drafter.max_nodes,
        "budget": budget if budget is None or isinstance(budget, bool) else "given",
        "max_new_tokens": max_new_tokens,
        **asdict(decoding),
        "num_parameters": sum(p.numel() for p in subject.model.parameters()),
        "weight_bytes": sum(p.nbytes for p in subject.model.parameters()),
    }
    machine = {**describe_machine(), "settings": settings}
    longest = max(encoded, key=Tensor.numel)
    for mode, given in options.items():
        # What compiles does so for the largest shape, before anything is timed.
        compiles = is_compiled(mode, decoding)
        rows = [longest] * decoding.batch if compiles else encoded[:1]
        new = max_new_tokens if compiles else min(_WARM_UP_TOKENS, max_new_tokens)
        subject.generate_batch(rows, **given, max_new_tokens=new)
    decoder = options["specdec"]["custom_generate"] if "specdec" in options else None
    # Some drafters choose their heads for the target that they meet.
    settings["drafter"] = None if drafter is None else str(drafter)
    settings["drafter_parameters"] = 0 if drafter is None else drafter.num_parameters
    if decoder is not None:
        decoder.totals = TotalStats()  # without the warm-up
    records = []
    for turn, batch in enumerate(_batches(prompts, decoding.batch)):
        rows = [encoded[i] for i in batch]
        results = {}
        first = turn % len(options)
        for mode in (*list(options)[first:], *list(options)[:first]):
            if progress is not None:
                progress(prompts[batch[0]], mode)
            torch.manual_seed(turn)  # of transformers' own sampling
            results[mode] = subject.generate_batch(
                rows, **options[mode], max_new_tokens=max_new_tokens
            )
        for row, i in enumerate(batch):
            runs = {mode: results[mode][row] for mode in options}
            records.append(_record(subject, prompts[i], encoded[i], runs, decoding.is_sampled))
    summary = {mode: _summary(mode, records, decoding.is_sampled) for mode in options}
    record = {"machine": machine, "summary": summary, "prompts": records}
    if decoder is not None and witness is not None:
        record["statistics"] = decoder.totals.as_dict()
        record["example"] = witness.example(subject.decode)
    return record


def _batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Indices of up to `size` prompts of one category that follow each other."""
    batches: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        same = batches and prompts[batches[-1][0]].category == prompt.category
        if same and len(batches[-1]) < size:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


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


def _record(
    subject: TextModel,
    prompt: Prompt,
    ids: Tensor,
    results: dict[str, Generation],
    is_sampled: bool,
) -> dict[str, Any]:
    baseline = results[BASELINE]
    record: dict[str, Any] = {
        "question_id": prompt.question_id,
        "category": prompt.category,
        "prompt_tokens": ids.shape[1],
        "modes": {},
    }
    for mode, result in results.items():
        divergence = subject.divergence(ids, result.tokens, baseline.tokens, is_sampled=is_sampled)
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


def _summary(
    mode: str, records: Sequence[dict[str, Any]], is_sampled: bool
) -> dict[str, dict[str, float | None]]:
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
            "agreement": None if is_sampled else sum(r["agrees"] for r in group) / len(group),
        }
        for category, group in groups.items()
    }


def _mean_over_steps(group: Sequence[dict[str, Any]]) -> float:
    later = [r["new_tokens"] - 1 for r in group]  # the first token comes from the prefill
    steps = [n / r["tokens_per_step"] for n, r in zip(later, group, strict=True)]
    return sum(later) / sum(steps) if any(steps) else 1.0
