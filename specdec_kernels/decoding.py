"""The decoding loop: draft -> forward -> verify -> commit. It knows no model library."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .acceptance import RULES
from .budget import Budget
from .drafters.base import DraftContext, Drafter, Verified
from .drafting import GREEDY, SamplingParams
from .ops import sample, verify
from .pass_timer import PassTimer
from .processing import LogitsProcessing, NodeContext, decide_processed
from .proposing import Proposer
from .sampling import NO_SUCH_DRAW
from .shapes import PAD
from .statistics import DecodeStats
from .tree import DraftKind, Proposal, TokenTree, agreed


class Target(Protocol):
    """The large model, with its cache, as the loop sees it.

    Attributes:
        pads: whether a pass over trees of different sizes costs as many tokens as if all were as
            large as the largest.
    """

    device: torch.device
    vocab_size: int

    @property
    def pads(self) -> bool:
        """See above."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Fill the cache with all prompt tokens; logits [B, V] of each last one."""

    def forward(self, tree: TokenTree) -> Tensor:
        """Score every node given its path: logits [B, N, V]. The nodes' K/V wait behind the
        committed slots.
        """

    def commit(self, path: Tensor, num_kept: Tensor) -> None:
        """Keep path nodes [B, N] int32, `num_kept` [B] int32 on the host of each row, and drop the
        other nodes.
        """


Listener = Callable[[int, list[int], int], None]
"""Called with (row, new tokens, how many of them, from the front, were accepted draft tokens)."""

Recorder = Callable[[int, Tensor, Tensor], None]
"""Called with (row, logits [n, V], processed logits [n, V] float32) of the row's next n tokens,
before they are appended: a row that ends earlier leaves the last ones unused."""


Agree = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Given integer tensors, of one shape in every process, returns those that all go by."""


def alone(decision: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`Agree` of a single process."""
    return decision


@dataclass(slots=True)
class _Rows:
    """The growing sequences of a batch and when they end."""

    sequences: list[list[int]]
    max_lengths: Sequence[int]
    should_stop: Callable[[int, list[int]], bool]
    listener: Listener | None
    active: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.active = [True] * len(self.sequences)

    def push(self, row: int, tokens: list[int]) -> int:
        """Append tokens until the row ends; how many were appended."""
        sequence = self.sequences[row]
        count = 0
        for token in tokens:
            sequence.append(token)
            count += 1
            if len(sequence) >= self.max_lengths[row] or self.should_stop(row, sequence):
                self.active[row] = False
                break
        if self.listener is not None:
            self.listener(row, tokens[:count], min(count, len(tokens) - 1))
        return count


