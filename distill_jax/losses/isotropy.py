"""Statistics of the deviation of a batch of embeddings from an isotropic normal distribution."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array, Key


def random_directions(key: Key, *, width: int, count: int, dtype=jnp.float32) -> Array:
    """Returns unit vectors drawn uniformly from the sphere, `[width, count]`.

    They are drawn in float32 at any precision. A draw too short to normalize stays finite.
    """
    drawn = jax.random.normal(key, (width, count), jnp.float32)
    length = jnp.sqrt((drawn**2).sum(0, keepdims=True))
    return (drawn / jnp.maximum(length, 1e-6)).astype(dtype)


def sigreg(
    z: Array, mask: Array, directions: Array, *, largest: float = 3.0, knots: int = 17
) -> Array:
    """Epps-Pulley statistic of the projections of a batch, averaged over directions, a scalar.

    `n integral |phi_n(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt` from `-largest` to `largest`, with
    phi_n the empirical characteristic function of the projections of the n examples (Balestriero
    and LeCun 2025, LeJEPA, arXiv:2511.08544, section 4). The integrand is symmetric; it is
    integrated over `[0, largest]` by the trapezoidal rule on `knots` points. For independent
    standard normal examples the expectation is `expected_sigreg` for every n.

    Args:
      z: `[b, d]`, of the whole batch.
      mask: float `[b]`, 0 on padding, which is ignored.
      directions: `[d, m]`, of length one.
      largest: end of the range of integration.
      knots: points of the rule, at least 2.
    """
    wide = jnp.promote_types(z.dtype, jnp.float32)
    n = jnp.maximum(mask.sum(), 1).astype(wide)
    projected = jnp.matmul(z.astype(wide), directions.astype(wide), precision="highest")
    t, normal, weights = (jnp.asarray(x, wide)[:, None] for x in _rule(largest, knots))

    # Recomputed in the backward pass, which would otherwise store `knots` times the projections.
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
    """Points, values of `exp(-t^2 / 2)` and weights of the trapezoidal rule, folded at 0."""
    t = np.linspace(0, largest, knots)
    weights = np.full(knots, 2 * largest / (knots - 1))
    weights[[0, -1]] /= 2
    return t, np.exp(-(t**2) / 2), weights
