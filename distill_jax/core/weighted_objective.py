"""An objective whose loss terms are weighted per example or per token by a weighting."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.analysis import dependence
from distill_jax.core.api import (
    Array,
    Batch,
    Evidence,
    ExampleWeighting,
    Key,
    Model,
    Nets,
    Objective,
    Outputs,
    PyTree,
    Role,
    Samples,
    State,
    Terms,
)
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.core.means import per_row
from distill_jax.core.partition import named_leaves
from distill_jax.core.state import Shapes, zeros
from distill_jax.core.steps import BoundNets

CONTROLS = ("none", "frozen", "joint", "shuffled", "batch_mean")
"""Control experiments for a weighting with networks. "none" is the regular method. In the others,
the weighting is never trained; or it is trained with the student on the training loss; or it is
trained regularly, and the student uses the weights of a batch in permuted order, or their mean."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedObjective(Objective):
    """`sum_s w_s * loss_term_s` in place of the fixed coefficients of an objective.

    Terms of the objective that are not among `loss_terms` keep their coefficients. Where the loss
    terms are `[b, t]`, the weighting sees one row for each token instead of each example.

    Attributes:
      objective: a method that returns the loss terms.
      weighting: computes the weights.
      loss_terms: names of terms of one shape, in the order of the weights `[n, s]`.
      num_classes: k, 0 if the data has no classes; for other tasks the number of outputs.
      task: task of the labels, one of `core.api.TASKS`.
      control: one of `CONTROLS`.
      stop_features: whether to stop the gradient through the weighting's evidence. Without it the
        student could lower its loss by changing the weights.
    """

    objective: Objective
    weighting: ExampleWeighting
    loss_terms: tuple[str, ...]
    num_classes: int = 0
    task: str = "classification"
    control: str = "none"
    stop_features: bool = True

    def __post_init__(self):
        if self.control not in CONTROLS:
            hint = nearest(self.control, CONTROLS)
            raise ArgumentError(f"unknown control {self.control!r}", where="control", hint=hint)
        if not self.loss_terms or len(set(self.loss_terms)) != len(self.loss_terms):
            raise ArgumentError(
                f"the loss terms are {self.loss_terms}",
                where="loss_terms",
                hint="name each weighted term once",
            )

    @property
    def roles(self) -> tuple[Role, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (*self.objective.roles, *self.weighting.roles)

    @property
    def couples_batch(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        coupled = self.objective.couples_batch or self.weighting.couples_batch
        return coupled or self.control in ("shuffled", "batch_mean")

    @property
    def auxiliary(self) -> tuple[Role, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (*self.objective.auxiliary, *self.weighting.roles)

    @property
    def needs_dataset_pass(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.objective.needs_dataset_pass

    def phases(self) -> Sequence[tuple[int | float | str, Objective]]:
        """Those of the objective, each weighted: all have the weighted loss terms."""
        own = self.objective
        return tuple(
            (start, self if part is own else dataclasses.replace(self, objective=part))
            for start, part in own.phases()
        )

    def dataset_pass(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Array]:
        return self.objective.dataset_pass(nets, batch, memory["objective"], step)

    def init_memory(
        self,
        rows: Mapping[str, np.ndarray],
        ids: np.ndarray,
        memory: PyTree,
        random: np.random.Generator,
    ) -> PyTree:
        inner = self.objective.init_memory(rows, ids, memory["objective"], random)
        return {**memory, "objective": inner}

    def memory(self, key: Key, batch: Batch) -> PyTree:
        """The objective's own memory and, where the weighting needs it, a class-mean table.

        The table starts as uniform rows; `class_means` gives its values.
        """
        memory: dict[str, Any] = {"objective": self.objective.memory(key, batch)}
        if "class_means" in self.weighting.needs:
            if not self.num_classes or self.task != "classification":
                raise ArgumentError(
                    "the weighting compares with class means, and the data has no classes",
                    where="weighting",
                    hint="choose blocks or another weighting that needs no class means",
                )
            k = self.num_classes
            memory["class_means"] = jnp.full((k, k), 1 / k, jnp.float32)
        return memory

    def loss_terms_of(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        """Returns the unweighted terms of the objective, with the memory of this objective."""
        terms = self.objective.loss(nets, batch, memory["objective"], step)
        for name in self.loss_terms:
            if name not in terms.values:
                raise ArgumentError(
                    f"the objective has no loss term {name!r}",
                    where="loss_terms",
                    hint=nearest(name, terms.values),
                )
        shapes = {name: terms.values[name].shape for name in self.loss_terms}
        if len(set(shapes.values())) > 1:
            raise ArgumentError(
                f"the loss terms have shapes {', '.join(f'{n} {x}' for n, x in shapes.items())}",
                where="loss_terms",
                hint="a weighting weights either the examples or the tokens of all its terms",
            )
        if terms.memory is None:
            return terms
        return dataclasses.replace(terms, memory={**memory, "objective": terms.memory})

    def evidence(self, terms: Terms, batch: Batch, memory: PyTree) -> Evidence:
        """Returns the weighting's inputs for a batch.

        Raises:
          ArgumentError: the loss terms are `[b, t]` and the weighting needs class means.
        """
        shape = terms.values[self.loss_terms[0]].shape
        of_tokens = len(shape) > 1
        if of_tokens and "class_means" in memory:
            raise ArgumentError(
                f"{type(self.weighting).__name__} compares with class means, and the loss terms "
                "are of tokens",
                where="weighting",
                hint="blocks or another weighting that needs no class means",
            )
        fitting = {role: x for role, x in terms.logits.items() if x.shape[:-1] == shape}
        logits = {role: x.reshape(-1, x.shape[-1]) for role, x in fitting.items()}
        labels = self._token_labels if of_tokens else self._labels
        return Evidence(
            loss_terms={name: _per_count(terms, name) for name in self.loss_terms},
            logits=logits,
            label_probs=labels(batch, logits),
            class_means=memory.get("class_means"),
            mask=self.row_mask(terms, batch["mask"]),
            task=self.task,
        )

    def _labels(self, batch: Batch, logits: Mapping[Role, Array]) -> Array | None:
        """Returns labels as probabilities. The teacher's prediction stands for a hidden class.

        Without a teacher a hidden label (`labelled`) is zero everywhere.
        """
        label_probs = batch.get("label_probs")
        if label_probs is None and self.num_classes and "label" in batch:
            if self.task == "classification":
                label_probs = jax.nn.one_hot(batch["label"], self.num_classes)
                if "labelled" in batch:
                    guess = jnp.zeros_like(label_probs)
                    if "teacher" in logits:
                        guess = jax.nn.one_hot(logits["teacher"].argmax(-1), self.num_classes)
                    label_probs = jnp.where(batch["labelled"][:, None] > 0, label_probs, guess)
            elif self.task == "multilabel":
                label_probs = batch["label"]
        return label_probs

    def _token_labels(self, batch: Batch, logits: Mapping[Role, Array]) -> Array | None:
        sizes = {x.shape[-1] for x in logits.values()}
        if "target" not in batch or len(sizes) != 1:
            return None
        return jax.nn.one_hot(batch["target"].reshape(-1), sizes.pop())

    def row_mask(self, terms: Terms, mask: Array) -> Array:
        """Returns the mask `[n]` of the rows that the weighting sees, from that of examples.

        Rows are the examples, or the tokens where the loss terms are `[b, t]`. A row is masked as
        well if every loss term counts 0 there.
        """
        shape = terms.values[self.loss_terms[0]].shape
        rows = jnp.broadcast_to(per_row(mask, terms.values[self.loss_terms[0]]), shape)
        if all(name in terms.counts for name in self.loss_terms):
            counted = [terms.counts[name] > 0 for name in self.loss_terms]
            rows = rows * functools.reduce(jnp.logical_or, counted)
        return rows.reshape(-1)

    def weights(self, nets: Nets, evidence: Evidence, step: Array) -> Array:
        """Returns the weighting's `[n, s]`, checked.

        Raises:
          ArgumentError: the weights are not one for each row and loss term. Weights `[n, 1]` and
            losses `[n]` would broadcast to all pairs of rows.
        """
        if self.stop_features:
            evidence = jax.lax.stop_gradient(evidence)
        weights = self.weighting(nets, evidence, step)
        expected = (*evidence.mask.shape, len(self.loss_terms))
        if weights.shape != expected:
            raise ArgumentError(
                f"{type(self.weighting).__name__} gave weights of shape {weights.shape}, "
                f"not one for each row and loss term {expected}",
                where="weighting",
                hint=f"the loss terms are {', '.join(self.loss_terms)}",
            )
        return weights

    def used(self, weights: Array, mask: Array, step: Array) -> Array:
        """Returns the weights `[n, s]` that the student gets, changed by a control.

        Args:
          weights: `[n, s]`.
          mask: `[n]`, from `row_mask`. Masked rows take no part in a control.
          step: number of finished steps.
        """
        if self.control == "shuffled":
            # The same order on every mesh and for every seed: only the pairing is to be broken.
            key = jax.random.fold_in(jax.random.key(0), step)
            order = jax.random.permutation(key, weights.shape[0])
            to = jnp.argsort(mask <= 0, stable=True)
            order = order[jnp.argsort(mask[order] <= 0, stable=True)]
            return jnp.zeros_like(weights).at[to].set(weights[order])
        if self.control == "batch_mean":
            mean = (mask[:, None] * weights).sum(0) / jnp.maximum(mask.sum(), 1)
            return jnp.broadcast_to(mean[None], weights.shape)
        return weights

    def with_weights(self, terms: Terms, weights: Array) -> Terms:
        """Returns terms with `weights` `[n, s]` in place of the coefficients of the loss terms.

        Weights of the objective itself stay as factors.
        """
        own, shape = terms.weights, terms.values[self.loss_terms[0]].shape
        columns = {
            name: weights[:, j].reshape(shape) * own.get(name, 1)
            for j, name in enumerate(self.loss_terms)
        }
        coef = {name: c for name, c in terms.coef.items() if name not in columns}
        return dataclasses.replace(terms, weights={**terms.weights, **columns}, coef=coef)

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        terms = self.loss_terms_of(nets, batch, memory, step)
        evidence = self.evidence(terms, batch, memory)
        weights = self.weights(nets, evidence, step)
        return self.with_weights(terms, self.used(weights, evidence.mask, step))

    def predictions(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Outputs]:
        return self.objective.predictions(nets, batch, memory["objective"], step)

    def example_weights(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Outputs:
        """Returns the weights and the logits in the evidence, in evaluation mode.

        Weights are `[b, s]`, or `[b, t, s]` where the loss terms are of tokens; logits likewise.
        """
        terms = self.loss_terms_of(_Evaluating(nets), batch, memory, step)
        evidence = self.evidence(terms, batch, memory)
        rows = {"weights": self.weights(nets, evidence, step), **evidence.logits}
        shape = terms.values[self.loss_terms[0]].shape
        return {name: x.reshape(*shape, x.shape[-1]) for name, x in rows.items()}

    def class_sums(self, nets: Nets, batch: Batch, memory: PyTree) -> tuple[Array, Array]:
        """Returns sums of teacher probabilities by class `[k, k]` and class counts `[k]`."""
        terms = self.loss_terms_of(_Evaluating(nets), batch, memory, jnp.int32(0))
        if "teacher" not in terms.logits:
            raise ArgumentError(
                f"{type(self.weighting).__name__} compares with class means of a teacher, and "
                f"{type(self.objective).__name__} has none",
                where="weighting",
            )
        probs = jax.nn.softmax(terms.logits["teacher"])
        known = batch["mask"] * (batch["labelled"] > 0) if "labelled" in batch else batch["mask"]
        label = jax.nn.one_hot(batch["label"], self.num_classes) * known[:, None]
        return label.T @ probs, label.sum(0)


def _per_count(terms: Terms, name: str) -> Array:
    """Returns the values of a term as rows `[n]`; of a sum, its mean."""
    if name not in terms.counts:
        return terms.values[name].reshape(-1)
    count = terms.counts[name]
    return (terms.values[name] / jnp.where(count > 0, count, 1)).reshape(-1)


def networks(objective: Objective) -> tuple[Role, ...]:
    """Returns the roles that are networks of a weighting."""
    return tuple(objective.weighting.roles) if isinstance(objective, WeightedObjective) else ()


def class_means(sums: Array, counts: Array) -> Array:
    """Returns mean probabilities `[k, k]` from `class_sums`; an empty class is uniform."""
    k = counts.shape[0]
    return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], 1 / k)


def dead_parameters(
    weighted: WeightedObjective, models: Mapping[Role, Model], shapes: Shapes
) -> list[tuple[Role, str]]:
    """Returns the weighting's parameters that cannot reach a weight, as (role, path).

    It uses structure and shapes alone: their gradient is zero for all values.
    """
    roles = {role: shapes.roles[role] for role in weighted.weighting.roles}
    params = {role: shape.params for role, shape in roles.items()}
    state = {role: zeros(shape.state) for role, shape in roles.items()}
    evidence = jax.eval_shape(weighted.evidence, shapes.terms, shapes.batch, shapes.memory)
    direction = jax.ShapeDtypeStruct((*evidence.mask.shape, len(weighted.loss_terms)), jnp.float32)

    def gradient(params: Any, evidence: Evidence, direction: Array, key: Key) -> PyTree:
        def along(params: Any) -> Array:
            nets = BoundNets(models, params, state, key=key)
            return (direction * weighted.weights(nets, evidence, jnp.int32(1))).sum()

        return jax.grad(along)(params)

    key = jax.eval_shape(jax.random.key, 0)
    dead = dependence.dead_leaves(gradient, params, evidence, direction, key)
    names = named_leaves(params)
    unreached = [n.partition("/") for n, is_dead in zip(names, dead, strict=True) if is_dead]
    return [(role, path) for role, _, path in unreached]


def roles_of_class_means(
    weighted: WeightedObjective, models: Mapping[Role, Model], shapes: Shapes
) -> set[Role]:
    """Returns the networks that the class means depend on; none if the weighting needs none.

    The table is computed once, before the first step, so these networks must not change.
    """
    if "class_means" not in weighted.weighting.needs:
        return set()
    params = {role: shape.params for role, shape in shapes.roles.items()}
    state = {role: shape.state for role, shape in shapes.roles.items()}

    def sums(params: Any, state: Any, batch: Batch, memory: PyTree, key: Key) -> Array:
        nets = BoundNets(models, params, state, key=key)
        return weighted.class_sums(nets, batch, memory)[0]

    key = jax.eval_shape(jax.random.key, 0)
    used = dependence.inputs_used(sums, params, state, dict(shapes.batch), shapes.memory, key)
    return {name.split("/")[1] for name in used if name.startswith("0/")}


@dataclasses.dataclass(frozen=True)
class _Evaluating:
    """Networks that are always in evaluation mode, for any `train` argument."""

    nets: Nets

    def __call__(
        self, role: Role, *inputs: Any, train: bool = False, stop_gradient_params: bool = False
    ) -> tuple[Outputs, State]:
        del train
        return self.nets(role, *inputs, train=False, stop_gradient_params=stop_gradient_params)

    def sample(
        self, role: Role, prompt: Array, start: Array | None = None, **options: Any
    ) -> Samples:
        return self.nets.sample(role, prompt, start, **options)

    def after_sgd_step(
        self, role: Role, loss: Callable[[Nets], Array], *, lr: float
    ) -> "_Evaluating":
        return _Evaluating(
            self.nets.after_sgd_step(role, lambda nets: loss(_Evaluating(nets)), lr=lr)
        )
