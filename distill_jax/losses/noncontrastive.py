"""Losses between views without negatives: regression of embeddings, and batch statistics.

Views are `[b, v, d]`. Statistics are scalars over the whole batch without padding; an objective
returns them as the share of each example. All values are computed in float32 or wider, products in
full precision on every device.
"""

import jax
import jax.numpy as jnp

from distill_jax.core.api import Array
from distill_jax.losses.contrastive import normalize, products


def cross_view_cosine(x: Array, y: Array) -> Array:
    """Mean cosine of each view in `x` with the other views in `y`, `[b, v, d] -> [b]`.

    For the mean cosine c, `2 - 2 c` is the squared distance of unit vectors of Grill et al.
    (2020, BYOL, arXiv:2006.07733), eq. 2, and `-c` is the loss of Chen and He
    (2021, SimSiam, arXiv:2011.10566), eq. 2.
    """
    v = x.shape[1]
    cosines = jnp.einsum("bid,bjd->bij", normalize(x), normalize(y), precision="highest")
    return jnp.where(~jnp.eye(v, dtype=bool)[None], cosines, 0).sum((1, 2)) / (v * (v - 1))


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _centred(z: Array, mask: Array) -> tuple[Array, Array]:
    """Returns rows `[b, d]` without their mean, 0 on padding, and the number of real ones."""
    z, w = _wide(z), mask[:, None]
    n = jnp.maximum(mask.sum(), 1)
    return (z - (z * w).sum(0)[None] / n) * w, n


def cross_correlation(x: Array, y: Array, mask: Array, *, epsilon: float = 1e-5) -> Array:
    """Correlation over the batch of each feature of `x` with each of `y`, `[b, d] -> [d, d]`.

    Zbontar et al. (2021, Barlow Twins, arXiv:2103.03230), eq. 2, of features standardized by their
    mean and their biased variance plus `epsilon`.
    """
    parts = []
    for z in (x, y):
        centred, n = _centred(z, mask)
        variance = (centred * centred).sum(0) / n
        parts.append(centred * jax.lax.rsqrt(variance + epsilon)[None])
    return products(parts[0].T, parts[1].T) / jnp.maximum(mask.sum(), 1)


def redundancy(correlation: Array, *, trade_off: float) -> Array:
    """`sum_i (1 - C_ii)^2 + trade_off sum_{i != j} C_ij^2`, a scalar (Barlow Twins, eq. 1)."""
    own = jnp.diagonal(correlation)
    return ((1 - own) ** 2).sum() + trade_off * _others(correlation)


def variance_hinge(z: Array, mask: Array, *, gamma: float = 1.0, epsilon: float = 1e-4) -> Array:
    """`mean_j max(0, gamma - sqrt(var_j + epsilon))` of features `[b, d]`, a scalar.

    Bardes, Ponce, LeCun (2022, VICReg, arXiv:2105.04906), eq. 1 and 2; the variance is unbiased.
    """
    centred, n = _centred(z, mask)
    variance = (centred * centred).sum(0) / jnp.maximum(n - 1, 1)
    return jax.nn.relu(gamma - jnp.sqrt(variance + epsilon)).mean()


def covariance_penalty(z: Array, mask: Array) -> Array:
    """`sum_{i != j} cov_ij^2 / d` of features `[b, d]`, a scalar (VICReg, eq. 3 and 4)."""
    centred, n = _centred(z, mask)
    covariance = products(centred.T, centred.T) / jnp.maximum(n - 1, 1)
    return _others(covariance) / z.shape[1]


def _others(x: Array) -> Array:
    """Sum of squares off the diagonal, not by subtraction, which may lose them to rounding."""
    return jnp.where(jnp.eye(len(x), dtype=bool), 0, x * x).sum()


def koleo(x: Array, mask: Array, *, groups: int = 1, epsilon: float = 1e-8) -> Array:
    """`-log(|n(x_i) - n(x_j)| + epsilon)`, x_j the nearest row in the group, `[b, d] -> [b]`.

    Sablayrolles et al. (2019, arXiv:1806.03198), eq. 2, on unit vectors as in Oquab et al. (2023,
    DINOv2, arXiv:2304.07193), section 4. Equal rows give `-log epsilon` and no gradient. A row
    that is alone in its group, or is padding, gives 0.

    Args:
      x: embeddings.
      mask: float `[b]`, 0 on padding.
      groups: number of equal parts of consecutive rows within which neighbours are searched;
        divides b. The published implementations use one per device.
      epsilon: added to the distance.
    """
    b, d = x.shape
    rows = normalize(x).reshape(groups, b // groups, d)
    real = (mask > 0).reshape(groups, -1)
    n = rows.shape[1]
    usable = real[:, None] & ~jnp.eye(n, dtype=bool)[None]
    similar = jnp.einsum("gid,gjd->gij", rows, rows, precision="highest")
    similar = jnp.where(usable, similar, -jnp.inf)
    nearest = jnp.take_along_axis(rows, similar.argmax(-1)[:, :, None], axis=1)
    square = ((rows - nearest) ** 2).sum(-1)
    apart = square > epsilon**2
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)
    has_neighbour = usable.any(-1) & real
    return jnp.where(has_neighbour, -jnp.log(distance + epsilon), 0).reshape(b)
