"""Hugging Face models: the only part that imports transformers."""

from wavekv.model_adapters.cache import OffloadedCache
from wavekv.model_adapters.wrapper import OffloadedKV

__all__ = ["OffloadedCache", "OffloadedKV"]
