"""Vector-index KV-cache offload for Hugging Face decoders: `model = OffloadedKV(model)`.

Importing this package loads nothing heavy. A public name is looked up in its module on first use
(PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wavekv.config import OffloadConfig
    from wavekv.index import WaveIndex
    from wavekv.model_adapters import OffloadedCache, OffloadedKV
    from wavekv.saved.context import SavedContext

__version__ = "0.1.0"

__all__ = [
    "OffloadConfig",
    "OffloadedCache",
    "OffloadedKV",
    "SavedContext",
    "WaveIndex",
    "__version__",
]

_HOME = {
    "OffloadConfig": "wavekv.config",
    "OffloadedCache": "wavekv.model_adapters",
    "OffloadedKV": "wavekv.model_adapters",
    "SavedContext": "wavekv.saved.context",
    "WaveIndex": "wavekv.index",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; public names are {', '.join(__all__)}"
        )
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
