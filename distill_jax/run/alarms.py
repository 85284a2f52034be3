"""Alarms: rules over the history of what is logged, computed on the host from finished numbers.

A rule is a pure function of the history of one metric, `[(step, value), ...]` from the first log of
the run to the newest. It returns a message about what is wrong with the newest value, or None. A
table lists the rules with a pattern for the metrics that they read. Nothing here runs in a step.
"""

import fnmatch
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from distill_jax.report.wording import alarm_line
from distill_jax.run import writers
from distill_jax.trainer.io.files import read_rows

History = Sequence[tuple[int, float]]
Rule = Callable[[History], str | None]
"""Returns a message about the newest value, or None if nothing is wrong."""

WINDOW = 64
"""Logged values that a spike is measured against."""

FEWEST = 16
"""Number of earlier values that are required before a value can count as a spike."""

LEFT = {
    "student/std": 0.4,
    "projector/std": 0.4,
    "instances/std": 0.4,
    "*/variance": 0.01,
}
"""Share of its first value below which a measure of embeddings counts as lost, by measure."""

BATCHES = 100
"""Batches after which a count that was always 0 is reported."""

RANK_LEFT, RANK, INFORMATION = 0.15, 2.0, 0.05
"""Of ranks the share of the first, as in `LEFT`; and a number of dimensions, and of nats that
assignments say of an example, that are lost where they are also less than half of the first."""


class Alarm(NamedTuple):
    """Something that was noticed: at which step, by which rule, in which metric."""

    step: int
    rule: str
    metric: str
    message: str


def spike(deviations: float) -> Rule:
    """Returns the rule for a value far above the preceding ones.

    Let m be the median of the last `WINDOW` values before the newest. Let s be the larger of 0.05
    |m|, so that rounding in a flat curve is no spike, and 1.4826 times their median absolute
    deviation, which is the standard deviation for a normal distribution. A value above m +
    deviations * s is a spike. A value with fewer than `FEWEST` values before it is never one.

    Args:
      deviations: threshold, in units of s.
    """

    def rule(history: History) -> str | None:
        if len(history) <= FEWEST:
            return None
        value = history[-1][1]
        before = [x for _, x in history[-1 - WINDOW : -1]]
        middle = statistics.median(before)
        scale = 1.4826 * statistics.median(abs(x - middle) for x in before)
        scale = max(scale, 0.05 * abs(middle), 1e-12)
        if value <= middle + deviations * scale:
            return None
        away = (value - middle) / scale
        return f"is {value:.4g}, {away:.3g} deviations above its median {middle:.4g}"

    return rule


def below(least: float) -> Rule:
    """Returns the rule for a value below `least` at two logs in a row."""

    def rule(history: History) -> str | None:
        values = [value for _, value in history[-2:]]
        if len(values) < 2 or max(values) >= least:
            return None
        return f"is {values[-1]:.3g}, below {least:.3g}"

    return rule


def lost(share: float, *, least: float = math.inf) -> Rule:
    """Returns the rule for a value below `least` and below `share` of its first, positive value.

    The value must be below both at two logs in a row, not counting the first log.
    """

    def rule(history: History) -> str | None:
        first, value = history[0][1], history[-1][1]
        if first <= 0 or below(min(share * first, least))(history[1:]) is None:
            return None
        return f"is {value:.3g}, {value / first:.2g} of its {first:.3g} at step {history[0][0]}"

    return rule


def nothing_counted(batches: int) -> Rule:
    """Returns the rule for a count that is 0 in the first batches of a run, so many at least."""

    def rule(history: History) -> str | None:
        step = history[-1][0]
        if step < batches or any(value for _, value in history):
            return None
        return (
            f"is 0 in the first {step} batches: no token to learn from, see data.train_transforms"
        )

    return rule


def either(*rules: Rule) -> Rule:
    """Returns the rule that gives the message of the first of `rules` that has one."""

    def rule(history: History) -> str | None:
        return next((message for one in rules if (message := one(history)) is not None), None)

    return rule


