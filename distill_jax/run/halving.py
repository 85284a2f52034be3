"""Successive halving: which trials of a sweep go on, by a rule that is fixed before the sweep.

All n trials train for a part of their length, the first rung. The best `1 / eta` of them go on to
the next rung, at `eta` times the length; the others stop (Jamieson and Talwalkar 2016,
arXiv:1502.07943, Algorithm 1). The rungs are those of the inner loop of Hyperband (Li et al. 2017,
arXiv:1603.06560, Algorithm 1) whose last one is the whole length: `eta^-i` of it for
`i = s, ..., 1`, with `s = floor(log_eta n)`, and `floor(m / eta)` of the m trials at a rung go on.

A trial is judged by the metric that selects its checkpoints, measured on the held-out part at the
rung. A trial without a finite value there goes last. Of two equal values, that of the trial with
the lower number counts as better.
"""

import dataclasses
import fractions
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax.core import durations
from distill_jax.core.errors import UserError
from distill_jax.run.config import ConfigDict
from distill_jax.run.config.durations import read as read_duration
from distill_jax.run.sweep_space import SweepError
from distill_jax.trainer.io import files

FILE = "halving.json"
_WHERE = "--halving"


def plan(n: int, *, eta: int, most: int | None = None) -> list[fractions.Fraction]:
    """Returns the rungs before the end of training, as parts of its length, the first one first.

    Args:
      n: number of trials.
      eta: the share that goes on is `1 / eta`; 2 or more.
      most: maximum number of rungs, by default as many as n allows.

    Raises:
      SweepError: there are fewer than eta trials.
    """
    s = 0
    while eta ** (s + 1) <= n:
        s += 1
    if s == 0:
        what = f"{n} trials cannot be cut to one in {eta}"
        raise SweepError(what, where=_WHERE, hint="more trials, or a smaller number")
    return [fractions.Fraction(1, eta**i) for i in range(min(s, most or s), 0, -1)]


def ranked(values: Mapping[str, float | None], *, mode: str) -> list[str]:
    """Returns the trials with a finite value, the best first.

    Args:
      values: metric at the rung by trial, in the order of their numbers; None if there is none.
      mode: "max" or "min".
    """
    sign = -1 if mode == "max" else 1
    finite = {name: v for name, v in values.items() if v is not None and math.isfinite(v)}
    return sorted(finite, key=lambda name: sign * finite[name])  # stable


