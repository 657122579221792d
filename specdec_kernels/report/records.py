"""Which bench a record comes from, by what it holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(slots=True)
class Records:
    """The records of a report; each list is in the order given.

    Attributes:
        e2e: of `specdec bench e2e`.
        ops: of `specdec bench ops`.
        costs: of `specdec tune`: key -> {"nodes", "seconds"}.
    """

    e2e: list[Record] = field(default_factory=list)
    ops: list[Record] = field(default_factory=list)
    costs: dict[str, Record] = field(default_factory=dict)

    @property
    def main(self) -> Record | None:
        """The e2e record that most of the page is about: the first one with the budget."""
        with_budget = [e for e in self.e2e if e["machine"]["settings"]["budget"] is not False]
        return next(iter(with_budget or self.e2e), None)

    @property
    def _main_drafter(self) -> str | None:
        return None if self.main is None else self.main["machine"]["settings"]["drafter"]

    def tokens_per_step(self, category: str = "all") -> dict[int, float]:
        """Largest tree -> mean tokens per step, of the main record's drafter with full trees."""
        full = [
            e
            for e in self.e2e
            if e["machine"]["settings"]["budget"] is False
            and e["machine"]["settings"]["drafter"] == self._main_drafter
        ]
        points = {
            int(e["machine"]["settings"]["max_nodes"]): float(
                e["summary"]["specdec"][category]["mean_tokens_per_step"]
            )
            for e in full
            if category in e["summary"].get("specdec", {})
        }
        return dict(sorted(points.items()))


def read_records(paths: Sequence[Path]) -> Records:
    """Read and sort records.

    Raises:
        ValueError: a file that no bench wrote.
        OSError: an unreadable one.
    """
    records = Records()
    for path in paths:
        try:
            value = json.loads(path.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"report: {path}: not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"report: {path}: must be a JSON object, got {type(value).__name__}")
        if {"machine", "summary", "prompts"} <= value.keys():
            records.e2e.append(value)
        elif {"machine", "rows"} <= value.keys() and all("floor_us" in r for r in value["rows"]):
            records.ops.append(value)
        elif value and all(isinstance(v, dict) and "nodes" in v for v in value.values()):
            records.costs |= value
        else:
            raise ValueError(
                f"report: {path}: must come from specdec bench e2e, bench ops or tune, "
                f"got an object with {', '.join(list(value)[:4]) or 'nothing'}"
            )
    return records
