"""What the transforms make of a batch, and examples that are in two parts of the data."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.analysis import dependence
from distill_jax.core.api import Batch, Dataset, Transform
from distill_jax.core.errors import explained
from distill_jax.core.steps import teacher_view
from distill_jax.data import moments, shared_examples
from distill_jax.data.source import example_ids
from distill_jax.data.transforms.registry import CARD
from distill_jax.run.config import TRANSFORMS, ConfigDict
from distill_jax.run.preflight.finding import Finding

_VALUES = ("normalize", "prepare", "scale", "downscale")
"""Transforms that change the units of an input."""


def of_transforms(config: ConfigDict, raw: Batch, evaluate: Transform) -> Iterator[Finding]:
    """Yields randomness in evaluation, transforms on only one side, and wrong units."""
    key = jax.eval_shape(jax.random.key, 0)
    views = {"eval_transforms": lambda batch: batch["input"]}
    if config.data.teacher_transforms:
        views["teacher_transforms"] = teacher_view
    for path, view in views.items():
        with explained("fails on these inputs", where=f"data.{path}"):
            used = dependence.inputs_used(
                lambda key, raw, view=view: view(evaluate(key, raw, jnp.int32(0))), key, dict(raw)
            )
        if "0" in used:
            what = "evaluation draws random numbers: its transforms augment"
            hint = "those without randomness, such as normalize"
            yield Finding("error", what, f"data.{path}", hint)
    listed = {path: config.data[path] for path in TRANSFORMS}
    for path, names in listed.items():
        for name in names:
            if names.count(name) > 1:
                what = f"{name!r} is listed twice and applied once"
                yield Finding("error", what, f"data.{path}", "once")
    nested = json.dumps(config.data.transform_kwargs.to_dict(), default=str)
    both = {path: listed[path] for path in ("train_transforms", "eval_transforms")}
    for name in (*_VALUES, *(n for names in both.values() for n in names if n.startswith(CARD))):
        lists = [path for path, names in both.items() if name in names]
        if len(lists) == 1 and not re.search(rf'"{name}"(?!:)', nested):
            other = next(path for path in both if path not in lists)
            yield Finding(
                "error",
                f"{name!r} is in data.{lists[0]} alone, so that networks are evaluated on other "
                "inputs than they learn from",
                f"data.{other}",
                f"add {name!r}",
            )
    images = raw["input"]
    if isinstance(images, Mapping) or images.dtype != jnp.uint8:
        return
    kwargs = config.data.transform_kwargs.get("normalize", {})
    for part in ("mean", "std") if "normalize" in config.data.transform_kwargs else ():
        values = np.atleast_1d(np.asarray(kwargs.get(part, 0.5), np.float64))
        if values.max() > 1:
            yield Finding(
                "error",
                f"{part} {tuple(values.tolist())} is in grey levels, and pixels are scaled to "
                "[0, 1] before",
                f"data.transform_kwargs.normalize.{part}",
                "divide by 255",
            )


def of_parts(
    dataset: Dataset, overlaps: Mapping[str, shared_examples.Overlap] | None = None
) -> Iterator[Finding]:
    """Yields parts that share examples; `overlaps` is that of `shared_examples` where known."""
    parts = {name: part for name, part in dataset.parts.items() if len(part)}
    for first, second in itertools.combinations(parts, 2):
        source = moments.root(parts[first])
        read = not getattr(source, "shapes_only", False)
        if read and source is moments.root(parts[second]):
            both = np.intersect1d(example_ids(parts[first]), example_ids(parts[second]))
            if len(both):
                what = f"{len(both)} examples are in the {first} and in the {second} part"
                hint = "parts that share nothing; data.held_out carves one off"
                yield Finding("error", what, "data", hint)
    overlaps = shared_examples.overlaps(dataset) if overlaps is None else overlaps
    for name, overlap in overlaps.items():
        if overlap.repeated == overlap.of >= 8 and overlap.whole:
            what = f"all {overlap.of} examples of the {name} part are in the training part too"
            yield Finding("error", what, "data", "data that training does not see")
        elif overlap.repeated:
            yield Finding("warning", overlap.spell(name), "data")
