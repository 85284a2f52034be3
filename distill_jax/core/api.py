"""The contracts between networks, data, training methods and the step builders.

Shape letters used throughout: b batch, k classes, d embedding, v views, s signals, n data set,
q queue.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from flax import struct

Array: TypeAlias = jax.Array
Key: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Role: TypeAlias = str
Params: TypeAlias = PyTree
State: TypeAlias = PyTree
Outputs: TypeAlias = Mapping[str, Array]
Batch: TypeAlias = Mapping[str, Any]
"""Arrays with a leading axis b. Always present: `input` (an array or a dict of arrays), `mask`
float32 `[b]` (0 on padding), `index` int32 `[b]` (position in the source) and `epoch` int32
`[b]`. Usually `label`: int32 `[b]`, or float32 `[b, m]` of several labels or of real values
(`data.labels`). Where some are unknown, `labelled` of the same shape, 0 where they are. After
mixing transforms, or of data with soft labels, `label_probs` `[b, k]`. Where a teacher sees
something else than the student, `teacher_input`; where its answers are stored, `teacher_outputs`
`{role: {output: [b, ...]}}`. Where a method compares views, `views` `[b, v, h, w, c]` and, of
another size, `local_views`."""


TASKS = ("classification", "multilabel", "regression")
"""What a label may be: one class, several labels at once, or real values."""


class Model(NamedTuple):
    """A network as two pure functions: all that the rest of the package ever sees.

    Attributes:
      init: `(key, *inputs) -> (params, state)`, plain nested dicts of arrays.
      apply: `(params, state, *inputs, train, rngs) -> (outputs, new_state)`. `outputs` is a dict
        of named arrays (`logits` `[b, k]`, the values themselves in a regression; `embedding`
        `[b, d]`, `stage1`, ...); `rngs` maps a purpose ("dropout") to a key; `new_state` equals
        `state` where `train` is false.
    """

    init: Callable[..., tuple[Params, State]]
    apply: Callable[..., tuple[Outputs, State]]


class Nets(Protocol):
    """The networks of a step by role, bound to their parameters, state, precision and keys."""

    def __call__(
        self, role: Role, *inputs: Any, train: bool = False, stop_gradient_params: bool = False
    ) -> tuple[Outputs, State]:
        """Applies the network of `role`; outputs are float32 whatever the compute precision.

        Args:
          role: its name in the config.
          *inputs: arrays with leading axis b.
          train: training mode: batch statistics of this batch, dropout.
          stop_gradient_params: whether this call stops the gradient to the network's
            parameters. It still reaches the inputs: what an adversary learns from.
        """
        ...

    def after_sgd_step(self, role: Role, loss: Callable[["Nets"], Array], *, lr: float) -> "Nets":
        """Returns these networks after one step of gradient descent of one of them.

        The step is differentiable: the gradient of what the adapted network says reaches the
        parameters before the step and whatever else `loss` depends on.

        Args:
          role: the network that takes the step; the others stay as they are.
          loss: a scalar of networks like these.
          lr: the step size.
        """
        ...


@struct.dataclass
class Terms:
    """What an objective returns; averaging, weighting and logging belong to the step.

    Attributes:
      values: per-example losses by name, each `[b]`, never reduced.
      state: new model state by role (batch statistics); roles left out keep theirs.
      coef: scalar coefficients by term name, 1 where left out. Schedules are evaluated by the
        objective at `step`.
      memory: the new memory of the objective (queues, banks, centres); None keeps the old one.
      weights: weights `[b]` of single examples by term name, 1 where left out; of the
        objective times those of a weighting.
      logits: logits `[b, k]` by role, which a weighting may look at. Left out where the method has
        none; it can then be weighed only by what needs none.
      embeddings: representations `[b, ..., d]` by name, whose spread is watched for collapse.
      metrics: scalars of the batch that are logged and nothing else.
    """

    values: Mapping[str, Array]
    state: Mapping[Role, State] = struct.field(default_factory=dict)
    coef: Mapping[str, Any] = struct.field(default_factory=dict)
    memory: PyTree = None
    weights: Mapping[str, Array] = struct.field(default_factory=dict)
    logits: Mapping[Role, Array] = struct.field(default_factory=dict)
    embeddings: Mapping[str, Array] = struct.field(default_factory=dict)
    metrics: Mapping[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class Evidence:
    """What a weighting may look at, all of it without gradient unless a config says otherwise.

    Attributes:
      loss_terms: per-example losses `[b]` in the order of the weights.
      logits: `[b, k]` by role, usually "student" and "teacher".
      label_probs: the label as a distribution, `[b, k]`: one-hot, or mixed by a transform. Of
        several labels, 0 or 1 for each. None where labels are real values, or there are no classes.
      class_means: mean teacher probabilities over the training examples of each class, `[k, k]`,
        row c for class c. None unless the weighting names it in `needs`.
      mask: float `[b]`, 0 on padding.
      task: what labels are, one of `TASKS`.
    """

    loss_terms: Mapping[str, Array]
    logits: Mapping[Role, Array]
    label_probs: Array | None
    class_means: Array | None
    mask: Array
    task: str = struct.field(pytree_node=False, default="classification")


class ExampleWeighting(Protocol):
    """How much each signal counts, for each example: a frozen dataclass of hyperparameters.

    Attributes:
      roles: networks that it calls through `nets`; they are the outer variables of a bilevel
        problem, or learn with the student, or stay as they are, as the config says.
      needs: parts of the evidence that must be prepared: "class_means".
      by_gradient: whether weights come from `from_gradient`, the gradient of the outer loss in the
        weights, rather than from what `__call__` returns, which is then where they start.
      couples_batch: whether one example's weights depend on the other examples.
      schedules: as of `Objective`.
    """

    roles: ClassVar[tuple[Role, ...]] = ()
    schedules: ClassVar[Mapping[str, str]] = MappingProxyType({})
    needs: ClassVar[tuple[str, ...]] = ()
    by_gradient: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False

    def __call__(self, nets: Nets, evidence: Evidence, step: Array) -> Array:
        """Returns weights `[b, s]`, one column for each signal, in the order of the evidence."""
        ...

    def from_gradient(self, gradient: Array, mask: Array) -> Array:
        """Returns weights `[b, s]` from the gradient `[b, s]` of the outer loss in them."""
        raise NotImplementedError


class Objective(Protocol):
    """A training method: a frozen dataclass that holds hyperparameters only.

    An objective never reduces over the batch and never sees an optimizer, a mesh or a key.

    Attributes:
      roles: the networks that it calls.
      couples_batch: whether one example's value depends on the other examples (negatives, batch
        statistics). Gradient accumulation is then refused.
      auxiliary: those of its networks whose logits are not of the classes of the data.
      tasks: those of `TASKS` whose labels it can read; all of them where it reads no label.
      needs_dataset_pass: whether it looks at the whole training part once, before the first step.
      schedules: its arguments that are durations (`core.durations`): "ramp", at whose end a value
        reaches its last, or "hold", before whose end something does not happen. A run must be long
        enough for them.
    """

    roles: ClassVar[tuple[Role, ...]]
    couples_batch: ClassVar[bool] = False
    auxiliary: ClassVar[tuple[Role, ...]] = ()
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    needs_dataset_pass: ClassVar[bool] = False
    schedules: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def memory(self, key: Key, batch: Batch) -> PyTree:
        """Returns the initial memory; called once, under `jit`, with a batch of zeros."""
        del key, batch
        return {}

    def loss(self, nets: Nets, batch: Batch, memory: PyTree, step: Array) -> Terms:
        """Returns the per-example terms of one batch."""
        ...

    def remembered(self, batch: Batch) -> Mapping[str, int]:
        """Returns, for each argument that is the length of a queue, its keys of one example."""
        del batch
        return {}

    def dataset_pass(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Array]:
        """Returns facts `[b, ...]` of a training batch in evaluation mode, for `init_memory`."""
        del nets, batch, memory, step
        return {}

    def init_memory(
        self,
        rows: Mapping[str, np.ndarray],
        ids: np.ndarray,
        memory: PyTree,
        random: np.random.Generator,
    ) -> PyTree:
        """Returns the memory with what was learned from the survey; runs once, on the host.

        Args:
          rows: the facts of all n training examples, `[n, ...]` each.
          ids: their ids, int32 `[n]`, as batches carry them in `index`.
          memory: the initial memory, NumPy arrays; shapes and types must stay.
          random: a generator that depends on the seed of the run.
        """
        del rows, ids, random
        return memory

    def predictions(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Outputs]:
        """Returns what the method says of a batch where that is not the output of one network.

        Evaluators read it as they read a network, under its name in place of a role: by
        convention "prediction" where there is one. Networks are called in evaluation mode.
        """
        del nets, batch, memory, step
        return {}

    def pictures(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Array]:
        """Returns images `[b, h, w, c]` by name of what the method makes of a training batch.

        A report shows them beside the images themselves. Networks are called in evaluation mode.
        """
        del nets, batch, memory, step
        return {}


@struct.dataclass
class TrainState:
    """All that a step donates and a checkpoint holds, and nothing else.

    No random key (keys are functions of seed, role, purpose and step), no frozen network and no
    data iterator (batch n is a function of seed and n).

    Attributes:
      step: int32 scalar, the number of finished steps.
      params: parameters of the trainable roles.
      targets: parameters of the roles that are moving averages of others; own buffers.
      model_state: state (batch statistics) of trainable and target roles.
      opt_state: state of the optimizer over `params`.
      memory: the objective's memory.
    """

    step: Array
    params: Mapping[Role, Params]
    targets: Mapping[Role, Params]
    model_state: Mapping[Role, State]
    opt_state: PyTree
    memory: PyTree


class Provenance(NamedTuple):
    """Where data came from; travels into every result.

    Attributes:
      name: the honest name, e.g. "Fashion-MNIST-5k/1k (train)".
      origin: package, path or builder that it was read from.
      n: number of examples.
      sha256: digest of the bytes that were read (file, or arrays where there is no file).
      licence: SPDX identifier or short licence name.
    """

    name: str
    origin: str
    n: int
    sha256: str
    licence: str = ""


@runtime_checkable
class Source(Protocol):
    """Random-access examples on the host."""

    provenance: Provenance

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns the examples at `indices` `[b]`, stacked: `input` `[b, ...]`, `label` `[b]`.

        Labels of other tasks than classification are `[b, m]`; see `data.labels`.
        """
        ...


