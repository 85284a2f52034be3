"""The TFDS adapter on a builder prepared here; reading must not load TensorFlow."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from distill_jax.core.errors import ConfigError, DataUnavailable
from distill_jax.data import source, tfds

pytestmark = pytest.mark.xdist_group("tfds")  # one prepares for all

ROOT = Path(source.__file__).parents[2]

PREPARE_AND_READ = """
import io
import sys

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from distill_jax.data import fashion_mnist_5k, loader, source, tfds as adapter

DATA = fashion_mnist_5k.make(held_out=0.0)
ROWS = {"train": DATA.train.read(np.arange(60)), "test": DATA.test.read(np.arange(20))}


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="tensor"), tfds.core.BuilderConfig(name="png")]

    def _info(self):
        if self.builder_config.name == "png":
            image = tfds.features.Image(shape=(28, 28, 1))
        else:
            image = tfds.features.Tensor(shape=(28, 28), dtype=np.uint8)
        label = tfds.features.ClassLabel(names=list(DATA.classes))
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {split: self._generate_examples(split) for split in ROWS}

    def _generate_examples(self, split):
        for i, (image, label) in enumerate(zip(ROWS[split]["input"], ROWS[split]["label"])):
            image = image[..., 0]
            if self.builder_config.name == "png":
                image = Image.fromarray(image)
            yield i, {"image": image, "label": int(label)}


for config in ("tensor", "png"):
    Tiny(config=config, data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
    data = adapter.make(name=f"tiny/{config}", data_dir=sys.argv[1], held_out=0.2)
    assert data.classes == DATA.classes and data.test.provenance.n == 20
    got = data.test.read(np.arange(20))
    assert got["input"].shape == (20, 28, 28, 1) and got["input"].dtype == np.uint8
    assert got["label"].dtype == np.int32
    # TFDS shuffles when it writes: compare as sets of (label, image).
    pairs = [sorted((int(l), x.tobytes()) for l, x in zip(r["label"], r["input"]))
             for r in (got, ROWS["test"])]
    assert pairs[0] == pairs[1]
    assert len(data.train) + len(data.held_out) == 60 and len(data.held_out) > 0
    stream = loader.StreamLoader(data.train, batch_size=8, seed=0)
    batches = iter(stream)
    batch = next(batches)
    assert batch["input"].shape == (8, 28, 28, 1)
    labels = source.example_labels(data.train.source)
    np.testing.assert_array_equal(batch["label"], labels[batch["index"]])
    batches.close()
assert "tensorflow" not in sys.modules
print("read without TensorFlow")
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    root = tmp_path_factory.mktemp("tfds")
    script = root / "script.py"
    script.write_text(textwrap.dedent(PREPARE_AND_READ))
    done = subprocess.run(
        [sys.executable, str(script), str(root)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "read without TensorFlow" in done.stdout
    return root


def edit_info(folder, **changes):
    path = folder / "dataset_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def copy(prepared, tmp_path):
    shutil.copytree(prepared / "tiny" / "tensor", tmp_path / "tiny" / "tensor")
    return tmp_path / "tiny" / "tensor" / "1.0.0"


def test_a_prepared_data_set_is_read_without_tensorflow(prepared):
    assert tfds.find_prepared("tiny/png:1.0.0", str(prepared)).parts[-3:] == (
        "tiny",
        "png",
        "1.0.0",
    )


def test_names_must_say_which_configuration(prepared):
    with pytest.raises(ConfigError, match="tiny/png or tiny/tensor"):
        tfds.make(name="tiny", data_dir=str(prepared))


@pytest.mark.parametrize("key", ["input_key", "label_key", "train_split", "test_split"])
def test_unknown_features_and_splits_are_refused(prepared, key):
    kwargs: dict[str, Any] = {key: "absent"}
    with pytest.raises(ConfigError, match="has no 'absent'") as error:
        tfds.make(name="tiny/tensor", data_dir=str(prepared), **kwargs)
    assert ("image, label" if "key" in key else "test, train") in error.value.hint


@pytest.mark.parametrize("file_format", ["tfrecord", "parquet", None])
def test_formats_without_reliable_random_access_are_refused(prepared, tmp_path, file_format):
    edit_info(copy(prepared, tmp_path), fileFormat=file_format)
    with pytest.raises(DataUnavailable, match=file_format or "tfrecord") as error:
        tfds.make(name="tiny", data_dir=str(tmp_path))
    assert "array_record" in error.value.hint


def test_lost_records_are_noticed(prepared, tmp_path):
    folder = copy(prepared, tmp_path)
    record = next(folder.glob("*train*"))
    record.write_bytes(next(folder.glob("*test*")).read_bytes())
    with pytest.raises(DataUnavailable, match="holds 20 records, its info says 60"):
        tfds.make(name="tiny", data_dir=str(tmp_path))
    for content in (record.read_bytes()[:-100], None):
        record.unlink() if content is None else record.write_bytes(content)
        with pytest.raises(DataUnavailable, match="cannot be read"):
            tfds.make(name="tiny", data_dir=str(tmp_path))


def test_unprepared_data_fail_at_once_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataUnavailable, match="'mnist' is not prepared") as error:
        tfds.make(name="mnist")
    assert "download_and_prepare" in error.value.hint and str(tmp_path) in error.value.where


def test_a_missing_package_is_named(prepared, tmp_path, monkeypatch):
    copy(prepared, tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataUnavailable, match="pip install tensorflow-datasets"):
        tfds.make(name="tiny", data_dir=str(tmp_path))


def test_the_newest_version_counts(tmp_path):
    for version in ("1.9.0", "1.10.0", "1.2.0"):
        (tmp_path / "x" / version).mkdir(parents=True)
        (tmp_path / "x" / version / "dataset_info.json").write_text("{}")
    assert tfds.find_prepared("x", str(tmp_path)).name == "1.10.0"
    assert tfds.find_prepared("x:1.2.0", str(tmp_path)).name == "1.2.0"
