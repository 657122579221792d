"""The HuggingFace side: cache, attention adapter, `generate`, models. The only code that imports
transformers.
"""

from .draft_model import DraftModel
from .early_exit import EarlyExitModel
from .generate import SpeculativeDecoder, generate
from .load import load_draft_model, load_model
from .processors import declare_logits_processor

__all__ = [
    "DraftModel",
    "EarlyExitModel",
    "SpeculativeDecoder",
    "declare_logits_processor",
    "generate",
    "load_draft_model",
    "load_model",
]
