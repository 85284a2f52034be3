"""Texts of errors that code of others raises."""

import pytest

from distill_jax.core.errors import ConfigError, explained, text_of


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("\n a \n\n  b "), "a"),
        (KeyError("missing 'x'"), "missing 'x'"),
        (ValueError(), ""),
        (Unspeakable("hidden"), ""),
        (ValueError("\ud800"), "?"),
        (ValueError("x" * 10**6), "x" * 197 + "..."),
    ],
    ids=["lines", "key", "nothing", "unspeakable", "surrogate", "long"],
)
def test_a_text_is_one_short_line(error, text):
    assert text_of(error) == text


def test_all_lines_become_one():
    assert text_of(ValueError("a\n\n  b "), lines=None) == "a b"


def test_an_error_without_a_text_is_explained():
    with (
        pytest.raises(ConfigError, match="x: it fails: Unspeakable"),
        explained("it fails", where="x"),
    ):
        raise Unspeakable
