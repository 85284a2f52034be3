"""What may differ from the stored config where a run goes on, or is evaluated.

A longer schedule (`--extend`) and the keys in `TRAINING` may differ where a run goes on, and those
in `EVALUATION` where it is evaluated, if they are asked for by name. None of them brings in code
that a stored file names.
"""

import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence

from distill_jax.core.errors import UserError, nearest
from distill_jax.run.workdir.ownership import is_run

LENGTH = "total"
"""The key that `--extend` changes."""

TRAINING = ("optim.lr", "optim.schedule", "optim.schedule_kwargs", "evaluators", "eval.every")
"""Keys and groups that `--change` may name where a run goes on: the state has the same structure
and the same meaning with any of their values."""

EVALUATION = ("data", "evaluators")
"""Groups that may differ where a run is evaluated."""

STORED = (LENGTH, *TRAINING)
"""Where the config files of a run may differ after a start that was killed."""

UNMEASURED = ("train_transforms", "views", "teacher_view", "teacher_shares", "outer")
"""Keys of `data` that training alone reads."""

Changes = Mapping[str, Sequence[str]]
"""Old and new value as text, by config path."""


def within(path: str, keys: Iterable[str]) -> bool:
    """Whether a config path is one of the keys, or lies in one of the groups."""
    return any(path == key or path.startswith(f"{key}.") for key in keys)


def allowed_in(mode: str) -> tuple[str, ...]:
    """Returns the keys and groups that may differ in a mode."""
    return {"train": TRAINING, "eval": EVALUATION}.get(mode, ())


def touched(name: str, overrides: Iterable[str]) -> bool:
    """Whether one of the overridden paths is that key or group, lies in it, or contains it."""
    return any(within(path, (name,)) or within(name, (path,)) for path in overrides)


def check_names(names: Iterable[str], mode: str) -> None:
    """Refuses names of `--change` that a mode cannot take.

    Raises:
      UserError: with those that it can.
    """
    where, allowed = "--change", allowed_in(mode)
    for name in names:
        if not allowed:
            raise UserError(f"mode {mode} continues no run", where=where, hint="leave it out")
        if name == LENGTH:
            hint = '--extend="20 epochs" sets a longer total'
            raise UserError("the length has a flag of its own", where=where, hint=hint)
        if within(name, allowed):
            continue
        if within(name, EVALUATION):
            what = f"{name} may differ in mode eval alone: a run trains on the data it began with"
            raise UserError(what, where=where, hint=f"one of {', '.join(allowed)}")
        hint = nearest(name, allowed)
        if within(name, TRAINING):
            hint = f"{name} may change where a run goes on, in mode train"
        raise UserError(f"{name!r} cannot change", where=where, hint=hint)


def split(changes: Changes, allowed: Collection[str]) -> tuple[dict, dict]:
    """Returns the changes that are allowed, and the others."""

    def is_allowed(path: str) -> bool:  # the group around a new entry may have been empty
        filled = "{}" in changes[path] and any(within(key, (path,)) for key in allowed)
        return within(path, allowed) or filled

    accepted = {path: values for path, values in changes.items() if is_allowed(path)}
    return accepted, {path: v for path, v in changes.items() if path not in accepted}


def spell(changes: Changes) -> list[str]:
    """Returns `"path: old -> new"` for each change."""
    return [f"{path}: {old} -> {new}" for path, (old, new) in changes.items()]


def remedy(refused: Collection[str], folder: pathlib.Path) -> str:
    """Returns how the changes that were refused can be asked for, empty if none can.

    Args:
      refused: paths.
      folder: of the run.
    """
    if owner(folder):
        return ""
    ways = ["--extend=TOTAL continues to a longer total"] if LENGTH in refused else []
    keys = [key for key in TRAINING if any(within(path, (key,)) for path in refused)]
    if keys:
        ways.append(f"--change={','.join(keys)} accepts a new value from here on")
    if any(within(path, ("data",)) for path in refused):
        ways.append("--mode=eval measures on other data")
    return "; ".join(ways)


def owner(folder: pathlib.Path) -> tuple[str, pathlib.Path] | None:
    """Returns the study or sweep that a run belongs to: its kind and its folder."""
    for kind, place in (("study", folder.parent.parent), ("sweep", folder.parent)):
        if (place / f"{kind}.json").is_file():
            return kind, place
    return None


def check_extendable(folder: pathlib.Path, flag: str) -> None:
    """Refuses folders without a run of one's own that could go on otherwise.

    Args:
      folder: the workdir.
      flag: that asks for it, for the message.

    Raises:
      UserError: the folder holds no run, or one that belongs to a study or a sweep, whose runs are
        compared at equal settings.
    """
    for listing, kind in (("study.json", "study"), ("sweep.json", "sweep")):
        if (folder / listing).is_file():
            hint = "its runs are compared at equal settings: start another with the new ones"
            raise UserError(f"holds a {kind}, not a run", where=f"{flag}: {folder}", hint=hint)
    if not is_run(folder):
        hint = "give the --workdir of a run, or leave the flag out to train a new one"
        raise UserError("holds no run that could go on", where=f"{flag}: {folder}", hint=hint)
    if (above := owner(folder)) is not None:
        kind, place = above
        hint = f"copy the folder and extend the copy: cp -r {folder} runs/longer"
        raise UserError(f"belongs to the {kind} {place}", where=f"{flag}: {folder}", hint=hint)
