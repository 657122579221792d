"""Drafters: who guesses the continuations."""

from collections.abc import Callable
from functools import partial

from .auto import AutoDrafter
from .base import DraftContext, Drafter, RowDrafter, Verified
from .heads import load_heads
from .memory import SuccessorTable
from .model import ModelDrafter, SampledTree, TopKTree
from .network import DraftNetwork
from .oracle import OracleDrafter
from .prompt_lookup import PromptLookupDrafter
from .recycling import TokenRecyclingDrafter

DRAFTERS: dict[str, Callable[..., Drafter] | None] = {
    "auto": AutoDrafter,
    "suffix": partial(AutoDrafter, sources=("text", "history")),
    "token_recycling": TokenRecyclingDrafter,
    "prompt_lookup": PromptLookupDrafter,
    "none": None,
}
"""Drafters that need nothing but a name; "none" decodes plainly."""
MODEL_DRAFTERS = ("draft", "early-exit", "heads")
"""Drafters that need a network, which the command line loads; in Python, a `ModelDrafter`."""


def make_drafter(name: str, **options: object) -> Drafter | None:
    """The drafter of that name, or None for plain decoding.

    Raises:
        ValueError: an unknown name, or one that needs a network.
    """
    if name in MODEL_DRAFTERS:
        raise ValueError(f"drafter {name!r} needs a network: pass ModelDrafter(network, tree)")
    if name not in DRAFTERS:
        known = ", ".join([*DRAFTERS, *MODEL_DRAFTERS])
        raise ValueError(f"drafter must be one of {known}, got {name!r}")
    make = DRAFTERS[name]
    return None if make is None else make(**options)


__all__ = [
    "DRAFTERS",
    "MODEL_DRAFTERS",
    "AutoDrafter",
    "DraftContext",
    "DraftNetwork",
    "Drafter",
    "ModelDrafter",
    "OracleDrafter",
    "PromptLookupDrafter",
    "RowDrafter",
    "SampledTree",
    "SuccessorTable",
    "TokenRecyclingDrafter",
    "TopKTree",
    "Verified",
    "load_heads",
    "make_drafter",
]
