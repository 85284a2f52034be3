"""Shared code of the embedding evaluators: checks, subsets, scaling and an exact classifier."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.errors import ArgumentError, NonFiniteError

Part = tuple[Mapping[str, Mapping[str, Any]], Mapping[str, Any]]
"""Outputs `{role: {name: [n, ...]}}` of a split, and its per-example fields `[n]`."""

CONTROLS = ("raw", "initial")
"""Controls that an encoder is compared with: its input, and the encoder at initialisation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfEmbedding:
    """Common arguments of the embedding evaluators.

    Attributes:
      role: the encoder.
      output: name of its output.
      controls: the entries of `CONTROLS` to evaluate as well.
    """

    role: str
    output: str
    controls: tuple[str, ...]

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        return {self.role: (self.output,)}


class Split(NamedTuple):
    """Embeddings float64 `[n, d]` of a split, labels int64 `[n]` and positions `[n]`."""

    z: np.ndarray
    label: np.ndarray
    index: np.ndarray


def read_embedding(outputs: Mapping[str, Mapping[str, Any]], role: str, output: str) -> np.ndarray:
    """Returns an output of `role` as float64 `[n, d]`, flattened if it has more axes.

    Raises:
      ArgumentError: the output is absent, or the split is empty.
      NonFiniteError: a value is NaN or infinite.
    """
    where = f"outputs of role {role!r}"
    if output not in outputs.get(role, {}):
        raise ArgumentError(
            f"there is no {output!r} to evaluate",
            where=where,
            hint="choose an output that the network returns",
        )
    z = np.asarray(outputs[role][output], np.float64)
    if z.ndim < 2 or not z.size:
        raise ArgumentError(f"{output} has shape {z.shape}", where=where, hint="[n, d], n, d > 0")
    z = z.reshape(len(z), -1)
    finite = np.isfinite(z).all(axis=1)
    if not finite.all():
        raise NonFiniteError(
            f"{output} of {np.count_nonzero(~finite)} of {len(z)} examples is not finite, the "
            f"first at position {int(np.argmin(finite))}",
            where=where,
            hint="the model diverged or the input has NaN: look at the training loss",
        )
    return z


def read_split(part: Part, role: str, output: str, *, most: int | None = None) -> Split:
    """Returns the embeddings and labels of a split, of at most `most` examples."""
    outputs, example_info = part
    z = read_embedding(outputs, role, output)
    label = np.asarray(example_info["label"])
    if label.shape != (len(z),) or label.dtype.kind not in "iu" or label.min() < 0:
        raise ArgumentError(
            f"labels have shape {label.shape} and type {label.dtype}",
            where="label",
            hint=f"integers of shape {(len(z),)}, at least 0, are needed",
        )
    index = np.asarray(example_info.get("index", np.arange(len(z))))
    rows = spread(len(z), most)
    return Split(z[rows], label.astype(np.int64)[rows], index[rows])


def spread(n: int, most: int | None) -> np.ndarray:
    """Returns `most` of the positions 0..n-1, spread evenly; all if n is smaller."""
    if most is None or n <= most:
        return np.arange(n)
    return np.linspace(0, n - 1, most).round().astype(np.int64)


def parts_of(parts: Mapping[str, Part] | None, *names: str, where: str) -> list[Part]:
    """Returns the parts with these names; raises ArgumentError if one is missing."""
    parts = parts or {}
    for name in names:
        if name not in parts:
            raise ArgumentError(
                f"the {name} part is needed", where=where, hint="not empty, as parts"
            )
    return [parts[name] for name in names]


def check_positive(where: str, **numbers: Any) -> None:
    """Raises ArgumentError unless every given number is positive."""
    ranges.within("(0, inf)", where=where, **numbers)


def normalized(z: np.ndarray) -> np.ndarray:
    """Returns rows of unit length; zero rows stay zero."""
    norm = np.linalg.norm(z, axis=1, keepdims=True)
    return z / np.where(norm > 0, norm, 1)


