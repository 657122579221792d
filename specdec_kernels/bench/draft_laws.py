"""Draft laws that the comparison of acceptance rules draws from, node by node of a growing tree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from ..drafters import DraftContext, DraftNetwork
from ..drafting import GREEDY
from ..hf.early_exit import EarlyExit
from ..hf.features import HFTargetView
from ..hf.target import HFTarget
from ..shapes import PAD


class DraftLaws(ABC):
    """One or more draft laws.

    Attributes:
        names: of the laws.
        offsets: [U] int64, as in `ProposalBuilder`; None if draft ids are target ids.
        need_target: they are made of the target's own pass over the tree so far.
    """

    names: Sequence[str]
    offsets: Tensor | None = None
    need_target = False

    @abstractmethod
    def attach(
        self, target: HFTarget, num_steps: int, num_nodes: int
    ) -> AbstractContextManager[None]:
        """Entered around `num_steps` contexts with trees of `num_nodes`."""

    @abstractmethod
    def start(self, sequence: Sequence[int]) -> None:
        """A context: the committed tokens, the root last."""

    @abstractmethod
    def logits(
        self, tokens: Sequence[int], parents: Sequence[int], scores: Tensor | None
    ) -> dict[str, Tensor]:
        """Logits [M, U] of each law after every node; `scores` [M, V] are the target's, where it is
        needed. The tree is the last call's with more nodes.
        """


class OwnLaws(DraftLaws):
    """Laws made of the target: after some of its layers, and its own with noise.

    Args:
        exit_layers: layers of the target that the early exit runs.
        noise: logits; the noisy law is the target's logits / 1.2 plus so much Gaussian noise.
    """

    names = ("early exit", "noisy target")
    need_target = True

    def __init__(self, exit_layers: int, noise: float) -> None:
        self._exit_layers, self._noise = exit_layers, noise
        self._generator = torch.Generator().manual_seed(0)

    @contextmanager
    def attach(self, target: HFTarget, num_steps: int, num_nodes: int) -> Iterator[None]:
        """See `DraftLaws`."""
        with EarlyExit(target.model, self._exit_layers) as self._exits:
            yield

    def start(self, sequence: Sequence[int]) -> None:
        """See `DraftLaws`."""
        self._drawn: Tensor | None = None

    def logits(
        self, tokens: Sequence[int], parents: Sequence[int], scores: Tensor | None
    ) -> dict[str, Tensor]:
        """See `DraftLaws`."""
        assert scores is not None
        drawn = scores[:0] if self._drawn is None else self._drawn
        fresh = torch.randn((len(scores) - len(drawn), scores.shape[1]), generator=self._generator)
        self._drawn = torch.cat([drawn, fresh * self._noise])
        laws = (self._exits.logits()[0].float(), scores / 1.2 + self._drawn)
        return dict(zip(self.names, laws, strict=True))


class NetworkLaws(DraftLaws):
    """The law of a draft network.

    Args:
        name: for the table.
        network: a draft model, or trained heads.
    """

    def __init__(self, name: str, network: DraftNetwork) -> None:
        self.names = (name,)
        self._network = network

    @contextmanager
    def attach(self, target: HFTarget, num_steps: int, num_nodes: int) -> Iterator[None]:
        """See `DraftLaws`."""
        view = HFTargetView(target)
        self._sizes = (view.vocab_size, num_steps + num_nodes)
        with self._network.attach(view):
            self.offsets = self._network.offsets
            self._network.begin(1, num_nodes)
            yield

    def start(self, sequence: Sequence[int]) -> None:
        """See `DraftLaws`."""
        vocab_size, most = self._sizes
        device = torch.device("cpu")
        context = DraftContext([sequence], [True], [most], device, vocab_size, GREEDY)
        self._known = self._network.start(context)[:1].float()

    def logits(
        self, tokens: Sequence[int], parents: Sequence[int], scores: Tensor | None
    ) -> dict[str, Tensor]:
        """See `DraftLaws`."""
        known = len(self._known)
        if known < len(tokens):
            # The network does not count the root.
            new = [(token, above + PAD) for token, above in zip(tokens, parents, strict=True)]
            rows = self._network.extend([new[known:]])[0, : len(new) - known]
            self._known = torch.cat([self._known, rows.float()])
        return {self.names[0]: self._known}
