"""Files that cannot be right: one clear message each, before anything is trained."""

import importlib

import numpy as np
import pytest
from PIL import Image

from distill_jax.core.errors import DataUnavailable, UserError
from distill_jax.data import checks
from tests.data import files


def text(content, name="t.csv"):
    def write(root):
        path = root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def rows(make, header="x,y", n=40):
    return text("\n".join([header, *(make(i) for i in range(n))]))


def parquet(columns, types=None):
    def write(root):
        import pyarrow.parquet

        pyarrow.parquet.write_table(files.arrow_table(columns, types), root / "t.parquet")
        return root / "t.parquet"

    return write


def folders(change=None, **kwargs):
    def write(root):
        files.image_folders(root / "d", **kwargs)
        if change:
            change(root / "d")
        return root / "d"

    return write


def empty(root):
    (root / "d").mkdir()
    return root / "d"


def loose(root):
    return files.save(root / "d" / "1.png", files.picture()).parent


def only_in_test(root):
    files.image_folders(root / "d" / "train")
    files.image_folders(root / "d" / "test", classes=("cat", "dog", "emu"))
    return root / "d"


def only_train(root):
    files.image_folders(root / "d" / "train")
    return root / "d"


def twice(root):
    for name in ("train", "val", "dev"):
        files.image_folders(root / "d" / name)
    return root / "d"


def labelled(content):
    def write(root):
        loose(root)
        (root / "d" / "labels.csv").write_text(content)
        return root / "d"

    return write


def control(root):
    (root / "cat").rename(root / "c\nat")


def not_text(root):
    import os

    os.rename(os.fsencode(root / "cat"), os.fsencode(root) + b"/\xff\xfe")


def html(root):
    for path in root.rglob("*.png"):
        path.write_text("<!doctype html>")


def bomb(root):
    Image.new("1", (2**14, 2**13)).save(root / "cat" / "0.png")


IMAGES = {
    "an empty folder": (empty, "no images"),
    "a file": (text("x", "d"), "is not a folder"),
    "images without folders": (loose, "1 images without labels"),
    "one class": (folders(classes=("cat",)), "all 12 images are of the class 'cat'"),
    "a class only in the test part": (only_in_test, "test part alone has the class 'emu'"),
    "no test part": (only_train, "there is a train part alone"),
    "two folders of one part": (twice, "dev and val name the same part"),
    "a line break in a class": (folders(control), r"class 'c\\nat' cannot be shown"),
    "a class that is not UTF-8": (folders(not_text), "cannot be shown"),
    "pages of errors": (folders(html), "is a web page"),
    "a decompression bomb": (folders(bomb), "16384 x 8192 pixels|more than 67108864 pixels"),
    "a class for each image": (
        folders(classes=[str(i) for i in range(40)], n=1),
        "40 different labels in 40 images",
    ),
    "other files": (lambda root: text("x", "a.gif")(root).parent, "no images; it has .gif"),
    "a label of no image": (labelled("file,label\n2.png,a"), "line 2: there is no file '2.png'"),
    "an image outside": (labelled("file,label\n../1.png,a"), "'../1.png' is not below"),
    "an absolute path": (labelled("file,label\n/etc/hosts,a"), "'/etc/hosts' is not below"),
    "an image twice": (labelled("file,label\n1.png,a\n1.png,b"), "line 3: '1.png' has two rows"),
    "no file names": (labelled("name,label\n1.png,a"), "no column 'file'"),
    "no labels": (labelled("file,class\n1.png,a"), "no column 'label'"),
    "a split of another name": (
        labelled("file,label,split\n1.png,a,trian"),
        "'trian' is no split\n.*train",
    ),
}

