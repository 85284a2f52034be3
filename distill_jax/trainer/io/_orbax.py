"""Helpers for calls of Orbax: stored shapes and descriptive errors."""

import contextlib
import errno
import functools
import logging
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from distill_jax.core.api import PyTree
from distill_jax.core.errors import CheckpointError, nearest, text_of
from distill_jax.core.partition import named_leaves
from distill_jax.trainer.io import peers

_REASONS = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_REASONS += (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


@contextlib.contextmanager
def reading(folder: pathlib.Path) -> Iterator[None]:
    """Converts errors that Orbax raises for an unreadable step into a `CheckpointError`."""
    silence_failures()
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:
        if peers.is_loss_of_peer(e):
            raise
        raise CheckpointError(f"could not be read: {root_cause(e)}", where=str(folder)) from e


@functools.cache
def silence_failures() -> None:
    """Keeps what Orbax prints of a failed save or read off the console: it raises it too.

    It logs tracebacks, leaves the errors of further arrays unread, which asyncio then logs, and
    writes that end after the first has failed find its event loop closed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def root_cause(e: BaseException) -> str:
    """Returns the reason why a save or a read failed, in one line."""
    while e.__cause__ or e.__context__:
        e = e.__cause__ or e.__context__  # type: ignore[assignment]
    text = text_of(e, most=300) or type(e).__name__
    whole = text_of(e, most=10**5, lines=None)
    # TensorStore names the reason of the operating system last, after paths of any length.
    reasons = (os.strerror(number) for number in _REASONS)
    reason = next((r for r in reasons if r.lower() in whole.lower()), "")
    return text if reason.lower() in text.lower() else f"{reason}: {text}"


def stored_shapes(folder: pathlib.Path, item: str) -> PyTree:
    """Returns an item of a step as shapes.

    Raises:
      CheckpointError: there is no such item, or it contains values other than arrays.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    if not (folder / item).is_dir():
        raise CheckpointError(
            f"has no item {item!r}",
            where=str(folder),
            hint=nearest(item, (p.name for p in folder.iterdir() if p.is_dir())),
        )
    handler = ocp.PyTreeCheckpointHandler()
    with reading(folder):
        metadata = handler.metadata(epath.Path(folder / item))
        tree = getattr(metadata, "tree", metadata)
        for name, leaf in named_leaves(tree).items():
            if getattr(leaf, "shape", None) is None:
                raise CheckpointError(f"{item}: {name} is no array", where=str(folder))
    return tree


def check_structure(folder: pathlib.Path, item: str, stored: PyTree, like: PyTree) -> None:
    """Raises `CheckpointError` that lists how the stored leaves differ from those wanted."""
    has = {name: tuple(x.shape) for name, x in named_leaves(stored).items()}
    wanted = {name: tuple(x.shape) for name, x in named_leaves(like).items()}
    lines = [f"{name}: absent from the checkpoint" for name in wanted.keys() - has.keys()]
    lines += [f"{name}: not in this run" for name in has.keys() - wanted.keys()]
    lines += [
        f"{name}: {has[name]} in the checkpoint, {wanted[name]} in this run"
        for name in wanted.keys() & has.keys()
        if has[name] != wanted[name]
    ]
    if lines:
        lines = sorted(lines)
        more = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
        raise CheckpointError(
            f"{item} has another structure than this run:\n    " + "\n    ".join(lines[:5] + more),
            where=str(folder),
            hint="give the config of the run that wrote it, or another workdir",
        )
