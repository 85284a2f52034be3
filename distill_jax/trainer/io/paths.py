"""Paths in arguments: made absolute, checked before writing, parsed as references to networks."""

import contextlib
import errno
import os
import pathlib
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from distill_jax.core.errors import UserError
from distill_jax.trainer.io.files import reason


def absolute(text: str | os.PathLike, *, where: str) -> pathlib.Path:
    """Returns an absolute path; `..` is resolved unless a symbolic link changes its meaning.

    Args:
      text: a path, relative to the current folder or with `~`.
      where: the flag or config path that contains it.

    Raises:
      UserError: the text is not a valid path.
    """
    with _explained(text, where):
        path = expand(text, where=where).absolute()
        short = pathlib.Path(os.path.normpath(path))
        return short if os.path.realpath(short) == os.path.realpath(path) else path


def expand(text: str | os.PathLike, *, where: str) -> pathlib.Path:
    """Returns a path with `~` expanded, for files that are read at once and named in messages.

    Raises:
      UserError: there is no such home folder.
    """
    with _explained(text, where):
        return pathlib.Path(text).expanduser()


def for_checkpoints(path: pathlib.Path, *, where: str) -> pathlib.Path:
    """Returns an absolute path below which Orbax can write and read checkpoints.

    Orbax (0.12.8) reads `[...]` as a pattern and `\\` as a separator, and accepts only UTF-8.

    Raises:
      UserError: the path contains one of these, or is not UTF-8.
    """
    text, hint = str(path), "rename the folder, or choose another"
    try:
        text.encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        what = f"{text!a} is not UTF-8 in the encoding {encoding} of this process"
        raise UserError(what, where=where, hint=hint) from None
    if special := re.search(r"\[.*\]|\\", text):
        what = f"checkpoints cannot be read below a folder with {special[0]!r} in its path"
        raise UserError(what, where=where, hint=hint)
    return path


@contextlib.contextmanager
def _explained(text: str | os.PathLike, where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{str(text)!r} is no path: {error}", where=where) from None


class NetworkRef(NamedTuple):
    """A network in the checkpoint of another run.

    Attributes:
      path: a run, a `checkpoints` folder or a step.
      role: role of the network in that run.
      part: `layer` or `layer/layer` of the network, `*` for the layers that the new network has,
        `**` for those that both have, empty for all of it.
    """

    path: pathlib.Path
    role: str = "student"
    part: str = ""

    @classmethod
    def parse(cls, text: str | os.PathLike, *, where: str = "path") -> "NetworkRef":
        """Parses `path`, `path#role` or `path#role/part`; the path becomes absolute.

        Args:
          text: the reference; the role defaults to "student".
          where: the argument, flag or config path that contains it.

        Raises:
          UserError: as in `absolute` and `for_checkpoints`.
        """
        path, _, network = cls.split(os.fspath(text))
        role, _, part = network.partition("/")
        folder = for_checkpoints(absolute(path, where=where), where=where)
        return cls(folder, role or "student", part)

    @staticmethod
    def split(text: str) -> tuple[str, str, str]:
        """Splits at the "#", unless it is part of a folder name."""
        if "#" not in text or os.path.lexists(os.path.expanduser(text)):
            return text, "", ""
        return text.rpartition("#")


def check_places(
    folder: pathlib.Path, *, files: Iterable[str] = (), folders: Iterable[str] = ()
) -> None:
    """Checks that existing paths do not conflict with the files and folders to be written.

    Raises:
      UserError: a folder, a device or a pipe is in the place of a file, or a file is in the place
        of a folder.
    """
    for name, wanted in [*((n, "file") for n in files), *((n, "folder") for n in folders)]:
        path = folder / name
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(reason(error), where=str(path), hint="move it away") from error
        fits = stat.S_ISREG(mode) if wanted == "file" else stat.S_ISDIR(mode)
        if not fits:
            kind = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "device"
            what = f"is a {kind}, where a {wanted} is written"
            raise UserError(what, where=str(path), hint="move it away, or choose another folder")


def check_folder(path: pathlib.Path, *, where: str, hint: str = "choose another folder") -> None:
    """Checks that a folder can be created and written to, by a test write next to it.

    Only a write detects all of permissions, quotas, read-only file systems, immutable folders and
    pseudo file systems such as `/proc`. The test files are removed again.

    Args:
      path: the folder; it and its parents may be missing.
      where: flag or config path to name in the error.
      hint: how to correct the error.

    Raises:
      UserError: the folder cannot be created or written to.
    """
    tried = ""
    try:
        present = _nearest_present(path)
        if present.is_symlink() and not present.exists():
            what = f"{present} is a symbolic link to {os.readlink(present)}, which leads nowhere"
            raise UserError(what, where=where, hint=hint)
        if not present.is_dir():
            raise UserError(f"{present} is a file", where=where, hint="name a folder")
        tried = tempfile.mkdtemp(prefix=".distill_jax_", dir=present)
        pathlib.Path(tried, "file").write_bytes(b"x")
    except (OSError, ValueError) as error:
        what = f"{path} cannot be made or written to: {reason(error)}"
        raise UserError(what, where=where, hint=hint) from error
    finally:
        if tried:
            with contextlib.suppress(OSError):
                pathlib.Path(tried, "file").unlink(missing_ok=True)
                os.rmdir(tried)


def _nearest_present(path: pathlib.Path) -> pathlib.Path:
    """Returns the path, or the lowest folder above it that exists.

    Raises:
      OSError: the path cannot be accessed, or a name in it is too long.
    """
    present = path
    while True:
        try:
            os.lstat(present)
            break
        except (FileNotFoundError, NotADirectoryError):
            present = present.parent
    longest = os.pathconf(present, "PC_NAME_MAX") if present.is_dir() else 255
    for part in path.relative_to(present).parts:
        if len(os.fsencode(part)) > longest:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), part)
    return present
