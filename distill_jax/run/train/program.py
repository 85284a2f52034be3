"""What computes the steps of a run: the state to start from, the compiled steps, outputs."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from distill_jax.core import partition
from distill_jax.core.api import TrainState
from distill_jax.run import build as build_lib
from distill_jax.run import environment, masked, processes, sampled
from distill_jax.run.train.evaluation import predictions
from distill_jax.run.train.run import Run


class Program(Protocol):
    """The program that takes steps: of one run, or of several side by side.

    Every array has a leading axis of runs where there are several.

    Attributes:
      update: the compiled steps `(state, online, fed, key) -> (state, metrics [(r,) m])` by name.
      online: the part of the frozen networks that a step applies.
      key: the root key.
    """

    update: dict[str, Callable]
    online: Any
    key: Any

    def start(self) -> tuple[TrainState, int]:
        """Returns the state to go on from, and its step."""
        ...

    def compile(self, step: int) -> None:
        """Compiles the programs that are needed from `step` on."""
        ...

    def feed(self, step: int, variant: str = "inner", /) -> Any:
        """Returns the arguments of the step of that name at `step`."""
        ...

    def collect(
        self, state: TrainState, split: str, rows: np.ndarray | None = None
    ) -> tuple[list[Any], dict[str, np.ndarray]]:
        """Returns the outputs of each run on a split, and the facts."""
        ...

    def split(self, state: TrainState) -> list[TrainState]:
        """Returns the state of each run."""
        ...

    def join(self, states: Sequence[TrainState]) -> TrainState:
        """Returns the states of all runs as one."""
        ...

    def draw(self, state: TrainState) -> None:
        """Stores pictures for the report."""
        ...

    @property
    def flops_per_step(self) -> float | None:
        """Floating-point operations of a step of one run over all its devices."""
        ...

    def close(self) -> None:
        """Lets go of threads."""
        ...


class SingleRun:
    """A run by itself, its batch split over all devices (`Program`)."""

    def __init__(self, run: Run):
        self.run, self.experiment = run, run.experiment

    def start(self) -> tuple[TrainState, int]:
        replicated = partition.replicated(self.experiment.mesh)
        # As an array of numbers, which unlike a key can be put on the devices of other processes.
        numbers = np.asarray(jax.random.key_data(jax.random.key(self.run.config.seed)))
        self.key = jax.random.wrap_key_data(jax.device_put(numbers, replicated))
        self.frozen = build_lib.frozen_networks(self.experiment, self.run.config)
        self.online = self.experiment.online(self.frozen)
        self._compiling = None
        if self.experiment.resident and not self.experiment.cached:
            # Known before the state is: what steps take, whichever is the first.
            self.feed = build_lib.Feed(self.experiment, seed=self.run.config.seed, start=0)
            self._compiling = environment.in_background(lambda: self._compile(0))
        if (restored := self.run.restore()) is not None:
            self.run.log_line(f"continuing from step {restored[1]}")
            return restored
        return self.run.begin(self.key, self.frozen), 0

    def compile(self, step: int) -> None:
        if self._compiling is not None:
            self.update = self._compiling()
            return
        experiment, config = self.experiment, self.run.config
        teacher_outputs = build_lib.stored_teacher_outputs(
            experiment, config, self.frozen, self.run.log_line
        )
        self.feed = build_lib.Feed(
            experiment, seed=config.seed, start=step, teacher_outputs=teacher_outputs
        )
        self.update = self._compile(step)

    def _compile(self, step: int) -> dict[str, Callable]:
        experiment = self.experiment
        compiled = {
            v: build_lib.compile_step(experiment, self.feed(step, v), v)
            for v in experiment.variants
        }
        if len(experiment.phases) == 1:
            return compiled

        def with_own(v: str) -> Callable:  # each step takes the frozen networks of its phase
            return lambda state, online, *given: compiled[v](
                state, experiment.online(online, v), *given
            )

        return {v: with_own(v) for v in compiled}

    def collect(
        self, state: TrainState, split: str, rows: np.ndarray | None = None
    ) -> tuple[list[Any], dict[str, np.ndarray]]:
        outputs, example_info = predictions(self.experiment, state, self.frozen, split, rows=rows)
        return [outputs], example_info

    def split(self, state: TrainState) -> list[TrainState]:
        return [state]

    def join(self, states: Sequence[TrainState]) -> TrainState:
        return states[0]

    def draw(self, state: TrainState) -> None:
        frozen = build_lib.for_evaluation(self.experiment, self.frozen)
        for module in (masked, sampled):
            module.store(
                self.run.workdir,
                self.experiment,
                state,
                frozen,
                seed=self.run.config.seed,
                write=processes.is_main(),
            )

    @property
    def flops_per_step(self) -> float | None:
        return self.experiment.flops_per_step

    def close(self) -> None:
        self.feed.close()
