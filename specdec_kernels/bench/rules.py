"""Draft tokens that each acceptance rule keeps, at the same contexts of a real model.

At every context draft trees of one shape are drawn from each draft law: siblings without
replacement, and, unless it is a chain, greedy drafts (one sampled child, the others deterministic).
All trees pass the target together. What a rule keeps is averaged over a few seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ..drafting import ProposalBuilder, SamplingParams
from ..forest import DraftNode
from ..hf.attention import tree_attention_in
from ..hf.fusing import fast_layers
from ..hf.target import HFTarget
from ..hf.text import TextModel
from ..ops import sample, verify
from ..shapes import PAD
from ..tree import Proposal, TokenTree
from .draft_laws import DraftLaws, OwnLaws
from .e2e import Prompt
from .machine import describe_machine

DISTINCT, GREEDY_DRAFTS = "without replacement", "greedy drafts"
RULES: dict[str, tuple[str, ...]] = {
    DISTINCT: ("token", "traversal"),
    GREEDY_DRAFTS: ("token", "gd_traversal"),
}
"""How siblings are drawn -> the rules of `verify` that test them."""
CHAIN_RULES: dict[str, tuple[str, ...]] = {DISTINCT: ("token", "block", "traversal")}
"""The same of trees without siblings."""

Key = tuple[str, float, str, str]
"""Draft, temperature, siblings, rule."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        shape: children of each node, by depth; ones are a chain.
        temperatures: of target and draft alike.
        exit_layers: layers of the target that the early-exit draft runs.
        noise: logits; the noisy draft is the target's logits / 1.2 plus so much Gaussian noise.
        contexts_per_prompt: tokens that the target samples after each prompt.
        num_seeds: of acceptance, per tree.
    """

    shape: tuple[int, ...]
    temperatures: tuple[float, ...]
    exit_layers: int = 24
    noise: float = 2.0
    contexts_per_prompt: int = 50
    num_seeds: int = 4

    @property
    def rules(self) -> dict[str, tuple[str, ...]]:
        """How siblings are drawn -> the rules that test them."""
        return RULES if max(self.shape) > 1 else CHAIN_RULES


def run_rules(
    subject: TextModel,
    prompts: Sequence[Prompt],
    *,
    num_contexts: int,
    settings: Settings,
    laws: DraftLaws | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every rule at `num_contexts` contexts.

    Args:
        subject: the target.
        prompts: after which the contexts are, in the target's own sampled text.
        laws: what drafts are drawn from; None are laws made of the target itself.

    Returns:
        {"machine", "rows": [{"draft", "temperature", "siblings", "rule", "accepted", "ci95",
        "gain", "gain_ci95"}]}: mean draft tokens accepted per step, and the mean difference to
        rejection without replacement as a share of what that accepts; each with the half-width of
        its 95 % confidence interval over prompts. No gain (None) where that accepts nothing.

    Raises:
        ValueError: too few prompts for so many contexts.
    """
    laws = OwnLaws(settings.exit_layers, settings.noise) if laws is None else laws
    per_prompt = settings.contexts_per_prompt
    if not per_prompt < num_contexts <= len(prompts) * per_prompt:
        raise ValueError(
            f"contexts must be in [{per_prompt + 1}, {len(prompts) * per_prompt}] with "
            f"{len(prompts)} prompts and {per_prompt} contexts each, got {num_contexts}"
        )
    clusters: list[dict[Key, list[float]]] = []
    for first in range(0, num_contexts, per_prompt):
        prompt = prompts[len(clusters)]
        clusters.append({})
        num = min(per_prompt, num_contexts - first)
        for counts in _measure_prompt(subject, prompt, settings, laws, num):
            progress(f"{prompt.category} {prompt.question_id}")
            for key, count in counts.items():
                clusters[-1].setdefault(key, []).append(count)
    machine = describe_machine()
    machine["settings"] = {
        "model": subject.name,
        "dtype": subject.dtype,
        "num_contexts": num_contexts,
        **asdict(settings),
    }
    return {"machine": machine, "rows": [_summary(key, clusters) for key in clusters[0]]}


def _summary(key: Key, clusters: list[dict[Key, list[float]]]) -> dict[str, Any]:
    draft, temperature, siblings, rule = key
    base = (draft, temperature, DISTINCT, "token")
    accepted, ci95 = _mean([cluster[key] for cluster in clusters])
    unit, _ = _mean([cluster[base] for cluster in clusters])
    gain, gain_ci95 = _mean(
        [
            [own - other for own, other in zip(cluster[key], cluster[base], strict=True)]
            for cluster in clusters
        ]
    )
    return {
        "draft": draft,
        "temperature": temperature,
        "siblings": siblings,
        "rule": rule,
        "accepted": accepted,
        "ci95": ci95,
        "gain": gain / unit if unit else None,
        "gain_ci95": gain_ci95 / unit if unit else None,
    }


def _mean(clusters: list[list[float]]) -> tuple[float, float]:
    """Mean of all values, and 1.96 standard errors of it. Contexts of one prompt depend on each
    other, so that prompts are the sample.
    """
    num = sum(map(len, clusters))
    middle = sum(map(sum, clusters)) / num
    shares = [sum(value - middle for value in cluster) / num for cluster in clusters]
    scale = len(clusters) / (len(clusters) - 1)
    return middle, 1.96 * math.sqrt(scale * sum(share * share for share in shares))


