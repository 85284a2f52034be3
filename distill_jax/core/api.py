"""The contracts between networks, data, training methods and the step builders.

Shape letters used throughout: b batch, t tokens, k classes, d embedding, v views, s signals, n data
set, q queue.
"""

from collections.abc import Callable, Mapping, Sequence
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
mixing transforms, or for data with soft labels, `label_probs` `[b, k]`. If the teacher has its own
view, `teacher_input`. If its outputs are stored, `teacher_outputs` `{role: {output: [b, ...]}}`. If
a method compares views, `views` `[b, v, h, w, c]` and, of another size, `local_views`. For text,
`input` is int32 `[b, t]` and a transform makes `target` int32 `[b, t]` and `target_mask` float32
`[b, t]`, 0 where a position has no target."""


TASKS = ("classification", "multilabel", "regression")
"""Tasks of labels: one class, several labels at once, or real values."""


class Decode(NamedTuple):
    """A causal network with a cache, to sample from (`core.sampling`).

    Attributes:
      cache: `(b, length, dtype) -> cache`, zeros with leaves `[b, ...]`, for `length` columns.
      step: `(params, tokens, cache, at, start) -> (logits, cache)`. It reads `tokens` int `[b, t]`
        into the columns from `at` (a scalar) on and returns the logits `[b, v]` after the last of
        them. Columns before `start` int `[b]` are padding. With whole prompts it is the prefill.
      vocabulary: v.
    """

    cache: Callable[[int, int, Any], PyTree]
    step: Callable[[Params, Array, PyTree, Array, Array], tuple[Array, PyTree]]
    vocabulary: int


class Samples(NamedTuple):
    """Continuations of prompts.

    Attributes:
      tokens: int32 `[b, k, p + steps]`, the unchanged prompts, followed by the sampled tokens. An
        end token is repeated up to the end (0 if none is set).
      mask: float32 `[b, k, p + steps]`, 1 for sampled tokens, including the end token.
      log_probs: float32 `[b, k, p + steps]` (float64 for such networks), log-probabilities of the
        sampled tokens in the distribution they were sampled from (at temperature 0: the network's
        softmax), 0 elsewhere.
    """

    tokens: Array
    mask: Array
    log_probs: Array


class Model(NamedTuple):
    """A network as pure functions. The rest of the package uses nothing else of it.

    Attributes:
      init: `(key, *inputs) -> (params, state)`, plain nested dicts of arrays.
      apply: `(params, state, *inputs, train, rngs) -> (outputs, new_state)`. `outputs` is a dict
        of named arrays (`logits` `[b, k]`, the values themselves in a regression; `embedding`
        `[b, d]`, `stage1`, ...). `rngs` maps a purpose ("dropout") to a key. `new_state` equals
        `state` if `train` is false.
      decode: of a causal network over tokens: how to sample from it; None for all others.
    """

    init: Callable[..., tuple[Params, State]]
    apply: Callable[..., tuple[Outputs, State]]
    decode: Decode | None = None


class Nets(Protocol):
    """The networks of a step by role, bound to their parameters, state, precision and keys."""

    def __call__(
        self, role: Role, *inputs: Any, train: bool = False, stop_gradient_params: bool = False
    ) -> tuple[Outputs, State]:
        """Applies the network of `role`; outputs are float32 for every compute precision.

        Args:
          role: name of the network.
          *inputs: arrays with leading axis b.
          train: training mode: batch statistics of this batch, dropout.
          stop_gradient_params: whether this call stops the gradient to the network's
            parameters. The gradient still reaches the inputs, so that an adversary can learn.
        """
        ...

    def after_sgd_step(self, role: Role, loss: Callable[["Nets"], Array], *, lr: float) -> "Nets":
        """Returns these networks after one step of gradient descent of one of them.

        The step is differentiable: the gradient of the new network's outputs reaches the
        parameters before the step and everything else that `loss` depends on.

        Args:
          role: the network that takes the step; the others do not change.
          loss: a function from networks like these to a scalar.
          lr: the step size.
        """
        ...

    def sample(
        self,
        role: Role,
        prompt: Array,
        start: Array | None = None,
        *,
        steps: int,
        count: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        end: int = -1,
    ) -> Samples:
        """Samples `count` continuations of each prompt, in evaluation mode, without gradient.

        A draw is a function of the parameters, the prompt, and (seed, step, epoch, example, draw),
        so that it is the same in any micro-batch, order and division over devices.

        Args:
          role: a network with `decode`.
          prompt: ids, int `[b, p]`, padded on the left, for the examples of the batch in order.
          start: int `[b]`, the first column of each prompt that is not padding; None for no
            padding.
          steps: maximum number of sampled tokens.
          count: k, number of continuations.
          temperature: T of the softmax; 0 takes the most probable token.
          top_k: number of most probable tokens to sample from; 0 samples from all tokens.
          end: the token that ends a sequence; -1 for none.

        Raises:
          ArgumentError: the network cannot be sampled from, or an argument is invalid.
        """
        ...


@struct.dataclass
class Terms:
    """The result of an objective. The step averages, weights and logs it.

    Attributes:
      values: losses by name, never reduced over the batch: `[b]`, one for each example, or
        `[b, t]`, one for each token, 0 where there is none.
      counts: what the mean of a term is over, of the shape of its values; 1 for each example if
        absent, which only values `[b]` allow. The mean is `sum values / sum counts` over the whole
        batch, so never divide by the number of tokens of a batch. For values `[b]` that are sums
        over tokens, it is their number; for values `[b, t]`, the mask of the tokens.
      state: new model state by role (batch statistics); other roles keep theirs.
      coef: scalar coefficients by term name, 1 if absent. The objective evaluates schedules at
        `step`.
      memory: the new memory of the objective (queues, banks, centres); None keeps the old one.
      weights: weights by term name, of the shape of its values, 1 if absent. They multiply the
        weights of a weighting.
      logits: logits by role for a weighting, `[b, k]`, or `[b, t, k]` if the terms are of tokens.
        Leave them out if the method has none; it then works only with weightings that need none.
      embeddings: representations `[b, ..., d]` by name, monitored for collapse.
      metrics: scalars of the batch to log.
    """

    values: Mapping[str, Array]
    counts: Mapping[str, Array] = struct.field(default_factory=dict, kw_only=True)
    state: Mapping[Role, State] = struct.field(default_factory=dict)
    coef: Mapping[str, Any] = struct.field(default_factory=dict)
    memory: PyTree = None
    weights: Mapping[str, Array] = struct.field(default_factory=dict)
    logits: Mapping[Role, Array] = struct.field(default_factory=dict)
    embeddings: Mapping[str, Array] = struct.field(default_factory=dict)
    metrics: Mapping[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class Evidence:
    """The inputs of a weighting. They carry no gradient unless `stop_features` is false.

    Attributes:
      loss_terms: losses of the rows, `[b]`, in the order of the weights. Rows are the examples of a
        batch, or all its tokens if the terms are `[b, t]`; the letter b stands for either. Values
        that are sums are divided by their counts.
      logits: `[b, k]` by role, usually "student" and "teacher".
      label_probs: the label as a distribution, `[b, k]`: one-hot, or mixed by a transform. For
        several labels, 0 or 1 for each; of tokens, their `target`. None if labels are real values
        or there are no classes.
      class_means: mean teacher probabilities over the training examples of each class, `[k, k]`,
        row c for class c. None unless the weighting names it in `needs`.
      mask: float `[b]`, 0 on padding and where nothing counts.
      task: task of the labels, one of `TASKS`.
    """

    loss_terms: Mapping[str, Array]
    logits: Mapping[Role, Array]
    label_probs: Array | None
    class_means: Array | None
    mask: Array
    task: str = struct.field(pytree_node=False, default="classification")


class ExampleWeighting(Protocol):
    """The weight of each loss term for each example or token: a dataclass of hyperparameters.

    Attributes:
      roles: networks that it calls through `nets`. They are the outer variables of a bilevel
        problem, learn with the student, or are fixed.
      needs: parts of the evidence that must be prepared: "class_means".
      by_gradient: whether `from_gradient` computes the weights from the gradient of the outer loss
        with respect to them. `__call__` then returns their initial values.
      couples_batch: whether one example's weights depend on the other examples.
      schedules: as for `Objective`.
    """

    roles: ClassVar[tuple[Role, ...]] = ()
    schedules: ClassVar[Mapping[str, str]] = MappingProxyType({})
    needs: ClassVar[tuple[str, ...]] = ()
    by_gradient: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False

    def __call__(self, nets: Nets, evidence: Evidence, step: Array) -> Array:
        """Returns weights `[b, s]`, one column for each loss term, in the order of the evidence."""
        ...

    def from_gradient(self, gradient: Array, mask: Array) -> Array:
        """Returns weights `[b, s]` from the gradient `[b, s]` of the outer loss."""
        raise NotImplementedError


class Objective(Protocol):
    """A training method: a frozen dataclass that holds only hyperparameters.

    An objective never reduces over the batch and knows no optimizer, mesh or key.

    Attributes:
      roles: the networks that it calls.
      couples_batch: whether one example's value depends on the other examples (negatives, batch
        statistics). Gradient accumulation is then refused.
      auxiliary: those of its networks whose logits are not over the classes of the data.
      beside: optional; those of its networks that teach nothing and that evaluators read, such as
        a ceiling.
      tasks: those of `TASKS` whose labels it can read; all of them if it reads no label.
      needs_dataset_pass: whether it needs `dataset_pass` over the training part before the first
        step.
      schedules: its arguments that are durations (`core.durations`). At the end of a "ramp" a value
        is final; before the end of a "hold" something is off. A run must be long enough for both.
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
        """Returns the terms of one batch, one value for each example or token."""
        ...

    def phases(self) -> Sequence[tuple[int | float | str, "Objective"]]:
        """Returns the parts of training as (first step, objective), ascending from 0.

        A start is a duration (`core.durations`): steps, or such as "20 %". Each part is compiled by
        itself, and networks that do not learn are in the steps of those parts that call them. All
        parts call the networks that learn, and have the same memory. This objective itself gives
        roles, memory, dataset pass, predictions and pictures. By default it is the only part.
        """
        return ((0, self),)

    def remembered(self, batch: Batch) -> Mapping[str, int]:
        """Returns the number of keys per example, for each argument that is a queue's length."""
        del batch
        return {}

    def dataset_pass(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Array]:
        """Returns rows `[b, ...]` of a training batch in evaluation mode, for `init_memory`."""
        del nets, batch, memory, step
        return {}

    def init_memory(
        self,
        rows: Mapping[str, np.ndarray],
        ids: np.ndarray,
        memory: PyTree,
        random: np.random.Generator,
    ) -> PyTree:
        """Returns the memory after the dataset pass; runs once, on the host.

        Args:
          rows: results of `dataset_pass` for all n training examples, `[n, ...]` each.
          ids: ids of the examples, int32 `[n]`, as in `index` of a batch.
          memory: the initial memory as NumPy arrays; do not change shapes and types.
          random: a generator that depends on the seed of the run.
        """
        del rows, ids, random
        return memory

    def predictions(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Outputs]:
        """Returns predictions of the method that are not the outputs of one network.

        Evaluators read them by name, like the outputs of a role. A single prediction is called
        "prediction" by convention. Networks are called in evaluation mode.
        """
        del nets, batch, memory, step
        return {}

    def pictures(
        self, nets: Nets, batch: Batch, memory: PyTree, step: Array
    ) -> Mapping[str, Array]:
        """Returns images `[b, h, w, c]` by name that the method computes from a training batch.

        A report shows them beside the input images. Networks are called in evaluation mode.
        """
        del nets, batch, memory, step
        return {}


