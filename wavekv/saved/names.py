"""Names of arrays in a context that is being written, and of the groups that they are in."""

from __future__ import annotations

from wavekv.errors import ContextFormatError, LayoutError
from wavekv.saved.arrays import METADATA
from wavekv.saved.manifest import check_name
from wavekv.saved.tables import FOLDER


class ArrayNames:
    """Names that are taken."""

    def __init__(self) -> None:
        self._arrays: set[str] = set()
        self.groups = {""}
        """Folders with arrays in them; "" is the context."""

    def take(self, name: str) -> None:
        """Take a name for an array.

        Raises:
            LayoutError: it is no name, is taken, would be inside another array or around one, or
                is where tables are.
        """
        parts = expect_name(name).split("/")
        parents = {"/".join(parts[:i]) for i in range(1, len(parts))}
        is_taken = name in self._arrays | self.groups or bool(parents & self._arrays)
        if is_taken or parts[0] == FOLDER or METADATA in parts:
            raise LayoutError(
                f"expected names of arrays once each, none inside another or in {FOLDER!r}, got "
                f"{name!r}"
            )
        self._arrays.add(name)
        self.groups |= parents


def expect_name(name: str) -> str:
    """The name, if a file of a context may have it.

    Raises:
        LayoutError: it may not.
    """
    try:
        return check_name(name, "the context")
    except ContextFormatError:
        raise LayoutError(
            "expected a name in letters, digits, '_', '-' and '.', with '/' between parts, got "
            f"{name!r}"
        ) from None
