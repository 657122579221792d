"""The HuggingFace side: cache, attention adapter, `generate`, models. The only code that imports
transformers.
"""

from .draft_model import DraftModel
from .early_exit import EarlyExitModel
from .generate import SpeculativeDecoder, generate
from .load import load_model

__all__ = ["DraftModel", "EarlyExitModel", "SpeculativeDecoder", "generate", "load_model"]
