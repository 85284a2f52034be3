"""Networks of other runs: one network of a checkpoint, whatever optimizer trained it."""

import hashlib
import json
import pathlib
from collections.abc import Mapping

from distill_jax.core.api import Params, PyTree, Role, State
from distill_jax.core.errors import CheckpointError, nearest
from distill_jax.trainer.io._orbax import check_structure, reading, stored_shapes
from distill_jax.trainer.io.files import DamagedFile, read_json
from distill_jax.trainer.io.step_folder import CHECKSUMS, ROLE, verify
from distill_jax.trainer.io.step_index import find_step

ANY, COMMON = "*", "**"
"""In place of the name of a layer: all layers of the network, or those that the stored one has."""


def network_checksum(
    path: pathlib.Path, *, role: Role = "student", where: str = "path"
) -> str | None:
    """Returns a checksum of the network that `read_network` would read, None if there is none.

    It is computed from the checksums of the files, which `read_network` compares with the files.

    Args:
      path: a run, a `checkpoints` folder or a step.
      role: which network of that run.
      where: the argument or config path to name in errors.

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
    like: tuple[Params, State] | None = None,
    where: str = "path",
) -> tuple[Params, State]:
    """Reads one network of a checkpoint as host arrays; every file of the step is verified first.

    Args:
      path: a run, a `checkpoints` folder or a step.
      role: which network of that run.
      part: name of the layer whose parameters are read in place of the whole network's,
        `layer/layer` where it is inside another; a network of that layer has no state. "*" reads
        those layers that the network has, and leaves the others of the stored one. "**" reads
        those that both have; others of the network, such as a new last layer, keep the values of
        `like`, which must then be arrays.
      like: `(params, state)` as shapes; None reads what is stored.
      where: the argument or config path to name in errors.

    Raises:
      CheckpointError: the file is absent or damaged, or the network has other shapes.
    """
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from etils import epath

    folder, item = find_step(path, where=where), ROLE + role
    verify(folder)
    wanted = None if like is None else {"params": like[0], "state": like[1]}
    try:
        stored = stored_shapes(folder, item)
        if not {"params", "state"} <= stored.keys():
            raise CheckpointError(f"{item} holds no network", where=str(folder))
        if wanted is not None and part == COMMON:
            wanted = _common(wanted, stored)
            if not wanted["params"]:
                raise CheckpointError(f"no layer of {item} is a layer of this network")
        if wanted is not None:
            check_structure(folder, item, _select(stored, part, wanted), wanted)
    except CheckpointError as e:
        raise CheckpointError(e.what, where=f"{where}: {e.where or folder}", hint=_hint(e)) from e
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)
    tree = tree if wanted is None or part else wanted
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with reading(folder):
        network = ocp.PyTreeCheckpointHandler().restore(
            epath.Path(folder / item),
            args=ocp.args.PyTreeRestore(tree, restore_args=restore_args),
        )
    network = _select(network, part, wanted)
    if part == COMMON and like is not None:
        network = {"params": {**like[0], **network["params"]}, "state": like[1] | network["state"]}
    return network["params"], network["state"]


def _hint(error: CheckpointError) -> str:
    """Returns a hint for the case that the requested network differs from the stored one."""
    if "has no" in error.what:
        return error.hint
    if "/positions: (" in error.what:
        size = "give the size on which it was trained"
        return f"learned positions fit one image size: {size}"
    return "give the model and the kwargs that it was trained with"


def _select(network: PyTree, part: str, like: PyTree) -> PyTree:
    """Returns the part of a network `{"params", "state"}` that is read, see `read_network`."""
    if part in (ANY, COMMON):
        return _common(network, like)
    return {"params": _layer(network["params"], part), "state": {}} if part else network


def _layer(params: PyTree, part: str) -> PyTree:
    """Returns the parameters of one layer, by its path in those of a network."""
    for name in part.split("/"):
        if not isinstance(params, Mapping) or name not in params:
            names = params if isinstance(params, Mapping) else ()
            raise CheckpointError(f"has no layer {part!r}", hint=nearest(name, names))
        params = params[name]
    return params


def _common(tree: PyTree, like: PyTree) -> PyTree:
    """Returns the part of `tree` that both trees have."""
    if not isinstance(tree, Mapping) or not isinstance(like, Mapping):
        return tree
    return {name: _common(value, like[name]) for name, value in tree.items() if name in like}