def best(values: Mapping[str, float | None], *, eta: int, mode: str) -> list[str]:
    """Returns the trials that go on, one in eta and at least one, the best first."""
    return ranked(values, mode=mode)[: max(1, len(values) // eta)]


def check(config: ConfigDict, trials: Sequence[Mapping[str, Any]], rungs: Sequence[Any]) -> None:
    """Checks that trials can be judged before their end.

    Args:
      config: of a trial.
      trials: values by config path.
      rungs: from `plan`.

    Raises:
      SweepError: there is no held-out part, trials have different metrics, or evaluations are too
        rare to tell the rungs apart.
    """
    if not config.eval.metric.startswith("held_out/") or not config.data.held_out:
        what = "there is no held-out part to judge trials by, and the test part does not choose"
        raise SweepError(what, where=_WHERE, hint="set data.held_out and eval.metric")
    for path in ("eval.metric", "eval.mode", "data.held_out"):
        if any(path in trial for trial in trials):
            what = "trials that differ in it cannot be ranked before their end"
            raise SweepError(what, where=path, hint="leave --halving out")
    total, every = (read_duration(config, path) for path in ("total", "eval.every"))
    if every is None:
        what = "trials are evaluated at their end only"
        raise SweepError(what, where="eval.every", hint=f'"{_percent(rungs[0])}" or less')
    (length, unit), (interval, of) = durations.parse(total or 0), durations.parse(every)
    if of != "percent" and of != unit:
        return  # the steps tell, at the second rung
    share = interval / (100 if of == "percent" else length)
    steps = [math.ceil(float(rung) / share - 1e-9) for rung in rungs]
    if len({*steps}) < len(steps) or steps[-1] * share >= 1:
        what = f"an evaluation every {every} does not tell the rungs apart"
        raise SweepError(what, where="eval.every", hint=f'"{_percent(rungs[0])}" or less')


def stop_flag(rung: fractions.Fraction) -> str:
    """Returns the flag with which a trial stops at a rung."""
    return f"--stop_at={_percent(rung)}"


def _percent(rung: fractions.Fraction) -> str:
    return f"{float(100 * rung):.17g} %"


def read_value(folder: pathlib.Path, metric: str) -> tuple[int, float | None] | None:
    """Returns the last step at which a run measured a metric, and the value, None if not finite."""
    rows = [row for row in files.read_rows(folder / "metrics.jsonl") if metric in row]
    if not rows:
        return None
    value = rows[-1][metric]
    return int(rows[-1]["step"]), float(value) if _finite(value) else None


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclasses.dataclass
class Record:
    """What happened at the rungs of a sweep; `halving.json` in its folder.

    Attributes:
      path: of the file.
      eta: as in `plan`.
      metric: that ranks the trials.
      mode: "max" or "min".
      rungs: of each rung its `part` of the length, `at` with step and value by trial or the reason
        why it has none, and once it is decided `on`, the trials that go on.
    """

    path: pathlib.Path
    eta: int
    metric: str
    mode: str
    rungs: list[dict[str, Any]]

    @classmethod
    def open(
        cls, path: pathlib.Path, *, eta: int, metric: str, mode: str, parts: Sequence[Any]
    ) -> "Record":
        """Returns the record of a sweep that goes on, or that of a new one.

        Raises:
          SweepError: the sweep in the folder follows another rule.
          DamagedFile: the record cannot be read.
        """
        rungs: list[dict[str, Any]] = [{"part": str(part), "at": {}} for part in parts]
        new = cls(path, eta, metric, mode, rungs)
        try:
            there = cls.read(path)
        except files.MissingFile:
            return new
        rule = [{**vars(r), "rungs": [rung["part"] for rung in r.rungs]} for r in (there, new)]
        if rule[0] != rule[1]:
            what = f"the sweep has {len(there.rungs)} rungs with 1 in {there.eta} going on"
            what += f" by {there.metric}"
            raise SweepError(what, where=str(path), hint="give the same rule")
        return there

    @classmethod
    def read(cls, path: pathlib.Path) -> "Record":
        """Returns the record in a file; raises as `files.read_json` does."""
        rung = {"part": str, "at": {"*": dict}, "on?": list}
        shape = {"eta": int, "metric": str, "mode": str, "rungs": [rung]}
        found = files.read_json(path, shape=shape)
        return cls(path, **{name: found[name] for name in shape})

    def write(self) -> None:
        content = {k: v for k, v in vars(self).items() if k != "path"}
        files.write_text(self.path, json.dumps(content, indent=1))

    def add(self, rung: int, trial: str, folder: pathlib.Path, why: str = "") -> None:
        """Notes what a trial reached at a rung.

        Args:
          rung: number of the rung.
          trial: name of the trial.
          folder: of the trial.
          why: why it did not reach the rung, if it did not.

        Raises:
          UserError: it stopped without a value, or where it stopped at the rung before.
        """
        found = None if why else read_value(folder, self.metric)
        if why:
            self.rungs[rung]["at"][trial] = {"step": None, "value": None, "why": why}
        elif found is None:
            raise UserError(f"did not measure {self.metric}", where=str(folder))
        else:
            step, value = found
            if rung and step <= self.rungs[rung - 1]["at"][trial]["step"]:
                what = f"the rungs {self.rungs[rung - 1]['part']} and {self.rungs[rung]['part']}"
                what += f" of training are at the same evaluation, of step {step}"
                raise SweepError(what, where="eval.every", hint="evaluate more often")
            self.rungs[rung]["at"][trial] = {"step": step, "value": value}
        self.write()

    def decide(self, rung: int, trials: Sequence[str]) -> list[str]:
        """Returns the trials that go on from a rung, in their order, and notes them."""
        at = self.rungs[rung]["at"] = {t: self.rungs[rung]["at"][t] for t in trials}
        values = {trial: entry["value"] for trial, entry in at.items()}
        on = set(best(values, eta=self.eta, mode=self.mode))
        self.rungs[rung]["on"] = [t for t in trials if t in on]
        self.write()
        return self.rungs[rung]["on"]

    def stopped(self) -> dict[str, dict[str, Any]]:
        """Returns, by trial that does not go on, its rung, step, value and a sentence."""
        found: dict[str, dict[str, Any]] = {}
        for number, rung in enumerate(self.rungs):
            if "on" not in rung:
                break
            at = rung["at"]
            order = ranked({t: entry["value"] for t, entry in at.items()}, mode=self.mode)
            for trial, entry in at.items():
                if trial in rung["on"]:
                    continue
                of = f"of {len(at)} trials at {rung['part']} of training"
                if trial in order:
                    rank = 1 + order.index(trial)
                    why = f"successive halving: {self.metric} {entry['value']:.6g} at step "
                    why += f"{entry['step']} has rank {rank} {of}, and {len(rung['on'])} go on"
                else:
                    why = f"successive halving: {entry.get('why') or 'no finite value'}; {of[3:]}"
                found[trial] = {"rung": number, **entry, "why": why}
        return found
