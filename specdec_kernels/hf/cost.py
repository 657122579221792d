"""Measure what a forward pass over n tokens costs, so that trees can be sized by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from ..budget import CostCurve
from ..pass_timer import PassTimer
from ..shapes import PAD
from ..tree import TokenTree
from .attention import tree_attention_in
from .fusing import fast_layers
from .target import HFTarget

NODES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


def cost_key(model: PreTrainedModel) -> str:
    """What a cost depends on: architecture and size, dtype, device and threads."""
    config: Any = model.config.get_text_config(decoder=True)
    size = f"{config.num_hidden_layers}x{config.hidden_size}"
    dtype = str(model.dtype).removeprefix("torch.")
    device = model.device.type
    name = torch.cuda.get_device_name(model.device) if device == "cuda" else device
    return f"{config.model_type}-{size}-{dtype}-{name}-{torch.get_num_threads()}"


@torch.no_grad()
def measure_cost(
    model: PreTrainedModel,
    *,
    nodes: Sequence[int] = NODES,
    num_prefix: int = 256,
    repeats: int = 15,
    progress: Callable[[str], None] | None = None,
) -> CostCurve:
    """Median time of a forward pass over chains of n draft tokens, all sizes in turn.

    Args:
        model: the target.
        nodes: sizes to time; 1 is always timed.
        num_prefix: committed tokens before the tree.
        repeats: of each size, after one that is not counted.
        progress: called after every round.
    """
    sizes = sorted({1, *nodes})
    target = HFTarget(model, num_prefix + max(sizes))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        target.vocab_size, (num_prefix + max(sizes),), generator=generator, device="cpu"
    )
    drafts = tokens[num_prefix:].tolist()
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    timer = PassTimer(target.device)
    with tree_attention_in(model), fast_layers(model):
        target.prefill([tokens[:num_prefix].tolist()])
        for round_ in range(repeats + 1):
            for size in sizes:
                chain = (drafts[:size], [PAD, *range(size - 1)])
                tree = TokenTree.from_rows([chain], target.device)
                timer.start()
                target.forward(tree)
                timer.stop()
                if round_:
                    seconds[size].append(timer.seconds())
            if progress is not None:
                progress(f"round {round_} of {repeats}")
    curve = [median(seconds[size]) for size in sizes]
    # a larger pass is never cheaper: what says so is noise
    rising = [max(curve[: i + 1]) for i in range(len(curve))]
    return CostCurve(tuple(sizes), tuple(rising))
