"""The loss that all drafters learn by: the cross entropy to the target's own law."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 512
"""Positions whose logits exist at a time."""


def teacher_law(hidden: Tensor, logsumexp: Tensor, rows: Tensor) -> Tensor:
    """The target's probabilities of some tokens.

    Args:
        hidden: [n, F], what goes into its head.
        logsumexp: [n] float32, of all its logits.
        rows: [U, F], the tokens' rows of its head.

    Returns:
        [n, U], of hidden's dtype; rows sum to at most 1.
    """
    parts = [
        (part @ rows.T).float().sub_(total[:, None]).exp_().to(hidden.dtype)
        for part, total in zip(hidden.split(ROWS), logsumexp.split(ROWS), strict=True)
    ]
    return torch.cat(parts)


def cross_entropy(hidden: Tensor, head: Tensor, law: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """-sum over u of law_u log softmax(head hidden)_u, and how often `best` is its maximum.

    The logits are never kept: the gradients are computed with the loss, under autocast in its
    dtype.

    Args:
        hidden: [n, d] and head: [U, d]; both may need a gradient.
        law: [n, U], needs none.
        best: [n] int64, the target's likeliest token as a draft id; PAD where it has none.

    Returns:
        the mean loss, float32, and the hit rate; 0 for n = 0.
    """
    loss, hit_rate = _CrossEntropy.apply(hidden, head, law, best)
    return loss, hit_rate


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, law: Tensor, best: Tensor
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        weight = head.to(dtype)
        count = max(1, len(hidden))
        loss, hits = torch.zeros((), device=hidden.device), torch.zeros((), device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        head_grad = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for first in range(0, len(hidden), ROWS):
            rows = slice(first, first + ROWS)
            inputs = hidden[rows].to(dtype)
            wanted = law[rows].float()
            logits = inputs @ weight.T
            hits += (logits.argmax(-1) == best[rows]).sum()
            log_probs = logits.float().log_softmax(-1)
            loss -= torch.dot(wanted.flatten(), log_probs.flatten())
            grad = log_probs.exp_().mul_(wanted.sum(-1, keepdim=True)).sub_(wanted)
            grad = grad.div_(count).to(dtype)
            hidden_grad[rows] = grad @ weight
            if head_grad is not None:
                head_grad += grad.T @ inputs
        ctx.grads = (hidden_grad, head_grad)
        hit_rate = hits / count
        ctx.mark_non_differentiable(hit_rate)
        return loss / count, hit_rate

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if g is None else g * loss_grad for g in ctx.grads), None, None)