class Scaler(NamedTuple):
    """Mean and standard deviation `[d]` of rows; a constant column has deviation 1."""

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, z: np.ndarray) -> "Scaler":
        scale = z.std(axis=0)
        constant = scale <= 10 * np.finfo(z.dtype).eps * np.abs(z).max(axis=0)
        return cls(z.mean(axis=0), np.where(constant, 1.0, scale))

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return (z - self.mean) / self.scale


class Whitening(NamedTuple):
    """Mean `[d]` of rows, and variances `[d]` along the columns of `directions` `[d, d]`."""

    mean: np.ndarray
    variances: np.ndarray
    directions: np.ndarray

    @classmethod
    def fit(cls, z: np.ndarray) -> "Whitening":
        mean = z.mean(axis=0)
        centred = z - mean
        return cls(mean, *np.linalg.eigh(centred.T @ centred / len(z)))

    def __call__(self, z: np.ndarray, floor: float) -> np.ndarray:
        """Variances become 1, those below `floor` times the largest as if they were that much."""
        least = max(floor * self.variances[-1], np.finfo(z.dtype).tiny)
        return (z - self.mean) @ (self.directions / np.sqrt(np.maximum(self.variances, least)))


class Linear(NamedTuple):
    """A linear classifier: `weight` `[d, k]`, `bias` `[k]`."""

    weight: np.ndarray
    bias: np.ndarray

    def predict(self, z: np.ndarray) -> np.ndarray:
        """Returns classes `[n]`; ties go to the lower one."""
        return (z @ self.weight + self.bias).argmax(axis=1)


SHARE, BLOCKS = 1e-4, 2**27
"""Of the coordinates of `fit_logistic`: weight of rows that are classified with certainty; most
numbers in the matrices of all classes."""


