"""Masks of masked methods: transforms that add indices of tokens, of static shapes.

Each adds `keep`, int32 `[b, n]`, the tokens that the student reads, `targets` `[b, m, n_t]`, those
of each of m sets that it predicts, none of them in `keep`, and `hidden`, bool `[b, t]`, true where
a token is not in `keep`. Tokens are patches of an image in row order, or columns of a table,
categorical ones first. The mask of an example is a function of (seed, epoch, example). There is no
rejection sampling: every draw terminates, on any grid.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import ranges, rng, tokens
from distill_jax.core.api import Array, Batch, Key, Transform
from distill_jax.core.errors import ArgumentError

Drawn = tuple[Array, Array]
"""`keep` `[n]` and `targets` `[m, n_t]` of one example."""


def tubes(
    key: Key,
    *,
    grid: tuple[int, int, int],
    shapes: tuple[tuple[int, int], ...],
    blocks: int,
    hide: int,
) -> Drawn:
    """Draws places that are hidden in all frames, blocks first; all of them are one target.

    Args:
      key: of one example.
      grid: frames, rows and columns of tokens.
      shapes: of a block, from `block_shapes`.
      blocks: number of blocks, which may overlap.
      hide: number of places hidden, taken at random from the blocks first, then from the others.
    """
    frames, rows, columns = grid
    u = jax.random.uniform(key, (3 * blocks + rows * columns,))
    ranks = u[3 * blocks :] + 1
    for i in range(blocks):
        block = _block(u[3 * i : 3 * i + 3], (rows, columns), shapes)
        ranks = ranks.at[block].set(u[3 * blocks :][block])
    order = jnp.argsort(ranks)
    start = jnp.arange(frames)[:, None] * (rows * columns)
    hidden, kept = ((start + part[None]).reshape(-1) for part in (order[:hide], order[hide:]))
    return kept, hidden[None]


def _check_patches(name: str, **sizes: int) -> None:
    ranges.sizes(where=name, **sizes)


def _check(condition: bool, what: str, where: str, hint: str = "") -> None:
    if not condition:
        raise ArgumentError(what, where=where, hint=hint)


def random_subsets(key: Key, *, t: int, keep: int, targets: int = 1, size: int = 0) -> Drawn:
    """Draws tokens to keep, and sets of other tokens, each drawn independently; sets may overlap.

    Args:
      key: of one example.
      t: number of tokens.
      keep: n, tokens kept.
      targets: m.
      size: n_t, tokens of a set; 0 takes all that are not kept.
    """
    u = jax.random.uniform(key, (t + targets * (t - keep),))
    order, picks = jnp.argsort(u[:t]), jnp.argsort(u[t:].reshape(targets, t - keep))
    return order[:keep], order[keep:][picks[:, : size or t - keep]]


def block_shapes(
    grid: tuple[int, int], *, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[tuple[int, int], ...]:
    """Returns shapes of blocks with equally many tokens, so that one compiled program suffices.

    The chosen area is the one with a shape nearest to the ranges, by the sum of the logarithms of
    the deviations from them; ties go to the area with the most shapes.

    Args:
      grid: rows and columns of tokens.
      scale: smallest and largest share of the tokens in a block.
      aspect: smallest and largest ratio of height to width.
    """
    rows, columns = grid

    def missing(value: float, low: float, high: float) -> float:
        return max(0.0, math.log(low / value), math.log(value / high))

    candidates: dict[float, dict[int, list[tuple[int, int]]]] = {}
    for r, c in itertools.product(range(1, rows + 1), range(1, columns + 1)):
        if r * c < rows * columns:
            off = missing(r * c / (rows * columns), *scale) + missing(r / c, *aspect)
            candidates.setdefault(round(off, 9), {}).setdefault(r * c, []).append((r, c))
    if not candidates:
        return ()
    nearest = candidates[min(candidates)]
    return tuple(nearest[max(nearest, key=lambda area: (len(nearest[area]), -area))])


def _block(u: Array, grid: tuple[int, int], shapes: tuple[tuple[int, int], ...]) -> Array:
    """Returns the tokens, `[n_t]`, in a block of a shape and at a place given by `u` `[3]`."""
    sides = jnp.asarray(shapes)[jnp.floor(u[0] * len(shapes)).astype(jnp.int32)]
    corner = jnp.floor(u[1:] * (jnp.asarray(grid) - sides + 1)).astype(jnp.int32)
    at = jnp.arange(math.prod(shapes[0]))
    return (corner[0] + at // sides[1]) * grid[1] + corner[1] + at % sides[1]


def _window(u: Array, grid: tuple[int, int], scale: tuple[float, float]) -> Array:
    """Returns where a window with the proportions of the grid is, bool `[t]`, given `u` `[3]`."""
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

    A block that would leave fewer than `least` tokens to keep is replaced by the one before it. If
    more than `keep` tokens remain, a random subset is kept; if fewer, some are repeated.

    Args:
      key: of one example.
      grid: rows and columns of tokens.
      shapes: of a block, from `block_shapes`.
      targets: m.
      context: smallest and largest share of the tokens in the window.
      keep: n, tokens kept.
      least: at least 1; the smallest window must contain this many tokens outside one block.
    """
    u = jax.random.uniform(key, (3 * (targets + 1) + math.prod(grid),))
    draws, ranks = u[: 3 * (targets + 1)].reshape(-1, 3), u[3 * (targets + 1) :]
    free = _window(draws[0], grid, context)
    chosen: list[Array] = []
    for i in range(targets):
        block = _block(draws[1 + i], grid, shapes)
        left = free.at[block].set(False)
        if chosen:
            fits = left.sum() >= least
            block, left = jnp.where(fits, block, chosen[-1]), jnp.where(fits, left, free)
        chosen.append(block)
        free = left
    # Free tokens first, in random order.
    order = jnp.argsort(jnp.where(free, ranks, 2.0))
    return order[jnp.arange(keep) % free.sum()], jnp.stack(chosen)


