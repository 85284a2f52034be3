"""Folders of Hugging Face `datasets`, as version 5.2 writes them, read without it."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.data import checks, hf_folder
from tests.data import files

NAMES = ["ape", "bee", "cat"]
LABEL = {"names": NAMES, "_type": "ClassLabel"}
FEATURES = {"image": {"_type": "Image"}, "label": LABEL, "text": {"dtype": "string"}}


def png(seed):
    file = io.BytesIO()
    Image.fromarray(files.picture(seed)).save(file, "PNG")
    return file.getvalue()


def images(start, n):
    columns = {
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(start, start + n)],
        "label": [i % 3 for i in range(n)],
        "text": [f"row {i}" for i in range(n)],
    }
    return files.arrow_table(columns)


def parquet(path, table, features=None):
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    stored = json.dumps({"info": {"features": features or {}}}).encode()
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": stored}), path)


def test_a_folder_of_splits(tmp_path):
    for split, start in (("train", 0), ("validation", 100), ("test", 200)):
        files.saved_to_disk(tmp_path / split, images(start, 12), FEATURES)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    dataset, report = checks.open_dataset(hf_folder.make(path=str(tmp_path)))
    assert dataset.classes == tuple(NAMES) and not report.warnings
    assert [len(part) for part in dataset[:3]] == [12, 12, 12]
    rows = dataset.test.read(np.arange(12))
    np.testing.assert_array_equal(rows["input"], [files.picture(200 + i) for i in range(12)])
    assert rows["label"].tolist() == [i % 3 for i in range(12)]
    two = hf_folder.make(path=str(tmp_path), splits=("train", "test"), held_out=0.2)
    assert [len(part) for part in two[:3]] == [9, 3, 12]
    lazy = hf_folder.make(path=str(tmp_path), resident_bytes=0, size=4)
    assert lazy.held_out.read(np.arange(3))["input"].shape == (3, 4, 4, 3)


def test_one_split_is_divided_by_content(tmp_path):
    files.saved_to_disk(tmp_path / "a", images(0, 60), FEATURES)
    dataset = hf_folder.make(path=str(tmp_path / "a"))
    order = np.random.default_rng(0).permutation(60)
    files.saved_to_disk(tmp_path / "b", images(0, 60).take(order), FEATURES)
    other = hf_folder.make(path=str(tmp_path / "b"))
    pixels = [
        {x.tobytes() for x in d.test.read(np.arange(len(d.test)))["input"]}
        for d in (dataset, other)
    ]
    assert pixels[0] == pixels[1] and len(pixels[0]) == len(dataset.test) > 0


@pytest.mark.parametrize("folder", ["", "data"])
def test_shards_of_parquet(tmp_path, folder):
    for i in range(2):
        path = tmp_path / folder / f"train-{i:05d}-of-00002.parquet"
        parquet(path, images(20 * i, 20), FEATURES)
    parquet(tmp_path / folder / "test-00000-of-00001.parquet", images(90, 9), FEATURES)
    (tmp_path / "README.md").write_text("---\n---\n")
    dataset = hf_folder.make(path=str(tmp_path), held_out=0.0)
    assert dataset.classes == tuple(NAMES)
    assert [len(part) for part in dataset[:3]] == [40, 0, 9]


def test_arrays_are_images(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (60, 4, 4))
    table = files.arrow_table({"x": values.tolist(), "label": [i % 3 for i in range(60)]})
    features = {"x": {"shape": [4, 4], "dtype": "uint8", "_type": "Array2D"}, "label": LABEL}
    files.saved_to_disk(tmp_path, table, features)
    dataset = hf_folder.make(path=str(tmp_path), held_out=0.0)
    rows = dataset.train.read(np.arange(len(dataset.train)))["input"]
    assert rows.dtype == np.uint8 and rows.shape[1:] == (4, 4, 1)
    assert {x.tobytes() for x in rows} < {x.astype(np.uint8).tobytes() for x in values}


def test_columns_are_a_table(tmp_path):
    columns = {"age": list(range(60)), "job": ["abc"[i % 3] for i in range(60)]}
    table = files.arrow_table({**columns, "label": [i % 2 for i in range(60)]})
    files.saved_to_disk(tmp_path, table, {"label": {**LABEL, "names": ["no", "yes"]}})
    dataset = hf_folder.make(path=str(tmp_path))
    assert dataset.classes == ("no", "yes") and dataset.cardinalities == (4,)
    values = hf_folder.make(path=str(tmp_path), label="age", task="regression")
    assert values.classes == ("age",) and values.task == "regression"


def test_nothing_of_datasets_is_imported(tmp_path):
    files.saved_to_disk(tmp_path, images(0, 60), FEATURES)
    hf_folder.make(path=str(tmp_path))
    assert "datasets" not in sys.modules


def test_types_of_columns_that_would_be_unpickled_are_not(tmp_path):
    """CVE-2023-47248: older versions of pyarrow unpickle a type that the schema names."""
    import pyarrow as pa

    gone = tmp_path / "gone"
    code = f"cposix\nsystem\n(S'touch {gone}'\ntR.".encode()
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": code,
    }
    field = pa.field("x", pa.int64(), metadata=extension)
    schema = pa.schema([field, pa.field("label", pa.int64())])
    table = pa.Table.from_arrays([pa.array(range(60)), pa.array([0, 1] * 30)], schema=schema)
    files.saved_to_disk(tmp_path / "d", table)
    with contextlib.suppress(DataUnavailable):
        hf_folder.make(path=str(tmp_path / "d"))
    assert not gone.exists()


def spoil(folder, what):
    if what == "escape":
        (folder / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    if what == "indices":
        (folder / "state.json").write_text('{"_data_files": [1], "_indices_files": [2]}')
    if what == "state":
        (folder / "state.json").write_text("[" * 100_000)
    if what == "files":
        (folder / "state.json").write_text('{"_data_files": []}')
    if what == "absent":
        (folder / "data-00000-of-00001.arrow").unlink()
    if what == "cut":
        data = (folder / "data-00000-of-00001.arrow").read_bytes()
        (folder / "data-00000-of-00001.arrow").write_bytes(data[: len(data) // 2])
    if what == "no":
        (folder / "state.json").unlink()
    if what == "unlabelled":
        table = files.arrow_table({"image": [{"bytes": png(0)}] * 3, "label": [0, 1, -1]})
        files.saved_to_disk(folder, table, FEATURES)
    if what == "paths":
        rows = [{"bytes": None, "path": "/etc/passwd"}] * 3
        table = files.arrow_table({"image": rows, "label": [0, 1, 2]})
        import pyarrow as pa

        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = table.set_column(0, "image", table.column(0).cast(kind))
        files.saved_to_disk(folder, table, FEATURES)
    if what == "ragged":
        table = files.arrow_table(
            {"x": [[i] * (1 + i % 2) for i in range(60)], "label": [0, 1, 2] * 20}
        )
        features = {"x": {"_type": "Array2D"}, "label": LABEL}
        files.saved_to_disk(folder, table, features)
    if what == "rows":
        files.saved_to_disk(folder, images(0, 0), FEATURES)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("escape", r"names the file '../x.arrow'"),
        ("indices", "selected by indices"),
        ("state", "cannot be read"),
        ("files", "names no files"),
        ("absent", "folder is incomplete"),
        ("cut", "cannot be read"),
        ("no", "holds no data set"),
        ("unlabelled", "the label is -1, and there are 3 classes"),
        ("paths", "no image in the files"),
        ("ragged", "of one shape"),
        ("rows", "no rows"),
    ],
)
def test_wrong_folders(tmp_path, what, message):
    files.saved_to_disk(tmp_path, images(0, 30), FEATURES)
    spoil(tmp_path, what)
    with pytest.raises(DataUnavailable, match=message):
        hf_folder.make(path=str(tmp_path))


@pytest.mark.parametrize(
    ("kwargs", "where"),
    [({"label": "lable"}, "label"), ({"image": "img"}, "image"), ({"splits": "tset"}, "splits")],
)
def test_arguments_are_checked(tmp_path, kwargs, where):
    files.saved_to_disk(tmp_path, images(0, 9), FEATURES)
    with pytest.raises(ArgumentError) as error:
        hf_folder.make(path=str(tmp_path), **kwargs)
    assert error.value.where == where
