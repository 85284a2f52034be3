"""Label and distillation losses of the three tasks, chosen by the type of the labels."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.core import ranges
from distill_jax.core.api import TASKS, Array, Batch, Objective
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.losses import classification, multilabel, regression
from distill_jax.objectives._labels import check_smoothing, label_loss

REGRESSION = ("squared_error", "huber")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfTask(Objective):
    """A method whose losses depend on the task of the data; see `label_term` and `distillation`.

    Attributes:
      task: one of `core.api.TASKS`; set by a run from the data.
      label_smoothing: share of the target spread evenly over all classes or, with several labels,
        over present and absent, in [0, 1). Not for regression.
      class_weights: factors of the label loss. Numbers: one for each class or, with several labels,
        one for the term of each label where it is present. "balanced": computed on the training
        part, `n / (k n_c)` for a class with n_c of n examples or, with several labels, the number
        of examples without a label over the number with it.
      focal_gamma: exponent of the focal loss (Lin et al. 2017, arXiv:1708.02002), 0 or more; 0 is
        the cross-entropy. Not for regression, and not with smoothing.
      regression_loss: "squared_error" or "huber"; also the name of the label term in regression.
      huber_delta: where Huber's loss becomes linear, in units of `label_scale`.
      label_counts: number of training examples with each class or label, then the total, `[k + 1]`,
        for "balanced"; computed by a run.
      label_scale: unit in which differences of each target are measured; a run sets it to the
        standard deviation over the training part. 1 where left out.
    """

    task: str = "classification"
    label_smoothing: float = 0.0
    class_weights: str | tuple[float, ...] = ()
    focal_gamma: float = 0.0
    regression_loss: str = "squared_error"
    huber_delta: float = 1.0
    label_counts: tuple[float, ...] = ()
    label_scale: tuple[float, ...] = ()

    tasks: ClassVar[tuple[str, ...]] = TASKS

    def __post_init__(self):
        check_smoothing(self.label_smoothing)
        ranges.within("[0, inf)", focal_gamma=self.focal_gamma)
        ranges.within("(0, inf)", huber_delta=self.huber_delta, label_scale=self.label_scale)
        ranges.within("[0, inf)", label_counts=self.label_counts)
        for name, value, known in (
            ("task", self.task, TASKS),
            ("regression_loss", self.regression_loss, REGRESSION),
        ):
            if value not in known:
                hint = nearest(value, known)
                raise ArgumentError(f"unknown {name} {value!r}", where=name, hint=hint)
        if isinstance(self.class_weights, str):
            if self.class_weights not in ("", "balanced"):
                raise ArgumentError(
                    f"class_weights are {self.class_weights!r}",
                    where="class_weights",
                    hint='"balanced", or one number for each class',
                )
            if self.class_weights and not self.label_counts and self.task != "regression":
                raise ArgumentError(
                    "balanced class weights need the label counts of the training examples",
                    where="label_counts",
                    hint="those with each class, then all of them",
                )
        else:
            ranges.within("[0, inf)", class_weights=self.class_weights)
        if self.focal_gamma and self.label_smoothing:
            raise ArgumentError(
                "the focal loss uses the probability of one class, and smoothing has several",
                where="label_smoothing",
                hint="set label_smoothing or focal_gamma to 0",
            )
        unused = ("label_smoothing", "class_weights", "focal_gamma")
        if self.task == "regression":
            for name in unused:
                if getattr(self, name):
                    raise ArgumentError(
                        f"a regression has no {name}", where=name, hint="leave it out"
                    )

    def weights_of_classes(self, logits: Array) -> Array | None:
        """Returns `class_weights` as numbers `[k]` for `logits` `[b, k]`, None where none are set.

        Raises:
          ArgumentError: the number of class weights is not k.
        """
        if not self.class_weights:
            return None
        given = self.class_weights
        if isinstance(given, str):
            *counts, n = self.label_counts
            if self.task == "multilabel":
                given = tuple((n - c) / max(c, 1) for c in counts)
            else:
                given = tuple(n / (len(counts) * max(c, 1)) for c in counts)
        if len(given) != logits.shape[-1]:
            raise ArgumentError(
                f"{len(given)} class weights for {logits.shape[-1]} outputs of the student",
                where="class_weights",
                hint="one number for each class",
            )
        return jnp.asarray(given, logits.dtype)

    def label_term(self, logits: Array, batch: Batch) -> tuple[str, Array]:
        """Returns the name of the label loss and its values `[b]`.

        "cross_entropy" of the softmax with the class or, with several labels, of the sigmoids, as
        the mean over labels; `regression_loss` for real values, as the mean over targets. Unknown
        labels (`labelled`) are left out.

        Args:
          logits: `[b, k]` of the student.
          batch: with `label`, or `label_probs` of mixed or soft labels.

        Raises:
          ArgumentError: the numbers of outputs and labels differ, or labels are mixed with a focal
            loss.
        """
        if self.task == "classification":
            return "cross_entropy", self._of_class(logits, batch)
        label, known = batch["label"], batch.get("labelled")
        if label.shape != logits.shape:
            raise ArgumentError(
                f"the student has {logits.shape[-1]} outputs and labels are {list(label.shape)}",
                where="student",
                hint="one output for each column of labels",
            )
        if self.task == "multilabel":
            return "cross_entropy", multilabel.binary_cross_entropy(
                logits,
                label,
                known=known,
                smoothing=self.label_smoothing,
                positive_weights=self.weights_of_classes(logits),
                gamma=self.focal_gamma,
            )
        return self.regression_loss, self._distance(logits, label, known)

    def distillation(self, student: Array, teacher: Array, *, temperature: float) -> Array:
        """Returns the loss `[b]` between a student's outputs `[b, k]` and a teacher's.

        `distillation_kl` for classes, `binary_distillation` for several labels, `regression_loss`
        for real values, which does not use the temperature.
        """
        if self.task == "classification":
            return classification.distillation_kl(student, teacher, temperature=temperature)
        if self.task == "multilabel":
            return multilabel.binary_distillation(student, teacher, temperature=temperature)
        return self._distance(student, teacher, None)

    def _of_class(self, logits: Array, batch: Batch) -> Array:
        weights = self.weights_of_classes(logits)
        if weights is None and not self.focal_gamma:
            return label_loss(logits, batch, smoothing=self.label_smoothing)
        if "label_probs" in batch:
            if self.focal_gamma or weights is None:
                raise ArgumentError(
                    "the focal loss uses the probability of one class, and labels are mixed",
                    where="focal_gamma",
                    hint="set it to 0, or leave out transforms that mix labels",
                )
            return classification.weighted_cross_entropy(
                logits, batch["label_probs"], weights, smoothing=self.label_smoothing
            )
        label = batch["label"]
        if self.focal_gamma:
            loss = classification.focal(logits, label, gamma=self.focal_gamma)
            loss = loss if weights is None else loss * weights[label]
        else:
            probs = jax.nn.one_hot(label, logits.shape[-1])
            assert weights is not None
            loss = classification.weighted_cross_entropy(
                logits, probs, weights, smoothing=self.label_smoothing
            )
        return loss * batch["labelled"] if "labelled" in batch else loss

    def _distance(self, values: Array, target: Array, known: Array | None) -> Array:
        scale = None
        if self.label_scale:
            if len(self.label_scale) != values.shape[-1]:
                raise ArgumentError(
                    f"{len(self.label_scale)} scales for {values.shape[-1]} targets",
                    where="label_scale",
                    hint="one number for each target",
                )
            scale = jnp.asarray(self.label_scale, values.dtype)
        if self.regression_loss == "huber":
            return regression.huber(
                values, target, delta=self.huber_delta, scale=scale, known=known
            )
        return regression.squared_error(values, target, scale=scale, known=known)
