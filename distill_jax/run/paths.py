"""Paths of flags and configs, made absolute in one place.

A path is relative to the current folder, `~` is the home folder. The command line makes all of them
absolute before anything reads them (`of_config`), so a run stores where its files are and continues
from any folder. Needs neither JAX nor data.
"""

import contextlib
import copy
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from distill_jax.core.errors import UserError
from distill_jax.run.config import ConfigDict

_PATH = re.compile(
    r"roles\.\w+\.init|cache\.dir|data\.kwargs\.(.+[._])?(path|root|dir|folder|file)s?"
)
"""The config paths that hold paths; of a data set's arguments those that are called so."""


def absolute(text: str | os.PathLike, *, where: str) -> pathlib.Path:
    """Returns an absolute path; `..` is resolved where no symbolic link gives it another meaning.

    Args:
      text: a path, relative to the current folder or with `~`.
      where: the flag or config path that it is from.

    Raises:
      UserError: it cannot be a path.
    """
    with _explained(text, where):
        path = expand(text, where=where).absolute()
        short = pathlib.Path(os.path.normpath(path))
        return short if os.path.realpath(short) == os.path.realpath(path) else path


def expand(text: str | os.PathLike, *, where: str) -> pathlib.Path:
    """Returns a path with `~` expanded, for what is read at once and named in messages.

    Raises:
      UserError: there is no such home folder.
    """
    with _explained(text, where):
        return pathlib.Path(text).expanduser()


def for_checkpoints(path: pathlib.Path, *, where: str) -> pathlib.Path:
    """Returns an absolute path below which Orbax can write and read checkpoints.

    Orbax (0.12.8) reads `[...]` as a pattern, `\\` as a separator, and takes UTF-8 alone.

    Raises:
      UserError: the path has one of these.
    """
    text, hint = str(path), "rename the folder, or choose another"
    try:
        text.encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        what = f"{text!a} is not UTF-8 in the encoding {encoding} of this process"
        raise UserError(what, where=where, hint=hint) from None
    if found := re.search(r"\[.*\]|\\", text):
        what = f"checkpoints cannot be read below a folder with {found[0]!r} in its path"
        raise UserError(what, where=where, hint=hint)
    return path


@contextlib.contextmanager
def _explained(text: str | os.PathLike, where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{str(text)!r} is no path: {error}", where=where) from None


def make_importable() -> None:
    """Lets modules of the current folder be imported, as `python -m` does, unless `-P` forbids it.

    Raises:
      UserError: the current folder is gone.
    """
    try:
        here = os.getcwd()
    except OSError as error:
        raise UserError(
            f"it is gone: {error.strerror}", where="current folder", hint="start from another one"
        ) from None
    if not sys.flags.safe_path and here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


class Origin(NamedTuple):
    """A network of another run that a network starts from.

    Attributes:
      path: a run, a `checkpoints` folder or a step.
      role: which network of it.
      part: `layer` or `layer/layer` inside it, `*` for the layers in common, empty for all of it.
    """

    path: pathlib.Path
    role: str
    part: str


def parse_origin(text: str, *, where: str) -> Origin:
    """Returns what `path`, `path#role` or `path#role/part` means; the role defaults to "student".

    Raises:
      UserError: as `absolute`.
    """
    path, _, network = _split_origin(text)
    role, _, part = network.partition("/")
    found = for_checkpoints(absolute(path, where=where), where=where)
    return Origin(found, role or "student", part)


def _split_origin(text: str) -> tuple[str, str, str]:
    """Splits at the "#", unless it belongs to the name of a folder."""
    if "#" not in text or os.path.lexists(os.path.expanduser(text)):
        return text, "", ""
    return text.rpartition("#")


def of_config(config: ConfigDict) -> ConfigDict:
    """Returns a copy in which every path is absolute, also those in the arms of a study.

    Networks of other arms (`arm:NAME`) and addresses (`scheme://...`) stay as they are.

    Raises:
      UserError: as `absolute`.
    """
    config = copy.deepcopy(config)
    _make_absolute(config, "", "")
    for arm, changes in config.study.arms.items():
        if isinstance(changes, ConfigDict):
            _make_absolute(changes, "", f"study.arms.{arm}.")
    return config


def _make_absolute(node: ConfigDict, prefix: str, outside: str) -> None:
    for key, value in node.items():
        path = f"{prefix}{key}"
        if isinstance(value, ConfigDict):
            if path != "study":
                _make_absolute(value, f"{path}.", outside)
        elif _PATH.fullmatch(path):
            found = _absolute(value, where=outside + path)
            if found != value:
                node[key] = found


def _absolute(value: Any, *, where: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_absolute(item, where=where) for item in value)
    if not isinstance(value, str) or not value or value.startswith("arm:") or "://" in value:
        return value
    if where.endswith(".init"):
        path, mark, network = _split_origin(value)
        return f"{absolute(path, where=where)}{mark}{network}"
    return str(absolute(value, where=where))
