"""Medusa: heads on the target's last hidden state, each for a token further ahead."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.nn.functional import silu

from .base import DraftContext
from .checkpoint import Checkpoint
from .network import Level
from .trained import TrainedHeads, newest


class MedusaHeads(TrainedHeads):
    """Head i guesses token i + 1 after the root from the hidden state before it, knowing none of
    the tokens between:

        h <- h + SiLU(W h + b) for each residual block, then logits = H h.

    Args:
        checkpoint: `config.json` with `medusa_num_heads` and `medusa_num_layers`; tensors
            `i.j.linear.weight`, `i.j.linear.bias` of block j and `i.L.weight` of the last layer of
            head i, bare or behind `medusa_head.`.

    Beyond the published format, the last layers may cover a draft vocabulary (`d2t` as in
    `Eagle3Head`, `vocab_size` in the config), and may all be left out: they are then the target's
    head, of whose rows `draft_vocab_size` tells the number.

    Raises:
        ValueError: a missing tensor or one of a wrong shape, by file and key.

    Source: Cai et al., "Medusa", 2401.10774, section 2.1.1.
    """

    sees_newest = True

    def __init__(self, checkpoint: Checkpoint | str | Path) -> None:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint(checkpoint)
        checkpoint.strip(["medusa_head."])
        number = checkpoint.number
        self._num_blocks = num_blocks = number("medusa_num_layers", 1)
        # Published configs may name fewer heads than their file holds; all are used.
        count = number("medusa_num_heads", 1)
        while f"{count}.0.linear.weight" in checkpoint:
            count += 1
        size = checkpoint.shape("0.0.linear.weight", 2)[0]
        last = f"0.{num_blocks}.weight"
        if last in checkpoint:
            draft_vocab = checkpoint.shape(last, 2)[0]
            vocab_size = number("vocab_size") if "d2t" in checkpoint else draft_vocab
        else:
            vocab_size = number("vocab_size")
            draft_vocab = number("draft_vocab_size", vocab_size)
        super().__init__(checkpoint, size, vocab_size)
        self.uses_target_rows = last not in checkpoint
        shapes: dict[str, list[int]] = {}
        for i in range(count):
            for j in range(num_blocks):
                shapes[f"{i}.{j}.linear.weight"] = [size, size]
                shapes[f"{i}.{j}.linear.bias"] = [size]
            if not self.uses_target_rows:
                shapes[f"{i}.{num_blocks}.weight"] = [draft_vocab, size]
        self.weights = {name: checkpoint.take(name, shape) for name, shape in shapes.items()}
        self.take_draft_vocab(checkpoint, draft_vocab)
        checkpoint.refuse_others()
        self.max_depth = count

    def state(self, i: int, hidden: Tensor) -> Tensor:
        """What goes into the last layer of head i after hidden [..., F]: [..., F]."""
        for j in range(self._num_blocks):
            layer = f"{i}.{j}.linear."
            hidden = hidden + silu(self.linear(f"{layer}weight", hidden, f"{layer}bias"))
        return hidden

    def head(self, i: int, hidden: Tensor) -> Tensor:
        """Logits [..., U] of head i after hidden [..., F]."""
        return self.output_head(self._last(i), self.state(i, hidden))

    def last_layer(self, i: int) -> Tensor:
        """[U, F] of head i."""
        return self.output_weight(self._last(i))

    def _last(self, i: int) -> str:
        return f"{i}.{self._num_blocks}.weight"

    def begin(self, batch: int, num_slots: int) -> None:
        """See `DraftNetwork`."""
        self._hidden: list[Tensor | None] = [None] * batch

    def start(self, context: DraftContext) -> Tensor:
        """See `DraftNetwork`."""
        self._state = newest(self._features, self._hidden)
        self._depth = 0
        return self.head(0, self._state)

    def extend(self, level: Level) -> Tensor:
        """See `DraftNetwork`."""
        self._depth += 1
        logits = self.head(self._depth, self._state)
        return logits[:, None].expand(-1, max(map(len, level)), -1)
