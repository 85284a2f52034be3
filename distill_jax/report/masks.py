"""Visible and predicted patches of masked methods."""

import math

import numpy as np

from distill_jax.report.folders import Run, read_arrays
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import muted, picture


def section(run: Run) -> Html | None:
    """Shows the contents of `masks.npz`; None if a run masks no image patches."""
    path, notes = run.path / "masks.npz", list[str]()
    if not path.exists():
        return None
    if not (arrays := read_arrays(path, "images", notes)):
        return muted(*notes) if notes else None
    images, hidden, predicted = (arrays[name] for name in ("images", "hidden", "predicted"))
    columns = {"image": images, "what the student sees": only(images, ~hidden)}
    sets = predicted.shape[1]
    for i in range(sets):
        name = f"block {i + 1} to predict" if sets > 1 else "what it has to predict"
        columns[name] = only(images, predicted[:, i])
    for name, pictures in zip(
        arrays.get("pictures_of", ()), arrays.get("pictures", ()), strict=True
    ):
        columns[str(name)] = pictures
    heads = [el("th", name, scope="col") for name in columns]
    rows = [
        el("tr", [el("td", picture(pictures[q], name)) for name, pictures in columns.items()])
        for q in range(len(images))
    ]
    return join(
        muted(
            f"{len(images)} training images, spread evenly, as a step sees them. The student does "
            f"not see {hidden.mean():.0%} of their patches."
        ),
        el(
            "div",
            el("table", el("thead", el("tr", heads)), el("tbody", rows), class_="neighbours masks"),
            class_="scroll fit",
        ),
    )


def only(images: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Returns images uint8 `[q, h, w, c]` with an alpha channel, 0 outside of patches `[q, t]`.

    One channel becomes three.
    """
    q, h, w, c = images.shape
    side = math.isqrt(h * w // shown.shape[1])
    grid = shown.reshape(q, h // side, w // side)
    alpha = grid.repeat(side, axis=1).repeat(side, axis=2)[..., None]
    colours = images[..., :3] if c >= 3 else images[..., :1].repeat(3, axis=-1)
    return np.concatenate([colours, np.where(alpha, 255, 0).astype(np.uint8)], axis=-1)
