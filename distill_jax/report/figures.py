"""Figures as inline SVG that follow the page's theme.

Colours are the classes `c0`, `c1`, ... of `report/page.css`; this module defines no colours.
"""

import base64
import dataclasses
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.report.html import Html, el, join

WIDTH, COLOURS = 560, 8
_DASHES = ("none", "7 4", "2 3", "9 3 2 3")


def colour(i: int | None) -> str:
    """Returns the CSS class of the i-th colour; repeated colours differ in the dashes of lines.

    None gives the pale grey of elements without a colour of their own.
    """
    return "pale" if i is None else f"c{i % COLOURS}"


def dash(i: int) -> str:
    """Returns the dash pattern of the i-th series."""
    return _DASHES[(i // COLOURS + i) % len(_DASHES)]


def key(
    names: Sequence[str] | Mapping[int, str], *, dashes: Mapping[int, str] | None = None
) -> Html:
    """Returns the legend of series 0, 1, ..., or of given numbers; `dashes` as in `line_chart`."""

    def item(i: int, name: str) -> Html:
        stroke = (dashes or {}).get(i, dash(i))
        line = el(
            "line", x1=0, x2=26, y1=6, y2=6, class_="curve " + colour(i), stroke_dasharray=stroke
        )
        return el("li", el("svg", line, viewBox="0 0 26 12", width=26, aria_hidden="true"), name)

    numbered = names if isinstance(names, Mapping) else dict(enumerate(names))
    return el("ul", [item(i, name) for i, name in numbered.items()], class_="key")


def swatches(names: Mapping[int, str]) -> Html:
    """Returns the legend of areas by colour number."""
    items = [el("li", el("span", class_="dot " + colour(i)), name) for i, name in names.items()]
    return el("ul", items, class_="key areas")


def png(pixels: np.ndarray) -> str:
    """Returns uint8 pixels `[h, w, c]`, c in {1, 3, 4}, as a PNG data URI."""
    h, w, c = pixels.shape
    rows = np.concatenate([np.zeros((h, 1), np.uint8), pixels.reshape(h, w * c)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", w, h, 8, {1: 0, 3: 2, 4: 6}[c], 0, 0, 0)
    body = b"".join(
        (
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            chunk(b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def as_file(figure: str) -> str:
    """Returns the text of an SVG file from a figure `<svg ...>`, with the page's style in it."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    opened = figure.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return opened.replace(">", f"><style>{style}</style>", 1)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers in [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns 1, 2 and 5 times powers of ten in [low, high], or only the powers if too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1e3 else (1,)
    return [m * 10.0**p for p in powers for m in factors if low <= m * 10.0**p <= high]


def short(value: float) -> str:
    """Returns a number as an axis shows it: 0.25, 1500, 20k, 3M."""
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= scale:
            return f"{value / (1e3 if suffix == 'k' else scale):.4g}{suffix}"
    return f"{value:.4g}".replace("-", "\u2212")


def shortened(text: str, letters: int) -> str:
    """Returns the text, truncated with an ellipsis to at most `letters` characters."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """The rectangle of a plot: maps data to pixels and draws the frame.

    Attributes:
      x_range, y_range: data limits, low < high.
      height: of the whole figure, in pixels.
      left: margin for labels, in pixels.
      log, log_x: whether y, or x, is logarithmic.
    """

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    height: int = 300
    left: int = 58
    log: bool = False
    right: int = WIDTH - 22
    top: int = 12
    foot: int = 46
    log_x: bool = False

    @property
    def bottom(self) -> int:
        return self.height - self.foot

    def x(self, value: Any) -> Any:
        (low, high), value = self.x_range, np.asarray(value)
        if self.log_x:
            low, high, value = math.log10(low), math.log10(high), np.log10(value)
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: Any) -> Any:
        (low, high), value = self.y_range, np.asarray(value)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), np.log10(value)
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def frame(self, *, x_label: str, y_label: str = "", y_ticks: bool = True) -> Html:
        """Returns grid lines, tick labels and axis names."""
        parts = []
        for v in (log_ticks if self.log_x else ticks)(*self.x_range):
            at = {"x": float(self.x(v)), "y": self.bottom + 18, "text_anchor": "middle"}
            parts += [self.line(x=v, class_="grid"), el("text", short(v), **at)]
        for v in (log_ticks if self.log else ticks)(*self.y_range) if y_ticks else ():
            at = {"x": self.left - 8, "y": float(self.y(v)) + 4, "text_anchor": "end"}
            parts += [self.line(y=v, class_="grid"), el("text", short(v), **at)]
        middle = (self.left + self.right) / 2
        name = {"text_anchor": "middle", "class_": "axis"}
        parts.append(el("text", x_label, x=middle, y=self.height - 8, **name))
        if y_label:
            y = (self.top + self.bottom) / 2
            turn = f"rotate(-90 14 {y:.0f})"
            parts.append(el("text", y_label, x=14, y=y, transform=turn, **name))
        return join(parts)

    def line(self, *, x: Any = None, y: Any = None, class_: str = "zero") -> Html:
        """Returns a line through the whole plot, at one x or at one y."""
        x1, x2 = (self.left, self.right) if x is None else [float(self.x(x))] * 2
        y1, y2 = (self.top, self.bottom) if y is None else [float(self.y(y))] * 2
        return el("line", x1=x1, x2=x2, y1=y1, y2=y2, class_=class_)

    def band(self, x: np.ndarray, low: np.ndarray, high: np.ndarray, class_: str) -> Html:
        """Returns the area `[n]` between two lines."""
        edge = np.concatenate([self.y(high), self.y(low)[::-1]])
        outline = points(np.concatenate([self.x(x), self.x(x)[::-1]]), edge)
        return el("polygon", points=outline, class_=class_)

    def name(self, text: str, y: float, *, class_: str = "name") -> Html:
        """Returns the name of a row, left of the plot, shortened to the available width."""
        shown = shortened(text, (self.left - 24) // 7)
        return el("text", el("title", text), shown, x=self.left - 14, y=y, class_=class_)

    def svg(self, *marks: Any, alt: str) -> Html:
        """Returns the figure with the given marks."""
        view = f"0 0 {WIDTH} {self.height}"
        return el("svg", *marks, viewBox=view, role="img", aria_label=alt, class_="plot")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A line `[n]` over steps, with a band if `low` and `high` are given."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def line_chart(
    series: Mapping[int, Series],
    *,
    y_label: str,
    x_label: str = "step",
    log: bool = False,
    log_x: bool = False,
    y_range: tuple[float, float] | None = None,
    level: float | None = None,
    at: Sequence[float] = (),
    dashes: Mapping[int, str] | None = None,
    names: bool = False,
) -> Html:
    """Draws lines with bands.

    Args:
      series: by colour number; all values finite, and positive if `log`.
      y_label: name of the plotted quantity, for the alternative text; the caption shows it.
      x_label: name of the horizontal axis.
      log, log_x: whether the vertical, or horizontal, axis is logarithmic; x must be positive then.
      y_range: limits of the vertical axis; by default those of the values.
      level: a value to mark by a dashed line, within the limits.
      at: places on the horizontal axis to mark by a dashed line; those outside are left out.
      dashes: dash patterns by colour number; by default they follow the colour number.
      names: whether lines have their names at their ends, for a figure without a key.
    """
    edges = [a for s in series.values() for a in (s.y, s.low, s.high) if a is not None]
    xs = np.concatenate([s.x for s in series.values()])
    y_range = y_range or limits(np.concatenate(edges), log=log)
    labels = map(short, (log_ticks if log else ticks)(*y_range))
    panel = Panel(
        x_range=_padded(xs.min(), xs.max(), 0.0),
        y_range=y_range,
        log=log,
        log_x=log_x,
        left=max(46, 14 + 7 * max(map(len, labels), default=0)),
        right=WIDTH - (22 + 8 * max(len(s.name) for s in series.values()) if names else 22),
    )
    marks = [panel.frame(x_label=x_label)]
    if level is not None:
        marks.append(panel.line(y=level))
    marks += [panel.line(x=x) for x in at if xs.min() <= x <= xs.max()]
    for i, s in series.items():
        if s.low is not None and s.high is not None:
            marks.append(panel.band(s.x, s.low, s.high, "band " + colour(i)))
    for i, s in series.items():
        tip = el("title", f"{s.name}: {s.y[-1]:.4g} at {x_label} {short(s.x[-1])}")
        x, y = panel.x(s.x), panel.y(s.y)
        if len(x) > 1:
            marks.append(
                el(
                    "polyline",
                    tip,
                    points=points(x, y),
                    class_="curve " + colour(i),
                    stroke_dasharray=(dashes or {}).get(i, dash(i)) if len(series) > 1 else None,
                )
            )
        marks.append(el("circle", tip, cx=float(x[-1]), cy=float(y[-1]), r=3.5, class_=colour(i)))
    if names:
        lowest = -math.inf
        for s in sorted(series.values(), key=lambda s: float(panel.y(s.y[-1]))):
            lowest = max(float(panel.y(s.y[-1])) + 4, lowest + 15)
            place = {"x": panel.right + 8, "y": lowest, "text_anchor": "start"}
            marks.append(el("text", s.name, **place))
    ends = "; ".join(f"{s.name} ends at {s.y[-1]:.4g}" for s in series.values())
    return panel.svg(*marks, alt=f"{y_label} over {x_label}. {ends}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a dot plot: single values, their mean, and its interval if there is one."""

    name: str
    values: Mapping[str, float]
    mean: float | None
    interval: tuple[float, float] | None
    note: str = ""


def dot_plot(
    rows: Sequence[Row],
    *,
    x_label: str,
    zero: bool = False,
    colours: Mapping[str, int] | None = None,
) -> Html:
    """Draws one row per name: a ring per value, a bar at the mean, a line for the interval.

    Args:
      rows: from top to bottom.
      x_label: name of the horizontal axis.
      zero: whether to include and mark 0.
      colours: colour numbers by name, for some rows; by default the positions.
    """
    numbers = [v for row in rows for v in (*row.values.values(), *(row.interval or ()))]
    x_range = limits(np.array(numbers + [0.0] * (zero or not numbers)))
    left = min(210, 24 + 7 * max(len(row.name) for row in rows))
    panel = Panel(
        x_range=x_range, y_range=(0, 1), left=left, height=58 + 46 * len(rows), right=WIDTH - 20
    )
    marks = [panel.frame(x_label=x_label, y_ticks=False)]
    if zero:
        marks.append(panel.line(x=0.0))
    for j, row in enumerate(rows):
        i = j if colours is None else colours.get(row.name)
        y = panel.top + 46 * j + 23
        marks.append(panel.name(row.name, y + 4))
        if row.interval:
            low, high = (float(panel.x(v)) for v in row.interval)
            tip = el("title", f"95 % interval [{row.interval[0]:.4g}, {row.interval[1]:.4g}]")
            marks.append(
                el("line", tip, x1=low, x2=high, y1=y, y2=y, class_="interval " + colour(i))
            )
        if row.mean is not None:
            x = float(panel.x(row.mean))
            tip = el("title", f"mean {row.mean:.4g}")
            marks.append(
                el("line", tip, x1=x, x2=x, y1=y - 12, y2=y + 12, class_="mean " + colour(i))
            )
        for seed, value in row.values.items():
            tip = el("title", f"seed {seed}: {value:.4g}")
            x = float(panel.x(value))
            marks.append(el("circle", tip, cx=x, cy=y, r=4.5, class_="ring " + colour(i)))
        if row.note:
            at = {"x": panel.right - 4, "y": y - 14 if row.values else y + 4, "text_anchor": "end"}
            marks.append(el("text", row.note, **at, class_="note"))
    said = "; ".join(f"{r.name} {r.mean:.4g}" for r in rows if r.mean is not None)
    return panel.svg(*marks, alt=f"{x_label}, mean by row: {said or 'no values'}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bars:
    """One row of a bar chart: at most one bar of every colour number."""

    name: str
    values: Mapping[int, float]


def bar_chart(
    rows: Sequence[Bars], *, kinds: Mapping[int, str], x_label: str, level: float, unit: str = ""
) -> Html:
    """Draws horizontal bars from 0, with their values at their ends.

    Args:
      rows: from top to bottom; values finite and not negative.
      kinds: names of the bars of a row, by colour number.
      x_label: name of the horizontal axis.
      level: a value to mark by a dashed line.
      unit: written after every value, which has two decimals.
    """
    pitch = 16 + 14 * len(kinds)
    top = max([level, *(v for row in rows for v in row.values.values())])
    left = min(210, 24 + 7 * max(len(row.name) for row in rows))
    panel = Panel(
        x_range=(0.0, 1.1 * top), y_range=(0, 1), left=left, height=58 + pitch * len(rows)
    )
    marks = [panel.frame(x_label=x_label, y_ticks=False)]
    for j, row in enumerate(rows):
        middle = panel.top + pitch * (j + 0.5)
        marks.append(panel.name(row.name, middle + 4))
        for n, (i, kind) in enumerate(kinds.items()):
            y = middle - 7 * len(kinds) + 14 * n
            if i not in row.values:
                marks.append(el("text", "\u2013", x=left + 6, y=y + 10, class_="note"))
                continue
            said = f"{row.values[i]:.2f}{unit}"
            end = float(panel.x(row.values[i]))
            box = {"x": left, "y": y, "width": end - left, "height": 11, "rx": 2}
            tip = el("title", f"{row.name}, {kind}: {said}")
            marks.append(el("rect", tip, **box, class_="bar " + colour(i)))
            marks.append(el("text", said, x=end + 5, y=y + 10, class_="note"))
    marks.append(panel.line(x=level))
    said = "; ".join(
        f"{row.name} {', '.join(f'{kinds[i]} {v:.2f}{unit}' for i, v in row.values.items())}"
        for row in rows
    )
    return panel.svg(*marks, alt=f"{x_label}: {said}.")


def points(x: np.ndarray, y: np.ndarray) -> str:
    """Returns the `points` of a polyline through pixels `[n]`."""
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if high <= low:
        share, low, high = 0.0, low - 0.5 * (abs(low) or 1), low + 0.5 * (abs(low) or 1)
    pad = share * (high - low)
    return float(low - pad), float(high + pad)


def limits(values: np.ndarray, *, log: bool = False) -> tuple[float, float]:
    """Returns the range of finite values `[n]` with a margin."""
    if not log:
        return _padded(values.min(), values.max(), 0.06)
    low, high = _padded(math.log10(values.min()), math.log10(values.max()), 0.06)
    return 10.0**low, 10.0**high
