"""One prompt, generated with speculation and without."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..budget import Budget
from ..decoding import Listener
from ..drafters import Drafter
from ..statistics import DecodeStats
from .generate import SpeculativeDecoder
from .text import Generation, TextModel

_WARM_UP_TOKENS = 8


class Trial:
    """The same request with speculation and without.

    Args:
        subject: the target.
        prompt: [1, P] int64.
        drafter: None speculates nothing.
        max_new_tokens: most tokens to generate.
        temperature: 0 is greedy.
        top_k, top_p: filters of sampled text; 0 and 1 are off.
        seed: of sampled text.
        budget: as in `SpeculativeDecoder`.
    """

    def __init__(
        self,
        subject: TextModel,
        prompt: Tensor,
        drafter: Drafter | None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        budget: Budget | bool | None = None,
    ) -> None:
        self.subject = subject
        self.prompt = prompt
        self.is_sampled = temperature != 0
        self._max_new_tokens = max_new_tokens
        self._decoder = SpeculativeDecoder(drafter, seed=seed, budget=budget)
        self._options: dict[str, Any] = {"do_sample": self.is_sampled}
        self._plain: dict[str, Any] = {}
        if self.is_sampled:
            self._options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            # `generate` itself draws other numbers from the same seed
            self._plain = {"custom_generate": SpeculativeDecoder(None, seed=seed)}
        self._run: Generation | None = None

    def warm_up(self, *, compare: bool) -> None:
        """A few untimed tokens, also without speculation if that is to be compared."""
        num_tokens = min(_WARM_UP_TOKENS, self._max_new_tokens)
        self._generate(num_tokens, custom_generate=self._decoder)
        if compare:
            self._generate(num_tokens, **self._plain)

    def statistics(self) -> DecodeStats | None:
        """Of the generation under way, or the last one."""
        return self._decoder.stats

    def run(self, listener: Listener | None = None) -> dict[str, Any]:
        """Generate with speculation.

        Returns:
            {"text", "tokens" (the new ones), "stats"}.
        """
        self._decoder.listener = listener
        self._run = run = self._generate(self._max_new_tokens, custom_generate=self._decoder)
        stats = self.statistics()
        assert stats is not None
        return {
            "text": self.subject.decode(run.tokens),
            "tokens": run.tokens,
            "stats": {
                "num_tokens": len(run.tokens),
                "num_steps": stats.num_steps[0],
                "tokens_per_step": stats.tokens_per_step,
                "num_drafted": stats.num_drafted[0],
                "num_accepted": stats.num_accepted[0],
                "acceptance": asdict(stats.acceptance),
                "acceptance_by_depth": stats.acceptance.by_depth(),
                "acceptance_by_rank": stats.acceptance.by_rank(),
                "draft_seconds": stats.draft_seconds,
                "forward_seconds": stats.forward_seconds,
                "verify_seconds": stats.verify_seconds,
                "num_failures": stats.num_failures,
                "failures": [f"{f.drafter}: step {f.step}: {f.error}" for f in stats.failures],
                "seconds": run.seconds,
                "tok_s": run.tok_s,
            },
        }

    def compare(self) -> dict[str, Any]:
        """Generate without speculation: by `generate` itself, or by keyed sampling if sampled.

        Returns:
            {"tokens", "seconds", "tok_s" (without speculation), "speedup", "agrees", "divergence"
            (None, or see `Divergence`)}.

        Raises:
            ValueError: `run` comes first.
        """
        if self._run is None:
            raise ValueError("Trial: compare needs a run to compare with")
        plain = self._generate(self._max_new_tokens, **self._plain)
        parting = self.subject.divergence(
            self.prompt, self._run.tokens, plain.tokens, is_sampled=self.is_sampled
        )
        return {
            "tokens": plain.tokens,
            "seconds": plain.seconds,
            "tok_s": plain.tok_s,
            "speedup": self._run.tok_s / plain.tok_s,
            "agrees": parting is None,
            "divergence": None if parting is None else asdict(parting),
        }

    def _generate(self, max_new_tokens: int, **options: Any) -> Generation:
        return self.subject.generate(
            self.prompt, max_new_tokens=max_new_tokens, **self._options, **options
        )
