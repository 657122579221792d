"""How many nodes a step is worth: the cost of a forward pass against what the drafts may bring."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .paths import cache_root

_MEMORY = 0.9
"""Weight of the past in running means of times and of acceptance."""
_MARGIN = 0.02
"""Speculation must promise so much more than plain decoding."""
_PATIENCE, _LONGEST_REST = 6, 12
"""After so many steps not worth a draft, rest for one step, then two, ..., up to so many."""
_CHECK, _LONGEST_CHECK = 8, 512
"""After so many steps with drafts in a row one without, to compare what they cost; then after twice
as many, ..., up to so many."""
_OLDER, _FORGOTTEN = 0.8, 0.02
"""Weight of older comparisons beside the last one, and the share that is forgotten with every pass
where no draft was worth it."""
_FAR = 2**20
"""More tokens than a pass has."""
_PRIOR = 0.3
"""Passes over one token that the curve's own word counts for in these comparisons."""
_NOTICED, _STEEPEST = 1.25, 4.0
"""Drafts cost what the curve says unless they cost so many times more or less, and at most so many
times."""


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Time of a forward pass over n tokens, T(n).

    Attributes:
        nodes: token counts, increasing, 1 first.
        seconds: time of each, in any unit.
    """

    nodes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for what is no curve."""
        increasing = all(a < b for a, b in zip(self.nodes, self.nodes[1:], strict=False))
        positive = all(math.isfinite(s) and s > 0 for s in self.seconds)
        if len(self.nodes) != len(self.seconds) or len(self.nodes) < 2:
            raise ValueError(
                "CostCurve: nodes and seconds must be equally many, at least two, "
                f"got {len(self.nodes)} and {len(self.seconds)}"
            )
        if self.nodes[0] != 1 or not increasing or not positive:
            raise ValueError(
                "CostCurve: nodes must increase from 1 and seconds be positive, "
                f"got {self.nodes} and {self.seconds}"
            )

    def __call__(self, nodes: int) -> float:
        """T(nodes): linear between the points and, with the last slope, beyond them."""
        last = len(self.nodes) - 1
        right = next((i for i in range(1, last) if self.nodes[i] >= nodes), last)
        x0, x1 = self.nodes[right - 1], self.nodes[right]
        y0, y1 = self.seconds[right - 1], self.seconds[right]
        return max(y0 + (y1 - y0) * (nodes - x0) / (x1 - x0), 1e-3 * self.seconds[0])


CONSERVATIVE = CostCurve((1, 2, 4, 8, 16, 32, 64), (1.0, 1.1, 1.2, 1.35, 1.65, 2.3, 3.6))
"""Without a measurement: relative times of a small model on a few CPU cores. Where passes over many
tokens are cheaper, trees stay smaller than they could be.
"""


