"""Which drafts each acceptance rule can test."""

from __future__ import annotations

import torch
from torch import Tensor

from ..acceptance import RULES
from ..tree import DraftKind

Laws = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""draft_rows, draft_probs, draft_logits, draft_offsets"""


def check_arguments(
    rule: str,
    lossy: bool,
    draft_rows: Tensor | None,
    probs: Tensor | None,
    logits: Tensor | None,
    temperature: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    coins: Tensor | None,
) -> None:
    """Refuse arguments that do not go together, whatever the tensors hold."""
    if rule not in RULES:
        raise ValueError(f"verify: rule must be one of {', '.join(RULES)}, got '{rule}'")
    if rule == "typical" and not lossy:
        raise ValueError("verify: rule 'typical' is lossy and must be asked for with lossy=True")
    if probs is not None and logits is not None:
        raise ValueError("verify: draft_probs or draft_logits must be given, got both")
    if (probs is None and logits is None) != (draft_rows is None):
        raise ValueError("verify: draft_rows and a draft law must be given together, got one")
    if temperature is not None and coins is None and (seeds is None or positions is None):
        raise ValueError("verify: seeds and positions must be given with temperature, got None")


def check_drafts(
    rule: str,
    parents: Tensor,
    num_nodes: Tensor,
    kinds: Tensor | None,
    laws: Laws,
    vocab: int,
) -> None:
    """Refuse what the rule cannot test."""
    draft_rows, probs, logits, offsets = laws
    law = logits if probs is None else probs
    if law is not None:
        draft_ids = torch.arange(law.shape[2], device=law.device)
        ids = (draft_ids if offsets is None else draft_ids + offsets).tolist()
        if len(set(ids)) < len(ids) or not all(0 <= i < vocab for i in ids):
            raise ValueError(
                f"verify: draft ids must map to distinct target ids in [0, V) = [0, {vocab})"
            )
    for b, size in enumerate(num_nodes.clamp(0, parents.shape[1]).tolist()):
        above = parents[b, :size].tolist()
        kind = [0] * size if kinds is None else kinds[b, :size].tolist()
        _check_kinds(rule, b, above, kind)
        sampled = [above[i] for i in range(1, size) if kind[i] != DraftKind.ONEHOT]
        rows = [] if draft_rows is None else draft_rows[b, :size].tolist()
        for parent in sampled:
            if draft_rows is None or law is None or not 0 <= rows[parent] < law.shape[1]:
                raise ValueError(
                    f"verify: draft_rows[{b}, {parent}] must name the draft law of its sampled "
                    f"children, got {rows[parent] if rows else None}"
                )


def _check_kinds(rule: str, b: int, parents: list[int], kinds: list[int]) -> None:
    first_child: dict[int, int] = {}
    for i, (parent, kind) in enumerate(zip(parents, kinds, strict=True)):
        if i == 0:
            continue
        if kind not in tuple(DraftKind):
            raise ValueError(f"verify: kinds[{b}, {i}] must be 0, 1 or 2, got {kind}")
        is_sampled = kind != DraftKind.ONEHOT
        if is_sampled and rule in ("walk", "typical"):
            raise ValueError(
                f"verify: rule '{rule}' tests one-hot drafts only, got kinds[{b}, {i}] = {kind}"
            )
        if rule == "block" and parent != i - 1:
            raise ValueError(f"verify: rule 'block' tests chains, got parents[{b}, {i}] = {parent}")
        if rule == "gd_traversal" and is_sampled and first_child.get(parent, i) != i:
            raise ValueError(
                f"verify: rule 'gd_traversal' tests one sampled child, before the others, "
                f"got kinds[{b}, {i}] = {kind}"
            )
        first_child.setdefault(parent, i)
