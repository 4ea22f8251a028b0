"""Errors a user can cause. The command prints each as one message and exits with 2."""

from __future__ import annotations

from types import TracebackType


class UserError(Exception):
    """Something in a recipe, a file or an argument is wrong, and its owner can mend it."""


class RecipeError(UserError):
    """A recipe says something that cannot be: a key, a type, a value or a graph."""


class DataError(UserError):
    """A file or a table is not what the recipe says it is; names file, row or column."""


class RunError(Exception):
    """A run failed while it ran (exit code 1): what happened, what was kept, how to go on."""


class Mistakes:
    """Gathers the mistakes of several steps, so that they are told in one go.

    >>> mistakes = Mistakes()
    >>> for key in ("data", "models"):
    ...     with mistakes:
    ...         raise RecipeError(f"{key}: wrong.")
    >>> mistakes.report()
    Traceback (most recent call last):
    distill.errors.RecipeError: data: wrong.
    models: wrong.
    """

    def __init__(self) -> None:
        self._found: list[UserError] = []

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, UserError):
            self._found.append(error)
        return isinstance(error, UserError)

    def add(self, message: str) -> None:
        """A mistake of the recipe that was found without an error."""
        self._found.append(RecipeError(message))

    def report(self) -> None:
        """Raise what was gathered, each line once; nothing, where there was no mistake."""
        if self._found:
            lines = dict.fromkeys(line for error in self._found for line in str(error).splitlines())
            raise type(self._found[0])("\n".join(lines)) from self._found[0]
