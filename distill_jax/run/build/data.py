"""The data of a config: read, checked, and as batches; the transforms of batches."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import (
    Batch,
    Dataset,
    Source,
    Transform,
)
from distill_jax.core.errors import ConfigError, below, explained, nearest
from distill_jax.data import checks, corruption, moments, source, transforms
from distill_jax.run import config as config_lib
from distill_jax.run import crash, foreign
from distill_jax.run.config import ConfigDict
from distill_jax.run.resolve import bind, resolve

OUTER_SHARE = 0.5
"""Share of the held-out part that a weighting learns from where `data.outer` is unset."""

RESIDENT_BYTES = 2**30
"""Training sets up to this size live on the device where `data.resident` is "auto"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The data of a run.

    Attributes:
      dataset: the parts.
      report: findings about the data.
      steps_per_epoch: batches of the training part, not rounded.
      total_steps: steps of the run.
      resident: whether the examples lie on the device.
    """

    dataset: Dataset
    report: checks.Report
    steps_per_epoch: float
    total_steps: int
    resident: bool

    @property
    def duration(self) -> dict[str, Any]:
        """What turns durations into steps."""
        return {"steps_per_epoch": self.steps_per_epoch, "total_steps": self.total_steps}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches as shapes.

    Attributes:
      raw: as the source gives them.
      batch: as a training step sees them.
      transform: from one to the other.
      warnings: about their values, one line each.
    """

    raw: Batch
    batch: Batch
    transform: Transform
    warnings: tuple[str, ...]

    @property
    def image_size(self) -> int:
        first = jax.tree.leaves(self.batch["input"])[0].shape
        return first[1] if len(first) > 1 else 1


class DataReader:
    """Reads data sets and keeps the last: most runs of a study have the same."""

    def __init__(self):
        self._key: str | None = None
        self._opened: tuple[Dataset, checks.Report] | None = None

    def __call__(
        self, config: ConfigDict, *, trusted: Collection[str]
    ) -> tuple[Dataset, checks.Report]:
        seed = config.seed if config_lib.data_follow_seed(config) else None
        read = json.loads(config_lib.to_json(config))["data"]
        key = json.dumps([read, outer_share(config, trusted=trusted), seed], sort_keys=True)
        if key != self._key or self._opened is None:
            self._key, self._opened = key, open_dataset(config, trusted=trusted)
        return self._opened


def read_data(
    config: ConfigDict,
    *,
    shapes_only: bool,
    trusted: Collection[str],
    reader: DataReader | None = None,
) -> Data:
    """Reads the data of a config, and finds the length of training."""
    with crash.during("reading data"):
        if reader is not None:
            dataset, report = reader(config, trusted=trusted)
        else:
            dataset, report = open_dataset(config, shapes_only=shapes_only, trusted=trusted)
    # The size of a data set that was not read may be a guess.
    read = not getattr(moments.root(dataset.train), "shapes_only", False)
    if read and config.batch_size > len(dataset.train):
        what = f"a batch of {config.batch_size} from {len(dataset.train)} training examples"
        hint = f"at most {len(dataset.train)}: a step never has an example twice"
        raise ConfigError(what, where="batch_size", hint=hint)
    return Data(
        dataset=dataset,
        report=report,
        steps_per_epoch=len(dataset.train) / config.batch_size,
        total_steps=config_lib.total_steps(config, len(dataset.train)),
        resident=_is_resident(config, dataset),
    )


def make_batches(config: ConfigDict, data: Data, *, trusted: Collection[str]) -> Batches:
    """Follows a batch from the source to the step, on shapes."""
    dataset = data.dataset
    raw = batch_shapes(dataset.train, config.batch_size)
    transform = make_transform(config, dataset, train=True, trusted=trusted)
    make_transform(config, dataset, train=False, trusted=trusted)
    with explained("fails on these inputs", where="data.train_transforms"):
        batch = jax.eval_shape(transform, jax.eval_shape(jax.random.key, 0), raw, jnp.int32(0))
    _check_labels(config, batch, dataset)
    warnings = list(_check_values(config, data.report, batch))
    chosen = config.eval.metric.startswith("held_out/") and dataset.task != "regression"
    small = moments.small_part(
        len(dataset.held_out) if chosen else 0,
        config.eval.metric,
        measurements=_measurements(config, data.total_steps, data.steps_per_epoch),
    )
    warnings += [f"data.held_out: {small}"] if small else []
    return Batches(raw=raw, batch=batch, transform=transform, warnings=tuple(warnings))


