"""From the name of a config on the command line to its file.

A path wins; else the name is that of a shipped config, with or without its folder: `kd`,
`distill/kd` and `configs/distill/kd.py` are the same file wherever the program is started.
"""

import pathlib

from distill_jax import configs
from distill_jax.core.errors import UserError, nearest
from distill_jax.run import paths


def shipped() -> dict[str, pathlib.Path]:
    """Returns the files of all shipped configs by name, such as `distill/kd`."""
    found = {}
    for root in map(pathlib.Path, configs.__path__):
        for path in sorted(root.glob("*/*.py")):
            if path.stem != "__init__":
                found[path.relative_to(root).with_suffix("").as_posix()] = path
    return found


def find(name: str) -> pathlib.Path:
    """Returns the file that a name on the command line stands for.

    Args:
      name: a path, or the name of a shipped config, with or without its folder.

    Raises:
      UserError: there is no such file, or two shipped configs have this name.
    """
    path = paths.expand(name, where="--config")
    if path.is_file():
        return path
    files = shipped()
    short = name.removeprefix("configs/").removesuffix(".py")
    if short in files:
        return files[short]
    matches = [known for known in files if known.rpartition("/")[2] == short]
    if len(matches) == 1:
        return files[matches[0]]
    if matches:
        raise UserError(
            f"{name!r} is the name of {len(matches)} shipped configs",
            where="--config",
            hint="write " + " or ".join(f"--config={match}" for match in matches),
        )
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.suffix == ".py":
        there = [str(p) for p in folder.glob("*.py")] if folder.is_dir() else []
        what = f"{name} is a folder" if path.is_dir() else f"no such file: {name}"
        hint = nearest(name, there) if there else f"there is no config in {folder}"
    else:
        what = f"no shipped config is called {name!r}, and there is no such file"
        names = files if "/" in name else [known.rpartition("/")[2] for known in files]
        hint = nearest(short, names)
    raise UserError(what, where="--config", hint=hint)
