"""Pieces of modules: where they are cut, their rows, what parses."""

import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.data import stdlib_snippets

TEXT = b"""import os


def f(x):
    y = x + 1
    z = y * 2

    return z
# a very long line that is longer than twenty-four bytes
a = 1
b = 2
"""


def test_paragraphs_are_cut_at_the_ends_of_lines():
    found = stdlib_snippets.pieces(TEXT, 24, 5)
    assert found == [
        b"import os",
        b"def f(x):\n    y = x + 1",
        b"    z = y * 2",
        b"    return z",
        b"a = 1\nb = 2",
    ]
    assert stdlib_snippets.pieces(TEXT, 24, 12) == found[1:4]
    assert all(map(stdlib_snippets.parses, found)) and not stdlib_snippets.parses(b"else:")
    assert not stdlib_snippets.parses(b"x = '\\0") and stdlib_snippets.parses(b"'\\d'")


def test_rows_hold_their_pieces():
    made = stdlib_snippets.make(length=32, train=200, measured=20)
    assert made.vocabulary == 257 and [len(p) for p in made.parts.values()] == [200, 20, 20]
    rows = made.test.read(np.array([3, 0]))
    tokens, segments = rows["input"]["tokens"], rows["input"]["segments"]
    assert tokens.shape == (2, 33)
    for i in range(2):
        n = int(rows["bytes"][i])
        text = bytes(tokens[i, 1 : n + 1].tolist())
        assert tokens[i, 0] == 256 and (tokens[i, n + 1 :] == 256).all() and len(text) <= 31
        np.testing.assert_array_equal(segments[i], [0] * (n + 1) + [1] + [-1] * (31 - n))
        assert bool(rows["parses"][i]) == stdlib_snippets.parses(text)
    modules = [set(part.labels.tolist()) for part in made.parts.values()]
    assert not modules[0] & modules[1] and not modules[0] & modules[2]


@pytest.mark.parametrize("name", ["length", "train", "measured", "least", "held_out"])
def test_numbers_out_of_range(name):
    with pytest.raises(ConfigError, match=f"{name} is -1"):
        stdlib_snippets.make(**{name: -1})
