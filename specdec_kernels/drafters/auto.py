"""Drafts from the text, from what the target said before, and from heads, merged by probability."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..shapes import PAD
from ..tree import Proposal
from .adviser import Advice, Adviser, level_of
from .base import DraftContext, Drafter, Verified, check_max_nodes
from .heads import load_heads
from .memory import ContextTable, HitRates, SuccessorTable, keep_successors
from .network import DraftNetwork, TargetView
from .shipped import shipped_folder_for

SOURCES = ("text", "history", "successors")
_LEAST_LEFT = 0.01
"""Candidates of a node end at the latest where so little probability is left for others."""

_ADVANTAGE = 0.3
"""How much likelier the next token is guessed at a node that heads have judged."""
_PRIOR = {"text": (0.1, 0.4, 0.55, 0.7), "history": (0.05, 0.15, 0.2, 0.3)}
"""How often guesses of a source and suffix length, 4 and more alike, are right before they were
counted: about what SmolLM2's own conversations gave. Later guesses of a node half as often.
"""
_SUCCESSOR, _PER_LEVEL = 0.35, 0.72
"""The same of the successors: of the surest ones, and how much less each level."""

Candidate = tuple[int, float, Hashable]
"""Token, probability after its parent, and the kind of guess that it is."""


@dataclass(slots=True)
class _Row:
    """One growing sequence: its index, and the guesses that wait to be judged."""

    text: ContextTable
    length: int = 0
    guesses: dict[int, list[Candidate]] = field(default_factory=dict)  # by node


@dataclass(slots=True)
class _Node:
    """A node that may join the tree.

    Attributes:
        token: its own.
        last: the last tokens, its own included.
        depth: 0 for the root.
        score: estimated probability of its path.
        above, number: its parent and itself as the adviser's network counts; PAD for the root.
        advice: on what follows; None where nobody was asked.
        candidates, children: what may follow; None before it was estimated.
    """

    token: int
    last: tuple[int, ...]
    depth: int = 0
    score: float = 1.0
    above: int = PAD
    number: int = PAD
    advice: Advice | None = None
    candidates: list[Candidate] | None = None
    children: list[_Node] = field(default_factory=list)


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
        heads: a network that is asked at the likeliest nodes of each level. What it says is a
            candidate of its own, and tells the other guesses apart. "shipped": the package's own,
            if it has some that were trained for the target; None asks nobody.
        heads_depth, heads_width: levels that it is asked for, and most nodes of each; with a
            budget, only while the answers are worth the time that they take.

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
        heads: DraftNetwork | Literal["shipped"] | None = "shipped",
        heads_depth: int = 4,
        heads_width: int = 3,
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
        self._heads = heads
        self._heads_size = (heads_depth, heads_width)
        self._adviser_folder: Path | None = None
        self._adviser: Adviser | None = None
        if isinstance(heads, DraftNetwork):
            self._adviser = Adviser(heads, *self._heads_size)
        self._chain = self._order_of_asking()
        self._rows: list[_Row] = []
        self._least = min_probability  # of a node in this step

    def __str__(self) -> str:
        name = super().__str__()
        return name if self._adviser is None else f"{name}, {type(self._adviser.network).__name__}"

    @property
    def num_parameters(self) -> int:  # type: ignore[override]
        """See `Drafter`: of the heads, once they are known."""
        return 0 if self._adviser is None else self._adviser.network.num_parameters

    @contextmanager
    def attach(self, target: object) -> Iterator[None]:
        """See `Drafter`."""
        view: TargetView = target  # type: ignore[assignment]
        if self._heads == "shipped":
            self._use(shipped_folder_for(view))
        with nullcontext() if self._adviser is None else self._adviser.network.attach(view):
            yield

    def _use(self, folder: Path | None) -> None:
        """The heads of that folder, which stay for later requests."""
        if folder != self._adviser_folder:
            self._adviser_folder = folder
            self._adviser = None
            if folder is not None:
                self._adviser = Adviser(load_heads(folder), *self._heads_size)

    def begin(self, batch: int) -> None:
        """Forget the rows of the last batch, not what was learned from them."""
        self._rows = [_Row(ContextTable(self.orders)) for _ in range(batch)]
        if self._adviser is not None:
            self._adviser.begin(batch)

    def propose(self, context: DraftContext) -> Proposal:
        """See `Drafter`."""
        roots: list[_Node | None] = []
        for row, sequence, active in zip(
            self._rows, context.sequences, context.active, strict=True
        ):
            row.guesses = {}
            if active:
                row.text.extend(sequence, row.length)
                row.length = len(sequence)
            last = tuple(sequence[-self.orders[0] :])
            roots.append(_Node(sequence[-1], last) if active else None)
        deepest = [min(most, self.max_depth) for most in context.max_depths]
        self._least = max(self.min_probability, context.least_score())
        if self._adviser is not None:
            self._ask(self._adviser, context, roots, deepest)
        is_full = context.is_full()
        trees = [
            ([], [], []) if root is None else self._grow(row, root, most, is_full)
            for row, root, most in zip(self._rows, roots, deepest, strict=True)
        ]
        rows: list[tuple[list[int], list[int]]] = []
        sizes = context.sizes([scores for _, _, scores in trees])
        for sequence, tree, size in zip(context.sequences, trees, sizes, strict=True):
            tokens, parents, _ = tree
            rows.append(([sequence[-1], *tokens][:size], [PAD, *parents][:size]))
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
        single = [("heads", 1), *[("successors", 1)] * ("successors" in self.sources)]
        for order in self.orders:
            if order == 1:
                chain += single
            if "text" in self.sources:
                chain.append(("text", order))
            if "history" in self.sources and order in self.history.orders:
                chain.append(("history", order))
        return chain if 1 in self.orders else chain + single

    def _ask(
        self,
        adviser: Adviser,
        context: DraftContext,
        roots: Sequence[_Node | None],
        deepest: Sequence[int],
    ) -> None:
        """Have the adviser judge the root of each row, then the likeliest nodes of each level."""
        nodes = [[root] if root is not None else [] for root in roots]
        if not self._is_worth_asking(adviser.pace.start_seconds, context, nodes):
            adviser.pace.forget()
            return
        for root, advice in zip(roots, adviser.start(context), strict=True):
            if root is not None:
                root.advice = advice
        counts = [0] * len(nodes)
        for depth in range(1, adviser.depth):
            for b, (row, above) in enumerate(zip(self._rows, nodes, strict=True)):
                below = [
                    child
                    for node in above
                    if depth < deepest[b]
                    for child in self._children(row, node)
                ]
                nodes[b] = heapq.nlargest(adviser.width, below, key=lambda node: node.score)
            if not any(nodes):
                return
            if not self._is_worth_asking(adviser.pace.seconds, context, nodes):
                adviser.pace.forget()
                return
            level = []
            for b, row_nodes in enumerate(nodes):
                level.append([(node.token, node.above) for node in row_nodes])
                for node in row_nodes:
                    node.number = counts[b]
                    counts[b] += 1
            for row_nodes, row_advice in zip(nodes, adviser.extend(level), strict=True):
                for node, advice in zip(row_nodes, row_advice, strict=False):
                    node.advice = advice

    def _is_worth_asking(
        self, seconds: float, context: DraftContext, nodes: Sequence[Sequence[_Node]]
    ) -> bool:
        if context.budget is None:
            return True
        reached = sum(node.score for row in nodes for node in row)
        return context.budget.pays(_ADVANTAGE * reached, seconds)

    def _grow(
        self,
        row: _Row,
        root: _Node,
        deepest: int,
        is_full: Callable[[int, float, float], bool] | None,
    ) -> tuple[list[int], list[int], list[float]]:
        """Tokens, parents and path probabilities of the draft nodes, the likeliest first, up to the
        last that the budget could choose.
        """
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        heap: list[tuple[float, int, int, _Node]] = []  # (-score, order of arrival, parent, node)
        arrivals = 0
        node, place, promised = root, 0, 0.0
        while True:
            if node.depth < deepest:
                for child in self._children(row, node):
                    arrivals += 1
                    heapq.heappush(heap, (-child.score, arrivals, place, child))
                assert node.candidates is not None
                row.guesses[place] = node.candidates
            if not heap or len(tokens) >= self.max_nodes - 1:
                return tokens, parents, scores
            _, _, parent, node = heapq.heappop(heap)
            if is_full is not None and is_full(1 + len(tokens), promised, node.score):
                return tokens, parents, scores
            promised += node.score
            tokens.append(node.token)
            parents.append(parent)
            scores.append(node.score)
            place = len(tokens)

    def _children(self, row: _Row, node: _Node) -> list[_Node]:
        """Of the node, estimated at the first call, those that may be worth verifying."""
        if node.candidates is None:
            enough = max(_LEAST_LEFT, self._least / node.score)
            node.candidates = self._candidates(row, node.last, node.advice, enough)
            before = node.last[1:] if len(node.last) >= self.orders[0] else node.last
            for token, probability, _ in node.candidates:
                score = node.score * probability
                if score >= self._least:
                    last = (*before, token)
                    node.children.append(_Node(token, last, node.depth + 1, score, node.number))
        return node.children

    def _candidates(
        self,
        row: _Row,
        last: tuple[int, ...],
        advice: Advice | None,
        enough: float = _LEAST_LEFT,
    ) -> list[Candidate]:
        """What may follow the last tokens, in the order of asking, while so much probability is
        left.
        """
        found: list[Candidate] = []
        seen: set[int] = set()
        left, refuted = 1.0, 0.0

        def add(token: int, kind: tuple[Hashable, ...], prior: float) -> None:
            nonlocal left, refuted
            if token in seen or left < enough:
                return
            if advice is not None:  # wrong only if both are
                share = advice.share(token, refuted)
                prior = 1.0 - (1.0 - prior) * (1.0 - share)
                kind = (*kind, level_of(share))
                refuted += advice.probabilities.get(token, 0.0)
            probability = self.rates.rate(kind, prior)
            seen.add(token)
            found.append((token, left * probability, kind))
            left *= 1.0 - probability

        for source, order in self._chain:
            if left < enough:
                break
            if order > len(last):
                continue
            if source == "heads":
                if advice is not None:
                    for token in advice.probabilities:
                        add(token, (source, min(len(seen), 3)), 0.0)
            elif source == "successors":
                for rank, (token, level) in enumerate(
                    zip(*self.successors.after(last[-1]), strict=True)
                ):
                    prior = _SUCCESSOR * _PER_LEVEL**level
                    add(token, (source, rank, level, min(len(seen), 3)), prior)
            else:
                table = row.text if source == "text" else self.history
                following = table.after(last[len(last) - order :])
                width = min(len(following) // 2, 3)
                prior = _PRIOR[source][min(order, 4) - 1]
                for i in range(0, len(following), 2):
                    kind = (source, order, i, min(following[i + 1], 3), width, bool(seen))
                    add(following[i], kind, prior * 0.5 ** bool(seen))
        return found
