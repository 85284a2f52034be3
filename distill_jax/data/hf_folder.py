"""Hugging Face `datasets` folders on disk, read by pyarrow alone.

Two layouts are read:

    dataset.save_to_disk(path)      `dataset_info.json`, `state.json` and `.arrow` files, or
                                    `dataset_dict.json` and such a folder for each split
    path/*.parquet                  files `<split>-00000-of-00002.parquet`, also in `path/data`

An image column, or one of arrays, is the input where there is one; else the columns are a table,
see `table_file`. The names of the classes are those of a `ClassLabel`. Neither `datasets` nor code
of the folder is imported, and images are those that are stored in the files.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError, DataUnavailable, nearest
from distill_jax.data import _columns, _images, _splits, source, table_file
from distill_jax.data import labels as labels_lib

HINT = "a folder that save_to_disk of `datasets` wrote, or one of Parquet files"
LABELS = ("label", "labels", "fine_label", "target", "class")
IMAGES = ("image", "img", "images", "pixel_values")


class Shard(NamedTuple):
    """The rows of a split: an Arrow table, its features as `datasets` describes them, its files."""

    table: Any
    features: Mapping[str, Any]
    files: list[Path]


def _json(path: Path) -> Mapping[str, Any]:
    with source.reading(path, hint=HINT):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise DataUnavailable("is no JSON object", where=str(path), hint=HINT)
    return content


def _inside(folder: Path, name: Any) -> Path:
    """Returns a file named by the JSON of a folder; it must lie inside the folder."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise DataUnavailable(f"names the file {name!r}", where=str(folder), hint=HINT)
    return source.existing(folder / name, hint="the folder is incomplete: save it again")


def _features(stored: Any) -> Mapping[str, Any]:
    return stored if isinstance(stored, dict) else {}


def _of_schema(table: Any) -> Mapping[str, Any]:
    """Returns the features stored in the schema of a file."""
    try:
        stored = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        return _features(stored["info"]["features"])
    except (ValueError, LookupError, TypeError):
        return {}


def _read_saved(folder: Path) -> Shard:
    """Reads a folder of `Dataset.save_to_disk`; its columns are mapped rather than loaded."""
    pa = _columns.arrow()
    state, info = _json(folder / "state.json"), _json(folder / "dataset_info.json")
    if state.get("_indices_files"):
        raise DataUnavailable(
            "has its rows selected by indices", where=str(folder), hint="save it with save_to_disk"
        )
    listed = state.get("_data_files")
    if not isinstance(listed, list) or not listed:
        raise DataUnavailable("names no files", where=str(folder / "state.json"), hint=HINT)
    files, tables = [], []
    for item in listed:
        file = _inside(folder, item.get("filename") if isinstance(item, dict) else item)
        with _columns.arrow_reading(file, hint="an Arrow stream is expected: save it again"):
            mapped = pa.memory_map(str(file))
            try:
                tables.append(pa.ipc.open_stream(mapped).read_all())
            except pa.ArrowInvalid:
                tables.append(pa.ipc.open_file(mapped).read_all())
        files.append(file)
    with _columns.arrow_reading(folder, hint="its files have different columns"):
        table = pa.concat_tables(tables)
    features = _features(info.get("features")) or _of_schema(table)
    return Shard(table, features, files)


def _read_parquet(files: list[Path], folder: Path) -> Shard:
    pa = _columns.arrow()
    tables = [_columns.read_parquet(file) for file in files]
    with _columns.arrow_reading(folder, hint="its files have different columns"):
        table = pa.concat_tables([one.replace_schema_metadata() for one in tables])
    info = folder / "dataset_info.json"
    stored = _features(_json(info).get("features")) if info.is_file() else {}
    return Shard(table, stored or _of_schema(tables[0]), files)


