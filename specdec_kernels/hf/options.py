"""Arguments of `model.generate` that it keeps from custom loops, or that ask for another loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from ..drafters import Drafter, ModelDrafter, PromptLookupDrafter
from .draft_model import assistant_drafter, chain_of
from .early_exit import EarlyExitModel
from .rows import FILTERS

_NAMES_DRAFTER = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")
_DRAFTING = (  # how to draft: it changes the speed, not the text
    "num_assistant_tokens",
    "max_matching_ngram_size",
    "speculation_type",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "use_mtp",
)


class Options:
    """The keyword arguments of one call.

    Args:
        model: whose generation configuration fills in what is left open.
        kwargs: as given; what is handled here is taken out or replaced.
    """

    def __init__(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
        if kwargs.pop("custom_generate", None) is not None:
            raise ValueError("custom_generate cannot be combined with specdec_kernels.generate")
        self._configs = [kwargs.get("generation_config"), model.generation_config]
        self._kwargs = kwargs
        self._tokenizer = kwargs.pop("tokenizer", None)

    def drafter(self, chosen: Drafter | str | None) -> Drafter | str | None:
        """The drafter that the arguments name, or else the chosen one.

        Raises:
            ValueError: two of them, or an assistant that cannot draft for the model.
        """
        named = [name for name in _NAMES_DRAFTER if self._kwargs.get(name) is not None]
        if chosen != "auto":  # it goes before what a configuration says
            named.insert(0, "drafter")
        elif not named:
            named = [name for name in _NAMES_DRAFTER if self._given(name) is not None]
        if len(named) > 1:
            raise ValueError(f"give either {' or '.join(named)}")
        name = named[0] if named else "drafter"
        values = {option: self._take(option) for option in (*_NAMES_DRAFTER, *_DRAFTING)}
        tokenizer = self._kwargs.pop("assistant_tokenizer", None)
        if name != "assistant_model" and tokenizer is not None:
            raise ValueError("assistant_tokenizer needs an assistant_model")
        length = values["num_assistant_tokens"]
        if name == "assistant_model":
            if values["speculation_type"] is not None:
                raise ValueError(
                    "assistant_model must be a causal language model, with speculation_type=None, "
                    f"got speculation_type={values['speculation_type']!r}"
                )
            tokenizers = None
            if self._tokenizer is not None and tokenizer is not None:
                tokenizers = (self._tokenizer, tokenizer)
            return assistant_drafter(values[name], length, tokenizers)
        if name == "assistant_early_exit":
            return ModelDrafter(EarlyExitModel(values[name]), chain_of(length))
        if name == "prompt_lookup_num_tokens":
            longest = values["max_matching_ngram_size"]
            options = {} if longest is None else {"max_ngram": longest}
            return PromptLookupDrafter(values[name] + 1, **options)
        return chosen

    def per_row(self) -> dict[str, Any]:
        """Filters with one value per row."""
        kinds = (list, tuple, Tensor)
        names = [name for name in FILTERS if isinstance(self._kwargs.get(name), kinds)]
        return {name: list(self._kwargs.pop(name)) for name in names}

    def check_loop(self) -> None:
        """Raise ValueError for what `generate` answers by another loop before it calls ours."""
        if self._kwargs.pop("synced_gpus", None):
            raise ValueError(
                "synced_gpus=True is not supported with speculation: processes with texts of their "
                "own take different numbers of steps"
            )
        if self._given("cache_implementation") == "paged":
            raise ValueError(
                "cache_implementation='paged' is not supported with speculation: it asks for "
                "continuous batching"
            )
        if self._given("token_healing"):
            raise ValueError(
                "token_healing=True is not supported with speculation: pass the prompt that "
                "model.heal_tokens(input_ids, tokenizer) returns"
            )

    def add_stop_strings(self) -> None:
        """Turn stop strings into a stopping criterion, as `generate` would.

        Raises:
            ValueError: no tokenizer to find them with.
        """
        strings = self._take("stop_strings")
        if strings is None:
            return
        if self._tokenizer is None:
            raise ValueError("stop_strings needs the tokenizer: pass tokenizer=")
        criteria = self._kwargs.get("stopping_criteria") or []
        found = StopStringCriteria(self._tokenizer, strings)
        self._kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, found])

    def _given(self, name: str) -> Any:
        """A setting: the argument, else that of the configurations."""
        values = [self._kwargs.get(name), *(getattr(c, name, None) for c in self._configs)]
        return next((value for value in values if value is not None), None)

    def _take(self, name: str) -> Any:
        """A setting, which `generate` then does not see."""
        value = self._given(name)
        self._kwargs.pop(name, None)
        if any(getattr(config, name, None) is not None for config in self._configs):
            self._kwargs[name] = None  # overrides both configurations
        return value