@struct.dataclass
class TrainState:
    """The state that a step donates and a checkpoint holds.

    It has no random key (keys are functions of seed, role, purpose and step), no frozen network and
    no data iterator (batch n is a function of seed and n).

    Attributes:
      step: int32 scalar, the number of finished steps.
      params: parameters of the trainable roles.
      targets: parameters of the roles that are moving averages, in separate buffers.
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
    """Origin of the data, recorded in every result.

    Attributes:
      name: exact name, e.g. "Fashion-MNIST-5k/1k (train)".
      origin: package, path or builder of the data.
      n: number of examples.
      sha256: checksum of the file, or of the arrays if there is no file.
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

        Labels of tasks other than classification are `[b, m]`; see `data.labels`.
        """
        ...


class Dataset(NamedTuple):
    """Disjoint parts of one data set.

    Attributes:
      train: examples for gradients.
      held_out: examples split off from the training data, for model selection, and for outer losses
        if `outer` is None.
      test: examples for the final report only.
      classes: names of a network's outputs: of the classes in label order, or of the columns of
        several labels or real values. Empty if there are none.
      cardinalities: numbers of values of the categorical columns of a table, whose examples are
        `{"categorical": int32 [c], "numeric": float32 [m]}`; empty for other data.
      task: task of the labels: "classification", "multilabel" or "regression" (`data.labels`).
      outer: examples that a weighting learns from, split off from the held-out part, so that these
        examples select nothing. None if the held-out part has both uses.
      vocabulary: number of token ids of text; 0 for other data. Networks get it as an argument.
      decode: returns the text of token ids, from the first that is no end of a document up to the
        next end; None where it is not known.
    """

    train: Source
    held_out: Source
    test: Source
    classes: tuple[str, ...] = ()
    cardinalities: tuple[int, ...] = ()
    task: str = "classification"
    outer: Source | None = None
    vocabulary: int = 0
    decode: Callable[[Sequence[int]], str] | None = None

    @property
    def outer_part(self) -> Source:
        """The examples for outer losses."""
        return self.held_out if self.outer is None else self.outer

    @property
    def parts(self) -> dict[str, Source]:
        """The parts by name, in the order train, held_out, outer, test."""
        outer = {} if self.outer is None else {"outer": self.outer}
        return {"train": self.train, "held_out": self.held_out, **outer, "test": self.test}


Transform: TypeAlias = Callable[[Key, Batch, Array], Batch]
"""`(key, batch, step) -> batch`: pure, batched, of static shape. Per-example randomness comes from
`rng.example_keys(key, batch)`, a function of only (seed, epoch, example), so that teacher outputs
of an augmented example can be stored. Only transforms that pair examples (mixup) may use `step`."""


class Evaluator(Protocol):
    """A measurement over a whole split, on the host.

    Optional attributes:

    * `tasks`: those of `TASKS` whose labels it can read; classification if absent.
    * `unlabelled`: whether it takes examples without a known class, whose `labelled` is 0 in the
      batch; they are left out otherwise.
    * `parts`, `{split: most}`: other splits whose outputs it needs, and the largest number of
      examples (None for all; they are spread evenly). It is then called with the keywords `parts`,
      `{split: (outputs, batch)}` with at least as many examples, and `split`, the name of the
      measured split, which may be among the parts. Parts must not be empty.
    * `measure(nets, batch, step) -> {name: [b, ...]}`: what it computes with the networks, in
      evaluation mode, for a batch after its transforms; jitted. `__call__` gets the results for the
      whole split, `{name: [n, ...]}`, as the output of its own name, the one that it has among the
      evaluators. The host then sees losses of sentences, say, and never logits `[n, t, v]`.
    * `controls`: "raw" and "initial". The test split is then measured again, with the network's
      outputs replaced by its flattened input, and by the outputs of the initial network with the
      batch statistics of training data. The metrics get the suffixes `_raw` and `_initial`.
    """

    @property
    def outputs(self) -> Mapping[Role, tuple[str, ...]]:
        """The outputs that it reads, by role: `{"student": ("logits",)}`."""
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
