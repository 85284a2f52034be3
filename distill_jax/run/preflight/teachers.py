"""Compares how a frozen network was trained, as its folder records it, with the config."""

import json
import pathlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.core.api import Dataset, Role
from distill_jax.core.errors import CheckpointError
from distill_jax.data import moments
from distill_jax.run import foreign, paths
from distill_jax.run.config import ConfigDict
from distill_jax.run.preflight.finding import Finding
from distill_jax.trainer.io.files import NUMBERS, DamagedFile, read_json
from distill_jax.trainer.io.paths import NetworkRef
from distill_jax.trainer.io.step_folder import read_config, read_meta
from distill_jax.trainer.io.step_index import find_step


def findings(config: ConfigDict, frozen: Sequence[Role], dataset: Dataset) -> Iterator[Finding]:
    """Yields frozen networks that learned from other inputs, classes or examples, or hardly."""
    for role in frozen:
        where = f"roles.{role}.init"
        if paths.is_foreign(config.roles[role].init):
            yield from _of_weights(config, role, where)
            continue
        origin = NetworkRef.parse(config.roles[role].init or "", where=where)
        try:
            step = find_step(origin.path, where=where)
            stored = read_config(step)
        except CheckpointError:
            continue  # reported when it is read
        try:
            cards = read_meta(step).get("signature", {}).get("cards", {})
            yield from teacher_saw(stored, config, where=where, cards=cards)
        except (KeyError, TypeError, AttributeError):  # written by another version
            what = f"cannot be compared with the data here: {step} describes its data differently"
            yield Finding("warning", what, where)
        yield from _scaled(step, config, dataset, where=where)
        result = _result(step)
        theirs, ours = tuple(result.get("classes", ())), dataset.classes
        mapped = bool(config.roles[role].classes)
        if theirs and ours and not origin.part and not mapped and theirs != ours:
            if len(theirs) != len(ours):
                continue
            what = "the same classes in another order"
            if sorted(theirs) != sorted(ours):
                what = f"other classes ({theirs[0]!r}, ... for {ours[0]!r}, ...)"
            hint = "a network trained on the classes of the data"
            yield Finding("error", f"was trained on {what}", where, hint)
        accuracy = result.get("best", {}).get("held_out/accuracy")
        if accuracy is not None and ours and accuracy < 1.5 / len(ours):
            what = f"its held-out accuracy is {accuracy:.3f}, chance is {1 / len(ours):.3f}"
            yield Finding("warning", what, where)


def _scaled(
    step: pathlib.Path, config: ConfigDict, dataset: Dataset, *, where: str
) -> Iterator[Finding]:
    """Yields a warning where both runs normalize by statistics of their own, and these differ."""
    given = config.data.transform_kwargs.get("normalize", {})
    if "normalize" not in config.data.eval_transforms or given.get("mean") is not None:
        return
    try:
        theirs = read_meta(step).get("signature", {}).get("statistics")
    except CheckpointError:
        return  # reported when it is read
    if theirs and (what := differs(theirs, moments.statistics(dataset.train))):
        hint = (
            "data.transform_kwargs.normalize.mean and std of the teacher's data give both networks "
            "the values that it learned from"
        )
        yield Finding("warning", what, where, hint)


def differs(theirs: Sequence[Any], ours: Sequence[Any]) -> str:
    """Says how far the mean and deviation of two data sets are apart; empty where they are alike.

    Alike are means within a tenth of a deviation, and deviations within a quarter.
    """
    (mean, std), (own_mean, own_std) = (
        [np.atleast_1d(np.asarray(x, np.float64)) for x in pair] for pair in (theirs, ours)
    )
    if mean.shape != own_mean.shape:
        return ""  # other channels, which the network refuses
    ratio = own_std / std
    if (np.abs(mean - own_mean) <= 0.1 * std).all() and (np.abs(np.log(ratio)) <= 0.22).all():
        return ""
    spell = lambda x: "(" + ", ".join(f"{v:.3f}" for v in x) + ")"  # noqa: E731
    return (
        f"learned from images of mean {spell(mean)} and std {spell(std)}, and these have "
        f"{spell(own_mean)} and {spell(own_std)}: each is scaled by its own"
    )


def _of_weights(config: ConfigDict, role: Role, where: str) -> Iterator[Finding]:
    """Yields a warning if a network of another library gets other input values than in training.

    The values that its card states are compared with the transform `normalize`.
    """
    card = foreign.opened(config.roles[role].init, where=where).card
    if card is None:
        return
    of_card = card.moments()
    for name, given in _inputs(config.data.to_dict(), foreign.cards(config)):
        if name in ("normalize", "prepare") and all(
            given.get(part) is not None and np.allclose(given[part], wanted, atol=5e-3)
            for part, wanted in zip(("mean", "std"), of_card, strict=True)
        ):
            return
    mean, std = (tuple(float(f"{x:.4g}") for x in wanted) for wanted in of_card)
    yield Finding(
        "warning",
        f"was trained on images of mean {mean} and std {std} on the scale [0, 1], "
        f"{card.size}x{card.size}; the transforms do not give such values",
        where,
        f"data.teacher_transforms=card:{role}",
    )


def _result(step: pathlib.Path) -> dict[str, Any]:
    for folder in step.parents[:2]:
        try:
            result = read_json(folder / "result.json", shape={"classes": list, "best": NUMBERS})
        except DamagedFile:
            continue
        if all(isinstance(name, str) for name in result["classes"]):
            return result
    return {}


def teacher_saw(
    stored: Mapping[str, Any],
    config: ConfigDict,
    *,
    where: str,
    cards: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
) -> Iterator[Finding]:
    """Compares the training inputs of a network with those that it gets in this run.

    Args:
      stored: the config of the run that trained it.
      config: of the run that uses the network.
      where: the config path of its checkpoint.
      cards: of that run, see `foreign.cards`.
    """
    theirs, ours = stored["data"], config.data.to_dict()
    evaluated = _inputs({**theirs, "teacher_transforms": ()}, cards)
    called = _inputs(ours, foreign.cards(config))
    if evaluated != called:
        kind = "error" if theirs["name"] == ours["name"] else "warning"
        what = (
            f"was evaluated on inputs after {_spell(evaluated)}, and is called on inputs after "
            f"{_spell(called)}"
        )
        yield Finding(kind, what, where, "the same data.eval_transforms and transform_kwargs")
    same = theirs["name"] == ours["name"] and theirs["kwargs"] == ours["kwargs"]
    if same and theirs["held_out"] < ours["held_out"]:
        what = (
            f"held out {theirs['held_out']:g} of the data and saw examples that are held out here "
            f"({ours['held_out']:g})"
        )
        yield Finding("warning", what, where)


def _inputs(data: Mapping[str, Any], cards: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """What happens to the numbers of a teacher's input in evaluation, comparable."""
    names = data.get("teacher_transforms") or data["eval_transforms"]
    arguments = [{**cards.get(n, {}), **data["transform_kwargs"].get(n, {})} for n in names]
    names = ["prepare" if name in cards else name for name in names]
    return json.loads(json.dumps(list(zip(names, arguments, strict=True))))


def _spell(transforms: list[Any]) -> str:
    parts = [
        f"{name}({', '.join(f'{k}={v}' for k, v in kwargs.items())})" for name, kwargs in transforms
    ]
    return ", ".join(parts) or "no transforms"
