"""Each format gives the same table; each mistake gives one message with file, place and remedy."""

import gzip
import json
import sys
from types import SimpleNamespace

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from distill.data.tables import read_table
from distill.errors import DataError

ROWS = [{"_id": "007", "text": 'say "a", b', "score": 1.5}, {"_id": "8", "text": "é\u4e2d", "score": -2.0}]


def write(folder, name):
    path, frame = folder / name, pd.DataFrame(ROWS)
    if "parquet" in name:
        frame.to_parquet(path)
        return path
    text = {
        ".jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
        ".json": json.dumps(ROWS, indent=1),
        ".csv": frame.to_csv(index=False),
        ".tsv": "_id\ttext\tscore\n" + "".join(f"{r['_id']}\t{r['text']}\t{r['score']}\n" for r in ROWS),
    }["." + name.split(".")[1]]
    opened = gzip.open if name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


NAMES = [
    "a.parquet",
    "a.jsonl",
    "a.json",
    "a.csv",
    "a.tsv",
    "a.jsonl.gz",
    "a.json.gz",
    "a.csv.gz",
    "a.tsv.gz",
]


def assert_is_rows(table, times=1):
    assert table.ids("_id") == ["007", "8"] * times
    assert table.texts("text") == [row["text"] for row in ROWS] * times
    assert table.numbers("score") == [1.5, -2.0] * times


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_table(tmp_path, name):
    assert_is_rows(read_table(write(tmp_path, name)))


def test_a_folder_and_a_list_are_read_one_below_the_other(tmp_path):
    for name in ("a.jsonl", "a.csv"):  # numbers in one, text in the other
        write(tmp_path, name)
    (tmp_path / "README.md").write_text("no table")
    assert_is_rows(read_table(tmp_path), times=2)
    assert_is_rows(read_table([str(tmp_path), pd.DataFrame(ROWS)]), times=3)


@pytest.mark.parametrize("make", [pd.DataFrame, datasets.Dataset.from_list, pa.Table.from_pylist])
def test_tables_in_memory(make):
    assert_is_rows(read_table(make(ROWS)))


def test_a_filtered_dataset_gives_the_rows_that_are_left():
    data = datasets.Dataset.from_list(ROWS).select([1])
    assert read_table(data).ids("_id") == ["8"]


def test_columns_are_given_our_names_and_those_of_one_table_go_first(tmp_path):
    path = write(tmp_path, "a.parquet")
    spec = {"path": path, "columns": {"label": "score"}}
    table = read_table(
        spec, {"key": "_id", "label": "lable", "more": None, "title": "title"}, optional={"title"}
    )
    assert table.data.column_names == ["key", "label"]
    assert table.numbers("label") == [1.5, -2.0]


def test_a_long_text_in_csv_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert len(read_table(tmp_path / "a.csv").texts("text")[0]) == 200_000


def test_mixed_ids_are_read_as_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"_id": 1}\n{"_id": "x"}\n')
    assert read_table(tmp_path / "a.jsonl").ids("_id") == ["1", "x"]


def test_whole_floats_are_ids_and_others_are_not():
    assert read_table(pd.DataFrame({"i": [3.0, 4.0]})).ids("i") == ["3", "4"]
    with pytest.raises(DataError, match=r"row 1 .*4\.5 is no id.*whole numbers"):
        read_table(pd.DataFrame({"i": [3.0, 4.5]})).ids("i")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing/folder/a.csv", r"data\.corpus: there is no file or folder .*a\.csv.*owner/name"),
        ("words", r"there is no file or folder words"),
        (7, "a int is no table"),
        ([], "the list of tables is empty"),
        (
            {"path": "a.csv", "colums": {}},
            "given by 'path' and, if need be, 'columns'; here are 'path', 'colums'",
        ),
        ({"columns": {}}, "given by 'path'"),
        ({"path": "a.csv", "columns": {"txt": "x"}}, "no column is called 'txt' here; known: 'text'"),
    ],
)
def test_a_spec_that_is_no_table_is_refused(spec, message):
    with pytest.raises(DataError, match=message):
        read_table(spec, {"text": "text"}, where="data.corpus")


