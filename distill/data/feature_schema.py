"""What a feature is: its kind, its side, whether serving knows it. Next: ``features.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill.recipe import nearest

Side = Literal["user", "item", "context"]

# the arguments that only some kinds know
_OF_KINDS = {
    "vocabulary": ("categorical", "sequence"),
    "hash_buckets": ("categorical", "sequence"),
    "min_count": ("categorical", "sequence"),
    "separator": ("sequence",),
    "max_length": ("sequence",),
    "transform": ("dense",),
    "buckets": ("dense",),
    "fill": ("dense",),
    "encoder": ("text",),
}


class Feature(BaseModel):
    """One column that a model may read.

    Args:
        name: Its name everywhere; ``key`` is the same.
        kind: ``categorical`` (whole numbers or words become ids), ``dense`` (a number), ``sequence`` (a list
            of categories, oldest first) or ``text`` (an item's text, as a stored vector of ``encoder``).
        side: Whose it is: ``user``, ``item``, or ``context`` for what belongs to a pair of both.
        privileged: Known in training only: a teacher may read it, a student cannot.
        column: Its column in the data; the name, if not given.
        vocabulary: The feature whose ids it shares. A user's ``sequence`` that shares an item's ids and
            has no column of its own in the users table is the user's history.
        hash_buckets: Ids are a hash modulo this, and no vocabulary is kept.
        min_count: Categories seen less often are unknown.
        separator: Of a sequence that is stored as one text, as genres are: ``|``.
        max_length: A longer sequence keeps its last values.
        transform: Of a number: ``standard`` (mean 0, deviation 1 on train), ``log`` (sign(x) log(1 + |x|)),
            ``log_standard`` (both), ``none``.
        buckets: Cut a number at its train quantiles into so many buckets; it becomes categorical.
        fill: What stands for a missing number; without it a missing number is an error.
        encoder: A text encoder, as ``distill.open.open_model`` takes it.

    Example:
        >>> Feature(name="hist_movie", kind="sequence", side="user", vocabulary="movie", max_length=50).key
        'hist_movie'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z_][\w-]*$")
    kind: Literal["categorical", "dense", "sequence", "text"]
    side: Side
    privileged: bool = False
    column: str | None = None
    vocabulary: str | None = None
    hash_buckets: int | None = Field(default=None, ge=1)
    min_count: int = Field(default=1, ge=1)
    separator: str | None = Field(default=None, min_length=1)
    max_length: int | None = Field(default=None, ge=1)
    transform: Literal["log", "standard", "log_standard", "none"] = "none"
    buckets: int | None = Field(default=None, ge=2)
    fill: float | None = Field(default=None, allow_inf_nan=False)
    encoder: str | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Feature:
        for argument, kinds in _OF_KINDS.items():
            default = type(self).model_fields[argument].default
            if getattr(self, argument) != default and self.kind not in kinds:
                raise ValueError(f"a {self.kind} feature takes no {argument}; {' and '.join(kinds)} do")
        if self.vocabulary is not None and (self.hash_buckets is not None or self.min_count > 1):
            raise ValueError("hash_buckets and min_count belong to the feature whose vocabulary it shares")
        if self.buckets is not None and self.transform != "none":
            raise ValueError("no transform changes where quantiles cut into buckets; leave one of them out")
        if self.kind in ("sequence", "text") and self.side == "context":
            raise ValueError(f"a {self.kind} feature belongs to a user or an item, not to a pair")
        if (self.kind == "text") != (self.encoder is not None):
            raise ValueError("encoder: a text feature needs one, and no other kind takes it")
        return self

    @property
    def key(self) -> str:
        return self.name

    @property
    def source(self) -> str:
        """Its column in the data."""
        return self.column or self.name

    @property
    def owner(self) -> str:
        """The feature whose ids it has."""
        return self.vocabulary or self.name

    @property
    def has_ids(self) -> bool:
        """Whether its values are rows of an embedding table; else they are numbers."""
        return self.kind != "dense" or self.buckets is not None


def schema_of(features: Sequence[Feature | Mapping[str, Any]]) -> tuple[Feature, ...]:
    """Checked features; mappings, as recipes have them, become Feature.

    Raises:
        ValueError: One message that names the feature and what is wrong with it.
    """
    schema: dict[str, Feature] = {}
    for i, given in enumerate(features):
        feature = given if isinstance(given, Feature) else _feature(given, i)
        if feature.name in schema:
            raise ValueError(f"features: two features are called '{feature.name}'.")
        schema[feature.name] = feature
    if not schema:
        raise ValueError("features: the schema is empty; name at least one feature.")
    for feature in schema.values():
        _check_shared(feature, schema)
        _check_privileged(feature, schema)
    return tuple(schema.values())


def _feature(given: Mapping[str, Any], place: int) -> Feature:
    if not isinstance(given, Mapping):
        raise ValueError(f"features[{place}]: a feature is a mapping with name, kind and side.")
    try:
        return Feature(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            what = f"a feature has no such key.{nearest(key, Feature.model_fields)}"
        name = f" ('{given['name']}')" if "name" in given else ""
        raise ValueError(
            f"features[{place}]{name}{f', {key}' if key else ''}: {what.rstrip('.')}."
        ) from error


def _check_privileged(feature: Feature, schema: Mapping[str, Feature]) -> None:
    """Refuse a privileged column that a student would read under another name."""
    for other in schema.values() if feature.privileged else ():
        if not other.privileged and (other.side, other.source) == (feature.side, feature.source):
            raise ValueError(
                f"features: '{feature.name}' is privileged, but '{other.name}' gives the same column "
                f"'{feature.source}' to students; make both privileged, or take one out."
            )


def _check_shared(feature: Feature, schema: Mapping[str, Feature]) -> None:
    if feature.vocabulary is None:
        return
    owner = schema.get(feature.vocabulary)
    if owner is None:
        raise ValueError(
            f"features, '{feature.name}': there is no feature '{feature.vocabulary}' to share a vocabulary "
            f"with.{nearest(feature.vocabulary, schema)}"
        )
    if owner.vocabulary is not None or owner.kind not in ("categorical", "sequence"):
        raise ValueError(
            f"features, '{feature.name}': '{owner.name}' has no vocabulary of its own to share; name a "
            f"categorical feature or a sequence that has one."
        )
    if owner.privileged and not feature.privileged:
        raise ValueError(
            f"features, '{feature.name}': its vocabulary is that of '{owner.name}', which is privileged, so "
            f"a student would carry what only training knows; give it one of its own."
        )
