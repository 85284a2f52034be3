"""What masked methods hide: transforms that add indices of tokens, of static shapes.

Each adds `keep`, int32 `[b, n]`, the tokens that the student sees, `targets` `[b, m, n_t]`, those
of each of m sets that it predicts, none of them in `keep`, and `hidden`, bool `[b, t]`, true where
a token is not in `keep`. Tokens are patches of an image in row order, or columns of a table,
categorical ones first. What is hidden from an example is a function of (seed, epoch, example).

Nothing is drawn until it fits: every draw ends, on any grid.
"""

import itertools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import rng, tokens
from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.core.errors import ConfigError

Drawn = tuple[Array, Array]
"""`keep` `[n]` and `targets` `[m, n_t]` of one example."""


def _check(condition: bool, what: str, where: str, hint: str = "") -> None:
    if not condition:
        raise ConfigError(what, where=f"data.transform_kwargs.{where}", hint=hint)


def random_subsets(key: Key, *, t: int, keep: int, targets: int = 1, size: int = 0) -> Drawn:
    """Draws tokens to keep, and sets of others, each drawn by itself; sets may overlap.

    Args:
      key: of one example.
      t: number of tokens.
      keep: n, tokens kept.
      targets: m.
      size: n_t, tokens of a set; 0 takes all that are not kept.
    """
    first, second = jax.random.split(key)
    order = jax.random.permutation(first, t)
    rest = order[keep:]
    picks = [
        jax.random.permutation(k, t - keep)[: size or t - keep]
        for k in jax.random.split(second, targets)
    ]
    return order[:keep], rest[jnp.stack(picks)]


