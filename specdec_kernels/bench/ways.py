"""The ways to generate that whole generations are timed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..budget import Budget
from ..drafters import Drafter
from ..hf.baseline import compiled_static_cache
from ..hf.generate import SpeculativeDecoder

BASELINE = "generate"
MODES = (BASELINE, "prompt_lookup", "static", "plain", "specdec")
_HF_LOOKUP_TOKENS = 10


@dataclass(frozen=True, slots=True)
class Decoding:
    """What all ways have in common.

    Attributes:
        batch: prompts of one call, of one category; the last call of a category may have fewer.
        temperature, top_p: of sampling; temperature 0 is greedy.
        compile: this package's steps run under `torch.compile`; True, or a backend of it, then also
            for "static".
    """

    batch: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    compile: bool | str = False

    @property
    def is_sampled(self) -> bool:
        """Whether the texts of two ways are different draws."""
        return self.temperature > 0

    def check(self, modes: Sequence[str]) -> None:
        """Raise ValueError for a law that is none, or where a mode cannot decode like this."""
        if self.top_p < 1 and not self.is_sampled:
            raise ValueError(f"top_p needs a temperature above 0, got top_p {self.top_p}")
        if self.batch > 1 and "prompt_lookup" in modes:
            raise ValueError(
                f"mode 'prompt_lookup' takes one prompt at a time in transformers, got a batch of "
                f"{self.batch}; choose --modes without it"
            )


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


def is_compiled(mode: str, decoding: Decoding) -> bool:
    """Whether its first call compiles for the longest prompt."""
    return mode == "static" or bool(decoding.compile and mode in ("plain", "specdec"))


def ways(
    modes: Sequence[str], drafter: Drafter | None, budget: Budget | bool | None, decoding: Decoding
) -> dict[str, dict[str, Any]]:
    """Mode -> options of `generate`."""
    own: dict[str, Any] = {"compile": decoding.compile, "seed": 0}
    options: dict[str, dict[str, Any]] = {
        BASELINE: {},
        "prompt_lookup": {"prompt_lookup_num_tokens": _HF_LOOKUP_TOKENS},
        "static": compiled_static_cache(decoding.compile),
        "plain": {"custom_generate": SpeculativeDecoder(None, **own)},
        "specdec": {"custom_generate": SpeculativeDecoder(drafter, budget=budget, **own)},
    }
    law: dict[str, Any] = {"do_sample": False}
    if decoding.is_sampled:
        law = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p}
        law["top_k"] = 0  # transformers' default would keep fifty tokens
    return {mode: {**law, **options[mode]} for mode in modes}
