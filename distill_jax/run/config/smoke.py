"""`--config=NAME:smoke`: any config in seconds, to see that it runs."""

import contextlib
import re
from typing import Any

from distill_jax.core import durations
from distill_jax.core.errors import ArgumentError
from distill_jax.run.config.overrides import override
from distill_jax.run.config.schema import ConfigDict, lock
from distill_jax.run.config.tree import flatten

MOST_RUNS = 40
"""Runs of a study beyond which every arm has one seed in place of two."""

_IMAGES = {"n_train": 256, "n_test": 64, "image_size": 16, "channels": 1}
_DIGITS = {**_IMAGES, "image_size": 8}
_CIFAR = {**_DIGITS, "channels": 3, "n_train": 200, "n_test": 100, "num_classes": 100}
_TABLE = {"n_train": 512, "n_test": 128}
_TABLES = "adult avazu census_income criteo kdd99_attack_types letter nsl_kdd synthetic_table"
GENERATED = {
    **dict.fromkeys(("fashion_mnist", "fashion_mnist_5k", "synthetic"), ("synthetic", _IMAGES)),
    "digits": ("synthetic", _DIGITS),
    "emoji": ("synthetic", {**_IMAGES, "image_size": 64, "channels": 3}),
    "cifar100": ("synthetic", _CIFAR),
    **dict.fromkeys(_TABLES.split(), ("synthetic_table", _TABLE)),
}
"""Data sets that need files or take long to read -> generated ones of their kind."""

PIXELS = {"mean": (0.506,), "std": (0.182,)}
"""Mean and standard deviation of generated images."""

_CLASSES = re.compile(r"(study\.arms\.[^.]+\.)?roles\.\w+\.kwargs\.num_classes")

SMALLER = {"downstream": {"trees": 2}, "few_label_probe": {"draws": 2}}
"""Arguments of evaluators that take long."""


def smoke(config: ConfigDict) -> ConfigDict:
    """Returns a config with few steps, small batches, few generated examples and two evaluations.

    Generated data have as many classes as a network of the config is given. Of data sets that are
    not in `GENERATED`, such as your own, a few examples are taken. Every arm of a study is kept,
    with two seeds, or one where that would be more than `MOST_RUNS` runs.
    """
    config = override(config, {})
    generated = config.data.name in GENERATED
    images = generated and GENERATED[config.data.name][0] == "synthetic"
    if generated:
        clothes = config.data.name.startswith("fashion")
        config.data.name, config.data.kwargs = GENERATED[config.data.name]
        everywhere = (config, *config.study.arms.values())
        if clothes and any(p.endswith(".patch_size") for c in everywhere for p in flatten(c)):
            config.data.kwargs.image_size = 28  # so that the patches of a config divide it
        classes = [n for path, n in flatten(config).items() if _CLASSES.fullmatch(path) and n]
        if classes:
            config.data.kwargs.num_classes = max(classes)
    else:
        config.data.at_most = 256
    config.total, config.eval.every, config.log.every_steps = "12 steps", "6 steps", 4
    everything = (config, *config.study.arms.values())
    if any(changes.get("weighting", {}).get("name") for changes in everything):
        config.bilevel.outer_batch = min(config.bilevel.outer_batch, 0.25)
        config.data.held_out = max(config.data.held_out, 0.2)
    for changes in everything:
        with changes.unlocked(), changes.ignore_type():
            _shrink(changes, images=images)
            if changes is not config and "total" in changes:
                del changes["total"]
    arms = max(1, len(config.study.arms))
    config.study.seeds = config.study.seeds[: 2 if 2 * arms <= MOST_RUNS else 1]
    return lock(config)


def _shrink(changes: Any, *, images: bool) -> None:
    """Reduces the sizes that a config, or an arm, sets."""
    _at_most(changes, 32, "batch_size")
    _at_most(changes, 2, "bilevel", "every")
    _at_most(changes, 0.25, "data", "held_out")
    _at_most(changes, 96, "objective", "kwargs", "queue")
    for group, key, steps in (("optim", "warmup", 2), ("bilevel", "warmup", 3)):
        if changes.get(group, {}).get(key) is not None:
            changes[group][key] = f"{steps} steps"
    if changes.get("checkpoint", {}).get("every") is not None:
        changes.checkpoint.every = "6 steps"
    kwargs = changes.get("objective", {}).get("kwargs", {})
    for name, value in kwargs.items():
        with contextlib.suppress(ArgumentError):
            if isinstance(value, str) and durations.parse(value)[0]:
                kwargs[name] = "2 steps"
    if images and "normalize" in changes.get("data", {}).get("transform_kwargs", {}):
        changes.data.transform_kwargs.normalize = dict(PIXELS)
    for name in SMALLER.keys() & changes.get("evaluators", {}).keys():
        if changes.evaluators[name] is not None:
            changes.evaluators[name] = {**changes.evaluators[name].to_dict(), **SMALLER[name]}
    if changes.get("cache", {}).get("dir"):
        changes.cache.dir = f"{changes.cache.dir.rstrip('/')}_smoke"


def _at_most(changes: Any, most: float, *path: str) -> None:
    *groups, key = path
    for group in groups:
        changes = changes.get(group, {})
    if isinstance(changes.get(key), (int, float)) and changes[key] > most:
        changes[key] = most
