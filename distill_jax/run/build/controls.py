"""Controls of evaluators: the input itself, and networks without training."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from distill_jax.core import (
    rng,
    state,
    steps,
)
from distill_jax.core.api import (
    Batch,
    Key,
    Params,
    Role,
    State,
)
from distill_jax.data import loader
from distill_jax.data.source import Subset
from distill_jax.evaluators._features import spread
from distill_jax.run import watch
from distill_jax.run.build.experiment import Experiment, evaluation_transform, raw_input

STATISTICS_BATCHES, STATISTICS_SIZE = 32, 256
"""So many batches, of so many examples, at most give the batch statistics of untrained networks."""


def untrained(experiment: Experiment, key: Key) -> Mapping[Role, tuple[Params, State]]:
    """Returns `{role: (params, state)}` of networks before training, warm start or checkpoint,
    where they are a control.

    Batch statistics are those of training batches as evaluators see them: those that they
    start from, 0 and 1, are of no data, and make a weaker control. Like `predict_controls` it
    runs on one device of each process.

    Args:
      key: the root key of the run.
    """
    programs = _programs(experiment)
    networks = programs.initial_networks(key)
    params, first = ({role: n[i] for role, n in networks.items()} for i in (0, 1))
    if not jax.tree.leaves(first):
        return networks
    source = experiment.dataset.train
    # Not of the size of evaluation batches, which is to change no result.
    size = min(experiment.config.batch_size, STATISTICS_SIZE, len(source))
    count = min(len(source) // size, STATISTICS_BATCHES)
    # No padding, which would count; every batch is from all over the data, which may be sorted.
    rows = spread(len(source), count * size).reshape(size, count).T.reshape(-1)
    last, other = first, state.shifted_averages(first)
    for batch in loader.eval_batches(Subset(source, rows, "some of it"), batch_size=size):
        watch.alive()
        last, other = programs.pass_batch(params, (last, other), batch)
    folded = jax.tree.map(state.batch_stats_fixed_point, first, last, other)
    return {role: (params[role], folded[role]) for role in networks}


def predict_controls(
    experiment: Experiment, networks: Mapping[Role, tuple[Params, State]], batch: Batch
) -> Mapping[str, Mapping[Role, Mapping[str, jax.Array]]]:
    """Returns `{control: {role: {name: [b, ...]}}}`.

    Args:
      experiment: what is run.
      networks: from `untrained`.
      batch: as the source gives it; it runs on one device.
    """
    return _programs(experiment).predict(networks, batch)


def _programs(experiment: Experiment) -> "Programs":
    if experiment.caches.controls is None:
        experiment.caches.controls = Programs(experiment)
    return experiment.caches.controls


class Programs:
    """The jitted programs of controls.

    Args:
      experiment: what is run.
    """

    def __init__(self, experiment: Experiment):
        self._experiment = experiment

    @functools.cached_property
    def initial_networks(self) -> Callable:
        """The jitted `key -> {role: (params, state)}`."""
        roles = self._experiment.controls.get("initial", {})

        def init(key):
            networks = {}
            for role in roles:
                source = self._experiment.ema[role][0] if role in self._experiment.ema else role
                inputs = state.zeros(self._experiment.shapes.roles[source].inputs)
                networks[role] = self._experiment.models[role].init(
                    rng.stream(key, "init", source), *inputs
                )
            return networks

        return jax.jit(init)

    def _bound(self, params: Mapping[Role, Params], model_state: Mapping[Role, State]):
        """Networks with these parameters and states; no result depends on their randomness."""
        key, precision = jax.random.key(0), self._experiment.config.precision
        return steps.BoundNets(
            self._experiment.models, params, model_state, key=key, precision=precision
        )

    @functools.cached_property
    def pass_batch(self) -> Callable:
        """The jitted `(params, states, batch) -> states` of `untrained`, in training mode.

        Outputs do not depend on the states, so that XLA computes them once for all of these.
        """

        def run(params, states, batch):
            batch = evaluation_transform(self._experiment, batch)
            networks = [self._bound(params, model_state) for model_state in states]
            return tuple(
                {r: nets(r, batch["input"], train=True)[1] for r in params} for nets in networks
            )

        return jax.jit(run)

    @functools.cached_property
    def predict(self) -> Callable:
        """The jitted `(networks, batch) -> {control: {role: {name: [b, ...]}}}`."""

        def run(networks, batch):
            batch = evaluation_transform(self._experiment, batch)
            params, model_state = ({r: n[i] for r, n in networks.items()} for i in (0, 1))
            nets = self._bound(params, model_state)
            programs: dict[str, dict[Role, dict[str, Any]]] = {}
            for control, roles in self._experiment.controls.items():
                for role, names in roles.items():
                    if control == "raw":
                        outputs = dict.fromkeys(
                            names, raw_input(self._experiment.dataset, batch["input"])
                        )
                    else:
                        outputs = nets(role, batch["input"])[0]
                    roles = programs.setdefault(control, {})
                    roles[role] = {name: outputs[name] for name in names}
            return programs

        return jax.jit(run)
