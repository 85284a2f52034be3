"""Finds and runs the config file that the command line names.

A path takes precedence. Otherwise the name is that of a shipped config, with or without its folder:
`kd`, `distill/kd` and `configs/distill/kd.py` are the same file wherever the program is started.
"""

import contextlib
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from distill_jax import configs
from distill_jax.core import durations, errors
from distill_jax.core.errors import ConfigError, UserError, nearest
from distill_jax.run import old_configs
from distill_jax.trainer.io.paths import expand

_UNITS = re.compile(
    rf"(?P<path>[\w.]*\b(?:{'|'.join({p.rpartition('.')[2] for p in old_configs.DURATIONS})}))"
    rf"(?:\.|\[['\"])(?P<unit>{'|'.join(durations.UNITS)})(?:['\"]\])? *= *(?P<value>[\d._e]+)"
)
"""A duration by its unit, as in earlier versions: `config.total.epochs = 20`."""


def shipped() -> dict[str, pathlib.Path]:
    """Returns the files of all shipped configs by name, such as `distill/kd`."""
    paths = {}
    for root in map(pathlib.Path, configs.__path__):
        for path in sorted(root.glob("*/*.py")):
            if path.stem != "__init__":
                paths[path.relative_to(root).with_suffix("").as_posix()] = path
    return paths


def find(name: str) -> pathlib.Path:
    """Returns the file that a name on the command line stands for.

    Args:
      name: a path, or the name of a shipped config, with or without its folder.

    Raises:
      UserError: there is no such file, or two shipped configs have this name.
    """
    path = expand(name, where="--config")
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


def run(path: pathlib.Path) -> dict[str, Any]:
    """Runs a config file and returns its definitions.

    A file below a folder `configs` can import `configs.common`, wherever the program is started.

    Raises:
      UserError: as `explained`.
    """
    roots = [str(p.parent) for p in path.resolve().parents if p.name == "configs"]
    sys.path[:0] = roots
    try:
        with explained(path):
            return runpy.run_path(str(path), run_name="config")
    finally:
        for root in roots:
            sys.path.remove(root)


@contextlib.contextmanager
def explained(path: pathlib.Path) -> Iterator[None]:
    """Turns whatever the code of a config file raises into one message that shows file and line.

    Leaving the program is no way out of a config; a Ctrl-C of the user is.

    Raises:
      UserError: something was raised.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not errors.raised_by_code(error):
            raise
        raise _raised(error, path) from error


def _raised(error: BaseException, path: pathlib.Path) -> UserError:
    """Returns the exception of a config file as one message with file and line."""
    if isinstance(error, SyntaxError):
        # Of a file with null bytes, neither is known.
        where, line = f"{error.filename or path}:{error.lineno or 1}", (error.text or "").strip()
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if pathlib.Path(f.filename) == path] or list(frames)
        where, line = f"{own[-1].filename}:{own[-1].lineno}", own[-1].line or ""
    text = errors.text_of(error, most=1000, lines=None).replace("\\n", " ")
    if isinstance(error, KeyError):
        text = text.strip("'\"")
    if match := _UNITS.search(line) if isinstance(error, (AttributeError, TypeError)) else None:
        with contextlib.suppress(ValueError):
            new = old_configs.one_duration({match["unit"]: match["value"]})
            what = "a duration is one value, not a group of units"
            return ConfigError(what, where=where, hint=f'write {match["path"]} = "{new}"')
    return ConfigError(
        f"{type(error).__name__}: {text}", where=where, hint=f"in: {line[:200]}" if line else ""
    )
