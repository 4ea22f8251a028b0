"""MovieLens and KuaiRand: the real sets where they are, their public layouts in small."""

import tarfile
import zipfile

import numpy as np
import polars as pl
import pytest
import torch

from distill.build import Builder
from distill.data import KuaiRand, MovieLens
from distill.data.cross_features import before
from distill.data.movielens import GENRES_100K
from distill.errors import DataError
from distill.recipe import check_recipe

RATINGS = [(1, 1, 5, 978300760), (1, 2, 3, 978300761), (1, 3, 4, 978300762), (2, 1, 4, 10), (2, 3, 5, 20)]
LAYOUTS = {
    "100k": {
        "u.data": "\n".join("\t".join(map(str, row)) for row in RATINGS),
        "u.item": "\n".join(
            f"{i}|{title} (199{i})|01-Jan-1995||http://x|" + "|".join(str(int(g == i)) for g in range(19))
            for i, title in ((1, "Misérables, Les"), (2, 'The "B"'), (3, "C"))
        ),
        "u.user": "1|24|M|technician|85711\n2|53|F|other|94043",
    },
    "1m": {
        "ratings.dat": "\n".join("::".join(map(str, row)) for row in RATINGS),
        "movies.dat": "1::Misérables, Les (1991)::Action|Comedy\n2::B: x (1992)::Drama\n3::C (1993)::Drama",
        "users.dat": "1::F::1::10::48067\n2::M::56::16::70072-1",
    },
    "small": {
        "ratings.csv": "userId,movieId,rating,timestamp\n"
        + "\n".join(",".join(map(str, row)) for row in RATINGS),
        "movies.csv": 'movieId,title,genres\n1,"Misérables, Les (1991)",Action|Comedy\n'
        "2,B (1992),Drama\n3,C,Drama",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", ["", "zip", "tar.gz", "address"])
def test_the_public_layouts_of_movielens(tmp_path, layout, packed, monkeypatch):
    """In a folder, in an archive, or at an address, from which the archive is fetched once."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "ml"
    folder.mkdir()
    for name, text in LAYOUTS[layout].items():
        (folder / name).write_bytes(text.encode("utf-8" if layout == "small" else "latin-1"))
    path = folder
    if packed == "tar.gz":
        path = tmp_path / "ml.tar.gz"
        with tarfile.open(path, "w:gz") as packing:
            packing.add(folder, f"ml-{layout}")
    elif packed:
        path = tmp_path / "ml.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name in LAYOUTS[layout]:
                archive.write(folder / name, f"ml-{layout}/{name}")
    data = MovieLens(path.as_uri() if packed == "address" else path)
    if packed == "address":
        path.unlink()
        assert data.split("dev").queries.ids == MovieLens(path.as_uri()).split("dev").queries.ids
        with pytest.raises(DataError, match=r"other.zip cannot be fetched .* give the path"):
            MovieLens(path.with_name("other.zip").as_uri())
    test = data.split("test")
    names = test.candidates.ids
    assert [[names[i] for i in row] for row in test.listed.tolist()] == [["3"], ["3"]]
    assert [[names[i] for i in row] for row in data.split("train").listed.tolist()] == [["1"], ["1"]]
    assert data.features.values("year")[0] == 1991
    assert data.features.values("genres") == (["Action"] if layout == "100k" else ["Action", "Comedy"])
    assert ("gender" in data.features) == (layout != "small")
    assert data.split("test").queries.columns["hist_movie_id"].tolist() == [[2, 1], [2]]


def test_a_folder_that_is_no_movielens(tmp_path):
    with pytest.raises(DataError, match="there is no folder or archive"):
        MovieLens(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no MovieLens data set. It takes .* u.data, u.item, u.user"):
        MovieLens(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="no zip or tar archive"):
        MovieLens(tmp_path / "x.zip")


def parquet_layouts() -> dict[str, dict[str, pl.DataFrame]]:
    """The parquet tables of MovieLens, by layout and file."""
    ratings = pl.DataFrame(RATINGS, ["user_id", "movie_id", "rating", "timestamp"], orient="row")
    movies = pl.DataFrame({"movie_id": [1, 2, 3], "title": ["A (1991)", "B", "C"], "genres": ["x"] * 3})
    users = pl.DataFrame(
        {"user_id": [1, 2], **{name: ["a", "b"] for name in ("gender", "age", "occupation")}}
    )
    flags = movies.select("movie_id", movie_title="title", **{genre: pl.lit(1) for genre in GENRES_100K})
    pairs = {
        "UserID": [1, 1, 2],
        "MovieID": [1, 2, 1],
        "rating_ge3": [True] * 3,
        "is_test": [False, True, False],
    }
    return {
        "100k": {
            "ratings.parquet": ratings.rename({"movie_id": "item_id"}),
            "items.parquet": flags,
            "users.parquet": users.with_columns(zip_code=pl.lit("1")),
        },
        "1m": {
            "ratings.parquet": ratings.rename({"timestamp": "Timestamp"}),
            "movies.parquet": movies.rename({"title": "Title"}),
            "users.parquet": users.with_columns(zip=pl.lit("1")),
        },
        "small": {"ratings.parquet": ratings, "movies.parquet": movies},
        "without times": {
            "interactions.parquet": pl.DataFrame(pairs),
            "test_leave_one_out.parquet": pl.DataFrame({"UserID": [1], "negative_MovieIDs": [[3]]}),
            "movies.parquet": movies,
            "users.parquet": users.with_columns(zip=pl.lit("1")),
        },
    }


@pytest.mark.parametrize("layout", parquet_layouts())
def test_a_column_that_a_table_of_movielens_lacks_is_named(tmp_path, layout):
    tables = parquet_layouts()[layout]

    def written(changed):
        for name, table in changed.items():
            table.write_parquet(tmp_path / name)
        return MovieLens(tmp_path).split("train")

    assert len(written(tables).queries)
    for name, table in tables.items():
        for column in table.columns:
            if column not in ("genres", "gender", "age", "occupation", "zip", "zip_code"):  # of the schema
                with pytest.raises(DataError, match=f"{name}: there is no column '.*'; it has "):
                    written({**tables, name: table.drop(column)})


@pytest.mark.parametrize("file", LAYOUTS["small"])
def test_a_column_that_a_csv_of_movielens_lacks_is_named(tmp_path, file):
    for name, text in LAYOUTS["small"].items():
        (tmp_path / name).write_text(text)
    column = "title" if file == "movies.csv" else "timestamp"
    (tmp_path / file).write_text(LAYOUTS["small"][file].replace(column, "other"))
    with pytest.raises(DataError, match=f"{file}: there is no column '{column}'; it has .*other"):
        MovieLens(tmp_path).split("train")


@pytest.mark.parametrize(
    ("name", "users", "films", "train"),
    [("ml-1m", 6040, 3706, 988_129), ("ml-100k", 943, 1682, 98_114), ("ml-latest-small", 610, 9724, 99_615)],
)
def test_the_real_movielens(data_root, name, users, films, train):
    data = MovieLens(data_root / name)
    test, dev = data.split("test"), data.split("dev")
    assert (len(test.queries), len(test.candidates), len(data.split("train").queries)) == (
        users,
        films,
        train,
    )
    assert int(data.popularity.sum()) == train
    known = {(u, i) for u, row in zip(test.groups.tolist(), test.seen.tolist(), strict=True) for i in row}
    targets = set(zip(test.groups.tolist(), test.listed.values.tolist(), strict=True))
    assert not known & targets
    assert set(zip(dev.groups.tolist(), dev.listed.values.tolist(), strict=True)) <= known | targets


def test_the_99_negatives_are_those_of_the_file(data_root):
    data = MovieLens(data_root / "ml-1m")
    judged = data.split("test_99")
    given = pl.read_parquet(data_root / "ml-1m" / "test_leave_one_out.parquet").sort("UserID")
    names = judged.candidates.ids
    assert (judged.listed.lengths == 100).all()
    for query in (0, 17, 6039):
        listed = [int(names[i]) for i in judged.listed[query].tolist()]
        assert listed == [given["MovieID"][query], *given["negative_MovieIDs"][query].to_list()]
    with pytest.raises(DataError, match="only whether it is 3 or more"):
        MovieLens(data_root / "ml-1m", at_least=4).split("train")


LOG = {  # user 1 sees videos 10, 20, 10 of the authors 7, 8, 7
    "user_id": [1, 1, 1, 2, 1, 2],
    "video_id": [10, 20, 10, 20, 20, 10],
    "date": [20220424, 20220425, 20220426, 20220427, 20220502, 20220503],
    "hourmin": [1200] * 6,
    "time_ms": [1, 2, 3, 4, 5, 6],
    "is_click": [1, 1, 0, 1, 0, 1],
    "long_view": [1, 1, 0, 1, 0, 1],
    "play_time_ms": [900, 800, 10, 700, 20, 600],
    "duration_ms": [1000] * 6,
    **{name: [0] * 6 for name in ("is_like", "is_follow", "is_comment", "is_forward", "is_hate", "tab")},
    **{name: [0] * 6 for name in ("is_profile_enter", "profile_stay_time", "comment_stay_time", "is_rand")},
}


KUAIRAND_NEEDS = "user_id video_id date hourmin time_ms long_view play_time_ms duration_ms".split()


@pytest.fixture
def kuairand(tmp_path):
    """The public layout of KuaiRand-Pure."""
    folder = tmp_path / "KuaiRand-Pure" / "data"
    folder.mkdir(parents=True)
    log = pl.DataFrame(LOG)
    log[:3].write_csv(folder / "log_standard_4_08_to_4_21_pure.csv")
    log[3:].write_csv(folder / "log_standard_4_22_to_5_08_pure.csv")
    log.write_csv(folder / "log_random_4_22_to_5_08_pure.csv")
    fields = ["user_active_degree", "is_live_streamer", "is_video_author"]
    fields += [f"{x}_range" for x in ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")]
    fields += [f"onehot_feat{i}" for i in range(18)]
    users = {"user_id": [1, 2], **{name: ["a", "b"] for name in fields}}
    pl.DataFrame(users).write_csv(folder / "user_features_pure.csv")
    videos = {
        "video_id": [10, 20],
        "author_id": [7, 8],
        "tag": ["3,4", "5"],
        "video_duration": [1000.0, None],
        **{name: ["x", "y"] for name in ("video_type", "upload_type", "music_type", "music_id")},
    }
    pl.DataFrame(videos).write_csv(folder / "video_features_basic_pure.csv")
    return tmp_path


def test_the_public_layout_of_kuairand(kuairand):
    data = KuaiRand(kuairand, dev=0.34, privileged=["cross", "counts", "play_time", "is_like"])
    train, test = data.split("train"), data.split("test")
    names = train.candidates.ids
    assert [[names[i] for i in row] for row in train.listed.tolist()] == [["20"], ["10"]]
    assert train.labels.tolist() == [1, 0] and test.labels.tolist() == [0, 1]
    histories = [[names[i - 2] for i in row] for row in test.queries.columns["hist_video_id"].tolist()]
    assert histories == [["10", "20"], ["20"]]
    assert train.queries.columns["hist_video_id"].lengths.tolist() == [1, 2]  # 10 is from before the log
    assert {f.name for f in data.features.side("context")} == {"tab", "hour"}
    assert all(
        f.privileged
        for f in data.features.schema
        if f.source in LOG and f.name not in ("user_id", "video_id", "tab")
    )


def test_what_is_crossed_is_strictly_earlier():
    random = np.random.default_rng(0)
    keys, times, labels = (random.integers(0, n, 300) for n in (8, 40, 2))
    counts, positives = before(keys, times, labels)
    for row in range(300):
        earlier = (keys == keys[row]) & (times < times[row])
        assert (counts[row], positives[row]) == (earlier.sum(), labels[earlier].sum())
    changed = labels.copy()
    changed[times >= 20] ^= 1  # the present and the future
    assert np.array_equal(before(keys, times, changed)[1][times <= 20], positives[times <= 20])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "is_like"}, "target must be is_click or long_view"),
        ({"privileged": ["play_tim"]}, "there is no group 'play_tim'.* Did you mean 'play_time'"),
        ({"privileged": ["long_view"]}, "'long_view' is the target"),
    ],
)
def test_a_choice_that_kuairand_does_not_have(kuairand, arguments, message):
    with pytest.raises(ValueError, match=message):
        KuaiRand(kuairand, **arguments)


@pytest.mark.parametrize(
    ("file", "column"),
    [
        *(("log_standard_4_22_to_5_08_pure.csv", name) for name in LOG if name in KUAIRAND_NEEDS),
        ("user_features_pure.csv", "user_id"),
        *(("video_features_basic_pure.csv", name) for name in ("video_id", "author_id", "tag")),
    ],
)
def test_a_column_that_a_file_of_kuairand_lacks_is_named(kuairand, file, column):
    path = kuairand / "KuaiRand-Pure" / "data" / file
    pl.read_csv(path).drop(column).write_csv(path)
    with pytest.raises(DataError, match=f"{file}: there is no column '{column}'; it has "):
        KuaiRand(kuairand).split("train")


@pytest.mark.parametrize("column", ["long_view", "date", "hourmin", "duration_ms"])
def test_a_column_of_kuairand_that_holds_words_is_named(kuairand, column):
    file = "log_standard_4_22_to_5_08_pure.csv"
    path = kuairand / "KuaiRand-Pure" / "data" / file
    pl.read_csv(path).with_columns(pl.lit("yes").alias(column)).write_csv(path)
    with pytest.raises(DataError, match=f"{file}, column '{column}' holds String, not numbers"):
        KuaiRand(kuairand).split("train")


def test_the_real_kuairand(data_root):
    data = KuaiRand(data_root / "kuairand-pure", privileged=["cross", "play_time"])
    splits = {name: data.split(name) for name in data.splits}
    sizes = {name: len(judged.listed.values) for name, judged in splits.items()}
    assert sizes["train"] + sizes["dev"] == 94_784 and sizes["test"] == 133_545
    assert abs(sizes["dev"] / 94_784 - 0.15) < 0.001
    assert len(splits["train"].queries) < 0.6 * sizes["train"]
    assert set(splits["train"].labels.tolist()) == {0.0, 1.0}
    for judged in splits.values():
        assert all(values.isfinite().all() for values in judged.pair.values())
    features = data.features
    assert not any(f.privileged for side in ("user", "item", "context") for f in features.side(side))
    source = data.train_source(512, 8)
    source.prepare(features.side("user"), features.side("item"), features.side("context", privileged=True))
    batch = source.batch(0, 0)
    assert batch.pair["user_author_count"].shape == batch.mask.shape
    assert torch.equal(batch.labels[batch.mask] >= 0, torch.ones(int(batch.mask.sum()), dtype=torch.bool))


def test_a_recipe_names_the_folder_by_path(data_root):
    document = {
        "name": "mine",
        "data": {
            "type": "distill.data.MovieLens",
            "path": str(data_root / "ml-100k"),
            "frequency": {"type": "distill.data.StreamingFrequency", "buckets": 64},
            "candidates": 4,
            "negatives": [{"type": "distill.data.PopularNegatives", "count": 3}],
        },
        "models": {"student": {"type": "students.TwoTower", "features": {"data": "data"}}},
        "losses": {"labels": {"type": "distill.objectives.SampledSoftmax", "to": "student"}},
        "train": {"batch_size": 16},
    }
    recipe, builder = check_recipe(document, ""), Builder()
    builder.check(recipe)
    data = builder.data(recipe)
    batch = builder.source(recipe, data, ["data"]).batch(0, 0)
    assert batch.sizes[:2] == (16, 4) and batch.log_q is not None
    recipe.data["path"] = "nowhere"
    with pytest.raises(DataError, match=r"data: there is no folder or archive nowhere"):
        builder.data(recipe)
