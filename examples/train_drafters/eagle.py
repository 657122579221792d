"""EAGLE-3: a decoder layer that continues the target's features, trained along its own drafts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_checkpoint
from features import Batch
from torch import Tensor
from training import HeadsSystem, later

from specdec_kernels.drafters.eagle import Eagle3Head
from specdec_kernels.hf.features import HFTargetView

EMBEDS = 0.3
"""First weights of the embeddings, over what random weights of that many inputs would have."""


class Eagle(HeadsSystem):
    """The target's embeddings and the rows of its head are used, not trained.

    Args:
        target: whose features it continues.
        ids: [U] int64 sorted, the draft vocabulary.
        folder: where the weights go.
        num_depths: how deep the drafts are along which it is trained.

    Source: Li et al., "EAGLE-3", 2503.01840, section 3.2 (training-time test).
    """

    muon, muon_rate = ("fc.", "midlayer."), 10.0

    def __init__(self, target: HFTargetView, ids: Tensor, folder: Path, num_depths: int) -> None:
        config = _config(target, len(ids))
        initial = write_checkpoint(folder / "initial", config, _initial(target, config), ids)
        self.head = Eagle3Head(initial)
        super().__init__(self.head, config, target, ids, num_depths)

    def outputs(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """See `System`. At depth k the feature of an entry is the output, at depth k - 1, of the
        entry before.
        """
        tokens = batch.tokens[:, 1:-1]
        features = self.head.fuse(batch.inputs[:, :-2].flatten(2))
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        attention = _AlongDrafts()
        for _ in range(self.num_depths):
            out = self.head.layer(tokens, features, positions, attention)
            rows = self.head.output_weight("lm_head.weight")
            yield self.head.norm(out, "norm.weight"), rows
            features = later(out)


class _AlongDrafts:
    """Attention of the entries of one depth after another.

    At depth k, entry i sees the entries up to i - k made from the target's features, and of the k
    after them one each from the depths 1 to k: what its cache holds when it drafts. The first k
    entries see others that have no meaning.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []  # of each depth, [B, H, M, D]
        self._values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[1] // k.shape[1]
        self._keys.append(k.repeat_interleave(heads, 1))
        self._values.append(v.repeat_interleave(heads, 1))
        depth, width = len(self._keys) - 1, q.shape[2]
        q = q * q.shape[-1] ** -0.5
        visible = torch.ones(width, width, dtype=torch.bool, device=q.device).tril(-depth)
        scores = [(q @ self._keys[0].transpose(2, 3)).masked_fill(~visible, -torch.inf)]
        for i in range(1, depth + 1):
            scores.append((q * self._keys[i].roll(depth - i, 2)).sum(-1, keepdim=True))
        probs = torch.cat(scores, -1).softmax(-1).to(v.dtype)
        out = probs[..., :width] @ self._values[0]
        for i in range(1, depth + 1):
            out = out + probs[..., width + i - 1, None] * self._values[i].roll(depth - i, 2)
        return out


def _config(target: HFTargetView, draft_vocab: int) -> dict[str, Any]:
    model: Any = target.target.model
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": target.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", heads),
        "head_dim": getattr(config, "head_dim", None) or target.hidden_size // heads,
        "num_hidden_layers": 1,
        "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", 10000.0),
        "hidden_act": "silu",
        "vocab_size": target.vocab_size,
        "draft_vocab_size": draft_vocab,
    }


def _initial(target: HFTargetView, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The target's last layer, which attends to the features; random small weights for the
    embeddings, and for what that layer does not have. The features of the highest layer pass
    through, and are normed as before the target's head.
    """
    size, inner = config["hidden_size"], config["intermediate_size"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    generator = torch.Generator().manual_seed(0)
    decoder: Any = target.target.model.get_decoder()
    last = decoder.layers[-1].state_dict()

    def begin(name: str, *shape: int) -> Tensor:
        own = last.get(f"{name}.weight")
        if own is not None and own.shape == shape:
            return own.float()
        if len(shape) == 1:
            return torch.ones(shape)
        return torch.randn(shape, generator=generator) / math.sqrt(shape[1])

    def attend(name: str, rows: int) -> Tensor:
        embeds = torch.randn((rows, size), generator=generator) / math.sqrt(2 * size)
        return torch.cat([EMBEDS * embeds, begin(name, rows, size).cpu()], 1)

    fuse = torch.zeros(size, 3 * size)
    fuse[:, 2 * size :] = torch.eye(size)
    norm = getattr(getattr(decoder, "norm", None), "weight", torch.ones(size))
    return {
        "fc.weight": fuse,
        "midlayer.self_attn.q_proj.weight": attend("self_attn.q_proj", q_size),
        "midlayer.self_attn.k_proj.weight": attend("self_attn.k_proj", kv_size),
        "midlayer.self_attn.v_proj.weight": attend("self_attn.v_proj", kv_size),
        "midlayer.self_attn.o_proj.weight": begin("self_attn.o_proj", size, q_size),
        "midlayer.mlp.gate_proj.weight": begin("mlp.gate_proj", inner, size),
        "midlayer.mlp.up_proj.weight": begin("mlp.up_proj", inner, size),
        "midlayer.mlp.down_proj.weight": begin("mlp.down_proj", size, inner),
        "midlayer.hidden_norm.weight": begin("input_layernorm", size),
        "midlayer.input_layernorm.weight": torch.ones(size),
        "midlayer.post_attention_layernorm.weight": begin("post_attention_layernorm", size),
        "norm.weight": norm.detach().float(),
    }
