"""Trained weights on disk: config, tensors, and a card that says where they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TENSORS = "model.safetensors"

_CARD = """\
# {kind} for {model}

Drafts for {model} (hidden size {hidden_size}, vocabulary {vocab_size}) and no other target:
`specdec generate {use} <this folder>`.

- Data: {num_conversations} conversations, {num_tokens} tokens, which the target wrote itself.
  Left out: {num_dropped}, as copies or because they share {ngram} tokens in a row with a text
  of {excluded}.
- Training: {steps} steps ({epochs} epochs, {optimizers}, learning rate {rate:g}) in {seconds} s.
  The curve is in `training.json`.
- {parameters} parameters. Draft vocabulary: the {draft_vocab} most frequent tokens of the answers.
- `{file}`: sha256 `{digest}`
- Licence: {licence}

How often the likeliest draft token is the target's likeliest one, where the tokens before it are
given, on {num_held_out} conversations that were not learned:

| depth | share | loss, nats |
|---|---|---|
{rows}
"""


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], ids: Tensor
) -> Path:
    """Write `config.json` and the tensors, `d2t` for the draft vocabulary ids [U] among them.

    Returns:
        the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    ids = ids.cpu()
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    tensors["d2t"] = (ids - torch.arange(len(ids))).int()
    save_file(tensors, folder / TENSORS)
    return folder


def write_card(
    folder: Path,
    kind: str,
    model: str,
    licence: str,
    excluded: Sequence[Path],
    facts: Mapping[str, Any],
    use: str,
) -> None:
    """Write `README.md` beside the weights.

    Args:
        folder: of the weights.
        kind: of drafter.
        model: the target's name.
        licence: of the weights.
        excluded: files whose texts were not learned.
        facts: what `training.train` reports.
        use: the options of `specdec generate` that take it, but for the folder.
    """
    held_out = facts["held_out"]
    pairs = zip(held_out["hit_rate"], held_out["loss"], strict=True)
    text = _CARD.format(
        kind=kind,
        model=model,
        licence=licence,
        use=use,
        excluded=", ".join(path.name for path in excluded) or "no file",
        file=TENSORS,
        digest=hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest(),
        rows="\n".join(
            f"| {i} | {hit:.3f} | {loss:.3f} |" for i, (hit, loss) in enumerate(pairs, 1)
        ),
        **facts,
    )
    (folder / "README.md").write_text(text)
