"""Drafters: who guesses the continuations."""

from .base import DraftContext, Drafter, RowDrafter, Verified
from .oracle import OracleDrafter
from .prompt_lookup import PromptLookupDrafter

DRAFTERS: dict[str, type[Drafter] | None] = {
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
    kind = DRAFTERS[name]
    return None if kind is None else kind(**options)


__all__ = [
    "DRAFTERS",
    "DraftContext",
    "Drafter",
    "OracleDrafter",
    "PromptLookupDrafter",
    "RowDrafter",
    "Verified",
    "make_drafter",
]