@dataclass(slots=True)
class _Draft:
    """A draft tree at one context; all of them share the root of the joint tree."""

    name: str
    temperature: float
    siblings: str
    builder: ProposalBuilder
    frontier: list[DraftNode]
    position: Tensor  # [1], of the root
    places: list[int] = field(default_factory=lambda: [0])  # node -> node of the joint tree
    proposal: Proposal | None = None

    def grow(self, logits: Tensor, num_children: int) -> list[tuple[DraftNode, DraftNode]]:
        """Draw the next level from the draft's logits [M, V] at the nodes of the joint tree; the
        new nodes, each behind its parent.
        """
        num_top = num_children - 1 if self.siblings == GREEDY_DRAFTS else 0
        children = self.builder.sample(
            self.frontier,
            logits[[self.places[node.index] for node in self.frontier]],
            num_children=num_children - num_top,
            num_top=num_top,
            temperature=self.temperature,
        )
        edges = [(a, b) for a, below in zip(self.frontier, children, strict=True) for b in below]
        self.frontier = [child for _, child in edges]
        return edges


def _measure_prompt(
    subject: TextModel, prompt: Prompt, settings: Settings, laws: DraftLaws, num: int
) -> Iterator[dict[Key, float]]:
    """What each rule keeps, at `num` contexts along a text that the target samples."""
    tokens = subject.encode(prompt.text, is_chat=True, max_new_tokens=num + len(settings.shape))
    sequence: list[int] = tokens[0].tolist()
    num_drafts = len(laws.names) * len(settings.temperatures) * len(settings.rules)
    nodes = 1 + num_drafts * sum(accumulate(settings.shape, mul))
    target = HFTarget(subject.model, len(sequence) + num + nodes)
    with (
        torch.no_grad(),
        tree_attention_in(subject.model),
        fast_layers(subject.model),
        laws.attach(target, num, nodes),
    ):
        last = target.prefill([sequence])
        for _ in range(num):
            position = torch.tensor([len(sequence)])
            token, _, _ = sample(last, torch.tensor([0]), position, torch.ones(1))
            sequence.append(int(token))
            counts, last = _measure_context(target, laws, sequence, settings)
            target.commit(torch.zeros((1, 1), dtype=torch.int32), torch.ones(1).int())
            yield counts


def _measure_context(
    target: HFTarget, laws: DraftLaws, sequence: list[int], settings: Settings
) -> tuple[dict[Key, float], Tensor]:
    """What each rule keeps, and the target's logits [1, V] after the sequence."""
    drafts = [
        _start(name, temperature, siblings, sequence, target.vocab_size, laws.offsets)
        for name in laws.names
        for temperature in settings.temperatures
        for siblings in settings.rules
    ]
    tokens, parents = [sequence[-1]], [PAD]
    laws.start(sequence)
    scores = None
    for depth, num_children in enumerate(settings.shape, 1):
        # The last level is drafted, not scored: whether a leaf is kept does not depend on its row.
        if laws.need_target or depth == len(settings.shape):
            scores = target.forward(TokenTree.from_rows([(tokens, parents)]))[0].float()
        logits = laws.logits(tokens, parents, scores)
        for draft in drafts:
            for parent, node in draft.grow(logits[draft.name], num_children):
                draft.places.append(len(tokens))
                tokens.append(node.token)
                parents.append(draft.places[parent.index])
    assert scores is not None
    counts = {}
    for draft in drafts:
        for rule in settings.rules[draft.siblings]:
            key = (draft.name, draft.temperature, draft.siblings, rule)
            counts[key] = _mean_kept(draft, rule, scores, settings.num_seeds)
    return counts, scores[:1]


def _start(
    name: str,
    temperature: float,
    siblings: str,
    sequence: list[int],
    vocab_size: int,
    offsets: Tensor | None,
) -> _Draft:
    position = torch.tensor([len(sequence) - 1])
    sampling = SamplingParams(seeds=torch.tensor([0]))
    builder = ProposalBuilder([sequence], vocab_size=vocab_size, sampling=sampling, offsets=offsets)
    return _Draft(name, temperature, siblings, builder, list(builder.roots), position)


def _mean_kept(draft: _Draft, rule: str, logits: Tensor, num_seeds: int) -> float:
    """Draft tokens that the rule keeps, on average over seeds; logits [M, V] of the joint tree."""
    proposal = draft.builder.build() if draft.proposal is None else draft.proposal
    draft.proposal = proposal
    tree = proposal.tree
    rows = logits[[place if place < len(logits) else 0 for place in draft.places]]

    def each_seed(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.expand(num_seeds, *value.shape[1:])

    _, num_accepted, _, status, *_ = verify(
        rows.expand(num_seeds, -1, -1),
        each_seed(tree.tokens),
        each_seed(tree.parents),
        each_seed(tree.num_nodes),
        seeds=torch.arange(num_seeds),
        positions=draft.position.expand(num_seeds),
        temperature=torch.full((num_seeds,), draft.temperature),
        kinds=each_seed(proposal.kinds),
        draft_rows=each_seed(proposal.draft_rows),
        draft_probs=each_seed(proposal.draft_probs),
        draft_offsets=proposal.draft_offsets,
        rule=rule,
    )
    assert not bool(status.any())
    return float(num_accepted.double().mean())
