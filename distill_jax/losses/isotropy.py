"""Statistics of how far embeddings of a batch are from an isotropic normal distribution."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array, Key


def random_directions(key: Key, *, width: int, count: int, dtype=jnp.float32) -> Array:
    """Returns directions of length one, uniform on the sphere, `[width, count]`.

    They are drawn in float32, whatever the precision; a draw too short to normalize stays finite.
    """
    drawn = jax.random.normal(key, (width, count), jnp.float32)
    length = jnp.sqrt((drawn**2).sum(0, keepdims=True))
    return (drawn / jnp.maximum(length, 1e-6)).astype(dtype)


def sigreg(
    z: Array, mask: Array, directions: Array, *, largest: float = 3.0, knots: int = 17
) -> Array:
    """Epps-Pulley statistic of projections of a batch, mean over directions, a scalar.

    `n integral |phi_n(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt` from `-largest` to `largest`, with
    phi_n the empirical characteristic function of the projections of the n examples, by the
    trapezoidal rule on `knots` points of the half that symmetry leaves. Balestriero and LeCun
    (2025, LeJEPA, arXiv:2511.08544), section 4. For independent examples of a standard normal
    distribution its expectation is that of `expected_sigreg`, whatever n.

    Args:
      z: `[b, d]`, of the whole batch.
      mask: float `[b]`, 0 on padding, which counts nowhere.
      directions: `[d, m]`, of length one.
      largest: end of the range of integration.
      knots: points of the rule, at least 2.
    """
    wide = jnp.promote_types(z.dtype, jnp.float32)
    n = jnp.maximum(mask.sum(), 1).astype(wide)
    projected = jnp.matmul(z.astype(wide), directions.astype(wide), precision="highest")
    t, normal, weights = (jnp.asarray(x, wide)[:, None] for x in _rule(largest, knots))

    # Recomputed backwards: `knots` times the projections would be kept for the gradient otherwise.
    @jax.checkpoint
    def characteristic(projected: Array) -> tuple[Array, Array]:
        angles = t[:, :, None] * projected[None]
        w = mask.astype(wide)[None, :, None]
        return (w * jnp.cos(angles)).sum(1) / n, (w * jnp.sin(angles)).sum(1) / n

    real, imaginary = characteristic(projected)  # [knots, m]
    return n * (weights * normal * ((real - normal) ** 2 + imaginary**2)).sum(0).mean()


def expected_sigreg(*, largest: float = 3.0, knots: int = 17) -> float:
    """Returns the expectation of `sigreg` for standard normal rows: `sum w phi (1 - phi^2)`.

    `E |phi_n - phi|^2 = (1 - phi^2) / n` for independent examples with characteristic function phi.
    """
    _, normal, weights = _rule(largest, knots)
    return float((weights * normal * (1 - normal**2)).sum())


def _rule(largest: float, knots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, values of `exp(-t^2 / 2)` there, and weights of the trapezoidal rule, folded at 0."""
    t = np.linspace(0, largest, knots)
    weights = np.full(knots, 2 * largest / (knots - 1))
    weights[[0, -1]] /= 2
    return t, np.exp(-(t**2) / 2), weights
