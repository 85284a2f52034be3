"""The saved steps of a run: the complete ones, the best one, and the lost ones.

`index.json` lists every saved step with its metric, so that missing steps are detected. This module
does not need JAX.
"""

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from distill_jax.core.errors import CheckpointError, nearest
from distill_jax.trainer.io.files import (
    NUMBER,
    MissingFile,
    Shape,
    mismatch,
    peek,
    read_json,
    write_text,
)
from distill_jax.trainer.io.step_folder import (
    CHECKSUMS,
    META,
    is_step,
    read_meta,
    remove_step,
    seal,
    step_number,
    verify,
)

INDEX = "index.json"


def finished_steps(checkpoints: pathlib.Path) -> list[int]:
    """Returns the completely saved steps, oldest first."""
    try:
        folders = [p for p in checkpoints.iterdir() if not p.is_symlink()]
        names = [p.name for p in folders if (p / CHECKSUMS).exists()]
    except OSError:
        return []
    return sorted(step for step in map(step_number, names) if step is not None)


def whole_steps(checkpoints: pathlib.Path) -> list[int]:
    """Returns the steps that appear completely saved, with or without a digest."""
    named = {p: step_number(p.name) for p in checkpoints.glob("*") if (p / META).is_file()}
    return sorted(step for p, step in named.items() if step is not None and is_step(p))


def has_steps(checkpoints: pathlib.Path) -> bool:
    """Whether any state was ever completely saved; it may have been damaged since."""
    if finished_steps(checkpoints) or any(checkpoints.glob("*.damaged*")):
        return True
    index = peek(checkpoints / INDEX)
    if isinstance(index, dict):
        return any(index.get(part) for part in ("saved", "lost"))
    return bool(whole_steps(checkpoints))


def newest_meta(checkpoints: pathlib.Path) -> Mapping[str, Any] | None:
    """Returns the metadata of the newest readable state of a run, if any."""
    for step in reversed(finished_steps(checkpoints)):
        with contextlib.suppress(CheckpointError):
            return read_meta(checkpoints / str(step))
    return None


