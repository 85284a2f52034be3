"""Checks of a data set when it is opened."""

import io
import zipfile

import jax
import numpy as np
import pytest

from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ConfigError, DataUnavailable, UserError
from distill_jax.data import checks, moments, npz_file, shared_examples, source, synthetic
from distill_jax.data.labels import as_labels
from distill_jax.data.source import ArraySource, Subset, make_array_source


def images(n=24, shape=(8, 8, 3), dtype=np.uint8, top=256, seed=0):
    found = np.random.default_rng(seed).integers(0, top, (n, *shape))
    return found.astype(dtype) if dtype == np.uint8 else (found / (top - 1)).astype(dtype)


def part(x, y=None, name="toy"):
    y = np.arange(len(x)) % 4 if y is None else y
    return ArraySource(x, y, Provenance(name, "here", len(x), ""))


def dataset(train, test, held_out=None, classes=("a", "b", "c", "d")):
    held_out = Subset(train, np.zeros(0, int), "none") if held_out is None else held_out
    return Dataset(train, held_out, test, classes)


def floats(seed=0):
    return images(dtype=np.float32, seed=seed)


# Values.


@pytest.mark.parametrize("where", ["train", "held_out", "test"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted_and_the_first_is_named(where, value):
    whole, other = floats(), floats(1)
    bad = whole if where != "test" else other
    bad[17, 3, 3, 1] = bad[19, 0, 0, 0] = value
    if where == "train":
        whole = part(whole)
        train, held = Subset(whole, np.arange(10, 24), "t"), Subset(whole, np.arange(10), "h")
    else:
        whole = part(whole)
        train, held = Subset(whole, np.arange(10), "t"), Subset(whole, np.arange(10, 24), "h")
    n = 24 if where == "test" else 14
    with pytest.raises(DataUnavailable) as error:
        checks.open_dataset(dataset(train, part(other), held))
    assert f"2 of {n} examples of the {where} part" in error.value.what
    assert "the first is example 17" in error.value.what and error.value.where == "here"


def test_values_beyond_float32_are_not_finite():
    x = floats().astype(np.float64)
    largest = float(np.finfo(np.float32).max)
    x[3, 0, 0, 0], x[5, 0, 0, 0] = largest, -10 * largest
    with pytest.raises(DataUnavailable, match=r"1 of 24 examples .* the first is example 5"):
        checks.open_dataset(dataset(part(x), part(floats(1).astype(np.float64))))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.array(["a", "b"] * 12, object)[:, None], "object"),
        (np.ones((24, 2), np.complex64), "complex64"),
        (np.array([["a", "b"]] * 24), "<U1"),
        (np.ones((24, 2), ">f4"), "byte order"),
        (np.ones(24, np.float32), r"x\[:, None\]"),
        (np.ones((24, 0), np.float32), "without a value"),
    ],
    ids=["objects", "complex", "text", "big-endian", "no axis", "empty"],
)
def test_inputs_that_no_device_array_is_made_of_are_refused(bad, says):
    with pytest.raises(DataUnavailable, match=says) as error:
        checks.open_dataset(dataset(part(bad), part(bad)))
    assert error.value.where == "here" and error.value.what.startswith("train: input is ")


@pytest.mark.parametrize(
    ("dtype", "value", "fits"),
    [
        (np.float64, 1e300, False),
        (np.float64, -1e39, False),
        (np.float64, 3e38, True),
        (np.int64, 2**31, False),
        (np.int64, -(2**31), True),
        (np.uint64, 2**32, False),
        (np.uint64, 2**32 - 1, True),
        (np.float16, 65504, True),
    ],
)
@pytest.mark.parametrize("scanned", [True, False])
def test_values_that_change_on_the_way_to_a_device_are_refused(
    dtype, value, fits, scanned, monkeypatch
):
    x = np.ones((24, 2), dtype)
    x[17, 1] = value
    if not scanned:
        monkeypatch.setattr(checks, "SCANNED_BYTES", 0)
        monkeypatch.setattr(checks, "SAMPLE", 2)
    found = dataset(part(x), part(np.ones((24, 2), dtype)))

    def read():
        opened, _ = checks.open_dataset(found)
        return opened.train.read(np.arange(24))["input"]

    if fits:
        np.testing.assert_array_equal(read(), x)
        return
    with pytest.raises(
        DataUnavailable, match=r"1 of 24 .* that \w+32 does not .* example 17 of toy"
    ):
        read()


def test_float64_is_kept_where_the_precision_says_so():
    x = np.full((24, 2), 1e100)
    with jax.enable_x64(True):
        _, report = checks.open_dataset(dataset(part(x), part(x)))
    assert report.values.high == 1e100


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones((3, 4)))


