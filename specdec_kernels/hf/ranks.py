"""Several processes, one decision: ranks of a tensor-parallel model go by the first one's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Agreement = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


def agreement(model: PreTrainedModel) -> Agreement:
    """What makes all ranks of a tensor-parallel model decide alike; nothing for other models.

    Every rank holds all logits, so all would decide alike anyway, but for seeds, clocks and
    rounding that differs between devices.
    """
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    dist: Any = torch.distributed
    if not meshes or not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda decision: decision
    group = meshes[0].get_group()
    first = dist.get_process_group_ranks(group)[0]

    def first_rank_decides(decision: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # one message: every value is an integer
        flat = torch.cat([t.flatten().long() for t in decision])
        dist.broadcast(flat, src=first, group=group)
        parts = flat.split([t.numel() for t in decision])
        pairs = zip(parts, decision, strict=True)
        return tuple(part.reshape(t.shape).to(t.dtype) for part, t in pairs)

    return first_rank_decides
