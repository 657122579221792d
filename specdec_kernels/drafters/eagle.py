"""EAGLE: one decoder layer that continues the target's own features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention, silu

from ..ops import layer_stack, tree_attention, write_kv
from ..ops.layer_stack import LINEARS
from ..shapes import PAD
from ..tree import at_once, pad_rows
from .base import DraftContext
from .checkpoint import Checkpoint
from .growth import Block, Growth, chain
from .network import Level
from .rope import Rotary
from .trained import TrainedHeads, take_columns

_Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of new query, key and value [B, H or G, M, D]: [B, H, M, D]."""


class EagleHead(TrainedHeads):
    """A decoder layer whose entry i takes in token i + 1 and the feature of token i.

    The features of committed tokens are the target's, those along a draft the layer's own. Entries
    made from its own features leave the cache at the next step, where the target's are known.

    Args:
        checkpoint: `config.json` of a Llama with one layer, and its tensors.
        layer: name of the layer's tensors.
        input_size: features that go into its attention.

    Raises:
        ValueError: a missing tensor or one of a wrong shape, by file and key; a setting that
            changes the formula.
    """

    def __init__(self, checkpoint: Checkpoint, layer: str, input_size: int) -> None:
        number, config = checkpoint.number, checkpoint.config
        if number("num_hidden_layers", 1) != 1:
            raise checkpoint.refuse("num_hidden_layers", config["num_hidden_layers"], "1")
        if config.get("hidden_act", "silu") != "silu":
            raise checkpoint.refuse("hidden_act", config["hidden_act"], "silu")
        self.size = number("hidden_size")
        target_size = number("target_hidden_size", self.size)
        super().__init__(checkpoint, target_size, number("vocab_size"))
        self.num_heads = heads = number("num_attention_heads")
        self.num_groups = groups = number("num_key_value_heads", heads)
        self.head_dim = dim = number("head_dim", max(1, self.size // heads))
        self._epsilon = float(config.get("rms_norm_eps", 1e-6))
        self._rotary = Rotary(checkpoint, dim)
        self._num_hidden = inner = number("intermediate_size")
        size = self.size
        shapes = {
            "self_attn.q_proj.weight": [heads * dim, input_size],
            "self_attn.k_proj.weight": [groups * dim, input_size],
            "self_attn.v_proj.weight": [groups * dim, input_size],
            "self_attn.o_proj.weight": [size, heads * dim],
            "post_attention_layernorm.weight": [size],
            "mlp.gate_proj.weight": [inner, size],
            "mlp.up_proj.weight": [inner, size],
            "mlp.down_proj.weight": [size, inner],
        }
        self._layer = layer
        parts = zip(["self_attn"] * 4 + ["mlp"] * 3, LINEARS, strict=True)
        self._linears = [f"{layer}{part}.{linear}_proj.weight" for part, linear in parts]
        for name, shape in shapes.items():
            self.weights[layer + name] = checkpoint.take(layer + name, shape)
        for name in ("q_proj", "k_proj", "v_proj"):
            self._take_optional(checkpoint, f"{layer}self_attn.{name}.bias")
        if "embed_tokens.weight" in checkpoint:
            embeddings = checkpoint.take("embed_tokens.weight", [self.vocab_size, size])
            self.weights["embed_tokens.weight"] = embeddings
        elif size != self.target_size:
            checkpoint.take("embed_tokens.weight", [self.vocab_size, size])

    def _take_optional(self, checkpoint: Checkpoint, name: str) -> None:
        rows = len(self.weights[name.replace("bias", "weight")])
        if name in checkpoint:
            self.weights[name] = checkpoint.take(name, [rows])

    @abstractmethod
    def fuse(self, features: Tensor) -> Tensor:
        """The target's features [..., F] as the layer takes them, [..., size]."""

    @abstractmethod
    def enter(self, embeds: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the residual stream starts with, and what goes into the attention."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Draft logits [..., U] after the layer's output [..., size]."""

    def layer(
        self, tokens: Tensor, features: Tensor, positions: Tensor, attention: _Attend
    ) -> Tensor:
        """Output [B, M, size] after tokens [B, M] and features [B, M, size] of the tokens before
        them, at positions [B, M].
        """
        name = self._layer
        residual, inputs = self.enter(self._embed(tokens), features)
        q, k, v = (
            self.linear(f"{name}self_attn.{n}.weight", inputs, f"{name}self_attn.{n}.bias")
            .unflatten(-1, (-1, self.head_dim))
            .transpose(1, 2)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        out = attention(self._rotary(q, positions), self._rotary(k, positions), v)
        return self._after(out, residual)

    def _embed(self, tokens: Tensor) -> Tensor:
        own = self.weights.get("embed_tokens.weight")
        return self.target.embed(tokens) if own is None else own[tokens]

    def _after(self, attended: Tensor, residual: Tensor) -> Tensor:
        """The layer's output, of attended values [B, H, M, D]."""
        name = self._layer
        out = attended.transpose(1, 2).flatten(2)
        hidden = residual + self.linear(f"{name}self_attn.o_proj.weight", out)
        inner = self.norm(hidden, f"{name}post_attention_layernorm.weight")
        gate = silu(self.linear(f"{name}mlp.gate_proj.weight", inner))
        inner = gate * self.linear(f"{name}mlp.up_proj.weight", inner)
        return hidden + self.linear(f"{name}mlp.down_proj.weight", inner)

    def norm(self, values: Tensor, name: str) -> Tensor:
        """Root mean square norm with the weight of that name."""
        return self.rms_norm(values, self.weights[name], self._epsilon)

    def begin(self, batch: int, num_slots: int) -> None:
        """See `DraftNetwork`."""
        self._num_slots = num_slots
        self._known = [0] * batch  # entries of each row that are made from the target's features
        self._keys: Tensor | None = None
        weights = {name: self.weights[name] for name in self._linears}
        self._panels = self._packed.panels(weights)
        biases = [self.weights.get(name.replace("weight", "bias")) for name in weights]
        none = next(iter(weights.values())).new_empty(0)
        has_biases = any(bias is not None for bias in biases)
        self._biases = [none if bias is None else bias for bias in biases] if has_biases else []

    def start(self, context: DraftContext) -> Tensor:
        """See `DraftNetwork`."""
        device, dtype = self.target.device, self.target.dtype
        batch = len(context.sequences)
        features = [
            rows if active or not known else rows[:0]
            for rows, active, known in zip(
                self._features.take(), context.active, self._known, strict=True
            )
        ]
        counts = [len(rows) for rows in features]
        new = [
            list(s[known + 1 : known + 1 + count])
            for s, known, count in zip(context.sequences, self._known, counts, strict=True)
        ]
        if self._keys is None:
            ends = [
                len(s) + d + 1 for s, d in zip(context.sequences, context.max_depths, strict=True)
            ]
            shape = (batch, self.num_groups, max(ends) + self._num_slots, self.head_dim)
            self._keys, self._values = torch.zeros((2, *shape), device=device, dtype=dtype)
            self._angles = self._rotary.tables(torch.arange(shape[2], device=device), dtype)
        fused = self.fuse(torch.nn.utils.rnn.pad_sequence(features, batch_first=True))
        known = [before + count for before, count in zip(self._known, counts, strict=True)]
        lengths, last, self._lengths = at_once(
            device,
            torch.tensor(self._known, dtype=torch.int32, device="cpu"),
            torch.tensor([max(count, 1) - 1 for count in counts], device="cpu"),
            torch.tensor(known, dtype=torch.int32, device="cpu"),
        )
        if not any(self._known):
            hidden = self._prefill(pad_rows(new, torch.int64, device), fused)
        else:
            tree = chain(new, device)
            hidden = self._compute(tree, tree.tokens, fused, lengths)
        self._known = known
        roots = take_columns(hidden, last[:, None])
        # Column 0 is the root's output; node i of the network is column i + 1.
        self._outputs, self._growth = roots, Growth(batch, device)
        return self.logits(roots[:, 0])

    def extend(self, level: Level) -> Tensor:
        """See `DraftNetwork`."""
        tree = self._growth.add(level)
        # The whole tree again: a few more rows cost little beside the weights that are read anyway.
        above = [[parent - PAD for parent in row] for row in self._growth.parents]
        parents, tokens = at_once(
            self._outputs.device,
            pad_rows(above, torch.int64),
            pad_rows(self._growth.tokens, torch.int64),
        )
        features = take_columns(self._outputs, parents)
        hidden = self._compute(tree, tokens, features, self._lengths)
        self._outputs = torch.cat([self._outputs[:, :1], hidden], 1)
        return self.logits(take_columns(hidden, tree.places))

    def _prefill(self, tokens: Tensor, features: Tensor) -> Tensor:
        """The first entries of all rows; padding, on the right, is hidden by the causal mask."""
        keys, values = self._buffers()
        width = tokens.shape[1]

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys[:, :, :width], values[:, :, :width] = k, v
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        positions = torch.arange(width, device=tokens.device).expand_as(tokens)
        return self.layer(tokens, features, positions, attention)

    def _compute(self, tree: Block, tokens: Tensor, features: Tensor, lengths: Tensor) -> Tensor:
        """Outputs [B, N, size] of all nodes of a tree behind the first `lengths` [B] entries."""
        keys, values = self._buffers()
        positions = lengths[:, None] + tree.depths
        scale = self.head_dim**-0.5
        if self._panels is None:

            def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                write_kv(k, v, keys, values, lengths, tree.num_nodes)
                out: Tensor = tree_attention(
                    q, keys, values, tree.ancestors, tree.depths, lengths, tree.num_nodes,
                    scale=scale,
                )[0]  # fmt: skip
                return out

            return self.layer(tokens, features, positions, attention)
        residual, entry = self.enter(self._embed(tokens), features)
        norm = self.weights[f"{self._layer}post_attention_layernorm.weight"]
        cos, sin = (embedding(positions, table) for table in self._angles)
        out: Tensor = layer_stack(
            residual, cos, sin, [keys], [values],
            tree.ancestors, tree.depths, lengths, tree.num_nodes,
            [norm, norm], self._panels, self._biases, [], [0],
            self.num_heads, self._num_hidden, self._epsilon, scale, entry=entry,
        )  # fmt: skip
        return out

    def _buffers(self) -> tuple[Tensor, Tensor]:
        assert self._keys is not None
        return self._keys, self._values

    _values: Tensor
    _angles: tuple[Tensor, Tensor]
    _growth: Growth


class Eagle1Head(EagleHead):
    """EAGLE-1 and EAGLE-2: features are what goes into the target's head, which is the draft's too.

        f_{i+1} = layer(F [E[x_{i+1}]; f_i]), logits = H f_{i+1}, without norms around them

    Args:
        checkpoint: tensors `fc.weight`, `fc.bias` (optional), `layers.0.*` without
            `input_layernorm`, `embed_tokens.weight` (optional: the target's).

    Source: Li et al., "EAGLE", 2401.15077, section 4.1.
    """

    def __init__(self, checkpoint: Checkpoint | str | Path) -> None:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint(checkpoint)
        checkpoint.strip(["model."])
        size = checkpoint.number("hidden_size")
        super().__init__(checkpoint, "layers.0.", size)
        self.weights["fc.weight"] = checkpoint.take("fc.weight", [size, 2 * size])
        if "fc.bias" in checkpoint:
            self.weights["fc.bias"] = checkpoint.take("fc.bias", [size])
        checkpoint.refuse_others("layers.", ignore=("0.self_attn.rotary_emb.",))

    def fuse(self, features: Tensor) -> Tensor:
        """See `EagleHead`."""
        return features

    def enter(self, embeds: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """See `EagleHead`."""
        joined = torch.cat([embeds, features], -1)
        hidden = self.linear("fc.weight", joined, "fc.bias")
        return hidden, hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """See `EagleHead`."""
        return self.target.logits(hidden)


class Eagle3Head(EagleHead):
    """EAGLE-3: features of three layers, fused; its own head, over a vocabulary of its own.

        g_i = F [l_i; m_i; h_i] at committed tokens, else the layer's last output;
        a = layer(residual = g_i, attention over [norm E[x_{i+1}]; norm g_i]);  logits = H norm a

    Args:
        checkpoint: tensors `fc.weight`, `midlayer.*`, `norm.weight`, `d2t` (draft id u is target id
            `u + d2t[u]`; without it the vocabularies agree), `embed_tokens.weight` (optional: the
            target's), `lm_head.weight` (published heads have it; here it may be left out: the
            target's rows).

    Source: Li et al., "EAGLE-3", 2503.01840, section 3; the layers 2, L / 2 and L - 3 as published.
    """

    def __init__(self, checkpoint: Checkpoint | str | Path) -> None:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint(checkpoint)
        checkpoint.strip(["model."])
        size = checkpoint.number("hidden_size")
        super().__init__(checkpoint, "midlayer.", 2 * size)
        draft_vocab = checkpoint.number("draft_vocab_size", self.vocab_size)
        shapes = {
            "fc.weight": [size, 3 * self.target_size],
            "midlayer.hidden_norm.weight": [size],
            "midlayer.input_layernorm.weight": [size],
            "norm.weight": [size],
        }
        self.uses_target_rows = "lm_head.weight" not in checkpoint and size == self.target_size
        if not self.uses_target_rows:
            shapes["lm_head.weight"] = [draft_vocab, size]
        self.weights |= {name: checkpoint.take(name, shape) for name, shape in shapes.items()}
        checkpoint.refuse_others("midlayer.", ignore=("self_attn.rotary_emb.",))
        self.take_draft_vocab(checkpoint, draft_vocab)

    def watched(self, num_layers: int) -> Sequence[int]:
        """See `TrainedHeads`."""
        return eagle3_layers(num_layers)

    def fuse(self, features: Tensor) -> Tensor:
        """See `EagleHead`."""
        return self.linear("fc.weight", features)

    def enter(self, embeds: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """See `EagleHead`."""
        normed = self.norm(features, "midlayer.hidden_norm.weight")
        embeds = self.norm(embeds, "midlayer.input_layernorm.weight")
        return features, torch.cat([embeds, normed], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `EagleHead`."""
        return self.output_head("lm_head.weight", self.norm(hidden, "norm.weight"))


def eagle3_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers of a target whose inputs are EAGLE-3's features."""
    return (2, num_layers // 2, num_layers - 3)
