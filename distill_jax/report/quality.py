"""Calibration and confusion of stored logits."""

from collections.abc import Mapping, Sequence

import numpy as np

from distill_jax.report import figures
from distill_jax.report.figures import Html, el, join
from distill_jax.report.page import figure, num_cell, table

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
    plot = figures.reliability_diagram({number[n]: (n, t) for n, (_, t) in tables.items()})
    rows = [
        [
            el("th", el("span", class_="dot " + figures.colour(number[n])), n, scope="row"),
            *(num_cell(metrics[name]) for name in QUALITY),
        ]
        for n, (metrics, _) in tables.items()
    ]
    text = (
        "Points on the dashed line are calibrated; below it the network is overconfident. Larger "
        "points hold more test examples."
    )
    side = join(
        table(["", *QUALITY.values()], rows),
        el(
            "p",
            "Of the stored logits of the test split, in 15 bins. Higher accuracy is better, lower "
            "in the other columns. " + note,
            class_="muted",
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
    plot = figures.confusion_chart(counts, classes=classes, i=i) if k <= 256 else None
    wrong = counts * (1 - np.eye(k, dtype=int))
    worst = [np.unravel_index(j, (k, k)) for j in np.argsort(-wrong, axis=None, kind="stable")[:4]]
    said = [f"{classes[r]} as {classes[c]} ({wrong[r, c]})" for r, c in worst if wrong[r, c]]
    text = f"Most frequent errors: {', '.join(said)}." if said else "No errors."
    return figure(
        title,
        plot,
        text + f" Shade is the {'share' if k <= 20 else 'square root of the share'} of the row.",
    )
