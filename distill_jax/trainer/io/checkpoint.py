"""Training states: Orbax behind save and restore, on any mesh and any number of processes.

One folder a step, see `step_folder`. Orbax writes to a temporary folder and renames it; afterwards
the folder is sealed with checksums and entered into the index of steps.
"""

import contextlib
import math
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.core.api import PyTree, TrainState
from distill_jax.core.errors import CheckpointError
from distill_jax.trainer.io import peers
from distill_jax.trainer.io._orbax import (
    check_structure,
    reading,
    root_cause,
    silence_failures,
    stored_shapes,
)
from distill_jax.trainer.io.paths import check_folder
from distill_jax.trainer.io.step_folder import CHECKSUMS, ROLE
from distill_jax.trainer.io.step_index import Steps

FORMER_ROLES = {"weighting": "weigher"}
"""Names of roles in checkpoints of version 0.1."""

UNSAVED = "is the disk full, or the folder not writable? earlier steps are untouched"


class Restored(NamedTuple):
    """A state and its metadata; `skipped` names damaged newer steps."""

    state: TrainState
    meta: Mapping[str, Any]
    skipped: tuple[str, ...]


def _items(state: TrainState) -> dict[str, PyTree]:
    """Splits a state into the items of a checkpoint; empty trees are omitted."""
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


def _rename_roles(items: Mapping[str, PyTree], names: Mapping[str, str]) -> dict[str, PyTree]:
    """Returns the items of a checkpoint with roles renamed, also in the optimizer's tree."""

    def rename(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda node: (
                {names.get(key, key): rename(value) for key, value in node.items()}
                if isinstance(node, dict)
                else node
            ),
            tree,
            is_leaf=lambda node: isinstance(node, dict),
        )

    renamed = {ROLE + old: ROLE + new for old, new in names.items()}
    return {
        renamed.get(name, name): rename(tree) if name == "optimizer" else tree
        for name, tree in items.items()
    }


@jax.jit
def _copy_state(state: TrainState) -> TrainState:
    """Returns a state in buffers of its own; one program for all runs of a study."""
    return jax.tree.map(jnp.copy, state)


class Checkpointer(Steps):
    """Saves and restores the steps of one `checkpoints` folder, which the first save creates.

    Args:
      See `Steps`.
    """

    _orbax: Any = None
    _finish: threading.Thread | None = None
    _error: BaseException | None = None

    def _checkpointer(self):
        if self._orbax is None:
            import orbax.checkpoint as ocp

            silence_failures()
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        return self._orbax

    def save(self, state: TrainState, meta: Mapping[str, Any], *, metric: float | None) -> None:
        """Starts to save a state; returns once the state may be donated again.

        Args:
          state: the training state.
          meta: JSON-like metadata, see `step_folder.META_PARTS`.
          metric: the selection metric at this step, or None if it was not measured. NaN cannot be
            compared and is stored as None.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if metric is not None and math.isnan(metric):
            metric = None
        step = int(state.step)
        folder = self.folder / str(step)

        def is_there() -> bool:
            # Orbax's threads wait minutes for a folder that cannot be made.
            check_folder(self.folder, where=str(self.folder), hint=UNSAVED)
            return (folder / CHECKSUMS).exists()

        if peers.from_first(is_there, where=str(folder)):
            return
        if jax.process_index() == 0:
            self.make_room(step)
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
            if peers.is_loss_of_peer(e):
                raise
            raise self._not_saved(e) from e
        self._finish = threading.Thread(target=self._seal, args=(step, metric), name="checkpoint")
        self._finish.start()

    def _seal(self, step: int, metric: float | None) -> None:
        try:
            self._checkpointer().wait_until_finished()
            if jax.process_index() == 0:
                self.add(step, metric)
        except BaseException as e:
            self._error = e

    def _not_saved(self, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"could not be saved: {root_cause(error)}",
            where=str(self.folder),
            hint=UNSAVED,
        )

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
          CheckpointError: the save failed; earlier steps are unchanged.
        """
        if self._finish is not None:
            self._finish.join()
            self._finish = None
            # The first process seals: the others must not look for the best step before.
            peers.barrier("checkpoint")
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, CheckpointError) or peers.is_loss_of_peer(error):
                raise error
            raise self._not_saved(error) from error

    def close(self, *, failed: bool = False) -> None:
        """Waits for the save in progress and releases threads; raises as `wait` does.

        Args:
          failed: whether an error ends the run. The error may have occurred only in this process,
            so that it does not wait for the others.
        """
        if failed and peers.count() > 1:
            return
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                with contextlib.suppress(Exception):  # reported by `wait`
                    self._orbax.close()
                self._orbax = None

    def restore(self, like: TrainState, *, step: int | None = None) -> Restored | None:
        """Restores the newest undamaged step, or the requested one.

        Damaged newer steps are set aside, and so is the best one if it is damaged, see `lost`. With
        several processes, the first one chooses the step.

        Args:
          like: the state as `jax.ShapeDtypeStruct`s with the shardings to restore onto. Their mesh
            may differ from the mesh on which the state was saved.
          step: the step to restore; defaults to the newest undamaged one.

        Returns:
          The restored state, or None if the folder has no finished step.

        Raises:
          CheckpointError: every step, or the requested one, is damaged or missing, or the structure
            differs from `like`.
        """
        import orbax.checkpoint as ocp

        newest, skipped = peers.from_first(lambda: self.find(step), where=str(self.folder))
        if newest is None:
            return None
        folder = self.folder / str(newest)
        args: dict[str, Any] = {}
        former = {new: old for new, old in FORMER_ROLES.items() if (folder / (ROLE + old)).is_dir()}
        for name, tree in _rename_roles(_items(like), former).items():
            shardings = jax.tree.map(
                lambda x: ocp.ArrayRestoreArgs(
                    sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
                ),
                tree,
            )
            args[name] = ocp.args.PyTreeRestore(tree, restore_args=shardings)
            check_structure(folder, name, stored_shapes(folder, name), tree)
        with reading(folder):
            items = self._checkpointer().restore(folder, args=ocp.args.Composite(**args))
        items = _rename_roles(items, {old: new for new, old in former.items()})
        state, meta = _join(items, like), self.meta(newest)
        if int(state.step) != meta["step"]:
            raise CheckpointError(f"holds the state of step {int(state.step)}", where=str(folder))
        return Restored(state, meta, tuple(skipped))
