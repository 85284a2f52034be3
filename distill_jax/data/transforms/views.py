"""Several views of an example, separate views for the teacher, and chains of transforms."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import ranges, rng
from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.core.errors import ArgumentError, explained
from distill_jax.data.transforms.registry import resolve


def compose(transforms: Mapping[str, Transform]) -> Transform:
    """Returns the transforms applied in the order of the mapping.

    Each draws from the stream of its own name, so that adding or removing one leaves the others'
    draws as they are.
    """

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        for name, transform in transforms.items():
            with explained("fails on these inputs", where=name):
                batch = transform(rng.stream(key, name), batch, step)
        return batch

    return apply


def two_views(
    transforms: Mapping[str, Transform], clean: Transform | None, *, shared: Sequence[str]
) -> Transform:
    """Returns the chained transforms, with a separate view for the teacher as `teacher_input`.

    A student with another view than its teacher learns the teacher's output for the image, not for
    the student's own view (Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov 2022, arXiv:2106.05237,
    figure 2: "independent noise", and "fixed teacher" where the teacher's view is `clean`).

    Args:
      transforms: of the student's view, in order.
      clean: of the teacher's view; None draws the student's transforms once more.
      shared: names of transforms whose draws both views share, such as mixup, which then mixes the
        same pairs in the same proportion. With `clean`, only these are applied after it.
    """

    def draw_again(key: Key, batch: Batch, step: Array) -> Batch:
        for name, transform in transforms.items():
            own = key if name in shared else rng.stream(key, "teacher")
            batch = transform(rng.stream(own, name), batch, step)
        return batch

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        if clean is None:
            other = draw_again(key, batch, step)
        else:
            mixing = {name: transforms[name] for name in transforms if name in shared}
            other = compose(mixing)(key, clean(key, batch, step), step)
        return {**compose(transforms)(key, batch, step), "teacher_input": other["input"]}

    return apply


def _make_views(
    key: str,
    count: int,
    chain: Sequence[Any],
    second: Sequence[Any] | None,
    statistics: Callable[[], tuple[np.ndarray, np.ndarray]] | None,
) -> Transform:
    where = f"{key}"
    ranges.depths(where=where, count=count)

    def build(chain: Sequence[Any], part: str) -> Transform:
        made = {}
        for i, item in enumerate(chain):
            name, kwargs = (item, {}) if isinstance(item, str) else item
            at = f"{where}.{part}[{i}]"
            builder = resolve(name, where=at)
            try:
                given = {"statistics": statistics} if name == "normalize" else {}
                made[f"{i}/{name}"] = builder(**{**given, **dict(kwargs)})
            except TypeError as error:
                raise ArgumentError(f"{name}: {error}", where=at) from None
        return compose(made)

    chains = [build(chain, "transforms")] * count
    if second is not None:
        chains[1:] = [build(second, "second")] * (count - 1)

    def apply(rng_key: Key, batch: Batch, step: Array) -> Batch:
        views = [
            chain(rng.stream(rng_key, f"view{i}"), batch, step)["input"]
            for i, chain in enumerate(chains)
        ]
        return {**batch, key: jax.tree.map(lambda *v: jnp.stack(v, axis=1), *views)}

    return apply


def make_views(
    *,
    count: int = 2,
    transforms: Sequence[Any],
    second: Sequence[Any] | None = None,
    statistics: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
) -> Transform:
    """Returns a transform that adds `views` `[b, count, h, w, c]`; the input stays as it is.

    Those of a table are a table of `[b, count, c]` and `[b, count, m]`. Each view is drawn
    independently, as a function of (seed, epoch, example, view).

    Args:
      count: v.
      transforms: of every view, in order: names, or pairs of a name and its keyword arguments.
      second: of the views after the first, where they differ (BYOL's asymmetric blur).
      statistics: of the training part, for `normalize` without numbers.

    Raises:
      ArgumentError: an unknown transform, arguments that it does not take, or a count below 1.
    """
    return _make_views("views", count, transforms, second, statistics)


def make_local_views(
    *,
    count: int = 4,
    transforms: Sequence[Any],
    statistics: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
) -> Transform:
    """Returns a transform that adds `local_views` `[b, count, h', w', c]`: small crops.

    Multi-crop (Caron et al. 2020, SwAV, section 3.4): end the chain with crops of their own
    `size`. Arguments and errors are those of `make_views`.
    """
    return _make_views("local_views", count, transforms, None, statistics)


def make_halves() -> Transform:
    """Returns a transform that adds `views` `[b, 2, h / 2, w, c]`: upper and lower half of images.

    The two parts differ in content and form a matching pair, as for losses on pairs. The input
    stays as it is; of an odd number of rows the last is left out.
    """

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del key, step
        x = batch["input"]
        half = x.shape[1] // 2
        return {**batch, "views": jnp.stack([x[:, :half], x[:, half : 2 * half]], axis=1)}

    return apply


def in_turn(transform: Transform, views: int) -> Transform:
    """Returns the transform with `views` views of each example that come back in turn.

    These are the stored crops of FKD (Shen, Xing 2022, arXiv:2112.01528): epoch e sees view
    e modulo `views`.
    """

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        seen = transform(key, {**batch, "epoch": batch["epoch"] % views}, step)
        return {**seen, "epoch": batch["epoch"]}

    return apply
