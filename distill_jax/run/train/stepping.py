"""Steps between two events: their schedule, how far the host runs ahead, when to stop."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from distill_jax.core import durations
from distill_jax.core.api import TrainState
from distill_jax.core.errors import UserError
from distill_jax.report import tables
from distill_jax.run import alarms, crash, environment, processes, writers
from distill_jax.run import config as config_lib
from distill_jax.run.build import Experiment
from distill_jax.run.config import ConfigDict
from distill_jax.run.train.program import Program
from distill_jax.run.train.run import Run
from distill_jax.run.watch import Watch

IN_FLIGHT = 8
"""After this many steps the loop waits for the first of them: the device never idles, and the
displayed rate and the response to a signal lag by at most twice this many steps."""

SHORT_STEP, SHORT_STEPS = 0.005, 32
"""Seconds of a step below which the loop waits after this many steps instead, for the step that is
`IN_FLIGHT` back: a wait costs the host as much as a tenth of a millisecond or two."""

Rows = list[tuple[str, np.ndarray]]
"""Metrics of steps: the name of the step and its values `[(r,) m]`."""


def wait_every(pace: float | None) -> int:
    """Returns the number of steps between two waits.

    Several CPU devices wait often whatever the pace, since the collectives of many programs in
    flight can block each other.

    Args:
      pace: seconds of a step, if known.
    """
    short = pace is not None and pace < SHORT_STEP
    blocking = jax.default_backend() == "cpu" and jax.device_count() > 1
    return SHORT_STEPS if short and not blocking else IN_FLIGHT


class Clock:
    """Wall time by phase, in seconds, from the start of the process for its first run."""

    def __init__(self):
        self.phases: dict[str, float] = {"import": environment.startup_seconds()}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now


class Due(NamedTuple):
    """What is due after a step."""

    log: bool
    evaluate: bool
    save: bool


class Schedule:
    """The steps of a run after which something is due.

    Args:
      config: of the run.
      experiment: what is run.
    """

    def __init__(self, config: ConfigDict, experiment: Experiment):
        self.total = total = experiment.total_steps
        duration = {"steps_per_epoch": experiment.steps_per_epoch, "total_steps": total}
        self._config, self._duration = config, duration
        self._log = config.log.every_steps
        self._evaluate = config_lib.duration(config, "eval.every", default=total, **duration)
        self._save = config_lib.duration(config, "checkpoint.every", default=total, **duration)

    def next(self, step: int) -> int:
        """Returns the next step after which something is due."""
        every = (self._log, self._evaluate, self._save)
        return min(self.total, *((step // n + 1) * n for n in every))

    def evaluation_from(self, duration: str, *, where: str) -> int:
        """Returns the first step at or after a duration with an evaluation.

        Raises:
          UserError: there is none before the last step.
        """
        wanted = durations.steps(
            duration, where, batch_size=self._config.batch_size, **self._duration
        )
        step = max(1, -(-round(wanted) // self._evaluate)) * self._evaluate
        if step >= self.total:
            what = f"no evaluation between {duration} of {self.total} steps and the last step"
            raise UserError(what, where=where, hint="set eval.every to less")
        return step

    def at(self, step: int, *, event: int) -> Due:
        """Returns the events due after `step`, which is before `event` if the run was stopped."""
        reached, last = step == event, step == self.total
        return Due(
            log=reached and (step % self._log == 0 or last),
            evaluate=reached and (step % self._evaluate == 0 or last),
            save=step % self._save == 0 or last,
        )


class Stop:
    """Whether to stop. Several processes decide together, every `IN_FLIGHT` steps.

    Args:
      flag: set by a signal.
      planned: the step after which to stop without one.
    """

    def __init__(self, flag: environment.StopFlag, planned: int | None = None):
        self._flag, self._agreed, self._planned = flag, False, planned

    def planned(self, step: int) -> bool:
        """Whether the planned end is reached."""
        return self._planned is not None and step >= self._planned

    def asked(self, step: int) -> bool:
        if self.planned(step):
            return True
        if jax.process_count() == 1:
            return bool(self._flag)
        if step % IN_FLIGHT == 0:
            self._agreed = processes.any_process(bool(self._flag))
        return self._agreed


class Stepper:
    """Takes the steps of a program, and keeps time, progress and the watch.

    Args:
      program: performs the computation.
      runs: of the program.
      clock: phases of the time.
      log_line: prints a line.

    Attributes:
      schedule: the events by step.
      paces: seconds of a step between events.
    """

    def __init__(
        self,
        program: Program,
        runs: Sequence[Run],
        *,
        clock: Clock,
        log_line: Callable[[str], None],
    ):
        self.program, self.runs, self.clock, self.log_line = program, runs, clock, log_line
        config, self._variant = runs[0].config, runs[0].experiment.variant
        self.schedule = Schedule(config, runs[0].experiment)
        self.watch = Watch(
            [run.workdir for run in runs],
            total=self.schedule.total,
            stall_seconds=config.watch.stall_seconds,
            on_stall=config.watch.on_stall,
            process=jax.process_index(),
            log_line=log_line,
        )
        self.paces: list[float] = []
        clock.lap("build")

    @contextlib.contextmanager
    def opened(self, title: str) -> Iterator[tuple[TrainState, int]]:
        """Starts the program and opens its runs; returns the state to continue from, and its step.

        Args:
          title: title of the progress display.

        Raises:
          Preempted: a signal requested a stop before the first step.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.watch)
            for run in self.runs:
                stack.push(run.close)
            processes.stop_if_asked("before the next step")
            state, step = self.program.start()
            self.clock.lap("init")
            processes.stop_if_asked("before the next step")
            self.watch.enter("compile")
            self.program.compile(step)
            stack.callback(self.program.close)
            self.clock.lap("compile")
            for run in self.runs:
                run.open(step)
            self.progress = writers.Progress(
                self.schedule.total,
                initial=step,
                description=title,
                is_main=jax.process_index() == 0,
            )
            stack.callback(self.progress.close)
            self._first, self._began = step, time.perf_counter()
            crash.doing("training")
            yield state, step

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Is in what comes after the last step."""
        crash.doing("measuring the result and writing it")
        self.progress.close()
        self.clock.lap("train")
        with self.watch.during("other", "what ends a run"):
            yield

    def advance(
        self, state: TrainState, step: int, *, until: int, stop: Stop
    ) -> tuple[TrainState, int, Rows]:
        """Takes steps until `until`, or until a stop is requested; returns the metrics of each."""
        begin, started, pending, program = step, time.perf_counter(), [], self.program
        every = wait_every(self.paces[-1] if self.paces else None)
        while step < until and not stop.asked(step):
            variant = self._variant(step)
            self.watch.enter("data")
            fed = program.feed(step, variant)
            self.watch.enter("dispatch")
            state, metrics = program.update[variant](state, program.online, fed, program.key)
            step += 1
            pending.append((variant, metrics))
            if len(pending) % every == 0:
                self.watch.enter("device")
                pending[-IN_FLIGHT][1].block_until_ready()
            self.watch.enter("other")
            self.watch.step = step
            self.progress.update(step)
            if step == self._first + 1:
                self._first_step(step, metrics)
        self.watch.enter("device")
        rows = [(variant, np.asarray(values)) for variant, values in pending]
        self.watch.enter("other")
        if step > begin:
            self.paces.append((time.perf_counter() - started) / (step - begin))
        return state, step, rows

    def _first_step(self, step: int, metrics: jax.Array) -> None:
        self.watch.enter("device")
        metrics.block_until_ready()
        self.clock.lap("first_step")
        self.watch.start(step)
        phases = ", ".join(f"{name} {t:.2f}" for name, t in self.clock.phases.items())
        total = sum(self.clock.phases.values())
        flops = self.program.flops_per_step
        work = f", {tables.flop(flops)} a step" if flops else ""
        self.log_line(f"step {step} after {total:.2f} s ({phases}){work}")

    @property
    def seconds(self) -> float:
        """Time since the first step began."""
        return time.perf_counter() - self._began

    def stalls(self) -> list[alarms.Alarm]:
        """Takes the stalls that the watch has reported since the last call."""
        stalls = self.watch.stalls[:]
        del self.watch.stalls[: len(stalls)]
        return [alarms.Alarm(step, "stall", phase, message) for step, phase, message in stalls]
