"""A trained network from a run folder or an export, as a function of raw inputs."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import partition, rng, steps
from distill_jax.core.api import (
    TASKS,
    Array,
    Dataset,
    Model,
    Params,
    Provenance,
    PyTree,
    Role,
    State,
)
from distill_jax.core.errors import CheckpointError, UserError, nearest
from distill_jax.data.source import ArraySource
from distill_jax.run import build
from distill_jax.run import config as config_lib
from distill_jax.trainer.io.files import read_json
from distill_jax.trainer.io.network import read_network
from distill_jax.trainer.io.paths import NetworkRef
from distill_jax.trainer.io.step_folder import META, SIGNATURE, read_meta, wrong_values
from distill_jax.trainer.io.step_index import find_step

NOWHERE = Provenance("no data", "", 0, "")

EXPORTED = {"weights": "model.safetensors", "config": "config.json", "format": "distill_jax"}
"""Names of the files of an exported network, and the format name in its config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A trained network with its evaluation transforms.

    Attributes:
      params: parameters, nested dicts of host arrays.
      state: state, such as batch statistics.
      model: the network as two pure functions.
      config: config of the run that trained it.
      role: its role in that run.
      step: the step of the checkpoint.
      classes: class names in the order of the logits; empty if there are none.
      input: shape and dtype of one raw example, `{"shape", "dtype"}`, for a table by group of
        columns.
      meta: metadata of the checkpoint: `config`, `signature`, `step`, `inputs` and others.
      trusted: names that may be imported, as `trust` of `load`.
      task: of the labels, one of `core.api.TASKS`.
      transform: `(key, batch, step) -> batch`, the evaluation transforms.
    """

    params: Params
    state: State
    model: Model
    config: config_lib.ConfigDict
    role: Role
    step: int
    classes: tuple[str, ...]
    input: Mapping[str, Any]
    meta: Mapping[str, Any] = dataclasses.field(repr=False)
    trusted: frozenset[str] = frozenset()
    task: str = "classification"
    transform: Callable = dataclasses.field(repr=False)

    def preprocess(self, inputs: PyTree) -> PyTree:
        """Applies the evaluation transforms to raw inputs `[b, ...]`; pure."""
        b = jax.tree.leaves(inputs)[0].shape[0]
        zeros = jnp.zeros(b, jnp.int32)
        batch = {"input": inputs, "label": zeros, "index": zeros, "epoch": zeros}
        batch |= {"mask": jnp.ones(b, jnp.float32)}
        key = rng.stream(jax.random.key(0), "transform")
        return self.transform(key, batch, jnp.int32(0))["input"]

    def forward(
        self, params: Params, state: State, inputs: PyTree, *, precision: str = ""
    ) -> dict[str, Array]:
        """Returns the outputs of preprocessed inputs; pure. See `apply`.

        Args:
          params: like `params`.
          state: like `state`.
          inputs: preprocessed inputs `[b, ...]`.
          precision: compute type, by default that of the run.
        """
        nets = steps.BoundNets(
            {self.role: self.model},
            {self.role: params},
            {self.role: state},
            key=jax.random.key(0),
            precision=precision or self.config.precision,
        )
        outputs = dict(nets(self.role, inputs)[0])
        if "logits" in outputs and self.task != "regression":
            own = self.task == "multilabel"  # the probability of each label by itself
            link = jax.nn.sigmoid if own else jax.nn.softmax
            outputs["probabilities"] = link(outputs["logits"])
        return outputs

    def apply(self, params: Params, state: State, inputs: PyTree) -> Mapping[str, Array]:
        """Returns the outputs of raw inputs with given weights; pure, for `jit` and `grad`.

        Args:
          params: like `params`.
          state: like `state`.
          inputs: raw inputs `[b, ...]`, as the data set holds them.

        Returns:
          `{name: [b, ...]}`: the outputs of the network, and `probabilities` `[b, k]` if it returns
          `logits` of classes, or of several labels at once.
        """
        return self.forward(params, state, self.preprocess(inputs))

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return partition.make_mesh(devices=jax.local_devices())

    @functools.cached_property
    def _jitted(self) -> Callable:
        def run(weights, inputs):
            inputs = jax.lax.with_sharding_constraint(inputs, partition.over_batch(self._mesh))
            params, state = weights
            return self.apply(params, state, inputs)

        return jax.jit(run, out_shardings=partition.replicated(self._mesh))

    @functools.cached_property
    def _weights(self) -> tuple[Params, State]:
        return jax.device_put((self.params, self.state), partition.replicated(self._mesh))

    def __call__(self, inputs: PyTree, *, batch_size: int = 256) -> dict[str, np.ndarray]:
        """Returns the outputs of raw inputs.

        Args:
          inputs: raw inputs `[n, ...]`, as the data set holds them: uint8 images, float features,
            or a dict of table columns.
          batch_size: largest number of examples per call of the network.

        Returns:
          `{name: [n, ...]}`, see `apply`.

        Raises:
          ValueError: inputs have another shape or type than the data set.
        """
        inputs = self._checked(inputs)
        n = len(jax.tree.leaves(inputs)[0])
        shards = partition.batch_shards(self._mesh)
        size = -(-min(max(batch_size, 1), n) // shards) * shards
        parts = []
        for start in range(0, n, size):
            part = jax.tree.map(lambda x, start=start: x[start : start + size], inputs)
            m = len(jax.tree.leaves(part)[0])
            padded = jax.tree.map(
                lambda x, m=m: np.concatenate([x, np.repeat(x[-1:], size - m, 0)]), part
            )
            found = jax.device_get(self._jitted(self._weights, padded))
            parts.append({name: x[:m] for name, x in found.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _checked(self, inputs: PyTree) -> PyTree:
        wanted = self.input
        if "shape" not in wanted:
            if not isinstance(inputs, Mapping) or set(inputs) != set(wanted):
                found = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
                raise ValueError(f"inputs are {found}; expected a dict of {sorted(wanted)}")
            inputs = {name: _check(inputs[name], wanted[name], name) for name in wanted}
            lengths = {name: len(x) for name, x in inputs.items()}
            if len(set(lengths.values())) != 1:
                raise ValueError(f"inputs differ in length: {lengths}")
            return inputs
        return _check(inputs, wanted, "inputs")

    def to_nnx(self, like: Any) -> Any:
        """Returns an NNX module like the given one with these weights, see `to_nnx`."""
        from distill_jax.models.adapters import to_nnx

        return to_nnx((self.params, self.state), like=like)

    def export(
        self,
        folder: str | os.PathLike,
        *,
        formats: Sequence[str] = ("stablehlo", "onnx", "safetensors"),
        outputs: Sequence[str] = (),
        preprocessing: bool = True,
        weights: str = "inside",
        examples: int = 1000,
    ) -> pathlib.Path:
        """Writes the network for other programs, with a parity card for each file.

        Args:
          folder: destination; created if absent.
          formats: any of "stablehlo", "onnx", "onnx_int8", "tflite" and "safetensors".
          outputs: names of the outputs; by default `probabilities`, of a regression `logits`, else
            `embedding`, else all outputs.
          preprocessing: whether inputs are raw, and the evaluation transforms are exported too.
          weights: of stablehlo: "inside" the file, or "apart", in `model.safetensors`.
          examples: largest number of test examples for the cards.

        Returns:
          the folder.

        Raises:
          UserError: an unknown format or output, a network that a format cannot hold, a format
            whose packages are not installed, or a folder with files of another program. Nothing is
            written then.
        """
        from distill_jax.run import export

        return export.export(
            self,
            folder,
            formats=formats,
            outputs=outputs,
            preprocessing=preprocessing,
            weights=weights,
            examples=examples,
        )


def _check(array: Any, wanted: Mapping[str, Any], name: str) -> np.ndarray:
    """Returns an array `[n, ...]` of the expected type.

    Raises:
      ValueError: its shape or type is another one.
    """
    array, shape = np.asarray(array), tuple(wanted["shape"])
    dtype = np.dtype(wanted["dtype"])
    expected = f"expected [n{''.join(f', {size}' for size in shape)}] {dtype}"
    if array.shape[1:] != shape or array.ndim != len(shape) + 1:
        one = "; add an axis for a single example: x[None]" if array.shape == shape else ""
        raise ValueError(f"{name} has shape {list(array.shape)}; {expected}{one}")
    if not len(array):
        raise ValueError(f"{name} has no example; {expected}")
    if array.dtype != dtype:
        kinds = {"u": "integers", "i": "integers", "f": "floats"}
        same = kinds.get(array.dtype.kind) == kinds.get(dtype.kind)
        fits = same and (dtype.kind == "f" or np.array_equal(array, array.astype(dtype)))
        if not fits:
            raise ValueError(f"{name} is {array.dtype}; {expected}, in the units of the data set")
    return array.astype(dtype)


def load(
    folder: str | os.PathLike,
    *,
    step: int | str = "best",
    role: Role | None = None,
    trust: Collection[str] = (),
) -> Network:
    """Loads a trained network.

    Args:
      folder: a run, its `checkpoints` folder or one step of it, `folder#role` for a role; or an
        export that has `model.safetensors`.
      step: "best" by the metric that selects checkpoints, "last", or a number of steps; a folder
        of one step needs none.
      role: the network; by default the role after "#", else "student".
      trust: modules or names `package.module:Symbol` outside this package that the stored config
        may import; it imports nothing else.

    Raises:
      UserError: there is no such folder, step or role, or a file is damaged.
    """
    origin = NetworkRef.parse(folder, where="folder")
    if origin.part:
        raise UserError(f"{origin.part!r} is a part of a network", where="folder", hint="load all")
    role = role or origin.role
    trusted = frozenset(trust)
    if (origin.path / EXPORTED["weights"]).is_file():
        return _load_export(origin.path, trusted)
    found = find_step(origin.path, where="folder", step=step)
    meta = read_meta(found)
    if "config" not in meta:
        raise CheckpointError(f"{META} holds no config", where=str(found))
    network = _network(meta, role, found, trusted)
    params, state = read_network(found, role=role, where="folder")
    return dataclasses.replace(network, params=params, state=state)


def _load_export(folder: pathlib.Path, trusted: frozenset[str]) -> Network:
    """Reads a network that `Network.export` has written as safetensors."""
    from distill_jax import weights

    place = folder / EXPORTED["config"]
    meta = read_json(
        place,
        shape={"format": str, "role": str, "step": int, "sha256": str, "config": Mapping},
        optional={"signature": SIGNATURE, "inputs": (Mapping, type(None))},
    )
    if meta["format"] != EXPORTED["format"]:
        raise CheckpointError(f"is of {meta['format']!r}", where=str(place))
    if what := wrong_values(meta):
        raise CheckpointError(what, where=str(place))
    network = _network(meta, meta["role"], folder, trusted)
    tree = weights.read(folder / EXPORTED["weights"], sha256=meta["sha256"]).nested("/")
    tree = {part: tree.get(part, {}) for part in ("params", "state")}
    tree = jax.tree.map(np.array, tree)
    return dataclasses.replace(network, params=tree["params"], state=tree["state"])


def _task_of(config: config_lib.ConfigDict) -> str:
    """Returns the task of a run whose checkpoint does not tell, by what it was measured with."""
    others = (task for task in TASKS if task != "classification" and task in config.evaluators)
    return next(others, "classification")


def _network(
    meta: Mapping[str, Any], role: Role, folder: pathlib.Path, trusted: frozenset[str]
) -> Network:
    """Returns a network without its weights.

    Args:
      meta: the metadata that is stored with the state.
      role: the network.
      folder: that holds `meta`, for messages.
      trusted: see `load`.

    Raises:
      UserError: the config is damaged, or names no such network or code that is not trusted.
    """
    config = config_lib.from_json(json.dumps(meta["config"]), where=str(folder))
    signature = meta.get("signature")
    if signature is None:  # an earlier version wrote it
        signature = build.build(config, shapes_only=True, trusted=trusted).signature
    networks = signature["networks"]
    if role not in networks:
        hint = nearest(role, networks)
        if role in config.roles and config.roles[role].init:
            hint = f"it is frozen there: load {config.roles[role].init}"
        raise CheckpointError(f"no network {role!r} was trained", where=str(folder), hint=hint)
    task = signature.get("task") or _task_of(config)
    if task not in TASKS:
        raise CheckpointError(f"no task {task!r}", where=str(folder), hint=nearest(task, TASKS))
    classes, spec = tuple(signature["classes"]), networks[role]
    model = build.make_model(
        spec["model"],
        {name: config_lib.tuples(value) for name, value in spec["kwargs"].items()},
        role=role,
        provided=build.provided_to_models(
            classes,
            signature["cardinalities"],
            signature["image_size"],
            signature.get("vocabulary", 0),
        ),
        trusted=trusted,
    )
    mean, std = (np.asarray(x, np.float32) for x in signature["statistics"] or ((), ()))
    absent = ArraySource(np.zeros((0, 1), np.float32), np.zeros(0, np.int32), NOWHERE)
    transform = build.make_transform(
        config,
        Dataset(absent, absent, absent, classes, tuple(signature["cardinalities"])),
        train=False,
        trusted=trusted,
        statistics=lambda: (mean, std),
        cards={
            name: {key: config_lib.tuples(value) for key, value in card.items()}
            for name, card in signature.get("cards", {}).items()
        },
    )
    return Network(
        params={},
        state={},
        model=model,
        config=config,
        role=role,
        step=meta["step"],
        classes=classes,
        input=signature["input"],
        meta={**meta, "signature": signature},
        trusted=trusted,
        task=task,
        transform=transform,
    )
