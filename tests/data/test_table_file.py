"""Tables in files: formats, types of columns, splits, tasks."""

import gzip
import json

import numpy as np
import pytest

from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.data import checks, table_file
from tests.data import files

PARTS = ("train", "held_out", "test")
ROWS = [{"age": i, "job": "abc"[i % 3], "pay": "yes" if i % 2 else "no"} for i in range(40)]


def everything(dataset):
    parts = [p.read(np.arange(len(p))) for p in dataset[:3]]
    return [{**part["input"], "label": part["label"]} for part in parts]


def written(folder, kind):
    path = folder / f"t{kind}"
    if kind.startswith((".csv", ".tsv")):
        sign = "\t" if ".tsv" in kind else ","
        text = "\n".join([sign.join(ROWS[0]), *(sign.join(map(str, r.values())) for r in ROWS)])
    elif kind.startswith(".jsonl"):
        text = "\n".join(map(json.dumps, ROWS))
    else:
        import pyarrow.parquet

        columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
        pyarrow.parquet.write_table(files.arrow_table(columns), path)
        return path
    data = text.encode()
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("kind", [".csv", ".csv.gz", ".tsv", ".jsonl", ".jsonl.gz", ".parquet"])
def test_formats_hold_the_same_table(tmp_path, kind):
    dataset = table_file.make(path=str(written(tmp_path, kind)), label="pay")
    wanted = table_file.make(path=str(written(tmp_path, ".csv")), label="pay")
    assert dataset.classes == ("no", "yes") and dataset.cardinalities == (4,)
    for a, b in zip(everything(dataset), everything(wanted), strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    numeric = np.concatenate([p["numeric"] for p in everything(dataset)[:2]])
    assert abs(numeric.mean()) < 1e-6 and abs(numeric.std() - 1) < 1e-5
    _, report = checks.open_dataset(dataset)
    assert report.warnings == ()


def test_categories_and_scales_are_those_of_the_training_part(tmp_path):
    def row(i):
        job, part = ("z", "test") if i >= 30 else ("ab"[i % 2], "train")
        return f"{i},{job},{i % 2},{part}"

    path = files.csv_file(tmp_path / "t.csv", header="age,job,y,part", row=row)
    dataset = table_file.make(path=str(path), label="y", split_column="part", held_out=0.0)
    train, _, test = everything(dataset)
    assert dataset.cardinalities == (3,) and set(train["categorical"].ravel()) == {1, 2}
    assert set(test["categorical"].ravel()) == {0}
    mean, std = np.arange(30).mean(), np.arange(30).std()
    np.testing.assert_allclose(test["numeric"][:, 0], (np.arange(30, 40) - mean) / std, rtol=1e-5)


def test_missing_cells(tmp_path):
    row = lambda i: f"{'' if i == 3 else i},{'NA' if i == 4 else 'ab'[i % 2]},{i % 2},{i > 29}"  # noqa: E731
    path = files.csv_file(tmp_path / "t.csv", header="age,job,y,late", row=row)
    make = lambda **kwargs: table_file.make(  # noqa: E731
        path=str(path), label="y", drop="late", held_out=0.0, **kwargs
    )
    rows = [
        (a, c)
        for part in everything(make())
        for a, c in zip(part["numeric"][:, 0], part["categorical"][:, 0], strict=True)
    ]
    assert sum(a == 0 for a, _ in rows) == 1 and sum(c == 0 for _, c in rows) == 1
    assert make(missing=("",)).cardinalities[0] in (3, 4)  # NA is then a category


def test_columns_are_chosen_and_typed(tmp_path):
    path = str(
        files.csv_file(
            tmp_path / "t.csv",
            n=60,
            header="zip,job,y",
            row=lambda i: f"{i % 5},{'ab'[i % 2]},{i % 2}",
        )
    )
    auto = table_file.make(path=path, test_path=path, label="y")
    assert auto.cardinalities == (3,) and everything(auto)[0]["numeric"].shape[1] == 1
    typed = table_file.make(path=path, test_path=path, label="y", categorical="zip")
    assert typed.cardinalities == (6, 3)
    one = table_file.make(path=path, test_path=path, label="y", features=("zip",))
    assert one.cardinalities == () and everything(one)[0]["categorical"].shape[1] == 0
    same = table_file.make(path=path, test_path=path, label="y", drop=["job"])
    assert same.train.provenance == one.train.provenance != auto.train.provenance


def test_splits_by_a_hash_keep_rows_of_one_id_together(tmp_path):
    row = lambda i: f"{i // 4},{i},{i % 2}"  # noqa: E731
    path = files.csv_file(tmp_path / "t.csv", n=200, header="who,x,y", row=row)
    make = lambda: table_file.make(  # noqa: E731
        path=str(path), label="y", id_column="who", features="x", categorical="x"
    )
    dataset = make()
    sizes = [len(part) for part in dataset[:3]]
    assert all(size and size % 4 == 0 for size in sizes)
    files.csv_file(path, n=240, header="who,x,y", row=row)
    assert all(b >= a for a, b in zip(sizes, [len(p) for p in make()[:3]], strict=True))


def test_files_of_splits(tmp_path):
    for name, start in (
        ("train-0.csv", 0),
        ("train-1.csv", 40),
        ("val.csv", 80),
        ("test.csv", 120),
    ):
        files.csv_file(
            tmp_path / name, row=lambda i, s=start: f"{i + s},a,{'yes' if i % 2 else 'no'}"
        )
    dataset = table_file.make(path=str(tmp_path), label="pay")
    assert [len(part) for part in dataset[:3]] == [80, 40, 40]
    pair = table_file.make(
        path=str(tmp_path / "train-0.csv"), test_path=str(tmp_path / "test.csv"), label="pay"
    )
    assert [len(part) for part in pair[:3]] == [36, 4, 40]


@pytest.mark.parametrize(
    ("task", "label", "classes"),
    [
        ("multilabel", "rain,wind", ("rain", "wind")),
        ("regression", ("depth",), ("depth",)),
        ("regression", "depth,rain", ("depth", "rain")),
    ],
)
def test_tasks(tmp_path, task, label, classes):
    row = lambda i: f"{i},{i % 2},{'true' if i % 3 else 'false'},{i / 7}"  # noqa: E731
    if task == "regression":
        row = lambda i: f"{i},{i % 2},0,{i / 7}"  # noqa: E731
    path = files.csv_file(tmp_path / "t.csv", header="x,rain,wind,depth", row=row)
    dataset = table_file.make(path=str(path), label=label, task=task, features="x")
    assert dataset.task == task and dataset.classes == classes
    labels = everything(dataset)[0]["label"]
    assert labels.dtype == np.float32 and labels.shape[1] == len(classes)
    checks.open_dataset(dataset)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_unknown_labels(tmp_path, task):
    row = lambda i: f"{i},{'' if i % 4 == 0 else i % 3}"  # noqa: E731
    path = str(files.csv_file(tmp_path / "t.csv", header="x,y", row=row))
    with pytest.raises(DataUnavailable, match="as in 9 more rows"):
        table_file.make(path=path, label="y", task=task)
    dataset = table_file.make(path=path, label="y", task=task, unknown_labels=True)
    rows = [part.read(np.arange(len(part))) for part in dataset[:3]]
    assert sum(int((part["labelled"] == 0).sum()) for part in rows) == 10
    assert all((part["label"][part["labelled"] == 0] == 0).all() for part in rows)


def test_an_empty_column_is_left_out_with_a_warning(tmp_path):
    path = files.csv_file(tmp_path / "t.csv", header="x,gone,y", row=lambda i: f"{i},,{i % 2}")
    dataset, report = checks.open_dataset(table_file.make(path=str(path), label="y"))
    assert dataset.cardinalities == () and "'gone' is left out" in report.warnings[0]


@pytest.mark.parametrize(
    ("kwargs", "where"),
    [
        ({"label": "wage"}, "label"),
        ({"label": ""}, "label"),
        ({"label": "pay", "drop": "jobb"}, "drop"),
        ({"label": "pay", "features": "pay"}, "features"),
        ({"label": "pay", "numeric": "job"}, "numeric"),
        ({"label": "pay", "drop": "age,job"}, "features"),
        ({"label": "pay", "split_column": "part"}, "split_column"),
        ({"label": "pay", "id_column": "id"}, "id_column"),
        ({"label": "pay", "test_fraction": 0.0}, "test_fraction"),
        ({"label": "pay", "classes": "no,maybe"}, "classes"),
    ],
)
def test_arguments_are_checked(tmp_path, kwargs, where):
    path = files.csv_file(tmp_path / "t.csv")
    with pytest.raises(ArgumentError) as error:
        table_file.make(path=str(path), **kwargs)
    assert error.value.where == where


SOFT = "age,cat,dog,wolf"


def test_several_columns_of_classes_are_soft_labels(tmp_path):
    row = lambda i: f"{i},{i / 100},{0.5 - i / 100},0.5"  # noqa: E731
    path = files.csv_file(tmp_path / "t.csv", header=SOFT, row=row)
    dataset, _ = checks.open_dataset(table_file.make(path=str(path), label="cat,dog,wolf"))
    assert dataset.classes == ("cat", "dog", "wolf") and dataset.task == "classification"
    for part in dataset.parts.values():
        rows = part.read(np.arange(len(part)))
        np.testing.assert_allclose(rows["label_probs"].sum(1), 1, rtol=1e-6)
        np.testing.assert_array_equal(rows["label"], rows["label_probs"].argmax(1))
        np.testing.assert_allclose(rows["label_probs"][:, 2], 0.5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (lambda i: f"{i},0.5,0.4,0.2", "no distribution: it sums to 1.1"),
        (lambda i: f"{i},1.5,-0.5,0", "no distribution"),
        (lambda i: f"{i},yes,0,0", "or the probability of each class"),
        (lambda i: f"{i},1,0,{'' if i == 3 else 0}", "no label in 'wolf'"),
    ],
)
def test_soft_labels_that_are_none_are_refused(tmp_path, row, message):
    path = files.csv_file(tmp_path / "t.csv", header=SOFT, row=row)
    with pytest.raises(DataUnavailable) as error:
        table_file.make(path=str(path), label="cat,dog,wolf", unknown_labels=True)
    assert message in str(error.value)
