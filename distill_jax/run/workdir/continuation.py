"""What must be as it was for a run to go on: its config, its data and its networks."""

import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from distill_jax.core.errors import ConfigError, NonFiniteError
from distill_jax.run import config as config_lib
from distill_jax.run import paths
from distill_jax.run.config import ConfigDict
from distill_jax.run.workdir import changes
from distill_jax.run.workdir.ownership import is_run
from distill_jax.trainer.io.files import read_text
from distill_jax.trainer.io.paths import NetworkRef
from distill_jax.trainer.io.step_folder import META
from distill_jax.trainer.io.step_index import newest_meta

RUNTIME_ONLY = (
    "mesh.",
    "partition.",
    "log.",
    "checkpoint.",
    "eval.batch_size",
    "data.resident",
    "study.",
    "watch.stall_seconds",
    "watch.on_stall",
    "watch.spike",
)
"""Config paths that change how a run is executed but not its results."""


START_OVER = "--start_over moves the earlier run aside and begins at step 0"

RESCUE = f"start over: {START_OVER}"
"""The alternatives if every checkpoint of a run is damaged."""


CONFIG_HINT = f"restore it from a copy, or name another --workdir; {START_OVER}"


def stored_config(folder: pathlib.Path) -> ConfigDict | None:
    """Returns the config of a run: that of its newest checkpoint, else `config.json`.

    None where the folder holds no run.

    Raises:
      UserError: it holds one whose config cannot be read.
    """
    if not is_run(folder):
        return None
    meta = newest_meta(folder / "checkpoints")
    if meta is not None and "config" in meta:
        where = folder / "checkpoints" / str(meta["step"]) / META
        return config_lib.from_json(json.dumps(meta["config"]), where=str(where))
    return config_lib.from_json(read_text(folder / "config.json", hint=CONFIG_HINT))


def check_config(
    config: ConfigDict, folder: pathlib.Path, *, allowed: Collection[str] = ()
) -> dict[str, list[str]]:
    """Checks that a folder holds no run, or one of the same config but for what is allowed.

    It may have been moved, together with the study whose networks the run starts from.

    Args:
      config: the config.
      folder: the workdir.
      allowed: keys and groups that may differ, see `changes`.

    Returns:
      The allowed differences, `{path: [old, new]}`.

    Raises:
      ConfigError: the folder holds a run that differs in something else that changes its result.
    """
    before = stored_config(folder)
    if before is None:
        return {}
    before, config = paths.of_config(before), paths.of_config(config)
    for name, role in before.roles.items():
        if name in config.roles and _moved(role.init, config.roles[name].init, folder):
            role.init = config.roles[name].init
    found = config_lib.changed(before, config)
    found = {path: values for path, values in found.items() if not path.startswith(RUNTIME_ONLY)}
    accepted, refused = changes.split(found, allowed)
    if refused:
        asked = changes.remedy(refused, folder)
        hint = f"give the same config to continue it, or another --workdir; {START_OVER}"
        raise ConfigError(
            "holds a run of another config:\n    " + "\n    ".join(changes.spell(refused)),
            where=str(folder),
            hint=f"{hint}\n  {asked}" if asked else hint,
        )
    return accepted


def _moved(old: str | None, new: str | None, folder: pathlib.Path) -> bool:
    """Whether a network has the place in the study of a run that `old`, now gone, named."""
    if not old or not new or paths.is_foreign(old) or paths.is_foreign(new):
        return False
    was, now = (NetworkRef.parse(init, where=str(folder)) for init in (old, new))
    here = pathlib.Path(os.path.relpath(now.path, folder.parent.parent)).parts  # arm, seed
    same = was.path.parts[-2:] == here and was[1:] == now[1:]
    return same and not was.path.exists()


def data_checksums(dataset: Any) -> dict[str, dict[str, Any]]:
    """Returns `{split: {"n", "sha256", "origin"}}` of a data set.

    `sha256` is that of the part's provenance; `origin` is that of the source at the root of its
    chain, before anything was held out or corrupted, which runs of one file have in common.
    """
    checksums = {}
    for split, part in dataset.parts.items():
        root = part
        while hasattr(root, "source"):
            root = root.source
        provenance = part.provenance
        origin = root.provenance.sha256
        checksums[split] = {"n": len(part), "sha256": provenance.sha256, "origin": origin}
    return checksums


def check_inputs(before: Any, now: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Checks that a run continues with the data and the networks that it began with.

    Entries that are missing on either side (data without a checksum, a checkpoint of an earlier
    version, a network that is gone and no longer needed) are not compared.

    Args:
      before: the "inputs" of a checkpoint, None where it names none.
      now: `{"data": see data_checksums, "networks": {role: checksum or None}}`.
      folder: of the run, for the message.

    Raises:
      ConfigError: names what differs.
    """
    if not isinstance(before, Mapping):
        return
    lines = []
    for split, new in now["data"].items():
        old = before.get("data", {}).get(split, {})
        differs = [k for k in ("n", "sha256") if old.get(k) and new[k] and old[k] != new[k]]
        if differs:
            lines.append(
                f"data, {split}: {old['n']} examples with checksum {old['sha256'][:12]} -> "
                f"{new['n']} with {new['sha256'][:12]}"
            )
    for role, new in now["networks"].items():
        old = before.get("networks", {}).get(role)
        if old and new and old != new:
            lines.append(f"roles.{role}.init: checksum {old[:12]} -> {new[:12]}")
    if lines:
        raise ConfigError(
            "the data or networks differ from those at the start of the run:\n    "
            + "\n    ".join(lines),
            where=str(folder),
            hint=f"restore them to continue this run, or name another --workdir; {START_OVER}",
        )


class Alike:
    """Checks that runs of one study read the same data from the same place."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, dict[str, str]]] = {}

    def check(self, config: ConfigDict, data: Any, label: str, *, done: bool = True) -> None:
        """Compares a run with those before it.

        Args:
          config: of the run.
          data: its `data_checksums`, None where they are not known.
          label: names the run in the message.
          done: whether it is finished; later runs are compared with it.

        Raises:
          ConfigError: a run with the same `data.name` and arguments had other data.
        """
        if not isinstance(data, Mapping):
            return
        group = {k: config.data[k] for k in ("name", "held_out")}
        key = json.dumps(group | {"kwargs": config_lib.data_arguments(config)[0]}, sort_keys=True)
        origins = {split: part["origin"] for split, part in data.items() if part.get("origin")}
        first, before = self._seen.get(key, (label, origins))
        if done:
            self._seen.setdefault(key, (label, origins))
        changed = [s for s in origins.keys() & before.keys() if origins[s] != before[s]]
        if changed:
            split = sorted(changed)[0]
            raise ConfigError(
                f"the data of {label} are not those of {first}: checksum of {split} "
                f"{before[split][:12]} -> {origins[split][:12]}",
                where="data",
                hint="restore the data, or compare in another study folder; " + START_OVER,
            )


def explain_divergence(error: NonFiniteError, folder: pathlib.Path) -> NonFiniteError:
    """Adds how a changed config can be tried, where the folder holds checkpoints of this one."""
    if not is_run(folder):
        return error
    more = f"a changed config needs another --workdir, or starts over: {START_OVER}"
    hint = f"{error.hint}\n  {more}" if error.hint else more
    return NonFiniteError(error.what, where=error.where, hint=hint)
