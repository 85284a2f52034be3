"""Figures that need no run."""

import re

import numpy as np

from distill_jax.report import figures


def test_names_at_the_ends_of_lines_do_not_overlap():
    series = {
        i: figures.Series(name=name, x=np.array([1.0, 2.0]), y=np.array([0.0, 1.0 + 1e-4 * i]))
        for i, name in enumerate(("kd", "dist", "rkd"), start=1)
    }
    chart = str(figures.line_chart(series, y_label="gain", names=True))
    places = {
        name: float(re.search(rf'y="([0-9.]+)"[^>]*>{name}<', chart)[1])  # type: ignore[index]
        for name in ("kd", "dist", "rkd")
    }
    low, middle, high = sorted(places.values())
    assert middle - low >= 12 and high - middle >= 12
    assert "rkd</text>" not in str(figures.line_chart(series, y_label="gain"))
