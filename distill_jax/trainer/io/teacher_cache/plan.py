"""Selection and format of the stored outputs of frozen networks; accesses no files."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.analysis import dependence
from distill_jax.core.api import Array, Batch, Model, Outputs, PyTree, Role, Transform
from distill_jax.core.errors import ArgumentError, nearest
from distill_jax.core.steps import teacher_view
from distill_jax.losses.stored_labels import keep_top, restore_top

StoredOutputs = Mapping[str, Any]
"""Stored fields by name, with a leading example axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Selection and format of the stored outputs; the same for every seed.

    Attributes:
      outputs: shapes of the stored outputs of a batch, by role.
      networks: name and arguments of the network of each role that has one.
      view: shape of the inputs of the roles.
      views: views of each example that training uses; epoch e sees view e modulo their number.
      by_seed: whether a view depends on the seed.
      top_k: number of classes whose logits are stored, 0 for all classes.
      rest: treatment of the other classes ("spread" | "drop").
      dtype: type of stored values.
      batch_size: number of rows in a training batch.
      devices: number of devices over which a batch is split.
      teacher: a function in place of a network, or None:
        `view [b, ...] -> {output: [b, ...]}` on NumPy arrays, where `view` is the transformed
        examples. It also receives the following keyword arguments if it has such parameters:
        `index` and `epoch` int32 `[b]`, and `raw` `[b, ...]`, the examples before transforms.
    """

    outputs: Mapping[Role, Mapping[str, Any]]
    networks: Mapping[Role, tuple[str, Mapping[str, Any]]]
    view: PyTree
    views: int
    by_seed: bool
    top_k: int
    rest: str
    dtype: str
    batch_size: int
    devices: int
    teacher: Callable[..., Mapping[str, Any]] | None

    @functools.cached_property
    def fields(self) -> Mapping[Role, Mapping[str, jax.ShapeDtypeStruct]]:
        """The stored arrays of a batch, as shapes."""
        return {r: jax.eval_shape(self.encode, shapes) for r, shapes in self.outputs.items()}

    @property
    def bytes_per_example(self) -> int:
        """Number of bytes of one view of one example, over all roles."""
        leaves = jax.tree.leaves(self.fields)
        return sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in leaves)

    def shapes(self, n: int, sharding: Any) -> Mapping[Role, StoredOutputs]:
        """Returns stored outputs of `n` examples as shapes."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype, sharding=sharding),
            dict(self.fields),
        )

    def encode(self, outputs: Outputs) -> dict[str, Array]:
        """Returns the arrays to store for the outputs of a batch."""
        dtype = jnp.dtype(self.dtype)
        if not self.top_k:
            return {name: x if _is_index(x) else x.astype(dtype) for name, x in outputs.items()}
        index, value = keep_top(outputs["logits"], k=self.top_k)
        small = outputs["logits"].shape[-1] <= 2**16
        return {
            "index": index.astype(jnp.uint16 if small else jnp.int32),
            "value": value.astype(dtype),
        }

    def decode(self, teacher_outputs: Mapping[Role, StoredOutputs]) -> dict[Role, dict[str, Array]]:
        """Returns outputs by role, as networks return them, from the stored arrays; pure."""
        return {role: self._decode(role, stored) for role, stored in teacher_outputs.items()}

    def _decode(self, role: Role, stored: StoredOutputs) -> dict[str, Array]:
        if not self.top_k:
            return {n: x if _is_index(x) else x.astype(jnp.float32) for n, x in stored.items()}
        logits = restore_top(
            stored["index"].astype(jnp.int32),
            stored["value"].astype(jnp.float32),
            num_classes=self.outputs[role]["logits"].shape[-1],
            rest=self.rest,
        )
        return {"logits": logits}

    def describe(self, n: int) -> str:
        """Returns a description of the amount stored."""
        size = self.bytes_per_example
        return (
            f"{', '.join(self.outputs)}: {n:,} examples x {self.views} views x {size} B"
            f" = {n * self.views * size / 2**20:.1f} MiB"
        )


def _is_index(x: Any) -> bool:
    """Returns whether an output is integers, which are stored as they are: ids of top tokens."""
    return jnp.issubdtype(x.dtype, jnp.integer)


