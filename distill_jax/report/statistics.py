"""Statistics of a study: means, t-intervals and paired differences over seeds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from distill_jax.core.errors import ConfigError, NonFiniteError, nearest
from distill_jax.report.tables import decimals


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
      mean: the sample mean.
      n: number of seeds.
      se: standard error of the mean, from the n - 1 sample variance; None where n = 1.
      interval: two-sided 95 % Student-t interval `(low, high)`; None where n = 1.
    """

    mean: float
    n: int
    se: float | None = None
    interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm of a study.

    Attributes:
      arm: its name.
      seeds: the seeds that have a value, in numeric order.
      value: estimate of the metric; None where no seed has a value.
      difference: estimate of arm minus reference over the seeds that both have; None for the
        reference itself and where no seed is common.
      is_reference: whether this is the reference.
    """

    arm: str
    seeds: tuple[str, ...]
    value: Estimate | None
    difference: Estimate | None
    is_reference: bool


def estimate(values: Sequence[float]) -> Estimate:
    """Returns mean, standard error and 95 % t-interval of independent values `[n]`, n >= 1."""
    x = np.asarray(values, np.float64)
    mean = float(x.mean())
    if len(x) == 1:
        return Estimate(mean, 1)
    se = float(x.std(ddof=1)) / math.sqrt(len(x))
    half = float(special.stdtrit(len(x) - 1, 0.975)) * se
    return Estimate(mean, len(x), se, (mean - half, mean + half))


def summarise(results: Mapping[str, Mapping[str, float]], *, reference: str) -> list[ArmSummary]:
    """Summarises a study, arms in the order given.

    Differences are paired by seed: effects of a seed that are common to both arms (initial weights,
    order of the data) cancel. Intervals assume that seeds are independent and differences
    approximately normal; they are not corrected for the number of arms.

    Args:
      results: finished values by arm and seed.
      reference: the arm that the others are compared with.

    Raises:
      ConfigError: `reference` is not an arm.
      NonFiniteError: a value is NaN or infinite; leave out runs that failed.
    """
    if reference not in results:
        raise ConfigError(
            f"reference {reference!r} is not an arm of the study",
            where="study.reference",
            hint=nearest(reference, results),
        )
    for arm, by_seed in results.items():
        for seed, value in by_seed.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"the result is {value}", where=f"{arm}, seed {seed}")

    def of(arm: str) -> ArmSummary:
        mine, theirs = results[arm], results[reference]
        seeds = tuple(sorted(mine, key=_seed_order))
        common = [seed for seed in seeds if seed in theirs and arm != reference]
        return ArmSummary(
            arm=arm,
            seeds=seeds,
            value=estimate([mine[s] for s in seeds]) if seeds else None,
            difference=estimate([mine[s] - theirs[s] for s in common]) if common else None,
            is_reference=arm == reference,
        )

    return [of(arm) for arm in results]


def ask(
    results: Mapping[str, Mapping[str, float]], questions: Mapping[str, Sequence[str]]
) -> dict[str, list[ArmSummary]]:
    """Summarises the arms of each question, its reference first and then the arm it is about.

    Args:
      results: as in `summarise`; arms without values may be absent.
      questions: `{question: (arm, reference, other arms ...)}`.
    """
    answers = {}
    for question, (arm, reference, *others) in questions.items():
        own = {name: results.get(name, {}) for name in (reference, arm, *others)}
        answers[question] = summarise(own, reference=reference)
    return answers


def answer(
    question: str,
    summaries: Sequence[ArmSummary],
    *,
    metric: str,
    mode: str = "max",
    digits: int = 4,
) -> str:
    """Returns a one-sentence answer: both means, and the conclusion from their difference.

    Args:
      question: text of the question.
      summaries: from `ask`.
      metric: its name.
      mode: "max" if higher is better, "min" if lower is.
      digits: decimals.
    """
    reference, arm = summaries[:2]
    if arm.value is None or reference.value is None:
        return f"{question}: no answer yet, {arm.arm} or {reference.arm} has no result"
    return (
        f"{question}: {metric} {arm.value.mean:.{digits}f} with {arm.arm}, "
        f"{reference.value.mean:.{digits}f} with {reference.arm}; "
        f"{verdict(arm, mode=mode, digits=digits)}"
    )


def verdict(summary: ArmSummary, *, mode: str = "max", digits: int = 4) -> str:
    """Returns the conclusion that the paired difference supports, in words.

    Args:
      summary: an arm.
      mode: "max" if higher is better, "min" if lower is.
      digits: decimals.
    """
    if summary.is_reference:
        return "the reference"
    diff = summary.difference
    if diff is None:
        return "no seed in common with the reference"
    if diff.se is None or diff.interval is None:
        return f"difference {diff.mean:+.{digits}f} on one common seed: no interval"
    text = (
        f"difference {diff.mean:+.{digits}f} ± {diff.se:.{digits}f} (se), "
        f"95 % interval [{diff.interval[0]:+.{digits}f}, {diff.interval[1]:+.{digits}f}] "
        f"over {diff.n} paired seeds"
    )
    return f"{text}: {conclusion(diff, mode=mode)}"


def conclusion(difference: Estimate, *, mode: str = "max") -> str:
    """Returns a short description of a difference's interval; empty without an interval."""
    if mode not in ("max", "min"):
        raise ConfigError(f"mode is {mode!r}", where="eval.mode", hint="max or min")
    if difference.interval is None:
        return ""
    low, high = difference.interval
    if low == high == 0:
        return "the same in every seed"
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-12):
        return "seeds identical, no spread to judge by"
    if low <= 0 <= high:
        return "includes 0"
    return f"excludes 0, {'better' if (low > 0) == (mode == 'max') else 'worse'}"


