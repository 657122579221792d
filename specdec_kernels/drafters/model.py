"""The drafter of networks, and the trees that it can draft with them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ..forest import DraftNode
from ..ops import build_tree, topk_logprobs
from ..shapes import PAD
from ..tree import Proposal
from .base import DraftContext, Drafter
from .network import DraftNetwork, TargetView
from .pace import Pace


class TreePlan(ABC):
    """Which tree to draft.

    Attributes:
        max_nodes: most nodes of a tree, root included.
        num_slots: most nodes that the network computes in a step.
        wants_budget: see `Drafter`.
    """

    max_nodes: int
    num_slots: int
    wants_budget = False

    @abstractmethod
    def draft(self, network: DraftNetwork, context: DraftContext) -> Proposal:
        """One tree per row."""


class ModelDrafter(Drafter):
    """Drafts with a network: a small model, the target's first layers, or trained heads.

    Args:
        network: who computes the drafts.
        tree: which tree; None is `TopKTree()`.

    Raises:
        TypeError: no `DraftNetwork`.
    """

    def __init__(self, network: DraftNetwork, tree: TreePlan | None = None) -> None:
        if not isinstance(network, DraftNetwork):
            raise TypeError(
                "ModelDrafter: network must be a DraftNetwork, as hf.DraftModel(model) is, "
                f"got {type(network).__name__}"
            )
        self.network = network
        self.tree = TopKTree() if tree is None else tree
        self.max_nodes = self.tree.max_nodes
        self.wants_budget = self.tree.wants_budget
        self.num_parameters = network.num_parameters
        if network.uses_target_slots:
            self.max_nodes = max(self.max_nodes, self.tree.num_slots + 1)

    def __str__(self) -> str:
        return f"{type(self.network).__name__}, {self.tree}"

    def attach(self, target: object) -> AbstractContextManager[object]:
        """See `Drafter`; the target is a `TargetView`."""
        view: TargetView = target  # type: ignore[assignment]
        return self.network.attach(view)

    def begin(self, batch: int) -> None:
        """See `Drafter`."""
        self.network.begin(batch, self.tree.num_slots)

    def propose(self, context: DraftContext) -> Proposal:
        """See `Drafter`."""
        return self.tree.draft(self.network, context)


class SampledTree(TreePlan):
    """A tree of fixed shape whose tokens are drawn; where the row is greedy, the likeliest ones.

    Args:
        widths: children of each node, by depth; (1, 1, 1, 1, 1) is a chain of five.
        greedy_drafts: of each node's children only the first is drawn, the others are the likeliest
            tokens, deterministic: for rule `gd_traversal`.
        replacement: draw siblings independently instead of distinct ones.
        temperature, top_k, top_p, min_p: of the draft's law; None is the target's.

    Raises:
        ValueError: no depth, a width below 1, greedy drafts with replacement.

    Source: Leviathan et al., 2211.17192 (chains); SpecInfer, 2305.09781 (trees); Hu et al.,
        2502.18779, section 4 (greedy drafts).
    """

    def __init__(
        self,
        widths: Sequence[int] = (1,) * 5,
        *,
        greedy_drafts: bool = False,
        replacement: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> None:
        if not widths or min(widths) < 1:
            raise ValueError(f"SampledTree: widths must be >= 1, got {list(widths)}")
        if greedy_drafts and replacement:
            raise ValueError("SampledTree: greedy_drafts draw one token, replacement has no use")
        self.widths = tuple(widths)
        self.greedy_drafts = greedy_drafts
        self.replacement = replacement
        self.law: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
        }
        levels = list(accumulate(self.widths, mul))
        self.max_nodes = 1 + sum(levels)
        self.num_slots = sum(levels[:-1])  # the last level is drawn, not computed

    def __str__(self) -> str:
        siblings = "greedy drafts" if self.greedy_drafts else "sampled"
        return f"{siblings} {'-'.join(map(str, self.widths))}"

    def draft(self, network: DraftNetwork, context: DraftContext) -> Proposal:
        """See `TreePlan`."""
        builder = context.builder(network.offsets)
        edges = [(root, root) for root in builder.roots]  # (parent, node) of the newest level
        numbers = dict.fromkeys(builder.roots, PAD)  # as the network counts
        for depth, width in enumerate(self.widths[: network.max_depth]):
            edges = [(above, n) for above, n in edges if n.depth < context.max_depths[n.row]]
            nodes = [node for _, node in edges]
            if not nodes:
                break
            if depth == 0:
                logits = network.start(context)[[node.row for node in nodes]]
            else:
                logits = _extend(network, edges, numbers, len(context.sequences))
            num_top = width - 1 if self.greedy_drafts else 0
            children = builder.sample(
                nodes,
                logits[:, : context.vocab_size],
                num_children=width - num_top,
                num_top=num_top,
                replacement=self.replacement,
                **self.law,
            )
            edges = [(a, b) for a, below in zip(nodes, children, strict=True) for b in below]
        return builder.build()


def _extend(
    network: DraftNetwork,
    edges: Sequence[tuple[DraftNode, DraftNode]],
    numbers: dict[DraftNode, int],
    batch: int,
) -> Tensor:
    """Logits [R, U] after the nodes of these (parent, node) edges, which get their numbers."""
    level: list[list[tuple[int, int]]] = [[] for _ in range(batch)]
    computed = Counter(node.row for node, number in numbers.items() if number != PAD)
    columns = []
    for above, node in edges:
        columns.append(len(level[node.row]))
        numbers[node] = computed[node.row] + columns[-1]
        level[node.row].append((node.token, numbers[above]))
    return network.extend(level)[[node.row for _, node in edges], columns]


class TopKTree(TreePlan):
    """The likeliest paths, deterministic: beams of top-k tokens, reranked to one tree.

    Drafts are one-hot, so that the default rule walks: sampled rows stay what plain sampling with
    their seed gives. With a budget a level is drafted while it may bring more than the time that it
    takes, and the tree keeps the nodes that are worth a place in the pass.

    Args:
        max_nodes: nodes of each tree, root included.
        depth: deepest node.
        width: beams of a level, and children tried of each; None is a quarter of the nodes, but at
            least 4 and at most 10.

    Raises:
        ValueError: an argument below 1.

    Source: EAGLE-2, 2406.16858, sections 4.1 and 4.2.
    """

    wants_budget = True

    def __init__(self, max_nodes: int = 16, *, depth: int = 7, width: int | None = None) -> None:
        if width is None:
            width = min(max(4, max_nodes // 4), 10)
        if min(max_nodes, depth, width) < 1:
            raise ValueError(
                "TopKTree: max_nodes, depth and width must be >= 1, "
                f"got {max_nodes}, {depth} and {width}"
            )
        self.max_nodes = max_nodes
        self.depth = depth
        self.width = width
        self.num_slots = width * (depth - 1)
        self._pace = Pace()

    def __str__(self) -> str:
        return f"top-{self.width}, depth {self.depth}, {self.max_nodes} nodes"

    def draft(self, network: DraftNetwork, context: DraftContext) -> Proposal:
        """See `TreePlan`."""
        depths = [
            max(0, most) if active else -1
            for most, active in zip(context.max_depths, context.active, strict=True)
        ]
        depth = min(self.depth, network.max_depth or self.depth, max(depths))
        beams = _Beams(depths, max(depth, 1), self.width, self.max_nodes)
        if depth > 0 and self.max_nodes > 1:
            with self._pace.of_start():
                logits = network.start(context)[:, : context.vocab_size]
                beams.open_root(logits, network.offsets)
            least = context.least_score()
            for _ in range(1, depth):
                level = beams.level(least)
                if not any(level):
                    break
                if context.budget and not context.budget.pays(beams.promised, self._pace.seconds):
                    self._pace.forget()
                    break
                with self._pace.of_level():
                    beams.open(network.extend(level)[:, :, : context.vocab_size], network.offsets)
        tokens, parents, sizes, scores = build_tree(
            torch.tensor([sequence[-1] for sequence in context.sequences], device="cpu"),
            beams.candidates.flatten(2),
            beams.logprobs.flatten(2),
            torch.tensor(
                [0 if most < 0 else self.max_nodes for most in depths], device="cpu"
            ).int(),
            beams.parents.flatten(2),
            max_nodes=self.max_nodes,
        )
        probabilities = scores.exp().tolist()
        kept = context.sizes(
            [row[1:size] for row, size in zip(probabilities, sizes.tolist(), strict=True)]
        )
        rows = zip(tokens.tolist(), parents.tolist(), kept, strict=True)
        return Proposal.onehot([(t[:size], p[:size]) for t, p, size in rows], context.device)


class _Beams:
    """Candidates of `build_tree` on the host, and the beams among them that go on.

    A level has one candidate for each beam of the level before and each of its top-k tokens.

    Attributes:
        promised: accepted tokens of the level that was chosen last: the probability of its beams,
            of which their candidates keep as much as those of the level before did.
    """

    def __init__(self, depths: Sequence[int], depth: int, width: int, max_nodes: int) -> None:
        shape = (len(depths), depth, width, width)  # by beam of the level before, and rank
        self.candidates = torch.full(shape, PAD, device="cpu")
        self.logprobs = torch.full(shape, -torch.inf, dtype=torch.float32, device="cpu")
        self.parents = torch.full(shape, PAD, dtype=torch.int32, device="cpu")
        self._scores = self.logprobs.clone()  # of the path
        self._depths = depths
        self._width = width
        self._max_nodes = max_nodes
        self._num_levels = 0
        self._num_computed = [0] * len(depths)
        self._beams: list[list[int]] = []  # candidates of the last level that go on
        self._numbers: list[dict[int, int]] = [{} for _ in depths]  # of the beams
        self._reached = float(sum(most > 0 for most in depths))  # probability of all beams
        self.promised = 0.0

    def open_root(self, logits: Tensor, offsets: Tensor | None) -> None:
        """The first level, from logits [B, U]."""
        self._beams = [[PAD] for _ in self._numbers]
        self.open(logits[:, None], offsets)

    def open(self, logits: Tensor, offsets: Tensor | None) -> None:
        """The next level, from logits [B, M, U] after the beams."""
        batch, columns, size = logits.shape
        k = min(self._width, size)
        logprobs, tokens = topk_logprobs(logits.reshape(-1, size), k)
        if offsets is not None:
            tokens = tokens + offsets[tokens]
        logprobs = logprobs.reshape(batch, columns, k).cpu()
        tokens = tokens.reshape(batch, columns, k).cpu()
        level = self._num_levels
        for b, beams in enumerate(self._beams):
            if not beams or level >= self._depths[b]:
                continue
            here = (b, level, slice(len(beams)), slice(k))
            new, above = logprobs[b, : len(beams)], torch.tensor(beams, device="cpu")
            self.candidates[here] = tokens[b, : len(beams)]
            self.logprobs[here] = new
            self.parents[here] = above[:, None].int()
            if level > 0:
                new = new + self._scores[b, level - 1].flatten()[above, None]
            self._scores[here] = new
        self._num_levels += 1

    def level(self, least: float = 0.0) -> list[list[tuple[int, int]]]:
        """The best candidates of the last level whose children could be among the best nodes, and
        likelier than `least`.
        """
        last = self._num_levels - 1
        wanted = min(self._max_nodes - 1, self._scores[0].numel())
        floors = self._scores.flatten(1).topk(wanted, 1).values[:, -1:]
        floors = floors.clamp(min=math.log(least)) if least > 0 else floors
        scores = self._scores[:, last].flatten(1)
        best = scores.topk(self._width, 1)
        # No path is likelier than its first nodes: a beam at the floor has nothing to add.
        num_open = (best.values > floors).sum(1).tolist()
        share = float(scores.exp().sum()) / self._reached
        self._reached = 0.0
        rows = []
        self._beams, before = [], self._numbers
        self._numbers = [{} for _ in before]
        for b, num in enumerate(num_open):
            num = num if last + 1 < self._depths[b] else 0
            chosen = best.indices[b, :num]
            tokens, parents = (
                x[b, last].flatten()[chosen].tolist() for x in (self.candidates, self.parents)
            )
            self._beams.append(chosen.tolist())
            self._reached += float(best.values[b, :num].exp().sum())
            first = self._num_computed[b]
            self._numbers[b] = {beam: first + i for i, beam in enumerate(self._beams[b])}
            rows.append(
                [
                    (token, PAD if p == PAD else before[b][p])
                    for token, p in zip(tokens, parents, strict=True)
                ]
            )
            self._num_computed[b] += num
        self.promised = share * self._reached
        return rows
