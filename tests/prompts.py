"""Left-padded batches for the tests of generation."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def random_prompts(lengths: tuple[int, ...], vocab: int, seed: int = 1) -> list[Tensor]:
    """Token rows without the padding token 0."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator) for n in lengths]


def left_pad(rows: list[Tensor], pad: int = 0) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of a ragged batch."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = row
        mask[b, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: PreTrainedModel, row: Tensor, new_tokens: int) -> list[int]:
    """What `generate` alone writes after one prompt, prompt included."""
    inputs = left_pad([row])
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0].tolist()
