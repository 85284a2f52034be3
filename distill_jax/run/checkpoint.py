"""Checkpoints: Orbax behind save, restore and read, with a digest that catches flipped bytes.

One folder a step. Networks are separate items (`role.<name>`), so that a teacher or a backbone is
read without knowing the optimizer that trained it. Orbax writes to a temporary folder and renames
it; afterwards every file is hashed into `digest.json`, since Orbax loads flipped bytes without a
word. A folder without a digest does not count: it was interrupted, or has lost its digest where
`index.json` lists it among the steps that were saved to their end.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.core.api import Params, PyTree, Role, State, TrainState
from distill_jax.core.errors import CheckpointError, nearest, text_of
from distill_jax.core.partition import named_leaves
from distill_jax.run import processes, workdir
from distill_jax.run.workdir import CHECKSUMS, INDEX, META, read_meta
from distill_jax.stored import DamagedFile, MissingFile, check_folder, read_json

_REASONS = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_REASONS += (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)

ROLE = "role."
UNSAVED = "is the disk full, or the folder not writable? steps saved before are untouched"


class Restored(NamedTuple):
    """A state and what was stored beside it; `skipped` names damaged newer steps."""

    state: TrainState
    meta: Mapping[str, Any]
    skipped: tuple[str, ...]


def _hash_files(folder: pathlib.Path) -> dict[str, str]:
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS:
            with path.open("rb") as f:
                digest = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16))
            checksums[str(path.relative_to(folder))] = digest.hexdigest()
    return checksums


def seal(folder: pathlib.Path) -> None:
    """Writes the digest of every file of a finished folder, for `verify`."""
    temporary = folder / (CHECKSUMS + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.write_text(json.dumps(_hash_files(folder), indent=1))
    temporary.rename(folder / CHECKSUMS)


def verify(folder: pathlib.Path) -> None:
    """Raises `CheckpointError` unless every file of a step is as it was written, and inside it."""
    _check_layout(folder)
    try:
        stored = read_json(folder / CHECKSUMS)
    except MissingFile as e:
        raise CheckpointError("was not written to its end", where=str(folder)) from e
    except DamagedFile as e:
        raise CheckpointError(f"{CHECKSUMS} is damaged: {e.what}", where=str(folder)) from e
    found = _hash_files(folder)
    bad = sorted(
        name for name in stored.keys() | found.keys() if stored.get(name) != found.get(name)
    )
    if bad:
        raise CheckpointError(
            f"{len(bad)} of {len(stored)} files differ from what was written: {bad[0]}",
            where=str(folder),
        )


def _check_layout(folder: pathlib.Path) -> None:
    """Raises `CheckpointError` where arrays would be read from outside of a step.

    Symbolic links may lead out of it. So may the names of arrays, which are stored, where each
    array is a folder of that name. In an OCDBT database, which `save` writes, they are keys, and
    TensorStore refuses references with ".." or an absolute path.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"{path.relative_to(folder)} is a symbolic link that leads out of the step",
                where=str(folder),
                hint="put a copy of the file in place of the link",
            )
    for path in sorted(folder.glob("*/_METADATA")):
        try:
            found = read_json(path, shape={"use_ocdbt": bool})["use_ocdbt"]
        except DamagedFile as e:
            raise CheckpointError(f"cannot be read: {e}", where=str(folder)) from e
        if not found:
            raise CheckpointError(
                f"{path.relative_to(folder)}: arrays are not stored as this program stores them",
                where=str(folder),
            )


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
    """Turns what Orbax raises of a step that it cannot read into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:
        if processes.is_loss_of_peer(e):
            raise
        raise CheckpointError(f"could not be read: {_root_cause(e)}", where=str(folder)) from e


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the config of the run that wrote a step, with the groups `roles` and `data`.

    Raises:
      CheckpointError: it is not as it was written, or of another shape.
    """
    config = read_meta(folder).get("config")
    for name in ("roles", "data"):
        if not isinstance(config, dict) or not isinstance(config.get(name), dict):
            raise CheckpointError(f"{META} holds no config with {name!r}", where=str(folder))
    return config


