"""Drafts copied from earlier in the text."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from .base import RowDrafter, check_max_nodes

_DECAY = 0.96
_PRIOR = 0.5


class PromptLookupDrafter(RowDrafter):
    """Continues the latest n-gram as earlier in the text, several places merged into one tree.

    The n-grams are indexed as the text grows, never rescanned. How often a match of each length
    went on being right is learned from the text itself, and a branch grows while its estimated path
    probability is at least `min_probability`: text that does not repeat itself is decoded plainly.

    Args:
        max_nodes: most nodes of a tree, root included.
        max_ngram: longest n-gram to look up.
        max_matches: places remembered per n-gram, the newest.
        min_probability: least estimated probability of a node's path.

    Source: prompt lookup decoding (`generate(prompt_lookup_num_tokens=)`), here with several
        matches merged; the estimate
    backs off from long to short matches as in prediction by partial matching (Cleary and Witten,
    1984).
    """

    def __init__(
        self,
        max_nodes: int = 16,
        *,
        max_ngram: int = 4,
        max_matches: int = 8,
        min_probability: float = 0.06,
    ) -> None:
        check_max_nodes("PromptLookupDrafter", max_nodes)
        if max_ngram < 1 or max_matches < 1:
            raise ValueError(
                "PromptLookupDrafter: max_ngram and max_matches must be >= 1, "
                f"got {max_ngram} and {max_matches}"
            )
        self.max_nodes = max_nodes
        self.max_ngram = max_ngram
        self.max_matches = max_matches
        self.min_probability = min_probability
        self.begin(0)

    def begin(self, batch: int) -> None:
        """Forget the rows of the last batch."""
        self._indexes = [_NgramIndex(self.max_ngram, self.max_matches) for _ in range(batch)]

    def propose_row(
        self, row: int, sequence: Sequence[int], max_depth: int
    ) -> tuple[list[int], list[int]]:
        """See `RowDrafter`."""
        index = self._indexes[row]
        index.extend(sequence)
        tokens: list[int] = []
        parents: list[int] = []
        # (-path probability, order of arrival, token, parent node, depth, places after the token)
        open_nodes: list[tuple[float, int, int, int, int, dict[int, int]]] = []
        arrivals = 0

        def open_children(
            probability: float, node: int, depth: int, places: dict[int, int]
        ) -> None:
            nonlocal arrivals
            if depth >= max_depth:
                return
            for token, (share, after) in index.continuations(sequence, places).items():
                if probability * share >= self.min_probability:
                    arrivals += 1
                    entry = (-probability * share, arrivals, token, node, depth + 1, after)
                    heapq.heappush(open_nodes, entry)

        open_children(1.0, 0, 0, index.matches(sequence))
        while open_nodes and len(tokens) < self.max_nodes - 1:
            negative, _, token, parent, depth, places = heapq.heappop(open_nodes)
            tokens.append(token)
            parents.append(parent)
            open_children(-negative, len(tokens), depth, places)
        return tokens, parents


class _NgramIndex:
    """Where the n-grams of one growing sequence went on, and how often that was right.

    A *place* is an index into the sequence whose token followed an earlier occurrence; `places`
    maps it to the length of the match before it.
    """

    def __init__(self, max_ngram: int, max_matches: int) -> None:
        self.max_ngram = max_ngram
        self.max_matches = max_matches
        self.length = 0
        self.places: dict[tuple[int, ...], list[int]] = {}
        self.hits = [_PRIOR * n / (n + 1) for n in range(max_ngram + 1)]
        self.trials = [_PRIOR] * (max_ngram + 1)

    def extend(self, sequence: Sequence[int]) -> None:
        """Learn from the tokens that were added to the sequence, and index them."""
        for place in range(max(self.length, 1), len(sequence)):
            self._learn(sequence, place)
            for n in range(1, min(self.max_ngram, place) + 1):
                places = self.places.setdefault(tuple(sequence[place - n : place]), [])
                places.append(place)
                if len(places) > self.max_matches:
                    del places[0]
        self.length = len(sequence)

    def matches(self, sequence: Sequence[int]) -> dict[int, int]:
        """Places that may tell the token after the sequence, with their longest match."""
        return self._places_before(sequence, len(sequence))

    def continuations(
        self, sequence: Sequence[int], places: dict[int, int]
    ) -> dict[int, tuple[float, dict[int, int]]]:
        """Token -> (estimated probability, the places after it).

        The longest match is right with its learned frequency; what is left goes to the next shorter
        one.
        """
        found: dict[int, tuple[float, dict[int, int]]] = {}
        left = 1.0
        for n in sorted(set(places.values()), reverse=True):
            level = [p for p, length in places.items() if length == n and p < len(sequence)]
            right = self.hits[n] / self.trials[n]
            for place in level:
                token = sequence[place]
                share, after = found.setdefault(token, (0.0, {}))
                after[place + 1] = min(n + 1, self.max_ngram)
                found[token] = (share + left * right / len(level), after)
            left *= 1.0 - right
        return found

    def _places_before(self, sequence: Sequence[int], end: int) -> dict[int, int]:
        places: dict[int, int] = {}
        for n in range(min(self.max_ngram, end), 0, -1):
            for place in reversed(self.places.get(tuple(sequence[end - n : end]), ())):
                places.setdefault(place, n)
        return places

    def _learn(self, sequence: Sequence[int], place: int) -> None:
        """Score every match length that had something to say about `sequence[place]`, until
        one was right.
        """
        known = self._places_before(sequence, place)
        for n in sorted(set(known.values()), reverse=True):
            hit = any(sequence[p] == sequence[place] for p, length in known.items() if length == n)
            self.hits[n] = self.hits[n] * _DECAY + hit
            self.trials[n] = self.trials[n] * _DECAY + 1.0
            if hit:
                return
