"""The exceptions wavekv raises. Each is also the builtin error a caller would expect to catch."""


class WavekvError(Exception):
    """Base class: catch it to catch every error that wavekv raises on purpose."""


class ConfigError(WavekvError, ValueError):
    """Raised when an option has a value, type or combination that wavekv does not accept."""


class CapacityError(WavekvError, MemoryError):
    """Raised when keys and values do not fit the memory they were given."""


class UnsupportedModelError(WavekvError, ValueError):
    """Raised when a model's attention or layers cannot be served."""


class CacheError(WavekvError, RuntimeError):
    """Raised when a cache cannot do what was asked in its state, or belongs to another model."""


class LayoutError(WavekvError, ValueError):
    """Raised when a tensor or file has another shape, dtype, device or format than expected."""
