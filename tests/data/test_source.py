"""Sources, splits and the data set modules."""

import gzip
import hashlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill_jax.core.api import Provenance, Source
from distill_jax.core.errors import ConfigError, DataUnavailable
from distill_jax.data import (
    digits,
    fashion_mnist,
    fashion_mnist_5k,
    idx_folder,
    npz_file,
    source,
    synthetic,
)

ROOT = Path(source.__file__).parents[2]


def array_source(n=40, k=4):
    inputs = np.arange(n * 6, dtype=np.float32).reshape(n, 6)
    labels = np.arange(n) % k
    return source.ArraySource(inputs, labels, Provenance("toy", "test", n, "00"))


def write_idx(path, array, compress=False):
    header = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


def write_folder(root, compress=False, n=40):
    generator = np.random.default_rng(0)
    arrays = {}
    for part, (images, labels) in idx_folder.FILES.items():
        x = generator.integers(0, 256, (n, 5, 4), np.uint8)
        y = np.arange(n, dtype=np.uint8) % 4
        suffix = ".gz" if compress else ""
        write_idx(root / f"{images}{suffix}", x, compress)
        write_idx(root / f"{labels}{suffix}", y, compress)
        arrays[part] = x, y
    return arrays


def test_sources_satisfy_the_protocol_and_read_what_they_hold():
    toy = array_source()
    part = source.Subset(toy, np.array([7, 3, 30]), "three")
    assert isinstance(toy, Source) and isinstance(part, Source)
    rows = part.read(np.array([2, 0]))
    np.testing.assert_array_equal(rows["input"], toy.inputs[[30, 7]])
    np.testing.assert_array_equal(rows["label"], [30 % 4, 7 % 4])


def test_dict_inputs_are_read_leaf_by_leaf():
    table = {"numeric": np.ones((5, 2), np.float32), "symbol": np.arange(5)}
    rows = source.ArraySource(table, np.arange(5), Provenance("t", "", 5, "")).read(np.array([4]))
    assert rows["input"]["numeric"].shape == (1, 2) and rows["input"]["symbol"].tolist() == [4]


def test_ids_of_nested_subsets_stay_those_of_the_root():
    outer = source.Subset(array_source(), np.arange(10, 40), "outer")
    inner = source.Subset(outer, np.array([5, 0]), "inner")
    assert source.example_ids(inner).tolist() == [15, 10]
    np.testing.assert_array_equal(inner.read(np.array([0]))["input"][0, 0], 15 * 6)
    assert inner.provenance.n == 2 and inner.provenance.name == "toy, outer, inner"


def test_the_digest_of_a_subset_covers_parent_and_indices():
    toy = array_source()
    shas = [
        source.Subset(toy, np.array([1, 2]), "a").provenance.sha256,
        source.Subset(toy, np.array([2, 1]), "a").provenance.sha256,
        source.Subset(array_source(k=3), np.array([1, 2]), "a").provenance.sha256,
    ]
    expected = hashlib.sha256(b"00" + np.array([1, 2], "<i8").tobytes()).hexdigest()
    assert shas[0] == expected == shas[2] and shas[1] != expected


def test_digest_depends_on_names_dtypes_shapes_and_bytes():
    x = np.arange(6, dtype=np.int32)
    trees = [{"a": x}, {"b": x}, {"a": x.reshape(2, 3)}, {"a": x.view(np.uint32)}, {"a": x + 1}]
    assert len({source.checksum(tree) for tree in trees}) == len(trees)
    assert source.checksum({"a": x}) == source.checksum({"a": x.copy()})


def test_the_split_is_disjoint_complete_and_stratified():
    toy = array_source(n=83)
    train, held = source.split_held_out(toy, fraction=0.25, seed=1)
    both = np.concatenate([train.indices, held.indices])
    np.testing.assert_array_equal(np.sort(both), np.arange(83))
    counts, total = np.bincount(held.labels), np.bincount(toy.labels)
    np.testing.assert_array_equal(counts, np.floor(total * 0.25 + 0.5))


