"""Label-free measures of embeddings: rank, spectrum, spread."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from distill_jax.core import spectrum
from distill_jax.core.api import TASKS
from distill_jax.core.errors import ArgumentError
from distill_jax.evaluators._features import (
    CONTROLS,
    OfEmbedding,
    check_positive,
    read_embedding,
    spread,
)

WHERE = "representation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Representation(OfEmbedding):
    """Label-free measures of the embeddings of `role`; see `make`."""

    views: str
    max_examples: int | None

    tasks: ClassVar[tuple[str, ...]] = TASKS

    @property
    def outputs(self) -> Mapping[str, tuple[str, ...]]:
        outputs: dict[str, tuple[str, ...]] = {self.role: (self.output,)}
        if self.views:
            role, _, name = self.views.partition("/")
            outputs[role] = (*outputs.get(role, ()), name)
        return outputs

    def __call__(
        self, outputs: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        z = read_embedding(outputs, self.role, self.output)
        z = z[spread(len(z), self.max_examples)]
        values = spectrum.covariance_spectrum(z)
        metrics: dict[str, Any] = {
            "rankme": float(spectrum.rankme(z)),
            "normalized_std": float(spectrum.normalized_std(z)),
            "feature_variance": float(spectrum.feature_variance(z)),
            "uniformity": float(spectrum.uniformity(z)),
            "spectrum": values,
        }
        if z.shape[1] > 2 and values[0] > 0:
            metrics["alpha_req"] = float(spectrum.alpha_req(z))
        role, _, name = self.views.partition("/")
        if self.views and name in outputs.get(role, {}):
            views = np.asarray(outputs[role][name], np.float64)
            if views.ndim != 3 or views.shape[1] < 2:
                raise ArgumentError(
                    f"{self.views} has shape {views.shape}",
                    where=f"{WHERE}.views",
                    hint="[n, v, d] with two or more views is needed",
                )
            views = views[spread(len(views), self.max_examples)].swapaxes(0, 1)
            metrics["lidar"] = float(spectrum.lidar(views))
            metrics["alignment"] = float(spectrum.alignment(views))
        return metrics


def make(
    *,
    role: str = "student",
    output: str = "embedding",
    views: str = "",
    max_examples: int | None = 10_000,
    controls: bool = True,
) -> Representation:
    """Makes the evaluator of label-free measures of embeddings `[n, d]`, in float64.

    Any of the metrics may select the best checkpoint (`eval.metric=held_out/rankme`), since no
    label is read. They compare states and hyperparameters of one method, not different methods.

    Metrics, and those of the controls with the suffixes `_raw` and `_initial` (see
    `core.spectrum` for the definitions):
      rankme: effective rank of the uncentred embeddings, at most min(n, d).
      alpha_req: decay of the covariance spectrum; omitted if d < 3 or the embeddings are constant.
      normalized_std: deviation of unit embeddings, times sqrt(d): 1 is even, 0 is collapse.
      feature_variance: mean variance of a dimension, not normalised.
      uniformity: log mean Gaussian potential of unit embeddings; 0 is collapse.
      lidar, alignment: from the views of each example, if `views` is given.
      spectrum: array `[d]`, eigenvalues of the centred covariance, the largest first.

    Args:
      role: the encoder.
      output: name of the encoder's output; further axes are flattened.
      views: "role/output" of embeddings `[n, v, d]` of v views of each example, such as from
        a method's `predictions`; empty if there are none.
      max_examples: maximum number of examples, spread evenly; None for all. The cost of
        `uniformity` is quadratic.
      controls: whether to evaluate the test split also on the raw input and on the encoder at
        initialisation.

    Raises:
      ArgumentError: a number is not positive, or `views` names no output.
      NonFiniteError: on evaluation, if an embedding is NaN or infinite.
    """
    check_positive(WHERE, max_examples=max_examples)
    if views and not all(views.partition("/")):
        raise ArgumentError(f"views is {views!r}", where=f"{WHERE}.views", hint="role/output")
    return Representation(
        role=role,
        output=output,
        views=views,
        max_examples=max_examples,
        controls=CONTROLS if controls else (),
    )
