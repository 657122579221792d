"""What speculation costs where it cannot help: random prompts, continued by random tokens."""

from __future__ import annotations

from collections.abc import Callable
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from ..drafters import Drafter
from ..hf.generate import SpeculativeDecoder
from ..hf.text import Generation, TextModel
from .machine import describe_machine

BASELINE, PLAIN, SPECULATION = "generate", "specdec, no drafter", "specdec"
_PROMPT_TOKENS = 64
_TEMPERATURE = 1000.0
"""Leaves nearly the uniform law: no token can be predicted."""


def run_overhead(
    subject: TextModel,
    *,
    num_texts: int,
    drafter: Drafter | None,
    max_new_tokens: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Generate random texts by `generate`, by this package without a drafter, and with one.

    The three take turns at every prompt, another one first each time, after a warm-up. Decoders
    without a seed draw a new one each time: the same noise again would be the same text, and be
    predicted.

    Args:
        num_texts: prompts, two at least.
        drafter: who has nothing to go by, with the budget that it has by default.

    Returns:
        {"machine", "rows": [{"mode", "tok_s", "slower", "low", "high"}]}: `slower` is the median
        over prompts of seconds / seconds of "generate" - 1, low and high its quartiles.

    Raises:
        ValueError: too few texts.
    """
    if num_texts < 2:
        raise ValueError(f"bench overhead: texts must be >= 2, got {num_texts}")
    decoders = {PLAIN: SpeculativeDecoder(None), SPECULATION: SpeculativeDecoder(drafter)}
    generator = torch.Generator().manual_seed(0)
    modes = (BASELINE, *decoders)
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    tok_s: dict[str, list[float]] = {mode: [] for mode in modes}
    vocab = int(subject.model.config.get_text_config(decoder=True).vocab_size)
    for turn in range(num_texts + 1):  # the first one warms up
        prompt = torch.randint(vocab, (1, _PROMPT_TOKENS), generator=generator)
        first = turn % len(modes)
        for mode in (*modes[first:], *modes[:first]):
            options: dict[str, Any] = {}
            if mode in decoders:
                options["custom_generate"] = decoders[mode]
            run = _generate(subject, prompt.to(subject.model.device), max_new_tokens, options)
            if turn > 0:
                seconds[mode].append(run.seconds)
                tok_s[mode].append(run.tok_s)
                progress(mode)
    machine = describe_machine()
    machine["settings"] = {
        "model": subject.name,
        "dtype": subject.dtype,
        "drafter": None if drafter is None else str(drafter),
        "num_texts": num_texts,
        "max_new_tokens": max_new_tokens,
        "temperature": _TEMPERATURE,
    }
    rows = []
    for mode in modes:
        ratios = [a / b for a, b in zip(seconds[mode], seconds[BASELINE], strict=True)]
        low, middle, high = (ratio - 1 for ratio in quantiles(ratios, n=4))
        speed = quantiles(tok_s[mode], n=2)[0]
        rows.append({"mode": mode, "tok_s": speed, "slower": middle, "low": low, "high": high})
    return {"machine": machine, "rows": rows}


def _generate(
    subject: TextModel, prompt: Tensor, max_new_tokens: int, options: dict[str, Any]
) -> Generation:
    return subject.generate(
        prompt,
        do_sample=True,
        temperature=_TEMPERATURE,
        top_k=0,
        top_p=1.0,
        min_new_tokens=max_new_tokens,
        max_new_tokens=max_new_tokens,
        **options,
    )