def _add(batch: Batch, key: Key, t: int, draw: Callable[[Key], Drawn], end: str = "") -> Batch:
    """Returns the batch with masks of t tokens that `draw` gives for each example."""
    keep, targets = jax.vmap(draw)(rng.example_keys(key, batch))
    hidden = (keep[:, :, None] != jnp.arange(t)[None, None]).all(1)
    return {
        **batch,
        f"keep{end}": keep.astype(jnp.int32),
        f"targets{end}": targets.astype(jnp.int32),
        f"hidden{end}": hidden,
    }


def _transform(plan: Callable[[Batch], tuple[int, Callable[[Key], Drawn]]]) -> Transform:
    """Returns a transform that draws masks for each example by the `plan` for a batch's shapes."""

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        return _add(batch, key, *plan(batch))

    return apply


def _grid(batch: Batch, patch_size: int, where: str, *, tubelet: int = 1) -> tuple[int, ...]:
    if isinstance(batch["input"], Mapping) or batch["input"].ndim < 4:
        raise ArgumentError(
            "the input is not an image, so it has no patches",
            where="batch",
            hint="for tables there is column_masks",
        )
    where = f"{where}.patch_size"
    return tokens.grid_of(
        batch["input"].shape[1:], patch_size=patch_size, tubelet=tubelet, where=where
    )