def huge_header(path):
    """An archive whose array claims 582 TiB."""
    header = io.BytesIO()
    shape = (10**13, 8, 8)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w") as archive:
        for key in npz_file.KEYS:
            archive.writestr(f"{key}.npy", header.getvalue() + b"0" * 64)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no archive"),
        lambda path: one_array(path),
        huge_header,
    ],
    ids=["empty", "text", "one array", "huge header"],
)
def test_files_of_another_format_are_named(tmp_path, write):
    path = tmp_path / "data.npz"
    write(path)
    with pytest.raises(DataUnavailable) as error:
        npz_file.make(path=str(path))
    assert error.value.where == str(path)
    assert "x_train, y_train, x_test, y_test" in error.value.hint


def test_values_of_tables_are_looked_at_and_unused_examples_are_not():
    table = {"categorical": np.zeros((6, 2), np.int32), "numeric": np.ones((6, 3), np.float32)}
    table["numeric"][4, 1] = np.nan
    whole, fine = part(table["numeric"]), np.array([0, 1, 2, 3, 5])
    whole = ArraySource(table, np.arange(6) % 2, Provenance("t", "", 6, ""))
    with pytest.raises(DataUnavailable, match=r"1 of 6 examples of the train part.*example 4"):
        checks.open_dataset(dataset(whole, whole, classes=("a", "b")))
    used = Subset(whole, fine, "finite")
    _, report = checks.open_dataset(dataset(used, used, classes=("a", "b")))
    assert report.warnings == () and report.scanned and report.values is None


def test_large_data_are_sampled_and_then_checked_as_they_are_read(monkeypatch):
    x = floats()
    x[11, 0, 0, 0] = np.nan
    monkeypatch.setattr(checks, "SCANNED_BYTES", 100)
    monkeypatch.setattr(checks, "SAMPLE", 2)  # the first and the last
    opened, report = checks.open_dataset(dataset(part(x), part(floats(1))))
    assert not report.scanned and len(opened.train) == 24
    np.testing.assert_array_equal(opened.train.read(np.array([10]))["input"], x[[10]])
    np.testing.assert_array_equal(source.example_ids(opened.train), np.arange(24))
    np.testing.assert_array_equal(source.example_labels(opened.train), np.arange(24) % 4)
    with pytest.raises(DataUnavailable, match=r"1 of 3 examples of the train part.*example 11 of"):
        opened.train.read(np.array([3, 11, 4]))
    x[23, 0, 0, 0] = np.inf
    with pytest.raises(DataUnavailable, match=r"1 of 2 examples of the train part.*example 23 of"):
        checks.open_dataset(dataset(part(x), part(floats(1))))


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (images(shape=(8, 9, 3)), r"\[8, 9, 3\], those of the training part \[8, 8, 3\]"),
        (255 * floats(1), "test part is float32.*training part uint8"),
        (floats(1), "test part is float32, with values from 0 to 1"),
    ],
)
def test_parts_have_one_shape_and_type(test, message):
    with pytest.raises(DataUnavailable, match=message):
        checks.open_dataset(dataset(part(images()), part(test)))


def test_parts_are_in_the_same_units():
    with pytest.raises(DataUnavailable, match=r"test part are 0 to 255, .* training part 0 to 1"):
        checks.open_dataset(dataset(part(floats()), part(255 * floats(1))))
    rows = np.random.default_rng(0).normal(size=(24, 5))
    _, report = checks.open_dataset(dataset(part(rows), part(100 * rows)))
    assert "are they in the same units?" in report.warnings[0] and len(report.warnings) == 1
    assert checks.open_dataset(dataset(part(rows), part(3 * rows)))[1].warnings == ()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_channels_first_is_refused_with_the_transposition_that_is_right(dtype):
    x = images(shape=(3, 16, 16), dtype=dtype)
    with pytest.raises(DataUnavailable, match="channels on axis 1") as error:
        make_array_source(x, np.arange(24) % 4, name="x", origin="here")
    assert "np.transpose(x, (0, 2, 3, 1)) makes them [24, 16, 16, 3]" in error.value.hint
    with pytest.raises(DataUnavailable, match="channels on axis 1"):  # whoever made it
        checks.open_dataset(dataset(part(x), part(x)))
    made = make_array_source(x, np.arange(24) % 4, name="x", origin="here", layout="chw")
    np.testing.assert_array_equal(made.read(np.array([5]))["input"][0], x[5].transpose(1, 2, 0))
    with pytest.raises(DataUnavailable, match="channels on axis 2"):  # it was right before
        make_array_source(
            x.transpose(0, 2, 3, 1), np.arange(24) % 4, name="x", origin="here", layout="chw"
        )
    with pytest.raises(ConfigError, match="did you mean 'chw'"):
        make_array_source(x, np.arange(24) % 4, name="x", origin="here", layout="nchw")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((9, 28, 28, 1), np.uint8),
        ((9, 3, 3, 3), np.uint8),
        ((9, 1, 40, 1), np.float32),
        ((9, 3, 7, 12), np.float32),
        ((9, 32, 32, 13), np.uint8),
        ((9, 3, 32), np.float32),
    ],
)
def test_plausible_layouts_pass(shape, dtype):
    checks.check_layout(shape, dtype, name="x", where="here")