class Steps:
    """The steps in one `checkpoints` folder.

    Args:
      folder: may be absent.
      keep: number of newest steps to keep, in addition to the best one.
      mode: "max" or "min": whether a larger or a smaller selection metric is better.
      read_only: whether damaged steps are skipped and stay in place.
      rescue: alternative to name in the error if every step is damaged.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        keep: int = 2,
        mode: str = "max",
        read_only: bool = False,
        rescue: str = "",
    ):
        self.folder, self._read_only, self._rescue = folder.absolute(), read_only, rescue
        self._keep, self._sign = max(keep, 1), 1.0 if mode == "max" else -1.0

    def steps(self) -> list[int]:
        """Returns the finished steps, oldest first."""
        return finished_steps(self.folder)

    def meta(self, step: int) -> Mapping[str, Any]:
        """Returns the metadata of a step, see `read_meta`."""
        return read_meta(self.folder / str(step))

    def best(self) -> int | None:
        """Returns the step with the best selection metric, the earliest among equals.

        Raises:
          CheckpointError: the metric of a step cannot be read.
        """
        return self._best(self._metrics())

    def missing(self) -> list[int]:
        """Returns the saved steps that are missing and were better than the existing ones."""
        steps, metrics = self.steps(), self._metrics()
        gone = {s: m for s, m in self._saved().items() if s not in steps}
        best = self._best(metrics | gone)
        return [best] if best in gone else []

    def lost(self, metric: float | None) -> list[dict[str, Any]]:
        """Returns the lost steps that may have been better than the best remaining step.

        Args:
          metric: metric of the best remaining step, None if there is none.

        Returns:
          `[{"step", "metric"}]`, oldest first; a metric of None is unknown.
        """
        index, steps = self._read_index() or {"saved": {}, "lost": {}}, self.steps()
        gone = {s: m for s, m in index["saved"].items() if s not in steps} | index["lost"]
        return [
            {"step": step, "metric": value}
            for step, value in sorted(gone.items())
            if value is None or metric is None or self._sign * value >= self._sign * metric
        ]

    def make_room(self, step: int) -> None:
        """Deletes the remains of an interrupted save at the path of a step."""
        if self._read_index() is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_index(saved=self._metrics())
        folder = self.folder / str(step)
        remove_step(folder)
        if folder.exists():
            raise CheckpointError("was not written by this program", where=str(folder))

    def add(self, step: int, metric: float | None) -> None:
        """Seals a written step; deletes old steps and the remains of interrupted saves."""
        seal(self.folder / str(step))
        self._write_index(saved={**self._saved(), step: metric})
        steps, best = self.steps(), self.best()
        old = {step for step in steps[: -self._keep] if step != best}
        saved = self._saved()
        kept = {step: metric for step, metric in saved.items() if step not in old}
        if kept != saved:  # before they go: without it they would be looked for
            self._write_index(saved=kept)
        for step in old:
            remove_step(self.folder / str(step))
        for path in self.folder.iterdir():
            name, temporary, _ = path.name.partition(".orbax-checkpoint-tmp")
            number = step_number(name)
            if number is None or not (temporary or path.is_dir()):
                continue
            damaged = not temporary and (number in steps or number in kept)
            if not damaged and is_step(path):
                remove_step(path)

    def find(self, step: int | None = None) -> tuple[int | None, list[str]]:
        """Returns the step to restore, None if there is none, and the steps set aside.

        Args:
          step: the requested step; defaults to the newest undamaged one. In that case, damaged
            newer steps are set aside, and so is the best one if it is damaged.

        Raises:
          CheckpointError: every step, or the requested one, is damaged or missing.
        """
        if step is not None:
            self._check(step)
            return step, []
        index, skipped = self._read_index(), []
        known = dict(index["saved"]) if index else dict.fromkeys(whole_steps(self.folder))
        missing = {s: metric for s, metric in known.items() if s not in self.steps()}
        for gone in sorted(missing):
            folder = self.folder / str(gone)
            what = f"{CHECKSUMS} is missing" if folder.is_dir() else "is missing"
            what = "is a symbolic link" if folder.is_symlink() else what
            skipped.append(str(CheckpointError(what, where=str(folder))))
            self._set_aside(gone)
        newest = self._newest(skipped)
        lost_before = index["lost"] if index else {}
        if newest is None:
            if not skipped and not lost_before and not any(self.folder.glob("*.damaged*")):
                return None, []
            details = ":\n  " + "\n  ".join(skipped) if skipped else ""
            raise CheckpointError(
                f"every checkpoint is damaged or missing{details}",
                where=str(self.folder),
                hint=", or ".join(filter(None, ["restore the folder from a copy", self._rescue])),
            )
        lost = missing | self._check_older(newest, skipped)
        lost = lost_before | {s: metric for s, metric in lost.items() if s < newest}
        if not self._read_only:
            saved = self._metrics()
            if index != {"saved": saved, "lost": lost}:
                self._write_index(saved=saved, lost=lost)
        return newest, skipped

    def _newest(self, skipped: list[str]) -> int | None:
        """Returns the newest undamaged step; damaged ones are set aside."""
        for candidate in self.steps()[::-1]:
            try:
                self._check(candidate)
                return candidate
            except CheckpointError as e:
                skipped.append(str(e))
                self._set_aside(candidate)
        return None

    def _check(self, step: int) -> None:
        """Raises `CheckpointError` unless a step is unchanged and has the right number."""
        verify(self.folder / str(step))
        self.meta(step)

    def _check_older(self, newest: int, skipped: list[str]) -> dict[int, float | None]:
        """Sets aside damaged older steps that would be read at the end; returns metrics."""
        lost: dict[int, float | None] = {}
        metrics = {}
        for step in self.steps():
            try:
                metrics[step] = self.meta(step).get("metric")
            except CheckpointError as e:
                lost[step] = self._saved().get(step)
                skipped.append(str(e))
        while (best := self._best(metrics)) not in (None, newest):
            try:
                self._check(best)
                break
            except CheckpointError as e:
                lost[best] = metrics.pop(best)
                skipped.append(str(e))
        for step in lost:
            self._set_aside(step)
        return lost

    def _set_aside(self, step: int) -> None:
        """Renames a damaged step, so that it can be saved again without losing its files."""
        folder = self.folder / str(step)
        if folder.is_dir() and not self._read_only:
            taken = len(list(self.folder.glob(f"{step}.damaged*")))
            folder.rename(folder.with_name(f"{step}.damaged{taken or ''}"))

    def _metrics(self) -> dict[int, float | None]:
        return {step: self.meta(step).get("metric") for step in self.steps()}

    def _best(self, metrics: Mapping[int, float | None]) -> int | None:
        scored = [(self._sign * m, -step) for step, m in metrics.items() if m is not None]
        return -max(scored)[1] if scored else None

    def _read_index(self) -> dict[str, dict[int, float | None]] | None:
        """Returns the metrics of the saved steps and of the lost steps."""
        stored: Any = peek(self.folder / INDEX)
        metrics: Shape = {"*": (*NUMBER, type(None))}
        if mismatch(stored, {"saved": metrics, "lost": metrics}):
            return None
        parts: Any = {
            part: {step_number(name): metric for name, metric in stored[part].items()}
            for part in ("saved", "lost")
        }
        return None if any(None in part for part in parts.values()) else parts

    def _saved(self) -> dict[int, float | None]:
        return (self._read_index() or {"saved": {}})["saved"]

    def _write_index(self, **parts: Mapping[int, float | None]) -> None:
        index = (self._read_index() or {"saved": {}, "lost": {}}) | parts
        write_text(self.folder / INDEX, json.dumps(index))


def find_step(path: pathlib.Path, *, where: str = "path", step: int | str = "best") -> pathlib.Path:
    """Returns the step folder for a path to a step, a `checkpoints` folder, or a run.

    Args:
      path: the folder.
      where: the argument or config path that contains the path, for errors.
      step: which of several steps: "best" is the best by the selection metric, or the newest if it
        was not measured; "last" is the newest; a number is that step.

    Raises:
      CheckpointError: there is no such step.
    """
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(
            f"{path} does not exist", where=where, hint=nearest(path.name, siblings)
        )
    if (path / CHECKSUMS).exists():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    saved = Steps(folder, mode=_selection_mode(folder))
    steps = saved.steps()
    if not steps:
        raise CheckpointError(
            f"{path} holds no finished checkpoint",
            where=where,
            hint="give a run folder, or one step of its checkpoints folder",
        )
    if step != "best":
        wanted = steps[-1] if step == "last" else step
        if wanted not in steps:
            available = nearest(str(step), ["best", "last", *map(str, steps)])
            raise CheckpointError(f"{folder} has no step {step}", where=where, hint=available)
        return folder / str(wanted)
    best = saved.best()
    missing = saved.missing()
    if missing:
        raise CheckpointError(
            f"step {missing[0]} is missing or has lost its {CHECKSUMS}, and it was the best",
            where=f"{where}: {folder}",
            hint="restore it from a copy, or name the step to take, such as "
            f"{folder / str(steps[-1] if best is None else best)}",
        )
    return folder / str(steps[-1] if best is None else best)


def _selection_mode(checkpoints: pathlib.Path) -> str:
    """Returns "max" or "min" for the selection metric, from the config in the newest step."""
    config: Any = (newest_meta(checkpoints) or {}).get("config")
    if config is None:  # the metadata of a checkpoint of an early version have none
        try:
            config = read_json(checkpoints.parent / "config.json", shape={"eval": dict})
        except MissingFile:
            return "max"
    chosen = config.get("eval")
    return "min" if isinstance(chosen, Mapping) and chosen.get("mode") == "min" else "max"
