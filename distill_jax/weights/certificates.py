"""Parity certificates: how far an imported network is from the library that it comes from.

A reference is an `.npz` of what that library computes: `input` `[b, h, w, c]` as the network sees
it, `logits`, further outputs by their names here, and strings `library` and `version`.
`benchmarks/parity.py` writes such files.
"""

import hashlib
import importlib
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.weights import common
from distill_jax.weights.common import WeightsError
from distill_jax.weights.mapping import listed
from distill_jax.weights.pretrained import Pretrained

LOGITS = 1e-4
"""Largest difference of logits that passes."""

STAGES = 1e-4
"""Largest difference of other outputs that passes, in their standard deviations."""


def network(pretrained: Pretrained) -> Any:
    """Returns the network of a file, as a `core.api.Model`."""
    module = importlib.import_module(f"distill_jax.models.{pretrained.family.model}")
    return module.make(**pretrained.kwargs)


def certify(
    pretrained: Pretrained,
    reference: Mapping[str, np.ndarray],
    *,
    logits: float = LOGITS,
    stages: float = STAGES,
) -> dict[str, Any]:
    """Runs an imported network on the reference's input and compares all outputs.

    Args:
      pretrained: the weights.
      reference: see the module.
      logits: largest difference of logits that passes.
      stages: of other outputs, in standard deviations.

    Returns:
      plain values for a JSON file; `passed` is whether all differences are within the bounds.

    Raises:
      WeightsError: outputs that the network does not have, or has in another shape.
    """
    model = network(pretrained)
    x = np.asarray(reference["input"], np.float32)
    params, state, report = pretrained.fill(*jax.eval_shape(model.init, jax.random.key(0), x))
    apply = jax.jit(lambda params, state, x: model.apply(params, state, x, train=False)[0])
    outputs = apply(params, state, x)
    compared = [n for n in reference if n not in ("input", "library", "version")]
    if missing := [name for name in compared if name not in outputs]:
        raise WeightsError(
            f"the network has no {listed(missing)}", hint=f"its outputs: {', '.join(outputs)}"
        )
    rows = {}
    for name in compared:
        ours, theirs = (
            np.asarray(outputs[name], np.float64),
            np.asarray(reference[name], np.float64),
        )
        if ours.shape != theirs.shape:
            raise WeightsError(f"{name} is {ours.shape} here and {theirs.shape} in the reference")
        error = float(np.abs(ours - theirs).max())
        bound = logits if name == "logits" else stages * float(theirs.std())
        rows[name] = {"max_difference": error, "std": float(theirs.std()), "bound": bound}
    return {
        "model": pretrained.family.model,
        "family": pretrained.family.name,
        "kwargs": dict(pretrained.kwargs),
        "provenance": dict(pretrained.provenance),
        "preprocessing": pretrained.card.as_json() if pretrained.card else None,
        "parameters": sum(int(leaf.size) for leaf in jax.tree.leaves(params)),
        "tensors": report.tensors,
        "reference": {k: str(reference[k]) for k in ("library", "version") if k in reference},
        "input": {"shape": list(x.shape), "sha256": hashlib.sha256(x.tobytes()).hexdigest()},
        "outputs": rows,
        "passed": all(row["max_difference"] <= row["bound"] for row in rows.values()),
    }


def write(certificate: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a certificate as JSON, all of it or nothing."""
    path = pathlib.Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(certificate, indent=1) + "\n", "utf-8")
        part.replace(path)
    except OSError as error:
        raise WeightsError(
            f"cannot be written: {error.strerror}", where=common.place(path)
        ) from error


def read_reference(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns a stored reference.

    Raises:
      WeightsError: it cannot be read, or has no input.
    """
    where = common.place(pathlib.Path(path))
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        raise WeightsError(f"cannot be read: {error}", where=where) from error
    if "input" not in arrays:
        raise WeightsError("has no 'input'", where=where, hint="input and outputs by numpy.savez")
    return arrays