class Budget:
    """Chooses the number of nodes of each step, and rests when drafts do not pay.

    A drafter that estimates probabilities asks `choose`; trees of others are kept whole or, while
    they do not pay, left out. Decisions use the cost curve, times measured so far, and draft
    probabilities and acceptance of the past: never a token that was drawn for this step, so that
    sampled drafts stay lossless. With sampled drafts the wall clock then decides which draws are
    made, and a seed no longer fixes the text.

    Args:
        cost: T(n) of the target; its unit does not matter.
    """

    def __init__(self, cost: CostCurve = CONSERVATIVE) -> None:
        self.cost = cost
        self._costs: dict[int, float] = {}  # of the curve, by tokens
        self._trust = 1.0  # accepted / promised draft tokens of late
        self._promised = self._accepted = 4.0
        self._draft_cost = 0.0  # in the unit of the curve
        self._unit: float | None = None  # seconds per unit of the curve
        # what drafts added to the cost of passes of late, as measured and as the curve says
        self._added = self._said = 0.0
        self._last: tuple[int, int, float] | None = None  # tokens, those without drafts, seconds
        self._check = self._until_check = _CHECK
        self._idle = 0  # steps in a row that were not worth a draft
        self._rest = 0  # steps still to rest
        self._next_rest = 1
        self._has_chosen = False
        self._rate = 0.0  # tokens per unit that the last choice promises
        self._gain = 1.0  # running mean of accepted draft tokens per row, of trees not chosen here

    def rests(self) -> bool:
        """Whether this step should not even draft; asked once per step."""
        self._has_chosen = False
        if self._rest > 0:
            self._rest -= 1
            return True
        if self._until_check <= 0:
            self._check = min(2 * self._check, _LONGEST_CHECK)
            return True
        return False

    def choose(
        self, scores: Sequence[Sequence[float]], *, finished: int = 0, pads: bool = True
    ) -> list[int]:
        """Nodes of each running row, the root included, that make the most tokens per second now
        that they are drafted; 1 of each is plain. Where plain decoding without drafting would have
        made more, the step counts towards a rest.

        Args:
            scores: for each running row, the probability of acceptance of its draft nodes, sorted
                so that every prefix is a tree.
            finished: other rows of the batch.
            pads: whether the pass pays for every row of the batch as for the largest tree. Nodes
                then come level by level, otherwise one by one, the likeliest of all rows first.
        """
        self._has_chosen = True
        sizes = [1] * len(scores)
        if pads:
            steps = [
                [(b, row[level]) for b, row in enumerate(scores) if level < len(row)]
                for level in range(max(map(len, scores), default=0))
            ]
        else:
            nodes = [(b, score) for b, row in enumerate(scores) for score in row]
            steps = [[node] for node in sorted(nodes, key=lambda node: -node[1])]
        rows = max(1, len(scores) + finished if pads else len(scores))
        tokens = float(max(1, len(scores)))
        seconds = self._with_drafts(rows)
        plain = (1 + _MARGIN) * tokens / seconds(rows)
        best = tokens / (seconds(rows) + self._draft_cost)  # which is spent
        num_steps = 0
        for i, step in enumerate(steps, 1):
            tokens += self._trust * sum(score for _, score in step)
            computed = rows * (i + 1) if pads else rows + i
            rate = tokens / (seconds(computed) + self._draft_cost)
            if rate > best:
                best, num_steps = rate, i
        self._rate = max(best, plain)
        self._promised *= _MEMORY
        self._accepted *= _MEMORY
        for step in steps[:num_steps]:
            for row, score in step:
                sizes[row] += 1
                self._promised += score
        self._note_idle(best < plain)
        return sizes

    def least_score(self, running: int, *, finished: int = 0, pads: bool = True) -> float:
        """What a draft node must promise: `choose` takes none below it, whatever the others do.

        Args:
            running: rows that `choose` will see.
            finished, pads: as there.

        The n-th node is taken only if it raises the rate, q > R dT with q what is expected of it,
        T the time of the pass and of drafting before it, and R = (rows + the n - 1 likelier
        nodes) / T at least (rows + (n - 1) q) / T: so if q (T - (n - 1) dT) > rows dT. Between two
        points of the curve this is the same for all n.
        """
        if pads and running + finished > 1:
            return 0.0  # others decide whether a level is worth it
        rows = max(1, running)
        seconds = self._with_drafts(rows)
        least = math.inf
        for tokens in (rows, *(n for n in self.cost.nodes if n > rows)):
            before = seconds(tokens)
            step = seconds(tokens + 1) - before
            rest = before + self._draft_cost - (tokens - rows) * step
            if rest > 0:  # otherwise no node is worth it
                least = min(least, rows * step / rest)
        return max(0.0, least / self._trust)

    def is_full(self) -> Callable[[int, float, float], bool]:
        """For the only row of a batch: whether a tree of so many nodes, root included, whose drafts
        have scores of this sum, would not be chosen with more of at most this score.

        Between two points of the curve the rate of more nodes rises or falls all the way.
        """
        seconds, spent, trust = self._with_drafts(1), self._draft_cost, self._trust
        points = [(n, seconds(n) + spent) for n in (*self.cost.nodes, _FAR)]

        def is_full(nodes: int, promised: float, score: float) -> bool:
            tokens, more = 1.0 + trust * promised, trust * score
            rate = tokens / (seconds(nodes) + spent)
            if tokens + more > rate * (seconds(nodes + 1) + spent):
                return False
            return all(tokens + more * (n - nodes) <= rate * t for n, t in points if n > nodes)

        return is_full

    def pays(self, tokens: float, seconds: float) -> bool:
        """Whether so many more accepted tokens are worth so much more draft time, at the speed that
        the last choice promised.
        """
        return self._unit is None or tokens * self._unit >= seconds * self._rate

    def record(
        self,
        *,
        running: int,
        computed: int,
        plain: int,
        num_accepted: int,
        forward_seconds: float,
        draft_seconds: float,
    ) -> None:
        """What the step did.

        Args:
            running: rows that had not ended.
            computed, plain: tokens of the pass, padding included, and of one without drafts.
            num_accepted: draft tokens kept, of all rows.
            forward_seconds, draft_seconds: wall time; 0 of a step without drafting.
        """
        cost = self.cost(max(1, computed))
        unit = forward_seconds / cost
        self._compare(computed, plain, forward_seconds)
        # the least of a slowly growing bound: other processes only ever make a pass longer
        self._unit = unit if self._unit is None else min(unit, self._unit * 1.05)
        if draft_seconds > 0 and self._unit > 0:
            spent = min(draft_seconds / self._unit, self.cost(1))
            self._draft_cost = _MEMORY * self._draft_cost + (1 - _MEMORY) * spent
        if self._has_chosen:
            self._accepted += num_accepted
            self._trust = min(1.25, max(0.1, (self._accepted + 0.2) / (self._promised + 0.2)))
        elif computed > plain:
            self._gain = _MEMORY * self._gain + (1 - _MEMORY) * num_accepted / running
            rate = (1.0 + self._gain) / (self._with_drafts(plain)(computed) + self._draft_cost)
            self._note_idle(rate < (1.0 + _MARGIN) / self.cost(plain))

    def _with_drafts(self, plain: int) -> Callable[[int], float]:
        """T, where `plain` tokens are no drafts: the curve, as steep as it was found."""
        without, steepness = self._cost(plain), self._steepness
        return lambda computed: without + steepness * (self._cost(computed) - without)

    def _cost(self, tokens: int) -> float:
        known = self._costs.get(tokens)
        if known is None:
            known = self._costs[tokens] = self.cost(tokens)
        return known

    @property
    def _steepness(self) -> float:
        """How many times more drafts add to a pass than the curve says."""
        prior = _PRIOR * self.cost(1)
        steepness = (self._added + prior) / (self._said + prior)
        if abs(math.log(steepness)) < math.log(_NOTICED):
            return 1.0
        return min(max(steepness, 1 / _STEEPEST), _STEEPEST)

    def _compare(self, computed: int, plain: int, seconds: float) -> None:
        """Learn it from passes next to each other, with and without drafts: the curve may be of
        another day, of another shape of batch, or never measured.
        """
        has_drafts = computed > plain
        self._until_check = self._until_check - 1 if has_drafts else self._check
        last, self._last = self._last, (computed, plain, seconds)
        if last is None:
            return
        if has_drafts == (last[0] > last[1]):
            if not has_drafts:  # nobody looks: the curve may be right after all
                self._added *= 1 - _FORGOTTEN
                self._said *= 1 - _FORGOTTEN
            return
        with_drafts, without = (self._last, last) if has_drafts else (last, self._last)
        unit = without[2] / self.cost(without[0])
        if unit <= 0:
            return
        base = self.cost(with_drafts[1])
        said = self.cost(with_drafts[0]) - base
        added = min(max(with_drafts[2] / unit - base, 0.0), 2 * _STEEPEST * said)
        self._added = _OLDER * self._added + added
        self._said = _OLDER * self._said + said

    def _note_idle(self, is_idle: bool) -> None:
        if not is_idle:
            self._idle, self._next_rest = 0, 1
            return
        self._idle += 1
        if self._idle >= _PATIENCE:
            self._rest = self._next_rest
            self._next_rest = min(2 * self._next_rest, _LONGEST_REST)


def cost_file() -> Path:
    """Where `specdec tune` writes and decoders look: `costs.json` in the cache folder."""
    return cache_root() / "costs.json"


def load_cost(key: str, path: Path | None = None) -> CostCurve | None:
    """The measured curve of a model, by the key that `specdec tune` gave it; None if there is none.

    Raises:
        ValueError: a file that is not what `save_cost` writes.
    """
    path = path or cost_file()
    if not path.exists():
        return None
    entry = _read(path).get(key)
    if entry is None:
        return None
    try:
        return CostCurve(tuple(map(int, entry["nodes"])), tuple(map(float, entry["seconds"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no cost curve under {key!r}: {error}") from None


def save_cost(key: str, curve: CostCurve, path: Path | None = None) -> Path:
    """Add a curve to the file, beside those of other models; the file."""
    path = path or cost_file()
    curves = _read(path) if path.exists() else {}
    curves[key] = {"nodes": list(curve.nodes), "seconds": list(curve.seconds)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(curves, indent=1) + "\n", "utf-8")
    partial.replace(path)
    return path


def _read(path: Path) -> dict[str, dict[str, list[float]]]:
    try:
        curves = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(curves, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(curves).__name__}")
    return curves