def _coordinates(x: np.ndarray, curvature: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Returns `[g, d, d]`: for each group the coordinates in which its Hessian is the identity.

    Args:
      x: rows `[n, d]`.
      curvature: of the loss of each row, `[g, n]`.
      penalty: diagonal of the penalty's Hessian, `[d]`.
    """
    from scipy import linalg

    eye = np.eye(x.shape[1])
    found = np.empty((len(curvature), *eye.shape))
    for own, row in zip(found, curvature, strict=True):
        hessian = x.T @ (row[:, None] * x)
        # Rounding must not make it indefinite where columns depend on each other.
        hessian.flat[:: len(eye) + 1] += penalty + 1e-12 * hessian.diagonal().max()
        lower = linalg.cholesky(hessian, lower=True)
        own[:] = linalg.solve_triangular(lower, eye, lower=True).T
    return found


def fit_logistic(
    z: np.ndarray,
    labels: np.ndarray,
    k: int,
    *,
    c: float,
    weights: np.ndarray | None = None,
    start: Linear | None = None,
    tolerance: float = 1e-4,
) -> Linear:
    """Returns the minimum of `|W|^2 / 2 + c sum_i w_i CE(z_i W + b, y_i)`, in float64.

    Multinomial logistic regression; the bias is not penalised. Classes without examples have
    weights too, which only repel. Newton's method with conjugate gradients in a trust region works
    in coordinates in which the Hessian is about the identity, since the variances of embedding
    directions differ by orders of magnitude: first that at W = 0 with the same matrix for every
    class, and with a matrix for each class, unless these would be too large, once products with the
    Hessian have cost as much as new coordinates: with a weak penalty only the few rows near a
    border count. scipy's L-BFGS-B hands tiny matrices to BLAS, whose threads wait for each
    other: 40 fits to few examples took 6 s on two busy cores instead of 0.15 s.

    Args:
      z: float64 `[n, d]`, scaled.
      labels: int `[n]` below k.
      k: number of classes.
      c: inverse penalty strength.
      weights: `[n]`, 1 by default.
      start: initial point; 0 by default.
      tolerance: gradient norm of the objective over `c * n` in those coordinates; the objective is
        within about its square of the minimum.
    """
    from scipy import optimize  # imported lazily: the import is slow

    n, d = z.shape
    w = (np.ones(n) if weights is None else weights) / n
    rows, vectors = np.arange(n), None
    if n < d:  # the minimum is a combination of rows, so n directions suffice
        vectors = np.linalg.svd(np.sqrt(w)[:, None] * z, full_matrices=False)[2].T
        z, d = z @ vectors, n
    x = np.concatenate([z, np.ones((n, 1))], axis=1)
    across = np.ascontiguousarray(x.T)  # products with k rows are 3 times as fast as with k columns
    penalty = np.r_[np.full(d, 1 / (c * n)), 0.0]
    at = np.zeros((k, d + 1))
    if start is not None:
        at[:, :d] = (start.weight if vectors is None else vectors.T @ start.weight).T
        at[:, d] = start.bias

    known: dict[str, np.ndarray] = {"at": np.array([])}  # probabilities [k, n] of the last point

    def probabilities(point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not np.array_equal(known["at"], point):
            logits = point @ across
            logits -= logits.max(axis=0)
            exp = np.exp(logits)
            total = exp.sum(axis=0)
            known["own"] = np.log(total) - logits[labels, rows]
            known["p"], known["at"] = exp / total, point
        return known["p"], known["own"]

    def step(begin: np.ndarray, basis: np.ndarray, radius: float):
        """Returns scipy's result of one step from `begin`, and the point that it reaches."""

        def times(matrices: np.ndarray, rows: np.ndarray) -> np.ndarray:
            if len(matrices) == 1:
                return rows @ matrices[0].T
            return (matrices @ rows[:, :, None])[:, :, 0]

        def point(flat: np.ndarray) -> np.ndarray:
            return times(basis, flat.reshape(k, d + 1))

        def back(residual: np.ndarray, weight: np.ndarray) -> np.ndarray:
            gradient = (residual * w) @ x + penalty * weight
            return times(basis.swapaxes(1, 2), gradient).ravel()

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weight = begin + point(flat)
            p, own = probabilities(weight)
            residual = p.copy()
            residual[labels, rows] -= 1
            value = float((w * own).sum() + (penalty * weight**2).sum() / 2)
            return value, back(residual, weight)

        def curve(flat: np.ndarray, along: np.ndarray) -> np.ndarray:
            p, _ = probabilities(begin + point(flat))
            way = point(along)
            change = way @ across
            return back(p * (change - (p * change).sum(axis=0)), way)

        options = {"maxiter": 1, "gtol": tolerance, "max_trust_radius": np.inf}
        options["initial_trust_radius"] = radius
        found = optimize.minimize(
            loss, np.zeros(at.size), jac=True, hessp=curve, method="trust-ncg", options=options
        )
        return found, begin + point(found.x)

    curvature = w[None] * ((1 / k) * (1 - 1 / k) + SHARE)
    basis, spent, radius = _coordinates(x, curvature, penalty), 0, 1.0
    several = k * (d + 1) ** 2 <= BLOCKS
    for _ in range(1000):
        found, at = step(at, basis, radius)
        way, spent = float(np.linalg.norm(found.x)), spent + found.nhev
        if found.status != 1 or radius < 1e-12:  # not out of steps, or rounding hides progress
            break
        radius = max(radius, 2 * way) if way else radius / 4
        if spent > d / 4 / (1 if several else k):  # products that cost as much as a matrix
            p, _ = probabilities(at)
            curvature = w * (p * (1 - p) + SHARE)
            curvature = curvature if several else curvature.mean(axis=0, keepdims=True)
            basis, spent = _coordinates(x, curvature, penalty), 0
    weight = at[:, :d].T
    return Linear(weight if vectors is None else vectors @ weight, at[:, d])


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Returns weights `[n]` of mean 1 that give all occurring classes the same total."""
    count = np.bincount(labels)
    return (len(labels) / (np.count_nonzero(count) * np.maximum(count, 1)))[labels]


def accuracies(labels: np.ndarray, predictions: np.ndarray) -> tuple[float, float]:
    """Returns the accuracy, and the recall averaged over the classes that occur."""
    right = (labels == predictions).astype(np.float64)
    count = np.bincount(labels)
    recall = np.bincount(labels, weights=right)[count > 0] / count[count > 0]
    return float(right.mean()), float(recall.mean())