def block_shapes(
    grid: tuple[int, int], *, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[tuple[int, int], ...]:
    """Returns shapes of blocks of one and the same number of tokens, so that one program has all.

    Of all areas the one is taken that has a shape nearest to the ranges, by the sum of the
    logarithms of what is missing, and of equally near ones that with most shapes.

    Args:
      grid: rows and columns of tokens.
      scale: smallest and largest share of the tokens in a block.
      aspect: smallest and largest ratio of height to width.
    """
    rows, columns = grid

    def missing(value: float, low: float, high: float) -> float:
        return max(0.0, math.log(low / value), math.log(value / high))

    found: dict[float, dict[int, list[tuple[int, int]]]] = {}
    for r, c in itertools.product(range(1, rows + 1), range(1, columns + 1)):
        if r * c < rows * columns:
            off = missing(r * c / (rows * columns), *scale) + missing(r / c, *aspect)
            found.setdefault(round(off, 9), {}).setdefault(r * c, []).append((r, c))
    if not found:
        return ()
    nearest = found[min(found)]
    return tuple(nearest[max(nearest, key=lambda area: (len(nearest[area]), -area))])


def _block(key: Key, grid: tuple[int, int], shapes: tuple[tuple[int, int], ...]) -> Array:
    """Draws a shape and a place for it; returns the tokens inside, `[n_t]`."""
    u = jax.random.uniform(key, (3,))
    sides = jnp.asarray(shapes)[jnp.floor(u[0] * len(shapes)).astype(jnp.int32)]
    corner = jnp.floor(u[1:] * (jnp.asarray(grid) - sides + 1)).astype(jnp.int32)
    at = jnp.arange(math.prod(shapes[0]))
    return (corner[0] + at // sides[1]) * grid[1] + corner[1] + at % sides[1]


def _window(key: Key, grid: tuple[int, int], scale: tuple[float, float]) -> Array:
    """Draws a window with the proportions of the grid; returns where it is, bool `[t]`."""
    u = jax.random.uniform(key, (3,))
    size = jnp.asarray(grid)
    sides = jnp.round(size * jnp.sqrt(scale[0] + (scale[1] - scale[0]) * u[0])).astype(jnp.int32)
    corner = jnp.floor(u[1:] * (size - sides + 1)).astype(jnp.int32)
    inside = [
        (jnp.arange(n) >= first) & (jnp.arange(n) < first + side)
        for n, first, side in zip(grid, corner, sides, strict=True)
    ]
    return (inside[0][:, None] & inside[1][None]).reshape(-1)


def blocks(
    key: Key,
    *,
    grid: tuple[int, int],
    shapes: tuple[tuple[int, int], ...],
    targets: int,
    context: tuple[float, float],
    keep: int,
    least: int,
) -> Drawn:
    """Draws blocks to predict, and tokens to keep of a window without them.

    A block that would leave fewer than `least` tokens to keep is replaced by the one before it.
    Of more than `keep` tokens a random part is kept; of fewer, some are repeated.

    Args:
      key: of one example.
      grid: rows and columns of tokens.
      shapes: of a block, from `block_shapes`.
      targets: m.
      context: smallest and largest share of the tokens in the window.
      keep: n, tokens kept.
      least: at least 1; the smallest window must leave so many beside one block.
    """
    window_key, order_key, *keys = jax.random.split(key, targets + 2)
    free = _window(window_key, grid, context)
    chosen: list[Array] = []
    for k in keys:
        block = _block(k, grid, shapes)
        left = free.at[block].set(False)
        if chosen:
            fits = left.sum() >= least
            block, left = jnp.where(fits, block, chosen[-1]), jnp.where(fits, left, free)
        chosen.append(block)
        free = left
    # Free tokens first, in random order.
    order = jnp.argsort(jnp.where(free, jax.random.uniform(order_key, free.shape), 2.0))
    return order[jnp.arange(keep) % free.sum()], jnp.stack(chosen)


def _transform(plan: Callable[[Batch], tuple[int, Callable[[Key], Drawn]]]) -> Transform:
    """Returns a transform that draws for each example what `plan` says for a batch's shapes."""

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        t, draw = plan(batch)
        keep, targets = jax.vmap(draw)(rng.example_keys(key, batch))
        hidden = jnp.ones((len(keep), t), bool)
        hidden = jax.vmap(lambda row, at: row.at[at].set(False))(hidden, keep)
        return {
            **batch,
            "keep": keep.astype(jnp.int32),
            "targets": targets.astype(jnp.int32),
            "hidden": hidden,
        }

    return apply


def _grid(batch: Batch, patch_size: int, where: str) -> tuple[int, ...]:
    if isinstance(batch["input"], Mapping) or batch["input"].ndim < 4:
        raise ConfigError(
            "the input is not an image, so it has no patches",
            where="data.train_transforms",
            hint="for tables there is column_masks",
        )
    where = f"data.transform_kwargs.{where}.patch_size"
    return tokens.grid_of(batch["input"].shape[1:], patch_size=patch_size, where=where)


def make_random_masks(*, patch_size: int, ratio: float = 0.75) -> Transform:
    """Returns a transform that hides random patches, all of which are one target.

    He et al. (2022, MAE, arXiv:2111.06377), section 3.

    Args:
      patch_size: that of the network.
      ratio: share of hidden patches; at least one is kept and one hidden.

    Raises:
      ConfigError: a ratio outside (0, 1); when traced, an input that is not an image or that the
        patches do not divide, or an image of a single patch.
    """
    _check(0 < ratio < 1, f"ratio is {ratio}", "random_masks.ratio", "between 0 and 1")

    def plan(batch: Batch):
        t = math.prod(_grid(batch, patch_size, "random_masks"))
        _check(t > 1, "a single patch", "random_masks.patch_size", "a smaller patch")
        keep = min(max(1, int(t * (1 - ratio) + 1e-9)), t - 1)
        return t, lambda key: random_subsets(key, t=t, keep=keep)

    return _transform(plan)


def make_block_masks(
    *,
    patch_size: int,
    targets: int = 4,
    scale: tuple[float, float] = (0.15, 0.2),
    aspect: tuple[float, float] = (0.75, 1.5),
    context: tuple[float, float] = (0.85, 1.0),
    keep: float = 0.4,
) -> Transform:
    """Returns a transform that hides blocks, and keeps a large window without them.

    Assran et al. (2023, I-JEPA, arXiv:2301.08243), section 3. Sizes are the same in all batches, so
    that one program has them all: blocks have the shapes of `block_shapes`, and of the window a
    fixed number of tokens is kept, see `blocks`.

    Args:
      patch_size: that of the network.
      targets: m, number of blocks, which may overlap.
      scale: smallest and largest share of the patches in a block.
      aspect: smallest and largest ratio of a block's height to its width.
      context: smallest and largest share of the patches in the window.
      keep: share of all patches that is kept.

    Raises:
      ConfigError: impossible numbers; when traced, an input that is not an image or that the
        patches do not divide, or so few patches that a block leaves none.
    """
    name = "block_masks"
    _check(targets >= 1, f"targets is {targets}", f"{name}.targets", "1 or more")
    for what, (low, high) in {"scale": scale, "context": context}.items():
        _check(0 < low <= high <= 1, f"{what} is not a range in (0, 1]", f"{name}.{what}")
    _check(0 < aspect[0] <= aspect[1], "aspect is not a range above 0", f"{name}.aspect")
    _check(0 < keep < 1, f"keep is {keep}", f"{name}.keep", "between 0 and 1")

    def plan(batch: Batch):
        found = _grid(batch, patch_size, name)
        _check(len(found) == 2, "blocks are parts of images, not of clips", name)
        grid = (found[0], found[1])
        t, shapes = math.prod(grid), block_shapes(grid, scale=scale, aspect=aspect)
        n = max(1, round(keep * t))
        least = max(1, n // 2)
        window = int(np.prod(np.round(np.array(grid) * math.sqrt(context[0]))))
        left = window - math.prod(shapes[0]) if shapes else 0
        _check(
            left >= least,
            f"a grid of {grid[0]}x{grid[1]} patches leaves {max(left, 0)} beside a block, "
            f"fewer than {least}",
            f"{name}.patch_size" if t < 4 else f"{name}.scale",
            "smaller patches, smaller blocks, or less to keep",
        )
        return t, lambda key: blocks(
            key,
            grid=grid,
            shapes=shapes,
            targets=targets,
            context=context,
            keep=n,
            least=least,
        )

    return _transform(plan)


def make_column_masks(*, targets: int = 4, context: float = 0.3, target: float = 0.3) -> Transform:
    """Returns a transform that keeps random columns of a table, and draws sets of others.

    Thimonier et al. (2025, T-JEPA, arXiv:2410.05016), section 3. The sets are drawn independently
    of each other. Shares are the same in all batches, where the paper draws them anew for each, so
    that one program has them all.

    Args:
      targets: m, number of sets.
      context: share of the columns that is kept; at least one is.
      target: share of the columns in a set; at least one is.

    Raises:
      ConfigError: impossible numbers; when traced, an input that is not a table, or too few
        columns.
    """
    name = "column_masks"
    _check(targets >= 1, f"targets is {targets}", f"{name}.targets", "1 or more")
    for what, share in {"context": context, "target": target}.items():
        _check(0 < share < 1, f"{what} is {share}", f"{name}.{what}", "between 0 and 1")

    def plan(batch: Batch):
        if not isinstance(batch["input"], Mapping):
            raise ConfigError(
                "the input is not a table, so it has no columns",
                where="data.train_transforms",
                hint="for images there are random_masks and block_masks",
            )
        d = batch["input"]["categorical"].shape[1] + batch["input"]["numeric"].shape[1]
        n, size = max(1, round(context * d)), max(1, round(target * d))
        _check(
            n + size <= d,
            f"{n} columns kept and {size} predicted of {d}",
            f"{name}.context",
            "smaller shares",
        )
        return d, lambda key: random_subsets(key, t=d, keep=n, targets=targets, size=size)

    return _transform(plan)