def make_plan(
    *,
    transform: Transform,
    raw: Batch,
    outputs: Mapping[Role, Mapping[str, Any]],
    networks: Mapping[Role, tuple[str, Mapping[str, Any]]],
    views: int,
    batch_size: int,
    devices: int = 1,
    top_k: int = 0,
    rest: str = "spread",
    dtype: str = "float32",
    teacher: Callable[..., Mapping[str, Any]] | None = None,
) -> Plan:
    """Determines which outputs are stored and how.

    Args:
      transform: of training batches.
      raw: shapes of a batch before it.
      outputs: shapes of the outputs of the cached roles for a batch.
      networks: name and arguments of the network of each role that has one.
      views: of each example that training uses, where a view depends on the epoch.
      batch_size: rows in a batch of training.
      devices: over which it is split.
      top_k: see `Plan`, and so for the others.
      rest: "spread" or "drop".
      dtype: of stored values.
      teacher: a function that stands in for a network.

    Raises:
      ArgumentError: a view depends on the step or on the other examples of a batch, or `top_k` is
        not a valid number of classes.
    """
    key = jax.eval_shape(jax.random.key, 0)

    def see(key, batch, step):
        return teacher_view(transform(key, batch, step))

    used = dependence.inputs_used(see, key, dict(raw), jnp.int32(0))
    if "2" in used:
        raise ArgumentError(
            "the teacher's view depends on the step, as after mixup or cutmix",
            where="transform",
            hint="leave out such transforms, let the teacher see clean views, or store nothing",
        )
    first = next(iter(outputs.values()))
    classes = first["logits"].shape[-1] if top_k else 0
    if top_k < 0 or top_k > classes:
        raise ArgumentError(
            f"{top_k} of {classes} classes", where="top_k", hint="0 for all of them"
        )
    by_epoch = any(name.endswith("/epoch") for name in used)
    return Plan(
        outputs={role: dict(shapes) for role, shapes in outputs.items()},
        networks=networks,
        view=jax.eval_shape(see, key, raw, jnp.int32(0)),
        views=views if by_epoch else 1,
        by_seed="0" in used,
        top_k=top_k,
        rest=rest,
        dtype=dtype,
        batch_size=batch_size,
        devices=devices,
        teacher=teacher,
    )


def teacher_fn_model(
    teacher: Callable[..., Mapping[str, Any]], view: PyTree, *, where: str = "teacher"
) -> Model:
    """Returns a network without parameters that has the outputs of a function.

    The function is called once, with zeros, for the shapes of its outputs.

    Args:
      teacher: see `Plan.teacher`.
      view: shape of its input.
      where: the argument or config path to name in errors.

    Raises:
      ArgumentError: it does not return arrays with a row for each example.
    """
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), view)
    rows = jax.tree.leaves(zeros)[0].shape[0]
    example_info = {
        "index": np.zeros(rows, np.int32),
        "epoch": np.zeros(rows, np.int32),
        "raw": None,
    }
    outputs = call_teacher(teacher, zeros, example_info, where=where)
    shapes = {name: x.shape[1:] for name, x in outputs.items()}

    def apply(params: PyTree, state: PyTree, x: Any, *, train: bool, rngs: Any):
        del params, train, rngs
        b = jax.tree.leaves(x)[0].shape[0]
        return {n: jnp.zeros((b, *s), jnp.float32) for n, s in shapes.items()}, state

    return Model(lambda key, *inputs: ({}, {}), apply)


def call_teacher(
    teacher: Callable,
    view: PyTree,
    example_info: Mapping[str, Any],
    *,
    where: str = "teacher",
) -> dict[str, np.ndarray]:
    """Returns the outputs `{name: [b, ...]}` of a function; raises as `teacher_fn_model` does."""
    wanted = inspect.signature(teacher).parameters
    outputs = teacher(
        view, **{name: value for name, value in example_info.items() if name in wanted}
    )
    rows = jax.tree.leaves(view)[0].shape[0]
    if not isinstance(outputs, Mapping) or any(
        np.shape(x)[:1] != (rows,) for x in outputs.values()
    ):
        raise ArgumentError(
            f"does not return a dict of arrays with {rows} rows, one for each example",
            where=where,
            hint='{"logits": array [b, k]}',
        )
    return {name: np.asarray(x, np.float32) for name, x in outputs.items()}


def select_outputs(
    model: Model, names: Collection[str], *, role: Role = "model", where: str = "names"
) -> Model:
    """Returns a network with only some of its outputs.

    Args:
      model: the network.
      names: names of the outputs.
      role: role of the network, for the error.
      where: the argument or config path to name in the error.

    Raises:
      ArgumentError: the network has no such output; raised when it is applied.
    """

    def apply(params, state, *inputs, train, rngs):
        outputs, state = model.apply(params, state, *inputs, train=train, rngs=rngs)
        for name in names:
            if name not in outputs:
                raise ArgumentError(
                    f"{role} has no output {name!r}",
                    where=where,
                    hint=nearest(name, outputs),
                )
        return {name: outputs[name] for name in names}, state

    return Model(model.init, apply)
