"""Speculative decoding for `model.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..budget import CONSERVATIVE, Budget, load_cost
from ..decoding import Listener, check_rule, decode
from ..drafters import Drafter, PromptLookupDrafter, make_drafter
from ..drafting import SamplingParams
from ..statistics import DecodeStats, TotalStats
from .attention import tree_attention_in
from .cost import cost_key
from .draft_model import assistant_drafter
from .features import HFTargetView
from .support import check_lengths, check_model, check_request, sampling_options
from .target import HFTarget


class SpeculativeDecoder:
    """Speculation as `model.generate(**inputs, custom_generate=SpeculativeDecoder(drafter))`.

    The output is what the model alone would have written: in float32 token for token, in bfloat16
    and float16 up to the rounding of another batch shape. Sampled output depends on the seed, not
    on the drafter or the other rows.

    Args:
        drafter: a `Drafter`, the name of one (see `drafters.DRAFTERS`), or None for plain decoding.
        seed: of sampled output; one int for all rows or one per row. None draws one from torch's
            global generator. With `num_return_sequences`, the i-th sequence of a prompt uses `seed
            + i`.
        rule: a lossless rule of `verify`; None tests rows with sampled drafts by `traversal`,
            others by `walk`.
        streamer: receives tokens as they are committed, and is ended. It belongs here: `generate`
            keeps the streamer that it is given from custom loops.
        listener: called with (row, new tokens, how many of them were accepted draft tokens).
        budget: sizes trees by cost and acceptance, and decodes plainly where drafts do not pay.
            None gives one, with the costs that `specdec tune` measured for the model if it did, to
            drafters that want it ("auto"); True to any drafter, False to none.

    Attributes:
        stats: `DecodeStats` of the last call.
        totals: `TotalStats` of all calls.

    Raises:
        ValueError: an unknown drafter or rule, a lossy rule.
    """

    def __init__(
        self,
        drafter: Drafter | str | None = "auto",
        *,
        seed: int | Sequence[int] | None = None,
        rule: str | None = None,
        streamer: BaseStreamer | None = None,
        listener: Listener | None = None,
        budget: Budget | bool | None = None,
    ) -> None:
        self.drafter = make_drafter(drafter) if isinstance(drafter, str) else drafter
        check_rule(rule)
        self.seed = seed
        self.rule = rule
        self.streamer = streamer
        self.listener = listener
        self.budget = budget
        self.stats: DecodeStats | None = None
        self.totals = TotalStats()
        self._budgets: dict[str, Budget] = {}  # by model

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_inputs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Called by `generate` after its usual preparation.

        Returns:
            sequences [B, T] int64, finished rows padded on the right; a `GenerateDecoderOnlyOutput`
            with `return_dict_in_generate=True`.

        Raises:
            ValueError: what cannot be exact (see `support.py`), or an invalid proposal.
        """
        try:
            return self._run(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                model_inputs,
            )
        finally:
            if self.streamer is not None:
                self.streamer.end()  # also after an error: a consumer thread must not wait for ever

    def _run(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_inputs: dict[str, Any],
    ) -> Tensor | GenerateDecoderOnlyOutput:
        check_model(model)
        check_request(config, input_ids, model_inputs)
        options = sampling_options(processors, bool(config.do_sample))
        if self.streamer is not None and len(input_ids) > 1:
            raise ValueError(f"a streamer takes one row, got a batch of {len(input_ids)}")
        prompts = _unpad(input_ids, model_inputs.get("attention_mask"))
        check_lengths(model, prompts)
        pads = [row[: len(row) - len(p)] for row, p in zip(input_ids, prompts, strict=True)]
        stop = _StopRule(criteria, pads, input_ids.shape[1])
        max_lengths = [stop.max_length - len(p) for p in pads]
        nodes = 1 if self.drafter is None else self.drafter.max_nodes
        target = HFTarget(model, max(max_lengths) + nodes)
        sampling = self._sampling(options, len(prompts), config.num_return_sequences or 1, target)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        with tree_attention_in(model), _attached(self.drafter, target):
            sequences, self.stats = decode(
                target,
                self.drafter,
                prompts,
                max_lengths=max_lengths,
                should_stop=stop,
                sampling=sampling,
                rule=self.rule,
                listener=self._listen,
                budget=self._budget_of(model),
            )
        self.totals.add(self.stats)
        new = [torch.tensor(s[len(p) :]) for s, p in zip(sequences, prompts, strict=True)]
        pad = config.pad_token_id if config.pad_token_id is not None else stop.default_pad
        generated = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=pad)
        output = torch.cat([input_ids, generated.to(input_ids)], 1)
        if config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=output)  # type: ignore[arg-type]
        return output

    def _budget_of(self, model: PreTrainedModel) -> Budget | None:
        if self.drafter is None:
            return None
        if isinstance(self.budget, Budget):
            return self.budget
        wants = self.drafter.wants_budget if self.budget is None else self.budget
        if not wants:
            return None
        key = cost_key(model)
        if key not in self._budgets:
            self._budgets = {key: Budget(load_cost(key) or CONSERVATIVE)}
        return self._budgets[key]

    def _listen(self, row: int, tokens: list[int], num_accepted: int) -> None:
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens))
        if self.listener is not None:
            self.listener(row, tokens, num_accepted)

    def _sampling(
        self, options: dict[str, float], batch: int, num_return: int, target: HFTarget
    ) -> SamplingParams:
        if not options:
            return SamplingParams()
        seeds = _row_seeds(self.seed, batch, num_return)
        dtypes = {name: torch.int32 if name == "top_k" else torch.float32 for name in options}
        tensors = {
            name: torch.full((batch,), value, dtype=dtypes[name], device=target.device)
            for name, value in options.items()
        }
        return SamplingParams(seeds=torch.tensor(seeds, device=target.device), **tensors)


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    drafter: Drafter | str | None = "auto",
    seed: int | Sequence[int] | None = None,
    rule: str | None = None,
    streamer: BaseStreamer | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt_lookup_num_tokens: int | None = None,
    assistant_model: PreTrainedModel | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    num_assistant_tokens: int | None = None,
    budget: Budget | bool | None = None,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """`model.generate` with speculation, and with the arguments that it keeps from custom loops.

    Args:
        model: any causal language model of transformers.
        inputs: [B, P] int64 prompt tokens, left-padded; or pass `input_ids=`.
        drafter, seed, rule, streamer, budget: as in `SpeculativeDecoder`.
        stop_strings: end a row when it contains one of them; needs `tokenizer`.
        tokenizer: for `stop_strings`, and to compare with `assistant_tokenizer`.
        prompt_lookup_num_tokens: draft by prompt lookup with trees of this many draft tokens.
        assistant_model: draft with this model, chains that are sampled where the target samples.
        assistant_tokenizer: its tokenizer, which must be the target's.
        num_assistant_tokens: draft tokens of a chain; None takes the number that the assistant's
            generation config has, else 5.
        **kwargs: everything else that `model.generate` takes.

    Returns:
        as `SpeculativeDecoder.__call__`.

    Raises:
        ValueError: as `SpeculativeDecoder.__call__`; stop_strings without tokenizer; an assistant
            with another vocabulary.
    """
    if kwargs.get("custom_generate") is not None:
        raise ValueError("custom_generate cannot be combined with specdec_kernels.generate")
    if prompt_lookup_num_tokens is not None:
        drafter = PromptLookupDrafter(prompt_lookup_num_tokens + 1)
    if assistant_model is not None:
        if prompt_lookup_num_tokens is not None:
            raise ValueError("give either assistant_model or prompt_lookup_num_tokens")
        tokenizers = None
        if tokenizer is not None and assistant_tokenizer is not None:
            tokenizers = (tokenizer, assistant_tokenizer)
        drafter = assistant_drafter(assistant_model, num_assistant_tokens, tokenizers)
    elif num_assistant_tokens is not None or assistant_tokenizer is not None:
        raise ValueError("num_assistant_tokens and assistant_tokenizer need an assistant_model")
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings needs the tokenizer: pass tokenizer=")
        criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        kwargs["stopping_criteria"] = [*criteria, StopStringCriteria(tokenizer, stop_strings)]
        kwargs["stopping_criteria"] = StoppingCriteriaList(kwargs["stopping_criteria"])
    decoder = SpeculativeDecoder(drafter, seed=seed, rule=rule, streamer=streamer, budget=budget)
    method: Any = model.generate  # a mixin that PreTrainedModel does not declare
    output: Tensor | GenerateDecoderOnlyOutput = method(inputs, custom_generate=decoder, **kwargs)
    return output


