"""Drafters: who guesses the continuations."""

from collections.abc import Callable
from functools import partial
from typing import Any

from .auto import AutoDrafter
from .base import DraftContext, Drafter, RowDrafter, Verified
from .heads import load_heads
from .memory import SuccessorTable
from .model import ModelDrafter, SampledTree, TopKTree
from .network import DraftNetwork
from .oracle import OracleDrafter
from .prompt_lookup import PromptLookupDrafter
from .recycling import TokenRecyclingDrafter
from .shipped import SHIPPED, shipped_heads

DRAFTERS: dict[str, Callable[..., Drafter] | None] = {
    "auto": AutoDrafter,
    "suffix": partial(AutoDrafter, sources=("text", "history"), heads=None),
    "token_recycling": TokenRecyclingDrafter,
    "prompt_lookup": PromptLookupDrafter,
    "none": None,
}
"""Drafters that need nothing but a name; "none" decodes plainly."""
MODEL_DRAFTERS = ("draft", "early-exit", "heads", "medusa", "streaming")
"""Drafters that need a network, which the command line loads; in Python, a `ModelDrafter`."""


def make_drafter(name: str, **options: Any) -> Drafter | None:
    """The drafter of that name, or None for plain decoding.

    Raises:
        ValueError: an unknown name, or one that needs a network.
    """
    if name in MODEL_DRAFTERS:
        raise ValueError(f"drafter {name!r} needs a network: pass ModelDrafter(network, tree)")
    if name in SHIPPED:
        return ModelDrafter(shipped_heads(name), TopKTree(**options))
    if name not in DRAFTERS:
        known = ", ".join([*DRAFTERS, *SHIPPED, *MODEL_DRAFTERS])
        raise ValueError(f"drafter must be one of {known}, got {name!r}")
    make = DRAFTERS[name]
    return None if make is None else make(**options)


__all__ = [
    "DRAFTERS",
    "MODEL_DRAFTERS",
    "SHIPPED",
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
    "shipped_heads",
]
