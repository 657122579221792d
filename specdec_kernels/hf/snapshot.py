"""Whether a model is what it was, for less than it takes to look through it again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class Snapshot:
    """What a model's modules hold, and what their classes do, at one time. What a hook dictionary
    holds is not part of it.

    Args:
        model: of which only the modules below are kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = list(model.modules())
        self._held = [(held, list(held.values())) for part in parts for held in _held_by(part)]
        self._ids = [[*map(id, values)] for _, values in self._held]
        configs = {id(c): c for part in parts if (c := getattr(part, "config", None)) is not None}
        self._configs = [(config, _public(config)) for config in configs.values()]
        self._forwards = {type(part): type(part).forward for part in parts}
        self._parameters = list(model.parameters())
        self._storages = self._storages_now()

    def is_current(self) -> bool:
        """Whether nothing has been put in the place of another thing since."""
        return (
            all(
                [*map(id, held.values())] == ids
                for (held, _), ids in zip(self._held, self._ids, strict=True)
            )
            and all(_public(config) == then for config, then in self._configs)
            and all(kind.forward is forward for kind, forward in self._forwards.items())
            and self._storages_now() == self._storages
        )

    def _storages_now(self) -> list[tuple[Any, ...]]:
        return [(_address(p), p.dtype, p.device) for p in self._parameters]


def _held_by(part: nn.Module) -> Iterator[dict[str, Any]]:
    yield part.__dict__
    yield from (part._parameters, part._buffers, part._modules)


def _public(config: Any) -> dict[str, Any]:
    """Without what is lent to it while a model runs."""
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def _address(parameter: Tensor) -> int | None:
    try:
        return parameter.data_ptr()
    except RuntimeError:  # of a class that keeps its values elsewhere
        return None