# Labels and classes.


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64, np.float32, np.float64])
def test_whole_numbers_are_labels(dtype):
    found = as_labels(np.array([0, 3, 1], dtype))
    assert found.dtype == np.int32 and found.tolist() == [0, 3, 1]
    assert as_labels(np.array([True, False])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 2**32 + 1]), "reach 4294967297"),
        (np.array([0, 2**63], np.uint64), "reach 9223372036854775808"),
        (np.array([0.0, 1.5]), "1.5 at position 1 is no whole number"),
        (np.array([0.0, np.nan]), "nan at position 1"),
        (np.array(["cat", "dog"]), r"names, labels = np.unique"),
        (np.eye(3), r"argmax\(1\)"),
        (np.zeros((3, 1), int), r"labels\[:, 0\]"),
    ],
)
def test_other_labels_are_refused(labels, message):
    with pytest.raises(DataUnavailable, match=message):
        as_labels(labels, name="train")
    made = lambda: ArraySource(  # noqa: E731
        np.zeros((len(labels), 2)), labels, Provenance("x", "", len(labels), "")
    )
    if labels.dtype == np.float64 and labels.ndim == 2:  # a source takes them as soft labels
        assert made().labels.tolist() == [0, 1, 2]
        return
    with pytest.raises(UserError):  # by every way in
        made()


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([1, 2, 3, 4], [1], "there is no class 0"),
        ([0, 2_000_000_000], [0], "2 different labels reach from 0 to 2000000000"),
        ([0, 7, 90], [0], "number them from 0"),
        ([0, 1, 2], [0, 3, 5], "test part that no training example has: 3, 5"),
    ],
)
def test_labels_without_names_count_from_zero(train, test, message):
    train, test = (part(images(len(y)), np.array(y)) for y in (train, test))
    with pytest.raises(DataUnavailable, match=message):
        source.make_dataset(train, test, held_out=0.0, split_seed=0)


def test_names_make_other_labels_right_and_absent_classes_are_told():
    train, test = (part(images(len(y)), np.array(y)) for y in ([1, 2, 4], [0, 1]))
    names = ("background", "cat", "dog", "emu", "fox")
    made = source.make_dataset(train, test, held_out=0.0, split_seed=0, classes=names)
    opened, report = checks.open_dataset(made)
    assert opened.classes == names
    told = (
        "data: classes without a training example: background, emu, though the test part has some"
    )
    assert report.warnings == (told,)
    with pytest.raises(DataUnavailable, match="label 4, and there are 3 classes: a, b, c"):
        checks.open_dataset(dataset(train, test, classes=("a", "b", "c")))


def test_hidden_labels_name_no_class():
    shown = np.array([0, 2, 2, 0, 0], np.float32)
    facts = Provenance("toy", "here", 5, "")
    labels = (np.array([0, 1, 2, y, 0]) for y in (0, 3))
    parts = (ArraySource(images(5), y, facts, more={"labelled": shown}) for y in labels)
    made = dataset(*parts, classes=("cat", "dog", "emu", "fox"))
    told = "data: classes without a labelled training example: cat, fox"
    assert checks.open_dataset(made)[1].warnings == (told,)


def test_a_gap_without_names_is_told():
    train = part(images(3), np.array([0, 1, 3]))
    made = source.make_dataset(train, train, held_out=0.0, split_seed=0)
    assert made.classes == ("0", "1", "2", "3")
    assert checks.open_dataset(made)[1].warnings == ("data: classes without a training example: 2",)


@pytest.mark.parametrize(
    ("given", "names"),
    [("cat,dog, emu", ("cat", "dog", "emu")), (["a", "b"], ("a", "b")), ("", ()), ((), ())],
)
def test_names_in_a_string_are_split_at_commas(given, names):
    assert checks.class_names(given) == names


