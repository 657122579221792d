"""Text in, text out: encode a prompt, time one generation, say where two of them part."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .generate import SpeculativeDecoder
from .load import load_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Name on the command line -> dtype of the weights."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished generation after one prompt.

    Attributes:
        tokens: the new tokens, an end token included.
        seconds: wall time, prefill included.
        num_forwards: forward passes of the model until the text ended, prefill included.
    """

    tokens: list[int]
    seconds: float
    num_forwards: int

    @property
    def tok_s(self) -> float:
        """New tokens per second."""
        return len(self.tokens) / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Tokens after the first per forward pass after the prefill; 1.0 is plain decoding."""
        if len(self.tokens) == 1:
            return 1.0
        return (len(self.tokens) - 1) / max(1, self.num_forwards - 1)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two texts after the same prompt part.

    Attributes:
        index: the first new token that differs, counted from 0.
        gap: logits, how far the lesser of the two tokens is below the target's best one there: for
            the two likeliest tokens, the distance between them. None if a text merely ends there,
            or if the texts were sampled.
    """

    index: int
    gap: float | None


class TextModel:
    """A model with its tokenizer.

    Args:
        name: as for `load_model`.
        dtype: a key of `DTYPES`.

    Raises:
        ValueError: nothing to load under that name.
    """

    def __init__(self, name: str = "smollm2", *, dtype: str = "bf16") -> None:
        self.name = name
        self.dtype = dtype
        self.model: Any  # its stubs do not know `generate`
        self.tokenizer: PreTrainedTokenizerBase
        self.model, self.tokenizer = load_model(name, dtype=DTYPES[dtype])

    def encode(self, text: str, *, is_chat: bool, max_new_tokens: int) -> Tensor:
        """Prompt tokens [1, P] int64 of a raw text, or of a user's message in the chat template.

        Raises:
            ValueError: nothing to continue, a model without chat template, or a prompt that leaves
                no room for `max_new_tokens` among the model's positions.
        """
        if not text:
            raise ValueError("the prompt is empty: there is nothing to continue")
        tokens: list[int]
        if is_chat:
            if self.tokenizer.chat_template is None:
                raise ValueError(f"{self.name} has no chat template; give it a raw prompt instead")
            chat = [{"role": "user", "content": text}]
            text = str(
                self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            )
        # a chat template writes the special tokens itself
        tokens = self.tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
        if not tokens:
            raise ValueError("the prompt has no token: there is nothing to continue")
        config = self.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and len(tokens) + max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and {max_new_tokens} new ones need more than "
                f"the {limit} positions of {self.name}"
            )
        return torch.tensor([tokens], device=self.model.device)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, special ones left out."""
        return str(
            self.tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def generate(self, prompt: Tensor, **options: Any) -> Generation:
        """Time `model.generate` on prompt [1, P]; `options` are its own."""
        return self.generate_batch([prompt], **options)[0]

    def generate_batch(self, prompts: Sequence[Tensor], **options: Any) -> list[Generation]:
        """Time one call of `model.generate` on prompts [1, P] of any lengths, padded on the left;
        its time is that of every row.
        """
        num_forwards = 0

        def count(*_: object) -> None:
            nonlocal num_forwards
            num_forwards += 1

        if self.model.generation_config.pad_token_id is None:  # else `generate` complains
            options["pad_token_id"] = 0
        width = max(prompt.shape[1] for prompt in prompts)
        padding = [(width - prompt.shape[1], 0) for prompt in prompts]
        ids = torch.cat([pad(p, by) for p, by in zip(prompts, padding, strict=True)])
        ones = [torch.ones_like(prompt) for prompt in prompts]
        mask = torch.cat([pad(o, by) for o, by in zip(ones, padding, strict=True)])
        hook = self.model.register_forward_hook(count)
        try:
            start = time.perf_counter()
            output = self.model.generate(ids, attention_mask=mask, **options)
            seconds = time.perf_counter() - start
        finally:
            hook.remove()
        rows = [self._until_end(row) for row in output[:, width:].tolist()]
        decoder = options.get("custom_generate")
        if len(rows) == 1:
            forwards = [num_forwards]
        elif isinstance(decoder, SpeculativeDecoder) and decoder.stats is not None:
            forwards = [1 + steps for steps in decoder.stats.num_steps]
        else:  # a token each
            forwards = [len(row) for row in rows]
        return [Generation(r, seconds, n) for r, n in zip(rows, forwards, strict=True)]

    def _until_end(self, tokens: list[int]) -> list[int]:
        """Without the padding of a row that ended before the others."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ends), tokens)

    @torch.no_grad()
    def divergence(
        self,
        prompt: Tensor,
        tokens: Sequence[int],
        others: Sequence[int],
        *,
        is_sampled: bool = False,
    ) -> Divergence | None:
        """Where new tokens part from other ones after the same prompt [1, P]; None if nowhere."""
        pairs = enumerate(zip_longest(tokens, others))
        parting = next(((i, own, other) for i, (own, other) in pairs if own != other), None)
        if parting is None:
            return None
        index, own, other = parting
        if is_sampled or own is None or other is None:
            return Divergence(index, None)
        common = torch.tensor([list(tokens[:index])], dtype=prompt.dtype, device=prompt.device)
        logits = self.model(torch.cat([prompt, common], 1), logits_to_keep=1).logits[0, -1].float()
        return Divergence(index, float(logits.max() - logits[[own, other]].min()))


def silence_transformers() -> None:
    """No warnings and no progress bars from transformers in this process."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
