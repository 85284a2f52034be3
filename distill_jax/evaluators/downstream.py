"""Non-linear heads on frozen embeddings: a perceptron, and boosted trees."""

import dataclasses
import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.evaluators._features import (
    CONTROLS,
    OfEmbedding,
    Part,
    Scaler,
    accuracies,
    check_positive,
    parts_of,
    read_split,
)

WHERE = "downstream"
HEADS = ("mlp", "trees")


def _make_head(
    name: str,
    label: np.ndarray,
    *,
    hidden: tuple[int, ...],
    trees: int,
    rate: float,
    l2: float,
    seed: int,
) -> Any:
    """Returns a head that can be fitted to these labels."""
    from sklearn import ensemble, neural_network  # imported lazily: the import is slow

    if name == "trees":
        return ensemble.HistGradientBoostingClassifier(
            max_iter=trees,
            learning_rate=rate,
            l2_regularization=l2,
            max_leaf_nodes=15,
            early_stopping=False,  # pyright: ignore[reportArgumentType]  # its default is "auto"
            random_state=seed,
        )
    # Of two classes, scikit-learn draws the tenth by class: it needs both there, and two of each.
    count = np.unique(label, return_counts=True)[1]
    stops = len(count) > 2 or (len(label) >= 20 and count.min() > 1)
    return neural_network.MLPClassifier(
        hidden, early_stopping=stops, validation_fraction=0.1, max_iter=200, random_state=seed
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Downstream(OfEmbedding):
    """Heads of scikit-learn on frozen embeddings; see `make`."""

    heads: tuple[str, ...]
    hidden: tuple[int, ...]
    trees: int
    rate: float
    l2: float
    seed: int
    max_examples: int | None

    @property
    def parts(self) -> Mapping[str, int | None]:
        return {"train": self.max_examples}

    def __call__(
        self,
        outputs: Mapping[str, Mapping[str, np.ndarray]],
        batch: Mapping[str, np.ndarray],
        *,
        parts: Mapping[str, Part] | None = None,
        split: str = "test",
    ) -> dict[str, Any]:
        import threadpoolctl

        [given] = parts_of(parts, "train", where=WHERE)
        train = read_split(given, self.role, self.output, most=self.max_examples)
        query = read_split((outputs, batch), self.role, self.output)
        scaler = Scaler.fit(train.z)
        z, asked = scaler(train.z), scaler(query.z)
        metrics = {}
        for name in self.heads:
            head = _make_head(
                name,
                train.label,
                hidden=self.hidden,
                trees=self.trees,
                rate=self.rate,
                l2=self.l2,
                seed=self.seed,
            )
            # Its threads spin while waiting: on shared cores, two took 100 times as long as one.
            with threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that 200 passes did not converge
                head.fit(z, train.label)
                said = head.predict(asked)
            plain, balanced = accuracies(query.label, said)
            metrics[f"{name}_accuracy"], metrics[f"{name}_balanced_accuracy"] = plain, balanced
        return metrics


def make(
    *,
    role: str = "student",
    output: str = "embedding",
    heads: tuple[str, ...] = HEADS,
    hidden: tuple[int, ...] = (128,),
    trees: int = 50,
    rate: float = 0.2,
    l2: float = 1.0,
    seed: int = 0,
    max_examples: int | None = 4_000,
    controls: bool = True,
) -> Downstream:
    """Makes the evaluator of two non-linear scikit-learn heads.

    The embeddings are standardised by the training part. "mlp" is a perceptron with early stopping
    on a tenth of the training part, or without it where two classes have too few examples. "trees"
    is histogram-based gradient boosting. Trees need no embedding, so for tabular data
    `trees_accuracy_raw` is the baseline to compare with. No hyperparameter is selected. For linear
    heads see `probe`.

    Metrics, and those of the controls with the suffixes `_raw` and `_initial`, for NAME in
    `heads`:
      NAME_accuracy, NAME_balanced_accuracy: of the split; the latter is the mean over the classes
        that occur.

    Args:
      role: the encoder.
      output: name of the encoder's output; further axes are flattened.
      heads: "mlp", "trees" or both.
      hidden: widths of the perceptron.
      trees: rounds of boosting, each with one tree per class of at most 15 leaves.
      rate: learning rate of boosting.
      l2: penalty on the values of leaves, as lambda in XGBoost. At 0 boosting may diverge where a
        class has a handful of examples.
      seed: seed of both heads.
      max_examples: most training examples, spread evenly; none for all. Time grows with them, with
        the width of the embedding and, of trees, with the number of classes.
      controls: whether to evaluate the test split also on the raw input and on the encoder at
        initialisation.

    Raises:
      ArgumentError: a head is unknown, a number is out of range, or scikit-learn is not installed.
      NonFiniteError: on evaluation, if an embedding is NaN or infinite.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ArgumentError(
            "the heads are scikit-learn's, which is not installed",
            where=WHERE,
            hint="pip install scikit-learn",
        )
    for name in heads:
        if name not in HEADS:
            raise ArgumentError(
                f"no head {name!r}", where=f"{WHERE}.heads", hint=nearest(name, HEADS)
            )
    if not heads or not all(isinstance(w, int) and w > 0 for w in hidden):
        raise ArgumentError(
            f"heads are {heads}, hidden is {hidden}", where=WHERE, hint="one head, widths above 0"
        )
    check_positive(WHERE, rate=rate, max_examples=max_examples)
    ranges.within(f"[1, {ranges.MOST}]", where=WHERE, whole=True, trees=trees, hidden=hidden)
    ranges.within("[0, inf)", where=WHERE, l2=l2)
    if seed < 0:
        raise ArgumentError(f"seed is {seed}", where=f"{WHERE}.seed", hint="at least 0")
    return Downstream(
        role=role,
        output=output,
        heads=tuple(heads),
        hidden=tuple(hidden),
        trees=trees,
        rate=rate,
        l2=l2,
        seed=seed,
        max_examples=max_examples,
        controls=CONTROLS if controls else (),
    )
