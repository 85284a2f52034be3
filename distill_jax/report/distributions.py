"""Figures of how values are distributed: ridges of densities, and clouds of points."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from distill_jax.report.figures import Panel, Series, colour, points, shortened
from distill_jax.report.html import Html, el

_BINS = 48
_KERNEL = np.array([1, 4, 6, 4, 1]) / 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ridge:
    """One row of densities: (name, values `[n]`, n > 0) by colour number, and a note."""

    groups: Mapping[int, tuple[str, np.ndarray]]
    note: str = ""


def density(values: np.ndarray, x_range: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns bin centres and the smoothed share of the values `[n]` in each bin, which sum to 1.

    Values outside the range are counted in the outermost bins; smoothing preserves the total.
    """
    low, high = x_range
    edges = np.linspace(low, high, _BINS + 1)
    counts, _ = np.histogram(np.clip(values, low, high), bins=edges)
    reach = len(_KERNEL) // 2
    padded = np.pad(counts / len(values), reach, mode="symmetric")
    return (edges[:-1] + edges[1:]) / 2, np.convolve(padded, _KERNEL, mode="valid")


def ridges(
    rows: Sequence[Ridge],
    *,
    x_range: tuple[float, float],
    x_label: str,
    pitch: int = 32,
    overlap: float = 1.5,
) -> Html:
    """Draws rows of densities below each other, with a line at each mean.

    Every row has its own vertical scale. Its groups share this scale, so their areas are equal.

    Args:
      rows: from top to bottom.
      x_range: limits of the values.
      x_label: name of the horizontal axis.
      pitch: distance of the rows, in pixels.
      overlap: height of the highest density of a row, in rows.
    """
    names = [name for row in rows for name, _ in row.groups.values()]
    left = min(190, 26 + 7 * max(map(len, names)))
    panel = Panel(
        x_range=x_range,
        y_range=(0, 1),
        left=left,
        right=Panel.right - 7 * max(len(row.note) for row in rows),
        top=round(pitch * (overlap - 1)) + 8,
        height=round(pitch * (overlap - 1)) + 60 + pitch * len(rows),
    )
    marks = [panel.frame(x_label=x_label, y_ticks=False)]
    for j, row in enumerate(rows):
        base = panel.top + pitch * (j + 1) - 4.0
        drawn = {i: density(values, x_range) for i, (_, values) in row.groups.items()}
        unit = pitch * overlap / max(share.max() for _, share in drawn.values())
        style = "ridge " if len(drawn) == 1 else "shape "
        for n, (i, (x, share)) in enumerate(drawn.items()):
            name, values = row.groups[i]
            mean = float(values.mean())
            tip = el("title", f"{name}: mean {mean:.3f}, n = {len(values)}")
            edge = np.concatenate([x_range[:1], x, x_range[1:]])
            top = base - unit * np.concatenate([share[:1], share, share[-1:]])
            outline = points(
                np.concatenate([panel.x(edge), panel.x(edge[[-1, 0]])]),
                np.concatenate([top, [base, base]]),
            )
            marks.append(el("polygon", tip, points=outline, class_=style + colour(i)))
            at = float(panel.x(np.clip(mean, *x_range)))
            peak = float(np.interp(mean, edge, top))
            marks.append(el("line", x1=at, x2=at, y1=base, y2=peak, class_="centre " + colour(i)))
            text = shortened(name, (left - 26) // 7)
            y = base - 16 * (len(drawn) - 1 - n) - (4 if len(drawn) > 1 else 1)
            label = "name tint " + colour(i) if len(drawn) > 1 else "name"
            marks.append(el("text", el("title", name), text, x=left - 14, y=y, class_=label))
        marks.append(el("line", x1=left, x2=panel.right, y1=base, y2=base, class_="grid"))
        marks.append(el("text", row.note, x=panel.right + 8, y=base - 3, class_="note"))
    said = "; ".join(
        f"{name} {values.mean():.3g}" for row in rows for name, values in row.groups.values()
    )
    return panel.svg(*marks, alt=f"Distribution of the {x_label}; means: {said}.")


def cloud(
    dots: Mapping[int, tuple[str, np.ndarray, np.ndarray]],
    lines: Sequence[Series],
    *,
    counts: np.ndarray,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_label: str,
    y_label: str,
) -> Html:
    """Draws points, lines with bands over them, and a histogram above both.

    Args:
      dots: (name, x `[m]`, y `[m]`) by colour number.
      lines: medians with the bands around them.
      counts: counts of equal-width bins over the range of x.
      x_range, y_range: limits.
      x_label, y_label: names of the axes.
    """
    panel = Panel(x_range=x_range, y_range=y_range, height=390, top=62)
    marks = [panel.frame(x_label=x_label, y_label=y_label)]
    width = (panel.right - panel.left) / len(counts)
    for j, count in enumerate(counts):
        if count:
            h = max(1.0, 42 * float(count / counts.max()))
            box = {"x": panel.left + j * width + 0.5, "y": 54 - h, "width": width - 1, "height": h}
            marks.append(el("rect", el("title", f"n = {count}"), **box, class_="bar c0"))
    if x_range[0] < 0 < x_range[1]:
        marks.append(panel.line(x=0.0))
    for i, (name, x, y) in dots.items():
        path = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(panel.x(x), panel.y(y), strict=True))
        marks.append(el("path", el("title", name), d=path, class_="dots " + colour(i)))
    for line in lines:
        x = panel.x(line.x)
        if line.low is not None and line.high is not None:
            marks.append(panel.band(line.x, line.low, line.high, "band strong c0"))
        marks.append(el("polyline", points=points(x, panel.y(line.y)), class_="curve middle c0"))
    ends = [f"{v:.3g} at {x:.2g}" for line in lines for x, v in zip(line.x, line.y, strict=True)]
    said = f"; medians: {ends[0]}, {ends[-1]}" if ends else ""
    return panel.svg(*marks, alt=f"{y_label} over {x_label}{said}.")
