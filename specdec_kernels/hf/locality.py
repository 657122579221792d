"""Local attention: sliding windows and chunks, in positions.

A model says by the masks that it makes which keys a layer sees. Here no mask is made: the mask
function of the registered attention returns an empty tensor whose shape says the same, and the
attention of the layer that receives it learns its window or chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_KINDS = ("full", "window", "chunk", "other")


@dataclass(frozen=True, slots=True)
class Locality:
    """Which earlier positions a layer sees; 0 is off.

    Attributes:
        window: a key is seen if query position - key position < window.
        chunk: a key is seen if it is in the query's chunk of so many positions.
    """

    window: int = 0
    chunk: int = 0

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether queries at these positions see keys at those, none later than themselves."""
        seen = keys <= queries
        if self.window:
            seen = seen & (queries - keys < self.window)
        if self.chunk:
            seen = seen & (queries // self.chunk == keys // self.chunk)
        return seen


FULL = Locality()


class NotLocal(ValueError):
    """A layer sees other keys than those before a query, within windows or chunks."""


def mark_locality(
    *,
    mask_function: Callable[..., Tensor],
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Mask function of transformers: an empty [1, kind, size, 0] bool instead of a mask."""
    size = local_size or 0

    def sees(query: int, key: int) -> bool:
        index = torch.tensor([0, 0, query, key], device=device)
        return bool(mask_function(*index))

    kind = 3
    is_masked = attention_mask is not None and not bool(attention_mask.all())
    if use_vmap or is_masked or local_size == 0:
        pass  # some models make masks that no layer uses: an error only where one arrives
    elif not size:
        kind = 0 if sees(4, 0) and not sees(0, 4) else 3
    elif sees(2 * size, 2 * size):
        # just across a chunk's edge: a window of two or more sees it, a chunk does not
        kind = 1 if size == 1 or sees(size, size - 1) else 2
        too_old = size if kind == 1 else 2 * size - 1
        kind = 3 if sees(2 * size, too_old) else kind
    return torch.empty((1, kind, size, 0), dtype=torch.bool, device=device)


def locality_of(name: str, mask: Tensor | None, sliding_window: int | None) -> Locality:
    """What the mask of a layer says.

    Raises:
        NotLocal: another mask than windows and chunks.
        ValueError: a mask that `mark_locality` did not make, or a layer that contradicts it.
    """
    if mask is None or mask.dim() != 4 or mask.shape[3] != 0:
        raise ValueError(f"{name} makes its own attention masks, which token trees do not support")
    kind, size = _KINDS[mask.shape[1]], mask.shape[2]
    if kind == "other":
        raise NotLocal(f"{name} attends neither causally nor by windows or chunks of that")
    window, chunk = size * (kind == "window"), size * (kind == "chunk")
    if sliding_window and chunk:
        raise ValueError(f"{name} has both a sliding window and chunks")
    return Locality(min(filter(None, (window, sliding_window or 0)), default=0), chunk)