def _items(state: TrainState) -> dict[str, PyTree]:
    """Splits a state into the items of a checkpoint; empty trees are left out."""
    networks = {**state.params, **state.targets}
    items: dict[str, PyTree] = {
        ROLE + role: {"params": params, "state": state.model_state.get(role, {})}
        for role, params in networks.items()
    }
    items["optimizer"] = {"step": state.step, "opt_state": state.opt_state}
    items["memory"] = state.memory
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _join(items: Mapping[str, PyTree], like: TrainState) -> TrainState:
    def networks(roles):
        return {role: items[ROLE + role]["params"] for role in roles}

    return TrainState(
        step=items["optimizer"]["step"],
        params=networks(like.params),
        targets=networks(like.targets),
        model_state={role: items[ROLE + role]["state"] for role in like.model_state},
        opt_state=items["optimizer"]["opt_state"],
        memory=items.get("memory", like.memory),
    )


@jax.jit
def _copy_state(state: TrainState) -> TrainState:
    """Returns a state in buffers of its own; one program for all runs of a study."""
    return jax.tree.map(jnp.copy, state)


class Checkpointer:
    """Saves and restores the steps of one run folder.

    Args:
      folder: the `checkpoints` folder; created on the first save.
      keep: how many of the newest steps to keep; the best one is kept besides.
      mode: "max" or "min", which end of the selection metric is best.
      read_only: whether damaged steps are passed over and stay where they are.
    """

    def __init__(
        self, folder: pathlib.Path, *, keep: int = 2, mode: str = "max", read_only: bool = False
    ):
        self._folder, self._read_only = folder.absolute(), read_only
        self._keep, self._sign = max(keep, 1), 1.0 if mode == "max" else -1.0
        self._orbax: Any = None
        self._finish: threading.Thread | None = None
        self._error: BaseException | None = None

    def steps(self) -> list[int]:
        """Returns the finished steps, oldest first."""
        return workdir.finished_steps(self._folder)

    def _read_index(self) -> dict[str, dict[int, float | None]] | None:
        """Returns the metrics of the steps that were saved and of those that were lost."""
        found = workdir.peek(self._folder / INDEX)
        parts = {part: workdir.read_metrics(found, part) for part in ("saved", "lost")}
        return None if None in parts.values() else parts  # type: ignore[return-value]

    def _write_index(self, **parts: Mapping[int, float | None]) -> None:
        index = (self._read_index() or {"saved": {}, "lost": {}}) | parts
        workdir.write_text(self._folder / INDEX, json.dumps(index))

    def _checkpointer(self):
        if self._orbax is None:
            import orbax.checkpoint as ocp

            _silence_failures()
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        return self._orbax

    def save(self, state: TrainState, meta: Mapping[str, Any], *, metric: float | None) -> None:
        """Starts to save a state; returns once the state may be donated again.

        Args:
          state: the training state.
          meta: JSON-like facts stored beside it.
          metric: the selection metric at this step, or None where it was not measured. NaN, which
            compares with nothing, is stored as None.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if metric is not None and math.isnan(metric):
            metric = None
        step = int(state.step)
        folder = self._folder / str(step)

        def is_there() -> bool:
            # Orbax's threads wait minutes for a folder that cannot be made.
            check_folder(self._folder, where=str(self._folder), hint=UNSAVED)
            return (folder / CHECKSUMS).exists()

        if processes.from_first(is_there, where=str(folder)):
            return
        if jax.process_index() == 0:
            self._make_room(folder)
        if jax.default_backend() == "cpu":
            # On CPU, Orbax's host copy aliases the buffer that the next step is given to reuse.
            state = jax.block_until_ready(_copy_state(state))
        args: dict[str, Any] = {
            name: ocp.args.PyTreeSave(tree) for name, tree in _items(state).items()
        }
        meta = {**meta, "step": step, "metric": metric}
        args["meta"] = ocp.args.JsonSave(meta)
        try:
            self._checkpointer().save(folder, args=ocp.args.Composite(**args))
        except (OSError, ValueError) as e:
            if processes.is_loss_of_peer(e):
                raise
            raise self._not_saved(e) from e
        done = (folder, step, metric)
        self._finish = threading.Thread(target=self._seal, args=done, name="checkpoint")
        self._finish.start()

    def _make_room(self, folder: pathlib.Path) -> None:
        """Deletes what an interrupted save has left in the place of a step."""
        if self._read_index() is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write_index(saved=self._metrics())
        workdir.remove_step(folder)
        if folder.exists():
            raise CheckpointError("was not written by this program", where=str(folder))

    def _seal(self, folder: pathlib.Path, step: int, metric: float | None) -> None:
        try:
            self._checkpointer().wait_until_finished()
            if jax.process_index() == 0:
                seal(folder)
                saved = (self._read_index() or {}).get("saved", {})
                self._write_index(saved={**saved, step: metric})
                self._prune()
        except BaseException as e:
            self._error = e

    def _prune(self) -> None:
        """Deletes old steps, and what interrupted saves have left."""
        steps, best = self.steps(), self.best()
        old = {step for step in steps[: -self._keep] if step != best}
        saved = (self._read_index() or {}).get("saved", {})
        kept = {step: metric for step, metric in saved.items() if step not in old}
        if kept != saved:  # before they go: without it they would be looked for
            self._write_index(saved=kept)
        for step in old:
            workdir.remove_step(self._folder / str(step))
        for path in self._folder.iterdir():
            name, temporary, _ = path.name.partition(".orbax-checkpoint-tmp")
            step = workdir.step_number(name)
            if step is None or not (temporary or path.is_dir()):
                continue
            lost = not temporary and (step in steps or step in kept)
            if not lost and workdir.is_step(path):
                workdir.remove_step(path)

    def _not_saved(self, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"could not be saved: {_root_cause(error)}",
            where=str(self._folder),
            hint=UNSAVED,
        )

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          CheckpointError: it failed; the steps saved before it are untouched.
        """
        if self._finish is not None:
            self._finish.join()
            self._finish = None
            # The first process seals: the others must not look for the best step before.
            processes.barrier("checkpoint")
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, CheckpointError) or processes.is_loss_of_peer(error):
                raise error
            raise self._not_saved(error) from error

    def close(self, *, failed: bool = False) -> None:
        """Waits for the save under way and lets go of threads; raises as `wait` does.

        Args:
          failed: an error ends the run. Of several processes it may be this one's alone, and the
            others are not waited for.
        """
        if failed and processes.count() > 1:
            return
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                with contextlib.suppress(Exception):  # told by `wait`
                    self._orbax.close()
                self._orbax = None

    def meta(self, step: int) -> Mapping[str, Any]:
        """Returns what was stored beside the state of a step, see `read_meta`."""
        return read_meta(self._folder / str(step))

    def best(self) -> int | None:
        """Returns the step with the best selection metric, the earliest among equals.

        Raises:
          CheckpointError: the metric of a step cannot be read.
        """
        return self._best(self._metrics())

    def _metrics(self) -> dict[int, float | None]:
        return {step: self.meta(step).get("metric") for step in self.steps()}

    def _best(self, metrics: Mapping[int, float | None]) -> int | None:
        scored = [(self._sign * m, -step) for step, m in metrics.items() if m is not None]
        return -max(scored)[1] if scored else None

    def missing(self) -> list[int]:
        """Returns the steps that were saved, are not there, and were better than those there."""
        index, steps, metrics = self._read_index(), self.steps(), self._metrics()
        gone = {s: m for s, m in (index or {}).get("saved", {}).items() if s not in steps}
        best = self._best(metrics | gone)
        return [best] if best in gone else []

    def lost(self, metric: float | None) -> list[dict[str, Any]]:
        """Returns the steps that were lost and may have been better than the best that is left.

        Args:
          metric: of the best step that is left, None where there is none.

        Returns:
          `[{"step", "metric"}]`, oldest first; a metric of None is not known.
        """
        index = self._read_index() or {"saved": {}, "lost": {}}
        found = {s: value for s, value in index["saved"].items() if s not in self.steps()}
        found |= index["lost"]
        better = {
            step: value
            for step, value in found.items()
            if value is None or metric is None or self._sign * value >= self._sign * metric
        }
        return [{"step": step, "metric": better[step]} for step in sorted(better)]

    def _set_aside(self, folder: pathlib.Path) -> None:
        """Renames a damaged step, so that the step can be saved again and nothing is lost."""
        if folder.is_dir() and not self._read_only:
            taken = len(list(self._folder.glob(f"{folder.name}.damaged*")))
            folder.rename(folder.with_name(f"{folder.name}.damaged{taken or ''}"))

    def _find(self, step: int | None) -> tuple[int | None, list[str]]:
        """Returns the step to restore, None where there is none, and what was set aside."""
        if step is not None:
            self._check(step)
            return step, []
        index, skipped = self._read_index(), []
        known = dict(index["saved"]) if index else dict.fromkeys(self._unsealed())
        missing = {s: metric for s, metric in known.items() if s not in self.steps()}
        for gone in sorted(missing):
            folder = self._folder / str(gone)
            what = f"{CHECKSUMS} is missing" if folder.is_dir() else "is missing"
            what = "is a symbolic link" if folder.is_symlink() else what
            skipped.append(str(CheckpointError(what, where=str(folder))))
            self._set_aside(folder)
        candidate = self._newest(skipped)
        lost_before = index["lost"] if index else {}
        if candidate is None:
            if not skipped and not lost_before and not any(self._folder.glob("*.damaged*")):
                return None, []
            reported = ":\n  " + "\n  ".join(skipped) if skipped else ""
            raise CheckpointError(
                f"every checkpoint is damaged or missing{reported}",
                where=str(self._folder),
                hint=f"restore the folder from a copy, or start over: {workdir.START_OVER}",
            )
        lost = missing | self._check_older(candidate, skipped)
        lost = lost_before | {s: metric for s, metric in lost.items() if s < candidate}
        if not self._read_only:
            saved = self._metrics()
            if index != {"saved": saved, "lost": lost}:
                self._write_index(saved=saved, lost=lost)
        return candidate, skipped

    def _unsealed(self) -> list[int]:
        """Returns the steps without a digest that look finished, for a run without an index."""
        return sorted(set(workdir.whole_steps(self._folder)) - set(self.steps()))

    def _newest(self, skipped: list[str]) -> int | None:
        """Returns the newest undamaged step; damaged ones are set aside."""
        for candidate in self.steps()[::-1]:
            try:
                self._check(candidate)
                return candidate
            except CheckpointError as e:
                skipped.append(str(e))
                self._set_aside(self._folder / str(candidate))
        return None

    def _check(self, step: int) -> None:
        """Raises `CheckpointError` unless a step is as it was written, and is that step."""
        verify(self._folder / str(step))
        self.meta(step)

    def _check_older(self, newest: int, skipped: list[str]) -> dict[int, float | None]:
        """Sets older steps aside that are damaged and would be read at the end; returns metrics."""
        lost: dict[int, float | None] = {}
        metrics = {}
        for step in self.steps():
            try:
                metrics[step] = self.meta(step).get("metric")
            except CheckpointError as e:
                lost[step] = ((self._read_index() or {}).get("saved") or {}).get(step)
                skipped.append(str(e))
        while (best := self._best(metrics)) not in (None, newest):
            try:
                self._check(best)
                break
            except CheckpointError as e:
                lost[best] = metrics.pop(best)
                skipped.append(str(e))
        for step in lost:
            self._set_aside(self._folder / str(step))
        return lost

    def restore(self, like: TrainState, *, step: int | None = None) -> Restored | None:
        """Restores the newest undamaged step, or the one asked for.

        Damaged newer steps are set aside, and so is the best one, see `lost`. Of several processes
        the first one decides.

        Args:
          like: the state as `jax.ShapeDtypeStruct`s with the shardings to restore onto, which
            may be those of another mesh than the state was saved from.
          step: the step to restore; by default the newest that is whole.

        Returns:
          None where the folder holds no finished step.

        Raises:
          CheckpointError: every step is damaged or missing, or the one that is asked for, or the
            structure differs from `like`.
        """
        import orbax.checkpoint as ocp

        found, skipped = processes.from_first(lambda: self._find(step), where=str(self._folder))
        if found is None:
            return None
        folder = self._folder / str(found)
        args: dict[str, Any] = {}
        for name, tree in _items(like).items():
            shardings = jax.tree.map(
                lambda x: ocp.ArrayRestoreArgs(
                    sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
                ),
                tree,
            )
            args[name] = ocp.args.PyTreeRestore(tree, restore_args=shardings)
            _check_structure(folder, name, tree)
        with _reading(folder):
            items = self._checkpointer().restore(folder, args=ocp.args.Composite(**args))
        state, meta = _join(items, like), self.meta(found)
        if int(state.step) != meta["step"]:
            raise CheckpointError(f"holds the state of step {int(state.step)}", where=str(folder))
        return Restored(state, meta, tuple(skipped))


