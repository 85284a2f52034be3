"""What frozen networks say of every training example, stored once and read in every step.

A view of an example is a function of (seed, epoch, example), so an answer to it stays valid
whatever the order and the batch. One row is stored for each example and view; where the view does
not depend on the epoch, one row serves all epochs. What a view depends on is read off the traced
transforms.

A row of a matrix product does not depend on the other rows of its operand nor on its place among
them, but on CPU its last bits depend on how many rows there are. The teacher is therefore asked in
batches of the size that a device sees in training. Stored in float32 its answers then equal those
that it would give in the step bit for bit. So does the student where the compiler fuses the rest of
the step alike: perceptrons, convnets and ResNets on CPU. The losses of a vision transformer on
resident data differ in the last bit, although it is taught the same.

A folder for each role:

    key.json             what the answers are a function of; another run must have the same
    <view>-<chunk>/      rows of a view: <field>.npy and digest.json; complete where it exists

A chunk is written beside its place and renamed, so an interrupted filling goes on where it stopped
and a longer training adds what is missing. Processes divide the chunks and share the folder.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.analysis import dependence
from distill_jax.core import partition, rng
from distill_jax.core.api import Array, Batch, Model, Outputs, PyTree, Role, Source, Transform
from distill_jax.core.errors import CheckpointError, ConfigError, nearest
from distill_jax.core.steps import BoundNets, teacher_view
from distill_jax.data import loader
from distill_jax.data.source import checksum
from distill_jax.losses.stored_labels import keep_top, restore_top
from distill_jax.run import config as config_lib
from distill_jax.run import environment, processes, watch, workdir
from distill_jax.run.config import ConfigDict
from distill_jax.run.resolve import resolve
from distill_jax.trainer.io.files import DamagedFile, MissingFile, read_json, write_text
from distill_jax.trainer.io.paths import absolute, check_folder
from distill_jax.trainer.io.step_folder import seal, verify

CHUNK_BYTES = 2**25
"""Size of a chunk, about."""

CLEAR = "delete this folder; the next run fills it again"

StoredOutputs = Mapping[str, Any]
"""Stored fields by name, with a leading example axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is stored of whom, in which form; the same for every seed.

    Attributes:
      outputs: shapes of the stored outputs of a batch, by role.
      networks: name and arguments of the network of each role that has one.
      view: shape of what the roles see.
      views: views of each example that training uses; epoch e sees view e modulo their number.
      by_seed: whether a view depends on the seed.
      top_k: classes that are kept of logits, 0 for all of them.
      rest: what the others get ("spread" | "drop").
      dtype: of stored values.
      batch_size: rows in a batch of training.
      devices: over which it is split.
      teacher: a function that answers in place of a network, None where there is none:
        `view [b, ...] -> {output: [b, ...]}` on NumPy arrays, where `view` is what transforms made
        of the examples. It is told by keyword what it has a parameter for: `index` and `epoch`
        int32 `[b]`, and `raw` `[b, ...]`, the examples as they were read.
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
        """What is stored of a batch, as shapes."""
        return {r: jax.eval_shape(self.encode, shapes) for r, shapes in self.outputs.items()}

    @property
    def bytes_per_example(self) -> int:
        """Bytes that one view of one example takes, over all roles."""
        leaves = jax.tree.leaves(self.fields)
        return sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in leaves)

    def shapes(self, n: int, sharding: Any) -> Mapping[Role, StoredOutputs]:
        """Returns stored answers of `n` examples as shapes."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype, sharding=sharding),
            dict(self.fields),
        )

    def encode(self, outputs: Outputs) -> dict[str, Array]:
        """Returns what is stored of the outputs of a batch."""
        dtype = jnp.dtype(self.dtype)
        if not self.top_k:
            return {name: x.astype(dtype) for name, x in outputs.items()}
        index, value = keep_top(outputs["logits"], k=self.top_k)
        small = outputs["logits"].shape[-1] <= 2**16
        return {
            "index": index.astype(jnp.uint16 if small else jnp.int32),
            "value": value.astype(dtype),
        }

    def decode(self, teacher_outputs: Mapping[Role, StoredOutputs]) -> dict[Role, dict[str, Array]]:
        """Returns outputs by role as networks give them, from what was stored; pure."""
        return {role: self._decode(role, stored) for role, stored in teacher_outputs.items()}

    def _decode(self, role: Role, stored: StoredOutputs) -> dict[str, Array]:
        if not self.top_k:
            return {name: x.astype(jnp.float32) for name, x in stored.items()}
        logits = restore_top(
            stored["index"].astype(jnp.int32),
            stored["value"].astype(jnp.float32),
            num_classes=self.outputs[role]["logits"].shape[-1],
            rest=self.rest,
        )
        return {"logits": logits}

    def describe(self, n: int) -> str:
        """Returns how much is stored."""
        size = self.bytes_per_example
        return (
            f"{', '.join(self.outputs)}: {n:,} examples x {self.views} views x {size} B"
            f" = {n * self.views * size / 2**20:.1f} MiB"
        )


def teacher_fn_model(
    config: ConfigDict, teacher: Callable[..., Mapping[str, Any]], view: PyTree
) -> dict[Role, Model]:
    """Returns a network without parameters for a role that a function answers for.

    The function is called once, with zeros, for the shapes of its outputs.

    Args:
      config: with `cache.teacher` set.
      teacher: from `find_teacher`.
      view: shape of what the role sees.
    """
    (role,) = config.cache.roles
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), view)
    rows = jax.tree.leaves(zeros)[0].shape[0]
    example_info = {
        "index": np.zeros(rows, np.int32),
        "epoch": np.zeros(rows, np.int32),
        "raw": None,
    }
    found = _call(teacher, zeros, example_info)
    shapes = {name: x.shape[1:] for name, x in found.items()}

    def apply(params: PyTree, state: PyTree, x: Any, *, train: bool, rngs: Any):
        del params, train, rngs
        b = jax.tree.leaves(x)[0].shape[0]
        return {n: jnp.zeros((b, *s), jnp.float32) for n, s in shapes.items()}, state

    return {role: Model(lambda key, *inputs: ({}, {}), apply)}


def find_teacher(config: ConfigDict, trusted: Collection[str]) -> Callable[..., Any]:
    """Returns the function that `cache.teacher` names; `trusted` as in `resolve`."""
    if ":" not in config.cache.teacher:
        raise ConfigError(
            f"{config.cache.teacher!r} names no function",
            where="cache.teacher",
            hint="package.module:Symbol",
        )
    return resolve("models", config.cache.teacher, where="cache.teacher", trusted=trusted)


def _call(
    teacher: Callable, view: PyTree, example_info: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    wanted = inspect.signature(teacher).parameters
    found = teacher(view, **{name: fact for name, fact in example_info.items() if name in wanted})
    rows = jax.tree.leaves(view)[0].shape[0]
    if not isinstance(found, Mapping) or any(np.shape(x)[:1] != (rows,) for x in found.values()):
        raise ConfigError(
            f"does not return a dict of arrays with {rows} rows, one for each example",
            where="cache.teacher",
            hint='{"logits": array [b, k]}',
        )
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


def select_outputs(config: ConfigDict, models: Mapping[Role, Model]) -> dict[Role, Model]:
    """Returns the networks, of which the cached ones give the stored outputs alone.

    Raises:
      ConfigError: a role that does not exist or learns, or an output that it does not have.
    """
    spec, limited = config.cache, dict(models)
    for role in spec.roles:
        if role not in models:
            raise ConfigError(
                f"no network {role!r}", where="cache.roles", hint=nearest(role, models)
            )
        if not spec.teacher and not config.roles[role].frozen:
            raise ConfigError(
                f"{role} learns, so that its answers change",
                where="cache.roles",
                hint=f"set roles.{role}.frozen, or leave it out",
            )
        limited[role] = _limited(models[role], role, tuple(spec.outputs))
    if spec.top_k and tuple(spec.outputs) != ("logits",):
        raise ConfigError(
            f"the largest {spec.top_k} of {', '.join(spec.outputs)}",
            where="cache.top_k",
            hint="only logits are stored so: cache.outputs=logits, or cache.top_k=0",
        )
    return limited


def _limited(model: Model, role: Role, names: tuple[str, ...]) -> Model:
    def apply(params, state, *inputs, train, rngs):
        outputs, state = model.apply(params, state, *inputs, train=train, rngs=rngs)
        for name in names:
            if name not in outputs:
                raise ConfigError(
                    f"{role} has no output {name!r}",
                    where="cache.outputs",
                    hint=nearest(name, outputs),
                )
        return {name: outputs[name] for name in names}, state

    return Model(model.init, apply)


def make_plan(
    config: ConfigDict,
    *,
    teacher: Callable[..., Mapping[str, Any]] | None,
    transform: Transform,
    raw: Batch,
    outputs: Mapping[Role, Mapping[str, Any]],
    networks: Mapping[Role, tuple[str, Mapping[str, Any]]],
    epochs: int,
    devices: int,
) -> Plan:
    """Decides what is stored.

    Args:
      config: with `cache.dir` set.
      teacher: from `find_teacher`, None where the roles have networks.
      transform: of training batches.
      raw: shapes of a batch before it.
      outputs: shapes of what the cached roles say of a batch.
      networks: name and arguments of the network of each role that has one.
      epochs: that training touches.
      devices: over which a batch is split.

    Raises:
      ConfigError: the view depends on the step or on how examples meet in a batch.
    """
    spec = config.cache
    key = jax.eval_shape(jax.random.key, 0)

    def see(key, batch, step):
        return teacher_view(transform(key, batch, step))

    used = dependence.inputs_used(see, key, dict(raw), jnp.int32(0))
    if "2" in used:
        raise ConfigError(
            "what the teacher sees depends on the step, as after mixup or cutmix",
            where="cache.dir",
            hint="leave out such transforms, set data.teacher_view=clean, or cache nothing",
        )
    first = next(iter(outputs.values()))
    classes = first["logits"].shape[-1] if spec.top_k else 0
    if spec.top_k < 0 or spec.top_k > classes:
        raise ConfigError(
            f"{spec.top_k} of {classes} classes", where="cache.top_k", hint="0 for all of them"
        )
    by_epoch = any(name.endswith("/epoch") for name in used)
    return Plan(
        outputs={role: dict(shapes) for role, shapes in outputs.items()},
        networks=networks,
        view=jax.eval_shape(see, key, raw, jnp.int32(0)),
        views=(config.data.views or epochs) if by_epoch else 1,
        by_seed="0" in used,
        top_k=spec.top_k,
        rest=spec.rest,
        dtype=spec.dtype,
        batch_size=config.batch_size,
        devices=devices,
        teacher=teacher,
    )


class Store:
    """The rows of one role on disk.

    Args:
      folder: of the role.
      fields: shapes of a stored batch.
      n: examples.
      chunk: rows of a chunk.
    """

    def __init__(self, folder: pathlib.Path, fields: Mapping[str, Any], *, n: int, chunk: int):
        self.folder, self.fields, self.n, self.chunk = folder, fields, n, chunk
        self._open: dict[tuple[int, int], StoredOutputs] = {}

    @property
    def chunks(self) -> int:
        return -(-self.n // self.chunk)

    def missing(self, views: int) -> list[tuple[int, int]]:
        """Returns (view, chunk) of what is not there."""
        every = [(view, chunk) for view in range(views) for chunk in range(self.chunks)]
        return [place for place in every if not self.path(*place).exists()]

    def path(self, view: int, chunk: int) -> pathlib.Path:
        return self.folder / f"{view:05d}-{chunk:05d}"

    def positions(self, chunk: int) -> np.ndarray:
        """Returns the examples of a chunk."""
        return np.arange(chunk * self.chunk, min(self.n, (chunk + 1) * self.chunk))

    def write(self, view: int, chunk: int, rows: StoredOutputs) -> None:
        """Writes a chunk whole or not at all."""
        path = self.path(view, chunk)
        beside = pathlib.Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=self.folder))
        for name, values in rows.items():
            np.save(beside / f"{name}.npy", values.view(_stored(values.dtype)))
        seal(beside)
        if path.exists():  # another run was faster; its rows are the same
            shutil.rmtree(beside)
        else:
            os.replace(beside, path)

    def read(self, view: int, position: np.ndarray) -> dict[str, np.ndarray]:
        """Returns rows of a view, in the order of `position`.

        Raises:
          CheckpointError: a file is not as it was written.
        """
        chunk, offset = np.divmod(position, self.chunk)
        if len(position) and (chunk == chunk[0]).all():
            return {n: np.asarray(x[offset]) for n, x in self._load(view, int(chunk[0])).items()}
        rows = {n: np.empty((len(position), *s.shape[1:]), s.dtype) for n, s in self.fields.items()}
        for c in np.unique(chunk):
            here = chunk == c
            for name, values in self._load(view, int(c)).items():
                rows[name][here] = values[offset[here]]
        return rows

    def _load(self, view: int, chunk: int) -> StoredOutputs:
        if (view, chunk) not in self._open:
            path = self.path(view, chunk)
            try:
                verify(path)
            except CheckpointError as error:
                raise CheckpointError(error.what, where=str(path), hint=CLEAR) from None
            rows = len(self.positions(chunk))
            self._open[view, chunk] = {n: self._array(path, n, rows) for n in self.fields}
        return self._open[view, chunk]

    def _array(self, path: pathlib.Path, name: str, rows: int) -> np.ndarray:
        wanted = self.fields[name]
        try:
            array = np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            what = f"{name}.npy cannot be read: {error}"
            raise CheckpointError(what, where=str(path), hint=CLEAR) from error
        expected = jax.ShapeDtypeStruct((rows, *wanted.shape[1:]), _stored(wanted.dtype))
        if (array.shape, array.dtype) != (expected.shape, expected.dtype):
            what = f"{name}.npy holds {array.dtype}{array.shape}, not {expected}"
            raise CheckpointError(what, where=str(path), hint=CLEAR)
        return array.view(wanted.dtype)


def _stored(dtype: np.dtype) -> np.dtype:
    """The type of a file: .npy has no bfloat16."""
    return np.dtype(np.uint16) if dtype == jnp.bfloat16 else dtype


class TeacherOutputs:
    """Stored answers of all cached roles, for the loaders; `views` of each example."""

    def __init__(self, stores: Mapping[Role, Store], *, views: int):
        self._stores, self.views = stores, views

    def view(self, epoch: Any) -> Any:
        """Returns which view an epoch sees."""
        return epoch % self.views

    def read(self, epoch: np.ndarray, position: np.ndarray) -> dict[Role, dict[str, np.ndarray]]:
        """Returns fields `[b, ...]` by role for examples of one or more epochs, int `[b]` both."""
        views = self.view(epoch)
        present = np.unique(views)
        found: dict[Role, dict[str, np.ndarray]] = {}
        for role, store in self._stores.items():
            found[role] = rows = store.read(int(present[0]), position)
            for view in present[1:]:
                later = views == view
                for name, values in store.read(int(view), position[later]).items():
                    rows[name][later] = values
        return found


def make_key(
    config: ConfigDict,
    plan: Plan,
    role: Role,
    source: Source,
    network: tuple[PyTree, PyTree] | None,
) -> dict[str, Any]:
    """Returns what stored answers are a function of, JSON-like.

    A function that answers in place of a network is known by its name alone.
    """
    data = config.data
    kwargs = {k: v for k, v in config_lib.flatten(data.transform_kwargs).items()}
    names = tuple(data.train_transforms)
    if data.teacher_view == "clean":
        names = (*data.eval_transforms, *data.teacher_shares)
    key = {
        "teacher": config.cache.teacher or checksum(network),
        "data": source.provenance.sha256,
        "view": {
            "transforms": names,
            "kwargs": {k: v for k, v in kwargs.items() if k.split(".")[0] in names},
            "of": data.teacher_view,
            "shared": tuple(data.teacher_shares),
        },
        "seed": config.seed if plan.by_seed else None,
        "outputs": tuple(config.cache.outputs),
        "top_k": plan.top_k,
        "dtype": plan.dtype,
        "precision": None if plan.teacher else config.precision,
    }
    if role in plan.networks:
        name, arguments = plan.networks[role]
        key["model"] = {"name": name, **arguments}
    return json.loads(json.dumps(key))


def open_store(
    folder: pathlib.Path, key: Mapping[str, Any], plan: Plan, role: Role, n: int
) -> Store:
    """Opens the folder of a role, or makes it.

    Raises:
      ConfigError: it holds answers to other questions; the message says what differs.
    """
    path, fields = folder / "key.json", plan.fields[role]
    row = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in fields.values())
    fresh = {"key": key, "chunk": max(1, CHUNK_BYTES // row)}
    try:
        stored = read_json(path, shape={"key": dict, "chunk": int}, hint=CLEAR)
        if stored["chunk"] < 1:
            raise DamagedFile(f"'chunk' is {stored['chunk']}", where=str(path), hint=CLEAR)
    except MissingFile:
        check_folder(folder, where="cache.dir")
        workdir.refuse_foreign(folder, "cache")
        stored = fresh
    changes = config_lib.differences(stored["key"], key)
    if changes:
        raise ConfigError(
            f"{folder} holds other answers:\n    " + "\n    ".join(changes),
            where="cache.dir",
            hint='another folder, one for each seed with "{seed}" in its name, or delete this one',
        )
    if jax.process_index() == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(fresh, indent=1))
    processes.barrier("teacher_cache_open")
    return Store(folder, fields, n=n, chunk=stored["chunk"])


def prepare(
    config: ConfigDict,
    plan: Plan,
    *,
    source: Source,
    models: Mapping[Role, Model],
    frozen: Mapping[Role, tuple[PyTree, PyTree]],
    transform: Transform,
    log_line: Callable[[str], None],
) -> TeacherOutputs:
    """Opens the cache of a run and fills what is missing.

    Args:
      config: of the run, with its seed.
      plan: from `make_plan`.
      source: training examples.
      models: networks by role.
      frozen: their parameters and state.
      transform: of training batches.
      log_line: prints a line.

    Raises:
      ConfigError: the folder holds answers to other questions.
      Preempted: a signal asked to stop; the chunks that were filled are kept.
    """
    folder = absolute(config.cache.dir.replace("{seed}", str(config.seed)), where="cache.dir")
    n, stores = len(source), {}
    for role in plan.outputs:
        key = make_key(config, plan, role, source, frozen.get(role))
        stores[role] = store = open_store(folder / role, key, plan, role, n)
        find = functools.partial(store.missing, plan.views)
        missing = processes.from_first(find, where=str(folder / role))
        log_line(
            f"teacher cache {folder / role}: {plan.describe(n)}, {len(missing)} chunks to fill"
        )
        if not missing:  # and the folder need not be writable
            continue
        with _only_one(folder / role, log_line):
            missing = processes.from_first(find, where=str(folder / role))
            ask = _make_ask(config, plan, role, models, frozen, transform)
            for start in range(0, len(missing), jax.process_count()):
                for view, chunk in missing[start:][jax.process_index() :][:1]:
                    rows = _fill(plan, source, store, ask, view, chunk)
                    if rows is not None:
                        store.write(view, chunk, rows)
                processes.stop_if_asked(f"while {role} was asked")
    processes.barrier("teacher_cache_filled")
    return TeacherOutputs(stores, views=plan.views)


@contextlib.contextmanager
def _only_one(folder: pathlib.Path, log_line: Callable[[str], None]) -> Iterator[None]:
    """Lets one run at a time fill a cache; others wait, since they need the same rows."""
    stack, reported = contextlib.ExitStack(), False

    def take() -> str:
        try:
            stack.enter_context(workdir.hold(folder, log_line=lambda line: None))
            return ""
        except workdir.InUse as error:
            return error.what

    with stack:
        while what := processes.from_first(take, where=str(folder / workdir.LOCK)):
            if not reported:
                log_line(f"waiting for teacher cache {folder}: {what}")
            reported = True
            processes.stop_if_asked("while another run filled the teacher cache")
            watch.alive()
            time.sleep(1)
        yield


def _make_ask(config, plan, role, models, frozen, transform) -> Callable[[Batch], StoredOutputs]:
    """Returns a function from a raw batch on the host to what is stored of it, on the host."""
    mesh = partition.make_mesh(devices=jax.local_devices())
    whole, split = partition.replicated(mesh), partition.over_batch(mesh)
    network = jax.device_put(frozen.get(role), whole)
    key = jax.device_put(jax.random.key(config.seed), whole)

    def see(key, batch):
        return teacher_view(transform(rng.stream(key, "transform"), batch, jnp.int32(0)))

    def answer(network, key, batch):
        params, state = network
        nets = BoundNets(models, {role: params}, {role: state}, key=key, precision=config.precision)
        return plan.encode(nets(role, see(key, batch))[0])

    if plan.teacher is None:
        ask = jax.jit(answer)
        return lambda batch: jax.device_get(ask(network, key, jax.device_put(batch, split)))
    look, teacher, names = jax.jit(see), plan.teacher, tuple(plan.outputs[role])

    def call(batch):
        view = jax.device_get(look(key, jax.device_put(batch, split)))
        example_info = {"raw": batch["input"], "index": batch["index"], "epoch": batch["epoch"]}
        found = _call(teacher, view, example_info)
        return jax.device_get(plan.encode({name: jnp.asarray(found[name]) for name in names}))

    return call


def _fill(
    plan: Plan, source: Source, store: Store, ask, view: int, chunk: int
) -> StoredOutputs | None:
    """Asks for the rows of a chunk, in batches of the size that devices see in training.

    None where a signal asks to stop.
    """
    size = plan.batch_size // plan.devices * jax.local_device_count()
    parts = []
    for batch in loader.chunk_batches(source, store.positions(chunk), batch_size=size, epoch=view):
        real = batch["mask"] > 0
        watch.alive()
        if environment.asked_to_stop():
            return None
        parts.append({name: x[real] for name, x in ask(batch).items()})
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
