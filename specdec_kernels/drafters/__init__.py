"""Drafters: who guesses the continuations."""

from .base import DraftContext, Drafter, RowDrafter
from .heads import load_heads
from .model import ModelDrafter, SampledTree, TopKTree
from .network import DraftNetwork
from .oracle import OracleDrafter
from .prompt_lookup import PromptLookupDrafter

DRAFTERS: dict[str, type[Drafter] | None] = {
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
    kind = DRAFTERS[name]
    return None if kind is None else kind(**options)


__all__ = [
    "DRAFTERS",
    "MODEL_DRAFTERS",
    "DraftContext",
    "DraftNetwork",
    "Drafter",
    "ModelDrafter",
    "OracleDrafter",
    "PromptLookupDrafter",
    "RowDrafter",
    "SampledTree",
    "TopKTree",
    "load_heads",
    "make_drafter",
]
