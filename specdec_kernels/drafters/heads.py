"""Load trained heads of any supported kind from a folder."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import Checkpoint
from .eagle import Eagle1Head, Eagle3Head
from .medusa import MedusaHeads
from .mlp_speculator import MLPSpeculator
from .network import DraftNetwork

STREAMING = "speculative_streaming"
"""The `model_type` of speculative streams, which have no published format."""


def load_heads(folder: str | Path) -> DraftNetwork:
    """The heads in a folder, of the kind that its config and tensors tell.

    Args:
        folder: Medusa, IBM MLP speculator, EAGLE-1/2 or EAGLE-3, as published: `config.json`
            beside safetensors or PyTorch files; or speculative streams.

    Raises:
        ValueError: no heads there, or tensors that do not fit, by file, key, expected and found.
    """
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    if "medusa_num_heads" in config or config.get("model_type") == "medusa":
        return MedusaHeads(checkpoint)
    if config.get("model_type") == STREAMING:
        from ..hf.speculative_streaming import SpeculativeStreams  # the layers are transformers'

        return SpeculativeStreams(checkpoint)
    if "n_predict" in config or config.get("model_type") == "mlp_speculator":
        return MLPSpeculator(checkpoint)
    if any(name in checkpoint for name in ("midlayer.mlp.up_proj.weight", "d2t")):
        return Eagle3Head(checkpoint)
    if "draft_vocab_size" in config or "Eagle3" in str(config.get("architectures", "")):
        return Eagle3Head(checkpoint)
    if "fc.weight" in checkpoint or "model.fc.weight" in checkpoint:
        return Eagle1Head(checkpoint)
    raise ValueError(
        f"{checkpoint.folder / 'config.json'}: must describe Medusa (medusa_num_heads), an MLP "
        f"speculator (n_predict) or EAGLE (tensor fc.weight), found model_type "
        f"{config.get('model_type')!r}"
    )