TABLES = {
    "nothing": (text(""), "is empty"),
    "a header alone": (text("x,y\n"), "no rows"),
    "ragged rows": (text('x,y\n1,a\n2,b,c\n"3\n4",d'), "line 3: 3 columns, the header has 2"),
    "a row after a line break in a cell": (text('x,y\n"3\n4",d\n1\n'), "line 4: 1 columns"),
    "a quote that does not end": (text('x,y\n1,"a\n2,b\n'), "line 3: unexpected end"),
    "text after a quote": (text('x,y\n1,"a"b\n'), "line 2: ',' expected"),
    "a column twice": (text("x,y,x\n1,a,2\n"), "two columns are called 'x'"),
    "a column without a name": (text(",x,y\n1,2,a\n"), "a column has no name\n.*index=False"),
    "another encoding": (text("x,y\n1,ä\n".encode("latin-1")), "cannot be read"),
    "UTF-16": (text("x,y\n1,a\n".encode("utf-16")), "cannot be read"),
    "a null byte": (text("x,y\n1,a\0b\n2,c"), "cannot be shown"),
    "no gzip": (text("x,y\n1,a", "t.csv.gz"), "cannot be read: Not a gzipped file"),
    "another ending": (text("x", "t.xlsx"), "an ending that is not read"),
    "a web page": (text("<!DOCTYPE html>\n<p>404</p>"), "no column 'y'"),
    "a wrong delimiter": (rows(lambda i: f"{i};a", header="x;y"), "no column 'y'"),
    "mixed types": (
        rows(lambda i: f"{'x' if i == 7 else i},{i % 2}"),
        "line 9: x is 'x', and a num",
    ),
    "infinite numbers": (rows(lambda i: f"{'inf' if i == 7 else i},{i % 2}"), "line 9: x is inf"),
    "huge numbers": (rows(lambda i: f"{2**60 + i},{i % 2}"), "line 2: x has more digits"),
    "identifiers as categories": (
        rows(lambda i: f"name {i},{i % 2}", n=300),
        r"'x' has \d+ different values in \d+ training rows",
    ),
    "no label": (rows(lambda i: f"{i},{'' if i == 3 else i % 2}"), "line 5: no label in 'y'"),
    "NaN labels": (rows(lambda i: f"{i},nan"), "line 2: no label in 'y', as in 39 more rows"),
    "numbers as labels": (rows(lambda i: f"{i},{i / 7:.3f}"), "40 different labels in 40 rows"),
    "a million classes": (rows(lambda i: f"{i % 5},{i}", n=3000), "3000 different labels in 3000"),
    "one class": (rows(lambda i: f"{i},a"), "all 40 rows are of the class 'a'"),
    "a label of line breaks": (rows(lambda i: f'{i},"a\n{i % 2}"'), "cannot be shown"),
    "only the label": (rows(lambda i: f"{i % 2}", header="y"), "no column is left"),
    "no JSON": (text('{"x": 1, "y": 0}\n{"x": 1, y}', "t.jsonl"), "line 2: Expecting"),
    "JSON of another kind": (text("[1, 2]\n", "t.jsonl"), "line 1: a list\n.*one JSON object"),
    "a name twice in JSON": (text('{"x": 1, "x": 2}', "t.jsonl"), "two values are called 'x'"),
    "nested JSON": (
        text("\n".join(f'{{"x": {{"a": {i}}}, "y": {i % 2}}}' for i in range(40)), "t.jsonl"),
        "'x' holds a dict in some rows\n.*drop=x",
    ),
    "deep JSON": (text("[" * 100_000, "t.jsonl"), "line 1: "),
    "nested Parquet": (
        parquet({"x": [{"a": i} for i in range(60)], "z": list(range(60)), "y": [0, 1] * 30}),
        "'x' holds values of the Arrow type struct.*\n.*drop=x",
    ),
    "no Parquet": (text("x,y\n1,2", "t.parquet"), "cannot be read"),
    "fractions as labels": (
        parquet({"x": list(range(60)), "y": [0.5, 1.0] * 30}),
        "row 1: the label 'y' is 0.5\n.*regression",
    ),
    "large identifiers": (
        parquet({"x": [2**60 + i for i in range(60)], "y": [0, 1] * 30}),
        "row 1: x has more digits than float64: 1152921504606846976",
    ),
}


def opened(name, path, **kwargs):
    dataset = importlib.import_module(f"distill_jax.data.{name}").make(path=str(path), **kwargs)
    return checks.open_dataset(dataset)


@pytest.mark.parametrize(("write", "message"), IMAGES.values(), ids=IMAGES)
def test_wrong_images(tmp_path, write, message):
    path = write(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        opened("image_folder", path)
    assert str(error.value).count("\n") <= 1


@pytest.mark.parametrize(("write", "message"), TABLES.values(), ids=TABLES)
def test_wrong_tables(tmp_path, write, message):
    path = write(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        opened("table_file", path, label="y")
    assert str(error.value).count("\n") <= 1


# Arrays.


def arrays(x, y=None):
    y = np.arange(len(x)) % 3 if y is None else y
    return {"x_train": x, "y_train": y, "x_test": x, "y_test": y}


CHW = np.zeros((30, 3, 8, 8), np.uint8)
ARRAYS = {
    "channels first": (arrays(CHW), r"channels on axis 1.*\n.*layout=chw"),
    "floats with channels first": (arrays(CHW.astype(np.float32)), "channels on axis 1"),
    "labels from 1": (arrays(CHW.transpose(0, 2, 3, 1), np.arange(30) % 3 + 1), "subtract 1"),
    "negative labels": (arrays(CHW.transpose(0, 2, 3, 1), np.arange(30) % 3 - 1), "count from 0"),
    "16 bits": (arrays(np.zeros((30, 8, 8, 1), np.uint16)), "inputs are uint16"),
}


@pytest.mark.parametrize(("content", "message"), ARRAYS.values(), ids=ARRAYS)
def test_wrong_arrays(tmp_path, content, message):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(DataUnavailable, match=message):
        opened("npz_file", tmp_path / "a.npz")
