"""Run by torchrun: one rank of a tensor-parallel generation; writes what this rank emitted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from prompts import left_pad, random_prompts
from transformers import AutoModelForCausalLM

import specdec_kernels
from specdec_kernels import OracleDrafter

VOCAB = 101
LENGTHS = (9, 14, 6)
NEW = 14


def generations(model, truth: list[list[int]]) -> list[list[list[int]]]:
    """Greedy, and sampled without a seed that the ranks share."""
    inputs = left_pad(random_prompts(LENGTHS, VOCAB))
    drafter = OracleDrafter(truth, VOCAB, max_nodes=12)
    options = {"max_new_tokens": NEW, "drafter": drafter, "pad_token_id": 0}
    texts = [specdec_kernels.generate(model, **inputs, do_sample=False, **options)]
    texts.append(specdec_kernels.generate(model, **inputs, do_sample=True, **options))
    return [t.tolist() for t in texts]


def main() -> None:
    """Arguments: the model's folder, which also holds the true texts."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    truth = json.loads((folder / "truth.json").read_text())
    is_split = any(hasattr(p, "device_mesh") for p in model.parameters())
    record = {"is_split": is_split, "texts": generations(model, truth)}
    (folder / f"rank{rank}.json").write_text(json.dumps(record))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