def test_the_split_depends_on_its_seed_alone():
    def held(seed):
        return source.split_held_out(array_source(), fraction=0.3, seed=seed)[1].indices.tolist()

    assert held(0) == held(0) != held(1)


def test_nothing_held_out_is_an_empty_source():
    train, held = source.split_held_out(array_source(), fraction=0.0, seed=0)
    assert len(held) == 0 == held.provenance.n and len(train) == 40
    np.testing.assert_array_equal(train.indices, np.arange(40))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 0.001, 0.99])
def test_impossible_fractions_are_refused(fraction):
    with pytest.raises(ConfigError, match="held_out"):
        source.split_held_out(array_source(), fraction=fraction, seed=0)


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (np.zeros((3, 2, 2), np.uint8), np.zeros(2, int), "3 inputs but 2 labels"),
        (np.zeros((3, 2, 2), np.uint8), np.full(3, 0.5), "labels are float64"),
        (np.zeros((3, 2, 2), np.uint8), np.array([0, -1, 0]), "smallest label is -1"),
        (np.zeros((3, 2, 2), np.int64), np.zeros(3, int), "inputs are int64"),
        (np.zeros((0, 2, 2), np.uint8), np.zeros(0, int), "no examples"),
        (np.zeros(3, np.float32), np.zeros(3, int), r"inputs are \[3\]"),
    ],
)
def test_bad_arrays_are_refused(inputs, labels, message):
    with pytest.raises(DataUnavailable, match=message):
        source.make_array_source(inputs, labels, name="x", origin="here")


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_arrays_of_the_other_byte_order_are_the_same_data(dtype):
    x = np.random.RandomState(0).rand(6, 3).astype(f"<{dtype}")
    labels = np.arange(6) % 2
    little, big = (
        source.make_array_source(v, y, name="x", origin="here")
        for v, y in ((x, labels), (x.astype(f">{dtype}"), labels.astype(">i8")))
    )
    read = big.read(np.arange(6))
    assert read["input"].dtype.isnative and read["label"].dtype == np.int32
    np.testing.assert_array_equal(read["input"], little.read(np.arange(6))["input"])


def test_the_embedded_asset_is_the_pinned_one():
    asset = Path(source.__file__).parent / "assets" / fashion_mnist_5k.ASSET
    sha256 = hashlib.sha256(asset.read_bytes()).hexdigest()
    assert sha256 == fashion_mnist_5k.SHA256
    licences = (ROOT / "DATA_LICENSES.md").read_text()
    assert sha256 in licences and "Zalando SE" in licences
    with np.load(asset) as arrays:
        assert source.checksum(dict(arrays)) in licences


def test_fashion_mnist_5k():
    data = fashion_mnist_5k.make(held_out=0.1)
    assert (len(data.train), len(data.held_out), len(data.test)) == (4500, 500, 1000)
    assert np.bincount(source.example_labels(data.test)).tolist() == [100] * 10
    assert np.bincount(source.example_labels(data.held_out)).tolist() == [50] * 10
    rows = data.train.read(np.arange(4500))
    assert rows["input"].shape == (4500, 28, 28, 1) and rows["input"].dtype == np.uint8
    # Moments of the complete training set are 0.2860 and 0.3530.
    assert abs(rows["input"].mean() / 255 - 0.286) < 0.005
    assert abs(rows["input"].std() / 255 - 0.353) < 0.005
    assert data.test.provenance.name == "Fashion-MNIST-5k/1k (test)" and len(data.classes) == 10


def test_a_damaged_asset_is_refused(monkeypatch):
    monkeypatch.setattr(fashion_mnist_5k, "SHA256", "0" * 64)
    with pytest.raises(DataUnavailable, match="damaged") as error:
        fashion_mnist_5k.make()
    assert "build_assets" in error.value.hint


