"""Arrays that a finished run leaves for the report and for other programs."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.data.source import example_ids
from distill_jax.run import embeddings, writers
from distill_jax.run.build import Experiment
from distill_jax.run.train.run import Run

EXAMPLES = 64
"""How many test inputs are stored with their predictions, for the report to show."""

TRUST_EXAMPLES, EXTREMES = 10_000, 12
"""How many training examples are stored with their weights, and images of the extreme ones."""


def write_predictions(
    run: Run, outputs: Mapping[str, Any], example_info: Mapping[str, Any]
) -> None:
    """Stores the logits of the test split, and some of its images."""
    arrays = {
        f"logits_{role}": named["logits"].astype(np.float32)
        for role, named in outputs.items()
        if "logits" in named
    }
    facts = dict(example_info)
    if np.ndim(facts.get("labelled", 0)) != 1:
        facts.pop("labelled", None)
    arrays |= {n: facts[n] for n in ("label", "index", "labelled") if n in facts}
    source = run.experiment.dataset.test
    rows = np.arange(min(EXAMPLES, len(source)))
    images = source.read(rows)["input"]
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype == np.uint8:
        arrays |= {"images": images, "images_index": example_ids(source)[rows]}
    writers.save_arrays(run.workdir / "predictions.npz", arrays)


def write_embeddings(
    run: Run,
    outputs: Mapping[str, Any],
    example_info: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> None:
    """Stores test embeddings and the spectra of the run."""
    spectra = {"before training, test": metrics.get("test/spectrum_initial")}
    spectra |= embeddings.thinned(run.spectra) | {"last step, test": metrics.get("test/spectrum")}
    measured = {name: values for name, values in spectra.items() if values is not None}
    embeddings.store(run.workdir, run.experiment, outputs, example_info, measured)


def has_example_weights(experiment: Experiment) -> bool:
    """Whether an evaluator reads the weights of examples."""
    return any(
        "example_weights" in evaluator.outputs for evaluator in experiment.evaluators.values()
    )


def example_weight_rows(experiment: Experiment) -> np.ndarray:
    """Returns the training examples that are stored with their weights, spread evenly."""
    n = len(experiment.dataset.train)
    return np.unique(np.linspace(0, n - 1, min(n, TRUST_EXAMPLES)).astype(np.int64))


def write_example_weights(
    run: Run, chosen: np.ndarray, trust: Mapping[str, np.ndarray], example_info: Mapping[str, Any]
) -> None:
    """Stores the weights of training examples, and those with extreme weights."""
    objective: Any = run.experiment.objective
    source = run.experiment.dataset.train
    weights = trust["weights"]
    arrays = {name: x.astype(np.float32) for name, x in trust.items()}
    arrays |= {"signals": np.asarray(objective.loss_terms), **example_info}
    order = np.argsort(weights[:, -1] / np.maximum(weights.sum(1), 1e-12), kind="stable")
    for name, rows in (("low", order[:EXTREMES]), ("high", order[::-1][:EXTREMES])):
        images = source.read(chosen[rows])["input"]
        if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype == np.uint8:
            arrays |= {name: rows, f"{name}_images": images}
    if jax.process_index() == 0:
        writers.save_arrays(run.workdir / "trust.npz", arrays)