@pytest.mark.parametrize("given", ["cat", "cat,,dog", "cat,dog,cat", ("a", "a")])
def test_other_names_are_refused(given):
    with pytest.raises(ConfigError, match=r"^classes: "):
        checks.class_names(given)


# What is no data set.


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"x": 1}, "returned a dict"),
        (Dataset(np.zeros(3), part(images()), part(images()), ()), "train part is a ndarray"),
        (dataset(part(images()), part(images(seed=1)), classes="abcd"), "classes are the string"),
        (dataset(Subset(part(images()), np.zeros(0, int), ""), part(images())), "part is empty"),
    ],
)
def test_what_is_no_data_set_is_refused(made, message):
    with pytest.raises(ConfigError, match=message):
        checks.open_dataset(made)


# Files.


def save(path, names):
    arrays = {"x": images(), "y": np.arange(24) % 4}
    np.savez(path, **{name: arrays[name[0]] for name in names})
    return path


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("x", "y"), "holds x, y; the names are x_train, y_train, x_test, y_test"),
        (("x_train", "y_train", "x_test"), "no y_test\n"),
        (("x_train", "ytrain"), "it holds x_train, ytrain"),
        ((), "it holds no array"),
    ],
)
def test_a_missing_array_is_told_with_what_the_file_has(names, message, tmp_path):
    with pytest.raises(DataUnavailable, match=message):
        npz_file.make(path=str(save(tmp_path / "set.npz", names)))


def test_one_array_is_no_data_set(tmp_path):
    np.save(tmp_path / "x_train.npy", images())
    with pytest.raises(DataUnavailable, match="is one array, and four are read") as error:
        npz_file.make(path=str(tmp_path / "x_train.npy"))
    assert "folder" in error.value.hint
    (tmp_path / "x_train.npy").rename(tmp_path / "set.npz")
    with pytest.raises(DataUnavailable, match="is one array, and four are read"):
        npz_file.make(path=str(tmp_path / "set.npz"))


def test_an_array_that_no_memory_holds_is_named_by_its_file(tmp_path, monkeypatch):
    def load(path, **kwargs):
        raise MemoryError("Unable to allocate 582. TiB")

    save(tmp_path / "set.npz", npz_file.KEYS)
    monkeypatch.setattr(npz_file.np, "load", load)
    with pytest.raises(DataUnavailable, match="582") as error:
        npz_file.make(path=str(tmp_path / "set.npz"))
    assert error.value.where.endswith("set.npz")


def test_files_of_channels_first_are_read_as_such(tmp_path):
    x, y = images(shape=(3, 16, 16)), np.arange(24) % 4
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(DataUnavailable, match="layout=chw"):
        npz_file.make(path=str(tmp_path / "set.npz"))
    made = npz_file.make(path=str(tmp_path / "set.npz"), layout="chw", classes="a,b,c,d")
    np.testing.assert_array_equal(made.test.read(np.arange(24))["input"], np.moveaxis(x, 1, -1))
    assert made.classes == ("a", "b", "c", "d")


# Parts in common.


def test_examples_in_two_parts_are_counted():
    x, other = images(), images(seed=1)
    made = dataset(part(x), part(np.concatenate([x[:5], other])), part(other))
    assert shared_examples.overlaps(made) == {"held_out": (0, 24, True), "test": (5, 29, True)}
    spelt = shared_examples.overlaps(made)["test"].spell("test")
    assert "5 of 29 examples of the test part" in spelt


def test_a_copy_of_large_data_is_found_at_equal_positions(monkeypatch):
    monkeypatch.setattr(shared_examples, "LOOKED_AT_BYTES", 100)
    train = part(images(100))
    copied = dataset(train, part(images(100)))
    assert shared_examples.overlaps(copied) == {"test": (64, 64, False)}
    assert "looks like a copy" in shared_examples.overlaps(copied)["test"].spell("test")
    assert shared_examples.overlaps(dataset(train, part(images(100, seed=1))))["test"].repeated == 0


# Selection.


@pytest.mark.parametrize(
    ("n", "measurements", "told"),
    [(15, 2, True), (24, 2, False), (50, 10, True), (300, 10, False), (5, 1, False), (0, 9, False)],
)
def test_too_few_examples_to_select_by_are_told_with_their_standard_error(n, measurements, told):
    line = moments.small_part(n, "held_out/accuracy", measurements=measurements)
    assert bool(line) is told
    if told:
        assert f"standard error of up to {0.5 / np.sqrt(n):.3f}" in line


def test_shipped_data_pass_without_a_warning():
    opened, report = checks.open_dataset(synthetic.make(n_train=64, n_test=16))
    assert report.warnings == () and report.values is not None
    assert report.values.kind == "bytes" and len(opened.held_out) > 0
