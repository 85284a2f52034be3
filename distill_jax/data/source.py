"""Sources of examples on the host: arrays, subsets, stratified splits."""

import contextlib
import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax.core.api import Dataset, Provenance, PyTree, Source
from distill_jax.core.errors import ArgumentError, DataUnavailable, nearest, text_of
from distill_jax.data import checks
from distill_jax.data import labels as labels_lib
from distill_jax.data.moments import example_array

LAYOUTS = ("hwc", "chw")
"""Orders of the axes of images in files."""


def checksum(arrays: PyTree) -> str:
    """Returns the sha256 of a pytree of arrays: paths, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.ascontiguousarray(array)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}\n".encode())
        sha.update(array.view(np.uint8).data if array.size else b"")
    return sha.hexdigest()


WHOLE_BYTES = 2 * 10**9
"""Files that are larger in all are not read for their checksum."""


def manifest(files: Iterable[Path]) -> str:
    """Returns the sha256 of names, sizes and times of modification of files, in their order.

    It detects replaced files, not flipped bits. Empty for files of at most `WHOLE_BYTES` in all,
    whose content can be hashed.
    """
    stats = [(path.name, path.stat()) for path in files]
    if sum(stat.st_size for _, stat in stats) <= WHOLE_BYTES:
        return ""
    rows = [f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in stats]
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def files_checksum(files: Iterable[Path]) -> str:
    """Returns the sha256 of files in their order: of their bytes, or of their `manifest`."""
    files = list(files)
    if checksum_of_list := manifest(files):
        return checksum_of_list
    sha = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


class ArraySource:
    """Examples held in host memory (or in memory-mapped files).

    Args:
      inputs: an array `[n, ...]` or a dict of them; images are uint8 `[n, h, w, c]`.
      labels: integers `[n]`, or labels of another `task`.
      provenance: where the arrays came from; its `n` must be their length.
      task: what labels are; see `data.labels`.
      ignore_label: the value that stands for an unknown label; examples then have `labelled`.
      more: other arrays `[n, ...]` of the examples, by their names in a batch.

    Attributes:
      notes: notes on data left out when reading, one line each; a run shows them as warnings.

    Raises:
      DataUnavailable: labels that are not of the task, see `labels.read_labels`.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        inputs: Any,
        labels: np.ndarray,
        provenance: Provenance,
        *,
        task: str = "classification",
        ignore_label: Any = None,
        more: Mapping[str, np.ndarray] | None = None,
    ):
        lengths = {len(leaf) for leaf in jax.tree.leaves((inputs, labels, dict(more or {})))}
        if lengths != {provenance.n}:
            raise ValueError(f"arrays of lengths {sorted(lengths)} in a source of {provenance.n}")
        labels, soft = labels_lib.read_soft(labels, task, where=provenance.origin)
        self.inputs, self.provenance, self.more = inputs, provenance, {**(more or {}), **soft}
        self.labels, labelled = labels_lib.read_labels(
            labels,
            task=task,
            ignore_label=ignore_label,
            name=provenance.name,
            where=provenance.origin,
        )
        if labelled is not None:
            self.more["labelled"] = labelled

    def __len__(self) -> int:
        return self.provenance.n

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns `input` `[b, ...]`, `label` `[b]` or `[b, m]` and more of those at `indices`."""
        return {
            "input": jax.tree.map(lambda leaf: np.asarray(leaf[indices]), self.inputs),
            "label": self.labels[indices],
            **{name: array[indices] for name, array in self.more.items()},
        }


class Subset:
    """Some examples of another source, in the given order.

    `read` and `len` count positions in the subset. The id of an example, which a batch carries as
    `index`, stays its position in the source at the root of the chain: data stored per example
    (teacher logits, weights) stay valid when the split changes, and so does augmentation, which is
    keyed on ids.

    Args:
      source: the parent.
      indices: int `[m]`, positions in the parent.
      name: appended to the parent's name in the provenance, whose sha256 becomes that of the
        parent's digest followed by `indices` as little-endian int64.
    """

    def __init__(self, source: Source, indices: np.ndarray, name: str):
        self.source, self.indices = source, np.asarray(indices, np.int64)
        self.ids = example_ids(source)[self.indices]
        parent = source.provenance
        sha = hashlib.sha256(parent.sha256.encode() + self.indices.astype("<i8").tobytes())
        self.provenance = parent._replace(
            name=f"{parent.name}, {name}", n=len(self.indices), sha256=sha.hexdigest()
        )

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        """Labels of these examples, as of the parent."""
        return example_labels(self.source)[self.indices]

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns the examples at positions `indices` `[b]` of the subset."""
        return self.source.read(self.indices[indices])