def read(root: Path) -> dict[str, Shard]:
    """Returns the splits of a folder by name; "" is the only one of a folder without splits.

    Raises:
      DataUnavailable: another layout, or damaged files.
    """
    if not root.is_dir():
        raise DataUnavailable("is not a folder", where=str(root), hint=HINT)
    if (root / "dataset_dict.json").is_file():
        names = _json(root / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not names:
            what = "names no splits"
            raise DataUnavailable(what, where=str(root / "dataset_dict.json"), hint=HINT)
        return {name: _read_saved(_inside(root, name)) for name in names}
    if (root / "state.json").is_file():
        return {"": _read_saved(root)}
    for folder in (root, root / "data"):
        files = [
            file
            for file in (sorted(folder.iterdir()) if folder.is_dir() else [])
            if file.suffix.lower() in _columns.PARQUET and not file.name.startswith(".")
        ]
        if files:
            by_split: dict[str, list[Path]] = {}
            for file in files:
                match = re.match(r"(.+?)(-\d+-of-\d+)?$", file.stem)
                by_split.setdefault(match[1] if match else file.stem, []).append(file)
            if len(by_split) == 1 or not any(map(_is_split, by_split)):
                return {"": _read_parquet(files, folder)}
            return {name: _read_parquet(own, folder) for name, own in by_split.items()}
    raise DataUnavailable("holds no data set", where=str(root), hint=HINT)


def _is_split(name: str) -> bool:
    return name.lower() in _splits.SPLITS


def make(
    *,
    path: str,
    label: str | Sequence[str] = "",
    task: str = "classification",
    image: str = "",
    splits: str | Sequence[str] = (),
    size: int | Sequence[int] = 0,
    mode: str = "auto",
    fit: str = "crop",
    features: str | Sequence[str] = (),
    drop: str | Sequence[str] = (),
    categorical: str | Sequence[str] = (),
    classes: str | Sequence[str] = (),
    test_fraction: float = 0.2,
    on_error: str = "refuse",
    most_pixels: int = _images.MOST_PIXELS,
    resident_bytes: int = _images.RESIDENT_BYTES,
    name: str = "",
    licence: str = "",
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Reads a folder; see the module for its layout.

    Args:
      path: the folder.
      label: column of labels; by default `label` or another usual name. For another task, the
        numeric columns.
      task: what labels are; see `table_file`.
      image: column of images or of arrays of numbers; by default the one there is.
      splits: names of the splits to read, of a folder with others; by default all, which must be
        called train, test and, optionally, validation. Of one split, a hash of the rows' content
        draws the parts.
      size: see `image_folder`, as the next two.
      mode: channels.
      fit: how images get the size.
      features: see `table_file`, as the next two; of folders without images.
      drop: columns.
      categorical: columns.
      classes: class names in label order; by default those of the `ClassLabel`, else sorted.
      test_fraction: share of the examples that is the test part where there is one split.
      on_error: see `image_folder`, as the next two.
      most_pixels: images with more are not decoded.
      resident_bytes: largest total size of decoded images that are held in memory.
      name: name in the provenance; the folder's name by default.
      licence: licence of the data, for the provenance.
      held_out: share of the training part held out, where there is no split `validation`.
      split_seed: seed of the split.

    Raises:
      DataUnavailable: another layout, damaged files, columns that cannot be read.
      ArgumentError: a split or column that does not exist.
    """
    if on_error not in _images.ON_ERROR:
        hint = nearest(on_error, _images.ON_ERROR)
        raise ArgumentError(f"on_error is {on_error!r}", where="on_error", hint=hint)
    _splits.check_held_out(held_out)
    labels_lib.check_task(task)
    root = source.existing(path, hint=HINT)
    shards = _chosen(read(root), _splits.names_of(splits), root)
    given = [_splits.part_of(split, where=str(root)) if len(shards) > 1 else "" for split in shards]
    pa = _columns.arrow()
    first = next(iter(shards.values()))
    with _columns.arrow_reading(root, hint="its splits have different columns"):
        table = pa.concat_tables([s.table.replace_schema_metadata() for s in shards.values()])
    if not len(table):
        raise DataUnavailable("no rows", where=str(root))
    files = [file for shard in shards.values() for file in shard.files]
    columns = _label_columns(table, _splits.names_of(label), root)
    image = _image_column(table, first.features, image)
    plain = _columns.from_arrow(table.drop_columns([image]) if image else table, path=root)
    plain, names = _named(plain, columns, first.features)
    named = np.repeat(np.array(given), [len(shard.table) for shard in shards.values()])
    contents = _Encoded(table.column(image), root, image) if image else None
    if given[0]:
        parts = _splits.settle(named, where=str(root))
    else:
        keys = list(_columns.iterate_rows(plain))
        if contents is not None:
            keys = [key + contents.key(i) for i, key in enumerate(keys)]
        parts = _splits.by_hash(
            keys,
            test_fraction=test_fraction,
            held_out=held_out,
            seed=split_seed,
        )
    provenance = Provenance(
        name or root.resolve().name, str(path), len(table), source.files_checksum(files), licence
    )
    split = {"held_out": held_out, "split_seed": split_seed}
    if contents is None:
        return table_file.make_from(
            plain,
            parts,
            label=columns,
            task=task,
            features=features,
            drop=drop,
            categorical=categorical,
            classes=classes or names,
            provenance=provenance,
            **split,
        )
    labels, order, _ = table_file.labels_of(
        plain,
        columns,
        parts,
        task=task,
        classes=classes or names,
        unknown=False,
        what="rows",
    )

    def checksum(rows: np.ndarray) -> str:
        seed = f"{provenance.sha256} {columns} {image} {order}".encode()
        return hashlib.sha256(seed + rows.astype("<i8").tobytes()).hexdigest()

    if contents.numeric:
        return _arrays(contents, labels, parts, order, task, provenance, checksum, **split)
    return _images.make_dataset(
        contents,
        labels,
        parts,
        names=plain.rows,
        classes=order,
        decoder=_images.make_decoder(
            contents, size=size, mode=mode, fit=fit, most_pixels=most_pixels
        ),
        on_error=on_error,
        resident_bytes=resident_bytes,
        provenance=provenance,
        checksum=checksum,
        task=task,
        **split,
    )


def _chosen(shards: dict[str, Shard], splits: tuple[str, ...], root: Path) -> dict[str, Shard]:
    for split in splits:
        if split not in shards:
            raise ArgumentError(
                f"{root} has no split {split!r}", where="splits", hint=nearest(split, shards)
            )
    return {name: shards[name] for name in splits} if splits else shards


def _label_columns(table: Any, columns: tuple[str, ...], root: Path) -> tuple[str, ...]:
    names = table.column_names
    for column in columns:
        if column not in names:
            what = f"{root} has no column {column!r}"
            raise ArgumentError(what, where="label", hint=nearest(column, names))
    found = columns or tuple(name for name in LABELS if name in names)[:1]
    if not found:
        hint = nearest("label", names)
        raise ArgumentError("no column of labels is known", where="label", hint=hint)
    return found


def _image_column(table: Any, features: Mapping[str, Any], image: str) -> str:
    names = table.column_names
    if image:
        if image not in names:
            hint = nearest(image, names)
            raise ArgumentError(f"no column {image!r}", where="image", hint=hint)
        return image
    pa = _columns.arrow()
    described = [
        n for n in names if str(_features(features.get(n)).get("_type")) in ("Image", *_ARRAYS)
    ]
    like = [n for n in names if _is_encoded(pa, table.schema.field(n).type)]
    found = described or [n for n in like if n in IMAGES] or like
    if len(found) > 1:
        raise ArgumentError(
            f"several columns hold images: {', '.join(found)}",
            where="image",
            hint="name the one that is the input",
        )
    return found[0] if found else ""


_ARRAYS = ("Array2D", "Array3D", "Array4D")


def _is_encoded(pa: Any, kind: Any) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_bytes(pa, kind.field(index).type)
    return _is_bytes(pa, kind)


def _is_bytes(pa: Any, kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _named(
    table: _columns.Table, columns: tuple[str, ...], features: Mapping[str, Any]
) -> tuple[_columns.Table, tuple[str, ...]]:
    """Maps labels to the names of their `ClassLabel`.

    Raises:
      DataUnavailable: a label that has no name, such as -1 of rows without one.
    """
    column = columns[0]
    stored = _features(features.get(column)).get("names")
    if (
        len(columns) > 1
        or not isinstance(stored, list)
        or not all(isinstance(name, str) for name in stored)
    ):
        return table, ()
    numbers = table.numbers(column)
    if numbers is None:
        return table, tuple(stored)
    absent = np.isnan(numbers) | (numbers < 0) | (numbers >= len(stored))
    if absent.any():
        i = int(np.argmax(absent))
        raise DataUnavailable(
            f"{table.at(i)}: the label is {numbers[i]:g}, and there are {len(stored)} classes",
            where=str(table.path),
            hint="-1 stands for rows without a label: leave such a split out with splits=train",
        )
    cells = {**table.cells, column: np.array(stored, object)[numbers.astype(np.int64)]}
    return dataclasses.replace(table, cells=cells), tuple(stored)


class _Encoded(Sequence[bytes]):
    """A column of images: bytes, or structs of bytes and path; or of arrays of numbers.

    Raises:
      DataUnavailable: the column holds something else.
    """

    def __init__(self, column: Any, root: Path, name: str):
        pa = _columns.arrow()
        if isinstance(column.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks])
        kind = column.type
        self.numeric = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)
        if not self.numeric and not _is_encoded(pa, kind):
            raise DataUnavailable(
                f"the column {name!r} holds {str(kind)[:60]}",
                where=str(root),
                hint="images are encoded bytes, or arrays of numbers",
            )
        self.column = (
            column
            if not pa.types.is_struct(kind)
            else pa.chunked_array(
                [pa.compute.struct_field(chunk, "bytes") for chunk in column.chunks]
            )
        )
        self.root, self.name = root, name
        if not self.numeric and self.column.null_count:
            raise DataUnavailable(
                f"{self.column.null_count} rows of {name!r} have no image in the files",
                where=str(root),
                hint="paths to images are not followed: save the data set with save_to_disk, "
                "which stores images, or read their folder as image_folder",
            )

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, i: Any) -> Any:
        return self.column[int(i)].as_py()

    def key(self, i: int) -> bytes:
        """Returns the content of the image that enters the hash of its row."""
        value = self[i]
        return value if isinstance(value, bytes) else repr(value).encode()


def _arrays(
    contents: _Encoded,
    labels: np.ndarray,
    parts: np.ndarray,
    classes: Sequence[str],
    task: str,
    provenance: Provenance,
    checksum: Any,
    *,
    held_out: float,
    split_seed: int,
) -> Dataset:
    """Returns the data set of a column of arrays; whole numbers from 0 to 255 become uint8."""
    with source.reading(contents.root, hint="arrays of numbers of one shape are expected"):
        values = np.array(contents.column.to_pylist())
        if values.dtype == object or values.dtype.kind not in "iuf":
            raise ValueError(f"the column {contents.name!r} holds arrays of different shapes")
    if values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= 255:
        values = values.astype(np.uint8)
    elif values.dtype.kind in "iu" or values.dtype == np.float64:
        values = values.astype(np.float32)
    made = []
    labels, soft = labels_lib.read_soft(labels, task, where=provenance.origin)
    for part, rows in (("train", parts != "test"), ("test", parts == "test")):
        made.append(
            source.make_array_source(
                values[rows],
                labels[rows],
                name=f"{provenance.name} ({part})",
                origin=provenance.origin,
                licence=provenance.licence,
                sha256=checksum(np.flatnonzero(rows)),
                task=task,
                label_probs=soft["label_probs"][rows] if soft else None,
            )
        )
    return source.make_dataset(
        *made,
        held=_splits.held(parts[parts != "test"]),
        held_out=held_out,
        split_seed=split_seed,
        classes=classes,
        task=task,
    )
