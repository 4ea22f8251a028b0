"""MovieLens 100K, 1M and latest-small, in their public layouts and as parquet. Next: ``kuairand.py``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distill.data.archives import Archive
from distill.data.feature_schema import Feature
from distill.data.frames import collect, need_polars, require
from distill.data.interaction_log import TEST, TRAIN
from distill.data.interaction_prepare import Settings
from distill.data.interaction_source import Law
from distill.data.interaction_tables import PART, Tables
from distill.data.interactions import InteractionData
from distill.errors import DataError

if TYPE_CHECKING:
    import polars

    from distill.data.frequency import StreamingFrequency

log = logging.getLogger("distill")

GENRES_100K = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]
USER_FIELDS = ("gender", "age", "occupation", "zip")
RATING = ["user_id", "movie_id", "rating", "timestamp"]  # what a table of ratings, or of films, must have
FILM = ["movie_id", "title"]


class MovieLens(InteractionData):
    """Ratings of films as a retrieval task: which film does the user rate next?

    Equal times of a user are put in order of the film's id; a history holds what is strictly earlier. A copy
    of ml-1m without times (its test ratings are given) has histories that are sets: other films of the user,
    drawn by the seed; its dev rating is one of the train ratings, drawn too.

    Args:
        path: The folder, the archive (zip, tar.gz) or its address (https://...), of ``u.data``, ``u.item``,
            ``u.user`` (100K); ``ratings.dat``, ``movies.dat``, ``users.dat`` (1M); ``ratings.csv``,
            ``movies.csv`` (latest-small, and larger); or parquet tables of these.
        at_least: Ratings below are no positives; None: every rating is one.
        split: ``last``: each user's last rating is test, the one before dev. ``time``: the latest are test.
        dev: The share of ratings that is dev, in a split by time.
        test: The same for test.
        core: Remove users and films with less ratings, until none is left.
        catalogue: Whether films that somebody rated are searched (``taken``), or ``all``.
        sampled: ``test_N``, here ``test_99``, lists each test film among N that the user never rated: those
            of ``test_leave_one_out.parquet`` where that is there, else drawn by the seed.
        history: The longest history.
        features: A schema in place of the usual: user_id, gender, age, occupation and zip where they are
            known, hist_movie_id; movie_id, genres and year.
        seed: Of what is drawn once.
        frequency: How films' frequencies are estimated for ``log_q``; None: counted in train.
        log_q: What is in the pool of ``log_q``: see ``InteractionSource``.

    References:
        Harper and Konstan, 2015. The MovieLens Datasets. ACM TiiS 5(4)
        He et al., 2017. Neural Collaborative Filtering (99 negatives). arXiv:1708.05031
    """

    def __init__(
        self,
        path: str | Path,
        at_least: float | None = None,
        split: Literal["last", "time"] = "last",
        dev: float = 0.1,
        test: float = 0.1,
        core: int = 0,
        catalogue: Literal["taken", "all"] = "taken",
        sampled: int = 99,
        history: int = 50,
        features: Sequence[Feature | Mapping[str, Any]] | None = None,
        seed: int = 0,
        frequency: StreamingFrequency | None = None,
        log_q: Law = "batch",
    ):
        self.archive = Archive(path)
        self.at_least = at_least
        self._read_tables = _layout(self.archive)
        super().__init__(
            _usual(self._read_tables is not _small, history) if features is None else features,
            Settings(
                split=split,
                dev=dev,
                test=test,
                at_least=at_least,
                core=core,
                catalogue=catalogue,
                sampled=sampled,
                seed=seed,
                log_q=log_q,
            ),
            frequency,
        )

    def tables(self) -> Tables:
        return self._read_tables(self.archive, self.at_least)


def _usual(with_users: bool, history: int) -> list[Feature]:
    """The schema of a MovieLens data set."""
    fields = USER_FIELDS if with_users else ()
    return [
        Feature(name="user_id", kind="categorical", side="user"),
        *(Feature(name=name, kind="categorical", side="user") for name in fields),
        Feature(
            name="hist_movie_id", kind="sequence", side="user", vocabulary="movie_id", max_length=history
        ),
        Feature(name="movie_id", kind="categorical", side="item"),
        Feature(name="genres", kind="sequence", side="item", separator="|"),
        Feature(name="year", kind="categorical", side="item"),
    ]


Reader = Callable[[Archive, float | None], Tables]


def _layout(archive: Archive) -> Reader:
    """Which of the known layouts the files have."""
    layouts: dict[tuple[str, ...], Reader] = {
        (
            "interactions.parquet",
            "test_leave_one_out.parquet",
            "movies.parquet",
            "users.parquet",
        ): _without_times,
        ("ratings.parquet", "items.parquet", "users.parquet"): _100k_parquet,
        ("ratings.parquet", "movies.parquet", "users.parquet"): _1m_parquet,
        ("ratings.parquet", "movies.parquet"): _small,
        ("u.data", "u.item", "u.user"): _100k,
        ("ratings.dat", "movies.dat", "users.dat"): _1m,
        ("ratings.csv", "movies.csv"): _small,
    }
    for names, reader in layouts.items():
        if all(name in archive for name in names):
            return reader
    known = "; ".join(", ".join(names) for names in layouts)
    raise DataError(f"{archive.path}: no MovieLens data set. It takes folders or zip files with {known}.")


def _tables(
    ratings: polars.LazyFrame, movies: polars.LazyFrame, users: polars.LazyFrame | None, **others: Any
) -> Tables:
    pl = need_polars()
    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$").cast(pl.Int64).alias("year")
    named = {"time": "timestamp", "user": "user_id", "item": "movie_id", "label": "rating", **others}
    return Tables(ratings, users, movies.with_columns(year), **named)


def _read(archive: Archive, name: str, columns: Sequence[str], names: Mapping[str, str]) -> polars.LazyFrame:
    """A file under our ``names`` (theirs -> ours), which must have these columns, by their names or ours."""
    frame = archive.csv(name) if name.endswith(".csv") else archive.parquet(name)
    frame = frame.rename(names, strict=False)
    require(frame, columns, archive.place(name))
    return frame


def _100k(archive: Archive, at_least: float | None) -> Tables:
    ratings = archive.table("u.data", "\t", RATING)
    columns = ["movie_id", "title", "release_date", "video_release_date", "url", *GENRES_100K]
    movies = archive.table("u.item", "|", columns)
    users = archive.table("u.user", "|", ["user_id", "age", "gender", "occupation", "zip"])
    return _tables(ratings, _genres_of_flags(movies), users)


def _100k_parquet(archive: Archive, at_least: float | None) -> Tables:
    ratings = _read(archive, "ratings.parquet", RATING, {"item_id": "movie_id"})
    movies = _read(archive, "items.parquet", [*FILM, *GENRES_100K], {"movie_title": "title"})
    users = _read(archive, "users.parquet", ["user_id"], {"zip_code": "zip"})
    return _tables(ratings, _genres_of_flags(movies), users)


def _genres_of_flags(movies: polars.LazyFrame) -> polars.LazyFrame:
    pl = need_polars()
    named = [pl.when(pl.col(genre) == 1).then(pl.lit(genre)) for genre in GENRES_100K]
    return movies.select(
        "movie_id", "title", pl.concat_str(named, separator="|", ignore_nulls=True).alias("genres")
    )


def _1m(archive: Archive, at_least: float | None) -> Tables:
    ratings = archive.table("ratings.dat", "::", RATING)
    movies = archive.table("movies.dat", "::", ["movie_id", "title", "genres"])
    users = archive.table("users.dat", "::", ["user_id", "gender", "age", "occupation", "zip"])
    return _tables(ratings, movies, users)


ONE_MILLION = {
    "UserID": "user_id",
    "MovieID": "movie_id",
    "Rating": "rating",
    "Timestamp": "timestamp",
    "Title": "title",
    "Genres": "genres",
    "Gender": "gender",
    "Age": "age",
    "Occupation": "occupation",
    "Zip-code": "zip",
}


def _1m_parquet(archive: Archive, at_least: float | None) -> Tables:
    columns = {"ratings": RATING, "movies": FILM, "users": ["user_id"]}
    return _tables(*(_read(archive, f"{name}.parquet", columns[name], ONE_MILLION) for name in columns))


def _small(archive: Archive, at_least: float | None) -> Tables:
    kind = "csv" if "ratings.csv" in archive else "parquet"
    names = {"userId": "user_id", "movieId": "movie_id"}
    ratings = _read(archive, f"ratings.{kind}", RATING, names)
    movies = _read(archive, f"movies.{kind}", FILM, names)
    return _tables(_with_times(ratings, archive), movies, None)


def _with_times(ratings: polars.LazyFrame, archive: Archive) -> polars.LazyFrame:
    """The ratings whose time is a number; a copy may hold a damaged one."""
    pl = need_polars()
    rows = collect(ratings.with_columns(pl.col("timestamp").cast(pl.Int64, strict=False)), str(archive.path))
    if damaged := rows["timestamp"].null_count():
        log.warning("%s: %d ratings have no readable time and are left out", archive.path, damaged)
    return rows.drop_nulls("timestamp").lazy()


def _without_times(archive: Archive, at_least: float | None) -> Tables:
    """Pairs without times, with test pairs and their 99 negatives; of the stars only whether 3 or more."""
    pl = need_polars()
    pairs = archive.parquet("interactions.parquet")
    if at_least is not None and at_least != 3:
        raise DataError(
            f"{archive.place('interactions.parquet')}: this copy says of a rating only whether it is 3 or "
            f"more; at_least must be 3 or left out, or take the original archive."
        )
    required = ["UserID", "MovieID", "rating_ge3", "is_test"]
    require(pairs, required, archive.place("interactions.parquet"))
    ratings = pairs.select(
        user_id="UserID",
        movie_id="MovieID",
        rating=pl.col("rating_ge3").cast(pl.Float64) * 3,
        **{PART: pl.when("is_test").then(TEST).otherwise(TRAIN).cast(pl.UInt8)},
    )
    if at_least is not None:
        ratings = ratings.drop_nulls()
    test = _read(archive, "test_leave_one_out.parquet", ["user_id", "negative_MovieIDs"], ONE_MILLION)
    movies = _read(archive, "movies.parquet", FILM, ONE_MILLION)
    users = _read(archive, "users.parquet", ["user_id"], ONE_MILLION)
    return _tables(
        ratings if at_least is not None else ratings.drop("rating").with_columns(rating=pl.lit(3.0)),
        movies,
        users,
        time=None,
        negatives=test.select(user="user_id", items="negative_MovieIDs"),
    )