def test_a_missing_column_names_what_there_is_and_the_nearest(tmp_path):
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(
            DataError, match=rf"{name}: there is no column 'txt' \(for 'text'\); it has '_id', 'text'"
        ):
            read_table(write(tmp_path, name), {"text": "txt"})
    with pytest.raises(DataError, match="Did you mean 'text'"):
        read_table(pd.DataFrame(ROWS), {"text": "texts"})


@pytest.mark.parametrize("name", ["a.parquet", "a.csv.gz", "a.json", "a.jsonl"])
def test_a_file_cut_short_is_named(tmp_path, name):
    """Half a file must not pass for a small one."""
    path = write(tmp_path, name)
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 3])
    with pytest.raises(DataError, match=rf"{name}.*cut short; fetch"):
        read_table(path)


def test_a_row_with_a_value_too_many_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match=r"a\.csv, row 1 .*3 values for the 2 columns a, b"):
        read_table(tmp_path / "a.csv")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"unknown format '\.xlsx'; it takes parquet, jsonl"):
        read_table(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match="holds no table"):
        read_table(tmp_path)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        read_table(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match=r"row 0 .*a list, not an object"):
        read_table(tmp_path / "a.jsonl")


def test_errors_count_rows_within_their_file(tmp_path):
    """In a folder of files a row's number alone would point nowhere."""
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": " "}\n')
    with pytest.raises(
        DataError, match=r"b\.jsonl, column 'text', row 1 \(counted from 0\): the text is empty"
    ):
        read_table(tmp_path).texts("text")


@pytest.mark.parametrize(
    "values", [[1.0, float("nan")], [1.0, float("inf")], [1.0, None], ["1", "high"]], ids=str
)
def test_a_number_that_is_none_is_named(values):
    with pytest.raises(DataError, match=r"column 'y', row 1 .* is not a finite number"):
        read_table(pa.table({"y": values})).numbers("y")


def test_bad_texts_and_ids_are_named():
    with pytest.raises(DataError, match=r"row 1.*the text is empty"):
        read_table(pa.table({"t": ["a", None]})).texts("t")
    with pytest.raises(DataError, match="holds int64, not text"):
        read_table(pa.table({"t": [1]})).texts("t")
    with pytest.raises(DataError, match=r"row 1.*the id is missing"):
        read_table(pa.table({"t": ["a", None]})).ids("t")


def test_an_id_twice_names_both_rows():
    with pytest.raises(DataError, match=r"row 2 .*the id 'a' stands there for the second time .*row 0"):
        read_table(pa.table({"_id": ["a", "b", "a"]})).ids("_id", unique=True)


@pytest.fixture
def hub(monkeypatch):
    """The Hub's two calls, answered here; the arguments they got."""
    asked = []
    data = datasets.Dataset.from_list(ROWS)

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        if name == "a/none":
            raise FileNotFoundError("Couldn't find a/none")
        splits = {"corpus": data} if config == "corpus" else {"train": data, "test": data}
        return splits[split] if split else datasets.DatasetDict(splits)

    known = SimpleNamespace(
        load_dataset=load_dataset, get_dataset_config_names=lambda name: ["corpus", "queries"]
    )
    monkeypatch.setitem(sys.modules, "datasets", known)
    return asked


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("BeIR/scifact:corpus", ("BeIR/scifact", "corpus", None)),
        ("BeIR/scifact-qrels:train", ("BeIR/scifact-qrels", None, "train")),
        ("a/b:queries:test", ("a/b", "queries", "test")),
    ],
)
def test_hub_names(hub, spec, asked):
    assert_is_rows(read_table(spec))
    assert hub == [asked]


def test_hub_mistakes_are_told(hub):
    with pytest.raises(DataError, match="has the splits 'train', 'test'; name one, as in a/b:queries:train"):
        read_table("a/b:queries")
    with pytest.raises(
        DataError, match=r"'a/none' is no file or folder here .*no Hub data set.*Couldn't find"
    ):
        read_table("a/none")
