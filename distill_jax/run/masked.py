"""What a run stores of the images that its method hides parts of, for the report."""

import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import partition, rng, steps
from distill_jax.data import loader
from distill_jax.data.source import Subset
from distill_jax.evaluators._features import spread
from distill_jax.run import build, writers

FILE = "masks.npz"
MOST = 6
"""Training images that are shown."""


def hides(experiment: build.Experiment) -> bool:
    """Whether training batches are images with square patches, some of which are hidden."""
    batch = experiment.shapes.batch
    image = batch["input"]
    if "hidden" not in batch or not hasattr(image, "shape") or len(image.shape) != 4:
        return False
    h, w = image.shape[1:3]
    t = batch["hidden"].shape[1]
    side = math.isqrt(h * w // t)
    return side * side * t == h * w and h % side == w % side == 0


def store(
    workdir: pathlib.Path,
    experiment: build.Experiment,
    state: Any,
    frozen: steps.Frozen,
    *,
    seed: int,
    write: bool,
) -> None:
    """Writes `masks.npz`, if the method hides parts of images.

    Of at most six training images, spread evenly, as a step sees them: uint8 `images`
    `[q, h, w, c]`; `hidden` bool `[q, t]`, which patches the student does not see; `predicted`
    bool `[q, m, t]`, those of each set that it predicts; and `pictures` uint8 `[p, q, h, w, c]` of
    the objective, in the scale of the images, with `pictures_of` `[p]`, their names.

    Args:
      workdir: the run folder.
      experiment: what was run.
      state: after training.
      frozen: networks that do not learn.
      seed: of the run.
      write: whether this process does; all of them compute.
    """
    if not hides(experiment):
        return
    source = experiment.dataset.train
    rows = spread(len(source), MOST)
    some = Subset(source, rows, f"{len(rows)} of them")
    [batch] = loader.eval_batches(some, batch_size=len(rows))
    transform = experiment.transform(train=True)
    key = rng.stream(jax.random.key(seed), "transform")

    @functools.partial(jax.jit, out_shardings=partition.replicated(experiment.mesh))
    def look(state, frozen, batch):
        batch = transform(key, batch, jnp.int32(0))
        nets = experiment.trainer.bind(state, frozen, key)
        pictures = experiment.objective.pictures(nets, batch, state.memory, state.step)
        return {k: batch[k] for k in ("input", "hidden", "targets")}, pictures

    views, pictures = jax.device_get(look(state, frozen, batch))
    if not write:
        return
    images, hidden, targets = (np.asarray(views[k]) for k in ("input", "hidden", "targets"))
    predicted = (targets[..., None] == np.arange(hidden.shape[1])).any(axis=2)
    low, high = float(images.min()), float(images.max())

    def scaled(x: np.ndarray) -> np.ndarray:
        x = (np.asarray(x, np.float64) - low) / max(high - low, 1e-12)
        return np.round(255 * x.clip(0, 1)).astype(np.uint8)

    arrays = {"images": scaled(images), "hidden": hidden, "predicted": predicted}
    if pictures:
        arrays["pictures"] = np.stack([scaled(x) for x in pictures.values()])
        arrays["pictures_of"] = np.asarray(list(pictures))
    writers.save_arrays(workdir / FILE, arrays)