class Joined:
    """The examples of one source, then those of another of the same root.

    Args:
      source: the first.
      other: the second; its examples have the same keys.
    """

    def __init__(self, source: Source, other: Source):
        self.source, self.other = source, other
        self.ids = np.concatenate([example_ids(source), example_ids(other)])
        one, two = source.provenance, other.provenance
        sha = hashlib.sha256(f"{one.sha256} and {two.sha256}".encode()).hexdigest()
        name = f"{one.name}, and {two.n} of {two.name}"
        self.provenance = one._replace(name=name, n=len(self.ids), sha256=sha)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> np.ndarray:
        """Labels of these examples."""
        return np.concatenate([example_labels(self.source), example_labels(self.other)])

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns the examples at positions `indices` `[b]`."""
        indices, n = np.asarray(indices), len(self.source)
        later = indices >= n
        if not later.any():
            return self.source.read(indices)
        here = self.source.read(np.where(later, 0, indices))
        there = self.other.read(np.where(later, indices - n, 0))

        def pick(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.where(later.reshape(-1, *[1] * (np.ndim(a) - 1)), b, a)

        return jax.tree.map(pick, dict(here), {key: there[key] for key in here})


def example_ids(source: Source) -> np.ndarray:
    """Returns int32 `[n]`: what batches of `source` carry as `index` (see `Subset`)."""
    ids = getattr(source, "ids", None)
    return np.arange(len(source), dtype=np.int32) if ids is None else ids


def example_labels(source: Source, *, chunk: int = 4096) -> np.ndarray:
    """Returns all labels, int32 `[n]` or float32 `[n, m]`.

    Sources without a `labels` attribute are read in chunks.
    """
    labels = getattr(source, "labels", None)
    if labels is not None:
        return labels
    found = example_array(source, "label", chunk=chunk)
    return np.zeros(0, np.int32) if found is None else found


def split_held_out(source: Source, *, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Splits a source into a training and a held-out part, class by class.

    Each class gives `fraction` of its examples, rounded half up, drawn by a generator that depends
    on `seed` and the label alone. Several labels of an example are stratified too, see
    `labels.stratified`. Real values form one class. Both parts keep the order of the source.

    Args:
      source: labelled examples.
      fraction: share held out, in [0, 1). With 0 the held-out part is empty, and there are no
        examples to select a model on.
      seed: any non-negative integer.

    Raises:
      ArgumentError: a fraction outside [0, 1), or one that leaves a part empty.
    """
    if not 0 <= fraction < 1:
        raise ArgumentError(f"held_out is {fraction}", where="held_out", hint="0 <= x < 1")
    labels = example_labels(source)
    held = np.zeros(len(source), bool)
    if labels.ndim == 2 and labels.shape[1] > 1 and np.isin(labels, (0, 1)).all():
        held = labels_lib.stratified(labels > 0, fraction=fraction, seed=seed)
        labels = labels[:0, 0]
    elif labels.ndim != 1 or labels.dtype.kind == "f":
        labels = np.zeros(len(source), np.int32)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        generator = np.random.Generator(np.random.Philox(key=[seed, int(label)]))
        count = int(fraction * len(members) + 0.5)
        held[generator.permutation(members)[:count]] = True
    if fraction > 0 and (held.all() or not held.any()):
        raise ArgumentError(
            f"held_out {fraction} of {len(source)} examples leaves a part empty",
            where="held_out",
        )
    return (
        Subset(source, np.flatnonzero(~held), f"less held out {fraction:g} (seed {seed})"),
        Subset(source, np.flatnonzero(held), f"held out {fraction:g} (seed {seed})"),
    )