ANY = "*"
"""In place of the name of a layer: all that the network has of those that are stored."""


@functools.cache
def _silence_failures() -> None:
    """Keeps what Orbax prints of a failed save off the console: it raises it too.

    It logs tracebacks, leaves the errors of further writes unread, which asyncio then logs, and
    writes that end after the first has failed find its event loop closed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _root_cause(e: BaseException) -> str:
    while e.__cause__ or e.__context__:
        e = e.__cause__ or e.__context__  # type: ignore[assignment]
    text = text_of(e, most=300) or type(e).__name__
    whole = text_of(e, most=10**5, lines=None)
    # TensorStore names the reason of the operating system last, after paths of any length.
    reasons = (os.strerror(number) for number in _REASONS)
    reason = next((r for r in reasons if r.lower() in whole.lower()), "")
    return text if reason.lower() in text.lower() else f"{reason}: {text}"


def _stored_shapes(folder: pathlib.Path, item: str) -> PyTree:
    import orbax.checkpoint as ocp
    from etils import epath

    if not (folder / item).is_dir():
        raise CheckpointError(
            f"has no item {item!r}",
            where=str(folder),
            hint=nearest(item, (p.name for p in folder.iterdir() if p.is_dir())),
        )
    handler = ocp.PyTreeCheckpointHandler()
    with _reading(folder):
        metadata = handler.metadata(epath.Path(folder / item))
        tree = getattr(metadata, "tree", metadata)
        for name, leaf in named_leaves(tree).items():
            if getattr(leaf, "shape", None) is None:
                raise CheckpointError(f"{item}: {name} is no array", where=str(folder))
    return tree


def _layer(params: PyTree, part: str) -> PyTree:
    """Returns the parameters of one layer, by its path in those of a network."""
    for name in part.split("/"):
        if not isinstance(params, Mapping) or name not in params:
            names = params if isinstance(params, Mapping) else ()
            raise CheckpointError(f"has no layer {part!r}", hint=nearest(name, names))
        params = params[name]
    return params


def _common(tree: PyTree, like: PyTree) -> PyTree:
    """Returns what both trees have of `tree`."""
    if not isinstance(tree, Mapping) or not isinstance(like, Mapping):
        return tree
    return {name: _common(value, like[name]) for name, value in tree.items() if name in like}


def _check_structure(folder: pathlib.Path, item: str, like: PyTree, *, part: str = "") -> None:
    """Raises `CheckpointError` that lists how the stored leaves differ from those wanted."""
    tree = _stored_shapes(folder, item)
    if part == ANY:
        tree = _common(tree, like)
    elif part:
        tree = {"params": _layer(tree["params"], part), "state": {}}
    stored = {name: tuple(x.shape) for name, x in named_leaves(tree).items()}
    wanted = {name: tuple(x.shape) for name, x in named_leaves(like).items()}
    lines = [f"{name}: absent from the checkpoint" for name in wanted.keys() - stored.keys()]
    lines += [f"{name}: not in this run" for name in stored.keys() - wanted.keys()]
    lines += [
        f"{name}: {stored[name]} in the checkpoint, {wanted[name]} in this run"
        for name in wanted.keys() & stored.keys()
        if stored[name] != wanted[name]
    ]
    if lines:
        lines = sorted(lines)
        more = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
        raise CheckpointError(
            f"{item} has another structure than this run:\n    " + "\n    ".join(lines[:5] + more),
            where=str(folder),
            hint="give the config of the run that wrote it, or another workdir",
        )


def find_step(path: pathlib.Path, *, where: str, step: int | str = "best") -> pathlib.Path:
    """Returns the step folder that a path means: a step, a `checkpoints` folder, or a run.

    Args:
      path: the folder.
      where: what the path is from, for errors.
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
    checkpointer = Checkpointer(folder, mode=_selection_mode(folder))
    steps = checkpointer.steps()
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
    best = checkpointer.best()
    missing = checkpointer.missing()
    if missing:
        raise CheckpointError(
            f"step {missing[0]} is missing or has lost its {CHECKSUMS}, and it was the best",
            where=f"{where}: {folder}",
            hint="restore it from a copy, or name the step to take, such as "
            f"{folder / str(steps[-1] if best is None else best)}",
        )
    return folder / str(steps[-1] if best is None else best)