def make_transform(
    config: ConfigDict,
    dataset: Dataset,
    *,
    train: bool,
    trusted: Collection[str] = (),
    statistics: Callable[[], tuple[Any, Any]] | None = None,
    cards: Mapping[str, Mapping[str, Any]] | None = None,
) -> Transform:
    """Builds the transforms of training or evaluation batches, in the order of the config.

    Args:
      config: a config.
      dataset: gives the number of classes and, unless given, the statistics.
      train: whether the batches are those of training.
      trusted: as in `resolve`.
      statistics: returns mean and deviation, for `normalize` without numbers; by default those of
        the training part.
      cards: arguments of transforms `card:<role>` by name; by default those of the roles' weights.
    """
    data = config.data
    cards = foreign.cards(config) if cards is None else cards
    provided = {
        "num_classes": len(dataset.classes),
        "vocabulary": dataset.vocabulary,
        "statistics": statistics or functools.partial(moments.statistics, dataset.train),
    }

    def build(key: str) -> dict[str, Transform]:
        made = {}
        for name in data[key]:
            where, given = f"data.transform_kwargs.{name}", {}
            if name in cards:
                make, given = transforms.make_prepare, cards[name]
            elif ":" in name:
                make = resolve("data", name, where=f"data.{key}", trusted=trusted)
            else:
                make = transforms.resolve(name, where=f"data.{key}")
            kwargs = {**given, **data.transform_kwargs.get(name, {})}
            made[name] = bind(make, kwargs, where=where, provided=provided)()
        return made

    def clean() -> Transform:
        return transforms.compose(build("teacher_transforms" if own_view else "eval_transforms"))

    own_view = bool(data.teacher_transforms)
    by_name = build("train_transforms" if train else "eval_transforms")
    transform = transforms.compose(by_name)
    if not train:
        return transforms.two_views(by_name, clean(), shared=()) if own_view else transform
    separate = own_view or data.teacher_view != "same"
    for name in data.teacher_shares:
        if name not in by_name or not separate:
            raise ConfigError(
                f"the teacher's view cannot share {name!r}",
                where="data.teacher_shares",
                hint=nearest(name, by_name) + "; a separate view needs data.teacher_view",
            )
    if separate:
        independent = data.teacher_view == "independent"
        transform = transforms.two_views(
            by_name, None if independent else clean(), shared=data.teacher_shares
        )
    return transforms.in_turn(transform, data.views) if data.views else transform


def load_dataset(
    config: ConfigDict, *, shapes_only: bool = False, trusted: Collection[str] = ()
) -> Dataset:
    """Reads the data set of a config, or only its shapes if they are known without reading.

    `trusted` as in `resolve`.
    """
    return open_dataset(config, shapes_only=shapes_only, trusted=trusted)[0]


def open_dataset(
    config: ConfigDict, *, shapes_only: bool = False, trusted: Collection[str] = ()
) -> tuple[Dataset, checks.Report]:
    """Reads the data set of a config, as `load_dataset`, and checks it: see `data.checks`."""
    make = resolve("data", config.data.name, where="data.name", trusted=trusted)
    if shapes_only:
        make = getattr(sys.modules.get(make.__module__), "spec", make)
    kwargs, faults = config_lib.data_arguments(config)
    dataset = bind(
        make,
        kwargs,
        where="data.kwargs",
        provided={"held_out": config.data.held_out},
    )()
    dataset, report = checks.open_dataset(dataset, where="data.name")
    dataset = source.first(dataset, config.data.at_most)
    if dataset.outer is None and (share := outer_share(config, trusted=trusted)):
        seed = kwargs.get("split_seed", 0)
        with below("data", ("outer", "held_out")):
            dataset = source.split_outer(dataset, share=share, seed=seed)
    corrupt = functools.partial(corruption.corrupt, dataset)
    corrupted = bind(corrupt, faults, where="data.corrupt")()
    mixing = [name for name in config.data.train_transforms if name in ("mixup", "cutmix")]
    if mixing and dataset.task != "classification":
        raise ConfigError(
            f"{mixing[0]} mixes classes, and the task of the data is {dataset.task}",
            where="data.train_transforms",
            hint=f"leave out {mixing[0]}",
        )
    if mixing and "labelled" in dataset.train.read(np.zeros(1, np.int64)):
        raise ConfigError(
            f"{mixing[0]} mixes labels, and some are unknown",
            where="data.train_transforms",
            hint=f"leave out {mixing[0]}, or data.kwargs.ignore_label",
        )
    if corrupted is not dataset and mixing:
        raise ConfigError(
            f"{mixing[0]} mixes examples, and data.corrupt marks faults of single examples",
            where="data.train_transforms",
            hint=f"leave out {mixing[0]}, or data.corrupt",
        )
    return corrupted, report


