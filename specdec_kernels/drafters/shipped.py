"""The trained heads that this package carries, and how to know the target that they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .heads import load_heads
from .network import DraftNetwork, TargetView

FOLDER = Path(__file__).resolve().parent.parent / "weights"
SHIPPED = {"mlp": "smollm2-135m-instruct-mlp-speculator", "eagle": "smollm2-135m-instruct-eagle"}
"""Name of a drafter -> folder of its heads. The first ones that fit help `AutoDrafter`: on CPUs the
cheaper ones make the faster text.
"""
FINGERPRINT = "target_fingerprint"
"""Key of a config."""


def shipped_heads(name: str) -> DraftNetwork:
    """The heads of that name, for SmolLM2-135M-Instruct."""
    return load_heads(FOLDER / SHIPPED[name])


def shipped_folder_for(target: TargetView) -> Path | None:
    """Where those are that were trained for this very target, if there are any."""
    found: list[float] | None = None
    for folder in SHIPPED.values():
        config: dict[str, Any] = json.loads((FOLDER / folder / "config.json").read_text("utf-8"))
        if config["vocab_size"] != target.vocab_size:
            continue
        found = fingerprint(target) if found is None else found
        if found == config[FINGERPRINT]:
            return FOLDER / folder
    return None


def fingerprint(target: TargetView) -> list[float]:
    """Some of the target's embeddings, rounded to bfloat16 so that its dtype does not matter."""
    tokens = torch.linspace(0, target.vocab_size - 1, 16, device=target.device).long()
    values: list[float] = target.embed(tokens)[:, :2].bfloat16().flatten().tolist()
    return values
