"""One step of speculation over a tiny vocabulary, where every draft can be listed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .tree import DraftKind

Prefix: TypeAlias = tuple[int, ...]
"""The tokens after the root, down to a node; that of the root is ()."""
Row: TypeAlias = Tensor | Sequence[float]
Table: TypeAlias = Mapping[Prefix, Row] | Callable[[Prefix], Row]


@dataclass(frozen=True, slots=True)
class Speculation:
    """The shape of a draft tree, and its target and draft at every prefix.

    Attributes:
        parents: of each node, as in `TokenTree`.
        kinds: `DraftKind` of each node; that of the root is not read.
        target: prefix -> [V] logits.
        draft: prefix -> [V] law of a node's sampled children, in numbers that float32 holds and
            that sum to exactly 1; `dyadic_law` makes them.
        guesses: prefix -> tokens of a node's one-hot children, in node order.
        temperature, top_k, top_p, min_p: of the target, as in `sample`.
        bias: [V], added to the logits. mask: [V] of bool, False forbids a token.
    """

    parents: Sequence[int]
    kinds: Sequence[int]
    target: Table
    draft: Table | None = None
    guesses: Mapping[Prefix, Sequence[int]] | Callable[[Prefix], Sequence[int]] | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    bias: Row | None = None
    mask: Sequence[bool] | None = None

    @property
    def depth(self) -> int:
        """Depth of the deepest node."""
        return max(_depths(self.parents))

    def logits(self, prefix: Prefix) -> Tensor:
        """[V] float32, the target's at a prefix."""
        return torch.as_tensor(_look_up(self.target, prefix), dtype=torch.float32)

    def draft_law(self, prefix: Prefix) -> Tensor:
        """[V] float32, from which the sampled children of a prefix come.

        Raises:
            ValueError: there is none, or float32 does not hold it.
        """
        if self.draft is None:
            raise ValueError("speculation: draft must be given for sampled nodes, got None")
        law = torch.as_tensor(_look_up(self.draft, prefix), dtype=torch.float64)
        if not torch.equal(law, law.float().double()) or abs(math.fsum(law) - 1.0) > 1e-15:
            raise ValueError(
                f"speculation: draft{prefix} must be float32 numbers that sum to 1 "
                f"(dyadic_law makes them), got {law.tolist()}"
            )
        return law.float()


@dataclass(frozen=True, slots=True)
class DraftTree:
    """A tree that can be drafted: token and prefix of each node, and its probability."""

    tokens: Prefix
    prefixes: tuple[Prefix, ...]
    probability: float


def draft_trees(case: Speculation) -> Iterator[DraftTree]:
    """Every tree that can be drafted.

    Raises:
        ValueError: a draft law that `Speculation.draft_law` refuses, or one with fewer tokens than
            children drawn from it without replacement; one-hot nodes without guesses.
    """
    stack = [DraftTree((0,), ((),), 1.0)]
    while stack:
        tree = stack.pop()
        node = len(tree.tokens)
        if node == len(case.parents):
            yield tree
            continue
        above = tree.prefixes[case.parents[node]]
        for token, probability in _proposals(case, node, tree):
            tokens, prefixes = (*tree.tokens, token), (*tree.prefixes, (*above, token))
            stack.append(DraftTree(tokens, prefixes, tree.probability * probability))


def verify_inputs(case: Speculation, trees: Sequence[DraftTree]) -> dict[str, Tensor]:
    """Logits, trees and draft laws as `verify` takes them, one row per tree."""
    rows, nodes = len(trees), len(case.parents)
    logits = {prefix: case.logits(prefix) for tree in trees for prefix in tree.prefixes}
    inputs = {
        "logits": torch.stack([torch.stack([logits[p] for p in t.prefixes]) for t in trees]),
        "tokens": torch.tensor([tree.tokens for tree in trees]),
        "parents": torch.tensor([list(case.parents)] * rows, dtype=torch.int32),
        "num_nodes": torch.full((rows,), nodes, dtype=torch.int32),
    }
    sampled = [i for i in range(1, nodes) if case.kinds[i] != DraftKind.ONEHOT]
    drawn_from = sorted({case.parents[i] for i in sampled})
    if not drawn_from:
        return inputs
    laws = [torch.stack([case.draft_law(tree.prefixes[n]) for n in drawn_from]) for tree in trees]
    draft_rows = [drawn_from.index(n) if n in drawn_from else -1 for n in range(nodes)]
    return inputs | {
        "kinds": torch.tensor([list(case.kinds)] * rows, dtype=torch.int8),
        "draft_rows": torch.tensor([draft_rows] * rows, dtype=torch.int32),
        "draft_probs": torch.stack(laws),
    }


