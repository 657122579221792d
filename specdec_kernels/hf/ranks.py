"""Several processes, one decision: ranks of a tensor-parallel model go by the first one's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..decoding import Agree, alone


def agreement(model: PreTrainedModel) -> Agree:
    """What makes all ranks of a tensor-parallel model decide alike; nothing for other models.

    Every rank holds all logits. What may differ are drafts (a drafter that goes by the clock, or
    fails on one of them), seeds, time limits, and rounding between devices.

    Raises:
        ValueError: a mesh with another dimension than tensor parallelism.
    """
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    dist: Any = torch.distributed
    if not meshes or not dist.is_initialized() or dist.get_world_size() == 1:
        return alone
    mesh = meshes[0]
    names = mesh.mesh_dim_names or ("tp",)
    others = [
        name for name, size in zip(names, mesh.shape, strict=True) if size > 1 and name != "tp"
    ]
    if others:
        raise ValueError(
            f"{type(model).__name__} must be split by tensor parallelism alone, "
            f"got a mesh of {dict(zip(names, mesh.shape, strict=True))}"
        )
    group = (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()
    first = dist.get_process_group_ranks(group)[0]

    def first_rank_decides(decision: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # one message: every value is an integer
        flat = torch.cat([t.flatten().long() for t in decision])
        dist.broadcast(flat, src=first, group=group)
        parts = flat.split([t.numel() for t in decision])
        pairs = zip(parts, decision, strict=True)
        return tuple(part.reshape(t.shape).to(t.dtype) for part, t in pairs)

    return first_rank_decides
