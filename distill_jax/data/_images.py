"""Image files decoded by Pillow into uint8 arrays of one shape, in memory or when they are read."""

import concurrent.futures
import contextlib
import dataclasses
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError, DataUnavailable, nearest, text_of
from distill_jax.data import _splits, checks, source
from distill_jax.data import labels as labels_lib

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MODES = {"grey": 1, "rgb": 3, "rgba": 4}
FITS = ("crop", "stretch", "pad")
ON_ERROR = ("refuse", "skip")

MOST_PIXELS = 2**26
"""Images with more pixels than this are not decoded unless the caller allows it."""

RESIDENT_BYTES = 2**30
"""Decoded images up to this size are held in memory; others are decoded when they are read."""

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

LOOKED_AT = 256
"""Images, evenly spaced, whose headers tell whether there is colour."""


class Undecodable(ValueError):
    """Content that is no image of `FORMATS`, is damaged, or does not have the shape of the set."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """Turns the content of an image file into uint8 `[h, w, c]`.

    The orientation in EXIF is applied. Channels of 16 bits are reduced to 8. Only the first frame
    of an animation is read. Transparent pixels are laid over black, unless there are four channels.

    Attributes:
      channels: 1 (luminance), 3 or 4.
      size: height and width; None keeps those of the image.
      fit: how an image is resized: "crop" cuts out the centre with the right aspect and scales it,
        "stretch" changes the aspect, "pad" scales it to fit and fills up with black.
      most_pixels: images with more pixels are rejected before decoding.
      shape: `[h, w]` that every image must have where `size` is None.
    """

    channels: int
    size: tuple[int, int] | None
    fit: str
    most_pixels: int
    shape: tuple[int, int] | None = None

    def __call__(self, content: bytes | Path) -> np.ndarray:
        """Decodes one image.

        Raises:
          Undecodable: see the class.
        """
        with open_image(content, self.most_pixels) as image, _explained():
            if self.size is not None:
                # libjpeg skips pixels of large JPEGs; a gap of 2 to the final size, Pillow's own in
                # `thumbnail`, leaves the resampling all that it can see. Other formats do nothing.
                least = 2 * max(self.size)
                image.draft(image.mode, (least, least))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            image = self._sized(_to_channels(image, self.channels))
            pixels = np.asarray(image, np.uint8).reshape(image.height, image.width, -1)
        if self.shape is not None and pixels.shape[:2] != self.shape:
            raise Undecodable(
                f"is {pixels.shape[0]} x {pixels.shape[1]}, others are "
                f"{self.shape[0]} x {self.shape[1]}: set size to bring all to one size"
            )
        return pixels

    def _sized(self, image: Image.Image) -> Image.Image:
        if self.size is None:
            return image
        box, method = (self.size[1], self.size[0]), Image.Resampling.BILINEAR
        if image.size == box:
            return image
        if self.fit == "stretch":
            return image.resize(box, method)
        return (ImageOps.fit if self.fit == "crop" else ImageOps.pad)(image, box, method)


class _explained:
    """Turns whatever Pillow raises about damaged content into one `Undecodable`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Undecodable) or not isinstance(error, Exception):
            return
        text = text_of(error, most=80) or type(error).__name__
        raise Undecodable(f"is damaged: {text}") from error


@contextlib.contextmanager
def open_image(content: bytes | Path, most_pixels: int) -> Iterator[Image.Image]:
    """Opens an image and reads its header only.

    Raises:
      Undecodable: no image of `FORMATS`, or one with more pixels than allowed.
    """
    try:
        file: IO[bytes] = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
    except OSError as error:
        raise Undecodable(f"cannot be read: {error.strerror}") from error
    with file:
        start = file.read(512)
        file.seek(0)
        if not start:
            raise Undecodable("is empty")
        try:
            with _explained():
                image = Image.open(file, formats=FORMATS)
        except Undecodable as error:
            if isinstance(error.__cause__, _BOMBS):
                raise Undecodable(f"has more than {most_pixels} pixels") from error
            page = start.lstrip().lower().startswith((b"<!doctype html", b"<html"))
            what = "is a web page" if page else "is not a PNG, JPEG, WebP or BMP image"
            raise Undecodable(what) from error
        if image.width * image.height > most_pixels:
            raise Undecodable(
                f"has {image.width} x {image.height} pixels, and most_pixels is {most_pixels}"
            )
        yield image


def _to_channels(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion clips them
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
    if channels == 4:
        return image.convert("RGBA")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)  # a conversion copies in any case