def dyadic_law(law: Row, bits: int = 20) -> Tensor:
    """The law in multiples of 2^-bits that sum to exactly 1; a zero stays a zero.

    Args:
        law: [V] non-negative weights, not all zero.
        bits: at most 24, so that float32 holds the result.

    Returns:
        [V] float32, within V 2^-bits of the normalised law.
    """
    weights = torch.as_tensor(law, dtype=torch.float64)
    units: Tensor = (weights / weights.sum() * 2**bits).round()
    units[units.argmax()] += 2**bits - units.sum()
    return (units * 2.0**-bits).float()


def random_speculation(
    parents: Sequence[int],
    kinds: Sequence[int],
    vocab: int,
    seed: int,
    *,
    has_zeros: bool = True,
    **filters: Any,
) -> Speculation:
    """A case with Dirichlet(1/2) tables for target and draft, and distinct random guesses.

    Args:
        parents, kinds: the tree.
        vocab: V.
        seed: of the tables.
        has_zeros: make about a quarter of the entries of both laws zero.
        filters: attributes of `Speculation`, from `temperature` on.
    """
    generator = torch.Generator().manual_seed(seed)
    target, draft, guesses = {}, {}, {}
    siblings = max((list(parents).count(parent) for parent in parents[1:]), default=1)
    for length in range(max(_depths(parents)) + 1):
        for prefix in product(range(vocab), repeat=length):
            p, q = torch.randn((2, vocab), generator=generator).double() ** 2
            if has_zeros:
                p *= _support(vocab, 1, generator)
                q *= _support(vocab, siblings, generator)
            target[prefix] = (p / p.sum()).log().float()
            draft[prefix] = dyadic_law(q.clamp_min(1e-3 * float(q.max())) * (q > 0))
            guesses[prefix] = torch.randperm(vocab, generator=generator).tolist()
    return Speculation(parents, kinds, target, draft, guesses, **filters)


def _support(vocab: int, at_least: int, generator: torch.Generator) -> Tensor:
    kept = torch.rand(vocab, generator=generator) > 0.25
    kept[torch.randperm(vocab, generator=generator)[:at_least]] = True
    return kept


def _proposals(case: Speculation, node: int, tree: DraftTree) -> list[tuple[int, float]]:
    """The tokens that a node can have, given the nodes before it."""
    parent, kind = case.parents[node], case.kinds[node]
    alike = [i for i in range(1, node) if case.parents[i] == parent and case.kinds[i] == kind]
    prefix = tree.prefixes[parent]
    if kind == DraftKind.ONEHOT:
        if case.guesses is None:
            raise ValueError("speculation: guesses must be given for one-hot nodes, got None")
        return [(int(_look_up(case.guesses, prefix)[len(alike)]), 1.0)]
    law = case.draft_law(prefix).double().tolist()
    if kind == DraftKind.SAMPLED_WITHOUT_REPLACEMENT:
        for earlier in alike:
            law[tree.tokens[earlier]] = 0.0
    mass = math.fsum(law)
    if not mass > 0.0:
        raise ValueError(
            f"speculation: draft{prefix} must have a token for each child drawn without "
            f"replacement, got none for node {node}"
        )
    return [(token, q / mass) for token, q in enumerate(law) if q > 0.0]


def _look_up(table: Any, prefix: Prefix) -> Any:
    return table(prefix) if callable(table) else table[prefix]


def _depths(parents: Sequence[int]) -> list[int]:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths
