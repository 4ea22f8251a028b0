"""Whether a plain value of a recipe is what an argument takes, by the argument's annotation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError


def wrong_value(target: Callable[..., Any], name: str, value: Any) -> str:
    """What is wrong with a value for an argument, in words; "" where nothing is, or nobody can tell.

    >>> def sampler(count: int, top: int | None = None): ...
    >>> wrong_value(sampler, "count", "three")
    "should be a valid integer, got 'three'"
    >>> wrong_value(sampler, "top", None)
    ''
    """
    if not _is_plain(value) or (adapter := _adapters(target).get(name)) is None:
        return ""
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        skipped = (
            "none_required",
            "sequence_str",
        )  # the latter: a word for a list of them, the class decides
        problems = [problem["msg"] for problem in error.errors() if problem["type"] not in skipped]
        said = dict.fromkeys(message.removeprefix("Input ") for message in problems)
        return f"{' or '.join(said)}, got {value!r}" if said else ""
    return ""


def _is_plain(value: Any) -> bool:
    """Whether a value is data: no object, node or run is made of it."""
    if isinstance(value, Mapping):
        return not {"type", "ref", "run"} & set(value) and all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, list) else True


@functools.lru_cache(maxsize=256)
def _adapters(target: Callable[..., Any]) -> dict[str, TypeAdapter]:
    """A validator for each annotated argument."""
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # a name that only type checkers import
        return {}
    adapters = {}
    for name, hint in hints.items():
        try:
            adapters[name] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # a model of pydantic's own, or nothing it can check
            continue
    return adapters