def intact(folder: pathlib.Path, *, study: bool = False) -> str:
    """Returns what a run or study that ended early left whole, a clause; reads every byte of it."""

    def finished(run: pathlib.Path) -> bool:
        return workdir.read_result(run, log_line=lambda _: None) is not None

    if study:
        n = sum(finished(run) for run in folder.glob("*/seed*"))
        runs = "1 run is" if n == 1 else f"{n} runs are"
        return f"{runs} finished; the same command keeps these and goes on with the others"
    if finished(folder):
        return "training is finished and its result is in result.json"
    for step in Checkpointer(folder / "checkpoints").steps()[::-1]:
        try:
            verify(folder / "checkpoints" / str(step))
            read_meta(folder / "checkpoints" / str(step))
        except (CheckpointError, OSError):
            continue
        return f"the checkpoint of step {step} is whole; the same command goes on from it"
    return "there is no whole checkpoint; the same command starts from the beginning"


def _selection_mode(checkpoints: pathlib.Path) -> str:
    """Returns which end of the selection metric is best, by the config in the newest step."""
    config: Any = (workdir.newest_meta(checkpoints) or {}).get("config")
    if config is None:  # the metadata of a checkpoint of an early version have none
        try:
            config = read_json(checkpoints.parent / "config.json", shape={"eval": dict})
        except MissingFile:
            return "max"
    chosen = config.get("eval")
    return "min" if isinstance(chosen, Mapping) and chosen.get("mode") == "min" else "max"


