"""Short pieces of the Python standard library's sources, one to a row, to select from.

A piece is a paragraph of a module (`stdlib_bytes`), the lines between two blank ones; a longer one
is cut at the ends of lines. Lines that are longer than a row are left out. Parts are whole modules.
"""

import ast
import functools
import platform
import re
import textwrap
import warnings

import numpy as np

from distill_jax.core import ranges
from distill_jax.core.api import Dataset, Provenance
from distill_jax.data import _documents, _tokens, source, stdlib_bytes

_BLANK = re.compile(rb"\n[ \t]*(?=\n)")


@functools.lru_cache(maxsize=4)
def make(
    *,
    length: int = 64,
    train: int = 20_000,
    measured: int = 1000,
    least: int = 8,
    held_out: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Returns rows of bytes with their `bytes` float32 and `parses`, 1 for Python that parses.

    `input` has `tokens` and `segments` int32 `[t + 1]`, as rows of `text_folder`: an end token, the
    piece, an end token, padding. `label` is the module. Indentation is taken off before a piece is
    parsed, and stays in the row.

    Args:
      length: t, targets in a row; a piece has at most t - 1 bytes.
      train: largest number of pieces in the training part, drawn at random.
      measured: the same of the held-out and of the test part.
      least: smallest number of bytes of a piece.
      held_out: share of the bytes of modules in the held-out part and, of all, in the test part.
      split_seed: seed of the division and of the draws.

    Raises:
      DataUnavailable: this Python has no sources, or too few of them.
      ArgumentError: a number out of its range.
    """
    ranges.within("[8, 4096]", whole=True, length=length)
    ranges.sizes(train=train, measured=measured, least=least)
    ranges.within("(0, 1)", held_out=held_out)
    ranges.counts(split_seed=split_seed)
    documents = stdlib_bytes.read()
    sizes = np.array([len(document.text) for document in documents])
    parts = _tokens.draw_parts(
        [document.text for document in documents],
        sizes,
        test_fraction=held_out,
        held_out=held_out,
        seed=split_seed,
        where="stdlib_snippets",
    )
    random = np.random.Generator(np.random.Philox(key=[split_seed, 17]))
    made = {}
    for name, most in (("train", train), ("held_out", measured), ("test", measured)):
        found = [
            (piece, number)
            for number in np.flatnonzero(parts == name)
            for piece in pieces(documents[number].text, length - 1, least)
        ]
        chosen = np.sort(random.permutation(len(found))[:most])
        made[name] = _rows([found[i] for i in chosen], length, name)
    return Dataset(**made, vocabulary=_documents.BYTES)


def pieces(text: bytes, most: int, least: int) -> list[bytes]:
    """Returns the paragraphs of a text, cut at the ends of lines to `least` to `most` bytes."""
    found = []
    for paragraph in _BLANK.split(text):
        piece = b""
        for line in [line for line in paragraph.split(b"\n") if line.strip()]:
            if piece and len(piece) + 1 + len(line) > most:
                found.append(piece)
                piece = b""
            if len(line) <= most:
                piece = piece + b"\n" + line if piece else line
        found.append(piece)
    return [piece for piece in found if len(piece) >= least]


def parses(piece: bytes) -> bool:
    """Whether a piece is Python by itself, after its common indentation is taken off."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(textwrap.dedent(piece.decode()))
    except (SyntaxError, ValueError):
        return False
    return True


def _rows(found: list[tuple[bytes, int]], length: int, name: str) -> source.ArraySource:
    end = _documents.BYTES - 1
    tokens = np.full((len(found), length + 1), end, np.int32)
    segments = np.full(tokens.shape, -1, np.int32)
    for i, (piece, _) in enumerate(found):
        tokens[i, 1 : len(piece) + 1] = np.frombuffer(piece, np.uint8)
        segments[i, : len(piece) + 1] = 0
        segments[i, len(piece) + 1] = 1
    more = {
        "bytes": np.array([len(piece) for piece, _ in found], np.float32),
        "parses": np.array([parses(piece) for piece, _ in found], np.float32),
    }
    inputs = {"tokens": tokens, "segments": segments}
    title = f"snippets of the standard library of Python {platform.python_version()} ({name})"
    sha = source.checksum({**inputs, **more})
    provenance = Provenance(title, "Python", len(found), sha, "PSF-2.0")
    return source.ArraySource(
        inputs, np.array([number for _, number in found]), provenance, more=more
    )
