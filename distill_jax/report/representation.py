"""What the embeddings of a run look like: a map, neighbours and spectra."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_jax.report import figures
from distill_jax.report.figures import Html, el, join
from distill_jax.report.folders import Run, read_arrays
from distill_jax.report.page import figure, grid
from distill_jax.report.wording import fmt

ROUNDING = 1e-10
"""Eigenvalues below this share of the largest are rounding of what they were computed from."""

CLASSES = 2 * figures.COLOURS
"""So many classes have a mark of their own on the map; of more, the largest do."""


def section(run: Run) -> Html | None:
    """Shows what `embeddings.npz` holds; None where a run has no embeddings."""
    path, notes = run.path / "embeddings.npz", list[str]()
    if not path.exists():
        return None
    if not (arrays := read_arrays(path, "embedding", notes)):
        return el("p", *notes, class_="muted") if notes else None
    z, label = arrays["embedding"].astype(np.float64), arrays["label"]
    if not np.isfinite(z).all() or label.dtype.kind not in "iu" or len(z) < 2:
        return None
    names = run.result.get("classes") or ()
    names = {i: str(names[i]) if i < len(names) else str(i) for i in range(int(label.max()) + 1)}
    plots = [_map(z, label, arrays["index"], names), _spectra(arrays)]
    return join(
        el("p", f"Of the output {arrays['encoder']} on the test split.", class_="muted"),
        grid([plot for plot in plots if plot]),
        _neighbours(arrays, names),
    )


def principal_components(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first two principal components `[n, 2]` of rows `[n, d]` and their shares `[2]`.

    Each has its largest entry positive. Of a single dimension the second component is 0.
    """
    u, s, _ = np.linalg.svd(z - z.mean(axis=0), full_matrices=False)
    share = s**2 / max((s**2).sum(), np.finfo(np.float64).tiny)
    if len(s) < 2:
        u, s, share = np.hstack([u, 0 * u]), np.r_[s, 0.0], np.r_[share, 0.0]
    found = u[:, :2] * s[:2]
    largest = found[np.abs(found).argmax(axis=0), np.arange(2)]
    return found * np.where(largest < 0, -1, 1), share[:2]


def _map(z: np.ndarray, label: np.ndarray, index: np.ndarray, names: Mapping[int, str]) -> Html:
    xy, share = principal_components(z)
    classes, counts = np.unique(label, return_counts=True)
    named = np.sort(classes[np.argsort(-counts, kind="stable")[:CLASSES]])
    clouds = [
        figures.Cloud(
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
    plot = figures.scatter_plot(clouds, x_label=axes[0], y_label=axes[1], alt=text)
    return figure("Map", plot, text, legend=figures.marks_key([cloud.name for cloud in clouds]))


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
        el(
            "p",
            f"{len(images)} test images, spread evenly over the split, and the test images whose "
            f"embeddings are nearest to theirs; {same:.0%} of these are of the same class.",
            class_="muted",
        ),
        el(
            "div",
            el("table", el("thead", el("tr", heads)), body, class_="neighbours"),
            class_="scroll fit",
        ),
    )


def _cell(image: np.ndarray, name: str, cosine: Any, same: bool, j: int) -> Html:
    image = image if image.shape[2] in (1, 3, 4) else image[..., :1]
    picture = el("img", src=figures.png(image), alt=f"neighbour {j}: {name}" if j else name)
    if j == 0:
        return el("th", picture, el("span", name), scope="row")
    mark = ("✓ " if same else "✗ ") + name
    text = el("span", mark, class_="good" if same else "bad"), el("span", fmt(float(cosine)))
    return el("td", picture, *text)