def split_outer(dataset: Dataset, *, share: float, seed: int) -> Dataset:
    """Returns the data set with a share of its held-out part for outer losses.

    The rest of the held-out part is used to choose checkpoints, constants and hyperparameters.
    Selection on the examples that a weighting has learned from would favour the weighting that fits
    those examples best. The split is stratified, see `split_held_out`.

    Args:
      dataset: without an outer part.
      share: of the held-out examples, in [0, 1); 0 leaves the data set as it is.
      seed: any non-negative integer.

    Raises:
      ArgumentError: a share outside [0, 1), or of too few examples.
    """
    if share == 0:
        return dataset
    if not 0 <= share < 1 or not len(dataset.held_out):
        raise ArgumentError(
            f"outer is {share} of {len(dataset.held_out)} held-out examples",
            where="outer",
            hint="0 <= x < 1, with held_out above 0",
        )
    try:
        held, outer = split_held_out(dataset.held_out, fraction=share, seed=seed)
    except ArgumentError:
        raise ArgumentError(
            f"{share:g} of {len(dataset.held_out)} held-out examples leaves a part empty",
            where="outer",
            hint="enlarge held_out, or set outer to 0, which gives both uses to all of them",
        ) from None
    return dataset._replace(held_out=held, outer=outer)


def first(dataset: Dataset, n: int) -> Dataset:
    """Returns a data set with at most n examples in each part, drawn evenly; 0 keeps all."""

    def part(whole: Source) -> Source:
        if not 0 < n < len(whole):
            return whole
        some = np.sort(
            np.random.Generator(np.random.Philox(key=[0, n])).permutation(len(whole))[:n]
        )
        return Subset(whole, some, f"{n} examples")

    return dataset._replace(**{name: part(whole) for name, whole in dataset.parts.items()})


def make_dataset(
    train: Source,
    test: Source,
    *,
    held_out: float,
    split_seed: int,
    classes: Sequence[str] = (),
    cardinalities: Sequence[int] = (),
    task: str = "classification",
    held: np.ndarray | None = None,
) -> Dataset:
    """Returns the three parts of a data set; the share `held_out` of `train` is split off.

    Without class names they are the label numbers; a string of names is split at its commas. A
    table states the `cardinalities` of its categorical columns. For tasks other than
    classification, `classes` are the names of the columns of labels. A source with a given held-out
    part marks its training examples by `held`, bool `[n]`.

    Raises:
      ArgumentError: see `split_held_out`, `checks.class_names` and `labels.output_names`.
      DataUnavailable: labels without names that are not 0 to k - 1, see `checks.count_classes`.
    """
    labels_lib.check_task(task)
    if task != "classification":
        if isinstance(classes, str):
            classes = [name.strip() for name in classes.split(",")] if classes else ()
        classes = labels_lib.output_names(example_labels(train), classes, task=task)
    classes = checks.class_names(classes)
    if not classes:
        labels = {"train": example_labels(train), "test": example_labels(test)}
        k = checks.count_classes(labels, where=train.provenance.origin or "data")
        classes = [str(label) for label in range(k)]
    if held is None:
        train, apart = split_held_out(train, fraction=held_out, seed=split_seed)
    else:
        apart = Subset(train, np.flatnonzero(held), "held out")
        train = Subset(train, np.flatnonzero(~held), "less held out")
    return Dataset(
        train=train,
        held_out=apart,
        test=test,
        classes=tuple(classes),
        cardinalities=tuple(cardinalities),
        task=task,
    )


