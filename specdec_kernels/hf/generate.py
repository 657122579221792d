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
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..budget import CONSERVATIVE, Budget, load_cost
from ..decoding import Listener, check_rule, decode
from ..drafters import Drafter, make_drafter
from ..drafting import SamplingParams
from ..statistics import DecodeStats, TotalStats
from .attention import tree_attention_in
from .cache import CACHE_KEYWORDS, TreeCache
from .compiled import Backend, compiled_capacity
from .cost import cost_key
from .features import HFTargetView
from .fusing import fast_layers
from .media import Media
from .options import Options
from .processors import Processors, fused_bias
from .ranks import agreement
from .record import ScoreRecord
from .rows import row_seeds, sampling_params, unpad
from .stopping import StopRule
from .streaming import EndedOnce
from .support import (
    check_lengths,
    check_model,
    check_position_ids,
    check_positions,
    check_request,
    split_processors,
)
from .target import HFTarget
from .turns import turn


class SpeculativeDecoder:
    """Speculation as `model.generate(**inputs, custom_generate=SpeculativeDecoder(drafter))`.

    The output is what the model alone would have written: in float32 token for token, in bfloat16
    and float16 up to the rounding of another batch shape. Sampled output depends on the seed, not
    on the drafter or the other rows.

    Args:
        drafter: a `Drafter`, the name of one (see `drafters.DRAFTERS`), or None for plain decoding.
        seed: of sampled output; one per row, or one int for all of them: rows of the same prompt
            then are the same, but for the i-th sequence of `num_return_sequences`, which uses `seed
            + i`. None draws one for each row from torch's global generator.
        rule: a lossless rule of `verify`; None tests rows with sampled drafts by `traversal`,
            others by `walk`.
        streamer: receives tokens as they are committed, and is ended. It belongs here: `generate`
            keeps the streamer that it is given from custom loops.
        listener: called with (row, new tokens, how many of them were accepted draft tokens).
        budget: sizes trees by cost and acceptance, and decodes plainly where drafts do not pay.
            None gives one, with the costs that `specdec tune` measured for the model if it did, to
            drafters that want it ("auto"); True to any drafter, False to none.
        temperature, top_k, top_p, min_p: one value per row, instead of what `generate` is given;
            temperature 0 is a greedy row. They need `do_sample=True`.
        compile: run the steps under `torch.compile`, with trees padded to a few sizes; True, or a
            backend that it takes.
        pack: keep packed copies of weights on the CPU, from which steps are about twice as fast,
            in 16 bits on CPUs without products of these several times; None where they fit into
            half of the free memory. With `compile` only those that `packed_linear` reads.

    Attributes:
        stats: `DecodeStats` of the last call; of the running one while it runs.
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
        temperature: Sequence[float] | None = None,
        top_k: Sequence[int] | None = None,
        top_p: Sequence[float] | None = None,
        min_p: Sequence[float] | None = None,
        compile: Backend = False,
        pack: bool | None = None,
    ) -> None:
        self.drafter = make_drafter(drafter) if isinstance(drafter, str) else drafter
        check_rule(rule)
        self.seed = seed
        self.rule = rule
        self.streamer = streamer
        self.listener = listener
        self.budget = budget
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        self.per_row = {name: values for name, values in given.items() if values is not None}
        self.compile = compile
        self.pack = pack
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
            with `return_dict_in_generate=True`. Its cache can be given to a later call whose
            prompts begin with these sequences. Scores and logits of a row that has ended are 0.

        Raises:
            ValueError: what cannot be exact (see `support.py`), or an invalid proposal.
        """
        # the texts of compiled steps share their graphs
        shared = (self, self.drafter) + ((model,) if self.compile else ())
        try:
            with turn(thing for thing in shared if thing is not None):
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
        media_inputs = check_request(model, config, input_ids, model_inputs)
        if self.streamer is not None and len(input_ids) > 1:
            raise ValueError(f"a streamer takes one row, got a batch of {len(input_ids)}")
        prompts = unpad(input_ids, model_inputs.get("attention_mask"))
        check_lengths(model, prompts)
        positions = model_inputs.get("position_ids")
        media = Media.of(media_inputs, positions, prompts)
        if media is None:
            check_position_ids(positions, prompts)
        pads = [row[: len(row) - len(p)] for row, p in zip(input_ids, prompts, strict=True)]
        agree = agreement(model)
        stop = StopRule(criteria, pads, input_ids.shape[1], agree)
        max_lengths = [stop.max_length - len(p) for p in pads]
        check_positions(model, prompts, max(max_lengths))
        nodes = 1 if self.drafter is None else self.drafter.max_nodes
        capacity = max(max_lengths) + nodes
        if self.compile:
            capacity = compiled_capacity(max(max_lengths), nodes)
        given = [c for name in CACHE_KEYWORDS if (c := model_inputs.get(name)) is not None]
        cache = TreeCache.adopt(given, model, len(prompts), has_media=media is not None)
        target = HFTarget(model, capacity, cache, compile=self.compile, media=media)
        process, sampling = self._laws(processors, pads, config, target, agree)
        record = ScoreRecord(
            sampling,
            len(prompts),
            keeps_logits=bool(config.return_dict_in_generate and config.output_logits),
            keeps_scores=bool(config.return_dict_in_generate and config.output_scores),
        )
        stop.scores_of = record.scores_of
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        stats = self.stats = DecodeStats.start(len(prompts))
        with (
            tree_attention_in(model),
            fast_layers(model, self.pack, compiled=bool(self.compile)),
            _attached(self.drafter, target),
            target.cache.in_use(),
        ):
            sequences, _ = decode(
                target,
                self.drafter,
                prompts,
                max_lengths=max_lengths,
                should_stop=stop,
                sampling=sampling,
                rule=self.rule,
                listener=self._listen,
                budget=self._budget_of(model),
                process=process or None,
                recorder=record or None,
                agree=agree,
                stats=stats,
            )
            target.cache.hold(sequences)
        self.totals.add(stats)
        new = [
            torch.tensor(s[len(p) :], device="cpu") for s, p in zip(sequences, prompts, strict=True)
        ]
        pad = config.pad_token_id if config.pad_token_id is not None else stop.default_pad
        generated = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=pad)
        output = torch.cat([input_ids, generated.to(input_ids)], 1)
        if not config.return_dict_in_generate:
            return output
        fields = GenerateDecoderOnlyOutput.__dataclass_fields__
        kept: Any = {next(n for n in CACHE_KEYWORDS if n in fields): target.cache}
        counts = [len(tokens) for tokens in new]
        kept |= {"scores": record.scores(counts), "logits": record.logits(counts)}
        return GenerateDecoderOnlyOutput(**{"sequences": output, **kept})

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
            self.streamer.put(torch.tensor(tokens, device="cpu"))
        if self.listener is not None:
            self.listener(row, tokens, num_accepted)

    def _laws(
        self,
        processors: LogitsProcessorList,
        pads: Sequence[Tensor],
        config: GenerationConfig,
        target: HFTarget,
        agree: Any,
    ) -> tuple[Processors, SamplingParams]:
        """What changes the logits node by node, and what `verify` applies itself."""
        do_sample = bool(config.do_sample)
        rest, fused = split_processors(processors, do_sample)
        bias = fused_bias(rest, target.vocab_size, target.device)
        if bias is not None:
            rest = []
        seeds = row_seeds(self.seed, len(pads), config.num_return_sequences or 1)
        (agreed,) = agree((torch.tensor(seeds, device=target.device),))
        sampling = sampling_params(
            fused,
            self.per_row,
            agreed.tolist(),
            bias,
            do_sample=do_sample,
            device=target.device,
        )
        return Processors(rest, pads), sampling


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    drafter: Drafter | str | None = "auto",
    seed: int | Sequence[int] | None = None,
    rule: str | None = None,
    streamer: BaseStreamer | None = None,
    budget: Budget | bool | None = None,
    compile: Backend = False,
    pack: bool | None = None,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """`model.generate` with speculation, and with the arguments that it keeps from custom loops.

    Args:
        model: any causal language model of transformers.
        inputs: [B, P] int64 prompt tokens, left-padded; or pass `input_ids=`.
        generation_config: as for `model.generate`; what it leaves open is the model's own.
        drafter, seed, rule, budget, compile, pack: as in `SpeculativeDecoder`.
        streamer: as in `SpeculativeDecoder`, and ended whatever happens.
        **kwargs: everything else that `model.generate` takes; see `options.py` for those that ask
            for a drafter or for another loop. `temperature`, `top_k`, `top_p` and `min_p` may be
            lists, with one value per row.

    Returns:
        as `SpeculativeDecoder.__call__`.

    Raises:
        ValueError: as `SpeculativeDecoder.__call__`; stop strings without `tokenizer`; an assistant
            with another vocabulary; what asks for a loop that is not plain greedy or sampled
            decoding.
    """
    streamer = None if streamer is None else EndedOnce(streamer)
    try:
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        options = Options(model, kwargs)
        decoder = SpeculativeDecoder(
            options.drafter(drafter),
            seed=seed,
            rule=rule,
            streamer=streamer,
            budget=budget,
            compile=compile,
            pack=pack,
            **options.per_row(),
        )
        options.check_loop()
        options.add_stop_strings()
        method: Any = model.generate  # a mixin that PreTrainedModel does not declare
        kwargs["custom_generate"] = decoder
        output: Tensor | GenerateDecoderOnlyOutput = method(inputs, **kwargs)
        return output
    finally:
        if streamer is not None:
            streamer.end()


def _attached(drafter: Drafter | None, target: HFTarget) -> AbstractContextManager[object]:
    return nullcontext() if drafter is None else drafter.attach(HFTargetView(target))
