"""Changes to the target's logits that depend on the tokens before: in a tree, on a node's path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .drafting import SamplingParams
from .ops import sample
from .sampling import OK
from .shapes import PAD
from .tree import DraftKind, Proposal, TokenTree

Results = tuple[Tensor, ...]
"""path, num_accepted, next_tokens and status, as of `ops.verify`"""


@dataclass(frozen=True, slots=True)
class NodeContext:
    """What stands before the token that a row of logits predicts.

    Attributes:
        row: of the batch.
        sequence: committed tokens of the row.
        drafted: draft tokens after them, down to the node.
    """

    row: int
    sequence: Sequence[int]
    drafted: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens before the predicted one."""
        return len(self.sequence) + len(self.drafted)

    def tokens(self) -> list[int]:
        """Those tokens."""
        return [*self.sequence, *self.drafted]


class LogitsProcessing(Protocol):
    """Changes logits before they are filtered and sampled.

    Attributes:
        needs_prefix: whether it reads the tokens before, and not just how many there are: then it
            is asked only about the nodes that a walk visits.
    """

    needs_prefix: bool

    def __call__(self, logits: Tensor, contexts: Sequence[NodeContext]) -> Tensor:
        """Logits [R, V] float32, which may be overwritten, of R contexts -> [R, V] float32."""


def process_nodes(
    process: LogitsProcessing,
    logits: Tensor,
    tree: TokenTree,
    sequences: Sequence[Sequence[int]],
    rows: Sequence[int],
) -> Tensor:
    """Process every node of some rows of logits [B, N, V]; [B, N, V] float32, other rows are 0."""
    processed = torch.zeros_like(logits, dtype=torch.float32)
    contexts, places = [], []
    for b in rows:
        tokens, parents = tree.rows()[b]
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(tokens[1:], parents[1:], strict=True):
            paths.append((*paths[parent], token))
        contexts += [NodeContext(b, sequences[b], path) for path in paths[: len(tokens)]]
        places += [(b, i) for i in range(len(tokens))]
    if contexts:
        row, node = torch.tensor(places, device=logits.device).T
        processed[row, node] = process(logits[row, node].float(), contexts)
    return processed


def walk_processed(
    process: LogitsProcessing,
    logits: Tensor,
    tree: TokenTree,
    positions: Tensor,
    sampling: SamplingParams,
    sequences: Sequence[Sequence[int]],
    rows: Sequence[int],
) -> tuple[Results, dict[tuple[int, int], Tensor]]:
    """Rule `walk` of `ops.verify` on processed logits, processing only what the walk visits.

    A row asks `process` about the very contexts that plain decoding would, in the same order.

    Args:
        process: what changes the logits.
        logits: [B, N, V] float.
        tree: one-hot drafts.
        positions: [B] int64, of the roots.
        sampling: per-row parameters.
        sequences: committed tokens of each row.
        rows: who walks; the others are idle.

    Returns:
        path, num_accepted, next_tokens and status as `verify`, and the processed logits [V] float32
        of each visited (row, node).
    """
    batch, nodes, _ = logits.shape
    path = torch.full((batch, nodes), PAD, dtype=torch.int32, device="cpu")
    accepted = torch.zeros(batch, dtype=torch.int32, device="cpu")
    following = torch.full((batch,), PAD, dtype=torch.int64, device="cpu")
    status = torch.full((batch,), OK, dtype=torch.int32, device="cpu")
    children = _children(tree, rows)
    visited: dict[tuple[int, int], Tensor] = {}
    at = dict.fromkeys(rows, 0)
    drafted: dict[int, tuple[int, ...]] = dict.fromkeys(rows, ())
    while at:
        order = list(at)
        index = torch.tensor(order, device=logits.device)
        node = torch.tensor([at[b] for b in order], device=logits.device)
        contexts = [NodeContext(b, sequences[b], drafted[b]) for b in order]
        scores = process(logits[index, node].float(), contexts)
        depths = torch.tensor([len(drafted[b]) for b in order], device=logits.device)
        options = {k: None if v is None else v[index] for k, v in sampling.arguments().items()}
        drawn, ok, _ = sample(scores, positions=positions[index] + depths + 1, **options)
        for i, (token, state) in enumerate(zip(drawn[:, 0].tolist(), ok.tolist(), strict=True)):
            b = order[i]
            visited[b, at[b]] = scores[i]
            path[b, len(drafted[b])] = at[b]
            accepted[b] = len(drafted[b])
            following[b], status[b] = token, state
            child = children[b].get((at[b], token))
            if child is None or state != OK:
                del at[b]
            else:
                at[b], drafted[b] = child, (*drafted[b], token)
    results = tuple(x.to(logits.device) for x in (path, accepted, following, status))
    return results, visited


def _children(tree: TokenTree, rows: Sequence[int]) -> dict[int, dict[tuple[int, int], int]]:
    """Row -> (parent node, token) -> the first such child."""
    found: dict[int, dict[tuple[int, int], int]] = {}
    for b in rows:
        tokens, parents = tree.rows()[b]
        found[b] = {}
        for i in range(1, len(tokens)):
            found[b].setdefault((parents[i], tokens[i]), i)
    return found


def decide_processed(
    process: LogitsProcessing,
    verify: Callable[[Tensor, Proposal], Results],
    logits: Tensor,
    proposal: Proposal,
    positions: Tensor,
    sampling: SamplingParams,
    sequences: Sequence[Sequence[int]],
    *,
    walks: bool,
) -> tuple[Results, Callable[[int, Tensor], Tensor]]:
    """Decide on processed logits.

    Args:
        process, logits, proposal, positions, sampling, sequences: of this step.
        verify: decides on logits [B, N, V] that are processed.
        walks: whether rows without sampled drafts may go by rule `walk`.

    Returns:
        the decision, and `scores(row, nodes)`: the processed logits of path nodes.
    """
    tree = proposal.tree
    is_sampled = (proposal.kinds != DraftKind.ONEHOT).any(1)
    rows = [b for b, size in enumerate(tree.sizes()) if size]
    is_lazy = process.needs_prefix and walks
    walking = [b for b in rows if is_lazy and not bool(is_sampled[b])]
    tested = [b for b in rows if b not in walking]
    results, visited = walk_processed(
        process, logits, tree, positions, sampling, sequences, walking
    )
    if not tested:
        return results, lambda b, nodes: torch.stack([visited[b, int(n)] for n in nodes])
    processed = process_nodes(process, logits, tree, sequences, tested)
    others = verify(processed, proposal)  # of walking rows, whose logits are 0 here, unused
    walks_here = torch.zeros_like(is_sampled)
    walks_here[torch.tensor(walking, dtype=torch.int64, device=logits.device)] = True
    results = tuple(
        torch.where(walks_here.reshape(-1, *[1] * (own.dim() - 1)), own, other)
        for own, other in zip(results, others, strict=True)
    )

    def scores(b: int, nodes: Tensor) -> Tensor:
        if b in walking:
            return torch.stack([visited[b, int(n)] for n in nodes])
        return processed[b, nodes]

    return results, scores
