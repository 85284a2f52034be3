"""Generated images for smoke runs, benchmarks of speed, and tests. They measure no method."""

import numpy as np

from distill_jax.core.api import Dataset
from distill_jax.core.errors import ArgumentError
from distill_jax.data import shapes, source


def make(
    *,
    n_train: int = 1024,
    n_test: int = 256,
    image_size: int = 16,
    channels: int = 1,
    num_classes: int = 4,
    noise: int = 48,
    seed: int = 0,
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Returns uint8 images: a random prototype of the class plus uniform noise in +-`noise`.

    Prototypes have independent pixels in 64..191; labels cycle through the classes, so that parts
    are balanced. With the default noise nothing is clipped much and a nearest-mean rule is right.

    Args:
      n_train: training examples, before the held-out share is split off.
      n_test: test examples.
      image_size: height and width.
      channels: channels.
      num_classes: classes.
      noise: amplitude in grey levels.
      seed: of prototypes and noise.
      held_out: share of the training part held out.
      split_seed: seed of that split.

    Raises:
      ArgumentError: a size below 1 or a negative noise.
    """
    sizes = {
        "n_train": n_train,
        "n_test": n_test,
        "image_size": image_size,
        "channels": channels,
        "num_classes": num_classes,
    }
    for key, value in {**sizes, "noise": noise + 1}.items():
        if value < 1:
            raise ArgumentError(f"{key} is too small", where=key)

    def generator(purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[seed, purpose]))

    shape = (image_size, image_size, channels)
    prototypes = generator(0).integers(64, 192, (num_classes, *shape), np.int16)

    def part(name: str, n: int, purpose: int) -> source.ArraySource:
        labels = np.arange(n, dtype=np.int32) % num_classes
        images = generator(purpose).integers(-noise, noise + 1, (n, *shape), np.int16)
        images += prototypes[labels]
        return source.make_array_source(
            np.clip(images, 0, 255, out=images).astype(np.uint8),
            labels,
            name=f"synthetic {image_size}x{image_size}x{channels}, {num_classes} classes ({name})",
            origin=f"generated, seed {seed}",
            licence="CC0-1.0",
        )

    return source.make_dataset(
        part("train", n_train, 1),
        part("test", n_test, 2),
        held_out=held_out,
        split_seed=split_seed,
        classes=[f"prototype {label}" for label in range(num_classes)],
    )


def spec(
    *,
    n_train: int = 1024,
    n_test: int = 256,
    image_size: int = 16,
    channels: int = 1,
    num_classes: int = 4,
    held_out: float = 0.1,
    **unused: int,
) -> Dataset:
    """Returns the sizes and shapes of `make` without drawing a pixel."""
    del unused
    return shapes.make_shapes(
        per_class=[len(range(label, n_train, num_classes)) for label in range(num_classes)],
        n_test=n_test,
        shape=(image_size, image_size, channels),
        held_out=held_out,
        classes=[f"prototype {label}" for label in range(num_classes)],
    )
