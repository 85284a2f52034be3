"""Training images as the steps of a run see them, after their transforms, for TensorBoard."""

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import partition, rng
from distill_jax.data import loader, moments
from distill_jax.data.source import Subset
from distill_jax.data.transforms import make_prepare
from distill_jax.evaluators._features import spread
from distill_jax.run import foreign
from distill_jax.run.build.experiment import Experiment
from distill_jax.run.config import ConfigDict

SIDE = 64
"""Smaller images are enlarged to about this many pixels."""

GAP = 2
"""Pixels between images."""

_DEFAULTS = {
    "prepare": {name: p.default for name, p in inspect.signature(make_prepare).parameters.items()}
}


class Pictures:
    """Grids of the same few training images, drawn anew for each epoch.

    They are `log.images` images, spread evenly over the training part: one grid for each entry of
    a batch that holds images, `[b, h, w, c]`, or views of them, `[b, v, h, w, c]`, of one channel
    or three. Batches of texts and tables have none. Each view of an image has a column of its own.

    Normalization is undone, so pixels have the scale [0, 1] of the data; where its numbers are
    not known, as in transforms of your own, an entry's least value is black and its largest white.

    Args:
      experiment: what is run.
      config: of the run.
    """

    def __init__(self, experiment: Experiment, config: ConfigDict):
        self._experiment, self._config = experiment, config
        source = experiment.dataset.train
        rows = spread(len(source), config.log.images)
        some = Subset(source, rows, f"{len(rows)} of them")
        [self._batch] = loader.eval_batches(some, batch_size=len(rows))
        transform = experiment.transform(train=True)
        key = rng.stream(jax.random.key(config.seed), "transform")

        @functools.partial(jax.jit, out_shardings=partition.replicated(experiment.mesh))
        def see(batch: Any, step: Any) -> dict[str, Any]:
            batch = transform(key, batch, step)
            return {name: x for name, x in batch.items() if _holds_images(x)}

        shapes = jax.eval_shape(see, self._batch, jnp.int32(0))
        self._see = see if shapes else None

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Returns the grids `{"train/<entry>": uint8 [h, w, c]}` of the epoch of a step."""
        if self._see is None:
            return {}
        epoch = step * self._config.batch_size // len(self._experiment.dataset.train)
        batch = {**self._batch, "epoch": np.full_like(self._batch["epoch"], epoch)}
        seen = jax.device_get(self._see(batch, jnp.int32(step)))
        return {f"train/{name}": grid(self._pixels(name, x)) for name, x in seen.items()}

    def _pixels(self, name: str, images: np.ndarray) -> np.ndarray:
        """Returns images in [0, 1]."""
        if images.dtype == np.uint8:
            return images / 255
        images = images.astype(np.float64)
        given = self._normalization(name)
        if given is not None:
            mean, std = (np.array(x, np.float64, ndmin=1) for x in given)
            if {len(mean), len(std)} <= {1, images.shape[-1]}:
                return (images * std + mean).clip(0, 1)
        low, high = images.min(), images.max()
        inside = low >= -1e-6 and high <= 1 + 1e-6
        return images if inside else (images - low) / max(high - low, 1e-12)

    def _normalization(self, name: str) -> tuple[Any, Any] | None:
        """Returns mean and deviation of the pixels of an entry of a batch, if they are known."""
        data = self._config.data
        kwargs = data.transform_kwargs
        if name in kwargs and "transforms" in kwargs[name]:  # the chain of views
            chain = [(x, {}) if isinstance(x, str) else x for x in kwargs[name].transforms]
        else:
            own = data.teacher_transforms if name == "teacher_input" else ()
            chain = [(x, kwargs.get(x, {})) for x in own or data.train_transforms]
        cards = foreign.cards(self._config)
        for transform, given in chain:
            given = {**_DEFAULTS.get(transform, {}), **cards.get(transform, {}), **given}
            if given.get("mean") is not None and given.get("std") is not None:
                return given["mean"], given["std"]
            if transform == "normalize":
                return moments.statistics(self._experiment.dataset.train)
        return None


def _holds_images(x: Any) -> bool:
    shape = tuple(getattr(x, "shape", (0,)))
    return len(shape) in (4, 5) and shape[-1] in (1, 3) and min(shape[-3:-1]) > 1


def grid(images: np.ndarray) -> np.ndarray:
    """Returns images in [0, 1], `[b, h, w, c]` or `[b, v, h, w, c]`, as one, uint8 `[h', w', c]`.

    Views of an image stand side by side; images without views are in rows of about equal number.
    """
    if images.ndim == 4:
        b = len(images)
        columns = math.ceil(math.sqrt(b))
        rows = -(-b // columns)
        blank = np.zeros((rows * columns - b, *images.shape[1:]), images.dtype)
        images = np.concatenate([images, blank]).reshape(rows, columns, *images.shape[1:])
    size = max(1, SIDE // min(images.shape[2:4]))
    images = np.round(255 * images.clip(0, 1)).astype(np.uint8)
    images = images.repeat(size, axis=2).repeat(size, axis=3)
    images = np.pad(images, ((0, 0), (0, 0), (GAP, 0), (GAP, 0), (0, 0)), constant_values=255)
    rows, columns, h, w, c = images.shape
    sheet = images.transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, c)
    return np.pad(sheet, ((0, GAP), (0, GAP), (0, 0)), constant_values=255)
