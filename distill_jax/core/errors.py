"""Errors that the user can fix: one clear message, no traceback, exit code 2."""

import contextlib
import difflib
import dis
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping


class UserError(Exception):
    """An error in a config, a command line or the environment of a run.

    The message describes the error, its location and a correction. The entrypoint prints it
    without a traceback and exits with `exit_code`.

    Args:
      what: description of the error, one sentence without a full stop.
      where: the config path, flag or file that causes the error.
      hint: how to correct it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", hint: str = ""):
        self.what, self.where, self.hint = what, where, hint
        parts = [f"{where}: {what}" if where else what, hint]
        super().__init__("\n  ".join(part for part in parts if part))


class ConfigError(UserError):
    """A config that cannot be run as written."""


class ArgumentError(ConfigError, ValueError):
    """An argument that the library cannot use.

    `where` is the name of the argument or of its owner: a network, a transform, an evaluator or
    the batch. In a run, `run.arguments.located` adds the config path.
    """


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of a type that the library cannot use."""


class DataUnavailable(UserError):
    """Data that is not on this machine; the hint names what to install or where to put it."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of a different structure from the run."""


class ExportError(UserError):
    """A network that a format cannot hold, or a format whose packages are not installed."""


class NonFiniteError(UserError):
    """A loss term that became NaN or infinite."""

    exit_code = 3


def raised_by_code(error: BaseException) -> bool:
    """Returns whether code raised the error; False for a `KeyboardInterrupt` by Ctrl-C.

    If code raised it, the innermost frame stopped at a `raise` instruction. A signal stops a frame
    at any instruction.
    """
    if not isinstance(error, KeyboardInterrupt):
        return True
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    code = innermost.tb_frame.f_code.co_code
    return code[innermost.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def text_of(error: BaseException, *, most: int = 200, lines: int | None = 1) -> str:
    """Returns the first `lines` lines of an error message as one line of at most `most` characters.

    The result is empty if converting the error to a string fails: code that a config names may
    raise anything.
    """
    try:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    except (Exception, SystemExit):
        return ""
    stripped = (line.strip() for line in text.encode("utf-8", "replace").decode().splitlines())
    joined = " ".join([line for line in stripped if line][:lines])
    return joined if len(joined) <= most else joined[: most - 3] + "..."


def raised_at(error: BaseException) -> str:
    """Returns file and line of the innermost frame outside installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or list(frames)
    return f"{own[-1].filename.rpartition('/')[2]}:{own[-1].lineno}" if own else ""


@contextlib.contextmanager
def explained(what: str, *, where: str) -> Iterator[None]:
    """Converts any exception except a `UserError` into an `ArgumentError` with one message.

    It wraps code that a config selects, which may fail in any way on unsuitable inputs.

    Args:
      what: what failed; the beginning of the message.
      where: the argument, or the path of the config.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if not raised_by_code(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        last = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
        file = last.filename.rpartition("/")[2]
        raise ArgumentError(
            f"{what}: {type(error).__name__}: {text_of(error)}",
            where=where,
            hint=f"in {file}:{last.lineno}: {(last.line or '')[:200]}",
        ) from error


@contextlib.contextmanager
def below(path: str, names: Collection[str]) -> Iterator[None]:
    """Adds the config path of an argument to errors that name the argument.

    Args:
      path: config path of the group that holds the arguments.
      names: the arguments; a mapping gives their config keys.
    """
    try:
        yield
    except UserError as error:
        name = re.split(r"[.\[]", error.where)[0]
        if not error.where and isinstance(error, ArgumentError):  # about all arguments together
            raise ConfigError(error.what, where=path, hint=error.hint) from error
        if name not in names:
            raise
        key = names[name] if isinstance(names, Mapping) else name
        kind = ConfigError if isinstance(error, ArgumentError) else type(error)
        where = f"{path}.{key}{error.where[len(name) :]}"
        raise kind(error.what, where=where, hint=error.hint) from error


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns a hint that names the closest option and lists all options."""
    options = sorted(map(str, options))
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}available: {', '.join(options) if options else 'none'}"
