"""Known faults added to a data set, to test whether a method detects them.

What happens to an example is a function of the seed and the example's id (`source.example_ids`): it
depends neither on the split nor on the order, and the examples hit at a smaller share are among
those hit at a larger one. Flags of the examples record the faults applied to them.
"""

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax.core.api import Dataset, Source
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.data.source import Joined, Subset, example_ids, example_labels, split_held_out

WHERE = "corrupt"
KINDS = {"label_noise": ("uniform", "pair"), "teacher_damage": ("random", "class")}
OUTER_USES = ("", "added", "alone")


class Corrupted:
    """A source with one additional flag, and optionally other labels and noise images at its end.

    Args:
      source: the parent, m examples.
      key: name of the flag in a batch.
      flag: numbers `[n]`, n >= m; examples beyond m are added.
      labels: int32 `[n]`; by default the parent's.
      ids: int32 `[n]`; by default the parent's.
      seed: of the noise images (see `noise_images`).
      title: description of the change, appended to the parent's name in the provenance, whose
        sha256 becomes that of the parent's digest followed by the title. Without a title the
        provenance stays the parent's.
    """

    def __init__(
        self,
        source: Source,
        *,
        key: str,
        flag: np.ndarray,
        labels: np.ndarray | None = None,
        ids: np.ndarray | None = None,
        seed: int = 0,
        title: str = "",
    ):
        self.source, self.key, self.flag, self.seed = source, key, flag, seed
        self.labels = np.asarray(example_labels(source) if labels is None else labels, np.int32)
        self.ids = example_ids(source) if ids is None else ids
        self.provenance = source.provenance
        if title:
            sha = hashlib.sha256(f"{self.provenance.sha256}{title}".encode()).hexdigest()
            self.provenance = self.provenance._replace(
                name=f"{self.provenance.name}, {title}", n=len(flag), sha256=sha
            )

    def __len__(self) -> int:
        return len(self.flag)

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns `input` `[b, ...]`, `label` and the flag `[b]` of the examples at `indices`.

        Other entries of the parent's batch are 0 for added examples.
        """
        added = np.asarray(indices) >= len(self.source)
        rows = dict(self.source.read(np.where(added, 0, indices)))
        if added.any():
            rows = jax.tree.map(np.array, rows)
            for leaf in jax.tree.leaves(rows):
                leaf[added] = 0
            shape = rows["input"].shape[1:]
            rows["input"][added] = noise_images(
                self.ids[indices][added], shape=shape, seed=self.seed
            )
        return {**rows, "label": self.labels[indices], self.key: self.flag[indices]}


def inputs_of(source: Source) -> Source:
    """Returns the source of the same inputs in the same order, without faults of labels alone."""
    while isinstance(source, Corrupted) and len(source) == len(source.source):
        source = source.source
    return source


def _philox(seed: int, purpose: str, stream: int = 0) -> np.random.Generator:
    key = [seed, zlib.crc32(purpose.encode())]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


def draws(ids: np.ndarray, *, seed: int, purpose: str) -> np.ndarray:
    """Returns two numbers in [0, 1) for each of `ids` `[n]`, float64 `[n, 2]`.

    Those of id i are the i-th pair of the stream of (seed, purpose), whatever the other ids.
    """
    return _philox(seed, purpose).random((int(ids.max(initial=-1)) + 1, 2))[ids]


def _shifts(ids: np.ndarray, share: float, top: int, *, seed: int, purpose: str) -> np.ndarray:
    """int32 `[n]`: uniform on 1..top with probability `share`, else 0."""
    chosen, size = draws(ids, seed=seed, purpose=purpose).T
    return np.where(chosen < share, 1 + size * top, 0).astype(np.int32)


def noise_images(ids: np.ndarray, *, shape: Sequence[int], seed: int) -> np.ndarray:
    """Returns Gaussian noise, uint8 `[n, *shape]`; each image is a function of (seed, id).

    Pixels are independent with mean 0.5 and variance 1, clipped to [0, 1], in 256 grey levels (Hu
    et al. 2024, section 4.4, arXiv:2312.15112).
    """
    images = np.empty((len(ids), *shape), np.uint8)
    for image, number in zip(images, ids.tolist(), strict=True):
        pixels = 0.5 + _philox(seed, "outlier image", number).standard_normal(shape)
        image[...] = np.rint(255 * np.clip(pixels, 0, 1))
    return images


def _map_parts(dataset: Dataset, one: Callable[[str, Source], Source]) -> Dataset:
    return dataset._replace(**{name: one(name, part) for name, part in dataset.parts.items()})


def _damage_teacher(dataset: Dataset, share: float, kind: str, seed: int) -> Dataset:
    k = len(dataset.classes)
    count = max(1, round(share * k))
    classes = _philox(seed, "teacher, classes").permutation(k)[:count]
    of_class = np.zeros(k, np.int32)
    of_class[classes] = _shifts(classes, 1, k - 1, seed=seed, purpose="teacher, shift of class")

    def one(part: str, source: Source) -> Source:
        if kind == "class":
            shift, whom = of_class[example_labels(source)], f"{count} of {k} classes"
        else:
            # Training and held-out examples have ids of one root, test examples of another.
            purpose = "teacher, test" if part == "test" else "teacher, train"
            shift = _shifts(example_ids(source), share, k - 1, seed=seed, purpose=purpose)
            whom = f"{100 * share:.15g}% of examples"
        title = f"teacher damaged on {whom} (seed {seed})"
        return Corrupted(source, key="teacher_shift", flag=shift, title=title)

    return _map_parts(dataset, one)


def _change_labels(dataset: Dataset, share: float, kind: str, seed: int) -> Dataset:
    k = len(dataset.classes)
    top = 1 if kind == "pair" else k - 1
    title = f"{100 * share:.15g}% {kind} label noise (seed {seed})"

    def one(part: str, source: Source) -> Source:
        if part != "train":
            return Corrupted(source, key="label_noisy", flag=np.zeros(len(source), np.int32))
        shift = _shifts(example_ids(source), share, top, seed=seed, purpose="label")
        labels = (example_labels(source) + shift) % k
        noisy = (shift > 0).astype(np.int32)
        return Corrupted(source, key="label_noisy", flag=noisy, labels=labels, title=title)

    return _map_parts(dataset, one)


def _add_outliers(dataset: Dataset, share: float, seed: int) -> Dataset:
    n = len(dataset.train)
    count = round(share * n)
    rooted = [part for name, part in dataset.parts.items() if name != "test"]
    top = max(int(example_ids(part).max(initial=-1)) for part in rooted)
    ids = np.arange(top + 1, top + 1 + count, dtype=np.int32)
    label = draws(ids, seed=seed, purpose="outlier label")[:, 0] * len(dataset.classes)

    def one(part: str, source: Source) -> Source:
        if part != "train":
            return Corrupted(source, key="outlier", flag=np.zeros(len(source), np.int32))
        return Corrupted(
            source,
            key="outlier",
            flag=np.repeat(np.array([0, 1], np.int32), [n, count]),
            labels=np.concatenate([example_labels(source), label.astype(np.int32)]),
            ids=np.concatenate([example_ids(source), ids]),
            seed=seed,
            title=f"{count} noise images added (seed {seed})",
        )

    return _map_parts(dataset, one)


def _hide_labels(
    dataset: Dataset, per_class: int, percent: float, seed: int, *, drop: bool
) -> Dataset:
    train = dataset.train
    labels, ids = example_labels(train), example_ids(train)
    real = np.ones(len(train), bool)
    if isinstance(train, Corrupted) and train.key == "outlier":
        real = train.flag == 0
    order, shown = draws(ids, seed=seed, purpose="label shown")[:, 0], np.zeros(len(train), bool)
    for label in range(len(dataset.classes)):
        members = np.flatnonzero((labels == label) & real)
        count = per_class or max(1, round(percent / 100 * len(members)))
        shown[members[np.argsort(order[members])[:count]]] = True
    title = f"{per_class} labels a class" if per_class else f"{percent:.15g}% of labels"
    title += f" (seed {seed})"
    if drop:
        return dataset._replace(train=Subset(train, np.flatnonzero(shown), title))

    def one(part: str, source: Source) -> Source:
        if part != "train":
            return Corrupted(source, key="labelled", flag=np.ones(len(source), np.float32))
        flag = np.where(shown, len(shown) / shown.sum(), 0).astype(np.float32)
        return Corrupted(source, key="labelled", flag=flag, title=title)

    return _map_parts(dataset, one)


def _imbalance(dataset: Dataset, ratio: float, seed: int) -> Dataset:
    train = dataset.train
    labels, k = example_labels(train), len(dataset.classes)
    order = draws(example_ids(train), seed=seed, purpose="imbalance")[:, 0]
    kept = []
    for label in range(k):
        members = np.flatnonzero(labels == label)
        count = max(1, round(len(members) * ratio ** (-label / (k - 1))))
        kept.append(members[np.argsort(order[members])[:count]])
    title = f"classes imbalanced {ratio:.15g} to 1 (seed {seed})"
    return dataset._replace(train=Subset(train, np.sort(np.concatenate(kept)), title))


def _train_on_held_out(dataset: Dataset, share: float, seed: int) -> Dataset:
    """The examples used for training are no longer held out and are not used for selection."""
    held = dataset.held_out
    if share == 1:
        every = np.arange(len(held))
        train, held = Subset(held, every, "all of it"), Subset(held, every[:0], "nothing left")
    else:
        held, train = split_held_out(held, fraction=share, seed=seed)
    return dataset._replace(train=train, held_out=held)


def _train_on_outer(dataset: Dataset, use: str) -> Dataset:
    """The examples used for training are removed from the outer part."""
    outer = dataset.outer
    if use not in OUTER_USES or outer is None or not len(outer):
        found = "there is no outer part" if use in OUTER_USES else f"unknown use {use!r}"
        hint = "set data.outer" if use in OUTER_USES else nearest(use, OUTER_USES[1:])
        raise ArgumentError(found, where=f"{WHERE}.train_on_outer", hint=hint)
    train = Joined(dataset.train, outer) if use == "added" else outer
    nothing = Subset(outer, np.zeros(0, np.int64), "nothing left")
    return dataset._replace(train=train, outer=nothing)


def _check(
    dataset: Dataset,
    shares: Mapping[str, float],
    kinds: Mapping[str, str],
    labels_per_class: int,
    labels_percent: float,
    drop_unlabelled: bool,
    seed: int,
) -> None:
    for key, share in shares.items():
        if not 0 <= share < 1:
            raise ArgumentError(f"{key} is {share}", where=f"{WHERE}.{key}", hint="0 <= x < 1")
    for key, kind in kinds.items():
        if kind not in KINDS[key]:
            hint = nearest(kind, KINDS[key])
            raise ArgumentError(f"unknown kind {kind!r}", where=f"{WHERE}.{key}_kind", hint=hint)
    if labels_per_class < 0:
        what, where = f"labels_per_class is {labels_per_class}", f"{WHERE}.labels_per_class"
        raise ArgumentError(what, where=where, hint="at least 0")
    if not 0 <= labels_percent <= 100:
        what, where = f"labels_percent is {labels_percent}", f"{WHERE}.labels_percent"
        raise ArgumentError(what, where=where, hint="0 <= x <= 100")
    if labels_per_class and labels_percent:
        raise ArgumentError(
            "labels are kept by number and by share",
            where=f"{WHERE}.labels_percent",
            hint="set one of labels_per_class and labels_percent to 0",
        )
    if drop_unlabelled and not labels_per_class and not labels_percent:
        raise ArgumentError(
            "all examples have labels",
            where=f"{WHERE}.drop_unlabelled",
            hint="set labels_per_class or labels_percent",
        )
    if seed < 0:
        raise ArgumentError(f"seed is {seed}", where=f"{WHERE}.seed", hint="at least 0")
    active = [key for key, share in shares.items() if share]
    if not active:
        return
    k = len(dataset.classes)
    top = max(int(example_labels(part).max(initial=0)) for part in dataset.parts.values())
    if k < 2 or top >= k:
        raise ArgumentError(
            f"the data have {k} classes" + (f" and a label {top}" if k > 1 else ""),
            where=f"{WHERE}.{active[0]}",
            hint="0, or data with at least 2 classes, all of them named",
        )
    if shares["outliers"]:
        images = dataset.train.read(np.zeros(1, np.int64))["input"]
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
            raise ArgumentError(
                "the inputs are not images, so there are no noise images like them",
                where=f"{WHERE}.outliers",
                hint="0, or inputs that are uint8 [h, w, c]",
            )


def _check_task(dataset: Dataset, faults: Mapping[str, float]) -> None:
    """Raises an error for faults of classes where labels are not classes, or some are unknown."""
    active = [key for key, share in faults.items() if share > 0]
    if not active:
        return
    if dataset.task != "classification":
        raise ArgumentError(
            f"{active[0]} is of data with one class for each example, and the task of these data "
            f"is {dataset.task}",
            where=f"{WHERE}.{active[0]}",
            hint="leave it out",
        )
    if "labelled" in dataset.train.read(np.zeros(1, np.int64)):
        raise ArgumentError(
            f"{active[0]} goes by the labels of all examples, and some are unknown",
            where=f"{WHERE}.{active[0]}",
            hint="leave it out, or ignore_label",
        )


def corrupt(
    dataset: Dataset,
    *,
    label_noise: float = 0.0,
    label_noise_kind: str = "uniform",
    teacher_damage: float = 0.0,
    teacher_damage_kind: str = "random",
    outliers: float = 0.0,
    imbalance: float = 1.0,
    labels_per_class: int = 0,
    labels_percent: float = 0.0,
    drop_unlabelled: bool = False,
    train_on_held_out: float = 0.0,
    train_on_outer: str = "",
    seed: int = 0,
) -> Dataset:
    """Returns the data set with the faults whose share is above 0; without any, `dataset` itself.

    Each fault adds an int32 key to the examples of all parts:

    * `label_noisy`: 1 where the label was changed, in the training part alone.
    * `teacher_shift`: s in 0..k-1; the teacher's logits are rolled by s along the classes, so that
      class c gets the logit of class c - s. 0 leaves the logits unchanged.
    * `outlier`: 1 on noise images (see `noise_images`) with uniformly random labels, which follow
      the examples of the training part. Their ids are above all others; their other flags are 0.
    * `labelled`, float32: 0 on training examples whose label no method may use, and n / m on the m
      of n others, so that the mean over a batch is on average that over labelled examples. Noise
      images are never labelled. 1 in the other parts.

    A part whose examples do not change keeps its provenance.

    Args:
      dataset: of k classes; its training and held-out parts are from one root.
      label_noise: share of training examples with a wrong label; each is hit independently.
      label_noise_kind: "uniform", any other class; "pair", class c becomes c + 1 modulo k.
      teacher_damage: share of examples, or of classes, for which the teacher is damaged.
      teacher_damage_kind: "random", each example independently, with a shift uniform on 1..k-1;
        "class", all examples whose clean label is among round(share * k) classes, at least one,
        each class with one shift.
      outliers: number of noise images, as a share of the training examples; rounded.
      imbalance: largest over smallest share of a class that the training part keeps: class c of k
        keeps the share `imbalance^(-c / (k - 1))` (Cui et al. 2019, arXiv:1901.05555, section 5).
      labels_per_class: how many training examples of each class keep their label, where it has so
        many; 0 for all. The examples of a smaller number are a subset of those of a larger one.
      labels_percent: the same as a share of each class, in percent, of at least one example.
      drop_unlabelled: whether the training part consists of the labelled examples only, without the
        key `labelled`: for fine-tuning and for baselines trained on labelled examples only.
      train_on_held_out: share of the held-out part, class by class, that replaces the training
        part: for baselines of methods that learn from held-out examples. The rest stays held out;
        with 1 nothing remains, and `eval.metric` must be empty.
      train_on_outer: the same for the outer part (`data.outer`): "alone" trains on it instead of
        the training part; "added" joins it to the training part, without the faults of training
        examples. The held-out part does not change, so that all methods use the same examples for
        selection.
      seed: any non-negative integer; "run" in a config stands for the seed of the run.

    Raises:
      ArgumentError: a share outside [0, 1), an unknown kind, a negative seed, fewer than 2 classes,
        an imbalance below 1, labels that are not valid classes, unknown labels, another task than
        classification, or outliers where the inputs are not uint8 images; labels kept by number and
        by share, or nothing to drop.
    """
    if not 0 <= train_on_held_out <= 1 or (train_on_held_out and not len(dataset.held_out)):
        raise ArgumentError(
            f"train_on_held_out is {train_on_held_out} of {len(dataset.held_out)} examples",
            where=f"{WHERE}.train_on_held_out",
            hint="0 <= x <= 1, with held_out above 0",
        )
    shares = {"label_noise": label_noise, "teacher_damage": teacher_damage, "outliers": outliers}
    kinds = {"label_noise": label_noise_kind, "teacher_damage": teacher_damage_kind}
    labels_kept = {"labels_per_class": labels_per_class, "labels_percent": labels_percent}
    _check_task(dataset, {**shares, "imbalance": imbalance - 1, **labels_kept})
    _check(dataset, shares, kinds, labels_per_class, labels_percent, drop_unlabelled, seed)
    if imbalance < 1 or (imbalance > 1 and len(dataset.classes) < 2):
        raise ArgumentError(
            f"imbalance is {imbalance} and the data have {len(dataset.classes)} classes",
            where=f"{WHERE}.imbalance",
            hint="1 is off; above 1, of data with two classes or more",
        )
    if imbalance > 1:
        dataset = _imbalance(dataset, imbalance, seed)
    # In this order: teacher damage uses clean labels, and added examples get no other fault.
    if teacher_damage:
        dataset = _damage_teacher(dataset, teacher_damage, teacher_damage_kind, seed)
    if label_noise:
        dataset = _change_labels(dataset, label_noise, label_noise_kind, seed)
    if outliers:
        dataset = _add_outliers(dataset, outliers, seed)
    if labels_per_class or labels_percent:
        dataset = _hide_labels(
            dataset, labels_per_class, labels_percent, seed, drop=drop_unlabelled
        )
    if train_on_outer:
        dataset = _train_on_outer(dataset, train_on_outer)
    if train_on_held_out:
        dataset = _train_on_held_out(dataset, train_on_held_out, seed)
    return dataset
