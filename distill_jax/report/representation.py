"""Embeddings of a run: a map, neighbours and spectra."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.report import figures
from distill_jax.report.examples import marked
from distill_jax.report.folders import Run, read_arrays
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import figure, grid, muted, picture
from distill_jax.report.wording import fmt

ROUNDING = 1e-10
"""Eigenvalues below this share of the largest are rounding error."""

CLASSES = 2 * figures.COLOURS
"""Maximum number of classes with their own mark on the map; the largest are chosen."""


def section(run: Run) -> Html | None:
    """Shows the contents of `embeddings.npz`; None if a run has no embeddings."""
    path, notes = run.path / "embeddings.npz", list[str]()
    if not path.exists():
        return None
    if not (arrays := read_arrays(path, "embedding", notes)):
        return muted(*notes) if notes else None
    z, label = arrays["embedding"].astype(np.float64), arrays["label"]
    if not np.isfinite(z).all() or label.dtype.kind not in "iu" or len(z) < 2:
        return None
    names = run.result.get("classes") or ()
    names = {i: str(names[i]) if i < len(names) else str(i) for i in range(int(label.max()) + 1)}
    plots = [_map(z, label, arrays["index"], names), _spectra(arrays)]
    return join(
        muted(f"Of the output {arrays['encoder']} on the test split."),
        grid([plot for plot in plots if plot]),
        _neighbours(arrays, names),
    )


def principal_components(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first two principal components `[n, 2]` of rows `[n, d]` and their shares `[2]`.

    The largest entry of each is positive. For a single dimension the second component is 0.
    """
    u, s, _ = np.linalg.svd(z - z.mean(axis=0), full_matrices=False)
    share = s**2 / max((s**2).sum(), np.finfo(np.float64).tiny)
    if len(s) < 2:
        u, s, share = np.hstack([u, 0 * u]), np.r_[s, 0.0], np.r_[share, 0.0]
    projected = u[:, :2] * s[:2]
    largest = projected[np.abs(projected).argmax(axis=0), np.arange(2)]
    return projected * np.where(largest < 0, -1, 1), share[:2]


def _map(z: np.ndarray, label: np.ndarray, index: np.ndarray, names: Mapping[int, str]) -> Html:
    xy, share = principal_components(z)
    classes, counts = np.unique(label, return_counts=True)
    named = np.sort(classes[np.argsort(-counts, kind="stable")[:CLASSES]])
    clouds = [
        Cloud(
            name=names[int(c)],
            points=xy[label == c],
            said=[f"{names[int(c)]}, index {i}" for i in index[label == c].tolist()],
        )
        for c in named
    ]
    left = len(classes) - len(named)
    axes = [f"component {i + 1} ({share[i]:.0%} of the variance)" for i in range(2)]
    text = f"The first two principal components of {len(z):,} test embeddings, by class."
    if left:
        text += f" Of {left} further classes no point is drawn."
    plot = scatter_plot(clouds, x_label=axes[0], y_label=axes[1], alt=text)
    return figure("Map", plot, text, legend=marks_key([cloud.name for cloud in clouds]))


def _spectra(arrays: Mapping[str, np.ndarray]) -> Html | None:
    if "spectra" not in arrays or "spectra_of" not in arrays:
        return None
    series = {}
    for i, (name, values) in enumerate(zip(arrays["spectra_of"], arrays["spectra"], strict=True)):
        least = ROUNDING * np.max(values, initial=0.0, where=np.isfinite(values))
        positive = np.flatnonzero(np.isfinite(values) & (values > least))
        if len(positive) > 1:
            series[i] = figures.Series(name=str(name), x=positive + 1.0, y=values[positive])
    if not series:
        return None
    plot = figures.line_chart(series, y_label="eigenvalue", x_label="rank", log=True, log_x=True)
    text = (
        "Eigenvalues of the covariance, the largest first, both axes logarithmic. A steep fall is "
        "a representation of few dimensions; what is 0 but for rounding is not drawn. Parts of "
        "fewer examples than dimensions end early."
    )
    legend = figures.key({i: s.name for i, s in series.items()})
    return figure("Spectrum", plot, text, legend=legend)


