"""Evaluation of a run on data that it was not trained on.

The networks, their memories and the statistics by which inputs are normalized are those of the run;
only what is measured comes from the other data. What the outputs mean (task, classes in their
order, vocabulary, categories of a table) must be the same.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.core.api import Dataset, Source
from distill_jax.core.errors import ConfigError, explained
from distill_jax.report.sharing import scrubbed
from distill_jax.run import build as build_lib
from distill_jax.run import config as config_lib
from distill_jax.run import processes
from distill_jax.run import workdir as workdir_lib
from distill_jax.run.build import Experiment
from distill_jax.run.build.evaluators import make_evaluators
from distill_jax.run.build.experiment import evaluation_transform
from distill_jax.run.config import ConfigDict
from distill_jax.run.workdir.changes import within

WHERE = "data"

ROWS = 256
"""Training examples by which the encodings of two tables are compared."""


def has_other(changes: Iterable[str]) -> bool:
    """Whether one of the changes is of the data."""
    return any(within(path, (WHERE,)) for path in changes)


def with_data_of_run(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """Returns the config with the data of the run in a folder."""
    stored = workdir_lib.stored_config(workdir)
    assert stored is not None
    own = config_lib.override(config, {})
    own.data, own.evaluators = stored.data, stored.evaluators
    return config_lib.override(own, {})


def on_data_of(config: ConfigDict, experiment: Experiment) -> Experiment:
    """Returns the experiment of a run with the data and the evaluators of another config.

    Args:
      config: with the other data.
      experiment: of the run, with its own data.

    Raises:
      ConfigError: the other data do not fit the networks, or have nothing to measure.
      DataUnavailable: they are not on this machine.
    """
    dataset, report = build_lib.open_dataset(config, trusted=experiment.trusted)
    _check_meaning(experiment.dataset, dataset)
    _check_encodings(experiment, config, dataset)
    if not len(dataset.held_out) and not len(dataset.test):
        hint = "set data.held_out above 0, or name data with a test part"
        raise ConfigError("has neither a held-out nor a test part", where=WHERE, hint=hint)
    config = _with_statistics(config, experiment)
    outputs = experiment.outputs
    other = dataclasses.replace(
        experiment,
        config=config,
        dataset=dataset,
        data=report,
        evaluators=make_evaluators(config, outputs, dataset, experiment.trusted),
    )
    _check_inputs(experiment, other)
    return other


def same_parts(own: Dataset, other: Dataset) -> bool:
    """Whether the parts that are measured are those of the run, by their checksums."""
    first, second = (workdir_lib.data_checksums(d) for d in (own, other))
    pairs = [(first[s], second[s]) for s in ("held_out", "test")]
    return all(a["sha256"] and (a["n"], a["sha256"]) == (b["n"], b["sha256"]) for a, b in pairs)


def _check_meaning(own: Dataset, other: Dataset) -> None:
    """Refuses data whose labels mean something else."""

    def refuse(what: str, hint: str = "") -> None:
        raise ConfigError(what, where=WHERE, hint=hint or "name data of the same classes")

    if other.task != own.task:
        refuse(f"the task is {other.task}, and that of the run {own.task}")
    k, n = len(own.classes), len(other.classes)
    if n != k:
        refuse(f"{n} classes, and the networks of the run have {k}: {_names(own.classes)}")
    if own.classes != other.classes:
        first = next(i for i in range(k) if own.classes[i] != other.classes[i])
        same = set(own.classes) == set(other.classes)
        what = (
            f"class {first} is {other.classes[first]!r}, and {own.classes[first]!r} in the run"
            + (": the same classes in another order" if same else "")
        )
        given = f"data.kwargs.classes={','.join(own.classes)}" if k <= 20 else "data.kwargs.classes"
        refuse(what, f"{given} sets names and order, where the data set takes them")
    if own.vocabulary != other.vocabulary:
        refuse(
            f"a vocabulary of {other.vocabulary} token ids, and {own.vocabulary} in the run",
            "tokenize the data as those of the run",
        )
    if own.cardinalities != other.cardinalities:
        refuse(
            f"categorical columns with {other.cardinalities} values, and {own.cardinalities} in "
            "the run",
            "the same columns, and the same training part beside other test rows",
        )


def _names(classes: Iterable[str]) -> str:
    names = list(classes)
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _check_encodings(experiment: Experiment, config: ConfigDict, dataset: Dataset) -> None:
    """Refuses data whose inputs are encoded in another way, which their shapes do not show."""
    own, other = (c.data.kwargs.get("tokenizer_path") for c in (experiment.config, config))
    if own != other and _content(own) != _content(other):
        raise ConfigError(
            "another tokenizer than that of the run",
            where="data.kwargs.tokenizer_path",
            hint=f"that of the run is {own!r}",
        )
    first, second = (_first_rows(_root(d.train)) for d in (experiment.dataset, dataset))
    if not isinstance(first, Mapping):
        return
    same = jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )
    if not same:
        raise ConfigError(
            "a table has the categories and scales of its own training part, which is not that of "
            "the run",
            where=WHERE,
            hint="keep the data of the run, and name the other rows as its test part: for "
            "table_file, data.kwargs.test_path, for a run that was trained with one",
        )


def _content(path: Any) -> bytes:
    try:
        return pathlib.Path(str(path)).read_bytes()
    except OSError:
        return str(path).encode()


def _root(source: Any) -> Source:
    while hasattr(source, "source"):
        source = source.source
    return source


def _first_rows(source: Source) -> Any:
    return source.read(np.arange(min(ROWS, len(source))))["input"]


def _with_statistics(config: ConfigDict, experiment: Experiment) -> ConfigDict:
    """Returns the config with the statistics of the run where it normalizes by those."""
    statistics = experiment.signature["statistics"]
    if statistics is None or "normalize" not in config.data.eval_transforms:
        return config
    given = config.data.transform_kwargs.get("normalize", {})
    if given.get("mean") is not None:
        return config
    mean, std = (config_lib.tuples(x) for x in statistics)
    where = "data.transform_kwargs.normalize"
    return config_lib.override(config, {f"{where}.mean": mean, f"{where}.std": std})


def _check_inputs(experiment: Experiment, other: Experiment) -> None:
    """Refuses inputs of other shapes than those that the networks were trained on."""
    shapes = []
    for one in (experiment, other):
        parts = (one.dataset.test, one.dataset.held_out, one.dataset.train)
        raw = build_lib.batch_shapes(next(part for part in parts if len(part)), 2)
        where = "data.eval_transforms"
        with explained("fails on the inputs of the other data", where=where):
            found = jax.eval_shape(lambda b, one=one: evaluation_transform(one, b)["input"], raw)
        shapes.append(jax.tree.map(lambda x: f"{list(x.shape[1:])} {x.dtype}", found))
    if shapes[0] != shapes[1]:
        own, new = (_spell(x) for x in shapes)
        raise ConfigError(
            f"inputs of {new} reach the networks, and the run was trained on {own}",
            where=WHERE,
            hint="data of the same shape, or data.eval_transforms that lead to it",
        )


def _spell(shapes: Any) -> str:
    if isinstance(shapes, Mapping):
        return ", ".join(f"{name} {_spell(value)}" for name, value in shapes.items())
    return str(shapes)


def write(
    workdir: pathlib.Path,
    experiment: Experiment,
    changes: Mapping[str, Any],
    by_state: Mapping[str, Mapping[str, float]],
) -> pathlib.Path:
    """Writes the measurements to `eval-<data>-<digest of the changes>.json`; returns its path.

    Args:
      workdir: the run folder.
      experiment: what was measured.
      changes: differences from the config of the run, `{path: [old, new]}`.
      by_state: metrics of the last and of the best state.
    """
    new = {path: values[1] for path, values in changes.items()}
    digest = hashlib.sha256(json.dumps(new, sort_keys=True).encode()).hexdigest()[:6]
    name = re.sub(r"\W+", "-", experiment.config.data.name).strip("-")[:60]
    path = workdir / f"eval-{name}-{digest}.json"
    content = {
        "changes": {path: [*values] for path, values in changes.items()},
        "evaluated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "provenance": {
            split: part.provenance._asdict()
            for split, part in experiment.dataset.parts.items()
            if split in ("held_out", "test") and len(part)
        },
        "states": by_state,
    }
    workdir_lib.write_json(path, scrubbed(content, workdir))
    if processes.is_main() and workdir_lib.read_result(workdir, log_line=lambda _: None):
        from distill_jax import report

        report.write_run_report(workdir)
    return path
