"""IBM's MLP speculator: heads that see the target's last hidden state and the tokens since."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, linear

from ..shapes import PAD
from ..tree import pad_rows
from .base import DraftContext
from .checkpoint import Checkpoint
from .medusa import check_sizes, newest
from .network import DraftNetwork, FeatureQueue, Level, TargetView

_EPSILON = 1e-6


class MLPSpeculator(DraftNetwork):
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

    Raises:
        ValueError: a missing tensor or one of a wrong shape, by file and key.

    Source: Wertheimer et al., 2404.19124, section 3; the weighting and the norm as in the
        published heads.
    """

    def __init__(self, checkpoint: Checkpoint | str | Path) -> None:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint(checkpoint)
        self.folder = checkpoint.folder
        checkpoint.strip(["speculator."])
        number = checkpoint.number
        self.max_depth = count = number("n_predict", 3)
        self.vocab_size, self.hidden_size = number("vocab_size"), number("emb_dim")
        inner = self.hidden_size
        if checkpoint.config.get("inner_dim"):  # 0 stands for emb_dim
            inner = number("inner_dim")
        self.scale_input = bool(checkpoint.config.get("scale_input", False))
        is_tied = bool(checkpoint.config.get("tie_weights", False))
        shapes = {
            "emb.{}.weight": [self.vocab_size, inner],
            "proj.{}.weight": [inner, inner],
            "ln.{}.weight": [inner],
            "ln.{}.bias": [inner],
            "head.{}.weight": [self.vocab_size, inner],
        }
        self._weights: list[dict[str, Tensor]] = []
        for i in range(count):
            heads = {}
            for name, shape in shapes.items():
                first = 1 if name.startswith("proj") else 0  # the first one has its own input size
                stored = min(i, first) if is_tied else i
                if name.startswith("proj") and i == 0:
                    shape = [inner, self.hidden_size]
                heads[name.replace(".{}", "")] = checkpoint.take(name.format(stored), shape)
            self._weights.append(heads)
        tied = tuple(name.split("{")[0] for name in shapes) if is_tied else ()
        checkpoint.refuse_others(ignore=tied)
        state_weight = 0.5 ** (0.5 / count)
        self._emb_scale = math.sqrt((1 - state_weight**2) * inner / 2) / state_weight

    def step(self, i: int, state: Tensor, tokens: Tensor) -> Tensor:
        """The state [..., d] after tokens [...] from the state [..., F or d] before them."""
        w = self._weights[i]
        state = linear(state, w["proj.weight"])
        state = state + self._emb_scale * embedding(tokens, w["emb.weight"])
        return gelu(_norm(state) * w["ln.weight"] + w["ln.bias"])

    def head(self, i: int, state: Tensor) -> Tensor:
        """Logits [..., V] of head i."""
        return linear(state, self._weights[i]["head.weight"])

    @contextmanager
    def attach(self, target: TargetView) -> Iterator[None]:
        """See `DraftNetwork`."""
        check_sizes(self.folder, target, self.hidden_size, self.vocab_size)
        self._weights = [
            {name: tensor.to(target.device, target.dtype) for name, tensor in row.items()}
            for row in self._weights
        ]
        with target.watch(only_last=True) as self._features:
            yield

    def begin(self, batch: int, num_slots: int) -> None:
        """See `DraftNetwork`."""
        self._hidden: list[Tensor | None] = [None] * batch

    def start(self, context: DraftContext) -> Tensor:
        """See `DraftNetwork`."""
        hidden = newest(self._features, self._hidden)
        if self.scale_input:
            hidden = _norm(hidden) / math.sqrt(2)
        roots = torch.tensor([s[-1] for s in context.sequences], device=hidden.device)
        # Column 0 is the root's state; node i of the network is column i + 1.
        self._states = self.step(0, hidden, roots)[:, None]
        self._sizes = [1] * len(roots)
        self._depth = 0
        return self.head(0, self._states[:, 0])

    def extend(self, level: Level) -> Tensor:
        """See `DraftNetwork`."""
        self._depth += 1
        device = self._states.device
        tokens = pad_rows([[t for t, _ in row] for row in level], torch.int64, device)
        parents = pad_rows([[p - PAD for _, p in row] for row in level], torch.int64, device)
        return self.head(self._depth, self._append(level, parents, tokens))

    def _append(self, level: Level, parents: Tensor, tokens: Tensor) -> Tensor:
        """The states [B, M, d] of new nodes; every state of the level is kept in its column."""
        size = self._states.shape[2]
        above = self._states.gather(1, parents[:, :, None].expand(-1, -1, size))
        states = self.step(self._depth, above, tokens)
        self._states = place(self._states, states, self._sizes)
        self._sizes = [size + len(row) for size, row in zip(self._sizes, level, strict=True)]
        return states

    _features: FeatureQueue


def place(kept: Tensor, new: Tensor, sizes: list[int]) -> Tensor:
    """[B, K, F] with new rows [B, M, F] behind the first `sizes[b]` ones of row b."""
    width = new.shape[1]
    grown = torch.cat([kept, torch.zeros_like(new)], 1)
    columns = torch.tensor(sizes, device=kept.device)[:, None]
    columns = columns + torch.arange(width, device=kept.device)
    return grown.scatter(1, columns[:, :, None].expand(-1, -1, kept.shape[2]), new)


def _norm(state: Tensor) -> Tensor:
    square = state.float().pow(2).mean(-1, keepdim=True)
    return (state.float() * torch.rsqrt(square + _EPSILON)).to(state.dtype)
