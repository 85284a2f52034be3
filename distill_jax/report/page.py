"""The page, and the HTML components of its sections."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.report.figures import png
from distill_jax.report.html import Html, el
from distill_jax.report.wording import NONE, decimals, minus
from distill_jax.trainer.io.files import write_text


class _Section(NamedTuple):
    anchor: str
    title: str
    body: Html | None


def write(
    folder: Path,
    *,
    kicker: str,
    title: str,
    lead: Html,
    sections: Sequence[tuple[str, str, Html | None]],
    sources: str = "the files of this folder alone",
) -> Path:
    shown = [s for s in map(_Section._make, sections) if s.body]
    style = Html(Path(__file__).with_name("page.css").read_text(encoding="utf-8"))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", style),
    )
    links = [el("li", el("a", s.title, href=f"#{s.anchor}")) for s in shown]
    body = el(
        "body",
        el("a", "Skip to the content", href="#content", class_="skip"),
        el("header", el("p", kicker, class_="kicker"), el("h1", title), lead),
        el("nav", el("ul", links), aria_label="Sections"),
        el(
            "main",
            [
                el("section", el("h2", s.title, id=f"{s.anchor}-title"), s.body, id=s.anchor)
                for s in shown
            ],
            id="content",
        ),
        el("footer", f"Built by distill_jax from {sources}."),
    )
    path = folder / "report.html"
    write_text(path, f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n")
    return path


def tiles(entries: Sequence[tuple[str, Any]]) -> Html:
    items = [el("div", el("span", name), el("b", value), class_="tile") for name, value in entries]
    return el("div", items, class_="tiles")


def alert(title: str, lines: Sequence[str], *, stop: bool = False) -> Html | None:
    if not lines:
        return None
    items = [el("li", line) for line in lines]
    return el("div", el("b", title), el("ul", items), class_="alert stop" if stop else "alert")


def figure(title: str, plot: Html | None, caption: str = "", *, legend: Html | None = None) -> Html:
    text = el("figcaption", caption) if caption else None
    # On a narrow screen a figure scrolls, which the keyboard can do only where it is focused.
    reached = 0 if plot is not None else None
    return el("figure", el("h3", title), plot, legend, text, tabindex=reached)


def grid(items: Sequence[Html]) -> Html:
    """Returns items in two columns; a single item also has half the width."""
    return el("div", items, class_="grid2" if len(items) > 1 else "grid2 one")


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Html]],
    *,
    refs: Sequence[bool] = (),
    numeric: bool = True,
) -> Html:
    """Returns a table; columns after the first are numbers if `numeric`."""
    top = [
        el("th", head, scope="col", class_="n" if numeric and i else None) if head else el("td")
        for i, head in enumerate(heads)
    ]
    marks = refs or [False] * len(rows)
    body = [el("tr", row, class_="ref" if m else None) for row, m in zip(rows, marks, strict=True)]
    return el(
        "div",
        el("table", el("thead", el("tr", top)), el("tbody", body)),
        class_="scroll fit" if len(heads) < 4 and numeric else "scroll",
        tabindex=0,  # so that the keyboard can scroll it
        role="group",
        aria_label="Table: " + (", ".join(map(str, filter(None, heads))) or "values"),
    )


def row(name: str, cells: Iterable[Any]) -> list[Html]:
    """Returns a row of `table`: its name, and cells of numbers."""
    return [el("th", name, scope="row"), *(el("td", cell, class_="n") for cell in cells)]


def spread(values: Sequence[float] | None, digits: int | None = None) -> str:
    """Returns mean ± standard deviation of values, by default with `decimals` of the mean."""
    if not values:
        return NONE
    mean = float(np.mean(values))
    digits = decimals(mean) if digits is None else digits
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return minus(f"{mean:.{digits}f}") + deviation


def muted(*text: Any) -> Html:
    return el("p", *text, class_="muted")


def picture(image: np.ndarray, alt: str) -> Html:
    """Returns an image uint8 `[h, w, c]`; for other numbers of channels, the first."""
    return el("img", src=png(image if image.shape[2] in (1, 3, 4) else image[..., :1]), alt=alt)
