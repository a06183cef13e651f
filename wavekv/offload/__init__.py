"""Moving bytes and attending to them: zones, budgets, page building, prefill, decode steps."""

from wavekv.index.levels import Logits
from wavekv.offload.context import LayerContext
from wavekv.offload.runtime import OffloadRuntime

__all__ = ["LayerContext", "Logits", "OffloadRuntime"]
