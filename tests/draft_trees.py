"""Draft trees of every kind, and a model that often agrees with the tiny one."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from specdec_kernels import SampledTree, TopKTree

TREES = {
    "top-k": TopKTree(14, depth=4, width=3),
    "chain": SampledTree((1, 1, 1, 1)),
    "distinct": SampledTree((3, 2, 1)),
    "independent": SampledTree((3, 2), replacement=True),
    "greedy drafts": SampledTree((3, 2, 1), greedy_drafts=True),
}


def similar_to(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a little noise on its weights."""
    similar = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    for parameter in similar.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.01
    return similar
