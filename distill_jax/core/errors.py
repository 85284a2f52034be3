"""Errors that are the user's to fix: one clear message, no traceback, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, a command line or the surroundings of a run.

    The message says what is wrong, where, and what would be right. The entrypoint prints it
    without a traceback and exits with `exit_code`.

    Args:
      what: what is wrong, one sentence without a full stop.
      where: the config path, flag or file at fault.
      hint: what would be right.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", hint: str = ""):
        self.what, self.where, self.hint = what, where, hint
        parts = [f"{where}: {what}" if where else what, hint]
        super().__init__("\n  ".join(part for part in parts if part))


class ConfigError(UserError):
    """A config that cannot be run as written."""


class DataUnavailable(UserError):
    """Data that is not on this machine; the hint names what to install or where to put it."""


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged, or of another structure than the run."""


class NonFiniteError(UserError):
    """A loss term that became NaN or infinite."""

    exit_code = 3


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns a hint that names the closest option and lists what exists."""
    options = sorted(map(str, options))
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}available: {', '.join(options) if options else 'none'}"
