"""Statistics of the distribution of embeddings, without labels: ranks, spreads and their alarms.

Every function takes NumPy or JAX arrays and returns the same kind: float64 on the host, float32
inside a step. Functions with a `mask` `[n]` omit the rows where it is 0; without one, all rows
count. None of them stops a gradient.

Ranks are computed from the eigenvalues of the Gram matrix of the smaller side. This costs `n d
min(n, d)` and needs no singular value decomposition. An eigenvalue below `min(n, d)` rounding
errors of the largest one counts as 0. In float32 this is a singular value below about
`sqrt(d) / 3000` of the largest, so rounding errors do not raise the rank of a collapsed embedding.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.api import Array

BLOCK = 1024
"""Rows of a block of pairwise distances on the host."""


def _with(*arrays: Any) -> tuple[ModuleType, list[Any]]:
    """Returns NumPy or `jax.numpy`, and the arrays as its float64 or float32."""
    if any(isinstance(x, jax.Array) for x in arrays):
        return jnp, [None if x is None else jnp.asarray(x, jnp.float32) for x in arrays]
    return np, [None if x is None else np.asarray(x, np.float64) for x in arrays]


def _weights(xp: Any, z: Any, mask: Any) -> Any:
    return xp.ones(z.shape[0], z.dtype) if mask is None else (mask > 0).astype(z.dtype)


def _normalized(xp: Any, z: Any) -> Any:
    """Rows of length 1; a row of zeros stays one."""
    square = (z * z).sum(-1, keepdims=True)
    return z / xp.sqrt(xp.where(square > 0, square, 1))


def _masked_mean(w: Any, x: Any) -> Any:
    """Mean `[d]` of rows `[n, d]`, or scalar of values `[n]`, where `w` `[n]` is 1."""
    return (w @ x) / _at_least(w.sum(), 1)


def _at_least(x: Any, low: float) -> Any:
    return jnp.maximum(x, low) if isinstance(x, jax.Array) else np.maximum(x, low)


def _entropy(xp: Any, p: Any) -> Any:
    return -(p * xp.log(xp.where(p > 0, p, 1))).sum(-1)


def eigenvalues(gram: Any) -> Array | np.ndarray:
    """Returns the eigenvalues `[d]` of a Gram or covariance matrix `[d, d]`, the largest first.

    Those below `d` rounding errors of the largest are 0, and so are negative ones.
    """
    xp, (gram,) = _with(gram)
    values = xp.linalg.eigvalsh(gram)[::-1]
    noise = gram.shape[0] * xp.finfo(gram.dtype).eps * values[0]
    return xp.where(values > noise, values, 0)


def covariance_spectrum(z: Any, mask: Any = None) -> Array | np.ndarray:
    """Returns the eigenvalues `[d]` of the centred covariance of `z` `[n, d]`, the largest first.

    The covariance is that of the population (over n, not n - 1).
    """
    xp, (z, mask) = _with(z, mask)
    w = _weights(xp, z, mask)
    centred = (z - _masked_mean(w, z)[None, :]) * w[:, None]
    return eigenvalues(centred.T @ centred / _at_least(w.sum(), 1))


def effective_rank_from_gram(gram: Any, *, eps: float = 1e-7) -> Any:
    """Returns `rankme` of embeddings with this Gram matrix `[d, d]`, which may be scaled."""
    xp, (gram,) = _with(gram)
    sigma = xp.sqrt(eigenvalues(gram))
    total = sigma.sum()
    p = sigma / xp.where(total > 0, total, 1) + eps
    return xp.exp(_entropy(xp, p))


def rankme(z: Any, mask: Any = None, *, eps: float = 1e-7) -> Any:
    """Returns the effective rank of `z` `[n, d]`, between 1 and min(n, d) but for `eps`.

    `exp(-sum_k p_k log p_k)` with `p_k = sigma_k / sum_j sigma_j + eps` over the singular values
    of the uncentred matrix (RankMe, Garrido et al. 2023, arXiv:2210.02885, eq. 1 and 2). Compare
    states of one method only: it does not rank methods.
    """
    xp, (z, mask) = _with(z, mask)
    rows = z * _weights(xp, z, mask)[:, None]
    n, d = z.shape
    return effective_rank_from_gram(rows @ rows.T if n < d else rows.T @ rows, eps=eps)


def alpha_req(z: Any, mask: Any = None, *, low: float = 0.1, high: float = 0.5) -> Any:
    """Returns the decay of the covariance spectrum of `z` `[n, d]`: lambda_j ~ j^-alpha.

    It is the slope of the least-squares line through (log j, -log lambda_j) over the middle of the
    spectrum (alpha-ReQ, Agrawal et al. 2022, NeurIPS). According to the authors, values near 1 are
    good. Values far above 1 indicate collapse, values below 1 a flat spectrum. Eigenvalues of 0
    count as one rounding error of the largest.

    Args:
      z: embeddings.
      mask: 0 on rows that do not count.
      low, high: the ranks j of the fit, from `low * d` to `high * d`; of at least 3 ranks. For
        comparisons n should exceed d.
    """
    xp, (z, mask) = _with(z, mask)
    values = covariance_spectrum(z, mask)
    d = z.shape[1]
    first = max(1, round(low * d))
    last = min(d, max(first + 2, round(high * d)))
    first = max(1, min(first, last - 2))
    floor = xp.finfo(z.dtype).eps * values[0]
    tiny = xp.finfo(z.dtype).tiny
    y = -xp.log(_at_least(_at_least(values[first - 1 : last], floor), tiny))
    x = np.log(np.arange(first, last + 1, dtype=np.float64))
    x = xp.asarray(x - x.mean(), z.dtype)
    return (x * y).sum() / _at_least((x * x).sum(), tiny)


def lidar(views: Any, mask: Any = None, *, delta: float = 1e-4, eps: float = 1e-7) -> Any:
    """Returns the effective rank of the linear discriminants between examples.

    With q views of each of n examples as one class, between- and within-class covariances
    `S_b = sum_i m_i m_i^T / (n - 1)`, `m_i` the centred mean of example i, and `S_w = sum_ij e_ij
    e_ij^T / (n (q - 1)) + delta I`, `e_ij` the deviation of view j from its mean: the entropy of
    the eigenvalues of `S_w^-1/2 S_b S_w^-1/2` over their sum, plus `eps`, as in `rankme` (LiDAR,
    Thilak et al. 2024, arXiv:2312.04000, section 4).

    Args:
      views: `[v, n, d]`, v at least 2.
      mask: `[n]`, 0 on examples that do not count.
      delta: ridge of the within-class covariance, in units of squared embeddings; at least d
        rounding errors of its trace.
      eps: added to the shares.
    """
    xp, (views, mask) = _with(views, mask)
    v, _, d = views.shape
    w = _weights(xp, views[0], mask)
    n = w.sum()
    means = views.mean(0)
    inner = ((views - means[None]) * w[None, :, None]).reshape(-1, d)
    centred = (means - _masked_mean(w, means)[None, :]) * w[:, None]
    within = inner.T @ inner / (_at_least(n, 1) * (v - 1))
    ridge = _at_least(d * xp.finfo(views.dtype).eps * xp.trace(within), delta)
    # The Cholesky factor can replace the symmetric root: both give the spectrum of S_w^-1 S_b.
    root = xp.linalg.cholesky(within + ridge * xp.eye(d, dtype=views.dtype))
    white = _solve(xp, root, centred.T)
    values = eigenvalues(white @ white.T / _at_least(n - 1, 1))
    total = values.sum()
    return xp.exp(_entropy(xp, values / xp.where(total > 0, total, 1) + eps))


def _solve(xp: ModuleType, lower: Any, right: Any) -> Any:
    """Returns `x` with `lower @ x = right`, `lower` a lower triangle."""
    if xp is np:
        return np.linalg.solve(lower, right)
    return jax.scipy.linalg.solve_triangular(lower, right, lower=True)


def uniformity(z: Any, mask: Any = None, *, t: float = 2.0) -> Any:
    """Returns `log mean_{i<j} exp(-t |z_i - z_j|^2)` over normalised rows of `z` `[n, d]`.

    At most 0, which is collapse (Wang and Isola 2020, arXiv:2005.10242, eq. 5). It takes n^2
    distances. With fewer than two rows it is 0.
    """
    xp, (z, mask) = _with(z, mask)
    w = _weights(xp, z, mask)
    z = _normalized(xp, z)
    block = len(z) if xp is jnp else BLOCK
    total = 0.0
    for start in range(0, len(z), block):
        rows, kept = z[start : start + block], w[start : start + block]
        kernel = xp.exp(2 * t * (rows @ z.T - 1))  # |a - b|^2 = 2 - 2 ab
        total += kept @ kernel @ w
    n = w.sum()
    pairs = n * (n - 1)
    # Subtract the diagonal as it was added: exp(0) for each unit row, e^-2t for each zero row.
    own = w @ xp.exp(2 * t * ((z * z).sum(-1) - 1))
    mean = (total - own) / _at_least(pairs, 1)
    return xp.log(xp.where(pairs > 0, _at_least(mean, xp.finfo(z.dtype).tiny), 1))


def alignment(views: Any, mask: Any = None, *, power: float = 2.0) -> Any:
    """Returns the mean of `|z_a - z_b|^power` over pairs of views of one example, normalised.

    `views` is `[v, n, d]`, v at least 2; 0 is perfect (Wang and Isola 2020, eq. 4).
    """
    xp, (views, mask) = _with(views, mask)
    w = _weights(xp, views[0], mask)
    z = _normalized(xp, views)
    v = len(z)
    total = 0.0
    for a in range(v):
        for b in range(a + 1, v):
            square = ((z[a] - z[b]) ** 2).sum(-1)
            total += _masked_mean(w, square if power == 2 else square ** (power / 2))
    return total / (v * (v - 1) / 2)


def normalized_std(z: Any, mask: Any = None) -> Any:
    """Returns the mean over dimensions of the deviation of normalised rows of `z`, times sqrt(d).

    1 for directions spread evenly, 0 where all rows point the same way (Chen and He 2021,
    arXiv:2011.10566, section 4.1). It does not see a collapse onto some of the dimensions.
    """
    xp, (z, mask) = _with(z, mask)
    w = _weights(xp, z, mask)
    z = _normalized(xp, z)
    centred = z - _masked_mean(w, z)[None, :]
    return xp.sqrt(_masked_mean(w, centred * centred)).mean() * z.shape[1] ** 0.5


def feature_variance(z: Any, mask: Any = None) -> Any:
    """Returns the mean over dimensions of the variance of `z` `[n, d]`, not normalised."""
    xp, (z, mask) = _with(z, mask)
    w = _weights(xp, z, mask)
    centred = z - _masked_mean(w, z)[None, :]
    return _masked_mean(w, centred * centred).mean()


def prototype_entropy(assignments: Any, mask: Any = None) -> Any:
    """Returns the entropy, in nats, of the mean of assignments `[n, k]`, each a distribution.

    log k where all prototypes are used alike, 0 where one takes everything.
    """
    xp, (assignments, mask) = _with(assignments, mask)
    return _entropy(xp, _masked_mean(_weights(xp, assignments, mask), assignments))