def test_the_build_script_writes_equal_bytes_for_equal_arrays():
    spec = importlib.util.spec_from_file_location("build", ROOT / "tools" / "build_assets.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    labels = np.array([1, 0, 1, 1, 0, 2])
    assert build.first_per_class(labels, 2).tolist() == [0, 1, 2, 4, 5]
    content = build.npz_bytes({"x": labels})
    assert content == build.npz_bytes({"x": labels.copy()})
    asset = Path(source.__file__).parent / "assets" / fashion_mnist_5k.ASSET
    with np.load(asset) as arrays:
        again = build.npz_bytes(dict(arrays))
    with np.load(io.BytesIO(again)) as copy, np.load(asset) as arrays:
        assert source.checksum(dict(copy)) == source.checksum(dict(arrays))


@pytest.mark.parametrize("compress", [False, True])
def test_idx_folder_reads_plain_and_gzipped_files(tmp_path, compress):
    arrays = write_folder(tmp_path, compress)
    data = idx_folder.make(root=str(tmp_path), name="tiny", held_out=0.1)
    np.testing.assert_array_equal(
        data.test.read(np.arange(40))["input"], arrays["test"][0][..., None]
    )
    train = data.train.read(np.arange(len(data.train)))
    ids = source.example_ids(data.train)
    np.testing.assert_array_equal(train["input"][..., 0], arrays["train"][0][ids])
    assert data.classes == ("0", "1", "2", "3") and data.test.provenance.name == "tiny (test)"


def test_idx_folder_names_what_is_missing_or_damaged(tmp_path):
    with pytest.raises(DataUnavailable, match="no such file or folder"):
        idx_folder.make(root=str(tmp_path / "absent"))
    write_folder(tmp_path)
    victim = tmp_path / "t10k-labels-idx1-ubyte"
    content = victim.read_bytes()
    for damaged, message in ((content[:-3], "holds 37 bytes"), (b"text", "is not an idx file")):
        victim.write_bytes(damaged)
        with pytest.raises(DataUnavailable, match=message):
            idx_folder.make(root=str(tmp_path))
    victim.unlink()
    with pytest.raises(DataUnavailable, match="no t10k-labels") as error:
        idx_folder.make(root=str(tmp_path))
    assert "train-images-idx3-ubyte" in error.value.hint
    victim.with_suffix(".gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(DataUnavailable, match="cannot be read"):
        idx_folder.make(root=str(tmp_path))


def test_fashion_mnist_says_how_to_get_it_and_accepts_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", str(tmp_path / "absent"))
    monkeypatch.delenv("DISTILL_JAX_DATA", raising=False)
    with pytest.raises(DataUnavailable) as error:
        fashion_mnist.make()
    assert "apt-get install dataset-fashion-mnist" in error.value.hint
    (tmp_path / "fashion-mnist").mkdir()
    write_folder(tmp_path / "fashion-mnist")
    monkeypatch.setenv("DISTILL_JAX_DATA", str(tmp_path))
    with pytest.raises(DataUnavailable, match="not those of Fashion-MNIST"):
        fashion_mnist.make()


@pytest.mark.skipif(
    not any(folder.is_dir() for folder in fashion_mnist.folders()),
    reason="needs Debian's dataset-fashion-mnist or $DISTILL_JAX_DATA/fashion-mnist",
)
def test_complete_fashion_mnist_contains_the_embedded_part():
    whole, part = fashion_mnist.make(held_out=0.0), fashion_mnist_5k.make(held_out=0.0)
    assert (len(whole.train), len(whole.test)) == (60000, 10000)
    images = whole.train.read(np.arange(60000))["input"]
    assert abs(images.mean() / 255 - 0.28604) < 5e-6 and abs(images.std() / 255 - 0.35302) < 5e-6
    seen = {image.tobytes() for image in images}
    assert all(image.tobytes() in seen for image in part.train.read(np.arange(5000))["input"])


def test_digits_have_a_fixed_stratified_test_part():
    pytest.importorskip("sklearn")
    data = digits.make(held_out=0.0)
    assert len(data.train) + len(data.test) == 1797
    labels = np.concatenate([source.example_labels(data.train), source.example_labels(data.test)])
    np.testing.assert_array_equal(
        np.bincount(source.example_labels(data.test)), np.bincount(labels) // 5
    )
    rows = data.test.read(np.arange(len(data.test)))
    assert rows["input"].shape[1:] == (8, 8, 1) and rows["input"].dtype == np.uint8
    assert rows["input"].max() == 255 and len(np.unique(rows["input"])) == 17


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataUnavailable, match="pip install scikit-learn"):
        digits.make()


def test_npz_file_and_folder(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (20, 4, 4, 3), np.uint8),
        "y_train": np.arange(20) % 2,
        "x_test": generator.integers(0, 256, (6, 4, 4, 3), np.uint8),
        "y_test": np.arange(6) % 2,
    }
    np.savez(tmp_path / "set.npz", **arrays)
    for key, value in arrays.items():
        np.save(tmp_path / f"{key}.npy", value)
    for path in (tmp_path / "set.npz", tmp_path):
        data = npz_file.make(path=str(path), held_out=0.2, classes=("even", "odd"))
        np.testing.assert_array_equal(data.test.read(np.arange(6))["input"], arrays["x_test"])
        assert (len(data.train), len(data.held_out)) == (16, 4) and data.classes == ("even", "odd")
    (tmp_path / "y_test.npy").unlink()
    with pytest.raises(DataUnavailable, match="no y_test"):
        npz_file.make(path=str(tmp_path))
    (tmp_path / "bad.npz").write_bytes(b"not a zip file")
    with pytest.raises(DataUnavailable, match="cannot be read"):
        npz_file.make(path=str(tmp_path / "bad.npz"))
    with pytest.raises(DataUnavailable, match="x_train, y_train") as error:
        npz_file.make(path=str(tmp_path / "absent.npz"))
    assert "no such file" in error.value.what


