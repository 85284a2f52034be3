"""Calibration and confusion of stored logits."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from distill_jax.report.figures import WIDTH, Panel, colour, dash, png, points, shortened
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import figure, muted, row, table
from distill_jax.report.wording import fmt

QUALITY = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "ece_adaptive": "adaptive ECE",
    "aurc": "AURC",
}


def calibration_panel(
    tables: Mapping[str, tuple[Mapping[str, float], np.ndarray]],
    *,
    note: str = "",
    order: Sequence[str] = (),
) -> Html | None:
    if not tables:
        return None
    number = {name: i for i, name in enumerate(order or tables)}
    number = number if order else {name: i + 1 for name, i in number.items()}
    plot = reliability_diagram({number[n]: (n, t) for n, (_, t) in tables.items()})
    rows = [
        row(
            join(el("span", class_="dot " + colour(number[n])), n),
            (fmt(metrics[name]) for name in QUALITY),
        )
        for n, (metrics, _) in tables.items()
    ]
    text = (
        "Points on the dashed line are calibrated; below it the network is overconfident. Larger "
        "points hold more test examples."
    )
    side = join(
        table(["", *QUALITY.values()], rows),
        muted(
            "Of the stored logits of the test split, in 15 bins. Higher accuracy is better, lower "
            "in the other columns. " + note
        ),
    )
    return el(
        "div",
        figure("Reliability diagram", plot, text),
        el("div", el("h3", "Accuracy and calibration"), side, class_="panel"),
        class_="grid2",
    )


def pooled(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the reliability table of all examples of several tables `[bins, 5]`."""
    count = sum(t[:, 2] for t in tables)
    filled = np.where(count > 0, count, np.nan)
    sums = (sum(np.nan_to_num(t[:, c]) * t[:, 2] for t in tables) / filled for c in (3, 4))
    return np.stack([tables[0][:, 0], tables[0][:, 1], count, *sums], axis=1)


def confusion_panel(counts: np.ndarray, classes: Sequence[str], title: str, i: int) -> Html:
    k = len(counts)
    plot = confusion_chart(counts, classes=classes, i=i) if k <= 256 else None
    wrong = counts * (1 - np.eye(k, dtype=int))
    worst = [np.unravel_index(j, (k, k)) for j in np.argsort(-wrong, axis=None, kind="stable")[:4]]
    said = [f"{classes[r]} as {classes[c]} ({wrong[r, c]})" for r, c in worst if wrong[r, c]]
    text = f"Most frequent errors: {', '.join(said)}." if said else "No errors."
    return figure(
        title,
        plot,
        text + f" Shade is the {'share' if k <= 20 else 'square root of the share'} of the row.",
    )


def reliability_diagram(tables: Mapping[int, tuple[str, np.ndarray]]) -> Html:
    """Draws accuracy over confidence; larger points hold more examples.

    Args:
      tables: (name, `[bins, 5]` of `evaluators.calibration.reliability_table`) by colour number.
    """
    panel = Panel(x_range=(0.0, 1.0), y_range=(0.0, 1.0), height=440)
    (x0, x1), (y0, y1) = panel.x([0, 1]), panel.y([0, 1])
    marks = [
        panel.frame(x_label="confidence", y_label="accuracy"),
        el("line", x1=float(x0), y1=float(y0), x2=float(x1), y2=float(y1), class_="zero"),
    ]
    for i, (_, bins) in tables.items():
        filled = bins[bins[:, 2] > 0]
        x, y = panel.x(filled[:, 3]), panel.y(filled[:, 4])
        marks.append(
            el(
                "polyline",
                points=points(x, y),
                class_="curve thin " + colour(i),
                stroke_dasharray=dash(i),
            )
        )
    for i, (name, bins) in tables.items():
        for _, _, count, confidence, accuracy in bins[bins[:, 2] > 0]:
            tip = f"{name}: confidence {confidence:.3f}, accuracy {accuracy:.3f}, n = {count:.0f}"
            marks.append(
                el(
                    "circle",
                    el("title", tip),
                    cx=float(panel.x(confidence)),
                    cy=float(panel.y(accuracy)),
                    r=2.5 + 16 * math.sqrt(count / bins[:, 2].sum()),
                    class_="bubble " + colour(i),
                )
            )
    names = ", ".join(name for name, _ in tables.values())
    return panel.svg(*marks, alt=f"Reliability diagram of {names}; the diagonal is perfect.")


def confusion_chart(counts: np.ndarray, *, classes: Sequence[str], i: int = 0) -> Html:
    """Draws a confusion matrix `[k, k]`, rows are labels, shaded by share of the row.

    Counts are written up to 12 classes. Above 20 the cells are one image without names, shaded by
    the square root of the share, since single errors would be too pale to see.

    Args:
      counts: int `[k, k]`.
      classes: k names.
      i: colour number.
    """
    k = len(counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [shortened(name, 12) for name in classes]
    named = k <= 20
    left = 36 + 7 * max(map(len, names)) if named else 36
    size = WIDTH - left - 8
    foot = (36 if max(map(len, names)) * 7.5 < size / k else 20 + 6 * max(map(len, names))) + 14
    foot = foot if named else 34
    panel = Panel(
        x_range=(0, k), y_range=(0, k), height=8 + size + foot, left=left, top=8, foot=foot
    )
    marks = []
    cell = size / k
    if named:
        for r, c in np.ndindex(k, k):
            x, y = left + c * cell, 8 + r * cell
            tip = f"{classes[r]} as {classes[c]}: {counts[r, c]} ({share[r, c]:.1%} of the row)"
            box = {"x": x, "y": y, "width": cell - 1.5, "height": cell - 1.5, "rx": 2}
            marks.append(el("rect", **box, class_="cell"))
            fill = {"fill_opacity": round(0.6 * float(share[r, c]), 3), "class_": colour(i)}
            marks.append(el("rect", el("title", tip), **box, **fill))
            if k <= 12 and counts[r, c]:
                strong = "count strong" if share[r, c] > 0.5 else "count"
                at = {"x": x + cell / 2, "y": y + cell / 2 + 4, "class_": strong}
                marks.append(el("text", str(counts[r, c]), **at))
        flat = max(map(len, names)) * 7.5 < cell
        for j, name in enumerate(names):
            middle = (j + 0.5) * cell
            at = {"x": left - 8, "y": 8 + middle + 4, "text_anchor": "end"}
            marks.append(el("text", name, **at))
            x, y = left + middle, 8 + size + 16
            turn = None if flat else f"rotate(-40 {x:.1f} {y:.1f})"
            anchor = "middle" if flat else "end"
            marks.append(el("text", name, x=x, y=y, text_anchor=anchor, transform=turn))
    else:
        shade = np.concatenate(
            [np.full((k, k, 3), 128, np.uint8), (255 * np.sqrt(share))[..., None].astype(np.uint8)],
            axis=2,
        )
        box = {"x": left, "y": 8, "width": size, "height": size}
        marks.append(el("rect", **box, class_="cell"))
        marks.append(el("image", **box, href=png(shade), class_="pixels"))
    marks.append(
        el("text", "predicted", x=left + size / 2, y=panel.height - 6, class_="axis middle")
    )
    turn = f"rotate(-90 14 {8 + size / 2:.0f})"
    marks.append(el("text", "label", x=14, y=8 + size / 2, transform=turn, class_="axis middle"))
    right = counts.trace() / max(counts.sum(), 1)
    return panel.svg(*marks, alt=f"Confusion matrix of {k} classes, {right:.1%} on the diagonal.")