def network_checksum(path: pathlib.Path, *, role: Role = "student", where: str) -> str | None:
    """Returns a checksum of the network that `read_network` would read, None where nothing is.

    It is computed from the digests of the files, which `read_network` compares with the files.

    Args:
      path: a run, a `checkpoints` folder or a step.
      role: which network of that run.
      where: config path to name in errors.

    Raises:
      CheckpointError: it holds no finished checkpoint, or its digest is damaged.
    """
    if not path.exists():
        return None
    folder = find_step(path, where=where)
    try:
        checksums = read_json(folder / CHECKSUMS)
    except DamagedFile as e:
        raise CheckpointError(
            f"{CHECKSUMS} is damaged: {e.what}", where=f"{where}: {folder}"
        ) from e
    own = sorted((n, d) for n, d in checksums.items() if n.startswith(f"{ROLE}{role}/"))
    return hashlib.blake2b(json.dumps(own).encode(), digest_size=16).hexdigest()


def read_network(
    path: pathlib.Path,
    *,
    role: Role = "student",
    part: str = "",
    like: tuple[Params, State] | None,
    where: str,
) -> tuple[Params, State]:
    """Reads one network of a checkpoint as host arrays, whatever optimizer trained it.

    Args:
      path: a run, a `checkpoints` folder or a step.
      role: which network of that run.
      part: name of the layer whose parameters are read in place of the whole network's,
        `layer/layer` where it is inside another; a network of that layer has no state. "*" reads
        those layers that the network has, and leaves the others of the stored one.
      like: `(params, state)` as shapes; None reads what is stored.
      where: config path to name in errors.

    Raises:
      CheckpointError: the file is absent or damaged, or the network has other shapes.
    """
    import numpy as np
    import orbax.checkpoint as ocp
    from etils import epath

    folder = find_step(path, where=where)
    verify(folder)
    wanted = None if like is None else {"params": like[0], "state": like[1]}
    if wanted is not None:
        try:
            _check_structure(folder, ROLE + role, wanted, part=part)
        except CheckpointError as e:
            hint = "give the model and the kwargs that it was trained with"
            if "/positions: (" in e.what:
                size = "give that on which it was trained"
                hint = f"learned positions are of one size of image: {size}"
            elif "has no layer" in e.what:
                hint = e.hint
            place = e.where or str(folder)
            raise CheckpointError(e.what, where=f"{where}: {place}", hint=hint) from e
    if wanted is None or part:
        stored = _stored_shapes(folder, ROLE + role)
        tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)
    else:
        tree = wanted
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    handler = ocp.PyTreeCheckpointHandler()
    with _reading(folder):
        item = handler.restore(
            epath.Path(folder / (ROLE + role)),
            args=ocp.args.PyTreeRestore(tree, restore_args=restore_args),
        )
        if not {"params", "state"} <= item.keys():
            raise CheckpointError(f"{ROLE}{role} holds no network", where=str(folder))
    if part == ANY:
        item = _common(item, wanted)
    elif part:
        return _layer(item["params"], part), {}
    return item["params"], item["state"]