class Dataset(NamedTuple):
    """Disjoint parts of one data set.

    Attributes:
      train: what gradients may see.
      held_out: carved from the training data; model selection sees it, and outer losses where there
        is no part of their own.
      test: read only to report.
      classes: names of the outputs of a network: of the classes, in label order; of the columns
        of several labels, or of real values. Empty where there are none.
      cardinalities: numbers of values of the categorical columns of a table, whose examples are
        `{"categorical": int32 [c], "numeric": float32 [m]}`; empty for anything else.
      task: what labels are: "classification", "multilabel" or "regression" (`data.labels`).
      outer: examples that a weighting learns from, carved from the held-out part, so that what it
        has learned from chooses nothing; None where the held-out part has both uses.
    """

    train: Source
    held_out: Source
    test: Source
    classes: tuple[str, ...] = ()
    cardinalities: tuple[int, ...] = ()
    task: str = "classification"
    outer: Source | None = None

    @property
    def outer_part(self) -> Source:
        """What outer losses see."""
        return self.held_out if self.outer is None else self.outer

    @property
    def parts(self) -> dict[str, Source]:
        """The parts by name, in the order train, held_out, outer, test."""
        outer = {} if self.outer is None else {"outer": self.outer}
        return {"train": self.train, "held_out": self.held_out, **outer, "test": self.test}


