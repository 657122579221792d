"""Drafters: who guesses the continuations."""

from collections.abc import Callable
from functools import partial

from .auto import AutoDrafter
from .base import DraftContext, Drafter, RowDrafter, Verified
from .memory import SuccessorTable
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


def make_drafter(name: str, **options: object) -> Drafter | None:
    """The drafter of that name, or None for plain decoding.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DRAFTERS:
        raise ValueError(f"drafter must be one of {', '.join(DRAFTERS)}, got {name!r}")
    make = DRAFTERS[name]
    return None if make is None else make(**options)


__all__ = [
    "DRAFTERS",
    "AutoDrafter",
    "DraftContext",
    "Drafter",
    "OracleDrafter",
    "PromptLookupDrafter",
    "RowDrafter",
    "SuccessorTable",
    "TokenRecyclingDrafter",
    "Verified",
    "make_drafter",
]