def _attached(drafter: Drafter | None, target: HFTarget) -> AbstractContextManager[object]:
    return nullcontext() if drafter is None else drafter.attach(HFTargetView(target))


class _StopRule:
    """The stopping criteria of `generate`, asked after every single token, so that none is
    overshot.
    """

    def __init__(
        self, criteria: StoppingCriteriaList, pads: Sequence[Tensor], prompt_length: int
    ) -> None:
        self.eos: list[int] = []
        self.others: list[Any] = []
        self.pads = pads  # criteria see the padded row, as in plain decoding
        limits = []
        for criterion in criteria:
            if isinstance(criterion, EosTokenCriteria):
                self.eos += criterion.eos_token_id.tolist()
            elif isinstance(criterion, MaxLengthCriteria):
                limits.append(criterion.max_length)
            else:
                self.others.append(criterion)
        if not limits:
            raise ValueError("a length limit is needed: pass max_new_tokens or max_length")
        self.max_length = min(limits)
        self.default_pad = self.eos[0] if self.eos else 0
        if self.max_length <= prompt_length:
            raise ValueError(
                f"max_new_tokens must be >= 1, got max_length {self.max_length} "
                f"for a prompt of {prompt_length} tokens"
            )

    def __call__(self, row: int, sequence: list[int]) -> bool:
        if sequence[-1] in self.eos:
            return True
        if not self.others:
            return False
        pads = self.pads[row]
        ids = torch.cat([pads, torch.tensor(sequence, device=pads.device)])[None]
        return any(bool(criterion(ids, None).any()) for criterion in self.others)


def _unpad(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The real tokens of every left-padded row."""
    if attention_mask is None:
        return [list(row) for row in input_ids.tolist()]
    prompts = []
    for row, (tokens, mask) in enumerate(
        zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
    ):
        length = sum(mask)
        if not all(mask[len(mask) - length :]):
            raise ValueError(
                f"attention_mask of row {row} must be 0s, then 1s up to the last column "
                "(left padding)"
            )
        prompts.append(tokens[len(tokens) - length :])
    return prompts


def _row_seeds(seed: int | Sequence[int] | None, batch: int, num_return: int) -> list[int]:
    """One seed per row; rows of the same prompt must differ, whatever else is in the batch."""
    if seed is None:
        seed = int(torch.randint(0, 2**62, ()))
    if isinstance(seed, int):
        return [seed + row % num_return for row in range(batch)]
    if len(seed) != batch:
        raise ValueError(f"seed must be an int or one per row = {batch}, got {len(seed)}")
    return [int(s) for s in seed]
