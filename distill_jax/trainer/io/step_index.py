"""The saved steps of a run: which are whole, which is best, and which were lost.

`index.json` lists every step that was saved and its metric, so that one that is gone is missed.
Needs no JAX.
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
    """Returns the steps that were saved to their end, oldest first."""
    try:
        folders = [p for p in checkpoints.iterdir() if not p.is_symlink()]
        names = [p.name for p in folders if (p / CHECKSUMS).exists()]
    except OSError:
        return []
    return sorted(step for step in map(step_number, names) if step is not None)


def whole_steps(checkpoints: pathlib.Path) -> list[int]:
    """Returns the steps that look as if they were saved to their end, with or without a digest."""
    named = {p: step_number(p.name) for p in checkpoints.glob("*") if (p / META).is_file()}
    return sorted(step for p, step in named.items() if step is not None and is_step(p))


def has_steps(checkpoints: pathlib.Path) -> bool:
    """Whether any state was ever saved to its end, though it may have been damaged since."""
    if finished_steps(checkpoints) or any(checkpoints.glob("*.damaged*")):
        return True
    index = peek(checkpoints / INDEX)
    if isinstance(index, dict):
        return any(index.get(part) for part in ("saved", "lost"))
    return bool(whole_steps(checkpoints))


def newest_meta(checkpoints: pathlib.Path) -> Mapping[str, Any] | None:
    """Returns what was stored beside the newest state of a run that can be read, if any."""
    for step in reversed(finished_steps(checkpoints)):
        with contextlib.suppress(CheckpointError):
            return read_meta(checkpoints / str(step))
    return None


class Steps:
    """The steps in one `checkpoints` folder.

    Args:
      folder: may be absent.
      keep: how many of the newest steps to keep; the best one is kept besides.
      mode: "max" or "min", which end of the selection metric is best.
      read_only: whether damaged steps are passed over and stay where they are.
      rescue: what else can be done where every step is damaged, for the error.
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
        """Returns what was stored beside the state of a step, see `read_meta`."""
        return read_meta(self.folder / str(step))

    def best(self) -> int | None:
        """Returns the step with the best selection metric, the earliest among equals.

        Raises:
          CheckpointError: the metric of a step cannot be read.
        """
        return self._best(self._metrics())

    def missing(self) -> list[int]:
        """Returns the steps that were saved, are not there, and were better than those there."""
        steps, metrics = self.steps(), self._metrics()
        gone = {s: m for s, m in self._saved().items() if s not in steps}
        best = self._best(metrics | gone)
        return [best] if best in gone else []

    def lost(self, metric: float | None) -> list[dict[str, Any]]:
        """Returns the steps that were lost and may have been better than the best that is left.

        Args:
          metric: of the best step that is left, None where there is none.

        Returns:
          `[{"step", "metric"}]`, oldest first; a metric of None is not known.
        """
        index, steps = self._read_index() or {"saved": {}, "lost": {}}, self.steps()
        gone = {s: m for s, m in index["saved"].items() if s not in steps} | index["lost"]
        return [
            {"step": step, "metric": value}
            for step, value in sorted(gone.items())
            if value is None or metric is None or self._sign * value >= self._sign * metric
        ]

    def make_room(self, step: int) -> None:
        """Deletes what an interrupted save has left in the place of a step."""
        if self._read_index() is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_index(saved=self._metrics())
        folder = self.folder / str(step)
        remove_step(folder)
        if folder.exists():
            raise CheckpointError("was not written by this program", where=str(folder))

    def add(self, step: int, metric: float | None) -> None:
        """Seals a step that was written; deletes old ones and what interrupted saves have left."""
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
        """Returns the step to restore, None where there is none, and what was set aside.

        Args:
          step: the one asked for; by default the newest that is whole. Damaged newer steps are
            set aside then, and so is the best one.

        Raises:
          CheckpointError: every step is damaged or missing, or the one asked for is.
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
        """Raises `CheckpointError` unless a step is as it was written, and is that step."""
        verify(self.folder / str(step))
        self.meta(step)

    def _check_older(self, newest: int, skipped: list[str]) -> dict[int, float | None]:
        """Sets older steps aside that are damaged and would be read at the end; returns metrics."""
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
        """Renames a damaged step, so that the step can be saved again and nothing is lost."""
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
        """Returns the metrics of the steps that were saved and of those that were lost."""
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
    """Returns the step folder that a path means: a step, a `checkpoints` folder, or a run.

    Args:
      path: the folder.
      where: the argument or config path that it is from, for errors.
      step: of several steps "best" is the best by the selection metric, or the newest where none
        was measured; "last" is the newest; a number is that step.

    Raises:
      CheckpointError: there is none.
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
    """Returns which end of the selection metric is best, by the config in the newest step."""
    config: Any = (newest_meta(checkpoints) or {}).get("config")
    if config is None:  # the metadata of a checkpoint of an early version have none
        try:
            config = read_json(checkpoints.parent / "config.json", shape={"eval": dict})
        except MissingFile:
            return "max"
    chosen = config.get("eval")
    return "min" if isinstance(chosen, Mapping) and chosen.get("mode") == "min" else "max"