def make_decoder(
    contents: Sequence[bytes | Path],
    *,
    size: int | Sequence[int],
    mode: str,
    fit: str,
    most_pixels: int,
) -> Decoder:
    """Returns the decoder of a set of images.

    Args:
      contents: all images; the first readable one sets the shape where there is no `size`.
      size: side, or height and width; 0 where all images have the same size already.
      mode: "grey", "rgb", "rgba", or "auto": "grey" where `LOOKED_AT` of the images, evenly spaced,
        have no colour, else "rgb".
      fit: see `Decoder`.
      most_pixels: see `Decoder`.

    Raises:
      ArgumentError: an invalid argument.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(s, int) and 0 <= s <= 2**14 for s in sides):
        hint = "one side, or height and width, up to 16384"
        raise ArgumentError(f"size is {size}", where="size", hint=hint)
    for where, value, options in (("mode", mode, ("auto", *MODES)), ("fit", fit, FITS)):
        if value not in options:
            hint = nearest(value, options)
            raise ArgumentError(f"{where} is {value!r}", where=where, hint=hint)
    if most_pixels < 1:
        raise ArgumentError(f"most_pixels is {most_pixels}", where="most_pixels", hint="at least 1")
    decoder = Decoder(
        channels=MODES.get(mode, 3),
        size=(sides[0], sides[1]) if min(sides) else None,
        fit=fit,
        most_pixels=most_pixels,
    )
    if mode == "auto":
        looked = [contents[i] for i in checks.spread(len(contents), LOOKED_AT)]
        if not any(_has_colour(content, most_pixels) for content in looked):
            decoder = dataclasses.replace(decoder, channels=1)
    if decoder.size is None:
        for content in contents:
            try:
                shape = decoder(content).shape[:2]
            except Undecodable:
                continue
            return dataclasses.replace(decoder, shape=(shape[0], shape[1]))
    return decoder


def _has_colour(content: bytes | Path, most_pixels: int) -> bool:
    try:
        with open_image(content, most_pixels) as image:
            if image.mode == "P":
                with _explained():
                    palette = np.array(image.getpalette() or []).reshape(-1, 3)
                return bool((palette != palette[:, :1]).any())
            return image.mode not in ("1", "L", "LA", "La") and not image.mode.startswith("I")
    except Undecodable:
        return False


class EncodedImages:
    """Images that are decoded whenever they are read.

    Args:
      contents: `[n]`, files or their bytes.
      labels: int32 `[n]`, or labels of another `task`.
      decoder: of all of them.
      provenance: where they came from.
      names: names of the images, `[n]`, for messages.
      task: what labels are; see `labels`.
      ignore_label: the value that stands for an unknown label.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        contents: Sequence[bytes | Path],
        labels: np.ndarray,
        decoder: Decoder,
        provenance: Provenance,
        names: Sequence[str],
        *,
        task: str = "classification",
        ignore_label: float | None = None,
    ):
        self.contents, self.decoder, self.provenance = contents, decoder, provenance
        self.names = names
        labels, self.more = labels_lib.read_soft(labels, task, where=provenance.origin)
        self.labels, labelled = labels_lib.read_labels(
            labels,
            task=task,
            ignore_label=ignore_label,
            name=provenance.name,
            where=provenance.origin,
        )
        if labelled is not None:
            self.more["labelled"] = labelled

    def __len__(self) -> int:
        return len(self.contents)

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns `input` uint8 `[b, h, w, c]` and `label`, int32 `[b]` or float32 `[b, m]`.

        Raises:
          DataUnavailable: a file that cannot be decoded or no longer exists.
        """
        images = []
        for i in np.asarray(indices).tolist():
            try:
                images.append(self.decoder(self.contents[i]))
            except Undecodable as error:
                raise DataUnavailable(
                    f"{self.names[i]!r} {error}",
                    where=self.provenance.origin,
                    hint="on_error=skip decodes all files once at the start and leaves such out",
                ) from error
        more = {name: array[indices] for name, array in self.more.items()}
        return {"input": np.stack(images), "label": self.labels[indices], **more}


def decode(
    contents: Sequence[bytes | Path], decoder: Decoder, *, keep: bool
) -> tuple[np.ndarray | None, dict[int, str]]:
    """Decodes all images on threads.

    Args:
      contents: files or their bytes.
      decoder: of all of them.
      keep: whether the images are returned, or only tried.

    Returns:
      uint8 `[n, h, w, c]`, zeros where an image cannot be decoded, or None; and the error of each
      of those images, by position.
    """
    shape = decoder.size or decoder.shape or (1, 1)
    images = np.zeros((len(contents), *shape, decoder.channels), np.uint8) if keep else None
    errors: dict[int, str] = {}

    def one(i: int) -> None:
        try:
            pixels = decoder(contents[i])
            if images is not None:
                images[i] = pixels
        except Undecodable as error:
            errors[i] = str(error)

    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(one, range(len(contents))):
            pass
    return images, dict(sorted(errors.items()))


def decoded_bytes(n: int, decoder: Decoder) -> int:
    """Returns the bytes of n decoded images."""
    return n * math.prod(decoder.size or decoder.shape or (1, 1)) * decoder.channels


def describe(errors: Iterable[tuple[str, str]], *, most: int = 5) -> str:
    """Lists names of files and what is wrong with them; similar ones are counted beyond `most`."""
    rows = list(errors)
    text = "; ".join(f"{name!r} {what}" for name, what in rows[:most])
    if len(rows) > most:
        kinds = Counter(what for _, what in rows[most:])
        rest = ", ".join(f"{count} {what}" for what, count in kinds.most_common(3))
        text += f"; and {len(rows) - most} more: {rest}"
    return text


def make_dataset(
    contents: Sequence[bytes | Path],
    labels: np.ndarray,
    parts: np.ndarray,
    *,
    names: Sequence[str],
    classes: Sequence[str],
    decoder: Decoder,
    on_error: str,
    resident_bytes: int,
    provenance: Provenance,
    checksum: Callable[[np.ndarray], str],
    notes: Sequence[str] = (),
    task: str = "classification",
    ignore_label: float | None = None,
    held_out: float,
    split_seed: int,
) -> Dataset:
    """Decodes images, or prepares to, and divides them into parts.

    Args:
      contents: `[n]`, files or their bytes.
      labels: int32 `[n]`, or labels of another task.
      parts: of the images, `[n]`: see `_splits.settle`.
      names: `[n]`, for messages.
      classes: names in label order.
      decoder: of all of them.
      on_error: "refuse" or "skip".
      resident_bytes: largest total size of decoded images that are held in memory.
      provenance: provenance of all images; name, number and checksum are replaced.
      checksum: function that returns the checksum of the images at given positions.
      notes: what was left out earlier, one line each.
      task: what labels are.
      ignore_label: the value that stands for an unknown label.
      held_out: share of the training part to hold out where `parts` has no held-out part.
      split_seed: seed of that split.

    Raises:
      DataUnavailable: images that cannot be decoded, listed; or none that can.
    """
    _splits.check_filled(parts, where=provenance.origin, what="images")
    resident = decoded_bytes(len(contents), decoder) <= resident_bytes
    sources, errors = {}, {}
    rows = {"train": np.flatnonzero(parts != "test"), "test": np.flatnonzero(parts == "test")}
    for part, own in rows.items():
        images, bad = None, {}
        if resident or on_error == "skip":
            images, bad = decode([contents[i] for i in own.tolist()], decoder, keep=resident)
        errors |= {names[int(own[i])]: what for i, what in bad.items()}
        good = np.setdiff1d(np.arange(len(own)), list(bad))
        rows[part] = own = own[good]
        if not len(own):
            raise DataUnavailable(
                f"no image of the {part} part can be read: {describe(errors.items())}",
                where=provenance.origin,
            )
        title = f"{provenance.name} ({part})"
        p = provenance._replace(name=title, n=len(own), sha256=checksum(own))
        known = {"task": task, "ignore_label": ignore_label}
        if images is None:
            own_contents = [contents[i] for i in own.tolist()]
            own_names = [names[int(i)] for i in own]
            made = EncodedImages(own_contents, labels[own], decoder, p, own_names, **known)
        else:
            made = source.ArraySource(images[good] if bad else images, labels[own], p, **known)
        sources[part] = made
    if errors:
        what = f"{len(errors)} of {len(contents)} images cannot be read: {describe(errors.items())}"
        if on_error == "refuse":
            hint = "mend or remove them, or set on_error=skip to leave them out"
            raise DataUnavailable(what, where=provenance.origin, hint=hint)
        notes = [*notes, f"left out: {what}"]
    sources["train"].notes = tuple(f"{provenance.origin}: {note}" for note in notes)
    return source.make_dataset(
        sources["train"],
        sources["test"],
        held=_splits.held(parts[rows["train"]]),
        held_out=held_out,
        split_seed=split_seed,
        classes=classes,
        task=task,
    )
