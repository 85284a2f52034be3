"""Draws what each arm of studies gains over the reference, seed by seed.

  python tools/method_gains.py --results=docs/results/kd_table.json \\
      --out=docs/results/kd_full.svg --floor=-0.03 kd_full_mlp kd_full_mlp_few

The studies are named as in the file of results, which `tools/results_page.py` writes. A study is a
panel, an arm a row: a ring for each seed, a bar at the mean, a line for the 95 % interval of the
difference paired by seed. Prints how many arms have that interval above 0. An arm with a mean below
`--floor`, which would compress the others, is named in the title of its panel in place of a row.
"""

import argparse
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from distill_jax.core.errors import nearest
from distill_jax.report import figures, statistics

TITLE = 30
"""Height of the title of a panel, in units of the picture."""


def rows(study: Mapping[str, Any]) -> list[figures.Row]:
    """Returns the gains of the arms of a study, the largest mean first."""
    metric, values = study["metric"], study["values"]
    base, found = values[study["reference"]][metric], []
    for arm, metrics in values.items():
        gains = {s: x - base[s] for s, x in metrics.get(metric, {}).items() if s in base}
        if arm != study["reference"] and gains:
            e = statistics.estimate(list(gains.values()))
            found.append(figures.Row(name=arm, values=gains, mean=e.mean, interval=e.interval))
    return sorted(found, key=lambda row: -(row.mean or 0.0))


def picture(studies: Mapping[str, Mapping[str, Any]], *, floor: float) -> str:
    """Returns one SVG file with a panel for each study, one below the other."""
    parts, y, width = [], 0.0, 0.0
    for study in studies.values():
        every = rows(study)
        found = [row for row in every if row.mean is None or row.mean >= floor]
        out = [f"{row.name} {row.mean:.3f}" for row in every if row not in found]
        title = study["title"] + f" (beyond the axis: {', '.join(out)})" * bool(out)
        label = f"{study['metric']} minus that of {study['reference']}"
        colours = {row.name: 1 for row in found}
        svg = figures.dot_plot(found, x_label=label, zero=True, colours=colours)
        size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
        assert size is not None
        width, height = float(size[1]), float(size[2])
        look = 'style="fill: var(--ink); font-size: 15px; font-weight: 600"'
        parts.append(f'<text x="12" y="{y + 20:g}" {look}>{title}</text>')
        place = f'<svg x="0" y="{y + TITLE:g}" width="{width:g}" height="{height:g}"'
        parts.append(svg.replace("<svg", place, 1))
        y += TITLE + height
    return figures.as_file(f'<svg viewBox="0 0 {width:g} {y:g}">{"".join(parts)}</svg>\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("studies", nargs="+")
    parser.add_argument("--results", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--floor", default=-math.inf, type=float)
    options = parser.parse_args()
    if not options.results.is_file():
        parser.error(f"no file {options.results}; tools/results_page.py writes one")
    stored = json.loads(options.results.read_text())
    if unknown := [name for name in options.studies if name not in stored]:
        parser.error(f"no study {unknown[0]} in {options.results}; {nearest(unknown[0], stored)}")
    studies = {name: stored[name] for name in options.studies}
    options.out.write_text(picture(studies, floor=options.floor))
    for study in studies.values():
        found = rows(study)
        above = [r.name for r in found if r.interval and r.interval[0] > 0]
        print(f"{study['title']}: {len(above)} of {len(found)} above 0 ({', '.join(above)})")


if __name__ == "__main__":
    main()
