"""What drafters remember: continuations of contexts, successors of tokens, and how often they
were right. All of it bounded.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from ..ops import topk_logprobs
from .base import Verified

_MOST_COUNTED = 9


class ContextTable:
    """What followed each suffix of a text, the newest continuation first.

    A suffix of n tokens, for each n of `orders`, maps to a flat list [token, times, token, times,
    ...] of at most `width` tokens. One token costs O(len(orders)) whatever came before.

    Args:
        orders: suffix lengths, in tokens.
        width: continuations kept for each suffix.
        max_contexts: suffixes kept; the oldest are forgotten. None keeps all.
    """

    def __init__(
        self, orders: Sequence[int], *, width: int = 4, max_contexts: int | None = None
    ) -> None:
        self.orders = tuple(sorted(orders))
        self.width = width
        self.max_contexts = max_contexts
        self._following: dict[tuple[int, ...], list[int]] = {}

    def __len__(self) -> int:
        return len(self._following)

    def extend(self, sequence: Sequence[int], start: int) -> None:
        """Index `sequence[start:]`, each token after the suffixes before it."""
        for end in range(start, len(sequence)):
            token = sequence[end]
            for order in self.orders:
                if order > end:
                    break
                self._add(tuple(sequence[end - order : end]), token)

    def after(self, suffix: tuple[int, ...]) -> list[int]:
        """[token, times, ...] that followed the suffix; empty if it is unknown. Not to be
        changed.
        """
        return self._following.get(suffix, _NOTHING)

    def _add(self, suffix: tuple[int, ...], token: int) -> None:
        known = self._following.get(suffix)
        if known is None:
            self._following[suffix] = [token, 1]
            if self.max_contexts is not None and len(self._following) > self.max_contexts:
                del self._following[next(iter(self._following))]
            return
        if known[0] == token:
            known[1] = min(known[1] + 1, _MOST_COUNTED)
            return
        times = 0
        for i in range(2, len(known), 2):
            if known[i] == token:
                times = known[i + 1]
                del known[i : i + 2]
                break
        known[:0] = [token, min(times + 1, _MOST_COUNTED)]
        del known[2 * self.width :]


_NOTHING: list[int] = []
_NO_SUCCESSORS: tuple[list[int], list[int]] = ([], [])


class SuccessorTable:
    """Token -> the target's k likeliest tokens after it, when it last scored that token.

    Bounded by the vocabulary: one entry per token.

    Args:
        k: successors of each token.

    Source: token recycling, Luo et al., 2408.08696; here with the target's probabilities.
    """

    def __init__(self, k: int = 8) -> None:
        self.k = k
        self._successors: dict[int, tuple[list[int], list[int]]] = {}

    def __len__(self) -> int:
        return len(self._successors)

    def __contains__(self, token: int) -> bool:
        return token in self._successors

    def put(self, token: int, successors: list[int], levels: list[int]) -> None:
        """Replace the successors of a token, likeliest first, and their `probability_levels`."""
        self._successors[token] = (successors, levels)

    def after(self, token: int) -> tuple[list[int], list[int]]:
        """Successors and levels, none of an unknown token. Not to be changed."""
        return self._successors.get(token, _NO_SUCCESSORS)

    def save(self, path: Path) -> None:
        """Write the table to a file."""
        tokens = torch.tensor(list(self._successors), dtype=torch.int32, device="cpu")
        rows = list(self._successors.values())
        successors = torch.tensor([row[0] for row in rows], dtype=torch.int32, device="cpu")
        levels = torch.tensor([row[1] for row in rows], dtype=torch.int8, device="cpu")
        shape = (len(rows), self.k)
        torch.save(
            {
                "tokens": tokens,
                "successors": successors.reshape(shape),
                "levels": levels.reshape(shape),
            },
            path,
        )

    @staticmethod
    def load(path: Path) -> SuccessorTable:
        """Read what `save` wrote.

        Raises:
            ValueError: another kind of file.
        """
        try:
            saved = torch.load(path, weights_only=True)
            tokens, successors, levels = (saved[n] for n in ("tokens", "successors", "levels"))
            if tokens.shape != successors.shape[:1] or successors.shape != levels.shape:
                raise ValueError("shapes do not agree")
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, EOFError,
                UnpicklingError) as error:  # fmt: skip
            raise ValueError(f"{path}: not a saved SuccessorTable: {error}") from None
        table = SuccessorTable(successors.shape[1])
        rows = zip(tokens.tolist(), successors.tolist(), levels.tolist(), strict=True)
        for token, row, level in rows:
            table.put(token, row, level)
        return table


def keep_successors(table: SuccessorTable, verified: Verified) -> None:
    """Put the target's candidates of every scored node into the table. A token that stands at
    several nodes keeps those of the accepted path, where the target was sure to be.
    """
    tree = verified.tree
    batch, nodes, vocab = verified.logits.shape
    k = min(table.k, vocab)
    logprobs, best = topk_logprobs(verified.logits.reshape(batch * nodes, vocab), k)
    found = torch.cat([best, probability_levels(logprobs)], 1).tolist()
    for b, ((tokens, _), path) in enumerate(zip(tree.rows(), verified.paths, strict=True)):
        for node in (*range(len(tokens)), *path):
            row = found[b * nodes + node]
            table.put(tokens[node], row[:k], row[k:])


def probability_levels(logprobs: Tensor) -> Tensor:
    """Steps of 2/3 nat below certainty, 0 to 9: what estimates distinguish.

    Args:
        logprobs: float, natural logarithms.

    Returns:
        the same shape, int64.
    """
    return (logprobs * -1.5).clamp(0, 9).long()


class HitRates:
    """Running frequency of being right, for each kind of guess.

    Args:
        prior: frequency assumed before the first guess.
        weight: guesses that the prior counts for.
        memory: guesses after which old ones fade.
    """

    def __init__(self, prior: float = 0.3, weight: float = 2.0, memory: float = 200.0) -> None:
        self._prior, self._weight, self._memory = prior, weight, memory
        self._rates: dict[Hashable, list[float]] = {}  # [frequency, guesses]

    def __len__(self) -> int:
        return len(self._rates)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._rates)

    def rate(self, kind: Hashable, prior: float | None = None) -> float:
        """How often guesses of this kind were right; `prior` stands in for the table's own."""
        known = self._rates.get(kind)
        if known is None:
            known = self._rates[kind] = [self._prior if prior is None else prior, self._weight]
        return known[0]

    def learn(self, kind: Hashable, hit: bool) -> None:
        """Count a guess."""
        self.rate(kind)
        known = self._rates[kind]
        known[1] = min(known[1] + 1.0, self._memory)
        known[0] += (hit - known[0]) / known[1]
