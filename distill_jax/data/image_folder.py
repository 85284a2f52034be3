"""Images in folders named by their classes, or in one folder with a table of labels.

    root/cat/1.png                  the parts are drawn by a hash of the names
    root/train/cat/1.png            with root/test/..., and root/val/... if there is one
    root/1.png, root/labels.csv     columns file, label and, if there is one, split

Files ending in .png, .jpg, .jpeg, .webp and .bmp are read, also in folders below those of the
classes. Hidden files and folders (`.name`, `__MACOSX`) are left out. A part `val` becomes the
held-out part; without a part `test` it is the test part instead, as in ImageNet.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError, DataUnavailable, nearest
from distill_jax.data import _columns, _images, _splits, source, table_file
from distill_jax.data import labels as labels_lib

HINT = "a folder with one folder of images for each class, or with images and a labels.csv"


class Entry(NamedTuple):
    """An image file: its path, its name below the root, its class and its part ("" by hash)."""

    path: Path
    name: str
    label: str
    part: str = ""


def _check_inside(path: Path, root: Path) -> None:
    """Raises an error for a path whose links lead out of the root."""
    real_root = os.path.realpath(root)
    if os.path.commonpath([os.path.realpath(path), real_root]) != real_root:
        raise DataUnavailable(
            "is a symbolic link out of the folder",
            where=str(path),
            hint="copy the files, or set follow_links=True if you trust the links",
        )


def _walk(folder: Path, root: Path, *, follow_links: bool) -> Iterator[Path]:
    """Yields the files below a folder, sorted by name; each folder is visited once despite links.

    Raises:
      DataUnavailable: a link that leads out of the root, unless `follow_links`.
    """
    seen = set()

    def one(folder: Path) -> Iterator[Path]:
        real = os.path.realpath(folder)
        if real in seen:
            return
        seen.add(real)
        with source.reading(folder):
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            path = Path(entry.path)
            if entry.is_symlink() and not follow_links:
                _check_inside(path, root)
            if entry.is_dir():
                yield from one(path)
            else:
                yield path

    yield from one(folder)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


class _Scan:
    """Sorts files into images and others, which are counted by their ending."""

    def __init__(self, root: Path, *, follow_links: bool):
        self.root, self.follow_links = root, follow_links
        self.ignored: Counter[str] = Counter()

    def images(self, folder: Path) -> list[Path]:
        found = []
        for path in _walk(folder, self.root, follow_links=self.follow_links):
            if path.suffix.lower() in _images.SUFFIXES and (path.is_file() or path.is_symlink()):
                found.append(path)
            else:
                self.ignored[path.suffix.lower() or path.name] += 1
        return found

    def folders(self, folder: Path) -> list[Path]:
        """The folders in a folder, sorted; links are checked as in `images`."""
        with source.reading(folder):
            names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        return [folder / n for n in names if not n.startswith(".") and n != "__MACOSX"]

    def by_class(self, folder: Path, part: str = "") -> list[Entry]:
        found = []
        for of_class in self.folders(folder):
            if not self.follow_links:
                _check_inside(of_class, self.root)
            paths = self.images(of_class)
            found += [Entry(p, _name(p, self.root), of_class.name, part) for p in paths]
            if not paths:
                self.ignored["folders without an image"] += 1
        return found


def _read_labels(
    root: Path, table: Path, file_column: str, *, follow_links: bool
) -> tuple[list[Entry], _columns.Table]:
    """Returns the images that a table of labels names, sorted by name, and its rows likewise."""
    rows = _columns.read(table)
    if file_column not in rows.names:
        what = f"{table.name} has no column {file_column!r}"
        raise ArgumentError(what, where="file_column", hint=nearest(file_column, rows.names))
    files = rows.text(file_column)
    parts = rows.text("split") if "split" in rows.names else [None] * len(rows)
    entries: dict[str, Entry] = {}
    places: dict[str, int] = {}
    for i, (name, part) in enumerate(zip(files, parts, strict=True)):
        at = f"{table} {rows.at(i)}"
        if name is None:
            hint = "fill it in, or leave the row out"
            raise DataUnavailable(f"no {file_column}", where=at, hint=hint)
        path = root / name
        if Path(name).is_absolute() or os.path.normpath(name).startswith(".."):
            raise DataUnavailable(f"{name!r} is not below {root}", where=at)
        if not follow_links:
            _check_inside(path, root)
        if name in entries:
            raise DataUnavailable(f"{name!r} has two rows", where=at, hint="one row an image")
        if not path.is_file():
            raise DataUnavailable(f"there is no file {name!r} in {root}", where=at)
        part = "" if part is None else _splits.part_of(part, where=at)
        entries[name], places[name] = Entry(path, name, "", part), i
    if any(e.part for e in entries.values()) and not all(e.part for e in entries.values()):
        raise DataUnavailable("some rows have no split", where=str(table), hint="all, or none")
    names = sorted(entries)
    return [entries[name] for name in names], rows.select(np.array([places[n] for n in names]))


def find(
    root: Path,
    *,
    labels_file: str = "",
    file_column: str = "file",
    follow_links: bool = False,
) -> tuple[list[Entry], _columns.Table | None, list[str]]:
    """Lists the images of a folder, without opening any.

    Returns:
      The images, sorted by name within their parts; the table of labels, a row an image, or None;
      and notes on the files left out, one line each.

    Raises:
      DataUnavailable: no images, an unclear layout, or links out of the folder.
    """
    if not root.is_dir():
        raise DataUnavailable("is not a folder", where=str(root), hint=HINT)
    scan = _Scan(root, follow_links=follow_links)
    folders = {folder.name: folder for folder in scan.folders(root)}
    split = {
        name: _splits.SPLITS[name.lower()] for name in folders if name.lower() in _splits.SPLITS
    }
    rows = None
    table = Path(labels_file).expanduser() if labels_file else root / "labels.csv"
    if labels_file or (table.is_file() and not folders):
        table = source.existing(table, hint="a table of files and labels")
        entries, rows = _read_labels(root, table, file_column, follow_links=follow_links)
    elif len(split) == len(folders) and "train" in split.values():
        if twice := [p for p, count in Counter(split.values()).items() if count > 1]:
            names = sorted(name for name, part in split.items() if part == twice[0])
            what = f"the folders {' and '.join(names)} name the same part"
            raise DataUnavailable(what, where=str(root), hint="leave one of them")
        entries = []
        for name, part in split.items():
            entries += scan.by_class(folders[name], part)
            if not any(entry.part == part for entry in entries):
                hint = "one folder of images for each class is expected in it"
                raise DataUnavailable("no images", where=str(folders[name]), hint=hint)
    else:
        entries = scan.by_class(root)
    if not entries:
        loose = scan.images(root) if not folders else []
        what = f"{len(loose)} images without labels" if loose else "no images"
        kinds = sorted(scan.ignored)
        found = f"; it has {', '.join(kinds[:5])}" if kinds and not loose else ""
        raise DataUnavailable(f"{what}{found}", where=str(root), hint=HINT)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(scan.ignored.items()))
    return entries, rows, [f"left out: {kinds}"] if kinds else []


def make(
    *,
    path: str,
    size: int | Sequence[int] = 0,
    mode: str = "auto",
    fit: str = "crop",
    labels_file: str = "",
    file_column: str = "file",
    label_column: str | Sequence[str] = "label",
    task: str = "classification",
    classes: str | Sequence[str] = (),
    unknown_labels: bool = False,
    test_fraction: float = 0.2,
    on_error: str = "refuse",
    follow_links: bool = False,
    most_pixels: int = _images.MOST_PIXELS,
    resident_bytes: int = _images.RESIDENT_BYTES,
    name: str = "",
    licence: str = "",
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Reads a folder of images; see the module for its layout.

    Without folders or a column of splits, a hash of an image's name below the root determines its
    part, so that adding images later does not move existing ones. Images that take more than
    `resident_bytes` are decoded when they are read.

    Args:
      path: the folder.
      size: side, or height and width, of the images; 0 where they all have the same size already.
      mode: "grey", "rgb", "rgba", or "auto": grey where no sampled image has colour.
      fit: how images get that size: "crop", "stretch" or "pad".
      labels_file: CSV of labels; by default `labels.csv` in the folder, if it has no folders.
      file_column: its column of file names, relative to the folder.
      label_column: its column of class names; for another task, its columns of numbers. Several
        columns of classes are soft labels: the probability of each, by its name.
      task: what labels are; see `table_file`.
      classes: names in label order, or one string with commas between; by default sorted.
      unknown_labels: whether images without a label in the table are kept, with unknown labels.
      test_fraction: share of the images that is the test part, where there are no splits.
      on_error: "refuse" stops at images that cannot be decoded and lists them; "skip" leaves them
        out with a warning, for which all images are decoded once.
      follow_links: whether symbolic links may lead out of the folder.
      most_pixels: images with more are not decoded.
      resident_bytes: largest total size of decoded images that are held in memory.
      name: name in the provenance; the folder's name by default.
      licence: licence of the data, for the provenance.
      held_out: share of the training part held out, where there is no folder `val` beside `test`.
      split_seed: seed of the split.

    Raises:
      DataUnavailable: no images, an unclear layout, images that cannot be decoded or differ in
        size, one class, a class without training images.
      ArgumentError: an invalid argument.
    """
    if on_error not in _images.ON_ERROR:
        hint = nearest(on_error, _images.ON_ERROR)
        raise ArgumentError(f"on_error is {on_error!r}", where="on_error", hint=hint)
    _splits.check_held_out(held_out)
    root = source.existing(path, hint=HINT)
    labels_lib.check_task(task)
    entries, table, notes = find(
        root,
        labels_file=labels_file,
        file_column=file_column,
        follow_links=follow_links,
    )
    if table is None and task != "classification":
        hint = "a labels.csv, or labels_file, has columns of labels"
        raise ArgumentError(f"folders of classes are no {task}", where="task", hint=hint)
    if not entries[0].part:
        parts = _splits.by_hash(
            [os.fsencode(entry.name) for entry in entries],
            test_fraction=test_fraction,
            held_out=held_out,
            seed=split_seed,
        )
    else:
        parts = _splits.settle(np.array([entry.part for entry in entries]), where=str(root))
    none = None
    if table is None:
        labels, order = _splits.number(
            [e.label for e in entries], parts, classes=classes, where=str(root), what="images"
        )
    else:
        labels, order, none = table_file.labels_of(
            table,
            _splits.names_of(label_column),
            parts,
            task=task,
            classes=classes,
            unknown=unknown_labels,
            what="images",
        )
    title = name or root.resolve().name
    return _images.make_dataset(
        [entry.path for entry in entries],
        labels,
        parts,
        names=[entry.name for entry in entries],
        classes=order,
        decoder=_images.make_decoder(
            [entry.path for entry in entries],
            size=size,
            mode=mode,
            fit=fit,
            most_pixels=most_pixels,
        ),
        on_error=on_error,
        resident_bytes=resident_bytes,
        provenance=Provenance(title, str(path), len(entries), "", licence),
        checksum=lambda rows: _checksum([entries[i] for i in rows], labels[rows], order),
        task=task,
        ignore_label=none,
        notes=notes,
        held_out=held_out,
        split_seed=split_seed,
    )


def _checksum(entries: Sequence[Entry], labels: np.ndarray, classes: Sequence[str]) -> str:
    sha = hashlib.sha256(source.files_checksum(entry.path for entry in entries).encode())
    for entry in entries:
        sha.update(os.fsencode(f"{entry.name}\0"))
    sha.update(f"{classes} {source.checksum(labels)}".encode())
    return sha.hexdigest()
