"""Any data set prepared by TensorFlow Datasets, read at random without TensorFlow.

Nothing is ever downloaded: a data set that is not on disk is an error at once. Formats with
random access are read (array_record); prepare one with

    tfds.builder("cifar10", file_format="array_record").download_and_prepare()

where a network connection and, for most builders, TensorFlow are available, and copy the folder.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.data import source
from distill_jax.data.labels import as_labels

DAMAGED = "the files are incomplete: prepare the data set again"


class TfdsSource:
    """Random access to one split.

    Args:
      records: TFDS's data source of the split; each record is a dict.
      labels: `[n]`.
      input_key: feature that becomes `input`; images without a channel axis get one.
      provenance: where it came from.
    """

    def __init__(self, records: Any, labels: np.ndarray, input_key: str, provenance: Provenance):
        self.records, self.labels, self.input_key = records, labels, input_key
        self.provenance = provenance

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns `input` `[b, ...]` and `label` int32 `[b]`."""
        records = self.records.__getitems__([int(i) for i in indices])
        inputs = np.stack([record[self.input_key] for record in records])
        if inputs.dtype == np.uint8 and inputs.ndim == 3:
            inputs = inputs[..., None]
        return {"input": inputs, "label": self.labels[indices]}


def find_prepared(name: str, data_dir: str = "") -> Path:
    """Returns the folder of a prepared data set, `<data_dir>/<name>[/<config>]/<version>`.

    Args:
      name: as in TFDS: "mnist", "mnist:3.0.1", "imagenet_resized/32x32". Without a version, the
        newest one is used.
      data_dir: default $TFDS_DATA_DIR, then ~/tensorflow_datasets.

    Raises:
      DataUnavailable: not prepared.
      ArgumentError: several configurations are prepared and the name has none.
    """
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    path, _, version = name.partition(":")
    base = Path(data_dir).expanduser() / path
    folders = [info.parent for info in base.glob("**/dataset_info.json")]
    folders = [folder for folder in folders if not version or folder.name == version]
    if not folders:
        raise DataUnavailable(
            f"{name!r} is not prepared",
            where=str(base),
            hint=(
                "data sets are never downloaded here. Where there is a network: "
                f"tfds.builder({name!r}, file_format='array_record').download_and_prepare(); then "
                "name the folder with the argument data_dir or $TFDS_DATA_DIR"
            ),
        )
    configs = sorted({folder.parent.relative_to(base).as_posix() for folder in folders})
    if len(configs) > 1:
        raise ArgumentError(
            f"{name!r} is prepared in several configurations",
            where="name",
            hint=f"choose {' or '.join(f'{path}/{config}' for config in configs)}",
        )

    def by_version(folder: Path) -> list[int]:
        return [int(part) if part.isdigit() else -1 for part in folder.name.split(".")]

    return max(folders, key=by_version)


def _count_records(path: os.PathLike) -> int:
    # The length of TFDS's own data source comes from its info, not from the files.
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(os.fspath(path))
        count = reader.num_records()
        reader.close()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataUnavailable(
            f"cannot be read: {error}", where=os.fspath(path), hint=DAMAGED
        ) from error
    return count


