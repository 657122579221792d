"""Sampled drafts: draw the tokens of draft trees, and record the laws that they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .forest import DraftNode, Forest
from .ops import sample
from .philox import Domain
from .sampling import OK
from .shapes import PAD
from .tree import DraftKind, Proposal, _seal, at_once, pad_rows

_LEAST_SHARE = 1e-30
"""A draft token less likely than this share of the likeliest is not drawn, so that every token that
can be has a normal float32 probability in the recorded law.
"""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Per-row sampling parameters, each [B] or None, as in `ops.sample`; all None is greedy.

    Attributes:
        bias: [B, V] float32, the only one that is not [B].
    """

    seeds: Tensor | None = None
    temperature: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    bias: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `sample` and `verify`."""
        return {name: getattr(self, name) for name in self.__slots__}


GREEDY = SamplingParams()
"""No row samples."""


class ProposalBuilder(Forest):
    """Grows one draft tree per request, and draws its sampled tokens.

    A sampled node, once drawn, stays: whether it is verified may not depend on its token. Decide
    before drawing, from tokens already there and from draft probabilities. For the same reason use
    one builder per step, and return what it builds.

    A draw is keyed by the seed, the position of the root and the number of the draw in its row.
    Were it keyed by the position of the drafted token, a later step that drafts there again would
    see noise that already decided an earlier step, and would draw from another law than it records.

    Args:
        sequences: committed tokens of each row; the last one is its root.
        vocab_size: V of the target.
        sampling: the target's seeds and parameters, which draws use unless told otherwise; seeds
            are 0 where it has none.
        active: rows that get a tree; None means all.
        device: of the proposal's tensors, and of all tensors given here.
        offsets: [U] int64, for a draft vocabulary other than the target's: draft id u is target id
            `u + offsets[u]`, all distinct. Nodes hold target ids.

    Attributes:
        roots: the root of every active row.

    Source: the rule against dropping drawn tokens, DSpark, section 3.2.2, and 2505.12398.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        sampling: SamplingParams = GREEDY,
        active: Sequence[bool] | None = None,
        device: torch.device | str = "cpu",
        offsets: Tensor | None = None,
    ) -> None:
        super().__init__(sequences, vocab_size=vocab_size, active=active)
        self._sampling = sampling
        self._device = torch.device(device)
        self._offsets = offsets
        self._positions = torch.tensor([len(s) - 1 for s in sequences], device=self._device)
        seeds = sampling.seeds
        self._seeds = torch.zeros_like(self._positions) if seeds is None else seeds
        self._num_draws = [0] * len(sequences)
        self._laws: list[Tensor] = []  # [R, U] of each call of `sample`
        self._law_ids: list[list[int]] = [[] for _ in sequences]  # where each row's laws are there

    def sample(
        self,
        nodes: Sequence[DraftNode],
        logits: Tensor,
        *,
        num_children: int,
        num_top: int = 0,
        replacement: bool = False,
        temperature: float | Tensor | None = None,
        top_k: int | Tensor | None = None,
        top_p: float | Tensor | None = None,
        min_p: float | Tensor | None = None,
    ) -> list[list[DraftNode]]:
        """Draw children of nodes, and record the law that they were drawn from.

        Where the temperature is 0, the likeliest tokens become deterministic children instead.

        Args:
            nodes: R parents in any rows; each can be drawn from once.
            logits: [R, U] float, the draft's given the path to each parent; untouched.
            num_children: tokens drawn for each parent; fewer where the law holds fewer.
            num_top: so many of the law's likeliest tokens become children too, deterministic ones
                behind the drawn ones, which then come from the law without them. With one drawn
                token these are greedy drafts, for rule `gd_traversal`.
            replacement: draw independently, so that a token may come twice; else distinct tokens.
            temperature, top_k, top_p, min_p: a number, or [B]; None is the target's.

        Returns:
            the children of each parent, in the order drawn.

        Raises:
            ValueError: an unknown parent or one that was drawn from before, logits of a wrong shape
                or without a finite value, parameters of a wrong shape, a token outside the target's
                vocabulary.

        Source: greedy drafts, Hu et al., 2502.18779, section 4.
        """
        self._check(nodes, logits, num_children, num_top)
        if not nodes:
            return []
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        options = self._options(nodes, given)
        is_greedy = (~(options["temperature"] > 0)).tolist()
        streams = self._take_streams(nodes, num_children if replacement else 1, logits.shape[1])
        top = torch.empty((len(nodes), 0), dtype=torch.int64, device=self._device)
        if num_top:
            logits, top, options = _without_top(logits, options, num_top)
        drawn, law = _draw(logits, options, streams, num_children, replacement)
        tokens = self._target_ids(torch.cat([drawn, top], 1)).tolist()
        is_joint = num_children > 1 and not replacement
        kind = DraftKind.SAMPLED_WITHOUT_REPLACEMENT if is_joint else DraftKind.SAMPLED
        first_law = sum(len(rows) for rows in self._laws)
        self._laws.append(law)
        grown = []
        for i, (node, row) in enumerate(zip(nodes, tokens, strict=True)):
            sampled, likeliest = row[:num_children], row[num_children:]
            if is_greedy[i]:
                sampled, likeliest = [], likeliest + sampled
            grown.append(self._grow(node, sampled, kind, first_law + i, likeliest))
        return grown

    def build(self) -> Proposal:
        """The proposal; nothing can be added, drawn or pruned after it."""
        self._is_finished = True
        kept = self._kept()
        tree = self._tree(kept, self._device)
        laws = [[e.law for e in row] for row in kept]
        kinds, draft_rows, ids = at_once(
            self._device,
            pad_rows([[int(e.kind) for e in row] for row in kept], torch.int8),
            pad_rows(laws, torch.int32, value=PAD),
            pad_rows(self._law_ids, torch.int64),
        )
        if not any(self._law_ids):
            return _seal(tree, kinds, None, None, None)
        probs = torch.cat(self._laws)[ids]
        return _seal(tree, kinds, draft_rows, probs, self._offsets)

    def _grow(
        self,
        node: DraftNode,
        sampled: Sequence[int],
        kind: DraftKind,
        law_id: int,
        likeliest: Sequence[int],
    ) -> list[DraftNode]:
        """Append children drawn from a law, then deterministic ones."""
        entry = self._find(node)
        entry.is_drawn_from = True
        children = [self._append(node, token, kind) for token in sampled if token != PAD]
        if children:
            entry.law = len(self._law_ids[node.row])
            self._law_ids[node.row].append(law_id)
        children += [
            self._append(node, token, DraftKind.ONEHOT)
            for token in dict.fromkeys(likeliest)
            if token != PAD
        ]
        if not children:
            raise ValueError(
                f"proposal: row {node.row}: the draft logits of node {node.index} have no finite "
                "value"
            )
        return children

    def _target_ids(self, draft_ids: Tensor) -> Tensor:
        if self._offsets is None:
            return draft_ids
        ids = draft_ids + self._offsets[draft_ids.clamp_min(0)]
        return ids.masked_fill(draft_ids == PAD, PAD)

    def _options(self, nodes: Sequence[DraftNode], given: dict[str, Any]) -> dict[str, Any]:
        """Per-row arguments of the op `sample`."""
        rows = torch.tensor([node.row for node in nodes], device=self._device)
        options = {"seeds": self._seeds[rows], "positions": self._positions[rows]}
        batch = len(self._positions)
        for name, value in given.items():
            value = getattr(self._sampling, name) if value is None else value
            if value is None:
                continue
            dtype = torch.int32 if name == "top_k" else torch.float32
            per_row = torch.as_tensor(value, dtype=dtype, device=self._device)
            if per_row.shape not in ((), (batch,)):
                raise ValueError(
                    f"proposal: {name} must be a number or [B] = [{batch}], "
                    f"got {list(per_row.shape)}"
                )
            options[name] = per_row.expand(batch)[rows]
        greedy = torch.zeros(len(rows), dtype=torch.float32, device=self._device)
        temperature = options.setdefault("temperature", greedy)
        floor = torch.full_like(temperature, _LEAST_SHARE)
        options["min_p"] = options.get("min_p", floor).maximum(floor)
        return options

    def _take_streams(self, nodes: Sequence[DraftNode], num: int, size: int) -> Tensor:
        """[R] first of `num` numbers for each node that no other draw of its row has."""
        firsts = []
        for node in nodes:
            firsts.append(self._num_draws[node.row])
            self._num_draws[node.row] += num
        if max(self._num_draws) > 2**32 // ((size + 3) // 4):
            raise ValueError(f"proposal: too many draws in one step, got {max(self._num_draws)}")
        return torch.tensor(firsts, device=self._device)

    def _check(
        self, nodes: Sequence[DraftNode], logits: Tensor, num_children: int, num_top: int
    ) -> None:
        if num_children < 1 or num_top < 0:
            raise ValueError(
                "proposal: num_children must be >= 1 and num_top >= 0, "
                f"got {num_children} and {num_top}"
            )
        size = self._laws[0].shape[1] if self._laws else logits.shape[-1]
        size = size if self._offsets is None else len(self._offsets)
        if logits.shape != (len(nodes), size) or size > self.vocab_size:
            raise ValueError(
                f"proposal: logits must be [R, U] = [{len(nodes)}, {size}] with U <= V = "
                f"{self.vocab_size}, got {list(logits.shape)}"
            )
        seen: set[DraftNode] = set()
        for node in nodes:
            if self._find(node).is_drawn_from or node in seen:
                raise ValueError(
                    f"proposal: row {node.row}: node {node.index} was drawn from before; draw all "
                    "its children at once, from one law"
                )
            seen.add(node)


