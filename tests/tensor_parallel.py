"""Run by torchrun: one rank of a tensor-parallel generation; writes what this rank emitted."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from prompts import left_pad, random_prompts
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.distributed import DistributedConfig

import specdec_kernels
from specdec_kernels import DraftContext, Drafter, OracleDrafter, Proposal
from specdec_kernels.drafters import ModelDrafter, SampledTree
from specdec_kernels.hf import DraftModel

VOCAB = 101
LENGTHS = (9, 14, 6)
NEW = 14
SEEDS = [3, 4, 5]
END = 8
"""New tokens after which the first rank's criterion ends a row."""


class Contrary(Drafter):
    """Drafts other trees on every rank, of other sizes, and breaks down on the second."""

    max_nodes = 9

    def __init__(self, rank: int, truth: list[list[int]]) -> None:
        self._rank, self._truth, self._step = rank, truth, 0

    def propose(self, context: DraftContext) -> Proposal:
        self._step += 1
        if self._rank and self._step % 3 == 0:
            raise RuntimeError("only here")
        rows = []
        for sequence, text, active in zip(
            context.sequences, self._truth, context.active, strict=True
        ):
            size = len(sequence)
            true = text[size : size + 3]
            wrong = [(t + 1 + self._rank) % VOCAB for t in true[: 1 + self._rank]]
            tokens = [sequence[-1], *(wrong + true if self._rank else true + wrong)]
            parents = [-1, *range(len(tokens) - 1)]
            rows.append((tokens, parents) if active else ([], []))
        return Proposal.onehot(rows, context.device)


class Impatient(StoppingCriteria):
    """Ends rows earlier on the second rank."""

    def __init__(self, rank: int) -> None:
        self._limit = max(LENGTHS) + (END - 3 if rank else END)

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= self._limit])


def generations(
    model: PreTrainedModel, truth: list[list[int]], draft: PreTrainedModel, rank: int
) -> dict[str, list[list[int]]]:
    """Texts by case; what is not the model's differs between ranks."""
    inputs = left_pad(random_prompts(LENGTHS, VOCAB))
    other = copy.deepcopy(draft)
    if rank:
        other.lm_head.weight.data = other.lm_head.weight.data.flip(0)
    sampled = SampledTree((2, 1, 1))
    greedy = {"do_sample": False}
    seeded = {"do_sample": True, "seed": SEEDS}
    stop = StoppingCriteriaList([Impatient(rank)])
    cases: dict[str, dict] = {
        "greedy": {"drafter": OracleDrafter(truth, VOCAB, max_nodes=12), **greedy},
        "sampled without seed": {"drafter": "suffix", "do_sample": True},
        "contrary": {"drafter": Contrary(rank, truth), **greedy},
        "contrary, sampled": {"drafter": Contrary(rank, truth), **seeded},
        "contrary, processed": {
            "drafter": Contrary(rank, truth),
            **greedy,
            "repetition_penalty": 1.3,
            "output_scores": True,
        },
        "sampled drafts": {"drafter": ModelDrafter(DraftModel(draft), sampled), **seeded},
        "contrary sampled drafts": {"drafter": ModelDrafter(DraftModel(other), sampled), **seeded},
        "assistant": {"assistant_model": other, **greedy},
        "budget": {"drafter": "suffix", "budget": True, **greedy},
        "criteria": {"drafter": Contrary(rank, truth), **greedy, "stopping_criteria": stop},
    }
    texts = {}
    for name, options in cases.items():
        output = specdec_kernels.generate(
            model, **inputs, max_new_tokens=NEW, pad_token_id=0, return_dict_in_generate=True,
            **options,
        )  # fmt: skip
        texts[name] = output.sequences.tolist()
    return texts


def main() -> None:
    """Arguments: the folder of the model, the true texts and the draft model; "plan" or "mesh"."""
    folder, how = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    options: dict = {"tp_plan": "auto"}
    if how == "mesh":
        options = {"distributed_config": DistributedConfig(tp_size=2)}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    draft = LlamaForCausalLM.from_pretrained(folder / "draft").eval()
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    truth = json.loads((folder / "truth.json").read_text())
    is_split = any(hasattr(p, "device_mesh") for p in model.parameters())
    record = {"is_split": is_split, "texts": generations(model, truth, draft, rank)}
    (folder / f"{how}{rank}.json").write_text(json.dumps(record))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