def format_table(
    summaries: Sequence[ArmSummary],
    *,
    metric: str,
    mode: str = "max",
    digits: int = 4,
    markdown: bool = False,
    published: Mapping[str, float] | None = None,
) -> str:
    """Returns the table of a study, as aligned plain text or as Markdown.

    Args:
      summaries: rows, from `summarise`.
      metric: its name, for the heading.
      mode: "max" if higher is better, "min" if lower is.
      digits: decimals.
      markdown: a Markdown table instead of plain text.
      published: published values by arm, in a separate column.
    """
    columns = ["arm", "seeds", "mean", "95 % interval", "difference ± se", "95 % interval", ""]
    rows = [_cells(summary, mode=mode, digits=digits) for summary in summaries]
    if published:
        columns.append("published")
        for row, summary in zip(rows, summaries, strict=True):
            other = published.get(summary.arm)
            row.append("-" if other is None else f"{other:.{digits}f}")
    better = "higher" if mode == "max" else "lower"
    title = f"{metric} ({better} is better), differences paired by seed"
    if markdown:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        align = [":--", "--:", "--:", ":-:", "--:", ":-:", ":--", *["--:" for _ in columns[7:]]]
        lines = ["| " + " | ".join(row) + " |" for row in (columns, align, *rows)]
        return "\n".join([f"**{title}**", "", *lines])
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    left = {0, 6}
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (columns, ["-" * width for width in widths], *rows)
    ]
    return "\n".join([title, *lines])


def comparison(
    compared: Mapping[str, Mapping[str, Sequence[ArmSummary]]],
    *,
    titles: Mapping[str, str],
    mode: str,
    published: Mapping[str, float],
) -> str:
    """Returns the answers to the questions of a study, and a table for each question and state.

    Args:
      compared: rows of `summarise` by state and question; "" for no question. Sentences
        answer the questions of the state "value".
      titles: names of the metric by state.
      mode: "max" if higher is better, "min" if lower is.
      published: as in `format_table`.
    """
    every = [row for tables in compared.values() for rows in tables.values() for row in rows]
    digits = decimals(max((abs(row.value.mean) for row in every if row.value), default=0))
    parts = [
        answer(question, rows, metric=titles["value"], mode=mode, digits=digits)
        for question, rows in compared.get("value", {}).items()
        if question
    ]
    for state, tables in compared.items():
        for question, rows in tables.items():
            title = f"{question}: {titles[state]}" if question else titles[state]
            parts.append(
                format_table(rows, metric=title, mode=mode, digits=digits, published=published)
            )
    return "\n\n".join(parts)


def _seed_order(seed: str) -> tuple[int, str]:
    return (int(seed), seed) if str(seed).isdigit() else (2**63, str(seed))


def _cells(summary: ArmSummary, *, mode: str, digits: int) -> list[str]:
    def interval(est: Estimate | None, sign: str) -> str:
        if est is None or est.interval is None:
            return "n = 1" if est else "-"
        return "[" + ", ".join(f"{v:{sign}.{digits}f}" for v in est.interval) + "]"

    value, diff = summary.value, summary.difference
    if diff is None:
        difference = "reference" if summary.is_reference else "-"
    else:
        difference = f"{diff.mean:+.{digits}f}" + (f" ± {diff.se:.{digits}f}" if diff.n > 1 else "")
    return [
        summary.arm,
        str(len(summary.seeds)),
        f"{value.mean:.{digits}f}" if value else "-",
        interval(value, ""),
        difference,
        "" if summary.is_reference else interval(diff, "+"),
        conclusion(diff, mode=mode) if diff else "",
    ]
