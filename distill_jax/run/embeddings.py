"""What a run stores of its test embeddings, for the report and for other programs."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.core.errors import UserError
from distill_jax.evaluators import knn
from distill_jax.evaluators._features import Split, normalized, read_split, spread
from distill_jax.run import writers

FILE = "embeddings.npz"
MOST, QUERIES, NEIGHBOURS, PIXELS, SPECTRA = 1000, 8, 6, 64, 4


def encoder(experiment: Any) -> tuple[str, str] | None:
    """Returns the first (role, output) that an evaluator reads as an embedding."""
    for evaluator in experiment.evaluators.values():
        role, output = getattr(evaluator, "role", None), getattr(evaluator, "output", None)
        if role is not None and output is not None:
            return role, output
    return None


def store(
    workdir: pathlib.Path,
    experiment: Any,
    outputs: Mapping[str, Mapping[str, Any]],
    example_info: Mapping[str, np.ndarray],
    spectra: Mapping[str, np.ndarray],
) -> None:
    """Writes `embeddings.npz`, where an evaluator reads embeddings.

    `embedding` float32 `[m, d]` of at most 1,000 test examples, spread evenly, with `label` and
    `index` `[m]`; of some of them, spread evenly, the positions `neighbours` `[q, 1 + 6]` of
    themselves and of those of largest `cosine` `[q, 1 + 6]` in the whole split, with
    `neighbour_label` and, where the inputs are images, `neighbour_images` `[q, 1 + 6, h, w, c]`;
    `spectra` `[s, d]` with `spectra_of` `[s]`, what each is of.

    Args:
      workdir: the run folder.
      experiment: what was run.
      outputs: outputs on the test split that the evaluators read, `{role: {name: [n, ...]}}`.
      example_info: beside them.
      spectra: eigenvalues of the covariance by the name of their source, in order.
    """
    chosen = encoder(experiment)
    if chosen is None:
        return
    try:
        split_rows = read_split((outputs, example_info), *chosen)
    except UserError:
        return
    rows = spread(len(split_rows.z), MOST)
    arrays: dict[str, Any] = {
        "encoder": np.asarray("/".join(chosen)),
        "embedding": split_rows.z[rows].astype(np.float32),
        "label": split_rows.label[rows],
        "index": split_rows.index[rows],
        **_neighbours(experiment.dataset.test, split_rows),
    }
    widths = {len(values) for values in spectra.values()}
    if len(widths) == 1:
        arrays["spectra"] = np.stack(list(spectra.values()))
        arrays["spectra_of"] = np.asarray(list(spectra))
    writers.save_arrays(workdir / FILE, arrays)


def _neighbours(source: Any, split_rows: Split) -> dict[str, np.ndarray]:
    count = min(NEIGHBOURS, len(split_rows.z) - 1)
    if count < 1:
        return {}
    queries = spread(len(split_rows.z), QUERIES)
    z = normalized(split_rows.z).astype(np.float32)
    where, cosine = knn.nearest(z[queries], z, count, own=queries)
    shown = np.concatenate([queries[:, None], where], axis=1)
    arrays = {
        "neighbours": shown,
        "neighbour_label": split_rows.label[shown],
        "cosine": np.concatenate([np.ones((len(queries), 1), np.float32), cosine], axis=1),
    }
    images = source.read(shown.ravel())["input"]
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype == np.uint8:
        stride = -(-max(images.shape[1:3]) // PIXELS)
        images = images[:, ::stride, ::stride]
        arrays["neighbour_images"] = images.reshape(*shown.shape, *images.shape[1:])
    return arrays


def thinned(spectra: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns at most four of the spectra that were measured on held-out data, by step."""
    steps = sorted(spectra)
    kept = [steps[i] for i in spread(len(steps), SPECTRA)]
    return {f"step {step:,}, held out": spectra[step] for step in kept}
