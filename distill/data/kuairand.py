"""KuaiRand: impressions of short videos, with signals from after the click. Next: ``simulated.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distill.data.archives import Archive
from distill.data.cross_features import before, rate
from distill.data.feature_schema import Feature
from distill.data.frames import collect, columns_of, need_polars, require
from distill.data.interaction_log import TEST, TRAIN
from distill.data.interaction_prepare import Settings
from distill.data.interaction_tables import PART, Tables
from distill.data.interactions import InteractionData
from distill.errors import DataError
from distill.recipe import nearest

if TYPE_CHECKING:
    import polars

CROSSED = ("video", "author", "tag")  # of the video, crossed with the user
COUNTED = ("user", "video", "author", "tag")
FLAGS = ("is_like", "is_follow", "is_comment", "is_forward", "is_hate", "is_profile_enter")
TARGETS = ("is_click", "long_view")
ONE_HOT = tuple(f"onehot_feat{i}" for i in range(18))
RANGES = ("follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range")
GROUPS = (
    "cross",
    "counts",
    *TARGETS,
    *FLAGS,
    "play_time",
    "profile_stay_time",
    "comment_stay_time",
    "statistics",
)
STATISTICS = ("show_cnt", "play_cnt", "complete_play_cnt", "long_time_play_cnt", "play_progress", "like_cnt")


class KuaiRand(InteractionData):
    """Impressions of the standard log: a label for each, a user's impressions with one history as one query.

    Train is the log before ``test_from``, its latest share dev, test the log from there on. A history holds
    the videos with a positive label that the user saw strictly earlier, after what is known from before the
    log. What is crossed or counted is so from strictly earlier impressions, those of the test time included.

    Args:
        path: The folder, the archive (zip, tar.gz) or its address (https://...), of KuaiRand-Pure:
            ``log_standard_*.csv`` and the tables of users and videos; or parquet tables ``log_*``,
            ``user_features`` and so on, with ``user_history_until_*``.
        target: The label: ``is_click`` or ``long_view``.
        privileged: Groups of features for teachers alone: ``cross`` (the user's impressions and rate so far,
            with this video, author, tag), ``counts`` (those of the user, video, author, tag so far),
            ``statistics`` (of the video, over the whole period) and what follows a click: ``is_click``,
            ``long_view``, ``is_like``, ``is_follow``, ``is_comment``, ``is_forward``, ``is_hate``,
            ``is_profile_enter``, ``play_time``, ``profile_stay_time``, ``comment_stay_time``.
        train_from: Impressions before this date only lengthen histories.
        test_from: The first date of test.
        dev: The share of the impressions before it that is dev, the latest.
        history: The longest history.
        width: The most impressions that are one query.
        features: A schema in place of the usual.
        seed: Of what is drawn once.

    References:
        Gao et al., 2022. KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed
        Videos. arXiv:2208.08696
    """

    def __init__(
        self,
        path: str | Path,
        target: Literal["is_click", "long_view"] = "long_view",
        privileged: Sequence[str] = ("cross",),
        train_from: int = 20220425,
        test_from: int = 20220501,
        dev: float = 0.15,
        history: int = 50,
        width: int = 8,
        features: Sequence[Feature | Mapping[str, Any]] | None = None,
        seed: int = 0,
    ):
        if target not in TARGETS:
            raise ValueError(f"target must be is_click or long_view, got '{target}'.")
        for group in privileged:
            if group not in GROUPS:
                raise ValueError(
                    f"privileged: there is no group '{group}'; there are {', '.join(GROUPS)}."
                    f"{nearest(group, GROUPS)}"
                )
        if target in privileged:
            raise ValueError(f"privileged: '{target}' is the target; no model may read it.")
        self.archive, self.target = Archive(path), target
        self.train_from, self.test_from = train_from, test_from
        super().__init__(
            [*_usual(history), *_privileged(privileged)] if features is None else features,
            Settings(task="pairs", split="time", dev=dev, test=0.0, catalogue="all", width=width, seed=seed),
        )

    def tables(self) -> Tables:
        pl = need_polars()
        rows = collect(self._log(), self.archive.place("the log"))
        earlier = rows.filter(pl.col("date") < self.train_from)
        rows = rows.filter(pl.col("date") >= self.train_from)
        users = self._table("user_features", "user_id")
        videos = self._videos()
        told = collect(videos.select("video_id", "author_id", "first_tag"), "videos")
        part = pl.when(pl.col("date") >= self.test_from).then(TEST).otherwise(TRAIN).cast(pl.UInt8)
        rows = rows.with_columns(part.alias(PART), hour=pl.col("hourmin") // 100)
        rows = rows.with_columns(play_share=pl.col("play_time_ms") / pl.col("duration_ms").clip(1))
        rows = rows.with_columns(_so_far(rows, told, self.target))
        return Tables(
            rows.lazy(),
            users,
            videos,
            "user_id",
            "video_id",
            "time_ms",
            self.target,
            before=self._before(earlier),
        )

    def _log(self) -> polars.LazyFrame:
        pl = need_polars()
        names = [n for n in self.archive.files if n.startswith(("log_standard", "log_2")) and _is_table(n)]
        if not names:
            raise DataError(
                f"{self.archive.path}: no log of KuaiRand; it takes log_standard_*.csv, or log_*.parquet."
            )
        numbers = ["date", "hourmin", "time_ms", "play_time_ms", "duration_ms", self.target]
        frames = {name: self._file(name, ["user_id", "video_id", *numbers]) for name in sorted(names)}
        for name, frame in frames.items():
            known = columns_of(frame, self.archive.place(name))
            for column in numbers:
                if not (known[column].is_numeric() or known[column] == pl.Boolean):
                    raise DataError(
                        f"{self.archive.place(name)}, column '{column}' holds {known[column]}, not numbers. "
                        f"Mend the column, or fetch the file again."
                    )
        return pl.concat(frames.values(), how="vertical_relaxed")

    def _table(self, start: str, *columns: str) -> polars.LazyFrame:
        names = [name for name in self.archive.files if name.startswith(start) and _is_table(name)]
        if not names:
            raise DataError(f"{self.archive.path}: there is no table {start}*.csv or .parquet.")
        return self._file(names[0], columns)

    def _file(self, name: str, columns: Sequence[str]) -> polars.LazyFrame:
        """A file that must have these columns."""
        frame = self.archive.parquet(name) if name.endswith(".parquet") else self.archive.csv(name)
        require(frame, columns, self.archive.place(name))
        return frame

    def _videos(self) -> polars.LazyFrame:
        pl = need_polars()
        videos = self._table("video_features_basic", "video_id", "author_id", "tag").with_columns(
            tag=pl.col("tag").cast(pl.String),
            first_tag=pl.col("tag").cast(pl.String).str.split(",").list.first(),
        )
        if any(f.source in STATISTICS for f in self.schema):
            statistics = self._table("video_features_statistic", "video_id", *STATISTICS)
            videos = videos.join(statistics.select("video_id", *STATISTICS), on="video_id", how="left")
        return videos

    def _before(self, earlier: polars.DataFrame) -> polars.LazyFrame | None:
        """What users liked to watch before the log that trains: user, items (oldest first)."""
        pl = need_polars()
        if len(earlier):
            taken = earlier.filter(pl.col(self.target) > 0).sort("time_ms", "video_id")
            return (
                taken.lazy()
                .group_by("user_id")
                .agg(pl.col("video_id"))
                .select(user="user_id", items="video_id")
            )
        if any(name.startswith("user_history") for name in self.archive.files):
            history = self._table("user_history", "user_id", "long_watch_seq")
            return history.select(user="user_id", items="long_watch_seq")
        return None


def _is_table(name: str) -> bool:
    return name.endswith((".parquet", ".csv"))


def _usual(history: int) -> list[Feature]:
    """What serving knows."""

    def category(name: str, side: Any, **others: Any) -> Feature:
        return Feature(name=name, kind="categorical", side=side, **others)

    def remembered(name: str, of: str) -> Feature:
        return Feature(name=name, kind="sequence", side="user", vocabulary=of, max_length=history)

    fields = ("user_active_degree", "is_live_streamer", "is_video_author", *RANGES, *ONE_HOT)
    return [
        category("user_id", "user"),
        *(category(name, "user") for name in fields),
        remembered("hist_video_id", "video_id"),
        remembered("hist_author_id", "author_id"),
        remembered("hist_tag", "first_tag"),
        category("video_id", "item"),
        category("author_id", "item"),
        category("first_tag", "item"),
        Feature(name="tag", kind="sequence", side="item", separator=","),
        *(category(name, "item") for name in ("video_type", "upload_type", "music_type")),
        category("music_id", "item", min_count=2),
        Feature(name="video_duration", kind="dense", side="item", buckets=20, fill=0.0),
        category("tab", "context"),
        category("hour", "context"),
    ]


def _privileged(groups: Sequence[str]) -> list[Feature]:
    """The features of the chosen groups, each privileged."""

    def dense(name: str, transform: Any, side: Any = "context") -> Feature:
        return Feature(name=name, kind="dense", side=side, transform=transform, privileged=True, fill=0.0)

    counted = {"cross": [f"user_{x}" for x in CROSSED], "counts": list(COUNTED)}
    found: list[Feature] = []
    for group in groups:
        if group in counted:
            for key in counted[group]:
                found += [dense(f"{key}_count", "log_standard"), dense(f"{key}_rate", "standard")]
        elif group == "statistics":
            found += [dense(name, "log_standard", "item") for name in STATISTICS]
        elif group == "play_time":
            found += [dense("play_time_ms", "log_standard"), dense("play_share", "log_standard")]
        elif group in ("profile_stay_time", "comment_stay_time"):
            found.append(dense(group, "log_standard"))
        else:
            found.append(Feature(name=group, kind="categorical", side="context", privileged=True))
    return found


def _so_far(rows: polars.DataFrame, videos: polars.DataFrame, target: str) -> list[polars.Series]:
    """Counts and rates of the target before each impression, of each key that is counted or crossed."""
    pl = need_polars()
    joined = rows.select("user_id", "video_id").join(videos, on="video_id", how="left", maintain_order="left")
    times, labels = rows["time_ms"].to_numpy(), rows[target].to_numpy()
    train = rows[PART].to_numpy() == TRAIN
    mean = float(labels[train].mean()) if train.any() else 0.0
    columns = {"user": "user_id", "video": "video_id", "author": "author_id", "tag": "first_tag"}
    code = {
        name: joined[column].rank("dense").fill_null(0).to_numpy().astype(np.int64)
        for name, column in columns.items()
    }
    keys = {name: code[name] for name in COUNTED}
    keys |= {f"user_{name}": code["user"] * (int(code[name].max()) + 1) + code[name] for name in CROSSED}
    found = []
    for name, key in keys.items():
        counts, positives = before(key, times, labels)
        found += [
            pl.Series(f"{name}_count", counts),
            pl.Series(f"{name}_rate", rate(counts, positives, mean)),
        ]
    return found
