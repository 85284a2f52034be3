"""Reads and checks the stored weights of a run's training examples."""

import dataclasses
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.core.errors import UserError
from distill_jax.evaluators import trust
from distill_jax.evaluators._logits import log_softmax
from distill_jax.report.folders import Run, lookup

FLAGS = {
    "teacher_shift": ("teacher intact", "teacher damaged"),
    "label_noisy": ("clean label", "changed label"),
    "outlier": ("usual example", "outlier"),
}
"""Flags of faulty examples, with the names of the clean and the faulty group."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """The arrays of trust.npz, checked: n training examples, s loss terms, k classes.

    Attributes:
      label: label of the run.
      classes: k names.
      metrics: metrics of `evaluators.trust`, and the mean weight of every loss term.
      ratio, margin: `[n]`.
      answers: (top class, its probability) `[n]` of the student and of the teacher.
      labels, index: `[n]`.
      flags: bool `[n]` by name.
      images: (rows, uint8 `[m, h, w, c]`) of the lowest and the highest ratios, if stored.
      control: modification of the weights before their use; empty for none.
    """

    label: str
    classes: Sequence[str]
    metrics: Mapping[str, float]
    ratio: np.ndarray
    margin: np.ndarray
    answers: Mapping[str, tuple[np.ndarray, np.ndarray]]
    labels: np.ndarray
    index: np.ndarray
    flags: Mapping[str, np.ndarray]
    images: Mapping[str, tuple[np.ndarray, np.ndarray]]
    control: str

    @classmethod
    def read(cls, run: Run) -> "StoredWeights":
        """Reads the arrays of a run; raises ValueError if they are invalid."""
        try:
            with np.load(run.path / "trust.npz", allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            metrics = trust.make()({"example_weights": arrays}, arrays)
            labels = arrays["label"].astype(np.int64)
            index, weights = arrays["index"], arrays["weights"].astype(np.float64)
            if index.shape != labels.shape:
                raise ValueError(f"index has shape {index.shape}")
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing") from error
        except (UserError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(str(error)) from error
        names = [str(name) for name in np.ravel(arrays.get("signals", ()))]
        if len(names) != weights.shape[1]:
            names = [str(i) for i in range(weights.shape[1])]
        means = zip(names, weights.mean(axis=0), strict=True)
        student, teacher = (arrays[role].astype(np.float64) for role in ("student", "teacher"))
        flags = {name: trust.read_flag(arrays, name, len(labels)) for name in FLAGS}
        control = str(lookup(run.config, "weighting.control") or "")
        return cls(
            label=run.label,
            classes=run.class_names(teacher.shape[1]),
            metrics={**metrics, **{f"mean weight of {n}": float(mean) for n, mean in means}},
            ratio=trust.teacher_share(weights),
            margin=trust.teacher_margin(teacher, labels),
            answers={"student": _answer(student), "teacher": _answer(teacher)},
            labels=labels,
            index=index,
            flags={name: flag for name, flag in flags.items() if flag is not None},
            images=_images(arrays, len(labels)),
            control=control if control in ("shuffled", "batch_mean") else "",
        )

    @property
    def right(self) -> np.ndarray:
        return self.answers["teacher"][0] == self.labels


def _answer(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the top class and its probability `[n]`."""
    return logits.argmax(axis=1), np.exp(log_softmax(logits).max(axis=1))


def _images(arrays: Mapping[str, Any], n: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns stored rows and images of matching lengths."""
    images_by_name = {}
    for name in ("low", "high"):
        rows, images = arrays.get(name), arrays.get(f"{name}_images")
        if rows is None or images is None or rows.dtype.kind not in "iu" or rows.ndim != 1:
            continue
        fits = images.ndim == 4 and images.dtype == np.uint8 and len(images) == len(rows) > 0
        if fits and rows.min() >= 0 and rows.max() < n:
            images_by_name[name] = rows, images
    return images_by_name