def _draw(
    logits: Tensor,
    options: dict[str, Any],
    streams: Tensor,
    num_children: int,
    replacement: bool,
) -> tuple[Tensor, Tensor]:
    """Draft ids [R, num_children], PAD where the law holds no more, and the law [R, U]."""
    repeats = num_children if replacement else 1
    num_draws = num_children // repeats
    domain = int(Domain.DRAFT)
    drawn, status, law = sample(
        logits,
        **options,
        streams=streams,
        num_draws=num_draws,
        domain=domain,
        return_probs=True,
    )
    columns = [drawn]
    for i in range(1, repeats):
        columns.append(sample(logits, **options, streams=streams + i, domain=domain)[0])
    return torch.cat(columns, 1).masked_fill((status != OK)[:, None], PAD), law


def _without_top(
    logits: Tensor, options: dict[str, Any], num_top: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The likeliest tokens [R, num_top], PAD where there are fewer, and scores and options that
    draw from the law without them.
    """
    _, _, law = sample(logits, **options, domain=int(Domain.DRAFT), return_probs=True)
    is_greedy = ~(options["temperature"] > 0)
    scores = torch.where(is_greedy[:, None], logits.float(), law.log())
    top, status, _ = sample(scores, num_draws=num_top)
    top = top.masked_fill((status != OK)[:, None], PAD)
    is_left = torch.ones_like(scores, dtype=torch.bool)
    is_left.scatter_(1, torch.where(top == PAD, top[:, :1], top).clamp_min(0), False)
    temperature = (~is_greedy).float()
    keys = {name: options[name] for name in ("seeds", "positions")}
    return scores, top, {**keys, "temperature": temperature, "mask": is_left}