@torch.no_grad()
def decode(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_lengths: Sequence[int],
    should_stop: Callable[[int, list[int]], bool] = lambda row, sequence: False,
    sampling: SamplingParams = GREEDY,
    rule: str | None = None,
    listener: Listener | None = None,
    budget: Budget | None = None,
    process: LogitsProcessing | None = None,
    recorder: Recorder | None = None,
    agree: Agree = alone,
    stats: DecodeStats | None = None,
) -> tuple[list[list[int]], DecodeStats]:
    """Continue every prompt as the target alone would.

    Args:
        target: the model and its empty cache.
        drafter: proposes trees; None decodes plainly (trees of one node).
        prompts: B non-empty token lists.
        max_lengths: [B] most tokens of each sequence, prompt included; above the prompt's length.
        should_stop: `should_stop(row, sequence)` after every token; True ends the row with that
            token.
        sampling: greedy unless given.
        rule: a lossless rule of `verify` for all rows; None tests each row that has sampled drafts
            by `traversal` and the others by `walk`.
        listener: receives tokens as they are committed.
        budget: limits trees to what pays; None leaves them to the drafter.
        process: changes the logits before they are filtered and sampled.
        recorder: receives the logits of every token, before it is appended.
        agree: makes all processes of a distributed target score the same trees and decide alike.
        stats: filled while decoding, for who wants to watch; new ones if None.

    Returns:
        the sequences, prompts included, and statistics. A drafter that raises, or proposes what is
        no tree over the vocabulary, is warned of and noted there, and its step decodes plainly.

    Raises:
        ValueError: an unknown or lossy rule, or one that cannot test the drafts.
        ArithmeticError: a target row without finite logit, a draft token without mass in its law.
    """
    check_rule(rule)
    start = time.perf_counter()
    rows = _Rows([list(p) for p in prompts], max_lengths, should_stop, listener)
    stats = stats or DecodeStats.start(len(prompts))
    proposer = Proposer(drafter, stats, budget)
    timer = PassTimer(target.device)
    proposer.begin(len(prompts))
    _prefill(target, proposer, rows, sampling, process, recorder, agree)
    stats.prefill_seconds = time.perf_counter() - start

    while any(rows.active):
        proposal = proposer.propose(_context(rows, target, sampling, budget))
        if agree is not alone:
            proposal = agreed(proposal, agree)
        tree = proposal.tree
        # Before the pass: to copy something to a device waits for all that was launched there.
        positions = torch.tensor([len(s) - 1 for s in rows.sequences], device=target.device)
        drafted = time.perf_counter()
        timer.start()
        logits = target.forward(tree)
        timer.stop()
        results, scored = _decide(process, rule, logits, proposal, positions, sampling, rows)
        results = agree(results)
        emitted = _read(results, rows.sequences, proposer)
        before = sum(stats.num_accepted)
        if recorder is not None:
            for row, (nodes, _) in enumerate(emitted):
                if rows.active[row]:
                    along = results[0][row, : len(nodes)].long()
                    recorder(row, logits[row, along], scored(row, along))
        kept = _push_step(rows, stats, tree, emitted)
        # Stop rules come first: tokens after a stop are never committed.
        target.commit(results[0], torch.tensor(kept, dtype=torch.int32, device="cpu"))
        seconds = timer.seconds()
        stats.forward_seconds += seconds
        stats.verify_seconds += max(0.0, time.perf_counter() - drafted - seconds)
        paths = [nodes[:count] for (nodes, _), count in zip(emitted, kept, strict=True)]
        proposer.observe(Verified(tree, logits, paths, rows.sequences))
        num_new = sum(stats.num_accepted) - before
        proposer.record(proposal, num_new, seconds, pads=target.pads)

    proposer.end(rows.sequences, [len(p) for p in prompts])
    stats.total_seconds = time.perf_counter() - start
    return rows.sequences, stats


def check_rule(rule: str | None) -> None:
    """Raise ValueError unless `decode` takes the rule."""
    lossless = [name for name in RULES if name != "typical"]
    if rule is not None and rule not in lossless:
        raise ValueError(f"rule must be None or one of {', '.join(lossless)}, got {rule!r}")


def _decide(
    process: LogitsProcessing | None,
    rule: str | None,
    logits: Tensor,
    proposal: Proposal,
    positions: Tensor,
    sampling: SamplingParams,
    rows: _Rows,
) -> tuple[tuple[Tensor, ...], Callable[[int, Tensor], Tensor]]:
    """The decision, and the processed logits of path nodes by row."""
    if process is None:
        results = _verify(rule, logits, proposal, positions, sampling)
        return results, lambda row, nodes: logits[row, nodes].float()
    return decide_processed(
        process,
        lambda processed, drafts: _verify(rule, processed, drafts, positions, sampling),
        logits,
        proposal,
        positions,
        sampling,
        rows.sequences,
        walks=rule in (None, "walk"),
    )


