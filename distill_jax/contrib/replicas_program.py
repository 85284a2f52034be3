"""The program of runs side by side: states, data, compiled steps and outputs of all replicas."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.analysis import walk
from distill_jax.core import optim, partition, replicas
from distill_jax.core.api import PyTree, Role, TrainState
from distill_jax.core.errors import CheckpointError
from distill_jax.run import build as build_lib
from distill_jax.run.build import Experiment
from distill_jax.run.members import Member
from distill_jax.run.train import evaluation
from distill_jax.run.train.run import Run

_LR = ("optim", "lr")


class Replicas:
    """Runs side by side (`program.Program`); every array has a leading replica axis `[r, ...]`.

    The number of replicas is rounded up to a multiple of the devices by copies of the last one,
    whose results are dropped.

    Args:
      members: the runs.
      experiments: of each, on a mesh of `replicas.make_replica_mesh`.
      strategy: see `replicas.over_replicas`; by default the fastest.

    Raises:
      NotImplementedError: the runs differ in more than scalars.
      jax.errors.JAXTypeError: a scalar that differs decides what is computed.
    """

    runs: Sequence[Run]

    def __init__(
        self,
        members: Sequence[Member],
        experiments: Sequence[Experiment],
        *,
        strategy: str = "",
    ):
        self.members, self.experiments = members, experiments
        self.experiment = experiments[0]
        self.mesh = self.experiment.mesh
        self.sharding = replicas.over_replicas_sharding(self.mesh)
        split = self.mesh.shape[replicas.REPLICA]
        self.padding = -len(members) % split
        self.local = (len(members) + self.padding) // split
        scalars = replicas.differing([e.objective for e in experiments])
        if scalars is None:
            raise NotImplementedError("objectives that differ in more than numbers")
        scalars = {("objective", *path): values for path, values in scalars.items()}
        rates = tuple(member.config.optim.lr for member in members)
        if len(set(rates)) > 1:
            scalars[_LR] = rates
        self.scalars = {
            path: jax.device_put(replicas.stack_scalars(self._pad(values)), self.sharding)
            for path, values in scalars.items()
        }
        self.shared_roles = {
            role
            for role in self.experiment.frozen
            if len({member.config.roles[role].init for member in members}) == 1
        }
        variant = self.experiment.variants[-1]
        traced = jax.make_jaxpr(self._step(variant))(
            self.experiment.abstract_state,
            (self.experiment.abstract_frozen, {path: x[0] for path, x in self.scalars.items()}),
            build_lib.feed_shapes(self.experiment, variant),
            jax.eval_shape(jax.random.key, 0),
        )
        primitives = walk.primitives(traced)
        self.strategy = strategy or replicas.choose_strategy(
            primitives, backend=jax.default_backend()
        )

    def _with(self, scalars: replicas.Scalars) -> Experiment:
        """Returns the experiment with traced scalars in place of numbers."""
        e = self.experiment
        if not scalars:
            return e
        objective = {path[1:]: x for path, x in scalars.items() if path[0] == "objective"}
        optimizer = e.trainer.optimizer
        if _LR in scalars:
            arguments = build_lib.schedule_args(e.config, e.steps_per_epoch, e.total_steps)
            arguments["lr"] = scalars[_LR]
            optimizer, _ = optim.make_optimizer(total_steps=e.total_steps, **arguments)
        changed = replicas.with_scalars(e.objective, objective)
        return e.with_trainer(objective=changed, optimizer=optimizer)

    def _step(self, variant: str) -> Callable:
        def step(state, online, fed, key):
            frozen, scalars = online
            return build_lib.make_step(self._with(scalars), variant).__wrapped__(
                state, frozen, fed, key
            )

        return step

    def _pad(self, values: Sequence[Any]) -> list[Any]:
        return [*values, *[values[-1]] * self.padding]

    def join(self, states: Sequence[PyTree]) -> PyTree:
        """Stacks one tree for each replica."""
        stack = lambda *xs: jax.device_put(np.stack(xs), self.sharding)  # noqa: E731
        return jax.tree.map(stack, *self._pad([jax.device_get(state) for state in states]))

    def split(self, state: TrainState) -> list[TrainState]:
        """Returns the state of each replica on the host."""
        host = jax.device_get(state)
        return [jax.tree.map(lambda x, i=i: x[i], host) for i in range(len(self.members))]

    def start(self) -> tuple[TrainState, int]:
        replicated = partition.replicated(self.mesh)
        seeds = [member.seed for member in self.members]
        keys = [jax.device_put(jax.random.key(seed), replicated) for seed in seeds]
        self.key = jax.device_put(jnp.stack(self._pad(keys)), self.sharding)
        read: dict[tuple[str | None, ...], Any] = {}
        frozen = []
        for member, experiment in zip(self.members, self.experiments, strict=True):
            inits = tuple(member.config.roles[role].init for role in experiment.frozen)
            if inits not in read:
                read[inits] = build_lib.frozen_networks(experiment, member.config)
            frozen.append(read[inits])
        self.frozen: Mapping[Role, PyTree] = {
            role: frozen[0][role]
            if role in self.shared_roles
            else self.join([networks[role] for networks in frozen])
            for role in self.experiment.frozen
        }
        self.online = (self.frozen, self.scalars)
        step, states = self._restore()
        if step == 0:
            rows = zip(self.runs, keys, frozen, strict=True)
            states = [run.begin(key, networks) for run, key, networks in rows]
        else:
            self.runs[0].log_line(f"continuing from step {step}")
        return self.join(states), step

    def _restore(self) -> tuple[int, list[TrainState]]:
        """Returns the newest step that all replicas have saved, and their states at it."""
        restored = [run.restore() for run in self.runs]
        steps = {0 if one is None else one[1] for one in restored}
        if len(steps) == 1:
            return steps.pop(), [one[0] for one in restored if one is not None]
        common = set.intersection(*(set(run.checkpointer.steps()) for run in self.runs))
        for step in sorted(common, reverse=True):
            try:
                states = [run.restore(step) for run in self.runs]
            except CheckpointError:
                continue
            return step, [one[0] for one in states if one is not None]
        raise NotImplementedError("runs that have stopped at different steps")

    def compile(self, step: int) -> None:
        experiment = self.experiment
        self.feeds = [
            build_lib.Feed(_orders_only(experiment) if i else experiment, seed=m.seed, start=step)
            for i, m in enumerate(self.members)
        ]
        self._windows: dict[str, tuple[list[Any], PyTree]] = {}
        self.update: dict[str, Callable] = {}
        for variant in experiment.variants:
            fed = self.feed(step, variant)
            mapped = replicas.over_replicas(
                self._step(variant),
                mesh=self.mesh,
                shared=(False, self._shared_online, self._shared_fed(variant), False),
                strategy=self.strategy,
            )
            jitted = jax.jit(mapped, donate_argnums=0, out_shardings=self.sharding)
            state = self._abstract_state()
            lowered = jitted.lower(state, self.online, fed, self.key)
            self.update[variant] = lowered.compile()

    def _abstract_state(self) -> PyTree:
        r = len(self.members) + self.padding
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((r, *x.shape), x.dtype, sharding=self.sharding),
            self.experiment.abstract_state,
        )

    @property
    def _shared_online(self) -> tuple[dict[Role, bool], bool]:
        return {role: role in self.shared_roles for role in self.experiment.frozen}, False

    def _shared_fed(self, variant: str) -> PyTree:
        one = (True, False)  # data, window
        return one if variant == "inner" else {"train": one, "held_out": one}

    def feed(self, step: int, variant: str = "inner", /) -> PyTree:
        """Returns the data and the stacked windows of all replicas."""
        given = [feed(step, variant) for feed in self.feeds]
        if variant == "inner":
            return given[0][0], self._stacked("train", [fed[1] for fed in given])
        return {
            part: (given[0][part][0], self._stacked(part, [fed[part][1] for fed in given]))
            for part in given[0]
        }

    def _stacked(self, part: str, windows: list[Any]) -> PyTree:
        old, stacked = self._windows.get(part, ([], None))
        if len(old) != len(windows) or any(a is not b for a, b in zip(old, windows, strict=True)):
            stacked = self.join(windows)
            self._windows[part] = (windows, stacked)
        return stacked

    @functools.cached_property
    def predict(self) -> Callable:
        """The jitted `(state, online, batch) -> {role: {name: [r, b, ...]}}`."""

        def predict(state, online, batch):
            frozen, scalars = online
            return self._with(scalars).predict.__wrapped__(state, frozen, batch)

        mapped = replicas.over_replicas(
            predict,
            mesh=self.mesh,
            shared=(False, self._shared_online, True),
            strategy=self.strategy,
        )
        return jax.jit(mapped)

    def collect(self, state, split, rows=None):
        predict = lambda batch: self.predict(state, self.online, batch)  # noqa: E731
        outputs, example_info = evaluation.collect(
            self.experiment, predict, split, rows=rows, axis=1
        )
        return [
            jax.tree.map(lambda x, i=i: x[i], outputs) for i in range(len(self.members))
        ], example_info

    def draw(self, state: TrainState) -> None:
        """Draws nothing: pictures are of a run by itself."""

    @property
    def flops_per_step(self) -> float | None:
        counted = 1 if self.strategy == "loop" else self.local  # XLA counts the body of a loop once
        flops = build_lib.flops_of(self.experiment, self.update)
        return None if flops is None else flops / counted

    def close(self) -> None:
        for feed in self.feeds:
            feed.close()


class _OrderOnly:
    """A source whose examples are their ids, which a replica needs in addition to shared data."""

    def __init__(self, source: Any):
        self._source = source
        self.provenance = source.provenance

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        del indices
        return {}


def _orders_only(experiment: Experiment) -> Experiment:
    dataset = experiment.dataset
    used = [name for name in dataset.parts if name != "test"]
    bare = dataset._replace(**{name: _OrderOnly(dataset.parts[name]) for name in used})
    return dataclasses.replace(experiment, dataset=bare)