def make_random_masks(*, patch_size: int, ratio: float = 0.75) -> Transform:
    """Returns a transform that hides random patches; together they form one target.

    He et al. (2022, MAE, arXiv:2111.06377), section 3.

    Args:
      patch_size: that of the network.
      ratio: share of hidden patches; at least one is kept and one hidden.

    Raises:
      ArgumentError: a ratio outside (0, 1); when traced, an input that is not an image or that the
        patches do not divide, or an image of a single patch.
    """
    _check_patches("random_masks", patch_size=patch_size)
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
    that one compiled program suffices: blocks have the shapes of `block_shapes`, and a fixed number
    of tokens of the window is kept, see `blocks`.

    Args:
      patch_size: that of the network.
      targets: m, number of blocks, which may overlap.
      scale: smallest and largest share of the patches in a block.
      aspect: smallest and largest ratio of a block's height to its width.
      context: smallest and largest share of the patches in the window.
      keep: share of all patches that is kept; 0.4 is 78 of 196. The authors' program cuts all
        contexts of a batch to its smallest, which leaves 52 to 76.

    Raises:
      ArgumentError: impossible numbers; when traced, an input that is not an image or that the
        patches do not divide, or so few patches that a block leaves none.
    """
    name = "block_masks"
    _check_patches(name, patch_size=patch_size)
    ranges.depths(where=name, targets=targets)
    for what, (low, high) in {"scale": scale, "context": context}.items():
        _check(0 < low <= high <= 1, f"{what} is not a range in (0, 1]", f"{name}.{what}")
    _check(0 < aspect[0] <= aspect[1], "aspect is not a range above 0", f"{name}.aspect")
    _check(0 < keep < 1, f"keep is {keep}", f"{name}.keep", "between 0 and 1")

    def plan(batch: Batch):
        sides = _grid(batch, patch_size, name)
        _check(len(sides) == 2, "blocks are parts of images, not of clips", name)
        grid = (sides[0], sides[1])
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


def make_tube_masks(
    *,
    patch_size: int,
    tubelet: int = 2,
    sets: Sequence[tuple[int, float, float]] = ((8, 0.15, 0.75), (2, 0.7, 0.9)),
    aspect: tuple[float, float] = (0.75, 1.5),
) -> Transform:
    """Returns a transform that hides blocks of all frames of a clip, in several ways.

    Bardes et al. (2024, V-JEPA, arXiv:2404.08471), section 3.2: many small blocks, and few large
    ones. Each way hides a fixed share of the places, those in blocks first; its masks are `keep`,
    `targets` and `hidden`, those of the next way `keep_1` and so on.

    Args:
      patch_size: that of the network.
      tubelet: frames of a patch, that of the network.
      sets: ways to hide: number of blocks, share of the places in each, share that is hidden.
      aspect: smallest and largest ratio of a block's height to its width.

    Raises:
      ArgumentError: impossible numbers; when traced, an input that is not of clips
        `[b, f, h, w, c]`, or that the patches do not divide.
    """
    name = "tube_masks"
    _check_patches(name, patch_size=patch_size, tubelet=tubelet)
    _check(0 < aspect[0] <= aspect[1], "aspect is not a range above 0", f"{name}.aspect")
    _check(len(sets) > 0, "no way to hide anything", f"{name}.sets", "(blocks, share, hidden)")
    for blocks, *shares in sets:
        fits = blocks >= 1 and len(shares) == 2 and all(0 < share < 1 for share in shares)
        _check(
            fits,
            f"{(blocks, *shares)} is no way to hide",
            f"{name}.sets",
            "such as (8, 0.15, 0.75)",
        )

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        sides = _grid(batch, patch_size, name, tubelet=tubelet)
        _check(len(sides) == 3, "the input is not of clips", name, "for images: block_masks")
        grid = (sides[0], sides[1], sides[2])
        places = grid[1] * grid[2]
        _check(places > 1, "a single patch", f"{name}.patch_size", "a smaller patch")
        for i, (blocks, scale, share) in enumerate(sets):
            shapes = block_shapes(grid[1:], scale=(scale, scale), aspect=aspect)
            hide = min(max(1, round(share * places)), places - 1)

            def draw(key, shapes=shapes, blocks=blocks, hide=hide):
                return tubes(key, grid=grid, shapes=shapes, blocks=blocks, hide=hide)

            own = rng.stream(key, f"set{i}")
            batch = _add(batch, own, math.prod(grid), draw, f"_{i}" if i else "")
        return batch

    return apply


def make_column_masks(*, targets: int = 4, context: float = 0.3, target: float = 0.3) -> Transform:
    """Returns a transform that keeps random columns of a table, and draws sets of others.

    Thimonier et al. (2025, T-JEPA, arXiv:2410.05016), section 3. The sets are drawn independently
    of each other. Shares are the same in all batches, so that one compiled program suffices; the
    paper draws them anew for each batch.

    Args:
      targets: m, number of sets.
      context: share of the columns that is kept; at least one is.
      target: share of the columns in a set; at least one is.

    Raises:
      ArgumentError: impossible numbers; when traced, an input that is not a table, or too few
        columns.
    """
    name = "column_masks"
    ranges.depths(where=name, targets=targets)
    for what, share in {"context": context, "target": target}.items():
        _check(0 < share < 1, f"{what} is {share}", f"{name}.{what}", "between 0 and 1")

    def plan(batch: Batch):
        if not isinstance(batch["input"], Mapping):
            raise ArgumentError(
                "the input is not a table, so it has no columns",
                where="batch",
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


def blob(u: Array, *, grid: tuple[int, int], count: Array, aspect: tuple[float, float]) -> Array:
    """Returns a mask of `count` patches that lie together, bool `[t]`: the nearest to a rectangle.

    Patches are taken in the order of their distance from a centre, measured along each side in
    units of a rectangle of that area: a block as of BEiT (Bao et al. 2021, arXiv:2106.08254,
    algorithm 1), cut off or grown to the number.

    Args:
      u: uniform draws `[3 + t]`: of the centre, the logarithm of the aspect, and for ties.
      grid: rows and columns of patches.
      count: how many.
      aspect: smallest and largest ratio of height to width.
    """
    rows, columns = grid
    low, high = (math.log(x) for x in aspect)
    tall = jnp.exp((low + (high - low) * u[2]) / 2)
    down = jnp.abs(jnp.arange(rows) + 0.5 - u[0] * rows) / tall
    across = jnp.abs(jnp.arange(columns) + 0.5 - u[1] * columns) * tall
    distance = jnp.maximum(down[:, None], across[None]).reshape(-1) + 1e-4 * u[3:]
    rank = jnp.argsort(jnp.argsort(distance))
    return rank < count


def make_patch_masks(
    *,
    patch_size: int,
    ratio: tuple[float, float] = (0.1, 0.5),
    share: float = 0.5,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Transform:
    """Returns a transform that masks a block of patches in some of the `views` of each example.

    Zhou et al. (2022, iBOT, arXiv:2111.07832), section 3.3. It adds `patch_mask`, bool `[b, v, t]`,
    and `masked`, int32 `[b, v, m]`, m the largest number: masked patches first, then others. A
    masked view has exactly the drawn number of masked patches, in one block, see `blob`.

    Args:
      patch_size: that of the network.
      ratio: smallest and largest share of the patches that is masked, drawn evenly.
      share: share of the views that are masked.
      aspect: smallest and largest ratio of a block's height to its width.

    Raises:
      ArgumentError: impossible numbers; when traced, a batch without `views` or with views that the
        patches do not divide.
    """
    name = "patch_masks"
    _check_patches(name, patch_size=patch_size)
    _check(0 < ratio[0] <= ratio[1] < 1, "ratio is not a range in (0, 1)", f"{name}.ratio")
    _check(0 < share <= 1, f"share is {share}", f"{name}.share", "above 0, at most 1")
    _check(0 < aspect[0] <= aspect[1], "aspect is not a range above 0", f"{name}.aspect")

    def apply(key: Key, batch: Batch, step: Array) -> Batch:
        del step
        if "views" not in batch:
            raise ArgumentError(
                "there are no views to mask",
                where="batch",
                hint=f"put 'views' in front of {name!r}",
            )
        v = batch["views"].shape[1]
        where = f"{name}.patch_size"
        sides = tokens.grid_of(batch["views"].shape[2:], patch_size=patch_size, where=where)
        grid = (sides[0], sides[1])
        t = math.prod(grid)
        least, most = (max(1, round(r * t)) for r in ratio)

        def draw(key):
            u = jax.random.uniform(key, (v, 5 + t))
            count = least + jnp.floor(u[:, 0] * (most - least + 1)).astype(jnp.int32)
            count = jnp.where(u[:, 1] < share, count, 0)
            place = functools.partial(blob, grid=grid, aspect=aspect)
            return jax.vmap(lambda u, n: place(u, count=n))(u[:, 2:], count)

        mask = jax.vmap(draw)(rng.example_keys(key, batch))
        order = jnp.argsort(~mask, axis=-1, stable=True)[:, :, :most]
        return {**batch, "patch_mask": mask, "masked": order.astype(jnp.int32)}

    return apply
