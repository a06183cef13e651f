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


class InputError(WavekvError, ValueError):
    """Raised when keys, queries or numbers have a shape or value that an index does not accept."""


class DtypeError(WavekvError, TypeError):
    """Raised when keys or queries are of a type that an index does not hold."""


class ClosedError(WavekvError, RuntimeError):
    """Raised when an index is used after `close`."""


class ReadOnlyError(WavekvError, RuntimeError):
    """Raised when an index that is mapped from files is to change."""


class IndexFormatError(WavekvError, ValueError):
    """Raised when files are not an index, are damaged, or were written by a newer version."""


class ContextFormatError(WavekvError, ValueError):
    """Raised when files are not a saved context, are damaged, or were written by a newer
    version."""


class ContextMismatchError(WavekvError, ValueError):
    """Raised when a saved context is of another model or tokenizer than the one it is for."""


class LockedError(WavekvError, RuntimeError):
    """Raised when another process is writing what this one is to write."""