def _neighbours(arrays: Mapping[str, np.ndarray], names: Mapping[int, str]) -> Html | None:
    if "neighbour_images" not in arrays:
        return None
    images, label, cosine = (
        arrays[name] for name in ("neighbour_images", "neighbour_label", "cosine")
    )
    said = {i: names.get(i, str(i)) for i in np.unique(label).tolist()}
    rows = [
        [
            _cell(images[q, j], said[int(label[q, j])], cosine[q, j], label[q, j] == label[q, 0], j)
            for j in range(images.shape[1])
        ]
        for q in range(len(images))
    ]
    heads = [el("th", "test image", scope="col")]
    heads.append(el("th", "nearest others, by cosine", scope="col", colspan=images.shape[1] - 1))
    same = float((label[:, 1:] == label[:, :1]).mean())
    body = el("tbody", [el("tr", row) for row in rows])
    return join(
        el("h3", "Neighbours", class_="block"),
        muted(
            f"{len(images)} test images, spread evenly over the split, and the test images whose "
            f"embeddings are nearest to theirs; {same:.0%} of these are of the same class."
        ),
        el(
            "div",
            el("table", el("thead", el("tr", heads)), body, class_="neighbours"),
            class_="scroll fit",
        ),
    )


def _cell(image: np.ndarray, name: str, cosine: Any, same: bool, j: int) -> Html:
    shown = picture(image, f"neighbour {j}: {name}" if j else name)
    if j == 0:
        return el("th", shown, el("span", name), scope="row")
    return el("td", shown, marked(name, same), el("span", fmt(float(cosine))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cloud:
    """Points `[n, 2]` with a common mark, and the tooltip of each."""

    name: str
    points: np.ndarray
    said: Sequence[str]


def mark(i: int) -> str:
    """Returns the class of the points of the i-th cloud: filled, then open, in every colour."""
    return ("ring " if i // figures.COLOURS % 2 else "point ") + figures.colour(i)


def scatter_plot(clouds: Sequence[Cloud], *, x_label: str, y_label: str, alt: str) -> Html:
    """Draws points, with equal scales on both axes.

    Args:
      clouds: finite points, at least one; the i-th has the i-th `mark`.
      x_label: name of the horizontal axis.
      y_label: name of the vertical axis.
      alt: the alternative text.
    """
    xy = np.concatenate([cloud.points for cloud in clouds])
    middle, half = (xy.max(0) + xy.min(0)) / 2, float(np.ptp(xy, axis=0).max()) * 0.54 or 1.0
    ranges = [(float(m) - half, float(m) + half) for m in middle]
    panel = figures.Panel(x_range=ranges[0], y_range=ranges[1], height=figures.WIDTH - 80 + 58)
    marks = [panel.frame(x_label=x_label, y_label=y_label)]
    for i, cloud in enumerate(clouds):
        rows = zip(cloud.points.tolist(), cloud.said, strict=True)
        for (x, y), said in rows:
            at = {"cx": float(panel.x(x)), "cy": float(panel.y(y)), "r": 3.2}
            marks.append(el("circle", el("title", said), **at, class_=mark(i)))
    return panel.svg(*marks, alt=alt)


def marks_key(names: Sequence[str]) -> Html:
    """Returns the legend of `scatter_plot`."""

    def item(i: int, name: str) -> Html:
        dot = el("circle", cx=6, cy=6, r=4, class_=mark(i))
        picture = el("svg", dot, viewBox="0 0 12 12", width=12, aria_hidden="true", class_="mark")
        return el("li", picture, name)

    return el("ul", [item(i, name) for i, name in enumerate(names)], class_="key")
