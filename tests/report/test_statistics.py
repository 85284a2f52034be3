"""Summaries of studies equal SciPy and never claim more than the seeds support."""

import numpy as np
import pytest
from scipy import stats

from distill_jax.core.errors import ConfigError, NonFiniteError
from distill_jax.report import wording
from distill_jax.report.statistics import answer, ask, estimate, format_table, summarise, verdict

RESULTS = {
    "label only": {"0": 0.70, "1": 0.72, "2": 0.69, "10": 0.71},
    "distilled": {"0": 0.74, "1": 0.75, "2": 0.74, "3": 0.99},
    "noise": {"0": 0.71, "1": 0.70, "2": 0.70},
    "one seed": {"0": 0.80},
    "failed": {},
}


@pytest.fixture
def arms():
    return {s.arm: s for s in summarise(RESULTS, reference="label only")}


def test_estimate_equals_scipy():
    x = np.random.default_rng(0).normal(size=6)
    got = estimate(list(x))
    assert got.mean == pytest.approx(x.mean())
    assert got.se == pytest.approx(stats.sem(x))
    assert got.interval == pytest.approx(
        stats.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
    )


def test_difference_is_paired_over_common_seeds(arms):
    a = np.array([0.74, 0.75, 0.74])
    b = np.array([0.70, 0.72, 0.69])
    got = arms["distilled"].difference
    assert (got.mean, got.n) == (pytest.approx(0.04), 3)
    assert got.se == pytest.approx(stats.sem(a - b))
    assert got.interval == pytest.approx(tuple(stats.ttest_rel(a, b).confidence_interval(0.95)))
    assert arms["distilled"].seeds == ("0", "1", "2", "3")
    assert arms["label only"].seeds == ("0", "1", "2", "10")
    assert arms["label only"].is_reference
    assert arms["label only"].difference is None


def test_words_say_what_the_interval_says(arms):
    assert "excludes 0, better" in verdict(arms["distilled"])
    assert "excludes 0, worse" in verdict(arms["distilled"], mode="min")
    assert verdict(arms["noise"]).endswith("over 3 paired seeds: includes 0")
    assert verdict(arms["distilled"]).startswith("difference +0.0400 ± 0.0058 (se), 95 %")
    assert verdict(arms["one seed"]) == "difference +0.1000 on one common seed: no interval"
    assert verdict(arms["failed"]) == "no seed in common with the reference"
    assert verdict(arms["label only"]) == "the reference"


def test_one_seed_has_no_interval(arms):
    assert arms["one seed"].value == (0.8, 1, None, None)
    assert arms["failed"].value is None


def test_identical_seeds_are_no_evidence():
    same = {"a": {"0": 0.70, "1": 0.72}, "b": {"0": 0.72, "1": 0.74}}
    text = verdict(summarise(same, reference="a")[1])
    assert "no spread to judge by" in text
    assert "better" not in text


@pytest.mark.parametrize("markdown", [False, True])
def test_table_holds_every_arm(arms, markdown):
    text = format_table(list(arms.values()), metric="test/accuracy", markdown=markdown)
    assert "test/accuracy (higher is better)" in text
    for needle in ("0.7050", "+0.0400 ± 0.0058", "n = 1", "includes 0", *RESULTS):
        assert needle in text
    lines = [line for line in text.splitlines()[1:] if line]
    if markdown:
        assert {line.count("|") for line in lines} == {8}
    else:
        assert len({line.index(cell) for line, cell in zip(lines[2:5], "423", strict=False)}) <= 2
        assert all(line == line.rstrip() for line in lines)
        assert lines[0].startswith("arm         seeds    mean")
    assert "lower is better" in format_table(list(arms.values()), metric="nll", mode="min")


def test_pipes_cannot_break_a_markdown_table():
    text = format_table(summarise({"a|b": {"0": 1.0}}, reference="a|b"), metric="x", markdown=True)
    assert "a\\|b" in text


def test_mistakes_are_named(arms):
    with pytest.raises(ConfigError, match="did you mean 'distilled'"):
        summarise(RESULTS, reference="distiled")
    with pytest.raises(NonFiniteError, match="a, seed 1"):
        summarise({"a": {"1": float("nan")}}, reference="a")
    with pytest.raises(ConfigError, match="max or min"):
        format_table(list(arms.values()), metric="x", mode="higher")


def test_an_answer_is_what_the_seeds_say():
    asked = {"worth it?": ("distilled", "label only", "noise"), "later?": ("failed", "noise")}
    found = ask(RESULTS, asked | {"harm?": ("label only", "distilled")})
    assert [s.arm for s in found["worth it?"]] == ["label only", "distilled", "noise"]
    assert answer("worth it?", found["worth it?"], metric="test/accuracy") == (
        "worth it?: test/accuracy 0.8050 with distilled, 0.7050 with label only; "
        "difference +0.0400 ± 0.0058 (se), 95 % interval [+0.0152, +0.0648] "
        "over 3 paired seeds: excludes 0, better"
    )
    assert answer("harm?", found["harm?"], metric="x").endswith("excludes 0, worse")
    words = answer("later?", found["later?"], metric="x")
    assert words == "later?: no answer yet, failed or noise has no result"


def test_minus_signs_are_of_numbers():
    text = "held-out kd-2 -0.5 [-.2, +3] 1e-05 -1e-05"
    wanted = "held-out kd-2 ~0.5 [~.2, +3] 1e~05 ~1e~05".replace("~", "\u2212")
    assert wording.minus(text) == wanted
