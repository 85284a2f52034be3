"""Stored images with the predictions of the networks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.evaluators._logits import log_softmax
from distill_jax.report import figures
from distill_jax.report.folders import Run
from distill_jax.report.html import Html, el, join
from distill_jax.report.page import muted, picture

_PIXELS = 64  # edge of an image, at most


def section(
    run: Run, voters: Mapping[str, tuple[Run, str]], *, order: Sequence[str] = ()
) -> Html | None:
    """Shows stored images with the prediction of each voter (name -> run and role)."""
    if not run.roles or not {"images", "images_index", "index", "label"} <= set(run.arrays):
        return None
    images, where = run.array("images"), run.array("images_index")
    if images.ndim != 4 or images.dtype != np.uint8 or run.array("label").dtype.kind not in "iu":
        return None
    classes, label = run.classes, run.array("label")
    label = dict(zip(run.array("index").tolist(), label.tolist(), strict=False))
    keep = [j for j, i in enumerate(where.tolist()) if label.get(i) in range(len(classes))]
    votes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, (other, role) in voters.items():
        row = {index: j for j, index in enumerate(other.array("index").tolist())}
        if all(int(where[j]) in row for j in keep):
            logits = other.array(f"logits_{role}")
            rows = logits[[row[int(where[j])] for j in keep]].astype(np.float64)
            if rows.shape[1] == len(classes) and np.isfinite(rows).all():
                votes[name] = rows.argmax(axis=1), np.exp(log_softmax(rows).max(axis=1))
    if not keep or not votes:
        return None
    truth = np.array([label[int(where[j])] for j in keep])
    right = np.stack([choice == truth for choice, _ in votes.values()], axis=1)
    number = {name: i for i, name in enumerate(order)} or {n: i + 1 for i, n in enumerate(voters)}
    parts = []
    for title, chosen in _example_groups(right, list(votes)):
        # Most even splits first, then the most confident errors, since there the networks differ.
        doubt = np.stack([p for _, p in votes.values()], axis=1)
        split = np.abs(right[chosen].mean(axis=1) - 0.5)
        weight = np.where(right[chosen], 0, doubt[chosen]).mean(axis=1) - 2 * split
        chosen = chosen[np.argsort(-weight, kind="stable")][:8]
        cards = [
            card(
                images[keep[j]],
                truth=classes[truth[j]],
                index=int(where[keep[j]]),
                said=[
                    (n, number[n], classes[c[j]], float(p[j]), bool(c[j] == truth[j]))
                    for n, (c, p) in votes.items()
                ],
            )
            for j in chosen
        ]
        parts += [el("h3", title), el("div", cards, class_="examples")]
    return join(
        muted(
            f"Chosen for what they show among the {len(keep)} test examples stored with their "
            "images, so their error rates are not those of the test split."
        ),
        parts,
    )


def _example_groups(right: np.ndarray, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields titles and rows of `right` `[n, voters]`, without empty groups."""
    if len(names) == 2:
        a, b = names
        groups = [
            (f"{a} wrong, {b} right", ~right[:, 0] & right[:, 1]),
            (f"{a} right, {b} wrong", right[:, 0] & ~right[:, 1]),
            ("Both wrong", ~right.any(axis=1)),
            ("Both right", right.all(axis=1)),
        ]
    elif len(names) == 1:
        groups = [("Wrong", ~right[:, 0]), ("Right", right[:, 0])]
    else:
        some = right.any(axis=1) & ~right.all(axis=1)
        groups = [
            ("Some right, some wrong", some),
            ("All wrong", ~right.any(axis=1)),
            ("All right", right.all(axis=1)),
        ]
    for title, mask in groups:
        if mask.any():
            yield title, np.flatnonzero(mask)


def marked(text: str, ok: bool, **attributes: Any) -> Html:
    return el("span", ("✓ " if ok else "✗ ") + text, class_="good" if ok else "bad", **attributes)


def card(
    image: np.ndarray,
    *,
    truth: str,
    index: int,
    said: Sequence[tuple[str, int, str, float, bool]],
    kind: str = "test example",
    more: Any = None,
) -> Html:
    """Returns a card of an example with the predictions of the networks.

    Args:
      image: uint8 `[h, w, c]`.
      truth: name of its class.
      index: position in the source data.
      said: (network, colour number, class, probability, whether it is correct).
      kind: kind of example, for the alternative text.
      more: further content of the card.
    """
    stride = math.ceil(max(image.shape[:2]) / _PIXELS)
    image = image[::stride, ::stride]
    lines = [
        el(
            "li",
            el("span", el("span", class_="dot " + figures.colour(i)), name, title=name),
            marked(choice, ok, title=choice),
            el("span", f"{p:.0%}", class_="n"),
        )
        for name, i, choice, p, ok in said
    ]
    return el(
        "div",
        picture(image, f"{kind} {index}: {truth}"),
        el(
            "div",
            el("b", truth, el("span", f"index {index}", class_="muted")),
            el("ul", lines),
            more,
        ),
        class_="example",
    )
