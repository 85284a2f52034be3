"""Paths of arguments: made absolute, tried before anything is written, parsed for networks."""

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
      role: which network of it.
      part: `layer` or `layer/layer` inside it, `*` for the layers in common, empty for all of it.
    """

    path: pathlib.Path
    role: str = "student"
    part: str = ""

    @classmethod
    def parse(cls, text: str | os.PathLike, *, where: str = "path") -> "NetworkRef":
        """Returns what `path`, `path#role` or `path#role/part` means, with an absolute path.

        Args:
          text: the reference; the role defaults to "student".
          where: the argument, flag or config path that it is from.

        Raises:
          UserError: as `absolute` and `for_checkpoints`.
        """
        path, _, network = cls.split(os.fspath(text))
        role, _, part = network.partition("/")
        folder = for_checkpoints(absolute(path, where=where), where=where)
        return cls(folder, role or "student", part)

    @staticmethod
    def split(text: str) -> tuple[str, str, str]:
        """Splits at the "#", unless it belongs to the name of a folder."""
        if "#" not in text or os.path.lexists(os.path.expanduser(text)):
            return text, "", ""
        return text.rpartition("#")


def check_places(
    folder: pathlib.Path, *, files: Iterable[str] = (), folders: Iterable[str] = ()
) -> None:
    """Checks that nothing of another kind stands where files and folders will be written.

    Raises:
      UserError: a folder, a device or a pipe where a file belongs, or a file where a folder does.
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
    """Checks that a folder can be made and written to, by writing beside where it would be.

    Permissions, quotas, read-only file systems, immutable folders and pseudo file systems such as
    `/proc` all show in this way alone. What is tried is removed again.

    Args:
      path: the folder; it, and folders above it, may be absent.
      where: flag or config path to name in the error.
      hint: what would be right.

    Raises:
      UserError: it cannot.
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
      OSError: the path cannot be looked at, or a name in it is too long.
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