def _verify(
    rule: str | None,
    logits: Tensor,
    proposal: Proposal,
    positions: Tensor,
    sampling: SamplingParams,
) -> tuple[Tensor, ...]:
    """Path, accepted, next token and status. Without a rule each row gets one by its own drafts:
    its tokens must not depend on the other rows.
    """
    tree = proposal.tree

    def run(rule: str, num_nodes: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = verify(
            logits,
            tree.tokens,
            tree.parents,
            num_nodes,
            positions=positions,
            kinds=proposal.kinds,
            draft_rows=proposal.draft_rows,
            draft_probs=proposal.draft_probs,
            draft_offsets=proposal.draft_offsets,
            rule=rule,
            **sampling.arguments(),
        )
        return results[:4]

    if rule is not None or proposal.draft_rows is None:
        return run(rule or "walk", tree.num_nodes)
    is_sampled = (proposal.kinds != DraftKind.ONEHOT).any(1)
    walked = run("walk", tree.num_nodes * ~is_sampled)
    tested = run("traversal", tree.num_nodes * is_sampled)
    return tuple(map(torch.maximum, walked, tested))  # an idle row has the least of every value


def _read(
    results: tuple[Tensor, ...], sequences: Sequence[Sequence[int]], proposer: Proposer
) -> list[tuple[list[int], int]]:
    """Accepted path and next token of each row, read from the device at once.

    Raises:
        ArithmeticError: as `decode`.
    """
    path, num_accepted, next_tokens, status = results
    width = path.shape[1]
    columns = torch.stack([num_accepted.long(), next_tokens, status.long()], 1)
    read = torch.cat([path, columns], 1).tolist()
    _check_status([row[-1] for row in read], sequences, proposer)
    return [(row[: row[width] + 1], row[width + 1]) for row in read]


def _push_step(
    rows: _Rows, stats: DecodeStats, tree: TokenTree, emitted: Sequence[tuple[list[int], int]]
) -> list[int]:
    """Append what a step emitted; path nodes to keep per row."""
    kept = []
    for row, active in enumerate(list(rows.active)):
        if not active:
            kept.append(0)
            continue
        nodes, following = emitted[row]
        tokens, parents = tree.rows()[row]
        # The last pushed token becomes the next root: its K/V is not in the cache.
        count = rows.push(row, [*(tokens[node] for node in nodes[1:]), following])
        kept.append(count)
        stats.num_steps[row] += 1
        stats.num_tokens[row] += count
        stats.num_drafted[row] += len(tokens) - 1
        stats.num_accepted[row] += min(count, len(nodes) - 1)
        stats.acceptance.count(parents, nodes)
    return kept


def _prefill(
    target: Target,
    proposer: Proposer,
    rows: _Rows,
    sampling: SamplingParams,
    process: LogitsProcessing | None,
    recorder: Recorder | None,
    agree: Agree,
) -> None:
    """Fill the cache, and push the first token of every row."""
    logits = target.prefill(rows.sequences)
    lasts = [([s[-1]], [PAD]) for s in rows.sequences]
    positions = torch.tensor([len(s) for s in rows.sequences], device=target.device)
    contexts = [NodeContext(b, sequence) for b, sequence in enumerate(rows.sequences)]
    scores = logits if process is None else process(logits.to(torch.float32, copy=True), contexts)
    drawn, status, _ = sample(scores, positions=positions, **sampling.arguments())
    drawn, status = agree((drawn, status))
    _check_status(status.tolist(), rows.sequences, proposer)
    for row, token in enumerate(drawn[:, 0].tolist()):
        if recorder is not None:
            recorder(row, logits[row : row + 1], scores[row : row + 1].float())
        rows.push(row, [token])
    tree = TokenTree.from_rows(lasts, target.device)
    proposer.observe(Verified(tree, logits[:, None], [[0]] * len(lasts), rows.sequences))


def _context(
    rows: _Rows, target: Target, sampling: SamplingParams, budget: Budget | None
) -> DraftContext:
    sequences = rows.sequences
    depths = [m - len(s) - 1 for m, s in zip(rows.max_lengths, sequences, strict=True)]
    return DraftContext(
        sequences,
        rows.active,
        depths,
        target.device,
        target.vocab_size,
        sampling,
        budget,
        target.pads,
    )


def _check_status(
    status: Sequence[int], sequences: Sequence[Sequence[int]], proposer: Proposer
) -> None:
    for row, value in enumerate(status):
        length = len(sequences[row])
        if value == NO_SUCH_DRAW:
            raise ArithmeticError(
                f"{proposer.name}: row {row}: a draft token after token {length} has no "
                "mass in the law recorded for it"
            )
        if value:
            raise ArithmeticError(
                f"decode: row {row}: the target's logits have no finite value after token {length}"
            )