def check_features(folder: Path) -> None:
    """Raises an error for a `features.json` that would make TFDS import an arbitrary module.

    Feature classes are named there, and TFDS imports the module of one that it does not know.
    Allowed are its own and those of modules that this program has imported already.

    Raises:
      DataUnavailable: naming the class.
    """

    def names(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("type", "pythonClassName", "python_class_name"):
                    yield str(value)
                yield from names(value)
        elif isinstance(node, list):
            for item in node:
                yield from names(item)

    path = folder / "features.json"
    with source.reading(path, hint=DAMAGED):
        stored = json.loads(path.read_bytes()) if path.exists() else {}
    for name in names(stored):
        module = name.rpartition(".")[0]
        if module and not name.startswith("tensorflow_datasets.") and module not in sys.modules:
            raise DataUnavailable(
                f"names code outside TFDS: {name!r}",
                where=str(path),
                hint=f"if you trust it, import {module} in a data set of your own that calls "
                "distill_jax.data.tfds.make",
            )


def make(
    *,
    name: str,
    data_dir: str = "",
    input_key: str = "image",
    label_key: str = "label",
    train_split: str = "train",
    test_split: str = "test",
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Opens two whole splits of a prepared data set. Labels are read once; inputs are not.

    The provenance's sha256 covers `dataset_info.json` (split sizes and checksums as TFDS wrote
    them), the labels and the files of records: their bytes, or of more than 2 GB their names, sizes
    and times.

    Args:
      name: as in TFDS, with an optional configuration and version (see `find_prepared`).
      data_dir: where data sets are prepared.
      input_key: feature that becomes `input`.
      label_key: integer feature that becomes `label`.
      train_split: split that is trained on, less the held-out share.
      test_split: split that is reported on.
      held_out: share of the training split held out.
      split_seed: seed of that split.

    Raises:
      DataUnavailable: TFDS is not installed, the data set is not prepared, its format has no
        random access, or records are missing.
      ArgumentError: an unknown split or feature.
    """
    folder = find_prepared(name, data_dir)
    info_path = folder / "dataset_info.json"
    with source.reading(info_path, hint=DAMAGED):
        info_bytes = info_path.read_bytes()
        file_format = json.loads(info_bytes).get("fileFormat") or "tfrecord"
    if file_format != "array_record":
        raise DataUnavailable(
            f"{name!r} is prepared as {file_format}, which is not read here",
            where=str(folder),
            hint="prepare it with file_format='array_record': tfrecord has no random access, and "
            "parquet as TFDS writes it loses records",
        )
    try:
        import tensorflow_datasets as tfds
        from array_record.python.array_record_module import ArrayRecordReader  # noqa: F401
    except ImportError as error:
        raise DataUnavailable(
            f"TensorFlow Datasets cannot be imported: {error}",
            where="dataset",
            hint="pip install tensorflow-datasets array_record importlib_resources",
        ) from error
    check_features(folder)
    builder: Any = tfds.builder_from_directory(folder)
    info = builder.info
    features = info.features
    for key, value, options in (
        ("input_key", input_key, features),
        ("label_key", label_key, features),
        ("train_split", train_split, info.splits),
        ("test_split", test_split, info.splits),
    ):
        if value not in options:
            raise ArgumentError(
                f"{name!r} has no {value!r}",
                where=key,
                hint=f"available: {', '.join(sorted(options))}",
            )

    def open_split(split: str, part: str) -> TfdsSource:
        expected = info.splits[split].num_examples
        held = sum(_count_records(path) for path in info.splits[split].filepaths)
        if held != expected:
            raise DataUnavailable(
                f"split {split!r} holds {held} records, its info says {expected}",
                where=str(folder),
                hint=DAMAGED,
            )
        records = builder.as_data_source(split)
        undecoded = {input_key: tfds.decode.SkipDecoding()}
        column = builder.as_data_source(split, decoders=undecoded)
        values = np.array([record[label_key] for record in column])
        labels = as_labels(values, name=split, where=str(folder))
        files = source.files_checksum(map(Path, info.splits[split].filepaths))
        hashed = info_bytes + source.checksum(labels).encode() + files.encode()
        sha256 = hashlib.sha256(hashed).hexdigest()
        title = f"{info.full_name} ({part}: {split})"
        return TfdsSource(
            records, labels, input_key, Provenance(title, str(folder), expected, sha256)
        )

    return source.make_dataset(
        open_split(train_split, "train"),
        open_split(test_split, "test"),
        held_out=held_out,
        split_seed=split_seed,
        classes=tuple(getattr(features[label_key], "names", None) or ()),
    )
