"""Assignment of a user's examples to parts, and the names of classes."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from distill_jax.core.errors import ArgumentError, DataUnavailable, nearest
from distill_jax.data import checks

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "held_out"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of folders, files and values of columns -> parts."""


def position(key: bytes, salt: str) -> float:
    """Returns a number in [0, 1) that depends on `key` and `salt` alone."""
    digest = hashlib.blake2b(key, digest_size=8, key=salt.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def by_hash(
    keys: Sequence[bytes],
    *,
    test_fraction: float,
    held_out: float,
    seed: int,
) -> np.ndarray:
    """Returns the part of each key, an array of "train", "held_out" and "test".

    Membership in the test part depends only on the key and `seed`, and so does the choice of
    held-out examples among the rest. Adding examples later does not move existing ones.

    Args:
      keys: one for each example; equal ones fall in the same part.
      test_fraction: share of the test part.
      held_out: share of the rest that is held out.
      seed: any whole number.

    Raises:
      ArgumentError: a share outside of its range.
    """
    if not 0 < test_fraction < 1:
        raise ArgumentError(
            f"test_fraction is {test_fraction}", where="test_fraction", hint="0 < x < 1"
        )
    check_held_out(held_out)
    parts = []
    for key in keys:
        if position(key, f"test {seed}") < test_fraction:
            parts.append("test")
        else:
            held = position(key, f"held out {seed}") < held_out
            parts.append("held_out" if held else "train")
    return np.array(parts)


def check_held_out(held_out: float) -> None:
    """Raises an error for shares outside of [0, 1)."""
    if not 0 <= held_out < 1:
        raise ArgumentError(f"held_out is {held_out}", where="held_out", hint="0 <= x < 1")


def check_filled(parts: np.ndarray, *, where: str, what: str) -> None:
    """Raises an error if the training or the test part is empty.

    Raises:
      DataUnavailable: one of them is empty; the message names it.
    """
    for name in ("train", "test"):
        if name not in parts:
            raise DataUnavailable(
                f"{len(parts)} {what}, of which none falls in the {name} part",
                where=where,
                hint="a hash decides, the same of equal ones: take another test_fraction or "
                "split_seed, or more examples",
            )


def settle(parts: np.ndarray, *, where: str) -> np.ndarray:
    """Returns the parts named by the files; without a test part, the held-out part replaces it.

    Raises:
      DataUnavailable: no training part, or nothing beside it.
    """
    present = set(parts.tolist())
    if "train" not in present or len(present) < 2:
        raise DataUnavailable(
            f"there is a {' and a '.join(sorted(present))} part alone",
            where=where,
            hint="a train part and a test part are needed; val is optional",
        )
    return parts if "test" in present else np.where(parts == "train", "train", "test")


def held(parts: np.ndarray) -> np.ndarray | None:
    """Returns which training examples are held out, bool `[n]`; None where not specified."""
    own = parts == "held_out"
    return own if own.any() else None


def part_of(value: str, *, where: str) -> str:
    """Returns the part that a folder, a file or a cell names.

    Raises:
      DataUnavailable: the value names no part.
    """
    part = SPLITS.get(value.strip().lower())
    if part is None:
        raise DataUnavailable(f"{value!r} is no split", where=where, hint=nearest(value, SPLITS))
    return part


def names_of(value: str | Sequence[str]) -> tuple[str, ...]:
    """Returns names; a string of several is split at its commas."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",")) if value else ()
    return tuple(value)


def in_order(names: Iterable[str]) -> list[str]:
    """Sorts names of classes: numbers by value where all are whole numbers, else as text."""
    names = list(names)
    whole = all(name.removeprefix("-").isdecimal() and name.isascii() for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if whole else sorted(names)


def number(
    labels: Sequence[str | None],
    parts: np.ndarray,
    *,
    classes: str | Sequence[str],
    where: str,
    what: str,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Assigns numbers to classes.

    Args:
      labels: the name of the class of each example, `[n]`; None where it is unknown.
      parts: the part of each, `[n]`.
      classes: names in label order; by default the sorted names of the training part.
      where: path of the file or folder.
      what: examples in messages: "images", "rows".

    Returns:
      int32 `[n]`, -1 where it is unknown, and the names in label order.

    Raises:
      DataUnavailable: one class alone, classes without a training example, more classes than
        half the training examples, or names that cannot be shown.
      ArgumentError: `classes` leaves some out.
    """
    given = checks.class_names(names_of(classes))
    present = {label for label in labels if label is not None}
    trained = {
        label
        for label, part in zip(labels, parts, strict=True)
        if part != "test" and label is not None
    }
    for name in sorted(present):
        if not name.isprintable():
            hint = "names of classes are printable text in UTF-8: rename it"
            raise DataUnavailable(f"the class {name!a} cannot be shown", where=where, hint=hint)
    n = len(labels)
    if len(present) > checks.MOST_CLASSES or (len(present) > 20 and 2 * len(present) > n):
        raise DataUnavailable(
            f"{len(present)} different labels in {n} {what}",
            where=where,
            hint="these look like identifiers or numbers to predict, not classes",
        )
    order = given or tuple(in_order(trained))
    unknown = sorted(present - set(order))
    if unknown and given:
        raise ArgumentError(
            f"the class {unknown[0]!r} of {where} is not among them",
            where="classes",
            hint=nearest(unknown[0], order),
        )
    if unknown:
        shown = ", ".join(map(repr, unknown[:5]))
        raise DataUnavailable(
            f"the test part alone has the class{'es' if len(unknown) > 1 else ''} {shown}",
            where=where,
            hint=f"add training {what} of it, or leave it out",
        )
    if len(present) < 2 and not given:
        raise DataUnavailable(
            f"all {n} {what} are of the class {next(iter(present), '')!r}",
            where=where,
            hint="at least two classes are needed",
        )
    numbers: dict[str | None, int] = {name: i for i, name in enumerate(order)} | {None: -1}
    return np.array([numbers[label] for label in labels], np.int32), order