def outer_share(config: ConfigDict, *, trusted: Collection[str]) -> float:
    """Returns the share of the held-out part that a weighting learns from; 0 where all choose."""
    spec = config.weighting
    if config.data.outer is not None:
        return config.data.outer
    if not spec.name or spec.control in ("frozen", "joint") or not config.data.held_out:
        return 0.0
    make = resolve("weighting", spec.name, where="weighting.name", trusted=trusted)
    roles = [config.roles[role] for role in getattr(make, "roles", ()) if role in config.roles]
    learns = any(not role.frozen and role.ema_of is None for role in roles)
    return OUTER_SHARE if learns or getattr(make, "by_gradient", False) else 0.0


def _check_values(config: ConfigDict, report: checks.Report, batch: Batch) -> tuple[str, ...]:
    """Follows the units of images to the networks; returns warnings, one line each.

    Raises:
      ConfigError: a transform gets values that it does not take, or images reach a network of this
        package in grey levels.
    """
    values, kwargs, warnings = report.values, config.data.transform_kwargs.to_dict(), []
    kind = ""
    if values is not None:
        for part in ("teacher_transforms", "train_transforms", "eval_transforms"):
            where = f"data.{part}"
            kind = transforms.check_values(config.data[part], kwargs, values, where=where)
        normalize = kwargs.get("normalize", {})
        numbers = [normalize.get("mean"), normalize.get("std")]
        given = "normalize" in config.data.train_transforms and None not in numbers
        if given and (odd := moments.odd_statistics(values, *numbers)):
            hint = "without mean and std, normalize uses those of the training part"
            warnings.append(f"data.transform_kwargs.normalize: {odd}; {hint}")
    seen = batch.get("views", batch["input"])  # methods that compare views leave the input alone
    unscaled = not isinstance(seen, Mapping) and seen.dtype.kind in "iu" and seen.ndim >= 4
    later = values is not None and values.is_image and kind in ("bytes", "grey")
    if not unscaled and not later:
        return tuple(warnings)
    what = "images reach the networks " + (
        f"unscaled, with values from {values.interval}"
        if values is not None
        else "as integers, unscaled"
    )
    where = "data.train_transforms" if unscaled or kind == "grey" else "data.eval_transforms"
    hint = (
        "add 'normalize', which without mean and std uses those of the training part, or 'scale', "
        "to data.train_transforms and data.eval_transforms"
    )
    if all(":" in (spec.model or ":") for spec in config.roles.values()):  # may scale themselves
        return (*warnings, f"{where}: {what}; {hint}")
    raise ConfigError(what, where=where, hint=hint)


def _measurements(config: ConfigDict, total_steps: int, steps_per_epoch: float) -> int:
    """Returns how many states are measured in training, the last one included."""
    run_info = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
    every = config_lib.duration(config, "eval.every", default=total_steps, **run_info)
    return -(-total_steps // max(every, 1))


def batch_shapes(source: Source, b: int) -> Batch:
    """Returns the shapes of a batch, from the first example."""
    zeros = np.zeros(1, np.int32)
    first = source.read(np.zeros(1, np.int64))
    one = {**first, "mask": np.ones(1, np.float32), "index": zeros, "epoch": zeros}
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), jax.eval_shape(lambda: one)
    )


def _is_resident(config: ConfigDict, dataset: Dataset) -> bool:
    if config.data.resident != "auto":
        return config.data.resident == "yes"
    one = dataset.train.read(np.zeros(1, np.int64))
    return (
        sum(np.asarray(x).nbytes for x in jax.tree.leaves(one)) * len(dataset.train)
        <= RESIDENT_BYTES
    )


def _check_labels(config: ConfigDict, batch: Batch, dataset: Dataset) -> None:
    """Refuses transforms that make shares of other classes than the data have."""
    shares, k = batch.get("label_probs"), len(dataset.classes)
    if shares is None or not k or shares.shape[-1] == k:
        return
    kwargs = config.data.transform_kwargs
    given = [n for n in config.data.train_transforms if "num_classes" in kwargs.get(n, {})]
    where = f"data.transform_kwargs.{given[0]}.num_classes" if given else "data.train_transforms"
    raise ConfigError(
        f"labels become shares of {shares.shape[-1]} classes, the data have {k}",
        where=where,
        hint="leave num_classes out: it is taken from the data" if given else "",
    )
