"""The Python standard library's sources as bytes: real text that every machine with Python has.

A document is a module outside tests, in the order of its path; equal ones and empty ones are left
out. Which text that is depends on the version of Python: the provenance has it, and a checksum.
"""

import functools
import platform
import sysconfig
from pathlib import Path

from distill_jax.core.api import Dataset
from distill_jax.core.errors import DataUnavailable
from distill_jax.data import _documents

LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
"""Folders that are not read."""


@functools.lru_cache(maxsize=1)
def read() -> tuple[_documents.Document, ...]:
    """Returns the modules of the standard library; they are read once.

    Raises:
      DataUnavailable: this Python has no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[bytes, _documents.Document] = {}
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if LEFT_OUT.isdisjoint(name.parts) and (text := path.read_bytes()).strip():
            found.setdefault(text, _documents.Document(name.as_posix(), "", text))
    if not found:
        raise DataUnavailable("no sources of the standard library", where=str(root))
    return tuple(found.values())


def make(
    *,
    length: int = 128,
    test_fraction: float = 0.1,
    held_out: float = 0.1,
    split_seed: int = 0,
    reserved: int = 0,
) -> Dataset:
    """Returns the standard library as packed rows of bytes, see `text_folder`.

    Args:
      length: t, targets in a row.
      test_fraction: share of the bytes that is the test part.
      held_out: share of the rest that is held out.
      split_seed: seed of the draw of parts, by document.
      reserved: number of further token ids, behind the others, that no text has, for `denoise`.

    Raises:
      DataUnavailable: this Python has no sources, or too few of them for a row in each part.
      ArgumentError: a share or length out of its range.
    """
    return _documents.make_dataset(
        read(),
        name=f"standard library of Python {platform.python_version()}",
        origin="Python",
        licence="PSF-2.0",
        length=length,
        test_fraction=test_fraction,
        held_out=held_out,
        split_seed=split_seed,
        reserved=reserved,
    )