def test_synthetic_data_are_reproducible_and_learnable():
    sizes = {"n_train": 200, "n_test": 80, "image_size": 6, "channels": 2, "num_classes": 5}
    data, again = (synthetic.make(**sizes, held_out=0.1) for _ in range(2))
    train, test = data.train.read(np.arange(180)), data.test.read(np.arange(80))
    np.testing.assert_array_equal(train["input"], again.train.read(np.arange(180))["input"])
    assert train["input"].shape == (180, 6, 6, 2) and train["input"].dtype == np.uint8
    means = np.stack([train["input"][train["label"] == c].mean(0) for c in range(5)])
    distance = ((test["input"][:, None] - means[None]) ** 2).sum((2, 3, 4))
    assert (distance.argmin(1) == test["label"]).mean() > 0.95
    other = synthetic.make(**sizes, seed=1).test.read(np.arange(80))
    assert (other["input"] != test["input"]).any() and "synthetic" in data.test.provenance.name
    with pytest.raises(ConfigError, match="n_train"):
        synthetic.make(n_train=0)


def test_importing_the_modules_imports_no_optional_package():
    code = (
        "import sys\n"
        "from distill_jax.data import digits, fashion_mnist, loader, npz_file, synthetic, tfds\n"
        "from distill_jax.data import transforms\n"
        "heavy = {'sklearn', 'grain', 'tensorflow_datasets', 'tensorflow', 'array_record'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_first_examples_of_a_data_set_keep_their_ids():
    whole = synthetic.make(n_train=100, n_test=20, held_out=0.2)
    some = source.first(whole, 30)
    assert [len(part) for part in some[:3]] == [30, 20, 20]
    ids = source.example_ids(some.train)
    assert len(set(ids)) == 30 and set(ids) <= set(source.example_ids(whole.train))
    rows = np.isin(source.example_ids(whole.train), ids).nonzero()[0]
    np.testing.assert_array_equal(
        some.train.read(np.arange(30))["input"], whole.train.read(rows)["input"]
    )
    assert some.train.provenance.sha256 != whole.train.provenance.sha256
    assert source.first(whole, 0).train is whole.train
