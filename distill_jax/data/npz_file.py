"""Arrays in a `.npz` file, or in a folder of `.npy` files that are mapped rather than loaded.

Keys (file stems in a folder): `x_train` `[n, ...]`, `y_train` `[n]`, `x_test`, `y_test`. `x` holds
uint8 images `[n, h, w, c]` (or `[n, c, h, w]`, with `layout="chw"`) or `[n, h, w]`, or float
features `[n, ...]`; `y` holds integers from 0, or labels of another `task` (`data.labels`).
`p_train` `[n, k]` may hold soft labels: distributions over the classes, which label losses read in
place of `y_train`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill_jax.core.api import Dataset
from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.data import checks, source

KEYS = ("x_train", "y_train", "x_test", "y_test")
SOFT = "p_train"
HINT = f"put a .npz file with {', '.join(KEYS)} there, or a folder with {KEYS[0]}.npy and so on"


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the four arrays, and `p_train` where there is one; those of a folder are mapped.

    Raises:
      DataUnavailable: an array is missing or the file cannot be read (pickled objects are refused).
    """
    one = DataUnavailable(
        "is one array, and four are read", where=str(path), hint=f"name its folder: {HINT}"
    )
    if path.suffix == ".npy" and path.is_file():
        raise one
    if path.is_dir():
        names, arrays = [file.stem for file in path.glob("*.npy")], {}
        for key in (*KEYS, SOFT):
            if key in names:
                with source.reading(path / f"{key}.npy", hint=HINT):
                    arrays[key] = np.load(path / f"{key}.npy", mmap_mode="r")
    else:
        with source.reading(path, hint=HINT):
            archive = np.load(path)
            if isinstance(archive, np.ndarray):
                raise one
            with archive:
                names = archive.files
                arrays = {key: archive[key] for key in names if key in (*KEYS, SOFT)}
    for key in KEYS:
        if key not in arrays:
            hint = checks.missing_array(key, names, KEYS)
            raise DataUnavailable(f"no {key}", where=str(path), hint=hint)
    return arrays


def make(
    *,
    path: str,
    name: str = "",
    licence: str = "",
    classes: Sequence[str] = (),
    held_out: float = 0.1,
    split_seed: int = 0,
    layout: str = "hwc",
    task: str = "classification",
    ignore_label: float | str | None = None,
) -> Dataset:
    """Reads arrays from a file or a folder (see the module for keys and shapes).

    All bytes are hashed once for the provenance, about a second a gigabyte; for a folder of more
    than 2 GB the names, sizes and times of the files are hashed instead.

    Args:
      path: the `.npz` file or the folder.
      name: name in the provenance; the file's name by default.
      licence: licence of the data, for the provenance.
      classes: class names in label order, or one string with commas between; by default numbers.
        Of another task, the names of the columns of `y`.
      held_out: share of the training part held out.
      split_seed: seed of that split.
      layout: order of the axes of images: "hwc", or "chw" as PyTorch has it.
      task: "classification", "multilabel" or "regression".
      ignore_label: the value of `y` that stands for an unknown label, such as -1 or "nan". Such
        examples have no label loss and count in no metric; the teacher is still evaluated on them.

    Raises:
      ArgumentError: an unknown task, or soft labels of another task than classification.
      DataUnavailable: nothing there, an array missing, or a wrong shape or dtype.
    """
    file = source.existing(path, hint=HINT)
    arrays = read_arrays(file)
    if file.is_dir():
        sha256 = source.manifest(file / f"{key}.npy" for key in arrays)
    else:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    soft = {"train": arrays.get(SOFT), "test": None}
    if soft["train"] is not None:
        if task != "classification":
            hint = "soft labels are distributions over classes: leave p_train out"
            raise ArgumentError(f"{SOFT} with the task {task}", where="task", hint=hint)
        labels, k = np.asarray(arrays["y_test"]), soft["train"].shape[-1]
        soft["test"] = np.asarray(labels.reshape(-1, 1) == np.arange(k), np.float32)
    train, test = (
        source.make_array_source(
            arrays[f"x_{part}"],
            arrays[f"y_{part}"],
            name=f"{name or file.stem} ({part})",
            origin=str(path),
            licence=licence,
            sha256=sha256,
            layout=layout,
            task=task,
            ignore_label=ignore_label,
            label_probs=soft[part],
        )
        for part in ("train", "test")
    )
    return source.make_dataset(
        train, test, held_out=held_out, split_seed=split_seed, classes=classes, task=task
    )
