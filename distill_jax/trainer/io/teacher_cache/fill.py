"""Runs frozen networks on every training example and stores their outputs."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core import partition, rng
from distill_jax.core.api import Batch, Model, PyTree, Role, Source, Transform
from distill_jax.core.steps import BoundNets, teacher_view
from distill_jax.data import loader
from distill_jax.trainer.io import peers
from distill_jax.trainer.io.teacher_cache.plan import Plan, StoredOutputs, call_teacher
from distill_jax.trainer.io.teacher_cache.store import Store, TeacherOutputs, open_store
from distill_jax.trainer.passes import dataset_pass


class Stopped(Exception):
    """Filling was interrupted; finished chunks are kept, and the next call continues."""


def prepare(
    folder: pathlib.Path,
    plan: Plan,
    *,
    keys: Mapping[Role, Mapping[str, Any]],
    source: Source,
    models: Mapping[Role, Model],
    frozen: Mapping[Role, tuple[PyTree, PyTree]],
    transform: Transform,
    seed: int,
    precision: str = "float32",
    where: str = "folder",
    log_line: Callable[[str], None] = lambda line: None,
    only_one: Callable[[pathlib.Path], AbstractContextManager[Any]] = contextlib.nullcontext,
    stop: Callable[[], bool] = lambda: False,
) -> TeacherOutputs:
    """Opens the stored outputs of frozen networks and fills in what is missing.

    Args:
      folder: holds a folder for each role.
      plan: from `make_plan`.
      keys: by role, everything that determines its outputs, JSON-like.
      source: training examples.
      models: networks by role.
      frozen: their parameters and state.
      transform: transform of training batches.
      seed: seed of the views.
      precision: compute type of the networks.
      where: the argument or config path to name in errors.
      log_line: called with a line about each role.
      only_one: context manager, entered with the folder of a role, that prevents other runs from
        filling the folder at the same time.
      stop: called before each batch and after each chunk; returns whether to stop.

    Raises:
      ArgumentError: a folder contains outputs for a different key.
      Stopped: `stop` returned True in any process.
    """
    n, stores = len(source), {}
    for role in plan.outputs:
        place = folder / role
        store = open_store(place, keys[role], plan.fields[role], n, where=where)
        stores[role] = store
        find = functools.partial(store.missing, plan.views)
        missing = peers.from_first(find, where=str(place))
        log_line(f"teacher cache {place}: {plan.describe(n)}, {len(missing)} chunks to fill")
        if not missing:  # the folder need not be writable
            continue
        with only_one(place):
            missing = peers.from_first(find, where=str(place))
            run = _make_run(plan, role, models, frozen.get(role), transform, seed, precision)
            for start in range(0, len(missing), jax.process_count()):
                for view, chunk in missing[start:][jax.process_index() :][:1]:
                    with contextlib.suppress(Stopped):  # all processes are notified below
                        store.write(view, chunk, _fill(plan, source, store, run, view, chunk, stop))
                if peers.any_process(stop()):
                    raise Stopped(f"while the outputs of {role} were stored")
    peers.barrier("teacher_cache_filled")
    return TeacherOutputs(stores, views=plan.views)


def _make_run(
    plan: Plan,
    role: Role,
    models: Mapping[Role, Model],
    network: tuple[PyTree, PyTree] | None,
    transform: Transform,
    seed: int,
    precision: str,
) -> Callable[[Batch], StoredOutputs]:
    """Returns a function from a raw batch on the host to its stored arrays on the host."""
    mesh = partition.make_mesh(devices=jax.local_devices())
    whole, split = partition.replicated(mesh), partition.over_batch(mesh)
    network = jax.device_put(network, whole)
    key = jax.device_put(jax.random.key(seed), whole)

    def see(key, batch):
        return teacher_view(transform(rng.stream(key, "transform"), batch, jnp.int32(0)))

    def encoded(network, key, batch):
        params, model_state = network
        nets = BoundNets(models, {role: params}, {role: model_state}, key=key, precision=precision)
        return plan.encode(nets(role, see(key, batch))[0])

    if plan.teacher is None:
        run = jax.jit(encoded)
        return lambda batch: jax.device_get(run(network, key, jax.device_put(batch, split)))
    look, teacher, names = jax.jit(see), plan.teacher, tuple(plan.outputs[role])

    def call(batch):
        view = jax.device_get(look(key, jax.device_put(batch, split)))
        example_info = {"raw": batch["input"], "index": batch["index"], "epoch": batch["epoch"]}
        outputs = call_teacher(teacher, view, example_info)
        return jax.device_get(plan.encode({name: jnp.asarray(outputs[name]) for name in names}))

    return call


def _fill(
    plan: Plan,
    source: Source,
    store: Store,
    run: Callable[[Batch], StoredOutputs],
    view: int,
    chunk: int,
    stop: Callable[[], bool],
) -> StoredOutputs:
    """Returns the rows of a chunk, from batches of the per-device size in training.

    Raises:
      Stopped: `stop` returned True.
    """
    size = plan.batch_size // plan.devices * jax.local_device_count()
    batches = loader.chunk_batches(source, store.positions(chunk), batch_size=size, epoch=view)

    def check() -> None:
        if stop():
            raise Stopped(f"at chunk {chunk}")

    return dataset_pass(run, batches, on_batch=check)[0]
