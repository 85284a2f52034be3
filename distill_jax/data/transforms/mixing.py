"""Transforms that pair the examples of a batch, and coarse labels."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.core.errors import ArgumentError
from distill_jax.data.transforms._draws import beta, integer, partner, require, uniform
from distill_jax.data.transforms.geometry import box_mask, cutmix_box


def label_probs(batch: Batch, num_classes: int) -> Array:
    """Returns the target distributions `[b, k]`: `label_probs` where set, else from `label`."""
    if "label_probs" in batch:
        return batch["label_probs"]
    return (batch["label"][:, None] == jnp.arange(num_classes)[None]).astype(jnp.float32)


def make_feature_corruption(*, share: float = 0.6) -> Transform:
    """Returns a transform of tables that takes some cells of each row from other rows.

    SCARF (Bahri, Jiang, Tay, Metzler 2022, arXiv:2106.15147), section 3: a fixed number of columns
    of each row is chosen at random, and each of their cells is replaced by that of another example,
    drawn independently for each cell: a draw from the column's empirical distribution. As in
    `mixup`, the other example is one of the batch. A cell whose other example is padding is
    unchanged.

    Args:
      share: of the columns that are replaced; at least one is.

    Raises:
      ArgumentError: a share outside (0, 1]; when traced, an input that is not a table.
    """
    require(0 < share <= 1, f"share is {share}, not in (0, 1]", "feature_corruption.share")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        table = batch["input"]
        if not isinstance(table, Mapping):
            raise ArgumentError(
                "the input is not a table, so it has no columns to take cells of",
                where="batch",
                hint="for images there are random_resized_crop and color_jitter",
            )
        sizes = [table[kind].shape[1] for kind in ("categorical", "numeric")]
        d, b = sum(sizes), len(batch["mask"])
        u = uniform(key, batch, 2, d)
        ranks = jnp.argsort(jnp.argsort(u[:, 0], axis=1), axis=1)
        other = integer(u[:, 1], b)
        replaced = (ranks < max(1, round(share * d))) & (batch["mask"][other] > 0)
        parts, start = {}, 0
        for kind, size in zip(("categorical", "numeric"), sizes, strict=True):
            columns = slice(start, start := start + size)
            taken = jnp.take_along_axis(table[kind], other[:, columns], axis=0)
            parts[kind] = jnp.where(replaced[:, columns], taken, table[kind])
        return {**batch, "input": parts}

    return apply


def make_coarse_labels(*, groups: Sequence[int]) -> Transform:
    """Returns batches whose labels are groups of classes, for training on coarser ones.

    Args:
      groups: the group of each class, from 0: `(0, 1, 0, 1)` makes two groups of four classes.

    Raises:
      ArgumentError: a negative group.
    """
    require(min(groups, default=-1) >= 0, "groups are numbers from 0", "coarse_labels.groups")
    table = np.array(groups, np.int32)

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        return {**batch, "label": jnp.asarray(table)[batch["label"]]}

    return apply


def _mix_labels(batch: Batch, keep: Array, num_classes: int) -> Array:
    probs, keep = label_probs(batch, num_classes), keep[:, None]
    return keep * probs + (1 - keep) * partner(probs)


def _require_mix(alpha: float, num_classes: int, name: str) -> None:
    require(alpha > 0, "alpha must be positive", f"{name}.alpha")
    require(num_classes > 1, "num_classes must be at least 2", f"{name}.num_classes")


def make_mixup(*, num_classes: int, alpha: float = 1.0) -> Transform:
    """Returns convex combinations of each example and its left neighbour in the batch.

    Zhang, Cisse, Dauphin, Lopez-Paz (2018), equation (2): one weight a batch from
    Beta(alpha, alpha), as in the authors' code; batches are already shuffled, so the neighbour is
    a random partner. Sets `label_probs`. An example whose partner is padding stays unmixed, so
    that padding never reaches a row that counts.

    Args:
      num_classes: k.
      alpha: concentration.

    Raises:
      ArgumentError: bad arguments; when traced, an input that is not float (mixtures of rounded
        pixels would lose precision: put `scale` or `normalize` before).
    """
    _require_mix(alpha, num_classes, "mixup")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        images = batch["input"]
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ArgumentError(
                f"mixup of {images.dtype} images",
                where="data.augment",
                hint="put scale or normalize before mixup",
            )
        lam = beta(jax.random.fold_in(key, step), alpha)
        keep = jnp.where(partner(batch["mask"]) > 0, lam, 1.0)
        weight = keep.astype(images.dtype).reshape((-1,) + (1,) * (images.ndim - 1))
        images = weight * images + (1 - weight) * partner(images)
        return {**batch, "input": images, "label_probs": _mix_labels(batch, keep, num_classes)}

    return apply


def make_cutmix(*, num_classes: int, alpha: float = 1.0) -> Transform:
    """Returns images with one box of the batch pasted from the left neighbour.

    Yun, Han, Oh, Chun, Choe, Yoo (2019), section 3.1: Beta(alpha, alpha) for the share, a uniform
    centre, one box a batch as in the authors' code, and label weights by the area really pasted.
    Sets `label_probs`. An example whose partner is padding stays as it is.

    Args:
      num_classes: k.
      alpha: concentration.

    Raises:
      ArgumentError: bad arguments.
    """
    _require_mix(alpha, num_classes, "cutmix")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        images = batch["input"]
        height, width = images.shape[1:3]
        share, centre = jax.random.split(jax.random.fold_in(key, step))
        lam = beta(share, alpha)
        middle = integer(jax.random.uniform(centre, (2,)), jnp.array([height, width]))
        inside = box_mask(cutmix_box(lam, middle, height, width), height, width)
        paired = partner(batch["mask"]) > 0
        images = jnp.where(
            paired[:, None, None, None] & inside[None, :, :, None], partner(images), images
        )
        keep = jnp.where(paired, 1 - inside.mean(), 1.0)
        return {**batch, "input": images, "label_probs": _mix_labels(batch, keep, num_classes)}

    return apply
