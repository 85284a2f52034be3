"""Digits in domains, each rotated by its own angle, with different angles in the test part.

The idea of Rotated MNIST (Ghifary et al. 2015, arXiv:1508.07680) on the digits of scikit-learn (see
`digits`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from distill_jax.core.api import Dataset, Source
from distill_jax.core.errors import ArgumentError
from distill_jax.data import digits, shapes, source
from distill_jax.data.coloured_digits import with_domains
from distill_jax.data.corruption import Corrupted

ANGLES = (0.0, 20.0, 40.0, 60.0, 80.0, 100.0, 120.0, 140.0)
TEST_ANGLES = (30.0, 70.0, 110.0, 160.0)


def make(
    *,
    angles: Sequence[float] = ANGLES,
    test_angles: Sequence[float] = TEST_ANGLES,
    keep: Sequence[int] = (),
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Returns uint8 images 8x8x1 and `domain` int32, the number of an angle.

    Every image is in one domain; they are dealt out in turn. Test angles are numbered on.

    Args:
      angles: of the training domains, in degrees.
      test_angles: of the test domains.
      keep: training domains whose examples stay in the training and the held-out part; none for
        all.
      held_out: share of the training part held out.
      split_seed: seed of that split.

    Raises:
      ArgumentError: an unknown domain to keep, or no angles.
      DataUnavailable: scikit-learn is not installed.
    """
    unknown = [domain for domain in keep if not 0 <= domain < len(angles)]
    if unknown or not angles or not test_angles:
        raise ArgumentError(
            f"there is no domain {unknown[0]}" if unknown else "no angles",
            where="keep" if unknown else "angles",
            hint=f"domains from 0 to {len(angles) - 1}" if unknown else "at least one",
        )
    upright = digits.make(held_out=0.0)

    def one(part: str, origin: Source, turns: Sequence[float], first: int) -> Source:
        rows: Any = origin.read(np.arange(len(origin)))
        domain = np.arange(len(origin), dtype=np.int32) % len(turns)
        images = np.stack(
            [
                ndimage.rotate(image.astype(np.float64), turns[d], reshape=False, order=1)
                for image, d in zip(rows["input"], domain.tolist(), strict=True)
            ]
        )
        made = source.make_array_source(
            np.rint(images).astype(np.uint8),
            rows["label"],
            name=f"rotated digits ({part})",
            origin=origin.provenance.origin,
            licence=origin.provenance.licence,
        )
        return Corrupted(made, key="domain", flag=domain + np.int32(first))

    train = one("train", upright.train, angles, 0)
    if keep:
        rows = np.flatnonzero(np.isin(np.arange(len(train)) % len(angles), keep))
        train = source.Subset(train, rows, f"domains {', '.join(map(str, keep))}")
    test = one("test", upright.test, test_angles, len(angles))
    return source.make_dataset(train, test, held_out=held_out, split_seed=split_seed)


def spec(
    *,
    angles: Sequence[float] = ANGLES,
    keep: Sequence[int] = (),
    held_out: float = 0.1,
    **unused: Any,
) -> Dataset:
    """Returns the sizes and shapes of `make`, up to a few examples, without reading anything."""
    del unused
    share = len(keep) / len(angles) if keep else 1.0
    dataset = shapes.make_shapes(
        per_class=[round(share * (count - count // 5)) for count in digits.COUNTS],
        n_test=sum(count // 5 for count in digits.COUNTS),
        shape=(8, 8, 1),
        held_out=held_out,
    )
    return with_domains(dataset)
