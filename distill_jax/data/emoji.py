"""Emoji of Google's Noto font as colour images, by their nine categories of Unicode.

  npm pack emoji-datasource-google@16.0.0

writes the archive that `make` reads; its checksum is pinned. There are 1,906 images of 64 x 64
pixels, on white: one for each emoji, without variants of the skin. Emoji that begin with the same
code point, such as the men and the women of an occupation, are near-duplicates: all of them are in
one part. The images are drawings, not photographs.
"""

import functools
import hashlib
import io
import json
import pathlib
import tarfile
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core.api import Dataset
from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.data import shapes, source

SIDE = 64
COUNTS = {
    "Activities": 85,
    "Animals & Nature": 159,
    "Flags": 270,
    "Food & Drink": 131,
    "Objects": 264,
    "People & Body": 386,
    "Smileys & Emotion": 169,
    "Symbols": 224,
    "Travel & Places": 218,
}
"""Images of each category."""

SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
LICENCE = "Apache-2.0 (Noto Emoji, Google), packed by Cal Henderson under MIT"
HINT = "npm pack emoji-datasource-google@16.0.0"


class Emoji(NamedTuple):
    """Images uint8 `[n, 64, 64, 3]`, labels int32 `[n]` and the group of each, `[n]` texts."""

    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray


@functools.lru_cache(maxsize=1)
def read(path: pathlib.Path, stamp: int) -> Emoji:
    """Reads the archive; `stamp` is its time of change, which tells versions of a path apart.

    Raises:
      DataUnavailable: it is not the archive whose checksum is pinned.
    """
    del stamp
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        what = f"sha256 is {found[:16]}..., and that of the archive is {SHA256[:16]}..."
        raise DataUnavailable(what, where=str(path), hint=HINT)
    with tarfile.open(path) as archive:
        front = "package/img/google/64/"
        members = {
            member.name.removeprefix("package/"): archive.extractfile(member)
            for member in archive
            if member.isfile() and (member.name.startswith(front) or "emoji.json" in member.name)
        }
        contents = {name: file.read() for name, file in members.items() if file is not None}
    return chosen(contents)


def chosen(contents: dict[str, bytes]) -> Emoji:
    """Returns the emoji that `emoji.json` lists, from the files of the archive by name."""
    from PIL import Image

    rows: list[tuple[np.ndarray, str, str]] = []
    for entry in json.loads(contents["emoji.json"]):
        category, code = entry["category"], entry["unified"]
        if category not in COUNTS or not entry["has_img_google"]:
            continue
        drawn = Image.open(io.BytesIO(contents[f"img/google/64/{entry['image']}"])).convert("RGBA")
        white = Image.new("RGBA", drawn.size, "white")
        white.alpha_composite(drawn)
        group = code if category == "Flags" else code.partition("-")[0]
        rows.append((np.asarray(white.convert("RGB")), category, group))
    names = list(COUNTS)
    return Emoji(
        np.stack([image for image, _, _ in rows]),
        np.array([names.index(category) for _, category, _ in rows], np.int32),
        np.array([group for _, _, group in rows]),
    )


def shares(groups: np.ndarray, seed: int) -> np.ndarray:
    """Returns a number in [0, 1) for each group, drawn from its name, `[n]`."""
    digests = [hashlib.blake2b(f"{seed} {g}".encode(), digest_size=8).digest() for g in groups]
    return np.array([int.from_bytes(d, "big") / 2**64 for d in digests])


def make(*, path: str, test: float = 0.25, held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Reads the archive, see the module.

    Args:
      path: of the archive.
      test: share of the groups in the test part.
      held_out: share of the other groups that is held out.
      split_seed: seed of both.

    Raises:
      ArgumentError: a share outside [0, 1).
      DataUnavailable: the archive is absent or another one.
    """
    for name, share in (("test", test), ("held_out", held_out)):
        if not 0 <= share < 1 or (name == "test" and not share):
            raise ArgumentError(f"{name} is {share}", where=name, hint="a share of the emoji")
    place = source.existing(path, hint=HINT)
    emoji = read(place, place.stat().st_mtime_ns)
    drawn = shares(emoji.groups, split_seed)
    edges = (1 - test) * (1 - held_out), 1 - test
    which = np.digitize(drawn, edges)

    def part(name: str, index: int) -> Any:
        rows = np.flatnonzero(which == index)
        return source.make_array_source(
            emoji.images[rows],
            emoji.labels[rows],
            name=f"emoji ({name})",
            origin=HINT,
            licence=LICENCE,
        )

    parts = {name: part(name, i) for i, name in enumerate(("train", "held_out", "test"))}
    return Dataset(**parts, classes=tuple(COUNTS))


def spec(*, held_out: float = 0.1, test: float = 0.25, **unused: Any) -> Dataset:
    """Returns shapes in place of the images; the sizes are about right."""
    del unused
    return shapes.make_shapes(
        per_class=tuple(round(n * (1 - test)) for n in COUNTS.values()),
        n_test=round(sum(COUNTS.values()) * test),
        shape=(SIDE, SIDE, 3),
        held_out=held_out,
        classes=tuple(COUNTS),
    )
