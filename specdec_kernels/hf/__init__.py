"""The HuggingFace side: cache, attention adapter, `generate`, models. The only code that imports
transformers.
"""

from .generate import SpeculativeDecoder, generate
from .load import load_model

__all__ = ["SpeculativeDecoder", "generate", "load_model"]