def default_rules(*, spike_deviations: float, total: int = 0) -> list[tuple[str, str, Rule]]:
    """Returns the rules of a run as `(name, pattern of metrics, rule)`.

    "spike" is about losses and norms of gradients. "collapse" is about representations. An
    untrained network spreads them as widely as its input does. Training may reduce that spread, but
    the representations have collapsed if, at two logs in a row,

    - they point nearly the same way: less than 0.4 of the first "std" is left, a sixth of its
      square, see `spectrum.normalized_std`. This is not tested for the tokens of an input, which
      may mostly encode their position in healthy runs too;
    - they fill few dimensions: less than 0.15 of the first "rank", see `spectrum.rankme`, or less
      than both 2 and half of the first;
    - they shrink to a point, whatever their directions: less than 0.01 of the first "variance";
    - one or two prototypes take nearly everything: the mean assignment has an entropy below log
      2.5, where log 2 is that of two alike;
    - assignments to prototypes are the same for all examples: their mutual information with the
      example is below 0.05 nats, out of a possible log k, and below half of the first value. That
      first value is low: it is small before training and rises in a healthy run.

    "nothing" is about terms with counts that are 0 in all of the first `BATCHES` batches, or in the
    whole of a shorter run.

    The first values are those of the very first step. `benchmarks/collapse.py` measures which
    collapses are noticed.

    Args:
      spike_deviations: see `spike`; 0 leaves that rule out.
      total: number of steps of the run, 0 if it is not known.
    """
    enough = min(BATCHES, total) if total else BATCHES
    rules: list[tuple[str, str, Rule]] = [
        *(("collapse", f"train/embedding/{what}", lost(left)) for what, left in LEFT.items()),
        (
            "collapse",
            "train/embedding/*/rank",
            either(lost(RANK_LEFT), lost(0.5, least=RANK)),
        ),
        ("collapse", "train/*prototype_entropy", below(math.log(2.5))),
        ("collapse", "train/*assignment_information", lost(0.5, least=INFORMATION)),
        ("nothing", "train/counts/*", nothing_counted(enough)),
    ]
    if spike_deviations:
        rule = spike(spike_deviations)
        names = ("loss", "grad_norm", "outer_loss", "outer_grad_norm")
        rules += [("spike", f"train/{name}*", rule) for name in names]
    return rules


class Alarms:
    """Sees all that a run logs, and raises an alarm once for each event.

    An event lasts as long as a rule returns a message about a metric at consecutive logs.

    Args:
      folder: of the run; alarms go to its `alarms.jsonl`, and where the run continues, history
        and earlier alarms are read from its files. None where another process writes.
      rules: `(name, pattern of metrics, rule)`, where `*` stands for anything.
      resume_step: step at which the run continues; later entries are dropped.
      log_line: prints a line.

    Attributes:
      raised: all alarms of the run.
    """

    def __init__(
        self,
        folder: pathlib.Path | None,
        rules: Iterable[tuple[str, str, Rule]],
        *,
        resume_step: int = 0,
        log_line: Callable[[str], None] = print,
    ):
        self._folder, self._rules, self._log_line = folder, tuple(rules), log_line
        self._history: dict[str, list[tuple[int, float]]] = {}
        self._going: set[tuple[str, str]] = set()
        self.raised: list[Alarm] = []
        if folder is None:
            return
        for row in read_rows(folder / "metrics.jsonl", until=resume_step):
            self._remember(row["step"], row)
        rows = writers.resume_lines(folder / "alarms.jsonl", resume_step, log_line=log_line)
        self.raised = [Alarm(**row) for row in rows if row.keys() == set(Alarm._fields)]

    def _remember(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Adds what a rule reads to the history; returns its names."""
        names = []
        for name, value in metrics.items():
            numeric = isinstance(value, (int, float)) and math.isfinite(value)
            if not numeric or not any(fnmatch.fnmatchcase(name, p) for _, p, _ in self._rules):
                continue
            history = self._history.setdefault(name, [])
            if not history or history[-1][0] < step:  # a resumed run may log its step again
                history.append((step, float(value)))
                names.append(name)
        return names

    def see(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes what is logged at a step, under the names of `metrics.jsonl`."""
        if self._folder is None:
            return
        for name in self._remember(step, metrics):
            history = self._history[name]
            for rule_name, pattern, rule in self._rules:
                if not fnmatch.fnmatchcase(name, pattern):
                    continue
                message, event = rule(history), (rule_name, name)
                if message is None:
                    self._going.discard(event)
                elif event not in self._going:
                    self._going.add(event)
                    self.add(Alarm(step, rule_name, name, message))

    def add(self, alarm: Alarm) -> None:
        """Raises an alarm: a line on the console, one in `alarms.jsonl`."""
        self.raised.append(alarm)
        if self._folder is not None:
            self._log_line(alarm_line(alarm._asdict()))
            with (self._folder / "alarms.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(alarm._asdict()) + "\n")
