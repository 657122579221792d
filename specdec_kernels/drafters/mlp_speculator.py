"""IBM's MLP speculator: heads that see the target's last hidden state and the tokens since."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.special import ndtr

from ..shapes import PAD
from ..tree import at_once, pad_rows
from .base import DraftContext
from .checkpoint import Checkpoint
from .network import Level
from .trained import TrainedHeads, newest, take_columns

_EPSILON = 1e-6


class MLPSpeculator(TrainedHeads):
    """A state runs along each path; head i takes token x_i in and guesses the one after it:

        s_{i+1} = GELU(LN_i(W_i s_i + (b / a) E_i[x_i])),  logits_i = H_i s_{i+1},

    with a = 0.5^(0.5 / n), b = sqrt((1 - a^2) d / 2), s_0 the hidden state before the root x_0
    (normalised and divided by sqrt 2 with `scale_input`), and LN the root mean square norm with
    weight and bias.

    Args:
        checkpoint: `config.json` with `n_predict`, `inner_dim`, `emb_dim`, `vocab_size`,
            `tie_weights`, `scale_input`; tensors `emb.i.weight`, `proj.i.weight`, `ln.i.weight`,
            `ln.i.bias`, `head.i.weight`, bare or behind `speculator.`. Tied ones may be there
            once.

    Beyond the published format, `head.i.weight` may cover a draft vocabulary (`d2t` as in
    `Eagle3Head`, `draft_vocab_size` in the config), and all `emb.i.weight` may be left out: E_i are
    then the target's embeddings, with d = `emb_dim`.

    Raises:
        ValueError: a missing tensor or one of a wrong shape, by file and key.

    Source: Wertheimer et al., 2404.19124, section 3; the weighting and the norm as in the
        published heads.
    """

    sees_newest = True

    def __init__(self, checkpoint: Checkpoint | str | Path) -> None:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint(checkpoint)
        checkpoint.strip(["speculator."])
        number = checkpoint.number
        self.max_depth = count = number("n_predict", 3)
        size = inner = number("emb_dim")
        super().__init__(checkpoint, size, number("vocab_size"))
        if checkpoint.config.get("inner_dim"):  # 0 stands for emb_dim
            inner = number("inner_dim")
        self.scale_input = bool(checkpoint.config.get("scale_input", False))
        self._is_tied = bool(checkpoint.config.get("tie_weights", False))
        draft_vocab = number("draft_vocab_size", self.vocab_size)
        shapes = {
            "emb.{}.weight": [self.vocab_size, inner],
            "proj.{}.weight": [inner, inner],
            "ln.{}.weight": [inner],
            "ln.{}.bias": [inner],
            "head.{}.weight": [draft_vocab, inner],
        }
        self._has_embeddings = "emb.0.weight" in checkpoint or inner != size
        if not self._has_embeddings:
            del shapes["emb.{}.weight"]
        for i in range(count):
            for name, shape in shapes.items():
                key = self._key(name, i)
                into = [inner, size] if key == "proj.0.weight" else shape
                self.weights[key] = checkpoint.take(key, into)
        self.take_draft_vocab(checkpoint, draft_vocab)
        tied = tuple(name.split("{")[0] for name in shapes) if self._is_tied else ()
        checkpoint.refuse_others(ignore=tied)
        state_weight = 0.5 ** (0.5 / count)
        self._emb_scale = math.sqrt((1 - state_weight**2) * inner / 2) / state_weight

    def _key(self, name: str, i: int) -> str:
        """Which tensor head i uses; the first projection has an input size of its own."""
        first = 1 if name.startswith("proj") else 0
        return name.format(min(i, first) if self._is_tied else i)

    def _weight(self, name: str, i: int) -> Tensor:
        return self.weights[self._key(name, i)]

    def first_state(self, hidden: Tensor) -> Tensor:
        """s_0 [..., F] from the target's hidden state [..., F]."""
        if not self.scale_input:
            return hidden
        return self.rms_norm(hidden, hidden.new_full(hidden.shape[-1:], 0.5**0.5), _EPSILON)

    def step(self, i: int, state: Tensor, tokens: Tensor) -> Tensor:
        """The state [..., d] after tokens [...] from the state [..., F or d] before them."""
        if self._has_embeddings:
            embeds = embedding(tokens, self._weight("emb.{}.weight", i))
        else:
            embeds = self.target.embed(tokens)
        projected = self.linear(self._key("proj.{}.weight", i), state)
        state = torch.add(projected, embeds, alpha=self._emb_scale)
        weight, bias = self._weight("ln.{}.weight", i), self._weight("ln.{}.bias", i)
        normed = (self.rms_norm(state, weight, _EPSILON) + bias).float()
        active: Tensor = normed * ndtr(normed)  # GELU, for which PyTorch takes twice as long
        return active.to(state.dtype)

    def head(self, i: int, state: Tensor) -> Tensor:
        """Logits [..., U] of head i."""
        return self.output_head(self._key("head.{}.weight", i), state)

    def last_layer(self, i: int) -> Tensor:
        """[U, d] of head i."""
        return self.output_weight(self._key("head.{}.weight", i))

    def begin(self, batch: int, num_slots: int) -> None:
        """See `DraftNetwork`."""
        self._hidden: list[Tensor | None] = [None] * batch

    def start(self, context: DraftContext) -> Tensor:
        """See `DraftNetwork`."""
        hidden = self.first_state(newest(self._features, self._hidden))
        roots = torch.tensor([s[-1] for s in context.sequences], device=hidden.device)
        # Column 0 is the root's state; node i of the network is column i + 1.
        self._states = self.step(0, hidden, roots)[:, None]
        self._sizes = [1] * len(roots)
        self._depth = 0
        return self.head(0, self._states[:, 0])

    def extend(self, level: Level) -> Tensor:
        """See `DraftNetwork`."""
        self._depth += 1
        tokens, parents = at_once(
            self._states.device,
            pad_rows([[t for t, _ in row] for row in level], torch.int64),
            pad_rows([[p - PAD for _, p in row] for row in level], torch.int64),
        )
        return self.head(self._depth, self._append(level, parents, tokens))

    def _append(self, level: Level, parents: Tensor, tokens: Tensor) -> Tensor:
        """The states [B, M, d] of new nodes; every state of the level is kept in its column."""
        states = self.step(self._depth, take_columns(self._states, parents), tokens)
        self._states = place(self._states, states, self._sizes)
        self._sizes = [size + len(row) for size, row in zip(self._sizes, level, strict=True)]
        return states


def place(kept: Tensor, new: Tensor, sizes: list[int]) -> Tensor:
    """[B, K, F] with new rows [B, M, F] behind the first `sizes[b]` ones of row b."""
    if all(size == kept.shape[1] for size in sizes):
        return torch.cat([kept, new], 1)
    width = new.shape[1]
    grown = torch.cat([kept, torch.zeros_like(new)], 1)
    columns = torch.tensor(sizes, device=kept.device)[:, None]
    columns = columns + torch.arange(width, device=kept.device)
    return grown.scatter(1, columns[:, :, None].expand(-1, -1, kept.shape[2]), new)
