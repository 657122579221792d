"""Drafts from the text itself and from what the target said before, merged by probability."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..shapes import PAD
from ..tree import Proposal
from .base import DraftContext, Drafter, Verified, check_max_nodes
from .memory import ContextTable, HitRates, SuccessorTable, keep_successors

SOURCES = ("text", "history", "successors")
_LEAST_LEFT = 0.01
"""Candidates of a node end where so little probability is left for others."""

Candidate = tuple[int, float, Hashable]
"""Token, probability after its parent, and the kind of guess that it is."""


@dataclass(slots=True)
class _Row:
    """One growing sequence: its index, and the guesses that wait to be judged."""

    text: ContextTable
    length: int = 0
    guesses: dict[int, list[Candidate]] = field(default_factory=dict)  # by node


class AutoDrafter(Drafter):
    """Merges three memories into one tree, best first by estimated probability of each path.

    "text": what followed the same last tokens earlier in the row, prompt included. "history": the
    same in earlier outputs of this drafter. "successors": the target's own likeliest tokens after
    the same token, taken from every node that it verified. A node's candidates are asked longest
    suffix first, and each is as probable as guesses of its kind (source, suffix length, rank, times
    seen, the target's probability) have been right, of what the earlier ones leave. These
    frequencies, the history and the successors outlive the request; all are bounded.

    Args:
        max_nodes: most nodes of a tree, root included.
        sources: some of `SOURCES`.
        orders: suffix lengths of the text; those of the history are the same without 1.
        max_contexts: suffixes kept of earlier outputs.
        max_depth: of a tree.
        min_probability: least estimated probability of a node's path.
        successors: a table to start from, as saved by `SuccessorTable.save`.

    Source: suffix decoding, Oliaro et al., 2411.04975; token recycling, Luo et al., 2408.08696;
        backing off as in prediction by partial matching (Cleary and Witten, 1984).
    """

    wants_budget = True

    def __init__(
        self,
        max_nodes: int = 32,
        *,
        sources: Sequence[str] = SOURCES,
        orders: Sequence[int] = (1, 2, 3, 4),
        max_contexts: int = 200_000,
        max_depth: int = 24,
        min_probability: float = 0.001,
        successors: SuccessorTable | Path | None = None,
    ) -> None:
        name = type(self).__name__
        check_max_nodes(name, max_nodes)
        unknown = [source for source in sources if source not in SOURCES]
        if unknown or not sources:
            raise ValueError(f"{name}: sources must be among {', '.join(SOURCES)}, got {sources}")
        if not orders or min(orders) < 1:
            raise ValueError(f"{name}: orders must be suffix lengths >= 1, got {orders}")
        self.max_nodes = max_nodes
        self.sources = tuple(sources)
        self.orders = tuple(sorted(orders, reverse=True))
        self.max_depth = max_depth
        self.min_probability = min_probability
        if isinstance(successors, Path):
            successors = SuccessorTable.load(successors)
        self.successors = SuccessorTable() if successors is None else successors
        longer = [order for order in orders if order > 1] or orders
        self.history = ContextTable(longer, max_contexts=max_contexts)
        self.rates = HitRates()
        self._chain = self._order_of_asking()
        self._rows: list[_Row] = []

    def begin(self, batch: int) -> None:
        """Forget the rows of the last batch, not what was learned from them."""
        self._rows = [_Row(ContextTable(self.orders)) for _ in range(batch)]

    def propose(self, context: DraftContext) -> Proposal:
        """See `Drafter`."""
        trees: list[tuple[list[int], list[int], list[float]]] = []
        for b, sequence in enumerate(context.sequences):
            row = self._rows[b]
            row.guesses = {}
            if context.active[b]:
                self._index(row, sequence)
                trees.append(self._grow(row, sequence, context.max_depths[b]))
            else:
                trees.append(([], [], []))
        size = self.max_nodes
        if context.budget is not None:
            active = [tree[2] for tree, on in zip(trees, context.active, strict=True) if on]
            size = context.budget.choose(active)
        rows: list[tuple[list[int], list[int]]] = []
        for (tokens, parents, _), sequence, on in zip(
            trees, context.sequences, context.active, strict=True
        ):
            root = [sequence[-1]] if on else []
            rows.append(([*root, *tokens[: size - 1]], [*[PAD] * len(root), *parents[: size - 1]]))
        return Proposal.onehot(rows, context.device)

    def observe(self, verified: Verified) -> None:
        """Judge the guesses along each path, and keep the target's candidates of every node."""
        for row, path, sequence in zip(self._rows, verified.paths, verified.sequences, strict=True):
            for node, token in zip(path, sequence[len(sequence) - len(path) :], strict=True):
                for guess, _, kind in row.guesses.get(node, ()):
                    hit = guess == token
                    self.rates.learn(kind, hit)
                    if hit:
                        break
            row.guesses = {}
        if "successors" in self.sources:
            keep_successors(self.successors, verified)

    def end(self, sequences: Sequence[Sequence[int]], num_prompt: Sequence[int]) -> None:
        """Add the outputs to the history."""
        self._rows = []
        if "history" in self.sources:
            longest = self.orders[0]
            for sequence, prompt in zip(sequences, num_prompt, strict=True):
                tail = sequence[max(0, prompt - longest) :]
                self.history.extend(tail, min(prompt, longest))

    def _order_of_asking(self) -> list[tuple[str, int]]:
        """Sources and suffix lengths, the most telling first."""
        chain = []
        for order in self.orders:
            if order == 1 and "successors" in self.sources:
                chain.append(("successors", 1))
            if "text" in self.sources:
                chain.append(("text", order))
            if "history" in self.sources and order in self.history.orders:
                chain.append(("history", order))
        if "successors" in self.sources and ("successors", 1) not in chain:
            chain.append(("successors", 1))
        return chain

    def _index(self, row: _Row, sequence: Sequence[int]) -> None:
        row.text.extend(sequence, row.length)
        row.length = len(sequence)

    def _grow(
        self, row: _Row, sequence: Sequence[int], max_depth: int
    ) -> tuple[list[int], list[int], list[float]]:
        """Tokens, parents and path probabilities of the draft nodes, the likeliest first."""
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        deepest = min(max_depth, self.max_depth)
        # (-path probability, order of arrival, token, parent, depth, last tokens before it)
        heap: list[tuple[float, int, int, int, int, tuple[int, ...]]] = []
        arrivals = 0
        node, depth, score = 0, 0, 1.0
        last = tuple(sequence[-self.orders[0] :])
        while True:
            if depth < deepest:
                candidates = row.guesses[node] = self._candidates(row, last)
                for token, probability, _ in candidates:
                    if score * probability >= self.min_probability:
                        arrivals += 1
                        entry = (-score * probability, arrivals, token, node, depth + 1, last)
                        heapq.heappush(heap, entry)
            if not heap or len(tokens) >= self.max_nodes - 1:
                return tokens, parents, scores
            negative, _, token, parent, depth, last = heapq.heappop(heap)
            score = -negative
            tokens.append(token)
            parents.append(parent)
            scores.append(score)
            node = len(tokens)
            last = (
                (*last[1 - len(last) :], token) if len(last) >= self.orders[0] else (*last, token)
            )

    def _candidates(self, row: _Row, last: tuple[int, ...]) -> list[Candidate]:
        """What may follow the last tokens, in the order of asking."""
        found: list[Candidate] = []
        seen: set[int] = set()
        left = 1.0
        rate = self.rates.rate
        for source, order in self._chain:
            if order > len(last):
                continue
            kind: Hashable
            if source == "successors":
                known = self.successors.after(last[-1])
                if known is None:
                    continue
                for rank, (token, level) in enumerate(zip(*known, strict=True)):
                    if token in seen:
                        continue
                    kind = (source, rank, level, min(len(seen), 3))
                    probability = rate(kind)
                    seen.add(token)
                    found.append((token, left * probability, kind))
                    left *= 1.0 - probability
            else:
                table = row.text if source == "text" else self.history
                following = table.after(last[len(last) - order :])
                for i in range(0, len(following), 2):
                    token = following[i]
                    if token in seen:
                        continue
                    times, width = min(following[i + 1], 3), min(len(following) // 2, 3)
                    kind = (source, order, i, times, width, bool(seen))
                    probability = rate(kind)
                    seen.add(token)
                    found.append((token, left * probability, kind))
                    left *= 1.0 - probability
            if left < _LEAST_LEFT:
                break
        return found