Transform: TypeAlias = Callable[[Key, Batch, Array], Batch]
"""`(key, batch, step) -> batch`: pure, batched, of static shape. Per-example randomness comes from
`rng.example_keys(key, batch)`, a function of (seed, epoch, example) alone, so that what a teacher
said of an augmented example can be stored; only transforms that pair examples (mixup) may use
`step`."""


class Evaluator(Protocol):
    """A measurement over a whole split, on the host.

    It may have more attributes:

    * `tasks`: those of `TASKS` whose labels it can read; classification where it has none.
    * `parts`, `{split: most}`: other splits whose outputs it needs, and of how many examples at
      most (None for all; they are spread evenly). It is then called with the keywords `parts`,
      `{split: (outputs, batch)}` with at least so many examples, and `split`, the name of what is
      measured, which may be among the parts. Parts must not be empty.
    * `controls`: "raw" and "initial". The test split is then measured again with the network's
      outputs replaced by its input, flattened, and by those of the network as it was initialised,
      with the batch statistics of training data; the metrics have `_raw` and `_initial` behind
      their names.
    """

    @property
    def outputs(self) -> Mapping[Role, tuple[str, ...]]:
        """The network outputs that it reads, by role: `{"student": ("logits",)}`."""
        ...

    def __call__(
        self, outputs: Mapping[Role, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
    ) -> Mapping[str, Any]:
        """Returns metrics by name: floats are logged, arrays go to the report.

        Args:
          outputs: `{role: {name: [n, ...]}}`, every example of the split once, padding removed.
          batch: `label` `[n]` and `index` `[n]`.
        """
        ...