def make_array_source(
    inputs: Any,
    labels: Any,
    *,
    name: str,
    origin: str,
    licence: str = "",
    sha256: str = "",
    layout: str = "hwc",
    task: str = "classification",
    ignore_label: Any = None,
    label_probs: Any = None,
) -> ArraySource:
    """Checks arrays that came from outside and wraps them.

    Args:
      inputs: uint8 images `[n, h, w, c]` or `[n, h, w]` (one channel is appended), or float
        features `[n, ...]`.
      labels: integers `[n]`, at least 0; floats and truth values where they are whole numbers. Of
        another task see `labels.read_labels`.
      name: accurate name of the part, e.g. "MNIST (train)".
      origin: path or package; also names the place in error messages.
      licence: SPDX identifier or short name.
      sha256: digest of the file; computed from the arrays where it is not given.
      layout: order of the axes of images: "hwc", or "chw" of `[n, c, h, w]`.
      task: what labels are; see `data.labels`.
      ignore_label: the value that stands for an unknown label.
      label_probs: soft labels `[n, k]`, which label losses read in place of the labels.

    Raises:
      DataUnavailable: wrong dtype, rank or length, negative labels, or channels that do not match
        the layout.
      ArgumentError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ArgumentError(f"layout is {layout!r}", where="layout", hint=nearest(layout, LAYOUTS))

    def refuse(what: str, hint: str) -> DataUnavailable:
        return DataUnavailable(f"{name}: {what}", where=origin, hint=hint)

    given = np.asarray(labels)
    labels, labelled = labels_lib.read_labels(
        given, task=task, ignore_label=ignore_label, name=name, where=origin
    )
    if len(inputs) != len(labels):
        raise refuse(f"{len(inputs)} inputs but {len(labels)} labels", "one label per input")
    if not len(labels):
        raise refuse("no examples", "at least one example is expected")
    if task == "classification" and labels.min() < 0:
        hint = "labels count from 0"
        if ignore_label is None:
            hint += f"; ignore_label={labels.min()}, where that stands for an unknown label"
        raise refuse(f"the smallest label is {labels.min()}", hint)
    if inputs.ndim == 1:
        raise refuse(f"inputs are {list(inputs.shape)}", "one feature is x[:, None], of [n, 1]")
    if not inputs.dtype.isnative:
        inputs = inputs.astype(inputs.dtype.newbyteorder("="))
    image = inputs.dtype == np.uint8 and inputs.ndim in (3, 4)
    if not image and not np.issubdtype(inputs.dtype, np.floating):
        raise refuse(
            f"inputs are {inputs.dtype} {list(inputs.shape)}",
            "uint8 images [n, h, w, c] or [n, h, w], or float features [n, ...] are expected",
        )
    if layout == "chw":
        if inputs.ndim != 4:
            raise refuse(f"inputs are {list(inputs.shape)}", "the layout chw is of [n, c, h, w]")
        inputs = inputs.transpose(0, 2, 3, 1)
    if image and inputs.ndim == 3:
        inputs = inputs[..., None]
    checks.check_layout(inputs.shape, inputs.dtype, name=name, where=origin)
    sha256 = sha256 or checksum({"input": inputs, "label": given})
    more = {} if labelled is None else {"labelled": labelled}
    if label_probs is not None:
        more["label_probs"] = labels_lib.read_label_probs(label_probs, n=len(labels), where=origin)
    provenance = Provenance(name, origin, len(labels), sha256, licence)
    return ArraySource(inputs, labels, provenance, task=task, more=more)


@contextlib.contextmanager
def reading(path: str | Path, *, hint: str = "") -> Iterator[None]:
    """Converts any error that a library raises about a file's content into one that names the file.

    Args:
      path: the file.
      hint: the expected content.

    Raises:
      DataUnavailable: the file cannot be read, or is of another format.
    """
    try:
        yield
    except (
        *(OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, RuntimeError),
        *(MemoryError, OverflowError, SyntaxError, zlib.error, zipfile.BadZipFile),
    ) as error:
        what = text_of(error) or type(error).__name__
        raise DataUnavailable(f"cannot be read: {what}", where=str(path), hint=hint) from error


def existing(path: str | Path, *, hint: str) -> Path:
    """Returns `path` with `~` expanded.

    Raises:
      DataUnavailable: nothing is there; `hint` explains what to install or put there.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataUnavailable("no such file or folder", where=str(path), hint=hint)
    return path
